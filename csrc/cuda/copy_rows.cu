// Rows of many tensors of any shape and dtype gathered in one launch:
//
//     pack     to_m[i] = from_m[rows[offsets[m] + i]]        zeros where that is −1 or of another modality
//     unpack   to_m[n] = from_m[slot[n, m] − offsets[m]]     zeros where slot is −1
//
// Bytes are moved, in the widest accesses that a modality's addresses and row size allow. A tile of COPY_TILE of these, contiguous
// in `to` whatever the rows' length, is a block's work, and the tiles of all modalities stand one behind the other. A row that
// `from` does not have counts as absent, so no index reads outside of it.
#include "kernels.h"

namespace mla_fast::cuda {
namespace {

// The row of `from` that belongs in row `row` of `to`, or −1.
template <bool PACK>
__device__ int64_t source(const RowCopy& c, int m, int64_t row, int64_t begin, int64_t end) {
  if (!PACK) {
    const int64_t slot = __ldg(c.index + row * c.M + m);
    return slot < 0 ? -1 : slot - begin;
  }
  const int64_t at = begin + row;
  return at >= 0 && at < end ? __ldg(c.index + at) : -1;
}

template <bool PACK, class Vector>
__device__ void copy_tile(const RowCopy& c, const CopyItem& item, int m, int64_t tile) {
  const int64_t first = tile * COPY_TILE, row = first / item.vectors, column = first - row * item.vectors;
  const int64_t begin = __ldg(c.offsets + m);
  int64_t end = __ldg(c.offsets + m + 1);
  if (end > c.index_size) end = c.index_size;
  Vector values[COPY_UNROLL];
  bool inside[COPY_UNROLL];
#pragma unroll
  for (int u = 0; u < COPY_UNROLL; ++u) {
    const Cell cell = advance(row, column, u * COPY_THREADS + threadIdx.x, item.vectors, item.magic);
    inside[u] = cell.row < item.to_rows;
    values[u] = Vector{};
    const int64_t from = inside[u] ? source<PACK>(c, m, cell.row, begin, end) : -1;
    if (from >= 0 && from < item.from_rows)
      values[u] = __ldg(reinterpret_cast<const Vector*>(item.from + from * item.stride) + cell.column);
  }
  Vector* to = reinterpret_cast<Vector*>(item.to) + first + threadIdx.x;
#pragma unroll
  for (int u = 0; u < COPY_UNROLL; ++u)
    if (inside[u]) to[u * COPY_THREADS] = values[u];
}

template <bool PACK>
__global__ void __launch_bounds__(COPY_THREADS) copy_rows_kernel(const __grid_constant__ RowCopy c) {
  const int i = item_of(c.items, c.count, blockIdx.x), m = c.first + i;
  const CopyItem& item = c.items[i];
  const int64_t tile = blockIdx.x - item.first_tile;
  switch (item.width) {
    case 4: return copy_tile<PACK, uint4>(c, item, m, tile);
    case 3: return copy_tile<PACK, uint2>(c, item, m, tile);
    case 2: return copy_tile<PACK, unsigned>(c, item, m, tile);
    case 1: return copy_tile<PACK, unsigned short>(c, item, m, tile);
    default: return copy_tile<PACK, unsigned char>(c, item, m, tile);
  }
}

}  // namespace

cudaError_t pack_rows(const RowCopy& copy, int64_t tiles, cudaStream_t stream) {
  copy_rows_kernel<true><<<static_cast<unsigned>(tiles), COPY_THREADS, 0, stream>>>(copy);
  return cudaGetLastError();
}

cudaError_t unpack_rows(const RowCopy& copy, int64_t tiles, cudaStream_t stream) {
  copy_rows_kernel<false><<<static_cast<unsigned>(tiles), COPY_THREADS, 0, stream>>>(copy);
  return cudaGetLastError();
}

}  // namespace mla_fast::cuda
