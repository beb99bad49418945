// Python functions `step` and `pull` of a compiled module. Their signatures stand in implicitdiff/_C/*.pyi too.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "call.h"

namespace implicitdiff {

// For each item of a sequence. A list or a tuple is read where it lies: pybind11's own conversions copy item by item
// through the iterator protocol, which shows where leaves are many and small.
template <class Body> void for_each(const pybind11::sequence& sequence, Body&& body) {
  const auto fast = pybind11::reinterpret_steal<pybind11::object>(PySequence_Fast(sequence.ptr(), "not a sequence"));
  if (!fast) throw pybind11::error_already_set();
  // Neither length nor items are kept: a conversion may run Python code, which may change the list.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) body(PySequence_Fast_GET_ITEM(fast.ptr(), i));
}

// `failed` is the value that `convert` returns beside a Python error, and perhaps without one.
template <class T> std::vector<T> vector_of(const pybind11::sequence& sequence, T (*convert)(PyObject*), T failed) {
  std::vector<T> found;
  found.reserve(sequence.size());
  for_each(sequence, [&](PyObject* item) {
    found.push_back(convert(item));
    if (found.back() == failed && PyErr_Occurred()) throw pybind11::error_already_set();
  });
  return found;
}

inline std::int64_t integer(PyObject* x) { return PyLong_AsLongLong(x); }

// `Place` is the number of threads on the CPU, the stream on CUDA.
template <class Place, void (*run)(const Call&, Place)>
void entry(std::string formula, const pybind11::sequence& numbers, const std::string& dtype,
           const pybind11::sequence& sizes, const pybind11::sequence& which, std::uintptr_t count,
           const pybind11::sequence& addresses, Place place) {
  const Call call{std::move(formula),
                  vector_of<double>(numbers, PyFloat_AsDouble, -1),
                  dtype_of(dtype),
                  vector_of<std::int64_t>(sizes, integer, -1),
                  vector_of<std::int64_t>(which, integer, -1),
                  reinterpret_cast<const std::int64_t*>(count),
                  vector_of<void*>(addresses, PyLong_AsVoidPtr, nullptr)};
  const pybind11::gil_scoped_release released;  // other threads run on, and a launch may wait for the device's queue
  run(call, place);
}

template <class Place, void (*step)(const Call&, Place), void (*pull)(const Call&, Place)>
void define(pybind11::module_& module, const char* place) {
  using pybind11::arg;
  const auto add = [&](const char* name, auto function) {
    module.def(name, function, arg("formula"), arg("numbers"), arg("dtype"), arg("sizes"), arg("which"), arg("count"),
               arg("addresses"), arg(place));
  };
  add("step", entry<Place, step>);
  add("pull", entry<Place, pull>);
}

}  // namespace implicitdiff
