// One formula over all leaves: threads, chunks, storage.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"
#include "steps.h"
#include "storage.h"

namespace implicitdiff {

// Elements of a chunk: all operands of one stay in the first-level cache.
template <class R> constexpr int chunk = 2048 / sizeof(R);

// The least number of elements that is worth a thread.
constexpr std::int64_t grain = 16384;

template <class R> struct Constant {
  alignas(64) R of[chunk<R>];

  constexpr explicit Constant(R x) : of{} {
    for (R& each : of) each = x;
  }
};
template <class R> constexpr Constant<R> zeros(R(0));
template <class R> constexpr Constant<R> minus_zeros(R(-0.0));

template <class R, int n> using Few = R[n > 0 ? n : 1];

// reads: g, p, base, s...; writes: base + u, s...
template <class Formula, class Real> struct Step {
  using F = Formula;
  using R = Real;
  static constexpr int M = F::moments;
  static constexpr int reads = 3 + M, writes = 1 + M;

  // The operands that are stored in the call's type; the others are R.
  static constexpr bool stored_read(int k) { return k < 3; }
  static constexpr bool stored_write(int k) { return k == 0; }
  // What an absent operand reads as: -0 + u is u, be it -0 or 0.
  static constexpr const R* absent(int k) { return k == 2 ? minus_zeros<R>.of : zeros<R>.of; }

  static HD void run(const F* formula, const R* const* in, R* const* out, int n) {
    const F f = *formula;
    const R *g = in[0], *p = in[1], *base = in[2];
    R* to = out[0];
    Few<const R*, M> s_in;
    Few<R*, M> s_out;
    for (int k = 0; k < M; ++k) s_in[k] = in[3 + k], s_out[k] = out[1 + k];
    INDEPENDENT
    for (int i = 0; i < n; ++i) {
      R u;
      Few<R, M> s;
      for (int k = 0; k < M; ++k) s[k] = s_in[k][i];
      f.step(g[i], p[i], s, u);
      to[i] = base[i] + u;
      for (int k = 0; k < M; ++k) s_out[k][i] = s[k];
    }
  }
};

// reads: g, p, s..., u_bar, next_bar...; writes: g_bar, p_bar, s_bar...
template <class Formula, class Real> struct Pull {
  using F = Formula;
  using R = Real;
  static constexpr int M = F::moments;
  static constexpr int reads = 3 + 2 * M, writes = 2 + M;

  static constexpr bool stored_read(int k) { return k < 2 || k == 2 + M; }
  static constexpr bool stored_write(int k) { return k < 2; }
  static constexpr const R* absent(int) { return zeros<R>.of; }

  static HD void run(const F* formula, const R* const* in, R* const* out, int n) {
    const F f = *formula;
    const R *g = in[0], *p = in[1], *u_bar = in[2 + M];
    R *g_bar = out[0], *p_bar = out[1];
    Few<const R*, M> s_in, next_in;
    Few<R*, M> s_out;
    for (int k = 0; k < M; ++k) s_in[k] = in[2 + k], next_in[k] = in[3 + M + k], s_out[k] = out[2 + k];
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

// The loop K over a call.
template <class K> class Driver {
  using R = typename K::R;
  using F = typename K::F;

 public:
  explicit Driver(const Call& call) : call(call), leaves(call.sizes.size()) {
    if (call.dtype == "bfloat16") half<Bfloat16>();
    if (call.dtype == "float16") half<Float16>();
  }

  void run() const {
    const std::int64_t total = std::accumulate(call.sizes.begin(), call.sizes.end(), std::int64_t(0));
#ifdef _OPENMP
    const int threads = int(std::min<std::int64_t>(call.threads, total / grain));
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
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

  // Elements begin to end of all leaves, each bound moved up to that of a chunk.
  void part(std::int64_t begin, std::int64_t end) const {
    std::int64_t count = 1, offset = 0;
    F formula(call.numbers.data(), count);
    for (std::size_t leaf = 0; leaf < leaves && offset < end; offset += call.sizes[leaf++]) {
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

  void one(const F& formula, std::size_t leaf, std::int64_t at, int n) const {
    alignas(64) R wide[K::reads + K::writes][chunk<R>];
    const R* in[K::reads];
    R* out[K::writes];
    for (int k = 0; k < K::reads; ++k) {
      void* const a = call.addresses[k * leaves + leaf];
      if (a == nullptr) {
        in[k] = K::absent(k);
      } else if (widen != nullptr && K::stored_read(k)) {
        widen(static_cast<const std::uint16_t*>(a) + at, wide[k], n);
        in[k] = wide[k];
      } else {
        in[k] = static_cast<const R*>(a) + at;
      }
    }
    const auto written = [&](int k) { return call.addresses[(K::reads + k) * leaves + leaf]; };
    const auto narrowed = [&](int k) { return narrow != nullptr && K::stored_write(k); };
    for (int k = 0; k < K::writes; ++k) {
      const bool direct = written(k) != nullptr && !narrowed(k);
      out[k] = direct ? static_cast<R*>(written(k)) + at : wide[K::reads + k];
    }
    loop(&formula, in, out, n);
    for (int k = 0; k < K::writes; ++k) {
      if (written(k) != nullptr && narrowed(k)) narrow(out[k], static_cast<std::uint16_t*>(written(k)) + at, n);
    }
  }

  const Call& call;
  const std::size_t leaves;
  const decltype(compiled<K>()) loop = compiled<K>();
  Loop<const std::uint16_t*, R*, int> widen = nullptr;
  Loop<const R*, std::uint16_t*, int> narrow = nullptr;
};

}  // namespace implicitdiff
