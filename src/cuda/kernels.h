// What kernels.cu gives to module.cpp: neither CUDA nor Python in it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace implicitdiff {

// One call. Addresses are device memory, operand-major, 0 where an operand is absent; leaf i's step is count[which[i]].
struct Call {
  std::string name;
  std::vector<double> numbers;
  std::string dtype;
  std::vector<std::int64_t> sizes, which;
  std::uintptr_t count;
  std::vector<std::uintptr_t> addresses;
  std::uintptr_t stream;
};

// Both throw std::invalid_argument before they launch anything, and std::runtime_error where a launch fails.
void step(const Call& call);
void pull(const Call& call);

std::vector<int> architectures();
int runtime_version();
int devices();  // 0 also where there is no driver

}  // namespace implicitdiff
