#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace implicitdiff {

// One call. Addresses are operand-major, null where an operand is absent; leaf i's step is count[which[i]].
struct Call {
  std::string name;
  std::vector<double> numbers;
  std::string dtype;
  std::vector<std::int64_t> sizes, which;
  const std::int64_t* count;
  std::vector<void*> addresses;
  int threads;
};

// Both throw std::invalid_argument before they touch an operand.
void step(const Call& call);
void pull(const Call& call);

// The instruction set of the loops on this machine.
const char* simd();

}  // namespace implicitdiff
