#pragma once

#include "common.h"

namespace implicitdiff {

// Zeiler, ADADELTA: An Adaptive Learning Rate Method, arXiv:1212.5701, Algorithm 1.
//
//   v' = rho v + (1 - rho) g^2,  d = root(a + eps) / root(v' + eps) g,  a' = rho a + (1 - rho) d^2,  u = -lr d
//
// s = [v, a].
template <class R> struct Adadelta {
  static constexpr int moments = 2;
  static constexpr int numbers = 5;

  Gradient<R> gradient;
  MeanSquare<R> square;
  R scale, eps;

  // [lr, rho, eps, weight_decay, maximize]
  HD Adadelta(const double* numbers, std::int64_t)
      : gradient(numbers[4] != 0, numbers[3]), square(numbers[1]), scale(R(-numbers[0])), eps(R(numbers[2])) {}

  HD void step(R g, R p, R* s, R& u) const {
    g = gradient.of(g, p);
    s[0] = square.next(s[0], g);
    const R d = root(s[1] + eps) / root(s[0] + eps) * g;
    s[1] = square.next(s[1], d);
    u = scale * d;
  }

  // With A = root(a + eps), B = root(v' + eps) and d = A g / B: A_bar = d_bar g / B and B_bar = -d_bar d / B.
  HD void pull(R g, R p, const R* s, R u_bar, const R* next_bar, R& g_bar, R& p_bar, R* s_bar) const {
    g = gradient.of(g, p);
    const R above = root(s[1] + eps);
    const R below = root(square.next(s[0], g) + eps);
    const R over = 1 / below;
    const R d = above * over * g;

    const R d_bar = scale * u_bar + square.from_g(d, next_bar[1]);
    const R v_bar = next_bar[0] + root_pull(below, -d_bar * d * over);
    s_bar[0] = square.from_v(v_bar);
    s_bar[1] = square.from_v(next_bar[1]) + root_pull(above, d_bar * g * over);
    gradient.pull(above * over * d_bar + square.from_g(g, v_bar), g_bar, p_bar);
  }
};

}  // namespace implicitdiff
