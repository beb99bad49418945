#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace implicitdiff {

// Takes torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor and torch.nn.Parameter for locate, which finds nothing
// before this, or after it has said false: for an API that is missing or not understood.
bool use(const pybind11::object& api, const pybind11::type& tensor, const pybind11::type& parameter);

// What is known of the columns of a step: the addresses, column by column and 0 for None, followed by those of the
// `written` columns again; the number of elements of each row; two sets of columns, as bits: those with a tensor that
// requires a gradient, and those with one that is no leaf; and whether the written columns overlap nothing else, except
// that a row may read the address that the first of them has there. Nothing unless all of it is what kernels read:
// plain tensors on one device, aligned, contiguous, of one shape per row, and of one type of floating point, which in
// the columns from `accumulated` on is the type that it accumulates in. `count` is None, or has to be a plain and
// contiguous vector of int64 on that device.
using Located = std::tuple<pybind11::list, pybind11::list, std::size_t, std::size_t, bool>;
std::optional<Located> locate(const std::vector<pybind11::list>& columns, std::size_t accumulated,
                              const std::vector<std::size_t>& written, const pybind11::object& count);

}  // namespace implicitdiff
