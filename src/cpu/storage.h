// Half-precision storage, as bits. Conversions select and do not branch, so that their loops vectorize. Rounding is to
// nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "formulas/common.h"
#include "isa.h"

namespace implicitdiff {

template <class To, class From> HD To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Bfloat16 {
  static HD float widen(std::uint16_t h) { return bits<float>(std::uint32_t(h) << 16); }

  static HD std::uint16_t narrow(float x) {
    // The upper half of a float32. 0x7fff rounds to nearest, the last bit that is kept rounds a tie to even.
    const std::uint32_t b = bits<std::uint32_t>(x);
    const std::uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return std::uint16_t(x != x ? 0x7fc0 : rounded);
  }
};

// Signed integers: SSE2 has no comparison of unsigned ones.
struct Float16 {
  static HD float widen(std::uint16_t h) {
    // 0.5 has the unit 2^-24 in the last place, the least float16: a subnormal b is 0.5 + b * 2^-24, less 0.5. A normal
    // one moves its exponent from bias 15 to bias 127, and infinity or nan from 31 to 255.
    constexpr std::int32_t half = 0x3f000000;
    const std::int32_t b = h & 0x7fff;
    const float subnormal = bits<float>(half + b) - 0.5f;
    const std::int32_t normal = (b << 13) + (b < 0x7c00 ? 112 << 23 : 224 << 23);
    const std::int32_t size = b < 0x400 ? bits<std::int32_t>(subnormal) : normal;
    return bits<float>(std::uint32_t(size) | std::uint32_t(h & 0x8000) << 16);
  }

  static HD std::uint16_t narrow(float x) {
    // The inverse of widen. The addition of 0.5 rounds a subnormal; below 2^-14 (113 << 23) a result is one, from 2^16
    // (143 << 23) on it is infinite.
    constexpr std::int32_t half = 0x3f000000;
    const std::uint32_t all = bits<std::uint32_t>(x);
    const std::int32_t b = std::int32_t(all & 0x7fffffff);
    const std::int32_t subnormal = bits<std::int32_t>(bits<float>(b) + 0.5f) - half;
    const std::int32_t normal = (b - (112 << 23) + 0xfff + (b >> 13 & 1)) >> 13;
    const std::int32_t special = b > 0x7f800000 ? 0x7e00 : 0x7c00;
    const std::int32_t finite = b < 113 << 23 ? subnormal : normal;
    return std::uint16_t((b < 143 << 23 ? finite : special) | std::int32_t(all >> 16 & 0x8000));
  }
};

template <class T, class R> struct Widen {
  static HD void run(const std::uint16_t* from, R* to, int n) {
    INDEPENDENT
    for (int i = 0; i < n; ++i) to[i] = R(T::widen(from[i]));
  }
};

template <class T, class R> struct Narrow {
  static HD void run(const R* from, std::uint16_t* to, int n) {
    INDEPENDENT
    for (int i = 0; i < n; ++i) to[i] = T::narrow(float(from[i]));
  }
};

}  // namespace implicitdiff
