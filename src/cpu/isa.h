// Loops, compiled once for each instruction set. A call takes the widest that the machine has.
//
// The results are the same bits on each: all operations are those of IEEE 754, and no multiplication is fused with an
// addition (-ffp-contract=off).
#pragma once

#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
#define IMPLICITDIFF_X86 1
#endif

// Declares that the iterations of a loop are independent. An output may share the memory of an input, element for
// element: __restrict__ would be wrong, and without a declaration the vectorizer gives up or tests for overlap.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define INDEPENDENT __pragma(loop(ivdep))
#else
#define INDEPENDENT
#endif

// The same of a loop over the lanes of a block, inside of another loop. GCC would unroll it before it vectorizes, and
// then test the operands of the outer loop for overlap.
#if defined(__GNUC__) && !defined(__clang__)
#define INDEPENDENT_LANES _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#else
#define INDEPENDENT_LANES INDEPENDENT
#endif

namespace implicitdiff {

// Doubles of a vector register of the baseline.
#if defined(__GNUC__) || defined(__clang__)
constexpr int baseline_doubles = 2;
#else
constexpr int baseline_doubles = 1;
#endif

enum class Isa { baseline, avx2, avx512 };

inline Isa isa() {
#ifdef IMPLICITDIFF_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? Isa::avx512 : __builtin_cpu_supports("avx2") ? Isa::avx2 : Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

// Body::run is inlined into each of these (HD in formulas/common.h) and so compiled for its target. A function that is
// not inlined would keep the baseline.
template <class Body, class... A> void on_baseline(A... a) { Body::run(a...); }
#ifdef IMPLICITDIFF_X86
template <class Body, class... A> __attribute__((target("avx2"))) void on_avx2(A... a) { Body::run(a...); }
template <class Body, class... A>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void on_avx512(A... a) {
  Body::run(a...);
}
#endif

template <class... A> using Loop = void (*)(A...);

template <class Body, class... A> Loop<A...> compiled(Loop<A...>) {
#ifdef IMPLICITDIFF_X86
  if (isa() == Isa::avx512) return on_avx512<Body, A...>;
  if (isa() == Isa::avx2) return on_avx2<Body, A...>;
#endif
  return on_baseline<Body, A...>;
}

// Variant of Body::run for this machine.
template <class Body> auto compiled() { return compiled<Body>(static_cast<decltype(&Body::run)>(nullptr)); }

// The same of a Body that depends on the number of doubles of a vector register.
template <template <int> class Body, class... A> Loop<A...> compiled_by_register(Loop<A...>) {
#ifdef IMPLICITDIFF_X86
  if (isa() == Isa::avx512) return on_avx512<Body<8>, A...>;
  if (isa() == Isa::avx2) return on_avx2<Body<4>, A...>;
#endif
  return on_baseline<Body<baseline_doubles>, A...>;
}

template <template <int> class Body> auto compiled_by_register() {
  return compiled_by_register<Body>(static_cast<decltype(&Body<baseline_doubles>::run)>(nullptr));
}

}  // namespace implicitdiff
