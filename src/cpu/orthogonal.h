// QR factorizations of the machine by reflections H = 1 - tau v v', in the format of LAPACK's geqrf: the reflectors v lie
// below the diagonal of R, without their first element, which is 1.
#pragma once

#include "matrices.h"

namespace implicitdiff {

// A column of n elements, which are `step` apart.
struct Column {
  double* first;
  std::int64_t n, step;

  HD Column(double* first, std::int64_t n, std::int64_t step) : first(first), n(n), step(step) {}

  HD double* at(std::int64_t i) const { return first + i * step; }
};

// Part of a matrix from (i, j) on.
HD Matrix from(const Matrix& a, std::int64_t i, std::int64_t j) {
  Matrix part = a;
  part.first = a.at(i, j);
  return part;
}

// Largest absolute value from element `begin` on, nan where one is nan.
template <int W> HD void largest(const Column& x, std::int64_t begin, double* result) {
  for (int l = 0; l < W; ++l) result[l] = 0;
  for (std::int64_t i = begin; i < x.n; ++i) {
    const double* const element = x.at(i);
    for (int l = 0; l < W; ++l) {
      const double size = std::abs(element[l]);
      result[l] = (size > result[l]) | (size != size) ? size : result[l];
    }
  }
}

// Norm, of multiples of the largest element, so that no square overflows.
template <int W> HD void norm(const Column& x, double* result) {
  double scale[W], squares[W] = {};
  largest<W>(x, 0, scale);
  for (int l = 0; l < W; ++l) scale[l] = scale[l] != 0 ? scale[l] : 1;
  for (std::int64_t i = 0; i < x.n; ++i) {
    const double* const element = x.at(i);
    for (int l = 0; l < W; ++l) squares[l] += (element[l] / scale[l]) * (element[l] / scale[l]);
  }
  for (int l = 0; l < W; ++l) result[l] = scale[l] * std::sqrt(squares[l]);
}

// Makes of a column its reflector, behind the only element that the reflection leaves. tau is 0 where nothing is to be
// reflected, as in LAPACK's larfg.
template <int W> HD void make_reflector(const Column& x, double* tau) {
  double size[W], below[W], divisor[W];
  norm<W>(x, size);
  largest<W>(x, 1, below);
  for (int l = 0; l < W; ++l) {
    const double alpha = x.first[l], beta = -std::copysign(size[l], alpha);
    const bool reflects = below[l] != 0;
    tau[l] = reflects ? (beta - alpha) / beta : 0;
    divisor[l] = reflects ? alpha - beta : 1;
    x.first[l] = reflects ? beta : alpha;
  }
  for (std::int64_t i = 1; i < x.n; ++i) {
    double* const element = x.at(i);
    for (int l = 0; l < W; ++l) element[l] /= divisor[l];
  }
}

// c -= tau v (v'c), of J groups of columns, which are `step` apart. A: as in solve_row.
template <class A, int L, int N, int J>
HD void reflect_columns(const Column& v, const double* tau, double* c, std::int64_t row, std::int64_t step) {
  using Group = Lanes<L, N>;
  const Group factor = A::template load<L, N>(tau);
  Group sums[J], parts[J];
  for (int j = 0; j < J; ++j) sums[j] = Group::load(c + j * step), parts[j] = Group::all(0);
  for (std::int64_t i = 1; i < v.n; ++i) {
    const Group element = A::template load<L, N>(v.at(i));
    for (int j = 0; j < J; ++j) sums[j].template add_product<false>(element, Group::load(c + i * row + j * step));
  }
  for (int j = 0; j < J; ++j) parts[j].template add_product<false>(factor, sums[j]);
  for (std::int64_t i = 0; i < v.n; ++i) {
    const Group element = i > 0 ? A::template load<L, N>(v.at(i)) : Group::all(1);
    for (int j = 0; j < J; ++j) {
      double* const at = c + i * row + j * step;
      Group rest = Group::load(at);
      rest.template add_product<true>(element, parts[j]);
      rest.store(at);
    }
  }
}

// The same of one contiguous column, by a contiguous reflector.
template <int N> HD void reflect_vector(const Column& v, double tau, double* c) {
  const double part = tau * (c[0] + dot<N>(v.first + 1, c + 1, v.n - 1));
  c[0] -= part;
  subtract_multiple<1>(c + 1, &part, v.first + 1, v.n - 1, 1);
}

// The same of m columns.
template <int W, int N> HD void reflect(const Column& v, const double* tau, const Matrix& c, std::int64_t m) {
  constexpr int J = 4;
  std::int64_t j = 0;
  if (W == 1 && v.step == 1 && c.row == 1) {
    for (; j < m; ++j) reflect_vector<N>(v, *tau, c.at(0, j));
  }
  if (W == 1 && c.column == 1) {
    for (; j + group <= m; j += group) reflect_columns<One, group, N, 1>(v, tau, c.at(0, j), c.row, group);
  }
  for (; j + J <= m; j += J) reflect_columns<Each, W, N, J>(v, tau, c.at(0, j), c.row, c.column);
  for (; j < m; ++j) reflect_columns<Each, W, N, 1>(v, tau, c.at(0, j), c.row, c.column);
}

template <int W> struct Qr {
  template <int N> struct With {
    static HD void run(const Instruction* q, double* const* bases) {
      const std::int64_t n = q->dimensions[0].size, m = q->dimensions[1].size;
      const Matrix a(q, bases, 0), tau(q, bases, 1);
      copy<W>(a, Matrix(q, bases, 2), n, m);
      for (std::int64_t i = 0; i < std::min(n, m); ++i) {
        const Column v(a.at(i, i), n - i, a.row);
        make_reflector<W>(v, tau.at(i, 0));
        if (i + 1 < m) reflect<W, N>(v, tau.at(i, 0), from(a, i, i + 1), m - i - 1);
      }
    }
  };
};

// Q x or Q'x, Q being the product of k reflections in their order.
template <int W, bool transposed> struct ApplyQ {
  template <int N> struct With {
    static HD void run(const Instruction* q, double* const* bases) {
      const std::int64_t n = q->dimensions[0].size, m = q->dimensions[1].size, k = q->dimensions[2].size;
      const std::int64_t reflector = q->dimensions[2].step[1], number = q->dimensions[2].step[2];
      const Matrix x(q, bases, 0), factors(q, bases, 1), tau(q, bases, 2);
      copy<W>(x, Matrix(q, bases, 3), n, m);
      for (std::int64_t step = 0; step < k; ++step) {
        const std::int64_t i = transposed ? step : k - 1 - step;
        const Column v(factors.at(i, 0) + i * reflector, n - i, factors.row);
        reflect<W, N>(v, tau.first + i * number, from(x, i, 0), m);
      }
    }
  };
};

}  // namespace implicitdiff
