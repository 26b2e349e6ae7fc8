// Batched modality dispatch: which samples have which modality, their rows gathered modality by modality, and back.
//
//     present [N, M]  →  rows [N M] (packed row → sample), offsets [M + 1], counts [M], slot [N, M] (sample → packed row or −1)
//
// Packed rows are modality-major and in the order of the samples. `padded` gives every modality room for all N, so that no size
// depends on the mask; its unused rows are −1 in `rows` and named by no slot.
#include "ops.h"
#include "simd.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace mla_fast {
namespace {

Tensor empty_integers(const Tensor& like, std::initializer_list<int64_t> size) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, sizes, ScalarType::Long);
}

void check_vector(const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Long && t.numel() == size && t.is_contiguous(), "dispatch: ", name,
      " must be contiguous int64 with ", size, " elements");
}

// Bytes from the beginning of one row to the next; rows themselves are contiguous.
struct RowCopy {
  const char* from;
  char* to;
  int64_t bytes;
};

// The bytes of one row: all dimensions but the first.
int64_t row_bytes(const Tensor& t) {
  int64_t elements = 1;
  for (int64_t d = 1; d < t.dim(); ++d) elements *= t.size(d);
  return elements * static_cast<int64_t>(t.element_size());
}

// Copies row source(i) of modality m to row i of its output, or zeros where source(i) < 0, for all rows of all modalities in one
// parallel region. begin[m] … begin[m + 1] are modality m's rows in the common count.
template <class Source>
void copy_rows(const std::vector<RowCopy>& copies, const std::vector<int64_t>& begin, const Source& source) {
  const int64_t total = begin.back();
  int64_t widest = 1;
  for (const RowCopy& c : copies) widest = std::max(widest, c.bytes);
  in_parallel(total, widest, [&](int64_t from, int64_t to) {
    for (size_t m = 0; m < copies.size(); ++m) {
      const auto [base, out, bytes] = copies[m];
      const int64_t first = std::max(from, begin[m]) - begin[m], last = std::min(to, begin[m + 1]) - begin[m];
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = source(m, i);
        if (row < 0)
          std::memset(out + i * bytes, 0, bytes);
        else
          std::memcpy(out + i * bytes, base + row * bytes, bytes);
      }
    }
  });
}

// Outputs of sizes[m] rows for inputs made contiguous, and how to copy into them.
std::vector<Tensor> outputs_for(std::vector<Tensor>& inputs, const std::vector<int64_t>& sizes, std::vector<RowCopy>& copies) {
  std::vector<Tensor> outputs;
  for (size_t m = 0; m < inputs.size(); ++m) {
    inputs[m] = torch::stable::contiguous(inputs[m]);
    std::vector<int64_t> shape(inputs[m].sizes().begin(), inputs[m].sizes().end());
    shape[0] = sizes[m];
    outputs.push_back(torch::stable::new_empty(inputs[m], shape));
    copies.push_back(
        {static_cast<const char*>(inputs[m].const_data_ptr()), static_cast<char*>(outputs[m].mutable_data_ptr()),
         row_bytes(inputs[m])});
  }
  return outputs;
}

std::vector<int64_t> cumulated(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> begin{0};
  for (const int64_t size : sizes) begin.push_back(begin.back() + size);
  return begin;
}

// The mean of `count` rows of s numbers, columns [from, to): sums of 32 rows at a time, which keeps rounding errors short.
template <typename In, typename T>
MLA_INLINE void mean_of_rows(const In* rows, int64_t count, int64_t s, T* out, int64_t from, int64_t to) {
  constexpr int64_t COLUMNS = 256, ROWS = 32;
  for (int64_t c = from; c < to; c += COLUMNS) {
    const int64_t width = std::min(COLUMNS, to - c);
    T total[COLUMNS] = {};
    for (int64_t r = 0; r < count; r += ROWS) {
      T part[COLUMNS] = {};
      for (int64_t i = r; i < std::min(r + ROWS, count); ++i)
        for (int64_t k = 0; k < width; ++k) part[k] += static_cast<T>(rows[i * s + c + k]);
      for (int64_t k = 0; k < width; ++k) total[k] += part[k];
    }
    for (int64_t k = 0; k < width; ++k) out[c + k] = count ? total[k] / static_cast<T>(count) : T(0);
  }
}

template <typename In, typename T>
Tensor means(const Tensor& features, const int64_t* offsets, const int64_t* counts, int64_t M, ScalarType wide) {
  const int64_t s = features.size(1), tiles = (s + 255) / 256;
  Tensor result = empty_matrix(M, s, wide);
  const In* in = features.const_data_ptr<In>();
  T* out = result.mutable_data_ptr<T>();
  const int64_t rows = M ? features.size(0) / M + 1 : 1;
  in_parallel(M * tiles, rows * 256, [&](int64_t begin, int64_t end) {
    vectorized([&](auto) MLA_LAMBDA {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t m = piece / tiles, from = piece % tiles * 256;
        const int64_t count = counts ? counts[m] : offsets[m + 1] - offsets[m];
        mean_of_rows<In, T>(in + offsets[m] * s, count, s, out + m * s, from, std::min(from + 256, s));
      }
    });
  });
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan(Tensor present, bool padded) {
  STD_TORCH_CHECK(present.scalar_type() == ScalarType::Bool && present.dim() == 2, "dispatch_plan: present must be bool [N, M]");
  present = torch::stable::contiguous(present);
  const int64_t N = present.size(0), M = present.size(1);
  Tensor rows = empty_integers(present, {N * M}), offsets = empty_integers(present, {M + 1});
  Tensor counts = empty_integers(present, {M}), slot = empty_integers(present, {N, M});
  const bool* here = present.const_data_ptr<bool>();
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t* place = slot.mutable_data_ptr<int64_t>();

  // Without branches, which a random mask would mispredict every other time: an absent sample is written, too, and overwritten
  // by the next one, of this modality or the one after it; what is left behind the last is filled.
  offset[0] = 0;
  for (int64_t m = 0; m < M; ++m) {
    int64_t k = offset[m];
    for (int64_t n = 0; n < N; ++n) {
      const int64_t is = here[n * M + m];
      place[n * M + m] = is ? k : -1;
      if (k < N * M) row[k] = n;
      k += is;
    }
    count[m] = k - offset[m];
    offset[m + 1] = padded ? offset[m] + N : k;
    if (padded || m == M - 1) std::fill(row + k, row + (padded ? offset[m + 1] : N * M), -1);
  }
  return {rows, offsets, counts, slot};
}

