#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "locate.h"
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
}
