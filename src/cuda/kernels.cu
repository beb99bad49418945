// The step of a formula, or its pullback, over many tensors in one launch.
#include "kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <new>
#include <stdexcept>

#include "formulas/all.h"
#include "layout.h"

namespace implicitdiff {
namespace {

constexpr int threads = 256;
constexpr int chunk = 4096;  // elements of one block

// load and store move N neighbouring elements in one access; in registers they are `stride` apart. An absent operand
// reads as zeros and is not written.
template <class T, int N> struct alignas(N * sizeof(T)) Pack {
  T lane[N];
};

template <class T, int N, class R> __device__ void load(std::uintptr_t address, std::int64_t i, R* to, int stride = 1) {
  Pack<T, N> pack = {};
  if (address) pack = *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(address) + i);
  for (int k = 0; k < N; ++k) to[k * stride] = static_cast<R>(pack.lane[k]);
}

template <class T, int N, class R>
__device__ void store(std::uintptr_t address, std::int64_t i, const R* from, int stride = 1) {
  if (!address) return;
  Pack<T, N> pack;
  for (int k = 0; k < N; ++k) pack.lane[k] = static_cast<T>(from[k * stride]);
  *reinterpret_cast<Pack<T, N>*>(reinterpret_cast<T*>(address) + i) = pack;
}

// All operands are loaded before the first is stored: an output may share the memory of an input.
template <class Formula, class R, class T> struct Step {
  using Rule = Formula;
  using Arithmetic = R;
  static constexpr int M = Formula::moments, row = M + 1;  // M may be 0, and an array has an element at least
  using L = StepLayout<M>;

  template <int N> static __device__ void at(const Formula& formula, const std::uintptr_t* address, std::int64_t i) {
    R g[N], p[N], base[N], out[N], s[N][row];
    load<T, N>(address[L::g], i, g);
    load<T, N>(address[L::p], i, p);
    load<T, N>(address[L::base], i, base);
    for (int m = 0; m < M; ++m) load<R, N>(address[L::s + m], i, &s[0][m], row);
    for (int k = 0; k < N; ++k) {
      formula.step(g[k], p[k], s[k], out[k]);
      if (address[L::base]) out[k] += base[k];
    }
    store<T, N>(address[L::out], i, out);
    for (int m = 0; m < M; ++m) store<R, N>(address[L::next + m], i, &s[0][m], row);
  }
};

template <class Formula, class R, class T> struct Pull {
  using Rule = Formula;
  using Arithmetic = R;
  static constexpr int M = Formula::moments, row = M + 1;
  using L = PullLayout<M>;

  template <int N> static __device__ void at(const Formula& formula, const std::uintptr_t* address, std::int64_t i) {
    R g[N], p[N], s[N][row], u_bar[N], next_bar[N][row], g_bar[N], p_bar[N], s_bar[N][row];
    load<T, N>(address[L::g], i, g);
    load<T, N>(address[L::p], i, p);
    for (int m = 0; m < M; ++m) load<R, N>(address[L::s + m], i, &s[0][m], row);
    load<T, N>(address[L::u_bar], i, u_bar);
    for (int m = 0; m < M; ++m) load<R, N>(address[L::next_bar + m], i, &next_bar[0][m], row);
    for (int k = 0; k < N; ++k) formula.pull(g[k], p[k], s[k], u_bar[k], next_bar[k], g_bar[k], p_bar[k], s_bar[k]);
    store<T, N>(address[L::g_bar], i, g_bar);
    store<T, N>(address[L::p_bar], i, p_bar);
    for (int m = 0; m < M; ++m) store<R, N>(address[L::s_bar + m], i, &s_bar[0][m], row);
  }
};

// Parameters of a kernel, passed by value: as many leaves as fit into 4 KB, the limit of drivers before CUDA 12.1.
template <class Operation> struct Batch {
  static constexpr int fixed = 2 * sizeof(std::uintptr_t) + Operation::Rule::numbers * sizeof(double);
  static constexpr int operands = Operation::L::operands;
  static constexpr int capacity = (4096 - fixed) / (sizeof(std::uintptr_t) * (operands + 2));

  double numbers[Operation::Rule::numbers];
  const std::int64_t* count;
  int leaves = 0;
  std::uintptr_t address[capacity][operands];
  std::int64_t size[capacity];
  std::int32_t which[capacity];
  std::uint32_t blocks[capacity];  // number of blocks of this leaf and all before it
};

template <class Operation>
__global__ void __launch_bounds__(threads) sweep(const __grid_constant__ Batch<Operation> batch) {
  static_assert(sizeof(batch) <= 4096, "older drivers take no more");
  // The leaf of this block, by bisection.
  int leaf = 0;
  for (int last = batch.leaves - 1; leaf < last;) {
    const int middle = (leaf + last) / 2;
    if (blockIdx.x < batch.blocks[middle]) {
      last = middle;
    } else {
      leaf = middle + 1;
    }
  }

  // One thread of a block makes the formula: its constants take powers in double precision, which are slow.
  using Formula = typename Operation::Rule;
  alignas(Formula) __shared__ unsigned char memory[sizeof(Formula)];
  if (threadIdx.x == 0) new (memory) Formula(batch.numbers, batch.count[batch.which[leaf]]);
  __syncthreads();
  const Formula formula = *reinterpret_cast<const Formula*>(memory);

  // Accesses of 16 bytes, where all operands are aligned to so many; the rest element by element.
  constexpr int wide = 16 / sizeof(typename Operation::Arithmetic);
  std::uintptr_t all = 0;
  for (int k = 0; k < batch.operands; ++k) all |= batch.address[leaf][k];

  const std::int64_t begin = std::int64_t(blockIdx.x - (leaf ? batch.blocks[leaf - 1] : 0)) * chunk;
  const std::int64_t end = begin + chunk < batch.size[leaf] ? begin + chunk : batch.size[leaf];
  const std::int64_t tail = all % 16 ? begin : end - end % wide;
  for (std::int64_t i = begin + wide * threadIdx.x; i < tail; i += wide * threads) {
    Operation::template at<wide>(formula, batch.address[leaf], i);
  }
  for (std::int64_t i = tail + threadIdx.x; i < end; i += threads) {
    Operation::template at<1>(formula, batch.address[leaf], i);
  }
}

// Launches a kernel on the batch and empties it.
template <class Operation> void launch(Batch<Operation>& batch, std::uintptr_t stream) {
  void* arguments[] = {&batch};
  const unsigned blocks = batch.blocks[batch.leaves - 1];
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(&sweep<Operation>), dim3(blocks),
                                             dim3(threads), arguments, 0, reinterpret_cast<cudaStream_t>(stream));
  batch.leaves = 0;
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would report again
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class Operation> void run(const Call& call, std::uintptr_t stream) {
  check(call, Operation::Rule::numbers, Operation::L::operands);
  Batch<Operation> batch;
  std::copy(call.numbers.begin(), call.numbers.end(), batch.numbers);
  batch.count = call.count;
  for (std::size_t i = 0; i < call.leaves(); ++i) {
    if (call.sizes[i] == 0) continue;
    const int at = batch.leaves++;
    for (int k = 0; k < batch.operands; ++k) {
      batch.address[at][k] = reinterpret_cast<std::uintptr_t>(call.address(k, i));
    }
    batch.size[at] = call.sizes[i];
    batch.which[at] = static_cast<std::int32_t>(call.which[i]);
    batch.blocks[at] = (at ? batch.blocks[at - 1] : 0) + static_cast<std::uint32_t>((call.sizes[i] + chunk - 1) / chunk);
    if (batch.leaves == batch.capacity) launch(batch, stream);
  }
  if (batch.leaves) launch(batch, stream);
}

template <template <class, class, class> class Operation, class R, class T>
void run_as(const Call& call, std::uintptr_t stream) {
  with_formula<R>(call.formula, [&](auto tag) { run<Operation<typename decltype(tag)::type, R, T>>(call, stream); });
}

template <template <class, class, class> class Operation> void run(const Call& call, std::uintptr_t stream) {
  switch (call.dtype) {
    case Dtype::float32:
      return run_as<Operation, float, float>(call, stream);
    case Dtype::float64:
      return run_as<Operation, double, double>(call, stream);
    case Dtype::bfloat16:
      return run_as<Operation, float, __nv_bfloat16>(call, stream);
    case Dtype::float16:
      return run_as<Operation, float, __half>(call, stream);
  }
}

}  // namespace

void step(const Call& call, std::uintptr_t stream) { run<Step>(call, stream); }
void pull(const Call& call, std::uintptr_t stream) { run<Pull>(call, stream); }

std::vector<int> architectures() {
  std::vector<int> found = {__CUDA_ARCH_LIST__};
  for (int& architecture : found) architecture /= 10;
  return found;
}

int runtime_version() { return CUDART_VERSION; }

int devices() {
  int number = 0;
  if (cudaGetDeviceCount(&number) == cudaSuccess) return number;
  cudaGetLastError();
  return 0;
}

}  // namespace implicitdiff
