// Functions of kernels.cu for module.cpp. No CUDA, no Python: nvcc compiles the one, and pybind11 needs the other.
#pragma once

#include <cstdint>
#include <vector>

#include "call.h"

namespace implicitdiff {

// Addresses and counts are device memory. Both throw std::invalid_argument before they launch a kernel, and
// std::runtime_error if a launch fails.
void step(const Call& call, std::uintptr_t stream);
void pull(const Call& call, std::uintptr_t stream);

std::vector<int> architectures();
int runtime_version();
int devices();  // 0 also if there is no driver

}  // namespace implicitdiff
