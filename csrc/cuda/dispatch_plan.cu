// Stable compaction of the present (sample, modality) pairs, modality-major, in one launch:
//
//     slot[n, m] = offsets[m] + #{n' < n : present[n', m]} if present[n, m], else −1        rows[slot[n, m]] = n, −1 elsewhere
//     offsets[m] = Σ_{m' < m} counts[m'], or m N if padded
//
// Each block has a range of samples and all modalities. What is before its range and how many there are in all, it counts itself:
// reading the mask (a byte a pair, from L2 but for the first block to come by) is cheaper than a second launch, and unlike a
// look-back over the other blocks' sums it needs no memory that somebody must have zeroed and no order among blocks. With B ≤ 128
// blocks that is B N M bytes: 13 MB for N = 65536 and M = 3, some 3 µs of L2, beside 3 MB that must be written anyway. The time
// stays linear in N, but for millions of samples it is several times that of a separate counting pass.
#include "kernels.h"

namespace mla_fast::cuda {
namespace {

constexpr int WARPS = PLAN_THREADS / 32;
constexpr int WORDS = PLAN_GROUP / 32;
static_assert(WORDS == 32, "a lane of a warp for each word");

// Of the pairs at [begin, end) of the mask, begin a multiple of 16 M, thread t returns a part of those present of modality
// t mod M. All threads of the block must come; `bytes` is theirs in common.
__device__ int64_t count(const uint8_t* mask, int64_t begin, int64_t end, int M, uint4 (&bytes)[PLAN_THREADS]) {
  constexpr int AT_ONCE = 8;  // loads on their way together
  const int t = threadIdx.x, threads = counting_threads(M), step = 16 * threads;
  const int round = 31 * AT_ONCE * step;  // after 255 additions a byte would overflow
  const int64_t whole = reinterpret_cast<uintptr_t>(mask) % 16 == 0 ? end - end % 16 : begin;
  int64_t sum = 0;
  for (int64_t first = begin; first < whole; first += round) {
    const uint8_t* from = mask + first;
    const int size = static_cast<int>(whole - first < round ? whole - first : round);
    uint4 sums = {};
    for (int at = 16 * t; at < size && t < threads; at += AT_ONCE * step) {
      uint4 x[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        x[i] = at + i * step < size ? __ldg(reinterpret_cast<const uint4*>(from + at + i * step)) : uint4{};
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        sums.x += set_bytes(x[i].x), sums.y += set_bytes(x[i].y), sums.z += set_bytes(x[i].z), sums.w += set_bytes(x[i].w);
    }
    bytes[t] = sums;
    __syncthreads();
    // Byte b holds what is of modality b mod M, and M divides `threads`.
    for (int j = 0; j < 16 && t < threads; ++j) sum += reinterpret_cast<const uint8_t*>(bytes)[j * threads + t];
    __syncthreads();
  }
  // What does not fill 16 bytes; everything if they are not aligned.
#pragma unroll 1
  for (int64_t at = whole - whole % M + t; at < end && t < threads; at += threads) sum += at >= whole && mask[at];
  return sum;
}

// counts[m] = Σ of the threads' parts of modality m. All threads of the block must come, and find it done.
__device__ void add_up(int64_t part, int64_t (&parts)[PLAN_THREADS], int64_t* counts, int M) {
  const int t = threadIdx.x, lane = t % 32, threads = counting_threads(M);
  parts[t] = part;
  __syncthreads();
  for (int m = t / 32; m < M; m += WARPS) {
    int64_t sum = 0;
    for (int i = m + lane * M; i < threads; i += 32 * M) sum += parts[i];
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (lane == 0) counts[m] = sum;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(PLAN_THREADS) dispatch_plan_kernel(const __grid_constant__ Plan p, int64_t tile) {
  __shared__ uint4 bytes[PLAN_THREADS];
  __shared__ int64_t parts[PLAN_THREADS];
  __shared__ int64_t counts[MAX_MODALITIES];
  __shared__ int64_t next[MAX_MODALITIES];  // before this block's samples; then the slot of each modality's next present one
  __shared__ int64_t present_pairs;
  // One more than is used: a warp that asks for one word of each modality finds them in different banks.
  __shared__ uint32_t words[MAX_MODALITIES][WORDS + 1];
  __shared__ int64_t slots[MAX_MODALITIES][WORDS + 1];  // of the first present one of each word
  const int t = threadIdx.x, lane = t % 32, M = p.M;
  const int64_t begin = blockIdx.x * tile, end = begin + tile < p.N ? begin + tile : p.N;

#pragma unroll 1  // once in the instruction cache
  for (int after = 0; after < 2; ++after) {
    const int64_t part = count(p.present, after ? begin * M : 0, (after ? p.N : begin) * M, M, bytes);
    add_up(part, parts, after ? counts : next, M);
  }
  int64_t first = 0, own = 0, all = 0;
  for (int m = 0; m < M && t < M; ++m) {
    const int64_t c = next[m] + counts[m];
    if (m < t) first += c;
    if (m == t) own = c;
    all += c;
  }
  __syncthreads();
  if (t < M) {
    if (p.padded) first = t * p.N;
    counts[t] = own;
    next[t] += first;
    if (t == 0) present_pairs = all;
    if (blockIdx.x == 0) {
      p.counts[t] = own;
      p.offsets[t] = first;
      if (t == M - 1) p.offsets[M] = p.padded ? M * p.N : all;
    }
  }
  __syncthreads();

  for (int64_t n0 = begin; n0 < end; n0 += PLAN_GROUP) {
    const int samples = static_cast<int>(end - n0 < PLAN_GROUP ? end - n0 : PLAN_GROUP);
    for (int m = t / 32; m < M; m += WARPS) {
      const uint8_t* column = p.present + n0 * M + m;
      uint32_t word = 0;
#pragma unroll 1
      for (int w0 = 0; 32 * w0 < samples; w0 += 8) {
        uint8_t here[8];
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          const int i = 32 * (w0 + w) + lane;
          here[w] = i < samples ? __ldg(column + i * M) : 0;
        }
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          const uint32_t ballot = __ballot_sync(~0u, here[w]);
          if (w0 + w == lane) word = ballot;
        }
      }
      int up_to = __popc(word);
      for (int by = 1; by < 32; by *= 2) {
        const int before = __shfl_up_sync(~0u, up_to, by);
        if (lane >= by) up_to += before;
      }
      const int64_t slot = next[m];
      words[m][lane] = word;
      slots[m][lane] = slot + up_to - __popc(word);
      __syncwarp();
      if (lane == 31) next[m] = slot + up_to;
    }
    __syncthreads();
#pragma unroll 1
    for (int pair = t; pair < samples * M; pair += PLAN_THREADS) {
      const int i = pair / M, m = pair - i * M;
      const int64_t n = n0 + i, at = n0 * M + pair;
      const uint32_t word = words[m][i / 32], bit = 1u << i % 32;
      int64_t slot = -1;
      if (word & bit) {
        slot = slots[m][i / 32] + __popc(word & (bit - 1));
        p.rows[slot] = n;
      }
      p.slot[at] = slot;
      // Each pair also stands for a row, which is −1 if it lies behind the present ones (of its modality, if padded).
      if (p.padded) {
        if (n >= counts[m]) p.rows[m * p.N + n] = -1;
      } else if (at >= present_pairs) {
        p.rows[at] = -1;
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t dispatch_plan(const Plan& plan, cudaStream_t stream) {
  dispatch_plan_kernel<<<static_cast<unsigned>(plan_blocks(plan.N)), PLAN_THREADS, 0, stream>>>(plan, plan_tile(plan.N));
  return cudaGetLastError();
}

}  // namespace mla_fast::cuda
