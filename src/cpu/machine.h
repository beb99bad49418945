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

class Machine {
 public:
  // Throws std::invalid_argument unless every instruction stays inside of the arena and of the shared arrays.
  //
  // code: [op, round, d, sizes, r, (space, offset, d strides) of r references], [JUMP, target] or
  // [JUMP_UNLESS_ANY, target, offset, count]. Up to entry it runs once for each thread, up to step once for each block,
  // and the rest at each iteration. carries, inputs: (offset, number of elements, dtype) of each tensor.
  Machine(int width, const std::vector<Integers>& code, std::int64_t entry, std::int64_t step, std::int64_t arena,
          const std::vector<std::array<std::int64_t, 3>>& carries,
          const std::vector<std::array<std::int64_t, 3>>& inputs, const Integers& shared, std::int64_t running,
          std::int64_t paused);

  // Iterates each block while `running` is not 0 in a lane, until `paused` is not 0 in a lane, at most so often.
  // Addresses are of contiguous tensors, (lanes, number of elements) of carries and inputs. Returns the sum of the
  // iterations of all blocks.
  std::int64_t run(const std::vector<std::uintptr_t>& carries, const std::vector<std::uintptr_t>& inputs,
                   const std::vector<std::uintptr_t>& shared, std::int64_t lanes, std::int64_t at_most,
                   int threads) const;

 private:
  struct Tensor {
    std::int64_t offset, numel, dtype;
  };
  struct Call;

  std::vector<Tensor> tensors(const std::vector<std::array<std::int64_t, 3>>& given, const char* what) const;
  void read(const std::vector<Integers>& code);
  Instruction jump(const Integers& given, std::size_t at, Op op, std::size_t size) const;
  std::int64_t run_blocks(const Call& call, std::int64_t blocks, int threads) const;
  std::int64_t run_block(const Call& call, std::int64_t first, double* const* bases, int threads) const;
  void execute(std::int64_t begin, std::int64_t end, double* const* bases, int threads) const;
  bool any(const double* arena, std::int64_t offset, std::int64_t count) const;

  Memory memory;
  std::int64_t entry, step;  // where the sections begin
  std::vector<Tensor> carries, inputs;
  std::int64_t running, paused;
  std::vector<Instruction> instructions;
};

// Names of the operations, in the order of their numbers.
std::vector<std::string> operation_names();

}  // namespace implicitdiff
