#include "machine.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace implicitdiff {
namespace {

constexpr std::size_t cache_line = 64;

struct Free {
  void operator()(double* memory) const { ::operator delete[](memory, std::align_val_t(cache_line)); }
};
using Doubles = std::unique_ptr<double[], Free>;

Doubles allocate(std::int64_t n) {
  return Doubles(static_cast<double*>(::operator new[](std::size_t(n) * sizeof(double), std::align_val_t(cache_line))));
}

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

// Calls f with a null pointer to the type of elements of a dtype.
template <class F> void with_type(std::int64_t dtype, F&& f) {
  switch (dtype) {
    case 0: return f(static_cast<double*>(nullptr));
    case 1: return f(static_cast<float*>(nullptr));
    case 2: return f(static_cast<std::int64_t*>(nullptr));
    case 3: return f(static_cast<std::uint8_t*>(nullptr));
    case 4: return f(static_cast<std::int32_t*>(nullptr));
  }
}
constexpr std::int64_t dtypes = 5;

// A double as an element of a tensor. C++ does not define what is beyond the integers of a type: it becomes 0, as nan.
template <class T> T converted(double x) {
  if constexpr (std::is_integral_v<T>) {
    constexpr double least = double(std::numeric_limits<T>::min());
    constexpr double beyond = 2 * double(std::numeric_limits<T>::max() / 2 + 1);
    return x >= least && x < beyond ? T(x) : T(0);
  } else {
    return T(x);
  }
}

// The part of threads that takes elements of a dimension: whole groups of them, so that vectors are filled.
struct Part {
  std::int64_t begin, end;

  Part(std::int64_t size, int i, int n) {
    const std::int64_t each = ((size + n - 1) / n + 7) / 8 * 8;
    begin = std::min(size, each * i);
    end = std::min(size, begin + each);
  }
};

// A large product, split by the longer side of its result.
void run_split(const Instruction& whole, double* const* bases, int threads) {
#ifdef _OPENMP
  const Dimension* const sides = whole.dimensions + whole.outer;
  const int side = whole.outer + (sides[1].size > sides[0].size ? 1 : 0);
#pragma omp parallel num_threads(threads)
  {
    const Part part(whole.dimensions[side].size, omp_get_thread_num(), omp_get_num_threads());
    Instruction q = whole;
    q.dimensions[side].size = part.end - part.begin;
    for (int i = 0; i < 3; ++i) q.at[i].offset += part.begin * q.dimensions[side].step[i];
    if (part.begin < part.end) q.kernel(&q, bases);
  }
#else
  (void)threads;
  whole.kernel(&whole, bases);
#endif
}

}  // namespace

struct Machine::Call {
  const std::vector<std::uintptr_t>&carries, &inputs, &shared;
  std::int64_t lanes, at_most;
  bool starts, judges;

  std::vector<double*> bases(double* arena) const {
    std::vector<double*> result = {arena};
    for (std::uintptr_t address : shared) result.push_back(reinterpret_cast<double*>(address));
    return result;
  }
};

Machine::Machine(int width, const std::vector<Integers>& code, const Sections& sections, std::int64_t arena,
                 const std::vector<std::array<std::int64_t, 3>>& carries,
                 const std::vector<std::array<std::int64_t, 3>>& inputs, const Integers& shared, std::int64_t running,
                 std::int64_t paused)
    : memory{width, arena, shared}, running(running), paused(paused) {
  if (width != 1 && width != block_lanes) refuse("width is " + std::to_string(width) + ", not 1 or 8");
  if (arena < 0 || arena > most_elements) refuse("an arena of " + std::to_string(arena) + " elements");
  for (std::int64_t n : shared) {
    if (n < 0 || n > most_elements) refuse("a shared array of " + std::to_string(n) + " elements");
  }
  bounds.front() = 0;
  std::copy(sections.begin(), sections.end(), bounds.begin() + 1);
  bounds.back() = std::int64_t(code.size());
  if (!std::is_sorted(bounds.begin(), bounds.end())) {
    std::string places;
    for (std::int64_t at : sections) places += std::to_string(at) + ", ";
    refuse("sections begin at " + places + "of " + std::to_string(code.size()) + " instructions");
  }
  for (const auto& [offset, name] : {std::pair(running, "running"), std::pair(paused, "paused")}) {
    if (offset < 0 || offset >= arena) refuse(std::string(name) + " is out of the arena");
  }
  this->carries = tensors(carries, "carry");
  this->inputs = tensors(inputs, "input");
  read(code);
}

