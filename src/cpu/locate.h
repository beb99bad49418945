#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace implicitdiff {

// Sets what locate needs: torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor and torch.nn.Parameter. Returns false if
// the API is missing or of another major version. Until a call has returned true, locate returns nothing.
bool use(const pybind11::object& api, const pybind11::type& tensor, const pybind11::type& parameter);

// Memory of the columns of a step:
//   - addresses, column by column, 0 for None, followed by those of the `written` columns again;
//   - number of elements of each row;
//   - columns, as bits, with a tensor that requires a gradient;
//   - columns, as bits, with a tensor that requires a gradient and is not a leaf;
//   - true if the written columns overlap no other operand, except that a row may read the address of the row in the
//     first written column.
//
// Returns nothing unless kernels can read all tensors: plain, on one device, aligned, contiguous, of one shape per row
// and of one floating dtype, whose accumulator is the dtype of the columns from `accumulated` on. `count` is None or a
// plain contiguous vector of int64 on the device of the columns.
using Located = std::tuple<pybind11::list, pybind11::list, std::size_t, std::size_t, bool>;
std::optional<Located> locate(const std::vector<pybind11::sequence>& columns, std::size_t accumulated,
                              const std::vector<std::size_t>& written, const pybind11::object& count);

}  // namespace implicitdiff
