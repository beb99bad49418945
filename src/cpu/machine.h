// The machine: a program of instructions on doubles, run until it ends for many independent problems, the lanes.
//
// Lanes run in blocks of 1 or 8, each block to its own end. Values lie in the arena of a block, lanes innermost.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace implicitdiff {

// The sections of a program: what runs once for each thread, once for each block, as the first state of a search, before
// the first iteration and after a judgement, at each iteration, and as the judgement of lanes that have stopped.
enum class Section { thread, block, start, head, step, judge, end };

// Where the sections after the first begin.
using Sections = std::array<std::int64_t, int(Section::end) - 1>;

class Machine {
 public:
  // Throws std::invalid_argument unless every instruction stays inside of the arena and of the shared arrays.
  //
  // code: [op, round, d, sizes, r, (space, offset, d strides) of r references], [JUMP, target] or
  // [JUMP_UNLESS_ANY, target, offset, count]. sections: where the sections of the code begin, see Section; the first
  // begins at 0. carries, inputs: (offset, number of elements, dtype) of each tensor.
  Machine(int width, const std::vector<Integers>& code, const Sections& sections, std::int64_t arena,
          const std::vector<std::array<std::int64_t, 3>>& carries,
          const std::vector<std::array<std::int64_t, 3>>& inputs, const Integers& shared, std::int64_t running,
          std::int64_t paused);

  // Iterates each block while `running` is not 0 in a lane, until `paused` is not 0 in a lane, at most so often. With
  // `starts` the first state is computed before. With `judges` a block whose lanes have all stopped is judged, and goes
  // on as long as the judgement lets a lane run. Addresses are of contiguous tensors, (lanes, number of elements) of
  // carries and inputs. Returns the sum of the iterations of all blocks.
  std::int64_t run(const std::vector<std::uintptr_t>& carries, const std::vector<std::uintptr_t>& inputs,
                   const std::vector<std::uintptr_t>& shared, std::int64_t lanes, std::int64_t at_most, int threads,
                   bool starts, bool judges) const;

 private:
  struct Tensor {
    std::int64_t offset, numel, dtype;
  };
  struct Call;

  std::vector<Tensor> tensors(const std::vector<std::array<std::int64_t, 3>>& given, const char* what) const;
  void read(const std::vector<Integers>& code);
  Instruction jump(const Integers& given, std::size_t at, Op op) const;
  std::int64_t run_blocks(const Call& call, std::int64_t blocks, int threads) const;
  std::int64_t run_block(const Call& call, std::int64_t first, double* const* bases, int threads) const;
  void execute(Section section, double* const* bases, int threads) const;
  bool iterate(const Call& call, std::int64_t& count, double* const* bases, int threads) const;
  bool any(const double* arena, std::int64_t offset, std::int64_t count) const;

  Memory memory;
  std::array<std::int64_t, int(Section::end) + 1> bounds;  // of the sections
  std::vector<Tensor> carries, inputs;
  std::int64_t running, paused;
  std::vector<Instruction> instructions;
};

// Names of the operations, in the order of their numbers.
std::vector<std::string> operation_names();

}  // namespace implicitdiff
