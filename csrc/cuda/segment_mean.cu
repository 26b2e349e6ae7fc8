// x̄ of every modality: the mean of rows offsets[m] … offsets[m + 1] of features [K, s], or of the first counts[m] of them; zeros
// for an empty segment.
//
// A block has some columns of one modality. Its threads stand `lanes` beside each other on a row and MEAN_THREADS / lanes rows
// deep; each adds up its rows in their order, then the warps' lanes are added in a tree and the warps one after the other. The
// order depends on nothing but the shapes, so neither does a bit of the result.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace mla_fast::cuda {
namespace {

constexpr int WARPS = MEAN_THREADS / 32;
constexpr int AT_ONCE = 8;  // loads of a thread on their way together

__device__ double widen(double x) { return x; }
__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T element[V];
};

// One block on a multiprocessor may do (hence the 1): registers for all loads are worth more than a second.
template <class T, int V>
__global__ void __launch_bounds__(MEAN_THREADS, 1)
segment_mean_kernel(const __grid_constant__ SegmentMean p, int lanes, int tiles) {
  using Wide = decltype(widen(T{}));
  constexpr int MOST_COLUMNS = V == 1 ? 32 : 128 / sizeof(T);  // lanes × V at most
  __shared__ Wide sums[WARPS][MOST_COLUMNS];
  const int t = threadIdx.x, lane = t & (lanes - 1), columns = lanes * V;
  const int64_t m = blockIdx.x / tiles, first = static_cast<int64_t>(blockIdx.x - m * tiles) * columns;
  int64_t begin = p.offsets[m], end = p.counts ? begin + p.counts[m] : p.offsets[m + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > p.K ? p.K : end;

  Wide sum[V] = {};
  if (first + lane * V < p.s) {
    const int depth = MEAN_THREADS / lanes;
    const int64_t from = begin + t / lanes, jump = depth * p.stride;
    const T* at = static_cast<const T*>(p.features) + from * p.stride + first + lane * V;
    for (int64_t left = divide_up(end - from, depth); left > 0; left -= AT_ONCE, at += AT_ONCE * jump) {
      Vector<T, V> x[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)  // the last row rather than none, so that no load waits for a branch
        x[i] = *reinterpret_cast<const Vector<T, V>*>(at + (i < left ? i : left - 1) * jump);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += i < left ? widen(x[i].element[v]) : Wide(0);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v)
    for (int other = 16; other >= lanes; other /= 2) sum[v] += __shfl_xor_sync(~0u, sum[v], other);
  if (t % 32 < lanes)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[t / 32][lane * V + v] = sum[v];
  __syncthreads();
  if (t < columns && first + t < p.s) {
    Wide total = 0;
    for (int w = 0; w < WARPS; ++w) total += sums[w][t];
    static_cast<Wide*>(p.means)[m * p.s + first + t] = end > begin ? total / static_cast<Wide>(end - begin) : Wide(0);
  }
}

template <class T, int V>
void launch(const SegmentMean& p, cudaStream_t stream) {
  const int lanes = mean_lanes(p.s * sizeof(T), p.M, V * sizeof(T));
  const int64_t tiles = divide_up(p.s, lanes * V);
  segment_mean_kernel<T, V><<<static_cast<unsigned>(tiles * p.M), MEAN_THREADS, 0, stream>>>(p, lanes, static_cast<int>(tiles));
}

template <class T>
cudaError_t launch(const SegmentMean& p, bool vectorized, cudaStream_t stream) {
  vectorized ? launch<T, 16 / sizeof(T)>(p, stream) : launch<T, 1>(p, stream);
  return cudaGetLastError();
}

}  // namespace

cudaError_t segment_mean(const SegmentMean& mean, Floating dtype, bool vectorized, cudaStream_t stream) {
  switch (dtype) {
    case Floating::float64: return launch<double>(mean, vectorized, stream);
    case Floating::float32: return launch<float>(mean, vectorized, stream);
    case Floating::float16: return launch<__half>(mean, vectorized, stream);
    default: return launch<__nv_bfloat16>(mean, vectorized, stream);
  }
}

}  // namespace mla_fast::cuda
