// As much of CUDA as csrc/cuda needs, for g++, so that its kernels and operators run where there is no GPU: the threads of a block
// are fibers that a scheduler runs one at a time, each up to its next barrier, in an order of chance in which a warp may run far
// ahead of the others; blocks run one after another, in an order of chance too. What holds in one order alone, for want of a
// barrier, fails here sooner or later; a barrier that some thread never reaches ends the process. Between two barriers a thread is
// not interrupted, so what several add to without atomics is not found.
#pragma once

#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct Index {
  unsigned x;
};
using __half = torch::headeronly::Half;
using __nv_bfloat16 = torch::headeronly::BFloat16;
inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }

// Within the module, torch's CPU is the device.
#define CUDA CPU
#define is_cuda is_cpu
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define DeviceGuard NoGuard
#define dlopen(...) reinterpret_cast<void*>(1)
#define dlsym(...) reinterpret_cast<void*>(&cuda_on_host::current_stream)
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

namespace cuda_on_host {

inline AOTITorchError current_stream(int32_t, void** stream) { return *stream = nullptr, 0; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

constexpr unsigned WARP = 32;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  unsigned exchanges = 0;  // of its warp, so far
};

// One block after another; `inline`, so that every source file of the module has the same.
struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned> at_barrier, warps;  // those in the order in which they are served
  std::vector<std::vector<unsigned>> ready, at_warp_barrier;  // of each warp
  std::vector<uint64_t> exchanged;  // two for each thread, used in turn
  std::mt19937 random{std::random_device{}()};
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::vector<const void*> poisoned;  // shared memory that a thread of this block has come by
  unsigned size = 0, now = 0;

  // The thread at hand waits until `count` are there.
  void wait(std::vector<unsigned>& barrier, unsigned count) {
    barrier.push_back(now);
    if (barrier.size() == count) {
      for (unsigned t : barrier) ready[t / WARP].push_back(t);
      barrier.clear();
    }
    swapcontext(&threads[now].context, &scheduler);
  }

  void run();
};
inline Block block;
inline Index block_index;

inline void thread_main() { block.kernel(); }

inline void Block::run() {
  for (unsigned t = 0; t < size; ++t) {
    Thread& thread = threads[t];
    thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, thread_main, 0);
    ready[t / WARP].push_back(t);
  }
  poisoned.clear();
  for (;;) {
    if (random() % 256 == 0) std::shuffle(warps.begin(), warps.end(), random);
    const auto warp = std::find_if(warps.begin(), warps.end(), [&](unsigned w) { return !ready[w].empty(); });
    if (warp == warps.end()) break;
    std::vector<unsigned>& threads_of = ready[*warp];
    std::swap(threads_of[random() % threads_of.size()], threads_of.back());
    now = threads_of.back();
    threads_of.pop_back();
    swapcontext(&scheduler, &threads[now].context);
  }
  if (!at_barrier.empty()) fail("not all threads of the block came to __syncthreads");
  for (const auto& warp : at_warp_barrier)
    if (!warp.empty()) fail("not all threads of the warp came to a warp's operation");
}

// kernel<<<blocks, threads, 0, stream>>>(…)
template <class Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  if (blocks == 0 || threads % WARP != 0 || threads > 1024) fail("expected one block or more, of whole warps, of 1024 threads at most");
  block.kernel = kernel;
  block.size = threads;
  block.threads.resize(threads);
  block.ready.resize(threads / WARP);
  block.at_warp_barrier.resize(threads / WARP);
  block.warps.resize(threads / WARP);
  std::iota(block.warps.begin(), block.warps.end(), 0);
  block.exchanged.resize(2 * threads);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), block.random);
  for (unsigned index : order) block_index.x = index, block.run();
}

// What stands behind the declaration of a variable in shared memory, which holds nothing yet.
template <class T>
void shared(T& variable) {
  if (std::find(block.poisoned.begin(), block.poisoned.end(), &variable) != block.poisoned.end()) return;
  std::memset(static_cast<void*>(&variable), 0xa5, sizeof(T));
  block.poisoned.push_back(&variable);
}

// Every thread of a warp gives a value and may see that of any other.
template <class T>
const uint64_t* exchange(unsigned mask, T value) {
  if (mask != ~0u) fail("expected all threads of the warp");
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& thread = block.threads[block.now];
  const unsigned warp = block.now / WARP, first = thread.exchanges++ % 2 * block.size + warp * WARP;
  std::memcpy(&block.exchanged[first + block.now % WARP], &value, sizeof(T));
  block.wait(block.at_warp_barrier[warp], WARP);
  return &block.exchanged[first];
}

template <class T>
T value_of(unsigned mask, T value, unsigned lane) {
  std::memcpy(&value, &exchange(mask, value)[lane], sizeof(T));
  return value;
}

inline unsigned lane() { return block.now % WARP; }

}  // namespace cuda_on_host

#define threadIdx (Index{cuda_on_host::block.now})
#define blockIdx cuda_on_host::block_index

inline void __syncthreads() { cuda_on_host::block.wait(cuda_on_host::block.at_barrier, cuda_on_host::block.size); }
inline void __syncwarp() { cuda_on_host::exchange(~0u, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return cuda_on_host::value_of(mask, value, cuda_on_host::lane() ^ other);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const int lane = cuda_on_host::lane();
  return cuda_on_host::value_of(mask, value, lane < by ? lane : lane - by);
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  const uint64_t* values = cuda_on_host::exchange(mask, value);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < cuda_on_host::WARP; ++lane) {
    bool set;
    std::memcpy(&set, &values[lane], sizeof(set));
    ballot |= static_cast<unsigned>(set) << lane;
  }
  return ballot;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
