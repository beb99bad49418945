// Matrix products of the machine.
#pragma once

#include "kernels.h"

namespace implicitdiff {

// Dimensions of a product, behind the outer ones.
struct Product {
  const Dimension &i, &j, &k;

  HD Product(const Dimension& i, const Dimension& j, const Dimension& k) : i(i), j(j), k(k) {}
  HD explicit Product(const Instruction* q)
      : i(q->dimensions[q->outer]), j(q->dimensions[q->outer + 1]), k(q->dimensions[q->outer + 2]) {}
};

// How L numbers of an operand are read: each for itself, or one for all.
struct Each {
  template <int L, int N> static HD Lanes<L, N> load(const double* x) { return Lanes<L, N>::load(x); }
};
struct One {
  template <int L, int N> static HD Lanes<L, N> load(const double* x) { return Lanes<L, N>::all(*x); }
};

// I times J results at once, so that each number that is read serves several of them: a b, or if minus, r - a b.
template <class A, class B, int L, int N, int I, int J, bool minus>
HD void tile(const Product& at, double* r, const double* a, const double* b) {
  using Group = Lanes<L, N>;
  Group sums[I][J];
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < J; ++j) {
      sums[i][j] = minus ? Group::load(r + i * at.i.step[0] + j * at.j.step[0]) : Group::all(0);
    }
  }
  for (std::int64_t k = 0; k < at.k.size; ++k, a += at.k.step[1], b += at.k.step[2]) {
    Group right[J];
    for (int j = 0; j < J; ++j) right[j] = B::template load<L, N>(b + j * at.j.step[2]);
    for (int i = 0; i < I; ++i) {
      const Group left = A::template load<L, N>(a + i * at.i.step[1]);
      for (int j = 0; j < J; ++j) sums[i][j].template add_product<minus>(left, right[j]);
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < J; ++j) sums[i][j].store(r + i * at.i.step[0] + j * at.j.step[0]);
  }
}

// Results of rows i to i + I.
template <class A, class B, int L, int N, int I, int J, bool minus>
HD void tiles_of_rows(const Product& at, std::int64_t i, double* r, const double* a, const double* b) {
  r += i * at.i.step[0], a += i * at.i.step[1];
  std::int64_t j = 0;
  for (; j + J <= at.j.size; j += J) tile<A, B, L, N, I, J, minus>(at, r + j * at.j.step[0], a, b + j * at.j.step[2]);
  if (J == 1) return;
  for (; j < at.j.size; ++j) tile<A, B, L, N, I, 1, minus>(at, r + j * at.j.step[0], a, b + j * at.j.step[2]);
}

// As many accumulators as the registers of the instruction set hold.
template <class A, class B, int L, int N, bool minus = false>
HD void tiles(const Product& at, double* r, const double* a, const double* b) {
  constexpr int I = N >= 4 ? 4 : 2, J = N >= 8 ? 2 : 1;
  std::int64_t i = 0;
  for (; i + I <= at.i.size; i += I) tiles_of_rows<A, B, L, N, I, J, minus>(at, i, r, a, b);
  for (; i < at.i.size; ++i) tiles_of_rows<A, B, L, N, 1, J, minus>(at, i, r, a, b);
}

constexpr int group = 8;

// The same of one lane, results and b being contiguous along j: eight columns are a group.
template <int N, bool minus = false>
HD void tiles_of_columns(const Product& at, double* r, const double* a, const double* b) {
  Dimension groups = at.j, rest = at.j;
  const std::int64_t whole = at.j.size / group * group;
  groups.size /= group, rest.size -= whole;
  for (std::int64_t& step : groups.step) step *= group;
  tiles<One, Each, group, N, minus>(Product{at.i, groups, at.k}, r, a, b);
  tiles<One, Each, 1, 1, minus>(Product{at.i, rest, at.k}, r + whole, a, b + whole);
}

// For W > 1. A, B: Each in the arena, One in a shared array.
template <class A, class B, int W> struct ProductOfLanes {
  template <int N> struct With {
    static HD void run(const Instruction* q, double* const* bases) {
      Walk<3> walk(q, bases);
      const Product at(q);
      do tiles<A, B, W, N>(at, walk.p[0], walk.p[1], walk.p[2]);
      while (walk.next());
    }
  };
};

