#include "steps.h"

#include "../formulas/all.h"
#include "loop.h"

namespace implicitdiff {
namespace {

void require(bool held, const std::string& message) {
  if (!held) throw std::invalid_argument(message);
}

template <class Loop> void check(const Call& call) {
  const std::string name = call.name + ": ";
  const std::size_t leaves = call.sizes.size(), operands = Loop::reads + Loop::writes;
  const auto negative = [](std::int64_t x) { return x < 0; };
  const auto natural = [&](const std::vector<std::int64_t>& xs) {
    return std::none_of(xs.begin(), xs.end(), negative);
  };
  require(call.numbers.size() == Loop::F::numbers, name + std::to_string(Loop::F::numbers) + " numbers, not " +
                                                       std::to_string(call.numbers.size()));
  require(call.which.size() == leaves, name + "which and sizes differ in length");
  require(call.addresses.size() == operands * leaves,
          name + std::to_string(operands) + " operands of " + std::to_string(leaves) + " leaves, but " +
              std::to_string(call.addresses.size()) + " addresses");
  require(natural(call.sizes) && natural(call.which), name + "a size or an index is negative");
  require(call.count != nullptr || leaves == 0, name + "no counts");
}

template <template <class, class> class K, class R> void run_as(const Call& call) {
  with_formula<R>(call.name, [&](auto tag) {
    using Loop = K<typename decltype(tag)::type, R>;
    check<Loop>(call);
    Driver<Loop>(call).run();
  });
}

template <template <class, class> class K> void run(const Call& call) {
  if (call.dtype == "float64") return run_as<K, double>(call);
  require(call.dtype == "float32" || call.dtype == "bfloat16" || call.dtype == "float16",
          "unknown dtype '" + call.dtype + "'");
  run_as<K, float>(call);
}

}  // namespace

void step(const Call& call) { run<Step>(call); }
void pull(const Call& call) { run<Pull>(call); }

const char* simd() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[int(isa())];
}

}  // namespace implicitdiff
