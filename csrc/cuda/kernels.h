// What operators.cpp hands to the kernels; nothing of torch, so that nvcc need not read its headers for every architecture.
// Every function launches one kernel on `stream` and returns what cudaGetLastError says of that.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arithmetic.h"

namespace mla_fast::cuda {

struct Plan {
  const uint8_t* present;  // [N, M]
  int64_t N;
  int M;  // 1 … MAX_MODALITIES
  bool padded;
  int64_t *rows, *offsets, *counts, *slot;  // [N M], [M + 1], [M], [N, M]
};

cudaError_t dispatch_plan(const Plan& plan, cudaStream_t stream);

// One modality's copy: rows of `vectors` accesses of 2^width bytes, contiguous in `to`, `stride` bytes apart in `from`.
struct CopyItem {
  const char* from;
  char* to;
  int64_t from_rows, to_rows, stride, vectors;
  int64_t first_tile;  // of COPY_TILE vectors, counted through all items
  uint32_t magic;      // row_magic(vectors)
  int width;
};

struct RowCopy {
  CopyItem items[COPY_ITEMS];
  int count;
  int first;               // modality of items[0]
  int M;                   // columns of slot
  const int64_t* index;    // pack: rows; unpack: slot [N, M]
  int64_t index_size;      // elements of index
  const int64_t* offsets;  // [M + 1]
};

cudaError_t pack_rows(const RowCopy& copy, int64_t tiles, cudaStream_t stream);
cudaError_t unpack_rows(const RowCopy& copy, int64_t tiles, cudaStream_t stream);

enum class Floating { float64, float32, float16, bfloat16 };

struct SegmentMean {
  const void* features;    // [K, s], rows `stride` elements apart
  const int64_t* offsets;  // [M + 1]
  const int64_t* counts;   // [M] or null
  void* means;             // [M, s], float64 for float64 and else float32
  int64_t K, s, stride, M;
};

// The one of the four whose columns are loaded 16 bytes at a time if `vectorized`: s, stride and address allow it.
cudaError_t segment_mean(const SegmentMean& mean, Floating dtype, bool vectorized, cudaStream_t stream);

}  // namespace mla_fast::cuda