// For W = 1 and results and b contiguous along j.
template <int N> struct ProductByColumns {
  static HD void run(const Instruction* q, double* const* bases) {
    Walk<3> walk(q, bases);
    const Product at(q);
    do {
      if (at.i.size == 1) {
        row(at, walk.p[0], walk.p[1], walk.p[2]);
      } else {
        tiles_of_columns<N>(at, walk.p[0], walk.p[1], walk.p[2]);
      }
    } while (walk.next());
  }

  // One row of results, as a sum of the rows of b, which are read as they lie.
  static HD void row(const Product& at, double* r, const double* a, const double* b) {
    constexpr int several = 8;
    const std::int64_t n = at.j.size, next_a = at.k.step[1], next_b = at.k.step[2];
    std::fill_n(r, n, 0.0);
    std::int64_t k = 0;
    for (; k + several <= at.k.size; k += several, a += several * next_a, b += several * next_b) {
      double x[several];
      for (int i = 0; i < several; ++i) x[i] = a[i * next_a];
      INDEPENDENT
      for (std::int64_t j = 0; j < n; ++j) {
        const double* const y = b + j;
        const double low = (x[0] * y[0] + x[1] * y[next_b]) + (x[2] * y[2 * next_b] + x[3] * y[3 * next_b]);
        const double* const z = y + 4 * next_b;
        const double high = (x[4] * z[0] + x[5] * z[next_b]) + (x[6] * z[2 * next_b] + x[7] * z[3 * next_b]);
        r[j] += low + high;
      }
    }
    for (; k < at.k.size; ++k, a += next_a, b += next_b) {
      const double x = *a;
      INDEPENDENT
      for (std::int64_t j = 0; j < n; ++j) r[j] += x * b[j];
    }
  }
};

// For W = 1 and both operands contiguous along k: sums of I rows by one column at once. A large matrix that is read
// once is read in the order of memory.
template <int N> struct ProductByRows {
  static HD void run(const Instruction* q, double* const* bases) {
    Walk<3> walk(q, bases);
    const Product at(q);
    constexpr int I = 4;
    const bool streams = q->large && at.j.size == 1;  // not by the size here, which is that of a thread's part
    do {
      for (std::int64_t j = 0; j < at.j.size; ++j) {
        double *r = walk.p[0] + j * at.j.step[0], *b = walk.p[2] + j * at.j.step[2];
        std::int64_t i = 0;
        for (; i + I <= at.i.size && !streams; i += I) {
          dots<I, 1>(at, r + i * at.i.step[0], walk.p[1] + i * at.i.step[1], b);
        }
        for (; i < at.i.size; ++i) dots<1, 4>(at, r + i * at.i.step[0], walk.p[1] + i * at.i.step[1], b);
      }
    } while (walk.next());
  }

  // Each sum in several parts.
  template <int I, int parts> static HD void dots(const Product& at, double* r, const double* a, const double* b) {
    using Group = Lanes<group, N>;
    Group sums[I][parts];
    for (auto& sum : sums) {
      for (Group& part : sum) part = Group::all(0);
    }
    std::int64_t k = 0;
    for (; k + parts * group <= at.k.size; k += parts * group) {
      for (int part = 0; part < parts; ++part) add(at, sums, part, a + k + part * group, b + k + part * group);
    }
    for (; k + group <= at.k.size; k += group) add(at, sums, 0, a + k, b + k);
    double totals[I];
    for (int i = 0; i < I; ++i) {
      for (int part = 1; part < parts; ++part) sums[i][0].template join<formula::SUM>(sums[i][part]);
      totals[i] = sums[i][0].sum();
    }
    for (; k < at.k.size; ++k) {
      for (int i = 0; i < I; ++i) totals[i] += a[i * at.i.step[1] + k] * b[k];
    }
    for (int i = 0; i < I; ++i) r[i * at.i.step[0]] = totals[i];
  }

  template <int I, int parts>
  static HD void add(const Product& at, Lanes<group, N> (&sums)[I][parts], int part, const double* a, const double* b) {
    using Group = Lanes<group, N>;
    const Group right = Group::load(b);
    for (int i = 0; i < I; ++i) sums[i][part].template add_product<false>(Group::load(a + i * at.i.step[1]), right);
  }
};

// Any steps: all dimensions but k are outer ones.
template <int W> struct SumOfProducts {
  template <int N> struct With {
    static HD void run(const Instruction* q, double* const* bases) {
      using Group = Lanes<W, N>;
      Walk<3> walk(q, bases);
      const bool one_a = q->at[1].space != 0, one_b = q->at[2].space != 0;
      do {
        Group sum = Group::all(0);
        const double *a = walk.p[1], *b = walk.p[2];
        for (std::int64_t k = 0; k < q->n; ++k, a += q->at[1].step, b += q->at[2].step) {
          const Group left = one_a ? Group::all(*a) : Group::load(a), right = one_b ? Group::all(*b) : Group::load(b);
          sum.template add_product<false>(left, right);
        }
        sum.store(walk.p[0]);
      } while (walk.next());
    }
  };
};

}  // namespace implicitdiff
