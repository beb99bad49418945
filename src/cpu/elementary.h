// Elementary functions of a double without branches and calls, so that a loop over them is vectorized.
//
// Errors are below 2 units in the last place, and zeros, subnormal numbers, infinities and nan give what they give in
// the standard library. Constants of the reductions and of the logarithm are those of fdlibm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../formulas/common.h"

namespace implicitdiff {
namespace elementary {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double ln2_high = 6.93147180369123816490e-01;  // 33 bits: a product with an exponent is exact
constexpr double ln2_low = 1.90821492927058770002e-10;
constexpr double per_ln2 = 1.44269504088896338700;
// x + to_integer has no bits behind the point: its lowest bits are x, rounded to an integer.
constexpr double to_integer = 0x1.8p52;

HD std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

HD double from_bits(std::uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, with the first coefficients of Taylor, and others that make the largest
// error, relative to e^r - 1, the least: 2^-60.782.
HD double exp_tail(double r) {
  const double z = r * r;
  double even = 2.755741695103314e-07 + z * 2.086747273526067e-09;
  double odd = 2.7557259968579194e-06 + z * 2.510392851672699e-08;
  even = 2.480158717395379e-05 + z * even;
  odd = 0.00019841269869063377 + z * odd;
  even = 0.001388888888894803 + z * even;
  odd = 0.008333333333329132 + z * odd;
  even = 0.04166666666666658 + z * even;
  return (0.5 + z * even) + r * (1.0 / 6 + z * odd);
}

// x = k ln(2) + r with |r| <= ln(2) / 2, up to the rounding c of r; q = e^(r + c) - 1; the lowest bits are k.
struct Reduced {
  std::uint64_t bits;
  double q;

  HD explicit Reduced(double x) {
    const double shifted = x * per_ln2 + to_integer, k = shifted - to_integer;
    const double high = x - k * ln2_high, low = k * ln2_low, r = high - low, c = (high - r) - low;
    q = r + (r * r * exp_tail(r) + c);
    bits = bits_of(shifted);
  }

  // 2^(k + i) if it is a normal number: the field of its exponent is k + i + 1023.
  HD double scale(int i) const { return from_bits((bits + std::uint64_t(1023 + i)) << 52); }
};

HD double exp(double x) {
  // Beyond these bounds the result is the same. nan passes.
  double bounded = x > 710 ? 710 : x;
  bounded = bounded < -746 ? -746 : bounded;
  const Reduced y(bounded);
  // 2^k alone may be out of range. The fields of two exponents add up to k + 2046; only the second product rounds.
  const std::uint64_t both = y.bits + 2046, half = both >> 1;
  return (1 + y.q) * from_bits(half << 52) * from_bits((both - half) << 52);
}

HD double expm1(double x) {
  double bounded = x > 710 ? 710 : x;
  bounded = bounded < -50 ? -50 : bounded;
  const Reduced y(bounded);
  const double half = y.scale(-1);  // 2^k may overflow where the result does not
  const double result = 2 * (half * y.q + (half - 0.5));
  return std::abs(x) < 0x1p-54 ? x : result;
}

// (1 - e) / (1 + e) with e = exp(-2 |x|) = s (1 + q), corrected for the roundings of its numerator and of its
// denominator: (n + n') / (d + d') = n / d + (n' - d' n / d) / d nearly, with 0.65 for 1 / d, which is 0.5 to 1.
HD double tanh(double x) {
  const double twice = -2 * std::abs(x);
  const Reduced y(twice < -50 ? -50 : twice);
  const double s = y.scale(0), part = s * y.q, less = 1 - s, more = 1 + s;
  const double n = less - part, d = more + part, ratio = n / d;
  const double lost_n = (less - n) - part, lost_d = part - (d - more);
  return std::copysign(ratio + 0.65 * (lost_n - ratio * lost_d), x);
}

// exp(-|x|) does not overflow.
HD double sigmoid(double x) {
  const double e = exp(-std::abs(x)), sum = 1 + e, lost = e - (sum - 1);
  const double result = (x < 0 ? e : 1) / sum;
  return result - result * lost;
}

// x = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), for a normal x > 0.
struct Split {
  double k, f;

  HD explicit Split(double x) {
    constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000;
    constexpr std::uint64_t fraction = 0x000fffffffffffff;
    const std::uint64_t bits = bits_of(x) + (one - root_half);
    // The exponent field, written into the fraction of 2^52, as a double.
    k = from_bits((bits >> 52) | bits_of(0x1p52)) - (0x1p52 + 1023);
    f = from_bits((bits & fraction) + root_half) - 1;
  }
};

// log(1 + f) + k ln(2) + c, c being small. With s = f / (2 + f),
// log(1 + f) = 2 atanh(s) = f - (f^2 / 2 - s (f^2 / 2 + R)).
HD double log_of(double f, double k, double c) {
  const double s = f / (2 + f), z = s * s, w = z * z, half = 0.5 * f * f;
  const double odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double high = 1.818357216161805012e-01 + w * 1.479819860511658591e-01;
  const double even = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * high));
  return k * ln2_high - ((half - (s * (half + (odd + even)) + (k * ln2_low + c))) - f);
}

HD double log(double x) {
  const bool tiny = x < 0x1p-1022;
  const Split y(tiny ? x * 0x1p54 : x);
  const double result = log_of(y.f, tiny ? y.k - 54 : y.k, 0);
  return x > 0 ? (x < infinity ? result : x) : x == 0 ? -infinity : nan;
}

HD double log1p(double x) {
  const double u = 1 + x;
  const Split y(u);
  const bool near = y.k == 0;
  // What 1 + x lost in rounding, relative to u. Where k is 0, f is x itself.
  const double lost = (x > 1 ? 1 - (u - x) : x - (u - 1)) / u;
  const double result = log_of(near ? x : y.f, y.k, near ? 0 : lost);
  const double finite = std::abs(x) < 0x1p-54 ? x : result;
  return u > 0 ? (u < infinity ? finite : x) : u == 0 ? -infinity : nan;
}

}  // namespace elementary
}  // namespace implicitdiff
