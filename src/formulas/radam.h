#pragma once

#include "common.h"

namespace implicitdiff {

// Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, ICLR 2020, Algorithm 2, with the bound of
// torch.optim: a step is rectified if rho > 5, where the paper has 4.
//
//   rho = last - 2 t b2^t / (1 - b2^t),  last = 2 / (1 - b2) - 1
//
// s = [m, v], those of Adam.
template <class R> struct Radam {
  static constexpr int moments = 2;
  static constexpr int numbers = 8;

  Gradient<R> gradient;
  Mean<R> mean;
  MeanSquare<R> square;
  R scale, eps, eps_root, decay, cap;

  // [lr, b1, b2, eps, eps_root, weight_decay, decoupled, maximize]
  HD Radam(const double* numbers, std::int64_t count)
      : gradient(numbers[7] != 0, numbers[6] != 0 ? 0 : numbers[5]),
        mean(numbers[1]),
        square(numbers[2]),
        eps_root(R(numbers[4])),
        decay(R(numbers[6] != 0 ? numbers[0] * numbers[5] : 0)) {
    const double power = std::pow(numbers[2], double(count));
    const double last = 2 / (1 - numbers[2]) - 1;
    const double rho = last - 2 * double(count) * power / (1 - power);
    double rate = -numbers[0] / (1 - std::pow(numbers[1], double(count)));
    const bool rectified = rho > 5;
    cap = rectified ? R(INFINITY) : R(0);
    eps = rectified ? R(numbers[3]) : R(1);
    if (rectified) {
      rate *= std::sqrt((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)) * std::sqrt(1 - power);
    }
    scale = R(rate);
  }

  // A step that is not rectified divides by 0 + 1. The cap is a number because GCC does not vectorize pull with a bool.
  HD R root_of(R v) const {
    const R r = root(v + eps_root);
    return cap > 0 ? r : R(0);
  }

  HD void step(R g, R p, R* s, R& u) const {
    g = gradient.of(g, p);
    s[0] = mean.next(s[0], g);
    s[1] = square.next(s[1], g);
    u = scale * s[0] / (root_of(s[1]) + eps) - (decay == 0 ? R(0) : decay * p);
  }

  // As in Adam.
  HD void pull(R g, R p, const R* s, R u_bar, const R* next_bar, R& g_bar, R& p_bar, R* s_bar) const {
    g = gradient.of(g, p);
    const R m = mean.next(s[0], g);
    const R r = root_of(square.next(s[1], g));
    const R over = 1 / (r + eps);

    const R d_bar = scale * u_bar * over;
    const R m_bar = next_bar[0] + d_bar;
    const R v_bar = next_bar[1] + root_pull(r, -d_bar * (m * over));
    s_bar[0] = mean.from_m(m_bar);
    s_bar[1] = square.from_v(v_bar);
    gradient.pull(mean.from_g(m_bar) + square.from_g(g, v_bar), g_bar, p_bar);
    p_bar -= decay * u_bar;
  }
};

}  // namespace implicitdiff
