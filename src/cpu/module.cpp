#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "locate.h"
#include "machine.h"
#include "steps.h"

namespace py = pybind11;
using namespace implicitdiff;

namespace {

py::dict info() {
  using namespace py::literals;
#ifdef _OPENMP
  constexpr bool openmp = true;
#else
  constexpr bool openmp = false;
#endif
  return py::dict("compiler"_a = __VERSION__, "openmp"_a = openmp, "simd"_a = simd());
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  define<int, step, pull>(module, "threads");
  module.def("use", use, py::arg("api"), py::arg("tensor"), py::arg("parameter"));
  module.def("locate", locate, py::arg("columns"), py::arg("accumulated"), py::arg("written"), py::arg("count"));
  module.def("info", info);
  module.def("operations", operation_names);
  using py::arg;
  using Tensors = std::vector<std::array<std::int64_t, 3>>;
  py::class_<Machine>(module, "Machine")
      .def(py::init<int, const std::vector<Integers>&, const Sections&, std::int64_t, const Tensors&, const Tensors&,
                    const Integers&, std::int64_t, std::int64_t>(),
           arg("width"), arg("code"), arg("sections"), arg("arena"), arg("carries"), arg("inputs"), arg("shared"),
           arg("running"), arg("paused"))
      .def("run", &Machine::run, arg("carries"), arg("inputs"), arg("shared"), arg("lanes"), arg("at_most"),
           arg("threads"), arg("starts") = false, arg("judges") = false, py::call_guard<py::gil_scoped_release>());
}
