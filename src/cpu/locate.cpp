#include "locate.h"

#include <algorithm>
#include <stdexcept>

#include "bindings.h"

namespace py = pybind11;

namespace implicitdiff {
namespace {

// From DLPack 1.3, dlpack.h (https://github.com/dmlc/dlpack, Apache-2.0). Functions that are not called here are
// declared without their types.
struct DLPackVersion {
  std::uint32_t major, minor;
};
enum DLDeviceType : std::int32_t { kDLCPU = 1, kDLCUDA = 2 };
struct DLDevice {
  DLDeviceType device_type;
  std::int32_t device_id;
};
enum DLDataTypeCode : std::uint8_t { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4 };
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  DLPackExchangeAPIHeader* prev_api;
};
struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);
  void (*current_work_stream)();
};

bool operator==(DLDevice a, DLDevice b) { return a.device_type == b.device_type && a.device_id == b.device_id; }
bool operator==(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

constexpr DLDataType bfloat16{kDLBfloat, 16, 1}, float16{kDLFloat, 16, 1}, float32{kDLFloat, 32, 1},
    float64{kDLFloat, 64, 1}, int64{kDLInt, 64, 1};

bool half(DLDataType type) { return type == bfloat16 || type == float16; }

// The references are never released: static objects are destroyed after the interpreter.
struct {
  decltype(DLPackExchangeAPI::dltensor_from_py_object_no_sync) describe;
  PyTypeObject *tensor, *parameter;
  PyObject *is_neg, *requires_grad, *is_leaf;
} torch;

// True for a tensor or parameter, of no subclass, without the negative bit. A tensor with the bit, such as the
// imaginary part of a conjugate view, is the negative of its memory.
bool plain(PyObject* x) {
  if (Py_TYPE(x) != torch.tensor && Py_TYPE(x) != torch.parameter) return false;
  const auto neg = py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch.is_neg, &x, 1, nullptr));
  if (!neg) PyErr_Clear();
  return neg.ptr() == Py_False;
}

// Fills t, whose shape and strides are those of the tensor and valid until it changes. False for a wrapper of a
// transform of torch.func, which has no memory.
bool describe(PyObject* x, DLTensor& t) {
  if (torch.describe(x, &t) == 0) return true;
  PyErr_Clear();
  return false;
}

// Number of elements, -1 if the tensor is not contiguous.
std::int64_t size(const DLTensor& t) {
  if (std::find(t.shape, t.shape + t.ndim, 0) != t.shape + t.ndim) return 0;
  std::int64_t n = 1;
  for (int d = t.ndim; d-- > 0; n *= t.shape[d])
    if (t.shape[d] != 1 && t.strides && t.strides[d] != n) return -1;
  return n;
}

// A tensor without memory, such as a view of one of torch's efficient zeros, reports its offset in the storage as its
// address. An offset is below this bound; Linux maps hardly any memory there, so that few tensors take the slow test.
constexpr auto high = std::uint64_t(1) << 46;

bool homeless(const py::object& x, std::size_t address) {
  if (address >= high) return false;
  try {
    return (x.attr("storage_offset")() * x.attr("itemsize")).equal(py::int_(address));
  } catch (const py::error_already_set&) {
    return true;
  }
}

bool is_true(PyObject* x, PyObject* name) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, name));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

// True for a contiguous vector of int64 on the device.
bool counts(PyObject* x, DLDevice device) {
  DLTensor t;
  return describe(x, t) && t.device == device && t.dtype == int64 && t.ndim == 1 && size(t) >= 0;
}

// True if two ranges share a byte. A range at address 0 or of length 0 is absent.
bool overlap(const std::vector<std::size_t>& addresses, const std::vector<std::size_t>& lengths) {
  std::vector<std::pair<std::size_t, std::size_t>> ranges;
  for (std::size_t i = 0; i < addresses.size(); ++i)
    if (addresses[i] && lengths[i]) ranges.emplace_back(addresses[i], addresses[i] + lengths[i]);
  std::sort(ranges.begin(), ranges.end());
  // The ranges are sorted by their begin: if any two overlap, then two neighbours do.
  const auto share = [](const auto& a, const auto& b) { return b.first < a.second; };
  return std::adjacent_find(ranges.begin(), ranges.end(), share) != ranges.end();
}

// Tensors of the columns of a step, column by column, and their memory.
struct Table {
  std::size_t rows;
  std::vector<py::object> entries;
  std::vector<std::size_t> addresses, lengths;  // of the entries, in bytes
  std::vector<std::int64_t> sizes;              // of the rows, in elements
  DLDevice device;

  explicit Table(const std::vector<py::sequence>& columns) : rows(columns[0].size()), sizes(rows), device{} {
    entries.reserve(columns.size() * rows);
    for (const py::sequence& column : columns)
      for_each(column, [&](PyObject* x) { entries.push_back(py::reinterpret_borrow<py::object>(x)); });
    addresses.resize(entries.size());
    lengths.resize(entries.size());
  }

  bool absent(std::size_t i) const { return i >= rows && entries[i].is_none(); }

