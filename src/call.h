// Arguments of `step` and `pull`, on the CPU and on CUDA, and their checks. No Python and no CUDA.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace implicitdiff {

// Storage type of gradients and parameters.
enum class Dtype { float32, float64, bfloat16, float16 };

inline Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("unknown dtype '" + name + "'");
}

struct Call {
  std::string formula;          // a name of with_formula
  std::vector<double> numbers;  // hyper-parameters, in the order of the formula's constructor
  Dtype dtype;
  std::vector<std::int64_t> sizes;  // number of elements of each leaf
  std::vector<std::int64_t> which;  // leaf i is at its step count[which[i]]
  const std::int64_t* count;        // on the device of the operands, as the addresses are
  std::vector<void*> addresses;     // of the operands in the order of layout.h, each for all leaves

  std::size_t leaves() const { return sizes.size(); }

  // Null where the operand is absent.
  void* address(int operand, std::size_t leaf) const { return addresses[operand * leaves() + leaf]; }
};

// Throws std::invalid_argument unless the arguments suit a formula of so many numbers and a layout of so many operands.
// To be called before an operand is read.
inline void check(const Call& call, std::size_t numbers, std::size_t operands) {
  const auto refuse = [&](const std::string& problem) { throw std::invalid_argument(call.formula + ": " + problem); };
  const auto has_negative = [](const std::vector<std::int64_t>& xs) {
    return std::any_of(xs.begin(), xs.end(), [](std::int64_t x) { return x < 0; });
  };
  const std::size_t leaves = call.leaves();
  if (call.numbers.size() != numbers) {
    refuse(std::to_string(numbers) + " numbers, not " + std::to_string(call.numbers.size()));
  }
  if (call.which.size() != leaves) refuse("which and sizes differ in length");
  if (call.addresses.size() != operands * leaves) {
    refuse(std::to_string(operands) + " operands of " + std::to_string(leaves) + " leaves, but " +
           std::to_string(call.addresses.size()) + " addresses");
  }
  if (has_negative(call.sizes) || has_negative(call.which)) refuse("a size or an index is negative");
  if (call.count == nullptr && leaves != 0) refuse("no counts");
}

}  // namespace implicitdiff
