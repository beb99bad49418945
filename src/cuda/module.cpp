#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using namespace implicitdiff;

namespace {

template <void (*run)(const Call&)>
void entry(std::string name, std::vector<double> numbers, std::string dtype, std::vector<std::int64_t> sizes,
           std::vector<std::int64_t> which, std::uintptr_t count, std::vector<std::uintptr_t> addresses,
           std::uintptr_t stream) {
  const py::gil_scoped_release released;  // a launch waits while the device's queue is full
  run({std::move(name), std::move(numbers), std::move(dtype), std::move(sizes), std::move(which), count,
       std::move(addresses), stream});
}

py::dict info() {
  py::dict found;
  found["archs"] = architectures();
  found["cuda"] = runtime_version();
  found["devices"] = devices();
  return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.def("step", entry<step>);
  module.def("pull", entry<pull>);
  module.def("info", info);
}
