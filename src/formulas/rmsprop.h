#pragma once

#include "common.h"

namespace implicitdiff {

// Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012. Centered: Graves, Generating
// Sequences With Recurrent Neural Networks, arXiv:1308.0850, equations 38 to 41.
//
//   v' = alpha v + (1 - alpha) g^2,  a' = alpha a + (1 - alpha) g,  V = max(v' - a'^2, 0) or v'
//   d = g / (root(V + eps_root) + eps),  b' = momentum b + d,  u = -lr b' or -lr d
//
// s = [v, a, b], without those that a variant does not have.
template <class R, bool Centered, bool Momentum> struct Rmsprop {
  static constexpr int moments = 1 + Centered + Momentum;
  static constexpr int numbers = 7;

  Gradient<R> gradient;
  Mean<R> mean;
  MeanSquare<R> square;
  R scale, eps, eps_root, keep;

  // [lr, alpha, eps, eps_root, weight_decay, momentum, maximize]
  HD Rmsprop(const double* numbers, std::int64_t)
      : gradient(numbers[6] != 0, numbers[4]),
        mean(numbers[1]),
        square(numbers[1]),
        scale(R(-numbers[0])),
        eps(R(numbers[2])),
        eps_root(R(numbers[3])),
        keep(R(numbers[5])) {}

  HD void step(R g, R p, R* s, R& u) const {
    g = gradient.of(g, p);
    s[0] = square.next(s[0], g);
    R v = s[0];
    if constexpr (Centered) {
      s[1] = mean.next(s[1], g);
      v = v - s[1] * s[1];
      v = v < 0 ? R(0) : v;
    }
    R d = g / (root(v + eps_root) + eps);
    if constexpr (Momentum) d = s[moments - 1] = keep * s[moments - 1] + d;
    u = scale * d;
  }

  // With D = root(v + eps_root) + eps and d = g / D: D_bar = -(d_bar / D) d.
  HD void pull(R g, R p, const R* s, R u_bar, const R* next_bar, R& g_bar, R& p_bar, R* s_bar) const {
    g = gradient.of(g, p);
    R a = 0, v = square.next(s[0], g);
    bool inside = true;
    if constexpr (Centered) {
      a = mean.next(s[1], g);
      v = v - a * a;
      inside = v >= 0;
      v = v < 0 ? R(0) : v;
    }
    const R r = root(v + eps_root);
    const R over = 1 / (r + eps);

    R d_bar = scale * u_bar;
    if constexpr (Momentum) {
      d_bar += next_bar[moments - 1];
      s_bar[moments - 1] = keep * d_bar;
    }
    d_bar *= over;
    R v_bar = root_pull(r, -d_bar * (g * over));
    R bar = d_bar;
    if constexpr (Centered) {
      v_bar = inside ? v_bar : R(0);
      const R a_bar = next_bar[1] - 2 * a * v_bar;
      s_bar[1] = mean.from_m(a_bar);
      bar += mean.from_g(a_bar);
    }
    v_bar += next_bar[0];
    s_bar[0] = square.from_v(v_bar);
    gradient.pull(bar + square.from_g(g, v_bar), g_bar, p_bar);
  }
};

}  // namespace implicitdiff
