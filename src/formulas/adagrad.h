#pragma once

#include "common.h"

namespace implicitdiff {

// Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, JMLR 2011.
//
//   v' = v + g^2,  u = -lr / (1 + (t - 1) lr_decay) g / (root(v' + eps_root) + eps)
//
// s = [v].
template <class R> struct Adagrad {
  static constexpr int moments = 1;
  static constexpr int numbers = 6;

  Gradient<R> gradient;
  R scale, eps, eps_root;

  // [lr, lr_decay, eps, eps_root, weight_decay, maximize]
  HD Adagrad(const double* numbers, std::int64_t count)
      : gradient(numbers[5] != 0, numbers[4]),
        scale(R(-numbers[0] / (1 + double(count - 1) * numbers[1]))),
        eps(R(numbers[2])),
        eps_root(R(numbers[3])) {}

  HD void step(R g, R p, R* s, R& u) const {
    g = gradient.of(g, p);
    s[0] = s[0] + g * g;
    u = scale * g / (root(s[0] + eps_root) + eps);
  }

  // With D = root(s' + eps_root) + eps and d = g / D: u = scale d, so D_bar = -(scale u_bar / D) d.
  HD void pull(R g, R p, const R* s, R u_bar, const R* next_bar, R& g_bar, R& p_bar, R* s_bar) const {
    g = gradient.of(g, p);
    const R r = root(s[0] + g * g + eps_root);
    const R over = 1 / (r + eps);

    const R d_bar = scale * u_bar * over;
    s_bar[0] = next_bar[0] + root_pull(r, -d_bar * (g * over));
    gradient.pull(d_bar + 2 * g * s_bar[0], g_bar, p_bar);
  }
};

}  // namespace implicitdiff
