// Groups of doubles for loops that keep accumulators in registers.
#pragma once

#include <cstring>

#include "../formulas/common.h"
#include "isa.h"

namespace implicitdiff {

// A vector register of N doubles.
template <int N> struct Register;
template <> struct Register<1> {
  using V = double;
};
#if defined(__GNUC__) || defined(__clang__)
template <> struct Register<2> {
  typedef double V __attribute__((vector_size(16)));
};
template <> struct Register<4> {
  typedef double V __attribute__((vector_size(32)));
};
template <> struct Register<8> {
  typedef double V __attribute__((vector_size(64)));
};
#endif

// W doubles, in registers of N of them, or of one where W is 1.
template <int W, int N> struct Lanes {
  static constexpr int n = W == 1 ? 1 : N, parts = W / n;
  using V = typename Register<n>::V;
  V part[parts];

  static HD Lanes load(const double* x) {
    Lanes lanes;
    // Register by register: a group that is copied as a whole stays in memory.
    for (int i = 0; i < parts; ++i) std::memcpy(&lanes.part[i], x + i * n, sizeof(V));
    return lanes;
  }

  static HD Lanes all(double x) {
    Lanes lanes;
    double same[n];
    for (double& each : same) each = x;
    for (V& each : lanes.part) std::memcpy(&each, same, sizeof(V));
    return lanes;
  }

  HD void store(double* x) const {
    for (int i = 0; i < parts; ++i) std::memcpy(x + i * n, &part[i], sizeof(V));
  }

  template <bool minus> HD void add_product(const Lanes& a, const Lanes& b) {
    for (int i = 0; i < parts; ++i) part[i] += minus ? -(a.part[i] * b.part[i]) : a.part[i] * b.part[i];
  }

  HD void divide(const Lanes& a) {
    for (int i = 0; i < parts; ++i) part[i] /= a.part[i];
  }

  template <class R> HD void reduce(const Lanes& x) {
    update<R::compares>(x, [](auto& so_far, const auto& x) { R::step(so_far, x); });
  }

  // The reduction of both: what part and x reduce.
  template <class R> HD void join(const Lanes& x) {
    update<R::compares>(x, [](auto& so_far, const auto& x) { R::join(so_far, x); });
  }

  // Calls f(a, b) for each register, or if f compares for each number, of these lanes and of others.
  template <bool compares, class F> HD void update(const Lanes& x, F f) {
    for (int i = 0; i < parts; ++i) {
      if constexpr (compares) {
        // GCC splits a comparison of vectors, and vectorizes this loop.
        double mine[n], others[n];
        std::memcpy(mine, &part[i], sizeof(V));
        std::memcpy(others, &x.part[i], sizeof(V));
        INDEPENDENT_LANES
        for (int l = 0; l < n; ++l) f(mine[l], others[l]);
        std::memcpy(&part[i], mine, sizeof(V));
      } else {
        f(part[i], x.part[i]);
      }
    }
  }

  HD double sum() const {
    double each[W], total = 0;
    store(each);
    for (double x : each) total += x;
    return total;
  }
};

}  // namespace implicitdiff
