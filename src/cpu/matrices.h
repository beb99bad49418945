// Factorizations and triangular solves of the machine. Each lane has its matrix, its pivots and its failures.
#pragma once

#include "products.h"

namespace implicitdiff {

struct Matrix {
  double* first;
  std::int64_t row, column;

  // Operand i of an instruction on matrices.
  HD Matrix(const Instruction* q, double* const* bases, int i)
      : first(bases[q->at[i].space] + q->at[i].offset),
        row(q->dimensions[0].step[i]),
        column(q->dimensions[1].step[i]) {}

  HD double* at(std::int64_t i, std::int64_t j) const { return first + i * row + j * column; }
};

template <int W> HD void copy(const Matrix& to, const Matrix& from, std::int64_t n, std::int64_t m) {
  if (to.first == from.first) return;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < m; ++j) std::memcpy(to.at(i, j), from.at(i, j), W * sizeof(double));
  }
}

// r -= x y, of n elements
template <int W>
HD void subtract_multiple(double* r, const double* x, const double* y, std::int64_t n, std::int64_t step) {
  if (W == 1 && step == 1) {
    INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) r[i] -= *x * y[i];
    return;
  }
  for (; n > 0; --n, r += step, y += step) {
    INDEPENDENT_LANES
    for (int l = 0; l < W; ++l) r[l] -= x[l] * y[l];
  }
}

// Row of a lane's number in a value of pivots. One that is no row of the matrix, which a factorization does not write,
// stands for no exchange.
HD std::int64_t row_of(double pivot, std::int64_t i, std::int64_t n) {
  return pivot >= 0 && pivot < double(n) ? std::int64_t(pivot) : i;
}

// Exchanges row i of m elements with the row of each lane's pivot.
template <int W>
HD void exchange(const Matrix& a, std::int64_t i, const double* pivots, std::int64_t n, std::int64_t m) {
  std::int64_t other[W];
  bool none = true;
  for (int l = 0; l < W; ++l) other[l] = row_of(pivots[l], i, n), none &= other[l] == i;
  if (none) return;
  for (std::int64_t j = 0; j < m; ++j) {
    double* const here = a.at(i, j);
    for (int l = 0; l < W; ++l) std::swap(here[l], a.at(other[l], j)[l]);
  }
}

// In place and by blocks of columns, as LAPACK's getrf.
template <int W> struct Lu {
  template <int N> struct With {
    static constexpr std::int64_t block = W == 1 ? 32 : 8;

    static HD void run(const Instruction* q, double* const* bases) {
      const std::int64_t n = q->dimensions[0].size;
      const Matrix a(q, bases, 0), pivots(q, bases, 1);
      double* const info = bases[0] + q->at[2].offset;
      copy<W>(a, Matrix(q, bases, 3), n, n);
      for (int l = 0; l < W; ++l) info[l] = 0;
      for (std::int64_t begin = 0; begin < n; begin += block) {
        const std::int64_t end = std::min(begin + block, n);
        for (std::int64_t j = begin; j < end; ++j) column(a, j, end, n, pivots.at(j, 0), info);
        for (std::int64_t i = begin + 1; i < end; ++i) {
          for (std::int64_t k = begin; k < i; ++k) {
            subtract_multiple<W>(a.at(i, end), a.at(i, k), a.at(k, end), n - end, a.column);
          }
        }
        update(a, begin, end, n);
      }
    }

    // Column j of the factors, and its part in the columns up to `end`.
    static HD void column(const Matrix& a, std::int64_t j, std::int64_t end, std::int64_t n, double* pivot,
                          double* info) {
      find_pivot(a, j, n, pivot);
      exchange<W>(a, j, pivot, n, n);
      const double* const diagonal = a.at(j, j);
      for (int l = 0; l < W; ++l) info[l] = info[l] == 0 && diagonal[l] == 0 ? double(j + 1) : info[l];
      for (std::int64_t i = j + 1; i < n; ++i) {
        double* const factor = a.at(i, j);
        INDEPENDENT_LANES
        for (int l = 0; l < W; ++l) factor[l] = diagonal[l] != 0 ? factor[l] / diagonal[l] : factor[l];
        subtract_multiple<W>(a.at(i, j + 1), factor, a.at(j, j + 1), end - j - 1, a.column);
      }
    }

    // The rest of the matrix, less the product of the new columns and the new rows.
    static HD void update(const Matrix& a, std::int64_t begin, std::int64_t end, std::int64_t n) {
      const Dimension i{n - end, {a.row, a.row, 0}}, j{n - end, {a.column, 0, a.column}};
      const Dimension k{end - begin, {0, a.column, a.row}};
      const Product at(i, j, k);
      double* const r = a.at(end, end);
      const double *left = a.at(end, begin), *right = a.at(begin, end);
      if (W > 1) {
        tiles<Each, Each, W, N, true>(at, r, left, right);
      } else if (a.column == 1) {
        tiles_of_columns<N, true>(at, r, left, right);
      } else {
        tiles<One, Each, 1, 1, true>(at, r, left, right);
      }
    }

    static HD void find_pivot(const Matrix& a, std::int64_t j, std::int64_t n, double* pivot) {
      using Group = Lanes<W, N>;
      double first[W];
      for (int l = 0; l < W; ++l) first[l] = std::abs(a.at(j, j)[l]);
      Group largest = Group::load(first), row = Group::all(double(j));
      for (std::int64_t i = j + 1; i < n; ++i) {
        const double* const x = a.at(i, j);
        for (int p = 0; p < Group::parts; ++p) {
          take_larger<Group::n>(largest.part[p], row.part[p], x + p * Group::n, double(i));
        }
      }
      row.store(pivot);
    }

    // Of L lanes.
    template <int L, class V> static HD void take_larger(V& largest, V& row, const double* x, double i) {
      double size[L], at[L];
      std::memcpy(size, &largest, sizeof size);
      std::memcpy(at, &row, sizeof at);
      INDEPENDENT_LANES
      for (int l = 0; l < L; ++l) {
        const bool larger = std::abs(x[l]) > size[l];
        size[l] = larger ? std::abs(x[l]) : size[l];
        at[l] = larger ? i : at[l];
      }
      std::memcpy(&largest, size, sizeof size);
      std::memcpy(&row, at, sizeof at);
    }
  };
};