std::vector<Tensor> pack_rows(std::vector<Tensor> inputs, Tensor rows, Tensor offsets, Tensor slot, std::vector<int64_t> sizes) {
  const int64_t M = static_cast<int64_t>(inputs.size());
  STD_TORCH_CHECK(slot.dim() == 2 && slot.size(1) == M, "pack_rows: slot must be [N, ", M, "]");
  const int64_t N = slot.size(0);
  check_vector("rows", rows, N * M);
  check_vector("offsets", offsets, M + 1);
  STD_TORCH_CHECK(static_cast<int64_t>(sizes.size()) == M, "pack_rows: sizes must have ", M, " elements");
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m) {
    STD_TORCH_CHECK(inputs[m].dim() > 0 && inputs[m].size(0) == N, "pack_rows: inputs[", m, "] must have ", N, " rows");
    STD_TORCH_CHECK(sizes[m] >= 0, "pack_rows: sizes[", m, "] must not be negative");
    STD_TORCH_CHECK(
        0 <= offset[m] && offset[m] <= offset[m + 1] && offset[m + 1] <= N * M, "pack_rows: offsets must rise from 0 to at most ",
        N * M);
  }
  STD_TORCH_CHECK(
      std::all_of(row, row + N * M, [N](int64_t n) { return -1 <= n && n < N; }), "pack_rows: rows must be in -1 ... N - 1");
  std::vector<RowCopy> copies;
  std::vector<Tensor> packed = outputs_for(inputs, sizes, copies);
  copy_rows(copies, cumulated(sizes), [=](size_t m, int64_t i) {
    return offset[m] + i < offset[m + 1] ? row[offset[m] + i] : -1;  // zeros where more rows are wanted than there are
  });
  return packed;
}

std::vector<Tensor> unpack_rows(std::vector<Tensor> packed, Tensor slot, Tensor offsets) {
  const int64_t M = static_cast<int64_t>(packed.size());
  STD_TORCH_CHECK(slot.dim() == 2 && slot.size(1) == M, "unpack_rows: slot must be [N, ", M, "]");
  const int64_t N = slot.size(0);
  check_vector("slot", slot, N * M);
  check_vector("offsets", offsets, M + 1);
  const int64_t* place = slot.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m) {
    STD_TORCH_CHECK(packed[m].dim() > 0, "unpack_rows: packed[", m, "] must have rows");
    for (int64_t n = 0; n < N; ++n)
      STD_TORCH_CHECK(
          place[n * M + m] < 0 || (offset[m] <= place[n * M + m] && place[n * M + m] - offset[m] < packed[m].size(0)),
          "unpack_rows: slot names a row that packed[", m, "] does not have");
  }
  const std::vector<int64_t> sizes(M, N);
  std::vector<RowCopy> copies;
  std::vector<Tensor> unpacked = outputs_for(packed, sizes, copies);
  copy_rows(copies, cumulated(sizes), [=](size_t m, int64_t n) {
    const int64_t k = place[n * M + static_cast<int64_t>(m)];
    return k < 0 ? k : k - offset[m];
  });
  return unpacked;
}

Tensor segment_mean(Tensor features, Tensor offsets, std::optional<Tensor> counts) {
  STD_TORCH_CHECK(features.dim() == 2, "segment_mean: features must be [K, s]");
  const int64_t M = offsets.numel() - 1;
  STD_TORCH_CHECK(M >= 0, "segment_mean: offsets must be [M + 1]");
  check_vector("offsets", offsets, M + 1);
  if (counts) check_vector("counts", *counts, M);
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t* count = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  for (int64_t m = 0; m < M; ++m) {
    const int64_t end = count ? offset[m] + count[m] : offset[m + 1];
    STD_TORCH_CHECK(
        0 <= offset[m] && offset[m] <= end && end <= features.size(0), "segment_mean: offsets must rise from 0 to at most ",
        features.size(0), ", the rows of features");
  }
  features = torch::stable::contiguous(features);
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  switch (features.scalar_type()) {
    case ScalarType::Float: return means<float, float>(features, offset, count, M, ScalarType::Float);
    case ScalarType::Double: return means<double, double>(features, offset, count, M, ScalarType::Double);
    case ScalarType::BFloat16: return means<BFloat16, float>(features, offset, count, M, ScalarType::Float);
    case ScalarType::Half: return means<Half, float>(features, offset, count, M, ScalarType::Float);
    default: STD_TORCH_CHECK(false, "segment_mean: features must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace mla_fast
