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
// x + to_integer has no bits behind the point, and holds x, rounded to an integer, in its lowest bits.
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

HD double nearest(double x) { return (x + to_integer) - to_integer; }

// 2^k of an integer -1022 <= k <= 1023: its exponent field is k + 1023.
HD double power_of_two(double k) { return from_bits((bits_of(k + to_integer) + 1023) << 52); }

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, its Taylor polynomial. The next term is below 2^-57 of e^r.
HD double exp_tail(double r) {
  const double r2 = r * r, r4 = r2 * r2;
  const double low = (1.0 / 2 + r * (1.0 / 6)) + r2 * (1.0 / 24 + r * (1.0 / 120));
  const double middle = (1.0 / 720 + r * (1.0 / 5040)) + r2 * (1.0 / 40320 + r * (1.0 / 362880));
  const double high = (1.0 / 3628800 + r * (1.0 / 39916800)) + r2 * (1.0 / 479001600 + r * (1.0 / 6227020800));
  return low + r4 * (middle + r4 * high);
}

// x = k ln(2) + r with |r| <= ln(2) / 2, up to the rounding c of r, and q = e^(r + c) - 1.
struct Reduced {
  double k, q;

  HD explicit Reduced(double x) {
    k = nearest(x * per_ln2);
    const double high = x - k * ln2_high, low = k * ln2_low, r = high - low, c = (high - r) - low;
    q = r + (r * r * exp_tail(r) + c);
  }
};

HD double exp(double x) {
  // Beyond these bounds the result is the same. nan passes.
  const Reduced y(x > 710 ? 710 : x < -746 ? -746 : x);
  // In two factors, since 2^k alone may be out of range. Only the second product rounds.
  const double half = nearest(0.5 * y.k);
  return (1 + y.q) * power_of_two(half) * power_of_two(y.k - half);
}

HD double expm1(double x) {
  const Reduced y(x > 710 ? 710 : x < -50 ? -50 : x);
  const double half = power_of_two(y.k - 1);  // 2^k may overflow where the result does not
  const double result = 2 * (half * y.q + (half - 0.5));
  return std::abs(x) < 0x1p-54 ? x : result;
}

// With e = exp(-2 |x|): (1 - e) / (1 + e) for small x, 1 - 2 e / (1 + e) beyond, which rounds less. The former is
// corrected for the roundings of its numerator and of its denominator.
HD double tanh(double x) {
  const double twice = -2 * std::abs(x);
  const Reduced y(twice < -50 ? -50 : twice);
  const double scale = power_of_two(y.k), part = scale * y.q, whole = scale - 1;
  const double less = part + whole, sum = 2 + less;                          // e - 1, e + 1
  const double lost = part - (less - whole), lost_too = less - (sum - 2) + lost;
  const bool small = twice > -1.1;
  const double ratio = (small ? -less : 2 * (part + scale)) / sum;
  const double correction = (lost + ratio * lost_too) * 0.6;                 // 1 / sum is between 0.5 and 0.75
  return std::copysign(small ? ratio - correction : 1 - ratio, x);
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

// log(1 + f) + k ln(2) + c, c being small. With s = f / (2 + f), log(1 + f) = 2 atanh(s) = f - (f^2 / 2 - s (f^2 / 2 + R)).
HD double log_of(double f, double k, double c) {
  const double s = f / (2 + f), z = s * s, w = z * z, half = 0.5 * f * f;
  const double odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double even = z * (6.666666666666735130e-01 +
                           w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
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
