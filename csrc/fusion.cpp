// Entropy-weighted fusion (eqs. 6–8), as many samples at a time as stay in the caches, up to one for each lane of a vector:
//
//     t = z − max z      S = Σ exp t      e = log S − Σ t exp t / S          (eq. 7, shifted so that nothing overflows)
//     λ = softmax(−e) over the modalities that are present                   (eq. 8; the maximum in the paper cancels)
//     fused = Σ_m λ_m z_m                                                    (eq. 6)
//
// A sample with nothing present gives zeros. The logits of an absent modality are never read, so they may be anything. They are
// M tensors [N, C], one [M, N, C], or with slot [N, M] packed rows [K, C], where slot is the row of each (sample, modality) or −1.
#include "ops.h"
#include "simd.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <limits>

namespace mla_fast {
namespace {

// Calls `each` with the vectors of a row in turn; the last one has −inf in lanes that earlier ones held or that are past the
// end, which adds next to nothing (exp of EXP_LEAST) to any sum below. It is read from where the row ends: copying just the few
// elements that are left would cost as much as all the rest.
template <typename T, int B, class Each>
MLA_INLINE void for_each_vector(const T* row, int64_t C, const Each& each) {
  constexpr int64_t W = Simd<T, B>::width;
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  if (C < W) return each(load_part<B>(row, C, nothing));
  int64_t c = 0;
  for (; c + W <= C; c += W) each(load<B>(row + c));
  if (c == C) return;
  vec_t<T, B> lane;
  for (int64_t i = 0; i < W; ++i) lane[i] = static_cast<T>(i);
  each(lane < static_cast<T>(c + W - C) ? vec_t<T, B>{} + nothing : load<B>(row + C - W));
}

// Calls `each` with the first element and the number of elements of vectors that cover a row; the last may overlap.
template <typename T, int B, class Each>
MLA_INLINE void for_each_range(int64_t C, const Each& each) {
  constexpr int64_t W = Simd<T, B>::width;
  if (C < W) return each(0, C);
  for (int64_t c = 0; c + W <= C; c += W) each(c, W);
  if (C % W) each(C - W, W);
}

template <int B, typename T>
MLA_INLINE vec_t<T, B> load_lanes(const T* from, int64_t lanes) {
  return lanes == Simd<T, B>::width ? load<B>(from) : load_part<B>(from, lanes);
}

// The first `lanes` elements of v, in the output's dtype.
template <int B, typename Out, typename V>
MLA_INLINE void store_as(Out* to, V v, int64_t lanes) {
  if constexpr (std::is_floating_point_v<Out>) {
    if (lanes == Simd<Out, B>::width) return store<B>(to, v);
  }
  for (int64_t i = 0; i < lanes; ++i) to[i] = static_cast<Out>(v[i]);
}

struct Sizes {
  bool stacked, packed;  // one [M, N, C], or one [K, C] with slot
  int64_t M, N, C;
  const bool* present;  // null: all are
  const int64_t* slot;

  MLA_INLINE bool here(int64_t m, int64_t n) const { return packed ? slot[n * M + m] >= 0 : !present || present[n * M + m]; }
  MLA_INLINE int64_t row(int64_t m, int64_t n) const { return packed ? slot[n * M + m] : n; }
};

// Where each modality's rows begin, and how far apart they are.
template <typename In>
struct Layout : Sizes {
  std::vector<const In*> base;
  std::vector<int64_t> stride;

