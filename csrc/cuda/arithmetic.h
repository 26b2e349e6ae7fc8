// The index arithmetic of the CUDA kernels, apart from them so that tests/test_cuda_build.py can run it where there is no GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MLA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MLA_HOST_DEVICE inline
#endif

namespace mla_fast::cuda {

MLA_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// dispatch_plan:

constexpr int PLAN_THREADS = 512;
constexpr int PLAN_GROUP = 1024;  // samples that are placed at a time: 32 words of 32 for every modality
constexpr int PLAN_BLOCKS = 128;  // at most: each block counts the whole mask
constexpr int MAX_MODALITIES = 64;

// Samples of one block, a multiple of PLAN_GROUP.
MLA_HOST_DEVICE int64_t plan_tile(int64_t N) {
  const int64_t groups = N > PLAN_GROUP ? divide_up(N, PLAN_GROUP) : 1;
  return divide_up(groups, PLAN_BLOCKS) * PLAN_GROUP;
}

MLA_HOST_DEVICE int64_t plan_blocks(int64_t N) { return N > 0 ? divide_up(N, plan_tile(N)) : 1; }

// Threads that count: a multiple of M, so that what a thread reads, 16 bytes of every 16 × this, is always of the same modalities.
MLA_HOST_DEVICE int counting_threads(int M) { return PLAN_THREADS - PLAN_THREADS % M; }

// A 1 in every byte of x that is not 0.
MLA_HOST_DEVICE uint32_t set_bytes(uint32_t x) { return ((((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) >> 7) & 0x01010101u; }

// pack_rows and unpack_rows:

constexpr int COPY_THREADS = 256;
constexpr int COPY_UNROLL = 4;
constexpr int COPY_TILE = COPY_THREADS * COPY_UNROLL;  // vectors that a block copies
constexpr int COPY_ITEMS = 16;                         // modalities in one launch

// log2 of the widest access, at most 16 bytes, that fits rows at these addresses with these sizes: all of them multiples of it.
MLA_HOST_DEVICE int width_log2(uint64_t from, uint64_t to, uint64_t stride, uint64_t row_bytes) {
  const uint64_t all = from | to | stride | row_bytes | 16;
  int log2 = 0;
  while (!(all >> log2 & 1)) ++log2;
  return log2;
}

struct Cell {
  int64_t row, column;
};

// Where the vector `step` < COPY_TILE after column `column` of row `row` lies, for rows of `vectors` vectors. Rows as long as a
// tile need no division; for shorter ones `magic` = row_magic(vectors) makes it a multiplication, exactly: dividend and divisor
// stay below 2^11 and 2^10, so (vectors · magic − 2^21) · dividend ≤ vectors · dividend < 2^21, and dividend · magic < 2^32.
MLA_HOST_DEVICE uint32_t row_magic(int64_t vectors) {
  return vectors < COPY_TILE ? (1u << 21) / static_cast<uint32_t>(vectors) + 1 : 0;
}

MLA_HOST_DEVICE Cell advance(int64_t row, int64_t column, int step, int64_t vectors, uint32_t magic) {
  if (vectors >= COPY_TILE) {
    const int64_t to = column + step;
    return to < vectors ? Cell{row, to} : Cell{row + 1, to - vectors};
  }
  const uint32_t to = static_cast<uint32_t>(column) + step;
  const uint32_t rows = to * magic >> 21;
  return {row + rows, to - rows * static_cast<uint32_t>(vectors)};
}

// The last of `count` items that begins at or before this tile, hence the one that holds it: items without tiles begin where
// the next one does.
template <class Item>
MLA_HOST_DEVICE int item_of(const Item* items, int count, int64_t tile) {
  int i = 0;
  while (i + 1 < count && items[i + 1].first_tile <= tile) ++i;
  return i;
}

// segment_mean:

constexpr int MEAN_THREADS = 512;
constexpr int MEAN_BLOCKS = 128;  // aimed at: about one for each multiprocessor

// Threads beside each other on one row, a power of two up to 32: a 128-byte line if that leaves work for all multiprocessors,
// else less, down to a 32-byte sector. `vector_bytes` is what a thread loads at once.
MLA_HOST_DEVICE int mean_lanes(int64_t row_bytes, int64_t segments, int vector_bytes) {
  int lanes = 128 / vector_bytes;
  if (lanes > 32) lanes = 32;
  while (lanes * vector_bytes > 32 && divide_up(row_bytes, lanes * vector_bytes) * segments < MEAN_BLOCKS) lanes /= 2;
  return lanes;
}

}  // namespace mla_fast::cuda
