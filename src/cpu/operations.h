// Operations of the machine: one table gives their numbers, their names, their kinds and their formulas.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "elementary.h"

namespace implicitdiff {
namespace scalar {

HD double sign(double x) { return double(x > 0) - double(x < 0); }
HD double maximum(double x, double y) { return (x > y) | (x != x) ? x : y; }
HD double minimum(double x, double y) { return (x < y) | (x != x) ? x : y; }

// The larger or the smaller of two numbers, and the number where one of them is nan.
HD double fmax(double x, double y) { return (x > y) | (y != y) ? x : y; }
HD double fmin(double x, double y) { return (x < y) | (y != y) ? x : y; }

// x - floor(x / y) y, of the sign of y, from the exact remainder of the sign of x.
HD double remainder(double x, double y) {
  const double rest = std::fmod(x, y);
  return rest != 0 && (y < 0) != (rest < 0) ? rest + y : rest;
}

// floor(x / y) from the exact remainder, as torch: the quotient alone may round up to the next integer.
HD double floor_divide(double x, double y) {
  if (y == 0) return x / y;
  const double rest = std::fmod(x, y);
  const double quotient = (x - rest) / y - double(rest != 0 && (y < 0) != (rest < 0));
  if (quotient == 0) return std::copysign(0.0, x / y);
  const double below = std::floor(quotient);
  return quotient - below > 0.5 ? below + 1 : below;
}

}  // namespace scalar

// Elementwise operations: X(name, kind, formula). x, y and z are the inputs in their order, out what the output holds.
#define IMPLICITDIFF_ELEMENTWISE(X)                                           \
  X(COPY, copy, x)                                                            \
  X(NEG, unary, -x)                                                           \
  X(ABS, unary, std::abs(x))                                                  \
  X(SQRT, unary, std::sqrt(x))                                                \
  X(RSQRT, unary, 1 / std::sqrt(x))                                           \
  X(RECIPROCAL, unary, 1 / x)                                                 \
  X(EXP, unary, elementary::exp(x))                                           \
  X(EXPM1, unary, elementary::expm1(x))                                       \
  X(LOG, unary, elementary::log(x))                                           \
  X(LOG1P, unary, elementary::log1p(x))                                       \
  X(LOG2, unary, std::log2(x))                                                \
  X(LOG10, unary, std::log10(x))                                              \
  X(SIN, unary, std::sin(x))                                                  \
  X(COS, unary, std::cos(x))                                                  \
  X(TAN, unary, std::tan(x))                                                  \
  X(ASIN, unary, std::asin(x))                                                \
  X(ACOS, unary, std::acos(x))                                                \
  X(ATAN, unary, std::atan(x))                                                \
  X(SINH, unary, std::sinh(x))                                                \
  X(COSH, unary, std::cosh(x))                                                \
  X(TANH, unary, elementary::tanh(x))                                         \
  X(ASINH, unary, std::asinh(x))                                              \
  X(ACOSH, unary, std::acosh(x))                                              \
  X(ATANH, unary, std::atanh(x))                                              \
  X(SIGMOID, unary, elementary::sigmoid(x))                                   \
  X(ERF, unary, std::erf(x))                                                  \
  X(ERFC, unary, std::erfc(x))                                                \
  X(LGAMMA, unary, std::lgamma(x))                                            \
  X(SIGN, unary, scalar::sign(x))                                             \
  X(FLOOR, unary, std::floor(x))                                              \
  X(CEIL, unary, std::ceil(x))                                                \
  X(ROUND, unary, std::nearbyint(x))                                          \
  X(TRUNC, unary, std::trunc(x))                                              \
  X(NOT, unary, double(x == 0))                                               \
  X(ISNAN, unary, double(x != x))                                             \
  X(ISINF, unary, double(std::abs(x) == elementary::infinity))                \
  X(ISFINITE, unary, double(std::abs(x) < elementary::infinity))              \
  X(TO_BOOL, unary, double(x != 0))                                           \
  X(ADD, binary, x + y)                                                       \
  X(SUB, binary, x - y)                                                       \
  X(MUL, binary, x* y)                                                        \
  X(DIV, binary, x / y)                                                       \
  X(POW, binary, std::pow(x, y))                                              \
  X(ATAN2, binary, std::atan2(x, y))                                          \
  X(HYPOT, binary, std::hypot(x, y))                                          \
  X(MAXIMUM, binary, scalar::maximum(x, y))                                   \
  X(MINIMUM, binary, scalar::minimum(x, y))                                   \
  X(FMAX, binary, scalar::fmax(x, y))                                         \
  X(FMIN, binary, scalar::fmin(x, y))                                         \
  X(REMAINDER, binary, scalar::remainder(x, y))                               \
  X(FMOD, binary, std::fmod(x, y))                                            \
  X(FLOOR_DIVIDE, binary, scalar::floor_divide(x, y))                         \
  X(COPYSIGN, binary, std::copysign(x, y))                                    \
  X(EQ, binary, double(x == y))                                               \
  X(NE, binary, double(x != y))                                               \
  X(LT, binary, double(x < y))                                                \
  X(LE, binary, double(x <= y))                                               \
  X(GT, binary, double(x > y))                                                \
  X(GE, binary, double(x >= y))                                               \
  X(AND, binary, (x != 0) & (y != 0) ? 1.0 : 0.0)                             \
  X(OR, binary, (x != 0) | (y != 0) ? 1.0 : 0.0)                              \
  X(XOR, binary, (x != 0) != (y != 0) ? 1.0 : 0.0)                            \
  X(WHERE, ternary, x != 0 ? y : z)                                           \
  X(COMMIT, commit, y != 0 ? x : out)

// Reductions by one accumulator: X(name, kind, its start, its value after x, the result). Those that do not compare
// take vectors, too.
#define IMPLICITDIFF_REDUCTIONS(X)                                                                  \
  X(SUM, reduction, 0, so_far + x, so_far)                                                          \
  X(PROD, reduction, 1, so_far* x, so_far)                                                          \
  X(AMAX, bound, -elementary::infinity, x != x ? x : (x > so_far ? x : so_far), so_far)             \
  X(AMIN, bound, elementary::infinity, x != x ? x : (x < so_far ? x : so_far), so_far)              \
  X(ANY, reduction, 0, x != 0 ? 1 : so_far, so_far)                                                 \
  X(ALL, reduction, 1, x != 0 ? so_far : 0, so_far)                                                 \
  X(NORM, reduction, 0, so_far + x * x, std::sqrt(so_far))

// The others: X(name, kind).
#define IMPLICITDIFF_CONTROLS(X) X(JUMP, jump) X(JUMP_UNLESS_ANY, jump)
#define IMPLICITDIFF_INDICES(X) X(ARGMAX, index) X(ARGMIN, index)
#define IMPLICITDIFF_MATRICES(X)                                                                      \
  X(MATMUL, matmul) X(LU, lu) X(LU_SOLVE, lu_solve) X(CHOLESKY, cholesky) X(SOLVE_LOWER, triangular)  \
  X(SOLVE_UPPER, triangular) X(SOLVE_UNIT_LOWER, triangular) X(SOLVE_UNIT_UPPER, triangular)
#define IMPLICITDIFF_ORTHOGONAL(X) X(QR, qr) X(APPLY_Q, apply_q) X(APPLY_Q_TRANSPOSED, apply_q) X(EIGH, eigh)
#define IMPLICITDIFF_ORDERS(X)                                                                        \
  X(SORT, sort) X(SORT_DESCENDING, sort) X(GATHER, gather) X(SCATTER, scatter) X(SCATTER_ADD, scatter) \
  X(CUMSUM, running) X(CUMPROD, running)
#define IMPLICITDIFF_SINGULAR(X) X(SVD, svd)

#define IMPLICITDIFF_OPERATIONS(X)                                                                    \
  IMPLICITDIFF_CONTROLS(X)                                                                            \
  IMPLICITDIFF_ELEMENTWISE(X) IMPLICITDIFF_REDUCTIONS(X) IMPLICITDIFF_INDICES(X) IMPLICITDIFF_MATRICES(X) \
  IMPLICITDIFF_ORTHOGONAL(X) IMPLICITDIFF_ORDERS(X) IMPLICITDIFF_SINGULAR(X)

enum class Op {
#define X(name, ...) name,
  IMPLICITDIFF_OPERATIONS(X)
#undef X
};

// clang-format off
enum class Kind {
  jump, copy, unary, binary, ternary, commit, reduction, bound, index, matmul, lu, lu_solve, cholesky, triangular,
  qr, apply_q, eigh, sort, gather, scatter, running, svd
};
// clang-format on

struct Operation {
  const char* name;
  Kind kind;
};

constexpr Operation operations[] = {
#define X(name, kind, ...) {#name, Kind::kind},
    IMPLICITDIFF_OPERATIONS(X)
#undef X
};

// Numbers of references and of the outputs, which come first among them.
struct References {
  int all, outputs;
};

constexpr References references(Kind kind) {
  switch (kind) {
    case Kind::jump: return {0, 0};
    case Kind::copy:
    case Kind::unary: return {2, 1};
    case Kind::binary: return {3, 1};
    case Kind::ternary: return {4, 1};
    case Kind::commit: return {3, 1};
    case Kind::reduction:
    case Kind::bound:
    case Kind::index: return {2, 1};
    case Kind::matmul: return {3, 1};
    case Kind::lu: return {4, 3};
    case Kind::lu_solve: return {4, 1};
    case Kind::cholesky: return {3, 2};
    case Kind::triangular: return {3, 1};
    case Kind::qr: return {3, 2};
    case Kind::apply_q: return {4, 1};
    case Kind::eigh: return {4, 3};
    case Kind::svd: return {4, 3};
    case Kind::sort: return {3, 2};
    case Kind::gather: return {3, 1};
    case Kind::scatter: return {3, 1};
    case Kind::running: return {2, 1};
  }
  return {0, 0};
}

// Whether inputs may be shared arrays.
constexpr bool shares(Kind kind) { return kind == Kind::copy || kind == Kind::binary || kind == Kind::matmul; }

// Whether the last dimension is none of the result.
constexpr bool reduces(Kind kind) {
  return kind == Kind::reduction || kind == Kind::bound || kind == Kind::index || kind == Kind::matmul ||
         kind == Kind::apply_q || kind == Kind::gather;
}

namespace formula {

#define X(op, kind, value)                                                                        \
  struct op {                                                                                     \
    static constexpr int inputs = references(Kind::kind).all - references(Kind::kind).outputs;    \
    static constexpr bool shares = implicitdiff::shares(Kind::kind);                              \
    static HD double of(double x, double y, double z, double out) {                               \
      (void)x, (void)y, (void)z, (void)out;                                                       \
      return value;                                                                               \
    }                                                                                             \
  };
IMPLICITDIFF_ELEMENTWISE(X)
#undef X

// Operations on numbers of single precision, computed in double and rounded. For + - * / and the square root, that
// gives the correctly rounded result of single precision.
template <class F> struct Rounded {
  static constexpr int inputs = F::inputs;
  static constexpr bool shares = F::shares;
  static HD double of(double x, double y, double z, double out) { return double(float(F::of(x, y, z, out))); }
};

// V is not passed or returned by value, which a function that is not inlined could not do for all instruction sets.
#define X(op, kind, begin, next, end)                                          \
  struct op {                                                                  \
    static constexpr bool compares = Kind::kind == Kind::bound || Op::op == Op::ANY || Op::op == Op::ALL; \
    static HD double start() { return begin; }                                 \
    template <class V> static HD void step(V& so_far, const V& x) { so_far = next; } \
    template <class V> static HD void join(V& so_far, const V& other) {        \
      if constexpr (Op::op == Op::NORM) {                                      \
        so_far += other;                                                       \
      } else {                                                                 \
        step(so_far, other);                                                   \
      }                                                                        \
    }                                                                          \
    static HD double result(double so_far) { return end; }                     \
  };
IMPLICITDIFF_REDUCTIONS(X)
#undef X

struct ARGMAX {
  static HD bool better(double x, double best) { return x > best; }
};
struct ARGMIN {
  static HD bool better(double x, double best) { return x < best; }
};

}  // namespace formula
}  // namespace implicitdiff