std::vector<Machine::Tensor> Machine::tensors(const std::vector<std::array<std::int64_t, 3>>& given,
                                              const char* what) const {
  std::vector<Tensor> result;
  for (const auto& [offset, numel, dtype] : given) {
    const std::string name = what + std::string(" ") + std::to_string(result.size());
    if (offset < 0 || numel < 0 || offset > memory.arena || numel > memory.arena - offset) {
      refuse(name + " is out of the arena");
    }
    if (dtype < 0 || dtype >= dtypes) refuse(name + " has no dtype " + std::to_string(dtype));
    result.push_back({offset, numel, dtype});
  }
  return result;
}

void Machine::read(const std::vector<Integers>& code) {
  Integers starts;  // of each instruction that is given, among those that run
  for (std::size_t at = 0; at < code.size(); ++at) {
    starts.push_back(std::int64_t(instructions.size()));
    const Op op = operation(code[at], at);
    if (operations[int(op)].kind == Kind::jump) {
      instructions.push_back(jump(code[at], at, op));
    } else {
      const std::vector<Instruction> several = implicitdiff::instructions(code[at], at, memory);
      instructions.insert(instructions.end(), several.begin(), several.end());
    }
  }
  starts.push_back(std::int64_t(instructions.size()));
  for (Instruction& q : instructions) {
    if (q.kernel == nullptr) q.target = starts[q.target];
  }
  for (std::int64_t& bound : bounds) bound = starts[bound];
}

Instruction Machine::jump(const Integers& given, std::size_t at, Op op) const {
  const std::string name = operations[int(op)].name;
  const auto wrong = [&](const std::string& problem) { implicitdiff::refuse(at, name, problem); };
  const std::size_t length = op == Op::JUMP ? 2 : 4;
  if (given.size() != length) {
    wrong("it has " + std::to_string(given.size()) + " numbers, not " + std::to_string(length));
  }
  const auto next = std::upper_bound(bounds.begin(), bounds.end() - 1, std::int64_t(at));
  const std::int64_t begin = *(next - 1), end = *next;
  Instruction q{};
  q.target = given[1];
  if (q.target < begin || q.target > end) {
    wrong("it leaves its section, from " + std::to_string(begin) + " to " + std::to_string(end) + ", for " +
          std::to_string(q.target));
  }
  q.n = op == Op::JUMP ? -1 : given[3];
  if (op == Op::JUMP) return q;
  q.at[0].offset = given[2];
  if (given[2] < 0 || given[3] < 0 || given[2] > memory.arena || given[3] > memory.arena - given[2]) {
    wrong("it reads out of the arena");
  }
  return q;
}

bool Machine::any(const double* arena, std::int64_t offset, std::int64_t count) const {
  const double* const x = arena + offset * memory.width;
  return std::any_of(x, x + count * memory.width, [](double each) { return each != 0; });
}

void Machine::execute(Section section, double* const* bases, int threads) const {
  const Instruction* const all = instructions.data();
  const std::int64_t end = bounds[int(section) + 1];
  for (std::int64_t i = bounds[int(section)]; i < end;) {
    const Instruction& q = all[i++];
    if (q.kernel == nullptr) {
      if (q.n < 0 || !any(bases[0], q.at[0].offset, q.n)) i = q.target;
    } else if (q.large && threads > 1) {
      run_split(q, bases, threads);
    } else {
      q.kernel(&q, bases);
    }
  }
}

std::int64_t Machine::run(const std::vector<std::uintptr_t>& carries, const std::vector<std::uintptr_t>& inputs,
                          const std::vector<std::uintptr_t>& shared, std::int64_t lanes, std::int64_t at_most,
                          int threads, bool starts, bool judges) const {
  const auto check = [lanes](const char* what, const std::vector<std::uintptr_t>& addresses, const auto& expected,
                             auto size) {
    if (addresses.size() != expected.size()) {
      refuse(std::to_string(addresses.size()) + " addresses of " + what + ", not " + std::to_string(expected.size()));
    }
    for (std::size_t i = 0; i < addresses.size() && lanes > 0; ++i) {
      if (addresses[i] == 0 && size(expected[i]) > 0) refuse("a null address among those of " + std::string(what));
    }
  };
  const auto numel = [](const Tensor& tensor) { return tensor.numel; };
  check("carries", carries, this->carries, numel);
  check("inputs", inputs, this->inputs, numel);
  check("shared arrays", shared, memory.shared, [](std::int64_t n) { return n; });
  if (lanes < 0) refuse("lanes is " + std::to_string(lanes) + ", and so negative");
  if (at_most < 0) refuse("at_most is " + std::to_string(at_most) + ", and so negative");
  const std::int64_t blocks = lanes / memory.width + (lanes % memory.width != 0);
  const Call call{carries, inputs, shared, lanes, at_most, starts, judges};
  return blocks == 0 ? 0 : run_blocks(call, blocks, std::max(threads, 1));
}

