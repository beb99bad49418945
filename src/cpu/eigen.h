// Eigenvalues and eigenvectors of symmetric matrices of the machine, by Jacobi's rotations.
#pragma once

#include "matrices.h"

namespace implicitdiff {

// Rotation of rows or columns p and q of each lane.
template <int W> struct Rotation {
  double cosine[W], sine[W];

  // The one that makes the matrix of the rows (first, off) and (off, last) diagonal, and none where `off` is at most
  // `limit`. Returns whether a lane rotates.
  HD bool find(const double* first, const double* last, const double* off, const double* limit) {
    bool any = false;
    for (int l = 0; l < W; ++l) {
      const bool rotates = std::abs(off[l]) > limit[l];
      const double half = (last[l] - first[l]) / (2 * off[l]);
      const double tangent = std::copysign(1.0, half) / (std::abs(half) + std::sqrt(half * half + 1));
      cosine[l] = rotates ? 1 / std::sqrt(tangent * tangent + 1) : 1;
      sine[l] = rotates ? tangent * cosine[l] : 0;
      any |= rotates;
    }
    return any;
  }

  // (x, y) = (c x - s y, s x + c y), of n pairs.
  HD void apply(double* x, double* y, std::int64_t n, std::int64_t step) const {
    for (; n > 0; --n, x += step, y += step) {
      INDEPENDENT
      for (int l = 0; l < W; ++l) {
        const double a = x[l], b = y[l];
        x[l] = cosine[l] * a - sine[l] * b;
        y[l] = sine[l] * a + cosine[l] * b;
      }
    }
  }
};

// Outputs: the eigenvectors in columns, the eigenvalues in ascending order, and a matrix for the computation. The lower
// triangle is read.
template <int W> struct Eigh {
  static constexpr int most_sweeps = 60;

  static HD void run(const Instruction* q, double* const* bases) {
    const std::int64_t n = q->dimensions[0].size;
    const Matrix vectors(q, bases, 0), values(q, bases, 1), a(q, bases, 2);
    double limit[W];
    start(a, vectors, Matrix(q, bases, 3), n, limit);
    for (int i = 0; i < most_sweeps && sweep(a, vectors, n, limit); ++i) {
    }
    for (std::int64_t i = 0; i < n; ++i) finish(values, vectors, a, n, i, limit);
    for (int l = 0; l < W; ++l) order(values, vectors, n, l);
  }

  // What is at most 2^-53 times the norm is rounding.
  static HD void start(const Matrix& a, const Matrix& vectors, const Matrix& given, std::int64_t n, double* limit) {
    for (int l = 0; l < W; ++l) limit[l] = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        const double* const x = i < j ? given.at(j, i) : given.at(i, j);
        for (int l = 0; l < W; ++l) {
          a.at(i, j)[l] = x[l];
          vectors.at(i, j)[l] = double(i == j);
          limit[l] = (std::abs(x[l]) > limit[l]) | (x[l] != x[l]) ? std::abs(x[l]) : limit[l];
        }
      }
    }
    for (int l = 0; l < W; ++l) limit[l] *= 0x1p-53;
  }

  static HD bool sweep(const Matrix& a, const Matrix& vectors, std::int64_t n, const double* limit) {
    bool any = false;
    for (std::int64_t p = 0; p < n; ++p) {
      for (std::int64_t q = p + 1; q < n; ++q) {
        Rotation<W> rotation;
        if (!rotation.find(a.at(p, p), a.at(q, q), a.at(p, q), limit)) continue;
        any = true;
        rotation.apply(a.at(p, 0), a.at(q, 0), n, a.column);
        rotation.apply(a.at(0, p), a.at(0, q), n, a.row);
        rotation.apply(vectors.at(0, p), vectors.at(0, q), n, vectors.row);
      }
    }
    return any;
  }

  // Eigenvalue i, and row i of the eigenvectors; nan where the matrix is not finite, for which nothing was rotated.
  static HD void finish(const Matrix& values, const Matrix& vectors, const Matrix& a, std::int64_t n, std::int64_t i,
                        const double* limit) {
    for (int l = 0; l < W; ++l) values.at(i, 0)[l] = a.at(i, i)[l] + 0 * limit[l];
    for (std::int64_t j = 0; j < n; ++j) {
      for (int l = 0; l < W; ++l) vectors.at(i, j)[l] += 0 * limit[l];
    }
  }

  static HD void order(const Matrix& values, const Matrix& vectors, std::int64_t n, int l) {
    for (std::int64_t i = 0; i + 1 < n; ++i) {
      std::int64_t least = i;
      for (std::int64_t j = i + 1; j < n; ++j) least = values.at(j, 0)[l] < values.at(least, 0)[l] ? j : least;
      if (least == i) continue;
      std::swap(values.at(i, 0)[l], values.at(least, 0)[l]);
      for (std::int64_t k = 0; k < n; ++k) std::swap(vectors.at(k, i)[l], vectors.at(k, least)[l]);
    }
  }
};

}  // namespace implicitdiff
