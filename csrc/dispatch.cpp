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

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

#if defined(__linux__)
constexpr uintptr_t PAGE = 4096;

// madvise for all pages that have a byte of it. A system that does not know the advice refuses, and nothing is lost.
void advise(char* memory, int64_t bytes, int advice) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

// Fresh memory costs more in page faults than in copying: let it come in large pages where the system grants them on request.
void prefer_large_pages(char* memory, int64_t bytes) {
  constexpr int64_t large = 1 << 21;
  if (bytes >= large) advise(memory, bytes, MADV_HUGEPAGE);
}

// All faults in one call, unless the page in the middle says that the memory has been in use before.
void fault_in(char* memory, int64_t bytes) {
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which headers before Linux 5.14 lack
  unsigned char resident = 0;
  mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory + bytes / 2) / PAGE * PAGE), PAGE, &resident);
  if (!(resident & 1)) advise(memory, bytes, populate_write);
}
#else
void prefer_large_pages(char*, int64_t) {}
void fault_in(char*, int64_t) {}
#endif

// From rows at `from` to `rows` rows at `to`, all contiguous and of as many bytes.
struct RowCopy {
  const char* from;
  char* to;
  int64_t rows, bytes;
};

// Some rows of modality m.
struct Piece {
  size_t m;
  int64_t begin, end;
};

// The copies of all modalities, in pieces of about as many bytes whatever the rows' widths.
struct Copies {
  static constexpr int64_t PIECE = 1 << 18;
  static constexpr int64_t CACHEABLE = 1 << 24;  // of more, the first are out of the caches before anyone reads them
  std::vector<RowCopy> of;
  std::vector<Piece> pieces;
  int64_t bytes = 0;

  void add(const Tensor& from, const Tensor& to) {
    int64_t row = static_cast<int64_t>(from.element_size());
    for (int64_t d = 1; d < from.dim(); ++d) row *= from.size(d);
    const int64_t rows = to.size(0), step = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, row));
    for (int64_t i = 0; i < rows; i += step) pieces.push_back({of.size(), i, std::min(i + step, rows)});
    of.push_back({static_cast<const char*>(from.const_data_ptr()), static_cast<char*>(to.mutable_data_ptr()), rows, row});
    bytes += rows * row;
    prefer_large_pages(of.back().to, rows * row);
  }

  // Whether modality m's rows are worth streaming, and can be: the alignment of the first is that of all.
  bool streamed(size_t m) const {
    return bytes > CACHEABLE && (reinterpret_cast<uintptr_t>(of[m].to) | of[m].bytes) % 64 == 0;
  }

  // Calls f(p, pieces[p]) for every piece, on as many threads as the bytes are worth.
  template <class F>
  void for_each_piece(const F& f) const {
    const int64_t count = static_cast<int64_t>(pieces.size());
    in_parallel(count, 0.1 * static_cast<double>(bytes) / static_cast<double>(std::max<int64_t>(1, count)), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin, last = p; p < end; p = last) {  // a thread's own pages, since faults would hold up its streams
        const size_t m = pieces[p].m;
        while (last < end && pieces[last].m == m) ++last;
        const int64_t row = of[m].bytes, from = pieces[p].begin * row, to = pieces[last - 1].end * row;
        if (streamed(m)) fault_in(of[m].to + from, to - from);
      }
      for (int64_t p = begin; p < end; ++p) f(p, pieces[p]);
    });
  }
};

// Outputs of sizes[m] rows for inputs made contiguous, and how to copy into them.
std::vector<Tensor> outputs_for(std::vector<Tensor>& inputs, const std::vector<int64_t>& sizes, Copies& copies) {
  std::vector<Tensor> outputs;
  for (size_t m = 0; m < inputs.size(); ++m) {
    inputs[m] = torch::stable::contiguous(inputs[m]);
    std::vector<int64_t> shape(inputs[m].sizes().begin(), inputs[m].sizes().end());
    shape[0] = sizes[m];
    outputs.push_back(torch::stable::new_empty(inputs[m], shape));
    copies.add(inputs[m], outputs[m]);
  }
  return outputs;
}

// A copy of whole cache lines that are not read in before they are written, nor kept.
MLA_INLINE void stream(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  for (int64_t b = 0; b < bytes; b += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + b), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + b)));
#else
  std::memcpy(to, from, bytes);
#endif
}

// Copies row source(m, i) of modality m to row i of its output, or zeros where source(m, i) < 0, for the rows of the piece and
// `width` bytes from `first` on; calls then(from) for what has been copied.
template <class Source, class Then>
MLA_INLINE void copy_piece(
    const Copies& copies, const Piece& piece, int64_t first, int64_t width, const Source& source, const Then& then) {
  const RowCopy& copy = copies.of[piece.m];
  const bool streamed = copies.streamed(piece.m);
  int64_t next = source(piece.m, piece.begin);
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    const int64_t row = next;
    next = i + 1 < piece.end ? source(piece.m, i + 1) : -1;
    if (streamed && next >= 0)
      for (int64_t b = 0; b < width; b += 64) __builtin_prefetch(copy.from + next * copy.bytes + first + b);
    char* to = copy.to + i * copy.bytes + first;
    if (row < 0) {
      std::memset(to, 0, width);
      continue;
    }
    const char* from = copy.from + row * copy.bytes + first;
    if (streamed)
      stream(to, from, width);
    else
      std::memcpy(to, from, width);
    then(from);
  }
