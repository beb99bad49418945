// One formula over all leaves: threads, chunks, storage types.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "call.h"
#include "isa.h"
#include "layout.h"
#include "storage.h"

namespace implicitdiff {

// Elements of a chunk: 2 KB of each operand, so that all of them stay in the first-level cache.
template <class R> constexpr int chunk = 2048 / sizeof(R);

// Least number of elements that pays for a thread.
constexpr std::int64_t grain = 16384;

template <class R> struct Constant {
  alignas(64) R of[chunk<R>];

  constexpr explicit Constant(R x) : of{} {
    for (R& each : of) each = x;
  }
};
template <class R> constexpr Constant<R> zeros(R(0));
template <class R> constexpr Constant<R> minus_zeros(R(-0.0));

// An array of n elements, of one where n is 0: C++ has no empty array.
template <class R, int n> using Few = R[n > 0 ? n : 1];

// A loop over n elements of the operands x of its layout L.
template <class Formula, class Real> struct Step {
  using F = Formula;
  using R = Real;
  static constexpr int M = F::moments;
  using L = StepLayout<M>;

  // Elements of an absent operand. -0 + u is u, also if u is -0.
  static constexpr const R* absent(int k) { return k == L::base ? minus_zeros<R>.of : zeros<R>.of; }

  static HD void run(const F* formula, R* const* x, int n) {
    const F f = *formula;
    const R *g = x[L::g], *p = x[L::p], *base = x[L::base];
    R* out = x[L::out];
    Few<const R*, M> s_in;
    Few<R*, M> s_out;
    for (int k = 0; k < M; ++k) s_in[k] = x[L::s + k], s_out[k] = x[L::next + k];
    INDEPENDENT
    for (int i = 0; i < n; ++i) {
      R u;
      Few<R, M> s;
      for (int k = 0; k < M; ++k) s[k] = s_in[k][i];
      f.step(g[i], p[i], s, u);
      out[i] = base[i] + u;
      for (int k = 0; k < M; ++k) s_out[k][i] = s[k];
    }
  }
};

template <class Formula, class Real> struct Pull {
  using F = Formula;
  using R = Real;
  static constexpr int M = F::moments;
  using L = PullLayout<M>;

  static constexpr const R* absent(int) { return zeros<R>.of; }

  static HD void run(const F* formula, R* const* x, int n) {
    const F f = *formula;
    const R *g = x[L::g], *p = x[L::p], *u_bar = x[L::u_bar];
    R *g_bar = x[L::g_bar], *p_bar = x[L::p_bar];
    Few<const R*, M> s_in, next_in;
    Few<R*, M> s_out;
    for (int k = 0; k < M; ++k) s_in[k] = x[L::s + k], next_in[k] = x[L::next_bar + k], s_out[k] = x[L::s_bar + k];
    INDEPENDENT
    for (int i = 0; i < n; ++i) {
      R to_g, to_p;
      Few<R, M> s, next_bar, s_bar;
      for (int k = 0; k < M; ++k) s[k] = s_in[k][i], next_bar[k] = next_in[k][i];
      f.pull(g[i], p[i], s, u_bar[i], next_bar, to_g, to_p, s_bar);
      g_bar[i] = to_g;
      p_bar[i] = to_p;
      for (int k = 0; k < M; ++k) s_out[k][i] = s_bar[k];
    }
  }
};

// The loop K over all leaves of a call.
template <class K> class Driver {
  using R = typename K::R;
  using F = typename K::F;
  using L = typename K::L;

 public:
  Driver(const Call& call, int threads) : call(call), threads(threads) {
    if (call.dtype == Dtype::bfloat16) half<Bfloat16>();
    if (call.dtype == Dtype::float16) half<Float16>();
  }

  void run() const {
    const std::int64_t total = std::accumulate(call.sizes.begin(), call.sizes.end(), std::int64_t(0));
#ifdef _OPENMP
    const int worth = int(std::min<std::int64_t>(threads, total / grain));
    if (worth > 1) {
#pragma omp parallel num_threads(worth)
      {
        const int i = omp_get_thread_num(), n = omp_get_num_threads();
        part(total * i / n, total * (i + 1) / n);
      }
      return;
    }
#endif
    part(0, total);
  }

 private:
  template <class T> void half() {
    widen = compiled<Widen<T, R>>();
    narrow = compiled<Narrow<T, R>>();
  }

  // Elements begin to end, counted through all leaves. A bound inside a chunk moves up to the end of the chunk, so that
  // the parts of all threads together take each chunk once.
  void part(std::int64_t begin, std::int64_t end) const {
    std::int64_t count = 1, offset = 0;  // leaves at one step share a formula, whose constants take powers
    F formula(call.numbers.data(), count);
    for (std::size_t leaf = 0; leaf < call.leaves() && offset < end; offset += call.sizes[leaf++]) {
      const std::int64_t size = call.sizes[leaf];
      const auto bound = [&](std::int64_t at) {
        const std::int64_t chunks = (std::max<std::int64_t>(at - offset, 0) + chunk<R> - 1) / chunk<R>;
        return std::min(size, chunks * chunk<R>);
      };
      std::int64_t at = bound(begin);
      const std::int64_t stop = bound(end);
      if (at == stop) continue;
      const std::int64_t now = call.count[call.which[leaf]];
      if (now != count) formula = F(call.numbers.data(), count = now);
      for (; at < stop; at += chunk<R>) one(formula, leaf, at, int(std::min<std::int64_t>(chunk<R>, stop - at)));
    }
  }

  // One chunk. Half precision is widened before the loop and narrowed after it.
  void one(const F& formula, std::size_t leaf, std::int64_t at, int n) const {
    alignas(64) R wide[L::operands][chunk<R>];
    R* x[L::operands];
    const auto half = [&](int k, void* a) { return widen != nullptr && a != nullptr && L::stored(k); };
    for (int k = 0; k < L::operands; ++k) {
      void* const a = call.address(k, leaf);
      if (half(k, a)) {
        x[k] = wide[k];
        if (k < L::reads) widen(static_cast<const std::uint16_t*>(a) + at, x[k], n);
      } else if (a != nullptr) {
        x[k] = static_cast<R*>(a) + at;
      } else {
        x[k] = k < L::reads ? const_cast<R*>(K::absent(k)) : wide[k];  // a loop does not write what it reads
      }
    }
    loop(&formula, x, n);
    for (int k = L::reads; k < L::operands; ++k) {
      void* const a = call.address(k, leaf);
      if (half(k, a)) narrow(x[k], static_cast<std::uint16_t*>(a) + at, n);
    }
  }

  const Call& call;
  const int threads;
  const decltype(compiled<K>()) loop = compiled<K>();
  Loop<const std::uint16_t*, R*, int> widen = nullptr;
  Loop<const R*, std::uint16_t*, int> narrow = nullptr;
};

}  // namespace implicitdiff
