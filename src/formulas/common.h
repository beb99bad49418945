// Terms of the formulas.
//
// A formula is the rule of an optimizer for one element of one leaf. R is the type of its arithmetic and its moments.
//
//   Formula(numbers, count)   constants of a leaf, computed in double, each rounded to R once; count includes this step
//   step(g, p, s, u)          s: moments before the step, on return those after it; u: addition to the parameter
//   pull(g, p, s, u_bar, next_bar, g_bar, p_bar, s_bar)
//                             vector-Jacobian product of step at (g, p, s), s being the moments before the step; x_bar
//                             is the cotangent of x, next_bar that of the moments after the step
//
// The plain formulas of implicitdiff/optim compute the same; a few operations stand in another order there.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define HD __forceinline
#else
#define HD inline __attribute__((always_inline))
#endif

namespace implicitdiff {

// The gradient of the objective to minimize, with L2 decay: sign g + decay p. Without decay p is not read: 0 p is nan
// at an infinite p.
template <class R> struct Gradient {
  R sign, decay;

  HD Gradient(bool maximize, double decay) : sign(maximize ? R(-1) : R(1)), decay(R(decay)) {}

  HD R of(R g, R p) const { return decay == 0 ? sign * g : sign * g + decay * p; }

  HD void pull(R bar, R& g_bar, R& p_bar) const {
    g_bar = sign * bar;
    p_bar = decay * bar;
  }
};

// m' = m + (1 - b)(g - m)
template <class R> struct Mean {
  R keep, take;

  HD explicit Mean(double b) : keep(R(b)), take(R(1 - b)) {}

  HD R next(R m, R g) const { return m + take * (g - m); }
  HD R from_m(R bar) const { return keep * bar; }
  HD R from_g(R bar) const { return take * bar; }
};

// v' = b v + (1 - b) g^2
template <class R> struct MeanSquare {
  R keep, take;

  HD explicit MeanSquare(double b) : keep(R(b)), take(R(1 - b)) {}

  HD R next(R v, R g) const { return keep * v + (take * g) * g; }
  HD R from_v(R bar) const { return keep * bar; }
  HD R from_g(R g, R bar) const { return 2 * take * g * bar; }
};

// The square root, whose derivative is set to 0 at 0. A second moment is 0 where every gradient so far was 0; the
// update m / (root(v) + eps) then varies with g through m alone.
template <class R> HD R root(R x) { return std::sqrt(x); }

// Cotangent of x, given that of y = root(x).
template <class R> HD R root_pull(R y, R bar) { return y == 0 ? R(0) : bar / (2 * y); }

// max(a, b), and nan if one of them is, as torch.maximum.
template <class R> HD R larger(R a, R b) { return (a > b) | (a != a) ? a : b; }

// d larger(a, b) / da, one half at a tie, as torch's.
template <class R> HD R larger_share(R a, R b) { return a == b ? R(0.5) : a < b ? R(0) : R(1); }

}  // namespace implicitdiff
