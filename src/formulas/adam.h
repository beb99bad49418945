#pragma once

#include "common.h"

namespace implicitdiff {

// Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, Algorithm 1. Amsgrad: Reddi, Kale and Kumar, On
// the Convergence of Adam and Beyond, ICLR 2018; as in torch.optim, the maximum is that of v before its bias is
// corrected. Decoupled decay: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, Algorithm 2.
//
//   m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2,  V = max(V, v') or v'
//   u = -lr m' / (1 - b1^t) / (root(V / (1 - b2^t) + eps_root) + eps)
//
// s = [m, v, V].
template <class R, bool Amsgrad> struct Adam {
  static constexpr int moments = Amsgrad ? 3 : 2;
  static constexpr int numbers = 8;

  Gradient<R> gradient;
  Mean<R> mean;
  MeanSquare<R> square;
  R scale, unbias, eps, eps_root, decay;

  // [lr, b1, b2, eps, eps_root, weight_decay, decoupled, maximize]
  HD Adam(const double* numbers, std::int64_t count)
      : gradient(numbers[7] != 0, numbers[6] != 0 ? 0 : numbers[5]),
        mean(numbers[1]),
        square(numbers[2]),
        scale(R(-numbers[0] / (1 - std::pow(numbers[1], double(count))))),
        unbias(R(1 / (1 - std::pow(numbers[2], double(count))))),
        eps(R(numbers[3])),
        eps_root(R(numbers[4])),
        decay(R(numbers[6] != 0 ? numbers[0] * numbers[5] : 0)) {}

  HD void step(R g, R p, R* s, R& u) const {
    g = gradient.of(g, p);
    s[0] = mean.next(s[0], g);
    s[1] = square.next(s[1], g);
    if constexpr (Amsgrad) s[2] = larger(s[2], s[1]);
    u = scale * s[0] / (root(s[moments - 1] * unbias + eps_root) + eps) - (decay == 0 ? R(0) : decay * p);
  }

  // With r = root(V unbias + eps_root), D = r + eps and d = m' / D: u = scale d, so D_bar = -(scale u_bar / D) d.
  HD void pull(R g, R p, const R* s, R u_bar, const R* next_bar, R& g_bar, R& p_bar, R* s_bar) const {
    g = gradient.of(g, p);
    const R m = mean.next(s[0], g);
    const R v = square.next(s[1], g);
    R top = v;
    if constexpr (Amsgrad) top = larger(s[2], v);
    const R r = root(top * unbias + eps_root);
    const R over = 1 / (r + eps);

    const R d_bar = scale * u_bar * over;
    const R m_bar = next_bar[0] + d_bar;
    const R top_bar = root_pull(r, -d_bar * (m * over)) * unbias;
    R v_bar = next_bar[1];
    if constexpr (Amsgrad) {
      s_bar[2] = larger_share(s[2], v) * (next_bar[2] + top_bar);
      v_bar += larger_share(v, s[2]) * (next_bar[2] + top_bar);
    } else {
      v_bar += top_bar;
    }
    s_bar[0] = mean.from_m(m_bar);
    s_bar[1] = square.from_v(v_bar);
    gradient.pull(mean.from_g(m_bar) + square.from_g(g, v_bar), g_bar, p_bar);
    p_bar -= decay * u_bar;
  }
};

}  // namespace implicitdiff
