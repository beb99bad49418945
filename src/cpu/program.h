// Instructions as they are given, and as they run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace implicitdiff {

using Integers = std::vector<std::int64_t>;

// Largest size, offset and stride: products with the lanes of a block fit an int64.
constexpr std::int64_t most_elements = std::int64_t(1) << 40;

// What an instruction may reach, in elements.
struct Memory {
  int width;
  std::int64_t arena;
  Integers shared;
};

// Throws std::invalid_argument with a sentence about instruction `at`.
[[noreturn]] void refuse(std::size_t at, const std::string& name, const std::string& problem);

// Operation of instruction `at`, checked to be known.
Op operation(const Integers& given, std::size_t at);

// Instructions that compute what instruction `at`, which is no jump, is to compute. None where it has no results, two
// where results are rounded afterwards.
std::vector<Instruction> instructions(const Integers& given, std::size_t at, const Memory& memory);

}  // namespace implicitdiff
