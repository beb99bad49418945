// Loops of the machine's instructions over the elements of their operands.
//
// W is the number of lanes of a block: element e of a value in the arena is the W doubles from W e on. Element e of a
// shared array is one double. Offsets and steps count doubles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "isa.h"
#include "lanes.h"
#include "operations.h"

namespace implicitdiff {

struct Instruction;

// bases: the arena, then the shared arrays.
using Kernel = Loop<const Instruction*, double* const*>;

// Lanes of a block, where it has several.
constexpr int block_lanes = 8;

constexpr int most_references = 4, most_dimensions = 6;

// A dimension of all operands.
struct Dimension {
  std::int64_t size, step[most_references];
};

// Fields that each kernel reads come first: few cache lines of an instruction are read.
struct Instruction {
  Kernel kernel;         // null for a jump
  std::int64_t n;        // elements of the innermost dimension; of a jump those that it reads, -1 if it reads none
  std::int32_t outer;    // number of outer dimensions
  bool large;            // worth several threads
  struct {
    std::int64_t space, offset, step;  // step: of the innermost dimension
  } at[most_references];
  std::int64_t target;  // of a jump
  Dimension dimensions[most_dimensions];  // the outer ones; of matrices all
};

// Pointers to R operands at each index of the outer dimensions.
template <int R> struct Walk {
  const Instruction* const q;
  double* p[R];
  std::int64_t index[most_dimensions] = {};

  HD Walk(const Instruction* q, double* const* bases) : q(q) {
    for (int i = 0; i < R; ++i) p[i] = bases[q->at[i].space] + q->at[i].offset;
  }

  HD bool next() {
    for (int d = q->outer - 1; d >= 0; --d) {
      const Dimension& at = q->dimensions[d];
      if (++index[d] < at.size) {
        for (int i = 0; i < R; ++i) p[i] += at.step[i];
        return true;
      }
      index[d] = 0;
      for (int i = 0; i < R; ++i) p[i] -= at.step[i] * (at.size - 1);
    }
    return false;
  }
};

// Elementwise

// Loops over n elements. S, A, B, C: steps of the output and of the inputs, any if -1.
template <class F, int S, int A, int B, int C>
HD void elements(std::int64_t n, double* r, const double* x, const double* y, const double* z, std::int64_t s,
                 std::int64_t a, std::int64_t b, std::int64_t c) {
  if (S >= 0) s = S, a = A, b = B, c = C;
  INDEPENDENT
  for (std::int64_t i = 0; i < n; ++i) r[i * s] = F::of(x[i * a], y[i * b], z[i * c], r[i * s]);
}

// The same of W > 1 lanes.
template <class F, int W>
HD void elements_of_lanes(std::int64_t n, double* r, const double* x, const double* y, const double* z, std::int64_t s,
                          std::int64_t a, std::int64_t b, std::int64_t c) {
  for (; n > 0; --n, r += s, x += a, y += b, z += c) {
    INDEPENDENT_LANES
    for (int l = 0; l < W; ++l) r[l] = F::of(x[l], y[l], z[l], r[l]);
  }
}

// One row of the inner dimension, from pointers p to the operands, which are `step` apart.
template <class F, int W> HD void row(const Instruction* q, double* const* p) {
  constexpr int K = F::inputs, second = K > 1 ? 2 : 1;
  const std::int64_t n = q->n, s = q->at[0].step, a = q->at[1].step, b = q->at[second].step, c = q->at[K].step;
  double *r = p[0], *x = p[1], *y = p[second], *z = p[K];
  if (W > 1) return elements_of_lanes<F, W>(n, r, x, y, z, s, a, b, c);
  if (s == 1) {
    if (a == 1 && b == 1 && c == 1) return elements<F, 1, 1, 1, 1>(n, r, x, y, z, 1, 1, 1, 1);
    if (K == 2 && a == 1 && b == 0) return elements<F, 1, 1, 0, 0>(n, r, x, y, z, 1, 1, 0, 0);
    if (K == 2 && a == 0 && b == 1) return elements<F, 1, 0, 1, 1>(n, r, x, y, z, 1, 0, 1, 1);
    if (K == 3 && a == 1 && b == 1 && c == 0) return elements<F, 1, 1, 1, 0>(n, r, x, y, z, 1, 1, 1, 0);
    if (K == 3 && a == 1 && b == 0 && c == 1) return elements<F, 1, 1, 0, 1>(n, r, x, y, z, 1, 1, 0, 1);
    if (K == 3 && a == 0 && b == 1 && c == 1) return elements<F, 1, 0, 1, 1>(n, r, x, y, z, 1, 0, 1, 1);
  }
  elements<F, -1, 0, 0, 0>(n, r, x, y, z, s, a, b, c);
}

// Of an instruction without outer dimensions and shared inputs, the usual case.
template <class F, int W> struct Row {
  static HD void run(const Instruction* q, double* const* bases) {
    double* p[F::inputs + 1];
    for (int i = 0; i <= F::inputs; ++i) p[i] = bases[0] + q->at[i].offset;
    row<F, W>(q, p);
  }
};

// The same of one number of each lane.
template <class F, int W> struct Single {
  static HD void run(const Instruction* q, double* const* bases) {
    constexpr int K = F::inputs, second = K > 1 ? 2 : 1;
    double *const arena = bases[0], *r = arena + q->at[0].offset;
    const double *x = arena + q->at[1].offset, *y = arena + q->at[second].offset, *z = arena + q->at[K].offset;
    INDEPENDENT_LANES
    for (int l = 0; l < W; ++l) r[l] = F::of(x[l], y[l], z[l], r[l]);
  }
};

template <class F, int W> struct Rows {
  static HD void run(const Instruction* q, double* const* bases) {
    Walk<F::inputs + 1> walk(q, bases);
    do row<F, W>(q, walk.p);
    while (walk.next());
  }
};

// With shared inputs, W > 1. Their numbers are written to all lanes of a buffer, a few at a time.
template <class F, int W> struct RowsWithShared {
  static constexpr int K = F::inputs;
  static constexpr std::int64_t few = 16;

  static HD void run(const Instruction* q, double* const* bases) {
    Walk<K + 1> walk(q, bases);
    double buffer[K][few * W];
    do {
      for (std::int64_t i = 0; i < q->n; i += few) {
        const std::int64_t n = std::min(few, q->n - i);
        double* at[K + 1];
        std::int64_t step[K + 1];
        for (int k = 0; k <= K; ++k) {
          at[k] = walk.p[k] + i * q->at[k].step, step[k] = q->at[k].step;
          if (q->at[k].space == 0) continue;
          spread(buffer[k - 1], at[k], n, step[k]);
          at[k] = buffer[k - 1], step[k] = W;
        }
        elements_of_lanes<F, W>(n, at[0], at[1], at[K], at[K], step[0], step[1], step[K], step[K]);
      }
    } while (walk.next());
  }

  static HD void spread(double* to, const double* from, std::int64_t n, std::int64_t step) {
    for (std::int64_t e = 0; e < n; ++e) {
      INDEPENDENT_LANES
      for (int l = 0; l < W; ++l) to[e * W + l] = from[e * step];
    }
  }
};

// Reductions

// The reduction of L numbers, each over n numbers that are `step` apart: four accumulators, since each waits for its
// last addition.
template <class R, int L, int N> HD auto accumulated(const double* x, std::int64_t n, std::int64_t step) {
  using Group = Lanes<L, N>;
  constexpr int several = 4;
  Group so_far[several];
  for (Group& each : so_far) each = Group::all(R::start());
  std::int64_t i = 0;
  for (; i + several <= n; i += several) {
    for (int j = 0; j < several; ++j) so_far[j].template reduce<R>(Group::load(x + (i + j) * step));
  }
  for (; i < n; ++i) so_far[0].template reduce<R>(Group::load(x + i * step));
  for (int j = 1; j < several; ++j) so_far[0].template join<R>(so_far[j]);
  return so_far[0];
}

template <class R, int W> struct Reduction {
  template <int N> struct With {
    static HD void run(const Instruction* q, double* const* bases) {
      Walk<2> walk(q, bases);
      do {
        if (W == 1 && q->at[1].step == 1) {
          *walk.p[0] = contiguous(walk.p[1], q->n);
        } else {
          double results[W];
          accumulated<R, W, N>(walk.p[1], q->n, q->at[1].step).store(results);
          INDEPENDENT_LANES
          for (int l = 0; l < W; ++l) walk.p[0][l] = R::result(results[l]);
        }
      } while (walk.next());
    }

    static HD double contiguous(const double* x, std::int64_t n) {
      constexpr int L = 8;
      double parts[L];
      accumulated<R, L, N>(x, n / L, L).store(parts);
      double so_far = accumulated<R, 1, N>(x + n / L * L, n % L, 1).part[0];
      for (double part : parts) R::join(so_far, part);
      return R::result(so_far);
    }
  };
};

// Index of the first best number, nan being the best.
template <class R, int W> struct Index {
  static HD void run(const Instruction* q, double* const* bases) {
    Walk<2> walk(q, bases);
    do {
      double best[W], index[W];
      for (int l = 0; l < W; ++l) best[l] = walk.p[1][l], index[l] = 0;
      for (std::int64_t i = 1; i < q->n; ++i) {
        const double* const x = walk.p[1] + i * q->at[1].step;
        for (int l = 0; l < W; ++l) {
          const bool better = R::better(x[l], best[l]) | ((x[l] != x[l]) & (best[l] == best[l]));
          best[l] = better ? x[l] : best[l];
          index[l] = better ? double(i) : index[l];
        }
      }
      for (int l = 0; l < W; ++l) walk.p[0][l] = index[l];
    } while (walk.next());
  }
};

}  // namespace implicitdiff
