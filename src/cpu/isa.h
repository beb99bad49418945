// Loops compiled once per instruction set, the best of which is taken when a call begins.
//
// The numbers are the same on all of them: every operation is IEEE's, and multiplications and additions stay apart
// (-ffp-contract=off).
#pragma once

#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
#define IMPLICITDIFF_X86 1
#endif

// An output may be one of the inputs, element for element, which no vectorizer may take for an obstacle.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define INDEPENDENT __pragma(loop(ivdep))
#else
#define INDEPENDENT
#endif

namespace implicitdiff {

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

// Body::run is inlined into each of these, and compiled for its target there.
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

// Body::run for this machine.
template <class Body> auto compiled() { return compiled<Body>(static_cast<decltype(&Body::run)>(nullptr)); }

}  // namespace implicitdiff
