#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "kernels.h"

namespace py = pybind11;
using namespace implicitdiff;

namespace {

py::dict info() {
  using namespace py::literals;
  return py::dict("archs"_a = architectures(), "cuda"_a = runtime_version(), "devices"_a = devices());
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  define<std::uintptr_t, step, pull>(module, "stream");
  module.def("info", info);
}
