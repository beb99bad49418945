#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "locate.h"
#include "steps.h"

namespace py = pybind11;
using namespace implicitdiff;

namespace {

// Cheaper than pybind11's own conversion of a list, which shows where leaves are many and small.
template <class T, T (*as)(PyObject*)> std::vector<T> vector(const py::list& list) {
  std::vector<T> found;
  found.reserve(list.size());
  for (const py::handle each : list) {
    found.push_back(as(each.ptr()));
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  return found;
}

std::int64_t integer(PyObject* x) { return PyLong_AsLongLong(x); }

template <void (*run)(const Call&)>
void entry(std::string name, std::vector<double> numbers, std::string dtype, const py::list& sizes,
           const py::list& which, std::uintptr_t count, const py::list& addresses, int threads) {
  const Call call{std::move(name),
                  std::move(numbers),
                  std::move(dtype),
                  vector<std::int64_t, integer>(sizes),
                  vector<std::int64_t, integer>(which),
                  reinterpret_cast<const std::int64_t*>(count),
                  vector<void*, PyLong_AsVoidPtr>(addresses),
                  threads};
  const py::gil_scoped_release released;
  run(call);
}

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
  module.def("step", entry<step>);
  module.def("pull", entry<pull>);
  module.def("use", use);
  module.def("locate", locate);
  module.def("info", info);
}
