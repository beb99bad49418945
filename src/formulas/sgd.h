#pragma once

#include "common.h"

namespace implicitdiff {

// Sutskever, Martens, Dahl and Hinton, On the Importance of Initialization and Momentum in Deep Learning, ICML 2013, in
// the form of torch.optim:
//
//   b' = momentum b + (1 - dampening) g,  u = -lr b', or -lr (g + momentum b') with nesterov, or -lr g without momentum
//
// s = [b].
template <class R, bool Momentum> struct Sgd {
  static constexpr int moments = Momentum ? 1 : 0;
  static constexpr int numbers = 6;

  Gradient<R> gradient;
  R scale, keep, take, ahead;
  bool nesterov;

  // [lr, momentum, dampening, weight_decay, nesterov, maximize]. The first step sets b' = g.
  HD Sgd(const double* numbers, std::int64_t count)
      : gradient(numbers[5] != 0, numbers[3]),
        scale(R(-numbers[0])),
        keep(count == 1 ? R(0) : R(numbers[1])),
        take(count == 1 ? R(1) : R(1 - numbers[2])),
        ahead(R(numbers[1])),
        nesterov(numbers[4] != 0) {}

  HD void step(R g, R p, R* s, R& u) const {
    R d = gradient.of(g, p);
    if constexpr (Momentum) {
      s[0] = keep * s[0] + take * d;
      d = nesterov ? d + ahead * s[0] : s[0];
    }
    u = scale * d;
  }

  HD void pull(R, R, const R*, R u_bar, const R* next_bar, R& g_bar, R& p_bar, R* s_bar) const {
    R bar = scale * u_bar;
    if constexpr (Momentum) {
      const R b_bar = next_bar[0] + (nesterov ? ahead * bar : bar);
      bar = (nesterov ? bar : R(0)) + take * b_bar;
      s_bar[0] = keep * b_bar;
    }
    gradient.pull(bar, g_bar, p_bar);
  }
};

}  // namespace implicitdiff
