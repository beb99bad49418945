// Order of the operands of `step` and of `pull`, for a formula with M moments: first the operands that are read, then
// those that are written. implicitdiff/optim/_fused.py hands them over in this order.
//
// `stored(k)`: operand k has the dtype of the call. The others have the formula's arithmetic type R: a moment of a half
// precision parameter is float32.
#pragma once

namespace implicitdiff {

// g, p, base, s... -> out = base + u, next...
template <int M> struct StepLayout {
  static constexpr int g = 0, p = 1, base = 2, s = 3, reads = s + M;
  static constexpr int out = reads, next = out + 1, operands = next + M;

  static constexpr bool stored(int k) { return k < s || k == out; }
};

// g, p, s..., u_bar, next_bar... -> g_bar, p_bar, s_bar...
//
// `base` has no part here: out = base + u is linear in it, and its cotangent is that of out.
template <int M> struct PullLayout {
  static constexpr int g = 0, p = 1, s = 2, u_bar = s + M, next_bar = u_bar + 1, reads = next_bar + M;
  static constexpr int g_bar = reads, p_bar = g_bar + 1, s_bar = p_bar + 1, operands = s_bar + M;

  static constexpr bool stored(int k) { return k < s || k == u_bar || k == g_bar || k == p_bar; }
};

}  // namespace implicitdiff