  bool is_plain() const {
    for (std::size_t i = 0; i < entries.size(); ++i)
      if (!absent(i) && !plain(entries[i].ptr())) return false;
    return true;
  }

  // Columns of the set `of`, as bits, with a tensor whose attribute is `wanted`.
  std::size_t which(PyObject* attribute, bool wanted, std::size_t of) const {
    std::size_t found = 0;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      const std::size_t column = std::size_t(1) << i / rows;
      if (of & column && !absent(i) && is_true(entries[i].ptr(), attribute) == wanted) found |= column;
    }
    return found;
  }

  // Fills addresses, lengths, sizes and device. False if a kernel cannot read a tensor, or if it differs from the
  // others.
  bool describe_all(std::size_t accumulated) {
    std::vector<DLTensor> first(rows);
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (absent(i)) continue;
      DLTensor t;
      if (!describe(entries[i].ptr(), t)) return false;
      const std::size_t column = i / rows, row = i % rows;
      const std::int64_t n = size(t);
      if (column == 0) first[row] = t, sizes[row] = n;
      const DLTensor &one = first[0], &like = first[row];
      const DLDataType type = column >= accumulated && half(one.dtype) ? float32 : one.dtype;
      const bool placed = (t.device.device_type == kDLCPU || t.device.device_type == kDLCUDA) && t.device == one.device;
      const bool typed = (half(type) || type == float32 || type == float64) && t.dtype == type;
      const bool shaped = n >= 0 && std::equal(t.shape, t.shape + t.ndim, like.shape, like.shape + like.ndim);
      if (!placed || !typed || !shaped) return false;
      addresses[i] = reinterpret_cast<std::size_t>(t.data) + t.byte_offset;
      lengths[i] = n * (type.bits / 8);
      if (addresses[i] % (type.bits / 8) || (n && !addresses[i])) return false;
      device = t.device;
    }
    return true;
  }

  bool has_memory() const {
    for (std::size_t i = 0; i < entries.size(); ++i)
      if (addresses[i] && homeless(entries[i], addresses[i])) return false;
    return true;
  }

  bool is_apart(const std::vector<std::size_t>& written) const {
    if (written.empty()) return true;
    std::vector<std::size_t> taken = addresses;
    for (std::size_t i = 0; i < taken.size(); ++i) {
      const bool is_written = std::find(written.begin(), written.end(), i / rows) != written.end();
      if (!is_written && taken[i] == addresses[written[0] * rows + i % rows]) taken[i] = 0;
    }
    return !overlap(taken, lengths);
  }
};

template <class T> py::list integers(const std::vector<T>& values) {
  py::list list(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) PyList_SET_ITEM(list.ptr(), i, PyLong_FromSize_t(values[i]));
  return list;
}

}  // namespace

bool use(const py::object& api, const py::type& tensor, const py::type& parameter) {
  torch = {};
  constexpr auto name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(api.ptr(), name)) return false;
  auto header = static_cast<const DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(api.ptr(), name));
  while (header && header->version.major != 1) header = header->prev_api;
  if (!header) return false;
  const auto type = [](py::type t) { return reinterpret_cast<PyTypeObject*>(t.release().ptr()); };
  torch = {reinterpret_cast<const DLPackExchangeAPI*>(header)->dltensor_from_py_object_no_sync, type(tensor),
           type(parameter), tensor.attr("is_neg").cast<py::object>().release().ptr(),
           PyUnicode_InternFromString("requires_grad"), PyUnicode_InternFromString("is_leaf")};
  return torch.describe;
}

std::optional<Located> locate(const std::vector<py::sequence>& columns, std::size_t accumulated,
                              const std::vector<std::size_t>& written, const py::object& count) {
  if (!torch.describe || columns.empty()) return {};
  for (const py::sequence& column : columns)
    if (column.size() != columns[0].size()) return {};
  for (const std::size_t column : written)
    if (column >= columns.size()) throw std::invalid_argument("there is no such column");
  Table table(columns);
  if (table.entries.size() != columns.size() * table.rows) return {};  // a sequence that changes as it is read
  // is_neg releases the GIL, and another thread may then resize a tensor: all calls of it come before describe_all,
  // which holds pointers to the shapes.
  if (!table.is_plain() || (!count.is_none() && !plain(count.ptr()))) return {};
  const std::size_t requiring = table.which(torch.requires_grad, true, ~std::size_t(0));
  const std::size_t inner = table.which(torch.is_leaf, false, requiring);
  if (!table.describe_all(accumulated) || !table.has_memory()) return {};
  if (!count.is_none() && table.rows && !counts(count.ptr(), table.device)) return {};
  std::vector<std::size_t> addresses = table.addresses;
  for (const std::size_t column : written) {
    const auto begin = table.addresses.begin() + column * table.rows;
    addresses.insert(addresses.end(), begin, begin + table.rows);
  }
  return Located{integers(addresses), integers(table.sizes), requiring, inner, table.is_apart(written)};
}

}  // namespace implicitdiff