#if defined(__SSE2__)
  _mm_sfence();  // before another thread is told that it is there
#endif
}

template <class Source>
void copy_rows(const Copies& copies, const Source& source) {
  copies.for_each_piece([&](int64_t, const Piece& piece) {
    copy_piece(copies, piece, 0, copies.of[piece.m].bytes, source, [](const char*) {});
  });
}

// Calls f(In{}, Wide{}) for numbers of this dtype, In, and those that they are added up in.
template <class F>
auto with_types(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{}, float{});
    case ScalarType::Half: return f(torch::headeronly::Half{}, float{});
    default: STD_TORCH_CHECK(false, op, ": features must be float32, float64, bfloat16 or float16");
  }
}

// The dtype of sums.
ScalarType wide_type(const char* op, ScalarType dtype) {
  return with_types(op, dtype, [](auto, auto wide) { return sizeof(wide) == 8 ? ScalarType::Double : ScalarType::Float; });
}

constexpr int64_t COLUMNS = 256, ROWS = 32;  // sums of 32 rows at a time, which keeps rounding errors short

// The sum of `count` rows of s numbers over `divisor`, or 0 if that is 0, columns [from, to).
template <typename In, typename T>
MLA_INLINE void mean_of_rows(const In* rows, int64_t count, int64_t divisor, int64_t s, T* out, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; c += COLUMNS) {
    const int64_t width = std::min(COLUMNS, to - c);
    T total[COLUMNS] = {};
    for (int64_t r = 0; r < count; r += ROWS) {
      T part[COLUMNS] = {};
      for (int64_t i = r; i < std::min(r + ROWS, count); ++i)
        for (int64_t k = 0; k < width; ++k) part[k] += static_cast<T>(rows[i * s + c + k]);
      for (int64_t k = 0; k < width; ++k) total[k] += part[k];
    }
    for (int64_t k = 0; k < width; ++k) out[c + k] = divisor ? total[k] / static_cast<T>(divisor) : T(0);
  }
}

template <typename In, typename T>
Tensor means(const Tensor& features, const int64_t* offsets, const int64_t* counts, int64_t M) {
  const int64_t s = features.size(1), tiles = (s + COLUMNS - 1) / COLUMNS;
  Tensor result = empty(wide_type("segment_mean", features.scalar_type()), M, s);
  const In* in = features.const_data_ptr<In>();
  T* out = result.mutable_data_ptr<T>();
  const int64_t rows = M ? features.size(0) / M + 1 : 1;
  in_parallel(M * tiles, 0.2 * static_cast<double>(rows * COLUMNS), [&](int64_t begin, int64_t end) {
    vectorized([&](auto) MLA_LAMBDA {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t m = piece / tiles, from = piece % tiles * COLUMNS;
        const int64_t count = counts ? counts[m] : offsets[m + 1] - offsets[m];
        mean_of_rows<In, T>(in + offsets[m] * s, count, count, s, out + m * s, from, std::min(from + COLUMNS, s));
      }
    });
  });
  return result;
}

// Copies the piece and puts the sum of its rows, of s numbers each, at `sum`.
template <typename In, typename T, class Source>
MLA_INLINE void copy_and_add(const Copies& copies, const Piece& piece, int64_t s, const Source& source, T* sum) {
  constexpr int64_t PAGE_COLUMNS = 1024;  // of float32
  for (int64_t c = 0; c < s; c += PAGE_COLUMNS) {
    const int64_t width = std::min(PAGE_COLUMNS, s - c), size = sizeof(In);
    T total[PAGE_COLUMNS] = {}, part[PAGE_COLUMNS] = {};
    int64_t rows = 0;
    copy_piece(copies, piece, c * size, width * size, source, [&](const char* from) MLA_LAMBDA {
      const In* x = reinterpret_cast<const In*>(from);
      for (int64_t k = 0; k < width; ++k) part[k] += static_cast<T>(x[k]);
      if (++rows % ROWS) return;
      for (int64_t k = 0; k < width; ++k) total[k] += part[k], part[k] = 0;
    });
    for (int64_t k = 0; k < width; ++k) sum[c + k] = total[k] + part[k];
  }
}