  Layout(std::vector<Tensor>& logits, const Sizes& sizes) : Sizes(sizes) {
    const int64_t dim = stacked ? 3 : 2;
    for (Tensor& z : logits)
      if (z.stride(dim - 1) != 1 && C > 1) z = torch::stable::contiguous(z);
    for (int64_t m = 0; m < M; ++m) {
      const Tensor& z = logits[stacked || packed ? 0 : m];
      base.push_back(z.const_data_ptr<In>() + (stacked ? m * z.stride(0) : 0));
      stride.push_back(z.stride(dim - 2));
    }
  }
  // What a sample takes forward; backward it is twice as long.
  double ns() const { return static_cast<double>(M) * (40 + 0.5 * static_cast<double>(C)); }
};

// Samples at a time: enough rows of each modality that what a row comes down to fills a lane, not a vector.
constexpr int64_t TILE = 16;

// Of one modality in a tile: where the rows are, nowhere for absent ones, and what eq. 7 makes of them. From the sums on it is
// double: weights come from differences of entropies, and the rounding of an entropy near log C would be most of the error of
// the fused logits.
template <typename T>
struct TileRows {
  const T* z[TILE];
  T top[TILE];
  double log_sum[TILE], entropy[TILE];
};

constexpr double ABSENT = std::numeric_limits<double>::infinity();  // the entropy of a row that is not there

template <typename T, int B>
MLA_INLINE void measure(TileRows<T>& rows, int64_t C) {
  constexpr int64_t BLOCK = 1024;  // longer sums in T would lose more than the rest of the arithmetic
  constexpr int64_t W = Simd<T, B>::width, WIDE = Simd<double, B>::width;
  vec_t<T, B> a[TILE] = {}, b[TILE] = {};
  double plain[TILE] = {}, weighted[TILE] = {};  // Σ exp t and Σ t exp t
  for (int64_t r = 0; r < TILE; ++r) {
    if (!rows.z[r]) continue;
    vec_t<T, B> tops = vec_t<T, B>{} - std::numeric_limits<T>::infinity();
    for_each_vector<T, B>(rows.z[r], C, [&](vec_t<T, B> v) MLA_LAMBDA { tops = v > tops ? v : tops; });
    a[r] = tops;
  }
  for (int64_t r = 0; r < TILE; r += W) store<B>(rows.top + r, maxima<T, B>(a + r));
  for (int64_t c = 0; c < C; c += BLOCK) {
    for (int64_t r = 0; r < TILE; ++r) {
      if (!rows.z[r]) continue;
      vec_t<T, B> sum = {}, weighted_sum = {};
      for_each_vector<T, B>(rows.z[r] + c, std::min(BLOCK, C - c), [&](vec_t<T, B> v) MLA_LAMBDA {
        const vec_t<T, B> t = at_least<B>(EXP_LEAST<T>, v - rows.top[r]), e = exp_normal<B>(t);
        sum += e;
        weighted_sum += t * e;
      });
      a[r] = sum;
      b[r] = weighted_sum;
    }
    for (int64_t r = 0; r < TILE; r += W) {
      T sum[W], weighted_sum[W];
      store<B>(sum, sums<T, B>(a + r));
      store<B>(weighted_sum, sums<T, B>(b + r));
      for (int64_t i = 0; i < W; ++i) {
        plain[r + i] += sum[i];
        weighted[r + i] += weighted_sum[i];
      }
    }
  }
  for (int64_t r = 0; r < TILE; r += WIDE) {
    const vec_t<double, B> total = load<B>(plain + r), log_sum = log_positive<B>(total);
    store<B>(rows.log_sum + r, log_sum);
    store<B>(rows.entropy + r, log_sum - load<B>(weighted + r) / total);
  }
  for (int64_t r = 0; r < TILE; ++r)
    if (!rows.z[r]) rows.entropy[r] = ABSENT;
}

// λ = softmax(−e) over the present modalities of each sample, [M, TILE]; zeros where absent.
template <typename T, int B>
MLA_INLINE void weigh(const std::vector<TileRows<T>>& tile, T* weights) {
  constexpr int64_t W = Simd<T, B>::width;
  double least[TILE] = {};
  for (int64_t r = 0; r < TILE; ++r) {
    double e = ABSENT;
    for (const TileRows<T>& rows : tile) e = std::min(e, rows.entropy[r]);
    if (e < ABSENT) least[r] = e;
  }
  for (int64_t r = 0; r < TILE; r += W) {
    vec_t<T, B> total = {};
    for (size_t m = 0; m < tile.size(); ++m) {
      T* w = weights + m * TILE + r;
      for (int64_t i = 0; i < W; ++i) w[i] = static_cast<T>(least[r + i] - tile[m].entropy[r + i]);
      const vec_t<T, B> e = exp_nonpositive<T, B>(load<B>(w));
      store<B>(w, e);
      total += e;
    }
    for (size_t m = 0; m < tile.size(); ++m) {
      const vec_t<T, B> e = load<B>(weights + m * TILE + r);
      store<B>(weights + m * TILE + r, e == T(0) ? e : e / total);
    }
  }
}

// The rows of a range of samples, tile by tile, as T: in place where they are T already, else converted into `scratch`.
template <typename In, typename T>
struct Rows {
  const Layout<In>& lay;
  const int64_t step;  // as many samples as stay in the second-level cache
  std::vector<T> scratch;
  std::vector<TileRows<T>> tile;