std::int64_t Machine::run_blocks(const Call& call, std::int64_t blocks, int threads) const {
  const std::int64_t size = memory.arena * memory.width;
  const auto prepare = [&](double* arena) {
    std::fill_n(arena, size, 0.0);
    execute(Section::thread, call.bases(arena).data(), 1);
  };
#ifdef _OPENMP
  const int parts = int(std::min<std::int64_t>(threads, blocks));
  if (parts > 1) {
    std::vector<Doubles> arenas;
    for (int i = 0; i < parts; ++i) arenas.push_back(allocate(size));
    std::atomic<std::int64_t> next(0), total(0);
#pragma omp parallel num_threads(parts)
    {
      double* const arena = arenas[omp_get_thread_num()].get();
      const std::vector<double*> bases = call.bases(arena);
      prepare(arena);
      std::int64_t count = 0;
      for (std::int64_t block; (block = next++) < blocks;) {
        count += run_block(call, block * memory.width, bases.data(), 1);
      }
      total += count;
    }
    return total;
  }
#endif
  const Doubles arena = allocate(size);
  const std::vector<double*> bases = call.bases(arena.get());
  prepare(arena.get());
  std::int64_t total = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    total += run_block(call, block * memory.width, bases.data(), blocks == 1 ? threads : 1);
  }
  return total;
}

std::int64_t Machine::run_block(const Call& call, std::int64_t first, double* const* bases, int threads) const {
  const std::int64_t width = memory.width, last = call.lanes - 1;
  // For each lane of each tensor. The lanes of an incomplete block repeat its last.
  const auto gather = [&](const Tensor& tensor, std::uintptr_t address) {
    with_type(tensor.dtype, [&](auto* type) {
      const auto* const from = reinterpret_cast<decltype(type)>(address);
      double* const to = bases[0] + tensor.offset * width;
      for (std::int64_t l = 0; l < width; ++l) {
        const auto* const row = from + std::min(first + l, last) * tensor.numel;
        for (std::int64_t e = 0; e < tensor.numel; ++e) to[e * width + l] = double(row[e]);
      }
    });
  };
  const auto scatter = [&](const Tensor& tensor, std::uintptr_t address) {
    with_type(tensor.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const double* const from = bases[0] + tensor.offset * width;
      for (std::int64_t l = 0; l < width && first + l <= last; ++l) {
        T* const row = reinterpret_cast<T*>(address) + (first + l) * tensor.numel;
        for (std::int64_t e = 0; e < tensor.numel; ++e) row[e] = converted<T>(from[e * width + l]);
      }
    });
  };
  for (std::size_t i = 0; i < inputs.size(); ++i) gather(inputs[i], call.inputs[i]);
  for (std::size_t i = 0; i < carries.size(); ++i) gather(carries[i], call.carries[i]);
  execute(Section::block, bases, threads);
  if (call.starts) execute(Section::start, bases, threads);
  execute(Section::head, bases, threads);
  std::int64_t count = 0;
  while (iterate(call, count, bases, threads) && call.judges) {
    execute(Section::judge, bases, threads);
    execute(Section::head, bases, threads);
    if (!any(bases[0], running, 1)) break;
  }
  for (std::size_t i = 0; i < carries.size(); ++i) scatter(carries[i], call.carries[i]);
  return count;
}

// Iterates a block; returns whether all its lanes have stopped.
bool Machine::iterate(const Call& call, std::int64_t& count, double* const* bases, int threads) const {
  while (any(bases[0], running, 1)) {
    if (count == call.at_most) return false;
    execute(Section::step, bases, threads);
    ++count;
    if (any(bases[0], paused, 1)) return false;
  }
  return true;
}

std::vector<std::string> operation_names() {
  std::vector<std::string> names;
  for (const Operation& each : operations) names.emplace_back(each.name);
  return names;
}

}  // namespace implicitdiff
