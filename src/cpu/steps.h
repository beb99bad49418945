#pragma once

#include "call.h"

namespace implicitdiff {

// Both throw std::invalid_argument before they read an operand.
void step(const Call& call, int threads);
void pull(const Call& call, int threads);

// Instruction set of the loops on this machine.
const char* simd();

}  // namespace implicitdiff
