#include "steps.h"

#include "formulas/all.h"
#include "loop.h"

namespace implicitdiff {
namespace {

template <template <class, class> class K, class R> void run_as(const Call& call, int threads) {
  with_formula<R>(call.formula, [&](auto tag) {
    using Loop = K<typename decltype(tag)::type, R>;
    check(call, Loop::F::numbers, Loop::L::operands);
    Driver<Loop>(call, threads).run();
  });
}

template <template <class, class> class K> void run(const Call& call, int threads) {
  if (call.dtype == Dtype::float64) return run_as<K, double>(call, threads);
  run_as<K, float>(call, threads);  // half precision too: the driver widens and narrows
}

}  // namespace

void step(const Call& call, int threads) { run<Step>(call, threads); }
void pull(const Call& call, int threads) { run<Pull>(call, threads); }

const char* simd() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[int(isa())];
}

}  // namespace implicitdiff