// Sum of the products of two contiguous vectors.
template <int N> HD double dot(const double* a, const double* b, std::int64_t n) {
  constexpr int several = 4;
  using Group = Lanes<group, N>;
  Group sums[several];
  for (Group& sum : sums) sum = Group::all(0);
  std::int64_t i = 0;
  for (; i + several * group <= n; i += several * group) {
    for (int j = 0; j < several; ++j) {
      sums[j].template add_product<false>(Group::load(a + i + j * group), Group::load(b + i + j * group));
    }
  }
  for (; i + group <= n; i += group) sums[0].template add_product<false>(Group::load(a + i), Group::load(b + i));
  double total = 0;
  for (const Group& sum : sums) total += sum.sum();
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// Row i of J groups of columns of a triangular solve: x_i = (b_i - sum of a_ik x_k) / a_ii over k from begin to end.
// A: how an element of a is read, for all L columns of a group or for each of L lanes.
template <class A, int L, int N, int J>
HD void solve_row(const Matrix& a, std::int64_t i, std::int64_t begin, std::int64_t end, bool unit, const Matrix& x,
                  double* columns, std::int64_t step) {
  using Group = Lanes<L, N>;
  Group rest[J];
  for (int j = 0; j < J; ++j) rest[j] = Group::load(columns + i * x.row + j * step);
  for (std::int64_t k = begin; k < end; ++k) {
    const Group factor = A::template load<L, N>(a.at(i, k));
    for (int j = 0; j < J; ++j) rest[j].template add_product<true>(factor, Group::load(columns + k * x.row + j * step));
  }
  if (!unit) {
    const Group diagonal = A::template load<L, N>(a.at(i, i));
    for (int j = 0; j < J; ++j) rest[j].divide(diagonal);
  }
  for (int j = 0; j < J; ++j) rest[j].store(columns + i * x.row + j * step);
}

template <class A, int L, int N, int J>
HD void solve_columns(const Matrix& a, bool lower, bool unit, std::int64_t n, const Matrix& x, double* columns,
                      std::int64_t step) {
  if (lower) {
    for (std::int64_t i = 0; i < n; ++i) solve_row<A, L, N, J>(a, i, 0, i, unit, x, columns, step);
  } else {
    for (std::int64_t i = n - 1; i >= 0; --i) solve_row<A, L, N, J>(a, i, i + 1, n, unit, x, columns, step);
  }
}

// One contiguous column by contiguous rows.
template <int N> HD void solve_vector(const Matrix& a, bool lower, bool unit, std::int64_t n, double* x) {
  for (std::int64_t step = 0; step < n; ++step) {
    const std::int64_t i = lower ? step : n - 1 - step, begin = lower ? 0 : i + 1, end = lower ? i : n;
    const double rest = x[i] - dot<N>(a.at(i, begin), x + begin, end - begin);
    x[i] = unit ? rest : rest / *a.at(i, i);
  }
}

// In place.
template <int W, int N>
HD void solve(const Matrix& a, bool lower, bool unit, std::int64_t n, std::int64_t m, const Matrix& x) {
  constexpr int J = 4;
  std::int64_t j = 0;
  if (W == 1 && m == 1 && a.column == 1 && x.row == 1) return solve_vector<N>(a, lower, unit, n, x.first);
  if (W == 1 && x.column == 1) {
    for (; j + group <= m; j += group) solve_columns<One, group, N, 1>(a, lower, unit, n, x, x.at(0, j), group);
  }
  for (; j + J <= m; j += J) solve_columns<Each, W, N, J>(a, lower, unit, n, x, x.at(0, j), x.column);
  for (; j < m; ++j) solve_columns<Each, W, N, 1>(a, lower, unit, n, x, x.at(0, j), x.column);
}

template <int W, bool lower, bool unit> struct Triangular {
  template <int N> struct With {
    static HD void run(const Instruction* q, double* const* bases) {
      const std::int64_t n = q->dimensions[0].size, m = q->dimensions[1].size;
      const Matrix x(q, bases, 0);
      copy<W>(x, Matrix(q, bases, 2), n, m);
      solve<W, N>(Matrix(q, bases, 1), lower, unit, n, m, x);
    }
  };
};

template <int W> struct LuSolve {
  template <int N> struct With {
    static HD void run(const Instruction* q, double* const* bases) {
      const std::int64_t n = q->dimensions[0].size, m = q->dimensions[1].size;
      const Matrix x(q, bases, 0), lu(q, bases, 1), pivots(q, bases, 2);
      copy<W>(x, Matrix(q, bases, 3), n, m);
      for (std::int64_t i = 0; i < n; ++i) exchange<W>(x, i, pivots.at(i, 0), n, m);
      solve<W, N>(lu, true, true, n, m, x);
      solve<W, N>(lu, false, false, n, m, x);
    }
  };
};

template <int W> struct Cholesky {
  template <int N> struct With {
    using Group = Lanes<W, N>;

    static HD void run(const Instruction* q, double* const* bases) {
      const std::int64_t n = q->dimensions[0].size;
      const Matrix factor(q, bases, 0), a(q, bases, 2);
      double* const info = bases[0] + q->at[1].offset;
      for (int l = 0; l < W; ++l) info[l] = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = 0; i < j; ++i) Group::all(0).store(factor.at(i, j));
        rows<1>(factor, a, j, j);
        double* const diagonal = factor.at(j, j);
        for (int l = 0; l < W; ++l) {
          info[l] = info[l] == 0 && !(diagonal[l] > 0) ? double(j + 1) : info[l];
          diagonal[l] = std::sqrt(diagonal[l]);
        }
        std::int64_t i = j + 1;
        for (; i + 4 <= n; i += 4) rows<4>(factor, a, i, j);
        for (; i < n; ++i) rows<1>(factor, a, i, j);
      }
    }

    // Elements of column j and of I rows from i on: (a_ij - sum of f_ik f_jk over k < j) / f_jj, undivided if i = j.
    template <int I> static HD void rows(const Matrix& factor, const Matrix& a, std::int64_t i, std::int64_t j) {
      Group rest[I];
      for (int r = 0; r < I; ++r) rest[r] = Group::load(a.at(i + r, j));
      const bool contiguous = W == 1 && factor.column == 1;
      for (int r = 0; r < I && contiguous; ++r) {
        rest[r] = Group::all(*a.at(i + r, j) - dot<N>(factor.at(i + r, 0), factor.at(j, 0), j));
      }
      for (std::int64_t k = 0; k < j && !contiguous; ++k) {
        const Group right = Group::load(factor.at(j, k));
        for (int r = 0; r < I; ++r) rest[r].template add_product<true>(Group::load(factor.at(i + r, k)), right);
      }
      if (i != j) {
        const Group diagonal = Group::load(factor.at(j, j));
        for (int r = 0; r < I; ++r) rest[r].divide(diagonal);
      }
      for (int r = 0; r < I; ++r) rest[r].store(factor.at(i + r, j));
    }
  };
};

}  // namespace implicitdiff
