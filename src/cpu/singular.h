// Singular values of the machine, by Jacobi's rotations of columns: small ones have as many digits as large ones.
#pragma once

#include "eigen.h"
#include "orthogonal.h"

namespace implicitdiff {

// Outputs: the left singular vectors, the singular values in descending order, and the right singular vectors in
// columns. The matrix has at least as many rows as columns.
template <int W> struct Svd {
  static constexpr int most_sweeps = 60;

  static HD void run(const Instruction* q, double* const* bases) {
    const std::int64_t m = q->dimensions[0].size, n = q->dimensions[1].size;
    const Matrix u(q, bases, 0), values(q, bases, 1), v(q, bases, 2);
    double scale[W];
    start(u, v, Matrix(q, bases, 3), m, n, scale);
    for (int i = 0; i < most_sweeps && sweep(u, v, m, n); ++i) {
    }
    for (std::int64_t j = 0; j < n; ++j) finish(u, v, m, n, j, scale, values.at(j, 0));
    for (int l = 0; l < W; ++l) {
      order(u, values, v, m, n, l);
      for (std::int64_t j = 0; j < n; ++j) {
        if (values.at(j, 0)[l] == 0) complete(u, m, j, l);
      }
    }
  }

  // The matrix in units of its largest entry, so that no square overflows.
  static HD void start(const Matrix& u, const Matrix& v, const Matrix& given, std::int64_t m, std::int64_t n,
                       double* scale) {
    for (int l = 0; l < W; ++l) scale[l] = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      double size[W];
      largest<W>({given.at(0, j), m, given.row}, 0, size);
      for (int l = 0; l < W; ++l) scale[l] = (size[l] > scale[l]) | (size[l] != size[l]) ? size[l] : scale[l];
    }
    for (int l = 0; l < W; ++l) scale[l] = scale[l] != 0 ? scale[l] : 1;
    for (std::int64_t j = 0; j < n; ++j) {
      for (std::int64_t i = 0; i < m; ++i) {
        for (int l = 0; l < W; ++l) u.at(i, j)[l] = given.at(i, j)[l] / scale[l];
      }
      for (std::int64_t i = 0; i < n; ++i) {
        for (int l = 0; l < W; ++l) v.at(i, j)[l] = double(i == j);
      }
    }
  }

  static HD bool sweep(const Matrix& u, const Matrix& v, std::int64_t m, std::int64_t n) {
    bool any = false;
    for (std::int64_t p = 0; p < n; ++p) {
      for (std::int64_t q = p + 1; q < n; ++q) {
        double first[W], last[W], off[W], limit[W];
        products(u, p, p, m, first), products(u, q, q, m, last), products(u, p, q, m, off);
        for (int l = 0; l < W; ++l) limit[l] = 0x1p-52 * std::sqrt(first[l]) * std::sqrt(last[l]);
        Rotation<W> rotation;
        if (!rotation.find(first, last, off, limit)) continue;
        any = true;
        rotation.apply(u.at(0, p), u.at(0, q), m, u.row);
        rotation.apply(v.at(0, p), v.at(0, q), n, v.row);
      }
    }
    return any;
  }

  static HD void products(const Matrix& u, std::int64_t p, std::int64_t q, std::int64_t m, double* sums) {
    double so_far[W] = {};
    for (std::int64_t i = 0; i < m; ++i) {
      const double *x = u.at(i, p), *y = u.at(i, q);
      for (int l = 0; l < W; ++l) so_far[l] += x[l] * y[l];
    }
    for (int l = 0; l < W; ++l) sums[l] = so_far[l];
  }

  // Singular value j and its vectors; nan where the matrix is not finite.
  static HD void finish(const Matrix& u, const Matrix& v, std::int64_t m, std::int64_t n, std::int64_t j,
                        const double* scale, double* value) {
    double size[W];
    norm<W>({u.at(0, j), m, u.row}, size);
    for (std::int64_t i = 0; i < m; ++i) {
      for (int l = 0; l < W; ++l) u.at(i, j)[l] = u.at(i, j)[l] / (size[l] != 0 ? size[l] : 1) + 0 * scale[l];
    }
    for (std::int64_t i = 0; i < n; ++i) {
      for (int l = 0; l < W; ++l) v.at(i, j)[l] += 0 * scale[l];
    }
    for (int l = 0; l < W; ++l) value[l] = size[l] * scale[l] + 0 * scale[l];
  }

  static HD void order(const Matrix& u, const Matrix& values, const Matrix& v, std::int64_t m, std::int64_t n, int l) {
    for (std::int64_t i = 0; i + 1 < n; ++i) {
      std::int64_t most = i;
      for (std::int64_t j = i + 1; j < n; ++j) most = values.at(j, 0)[l] > values.at(most, 0)[l] ? j : most;
      if (most == i) continue;
      std::swap(values.at(i, 0)[l], values.at(most, 0)[l]);
      for (std::int64_t k = 0; k < m; ++k) std::swap(u.at(k, i)[l], u.at(k, most)[l]);
      for (std::int64_t k = 0; k < n; ++k) std::swap(v.at(k, i)[l], v.at(k, most)[l]);
    }
  }

  // Column j of u, where the singular value is 0: the unit vector that is farthest from the columns in front, made
  // orthogonal to them, twice for the rounding.
  static HD void complete(const Matrix& u, std::int64_t m, std::int64_t j, int l) {
    std::int64_t farthest = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::int64_t i = 0; i < m; ++i) {
      double square = 0;
      for (std::int64_t k = 0; k < j; ++k) square += u.at(i, k)[l] * u.at(i, k)[l];
      if (square < least) least = square, farthest = i;
    }
    for (std::int64_t i = 0; i < m; ++i) u.at(i, j)[l] = double(i == farthest);
    for (int time = 0; time < 2; ++time) {
      for (std::int64_t k = 0; k < j; ++k) add_multiple(u, m, j, k, -product(u, m, j, k, l), l);
      const double size = std::sqrt(product(u, m, j, j, l));
      for (std::int64_t i = 0; i < m; ++i) u.at(i, j)[l] /= size;
    }
  }

  static HD double product(const Matrix& u, std::int64_t m, std::int64_t j, std::int64_t k, int l) {
    double sum = 0;
    for (std::int64_t i = 0; i < m; ++i) sum += u.at(i, j)[l] * u.at(i, k)[l];
    return sum;
  }

  static HD void add_multiple(const Matrix& u, std::int64_t m, std::int64_t j, std::int64_t k, double factor, int l) {
    for (std::int64_t i = 0; i < m; ++i) u.at(i, j)[l] += factor * u.at(i, k)[l];
  }
};

}  // namespace implicitdiff
