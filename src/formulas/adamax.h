#pragma once

#include "common.h"

namespace implicitdiff {

// Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, Algorithm 2, with the eps of torch.optim.
//
//   m' = b1 m + (1 - b1) g,  n' = max(b2 n, |g| + eps),  u = -lr / (1 - b1^t) m' / n'
//
// s = [m, n].
template <class R> struct Adamax {
  static constexpr int moments = 2;
  static constexpr int numbers = 6;

  Gradient<R> gradient;
  Mean<R> mean;
  R scale, keep, eps;

  // [lr, b1, b2, eps, weight_decay, maximize]
  HD Adamax(const double* numbers, std::int64_t count)
      : gradient(numbers[5] != 0, numbers[4]),
        mean(numbers[1]),
        scale(R(-numbers[0] / (1 - std::pow(numbers[1], double(count))))),
        keep(R(numbers[2])),
        eps(R(numbers[3])) {}

  HD void step(R g, R p, R* s, R& u) const {
    g = gradient.of(g, p);
    s[0] = mean.next(s[0], g);
    s[1] = larger(keep * s[1], std::abs(g) + eps);
    u = scale * s[0] / s[1];
  }

  // With d = m' / n': u = scale d, so n'_bar = -(scale u_bar / n') d.
  HD void pull(R g, R p, const R* s, R u_bar, const R* next_bar, R& g_bar, R& p_bar, R* s_bar) const {
    g = gradient.of(g, p);
    const R kept = keep * s[1];
    const R size = std::abs(g) + eps;
    const R over = 1 / larger(kept, size);

    const R d_bar = scale * u_bar * over;
    const R m_bar = next_bar[0] + d_bar;
    const R n_bar = next_bar[1] - d_bar * (mean.next(s[0], g) * over);
    const R size_bar = larger_share(size, kept) * n_bar;
    s_bar[0] = mean.from_m(m_bar);
    s_bar[1] = keep * larger_share(kept, size) * n_bar;
    gradient.pull(mean.from_g(m_bar) + (g > 0 ? size_bar : g < 0 ? -size_bar : R(0)), g_bar, p_bar);
  }
};

}  // namespace implicitdiff