  explicit Rows(const Layout<In>& lay)
      : lay(lay),
        step(std::clamp<int64_t>((1 << 17) / (lay.M * lay.C * sizeof(T)), 1, TILE)),
        scratch(std::is_same_v<In, T> ? 0 : lay.M * step * lay.C),
        tile(lay.M) {}

  // Measures samples n … n + count − 1.
  template <int B>
  MLA_INLINE void read(int64_t n, int64_t count) {
    for (int64_t m = 0; m < lay.M; ++m) {
      for (int64_t r = 0; r < TILE; ++r)
        tile[m].z[r] = r < count && lay.here(m, n + r) ? address(m, n + r, scratch.data() + (m * step + r) * lay.C) : nullptr;
      measure<T, B>(tile[m], lay.C);
    }
  }

 private:
  MLA_INLINE const T* address(int64_t m, int64_t n, T* converted) const {
    const In* from = lay.base[m] + lay.row(m, n) * lay.stride[m];
    if constexpr (std::is_same_v<In, T>) {
      return from;
    } else {
      for (int64_t c = 0; c < lay.C; ++c) converted[c] = static_cast<T>(from[c]);
      return converted;
    }
  }
};

template <int B, typename In, typename T>
MLA_INLINE void forward_samples(Rows<In, T>& rows, In* fused, T* weights, T* entropy, int64_t begin, int64_t end) {
  const int64_t C = rows.lay.C, M = rows.lay.M;
  const std::vector<TileRows<T>>& tile = rows.tile;
  if constexpr (B > 16)  // few classes: a vector that they fill
    if (C < Simd<T, B>::width) return forward_samples<B / 2>(rows, fused, weights, entropy, begin, end);
  std::vector<T> lambda(M * TILE), w(M);
  std::vector<const T*> z(M);
  for (int64_t n = begin; n < end; n += rows.step) {
    const int64_t count = std::min(rows.step, end - n);
    rows.template read<B>(n, count);
    weigh<T, B>(tile, lambda.data());
    for (int64_t r = 0; r < count; ++r) {
      int64_t here = 0;
      for (int64_t m = 0; m < M; ++m) {
        const int64_t i = (n + r) * M + m;
        weights[i] = w[here] = lambda[m * TILE + r];
        entropy[i] = tile[m].z[r] ? static_cast<T>(tile[m].entropy[r]) : T(0);
        z[here] = tile[m].z[r];
        here += z[here] != nullptr;
      }
      for_each_range<T, B>(C, [&](int64_t c, int64_t lanes) MLA_LAMBDA {
        vec_t<T, B> mix = {};
        for (int64_t m = 0; m < here; ++m) mix += w[m] * load_lanes<B>(z[m] + c, lanes);
        store_as<B>(fused + (n + r) * C + c, mix, lanes);
      });
    }
  }
}

// With v_m = ∂L/∂λ_m + ⟨∂L/∂fused, z_m⟩:   ∂L/∂e_m = ∂L/∂e_m − λ_m (v_m − Σ λ v)   and
//     ∂L/∂z_mc = λ_m ∂L/∂fused_c − ∂L/∂e_m p_c (log p_c + e_m).
template <int B, typename In, typename T>
MLA_INLINE void backward_samples(
    Rows<In, T>& rows, const std::vector<In*>& grad_logits, const T* weights, const T* entropy, const In* grad_fused,
    const T* grad_weights, const T* grad_entropy, int64_t begin, int64_t end) {
  const int64_t C = rows.lay.C, M = rows.lay.M;
  const std::vector<TileRows<T>>& tile = rows.tile;
  if constexpr (B > 16)
    if (C < Simd<T, B>::width)
      return backward_samples<B / 2>(rows, grad_logits, weights, entropy, grad_fused, grad_weights, grad_entropy, begin, end);
  std::vector<T> v(M), gradient(C);
  T* g = gradient.data();
  for (int64_t first = begin; first < end; first += rows.step) {
    const int64_t count = std::min(rows.step, end - first);
    rows.template read<B>(first, count);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + r;
      const T* w = weights + n * M;
      for (int64_t c = 0; c < C; ++c) g[c] = grad_fused ? static_cast<T>(grad_fused[n * C + c]) : T(0);
      T mean = 0;
      for (int64_t m = 0; m < M; ++m) {
        if (!tile[m].z[r]) continue;
        v[m] = (grad_weights ? grad_weights[n * M + m] : T(0)) + (grad_fused ? dot<B>(g, tile[m].z[r], C) : T(0));
        mean += w[m] * v[m];
      }
      for (int64_t m = 0; m < M; ++m) {
        const T* z = tile[m].z[r];
        if (!z) {
          if (!rows.lay.packed) std::fill_n(grad_logits[m] + n * C, C, static_cast<In>(0));
          continue;
        }
        In* out = grad_logits[m] + rows.lay.row(m, n) * C;
        const T e = entropy[n * M + m], top = tile[m].top[r], log_sum = static_cast<T>(tile[m].log_sum[r]);
        const T grad_e = (grad_entropy ? grad_entropy[n * M + m] : T(0)) - w[m] * (v[m] - mean);
        for_each_range<T, B>(C, [&](int64_t c, int64_t lanes) MLA_LAMBDA {
          const vec_t<T, B> log_p = at_least<B>(2 * EXP_LEAST<T>, load_lanes<B>(z + c, lanes) - top) - log_sum;
          const vec_t<T, B> dz = w[m] * load_lanes<B>(g + c, lanes) - grad_e * (exp_nonpositive<T, B>(log_p) * (log_p + e));
          store_as<B>(out + c, dz, lanes);
        });
      }
    }
  }
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename In, typename T>
std::tuple<Tensor, Tensor, Tensor> forward(std::vector<Tensor>& logits, const Sizes& sizes, ScalarType acc) {
  const Layout<In> lay(logits, sizes);
  Tensor fused = empty(logits[0].scalar_type(), lay.N, lay.C);
  Tensor weights = empty(acc, lay.N, lay.M);
  Tensor entropy = empty(acc, lay.N, lay.M);
  In* f = fused.mutable_data_ptr<In>();
  T* w = weights.mutable_data_ptr<T>();
  T* e = entropy.mutable_data_ptr<T>();
  in_parallel(lay.N, lay.ns(), [&](int64_t begin, int64_t end) {
    Rows<In, T> rows(lay);
    vectorized([&](auto bytes) MLA_LAMBDA { forward_samples<bytes>(rows, f, w, e, begin, end); });
  });
  return {fused, weights, entropy};
}

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <typename In, typename T>
std::vector<Tensor> backward(
    std::vector<Tensor>& logits, const Sizes& sizes, const Tensor& weights, const Tensor& entropy,
    const std::optional<Tensor>& grad_fused, const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_entropy) {
  const Layout<In> lay(logits, sizes);
  std::vector<Tensor> grads;
  std::vector<In*> to;
  for (const Tensor& z : logits)
    grads.push_back(lay.packed ? torch::stable::new_zeros(z, z.sizes()) : torch::stable::new_empty(z, z.sizes()));
  for (int64_t m = 0; m < lay.M; ++m)
    to.push_back(grads[lay.stacked || lay.packed ? 0 : m].template mutable_data_ptr<In>() + (lay.stacked ? m * lay.N * lay.C : 0));
  const T* w = weights.const_data_ptr<T>();
  const T* e = entropy.const_data_ptr<T>();
  const In* gf = pointer<In>(grad_fused);
  const T* gw = pointer<T>(grad_weights);
  const T* ge = pointer<T>(grad_entropy);
  in_parallel(lay.N, 2 * lay.ns(), [&](int64_t begin, int64_t end) {
    Rows<In, T> rows(lay);
    vectorized([&](auto bytes) MLA_LAMBDA { backward_samples<bytes>(rows, to, w, e, gf, gw, ge, begin, end); });
  });
  return grads;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return !t || t->is_contiguous() ? t : std::optional<Tensor>(torch::stable::contiguous(*t));
}

// With slot, every row that it names lies within the packed ones.
Sizes packed_sizes(const std::vector<Tensor>& logits, const std::optional<Tensor>& present, const Tensor& slot) {
  STD_TORCH_CHECK(logits.size() == 1 && logits[0].dim() == 2 && !present, "entropy_fusion: with slot, logits must be one [K, C]");
  STD_TORCH_CHECK(
      slot.dim() == 2 && slot.scalar_type() == ScalarType::Long && slot.is_contiguous() && slot.size(1) > 0,
      "entropy_fusion: slot must be contiguous int64 [N, M]");
  const int64_t* rows = slot.const_data_ptr<int64_t>();
  const int64_t K = logits[0].size(0), C = logits[0].size(1);
  STD_TORCH_CHECK(C > 0, "entropy_fusion: logits must have at least one class");
  STD_TORCH_CHECK(
      std::all_of(rows, rows + slot.numel(), [K](int64_t k) { return -1 <= k && k < K; }),
      "entropy_fusion: slot must be in -1 ... ", K - 1);
  return {false, true, slot.size(1), slot.size(0), C, nullptr, rows};
}

Sizes checked_sizes(const std::vector<Tensor>& logits, const std::optional<Tensor>& present, const std::optional<Tensor>& slot) {
  STD_TORCH_CHECK(!logits.empty(), "entropy_fusion: logits must hold at least one modality");
  if (slot) return packed_sizes(logits, present, *slot);
  const Tensor& first = logits[0];
  const int64_t dim = first.dim();
  STD_TORCH_CHECK(
      dim == 2 || (dim == 3 && logits.size() == 1 && first.size(0) > 0),
      "entropy_fusion: logits must be M tensors [N, C] or one [M, N, C]");
  const int64_t M = dim == 3 ? first.size(0) : static_cast<int64_t>(logits.size());
  const int64_t N = first.size(dim - 2), C = first.size(dim - 1);
  STD_TORCH_CHECK(C > 0, "entropy_fusion: logits must have at least one class");
  for (const Tensor& z : logits)
    STD_TORCH_CHECK(
        z.dim() == dim && z.size(dim - 2) == N && z.size(dim - 1) == C && z.scalar_type() == first.scalar_type(),
        "entropy_fusion: all modalities must have one shape and dtype");
  STD_TORCH_CHECK(
      !present || (present->scalar_type() == ScalarType::Bool && present->dim() == 2 && present->size(0) == N && present->size(1) == M),
      "entropy_fusion: present must be bool [N, M]");
  return {dim == 3, false, M, N, C, present ? present->const_data_ptr<bool>() : nullptr, nullptr};
}

// A saved or incoming tensor of the backward pass: its shape is what the loops above rely on.
void check_rows(const char* name, const std::optional<Tensor>& t, int64_t N, int64_t columns) {
  STD_TORCH_CHECK(
      !t || (t->dim() == 2 && t->size(0) == N && t->size(1) == columns),
      "entropy_fusion_backward: ", name, " must be [", N, ", ", columns, "]");
}

// Calls f with a value of the dtype of the logits and one of the dtype that they are computed in.
template <class F>
auto for_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(BFloat16{}, float{});
    case ScalarType::Half: return f(Half{}, float{});
    default: STD_TORCH_CHECK(false, "entropy_fusion: logits must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> entropy_fusion(
    std::vector<Tensor> logits, std::optional<Tensor> present, std::optional<Tensor> slot) {
  present = contiguous(present);
  const Sizes sizes = checked_sizes(logits, present, slot);
  return for_dtype(logits[0].scalar_type(), [&](auto in, auto acc) {
    const ScalarType wide = std::is_same_v<decltype(acc), double> ? ScalarType::Double : ScalarType::Float;
    return forward<decltype(in), decltype(acc)>(logits, sizes, wide);
  });
}

std::vector<Tensor> entropy_fusion_backward(
    std::vector<Tensor> logits, std::optional<Tensor> present, Tensor weights, Tensor entropy,
    std::optional<Tensor> grad_fused, std::optional<Tensor> grad_weights, std::optional<Tensor> grad_entropy,
    std::optional<Tensor> slot) {
  present = contiguous(present);
  const Sizes sizes = checked_sizes(logits, present, slot);
  check_rows("weights", weights, sizes.N, sizes.M);
  check_rows("entropy", entropy, sizes.N, sizes.M);
  check_rows("grad_fused", grad_fused, sizes.N, sizes.C);
  check_rows("grad_weights", grad_weights, sizes.N, sizes.M);
  check_rows("grad_entropy", grad_entropy, sizes.N, sizes.M);
  grad_fused = contiguous(grad_fused);
  grad_weights = contiguous(grad_weights);
  grad_entropy = contiguous(grad_entropy);
  weights = torch::stable::contiguous(weights);
  entropy = torch::stable::contiguous(entropy);
  return for_dtype(logits[0].scalar_type(), [&](auto in, auto acc) {
    return backward<decltype(in), decltype(acc)>(
        logits, sizes, weights, entropy, grad_fused, grad_weights, grad_entropy);
  });
}

}  // namespace mla_fast