// The arguments of pack_rows and pack_features, checked: gives the sample of row i of modality m, −1 where more rows are wanted
// than there are.
auto sources(
    const char* op, const std::vector<Tensor>& inputs, const Tensor& rows, const Tensor& offsets, const Tensor& slot,
    const std::vector<int64_t>& sizes) {
  const int64_t M = static_cast<int64_t>(inputs.size());
  STD_TORCH_CHECK(slot.dim() == 2 && slot.size(1) == M, op, ": slot must be [N, ", M, "]");
  const int64_t N = slot.size(0);
  check_vector("rows", rows, N * M);
  check_vector("offsets", offsets, M + 1);
  STD_TORCH_CHECK(static_cast<int64_t>(sizes.size()) == M, op, ": sizes must have ", M, " elements");
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m) {
    STD_TORCH_CHECK(inputs[m].dim() > 0 && inputs[m].size(0) == N, op, ": inputs[", m, "] must have ", N, " rows");
    STD_TORCH_CHECK(sizes[m] >= 0, op, ": sizes[", m, "] must not be negative");
    STD_TORCH_CHECK(
        0 <= offset[m] && offset[m] <= offset[m + 1] && offset[m + 1] <= N * M, op, ": offsets must rise from 0 to at most ",
        N * M);
  }
  const bool inside = std::all_of(row, row + N * M, [N](int64_t n) { return -1 <= n && n < N; });
  STD_TORCH_CHECK(inside, op, ": rows must be in -1 ... N - 1");
  return [=](size_t m, int64_t i) { return offset[m] + i < offset[m + 1] ? row[offset[m] + i] : -1; };
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan(Tensor present, bool padded) {
  STD_TORCH_CHECK(present.scalar_type() == ScalarType::Bool && present.dim() == 2, "dispatch_plan: present must be bool [N, M]");
  present = torch::stable::contiguous(present);
  const int64_t N = present.size(0), M = present.size(1);
  Tensor rows = empty_integers(present, {N * M}), offsets = empty_integers(present, {M + 1});
  Tensor counts = empty_integers(present, {M}), slot = empty_integers(present, {N, M});
  const uint8_t* here = static_cast<const uint8_t*>(present.const_data_ptr());  // true is any byte but 0
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
      const int64_t is = here[n * M + m] != 0;
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
  const auto source = sources("pack_rows", inputs, rows, offsets, slot, sizes);
  Copies copies;
  std::vector<Tensor> packed = outputs_for(inputs, sizes, copies);
  copy_rows(copies, source);
  return packed;
}

// pack_rows, and the mean of each modality's rows, which are read once for both.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> pack_features(
    std::vector<Tensor> features, Tensor rows, Tensor offsets, Tensor slot, std::vector<int64_t> sizes) {
  const auto source = sources("pack_features", features, rows, offsets, slot, sizes);
  Copies copies;
  std::vector<Tensor> packed = outputs_for(features, sizes, copies), means;
  std::vector<Tensor> sums;                         // of the rows of each modality's pieces
  std::vector<int64_t> first(features.size() + 1);  // piece of each modality
  for (const Piece& piece : copies.pieces) ++first[piece.m + 1];
  for (size_t m = 0; m < features.size(); ++m) {
    const Tensor& x = features[m];
    const std::vector<int64_t> shape(x.sizes().begin() + 1, x.sizes().end());
    const ScalarType wide = wide_type("pack_features", x.scalar_type());
    sums.push_back(empty(wide, first[m + 1], copies.of[m].bytes / static_cast<int64_t>(x.element_size())));
    means.push_back(torch::stable::new_empty(x, shape, wide));
    first[m + 1] += first[m];
  }
  copies.for_each_piece([&](int64_t p, const Piece& piece) {
    const size_t m = piece.m;
    with_types("pack_features", features[m].scalar_type(), [&](auto in, auto wide) {
      using In = decltype(in);
      using T = decltype(wide);
      const int64_t s = sums[m].size(1);
      T* sum = sums[m].template mutable_data_ptr<T>() + (p - first[m]) * s;
      vectorized([&](auto) MLA_LAMBDA { copy_and_add<In, T>(copies, piece, s, source, sum); });
    });
  });
  for (size_t m = 0; m < features.size(); ++m) {
    int64_t count = 0;
    for (int64_t i = 0; i < sizes[m]; ++i) count += source(m, i) >= 0;
    const int64_t pieces = sums[m].size(0), s = sums[m].size(1);
    with_types("pack_features", means[m].scalar_type(), [&](auto in, auto) {
      using T = decltype(in);
      const T* sum = sums[m].template const_data_ptr<T>();
      T* mean = means[m].template mutable_data_ptr<T>();
      vectorized([&](auto) MLA_LAMBDA { mean_of_rows<T, T>(sum, pieces, count, s, mean, 0, s); });
    });
  }
  return {packed, means};
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
  Copies copies;
  std::vector<Tensor> unpacked = outputs_for(packed, sizes, copies);
  copy_rows(copies, [=](size_t m, int64_t n) {
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
  return with_types("segment_mean", features.scalar_type(), [&](auto in, auto wide) {
    return means<decltype(in), decltype(wide)>(features, offset, count, M);
  });
}

}  // namespace mla_fast
