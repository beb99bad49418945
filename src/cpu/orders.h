// Sorting, access by computed indices and running sums of the machine, along the innermost dimension.
#pragma once

#include "kernels.h"

namespace implicitdiff {

// nan is the largest number.
struct Ascending {
  static HD bool before(double x, double y) { return (x < y) | ((x == x) & (y != y)); }
};
struct Descending {
  static HD bool before(double x, double y) { return Ascending::before(y, x); }
};

// Values of one lane and the indices from which they come. No two pairs are equal, so that equal values keep their order.
template <class O> struct Pairs {
  double *values, *indices;
  std::int64_t value_step, index_step;

  HD bool before(std::int64_t i, std::int64_t j) const {
    const double x = values[i * value_step], y = values[j * value_step];
    return O::before(x, y) || (!O::before(y, x) && indices[i * index_step] < indices[j * index_step]);
  }

  HD void swap(std::int64_t i, std::int64_t j) const {
    std::swap(values[i * value_step], values[j * value_step]);
    std::swap(indices[i * index_step], indices[j * index_step]);
  }

  // Restores the heap of the first n pairs, whose last comes first, below pair i.
  HD void sink(std::int64_t i, std::int64_t n) const {
    for (std::int64_t child; (child = 2 * i + 1) < n; i = child) {
      if (child + 1 < n && before(child, child + 1)) ++child;
      if (!before(i, child)) return;
      swap(i, child);
    }
  }

  HD void sort(std::int64_t n) const {
    for (std::int64_t i = n / 2; i-- > 0;) sink(i, n);
    for (std::int64_t end = n - 1; end > 0; --end) swap(0, end), sink(0, end);
  }
};

// In the memory of the outputs: a few numbers by insertion, in all lanes at once, and many by a heap.
template <class O, int W> struct Sort {
  static constexpr std::int64_t few = W > 1 ? 32 : 12;

  static HD void run(const Instruction* q, double* const* bases) {
    Walk<3> walk(q, bases);
    do {
      fill(q, walk.p);
      if (q->n <= few) {
        insert(q, walk.p);
      } else {
        for (int l = 0; l < W; ++l) {
          Pairs<O>{walk.p[0] + l, walk.p[1] + l, q->at[0].step, q->at[1].step}.sort(q->n);
        }
      }
    } while (walk.next());
  }

  static HD void fill(const Instruction* q, double* const* p) {
    for (std::int64_t i = 0; i < q->n; ++i) {
      for (int l = 0; l < W; ++l) {
        p[0][i * q->at[0].step + l] = p[2][i * q->at[2].step + l];
        p[1][i * q->at[1].step + l] = double(i);
      }
    }
  }

  static HD void insert(const Instruction* q, double* const* p) {
    const std::int64_t s = q->at[0].step, t = q->at[1].step;
    for (std::int64_t i = 1; i < q->n; ++i) {
      for (std::int64_t j = i; j > 0; --j) order(p[0] + (j - 1) * s, p[0] + j * s, p[1] + (j - 1) * t, p[1] + j * t);
    }
  }

  // Exchanges neighbours x and y, and their indices i and j, where y comes first.
  static HD void order(double* x, double* y, double* i, double* j) {
    INDEPENDENT
    for (int l = 0; l < W; ++l) {
      const double a = x[l], b = y[l], k = i[l], m = j[l];
      const bool exchanged = O::before(b, a);
      x[l] = exchanged ? b : a;
      y[l] = exchanged ? a : b;
      i[l] = exchanged ? m : k;
      j[l] = exchanged ? k : m;
    }
  }
};

HD bool is_index(double i, std::int64_t n) { return (i >= 0) & (i < double(n)); }

// The element of each lane's index, nan where there is none.
template <int W> struct Gather {
  static HD void run(const Instruction* q, double* const* bases) {
    Walk<3> walk(q, bases);
    do {
      double result[W];
      for (int l = 0; l < W; ++l) {
        const double i = walk.p[2][l];
        const bool found = is_index(i, q->n);
        result[l] = found ? walk.p[1][std::int64_t(i) * q->at[1].step + l] : std::numeric_limits<double>::quiet_NaN();
      }
      for (int l = 0; l < W; ++l) walk.p[0][l] = result[l];
    } while (walk.next());
  }
};

// Writes or adds to the element of each lane's index. Where there is none, the first becomes nan.
template <bool adds, int W> struct Scatter {
  static HD void run(const Instruction* q, double* const* bases) {
    Walk<3> walk(q, bases);
    do {
      for (int l = 0; l < W; ++l) {
        const double i = walk.p[2][l];
        const bool found = is_index(i, q->n);
        double& to = walk.p[0][(found ? std::int64_t(i) : 0) * q->at[0].step + l];
        const double value = found ? walk.p[1][l] : std::numeric_limits<double>::quiet_NaN();
        to = adds ? to + value : value;
      }
    } while (walk.next());
  }
};

// The reductions R of the numbers up to each.
template <class R, int W> struct Running {
  static HD void run(const Instruction* q, double* const* bases) {
    Walk<2> walk(q, bases);
    do {
      double so_far[W];
      for (int l = 0; l < W; ++l) so_far[l] = R::start();
      for (std::int64_t i = 0; i < q->n; ++i) {
        const double* const x = walk.p[1] + i * q->at[1].step;
        double* const to = walk.p[0] + i * q->at[0].step;
        INDEPENDENT
        for (int l = 0; l < W; ++l) R::step(so_far[l], x[l]), to[l] = so_far[l];
      }
    } while (walk.next());
  }
};

}  // namespace implicitdiff
