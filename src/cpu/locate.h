#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace implicitdiff {

// Takes torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor and torch.nn.Parameter for locate, which finds nothing
// before this, or after it has said false: for an API that is missing or not understood.
bool use(const pybind11::object& api, const pybind11::type& tensor, const pybind11::type& parameter);

// The addresses, column by column and 0 for None, and the number of elements of each row. Nothing unless all of it is
// what kernels read: plain tensors on one device, aligned, contiguous, of one shape per row, and of one type of
// floating point, which in the columns from `accumulated` on is the type that it accumulates in.
using Located = std::pair<pybind11::list, pybind11::list>;
std::optional<Located> locate(const std::vector<pybind11::list>& columns, std::size_t accumulated);

// Whether two of these ranges share a byte. One at address 0 or of length 0 is absent.
bool overlap(const std::vector<std::size_t>& addresses, const std::vector<std::size_t>& lengths);

}  // namespace implicitdiff
