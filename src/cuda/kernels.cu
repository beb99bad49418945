// One step of a formula, or the pullback of one, over many tensors per launch.
#include "kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <new>
#include <stdexcept>

#include "formulas/all.h"

namespace implicitdiff {
namespace {

constexpr int threads = 256;
constexpr int chunk = 4096;  // elements of one block

// N neighbours in one access, in registers `stride` apart. An absent operand reads as zeros and is not written.
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

// Everything is loaded before anything is stored: an output may be one of the inputs.
template <class Formula, class R, class T> struct Step {
  using Rule = Formula;
  using Arithmetic = R;
  static constexpr int M = Formula::moments, row = M + 1;  // a row of M would be none where M is 0
  static constexpr int operands = 4 + 2 * M;               // g, p, base, s..., and out, s'...

  template <int N> static __device__ void at(const Formula& formula, const std::uintptr_t* address, std::int64_t i) {
    R g[N], p[N], base[N], out[N], s[N][row];
    load<T, N>(address[0], i, g);
    load<T, N>(address[1], i, p);
    load<T, N>(address[2], i, base);
    for (int m = 0; m < M; ++m) load<R, N>(address[3 + m], i, &s[0][m], row);
    for (int k = 0; k < N; ++k) {
      formula.step(g[k], p[k], s[k], out[k]);
      if (address[2]) out[k] += base[k];
    }
    store<T, N>(address[3 + M], i, out);
    for (int m = 0; m < M; ++m) store<R, N>(address[4 + M + m], i, &s[0][m], row);
  }
};

template <class Formula, class R, class T> struct Pull {
  using Rule = Formula;
  using Arithmetic = R;
  static constexpr int M = Formula::moments, row = M + 1;
  static constexpr int operands = 5 + 3 * M;  // g, p, s..., u_bar, next_bar..., and g_bar, p_bar, s_bar...

  template <int N> static __device__ void at(const Formula& formula, const std::uintptr_t* address, std::int64_t i) {
    R g[N], p[N], s[N][row], u_bar[N], next_bar[N][row], g_bar[N], p_bar[N], s_bar[N][row];
    load<T, N>(address[0], i, g);
    load<T, N>(address[1], i, p);
    for (int m = 0; m < M; ++m) load<R, N>(address[2 + m], i, &s[0][m], row);
    load<T, N>(address[2 + M], i, u_bar);
    for (int m = 0; m < M; ++m) load<R, N>(address[3 + M + m], i, &next_bar[0][m], row);
    for (int k = 0; k < N; ++k) formula.pull(g[k], p[k], s[k], u_bar[k], next_bar[k], g_bar[k], p_bar[k], s_bar[k]);
    store<T, N>(address[3 + 2 * M], i, g_bar);
    store<T, N>(address[4 + 2 * M], i, p_bar);
    for (int m = 0; m < M; ++m) store<R, N>(address[5 + 2 * M + m], i, &s_bar[0][m], row);
  }
};

// A kernel's arguments, by value: as many leaves as fit into the 4 KB that every driver takes.
template <class Operation> struct Batch {
  static constexpr int fixed = 2 * sizeof(std::uintptr_t) + Operation::Rule::numbers * sizeof(double);
  static constexpr int capacity = (4096 - fixed) / (sizeof(std::uintptr_t) * (Operation::operands + 2));

  double numbers[Operation::Rule::numbers];
  std::uintptr_t count;
  int leaves = 0;
  std::uintptr_t address[capacity][Operation::operands];
  std::int64_t size[capacity];
  std::int32_t which[capacity];
  std::uint32_t blocks[capacity];  // of this leaf and those before it
};

template <class Operation>
__global__ void __launch_bounds__(threads) sweep(const __grid_constant__ Batch<Operation> batch) {
  static_assert(sizeof(batch) <= 4096, "older drivers take no more");
  int leaf = 0;
  for (int last = batch.leaves - 1; leaf < last;) {
    const int middle = (leaf + last) / 2;
    if (blockIdx.x < batch.blocks[middle]) {
      last = middle;
    } else {
      leaf = middle + 1;
    }
  }

  // Once per block: the constants of a formula take powers in double precision.
  using Formula = typename Operation::Rule;
  alignas(Formula) __shared__ unsigned char memory[sizeof(Formula)];
  if (threadIdx.x == 0) {
    const auto* count = reinterpret_cast<const std::int64_t*>(batch.count);
    new (memory) Formula(batch.numbers, count[batch.which[leaf]]);
  }
  __syncthreads();
  const Formula formula = *reinterpret_cast<const Formula*>(memory);

  constexpr int wide = 16 / sizeof(typename Operation::Arithmetic);
  std::uintptr_t all = 0;
  for (int k = 0; k < Operation::operands; ++k) all |= batch.address[leaf][k];

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

// Also empties the batch.
template <class Operation> void launch(Batch<Operation>& batch, std::uintptr_t stream) {
  void* arguments[] = {&batch};
  const unsigned blocks = batch.blocks[batch.leaves - 1];
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(&sweep<Operation>), dim3(blocks),
                                             dim3(threads), arguments, 0, reinterpret_cast<cudaStream_t>(stream));
  batch.leaves = 0;
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it once more
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

void require(bool held, const std::string& message) {
  if (!held) throw std::invalid_argument(message);
}

template <class Operation> void run(const Call& call) {
  const std::size_t leaves = call.sizes.size();
  require(call.numbers.size() == Operation::Rule::numbers, call.name + ": wrong number of numbers");
  require(call.which.size() == leaves, call.name + ": which and sizes differ in length");
  require(call.addresses.size() == leaves * Operation::operands, call.name + ": wrong number of addresses");
  for (std::size_t i = 0; i < leaves; ++i) {
    require(call.sizes[i] >= 0 && call.which[i] >= 0, call.name + ": a size or an index is negative");
  }
  require(call.count != 0 || leaves == 0, call.name + ": no counts");

  Batch<Operation> batch;
  std::copy(call.numbers.begin(), call.numbers.end(), batch.numbers);
  batch.count = call.count;
  for (std::size_t i = 0; i < leaves; ++i) {
    if (call.sizes[i] == 0) continue;
    const int at = batch.leaves++;
    for (int k = 0; k < Operation::operands; ++k) batch.address[at][k] = call.addresses[k * leaves + i];
    batch.size[at] = call.sizes[i];
    batch.which[at] = static_cast<std::int32_t>(call.which[i]);
    batch.blocks[at] = (at ? batch.blocks[at - 1] : 0) + static_cast<std::uint32_t>((call.sizes[i] + chunk - 1) / chunk);
    if (batch.leaves == batch.capacity) launch(batch, call.stream);
  }
  if (batch.leaves) launch(batch, call.stream);
}

template <template <class, class, class> class Operation, class R, class T> void named(const Call& call) {
  with_formula<R>(call.name, [&](auto tag) { run<Operation<typename decltype(tag)::type, R, T>>(call); });
}

template <template <class, class, class> class Operation> void typed(const Call& call) {
  if (call.dtype == "float32") return named<Operation, float, float>(call);
  if (call.dtype == "float64") return named<Operation, double, double>(call);
  if (call.dtype == "bfloat16") return named<Operation, float, __nv_bfloat16>(call);
  if (call.dtype == "float16") return named<Operation, float, __half>(call);
  throw std::invalid_argument("unknown dtype '" + call.dtype + "'");
}

}  // namespace

void step(const Call& call) { typed<Step>(call); }
void pull(const Call& call) { typed<Pull>(call); }

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
