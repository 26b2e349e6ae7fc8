// Entropy-weighted fusion (eqs. 6–8), one sample at a time while its M rows are in the first-level cache:
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
#include <memory>

namespace mla_fast {
namespace {

// Calls `each` with the vectors of a row in turn; the last one has −inf in lanes that earlier ones held or that are past the
// end, which adds nothing to any sum below. It is read from where the row ends: copying just the few elements that are left
// would cost as much as all the rest.
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

// t = z − top, with −inf made finite: its exp is 0, and 0 · t must be 0 too.
template <typename T, int B>
MLA_INLINE vec_t<T, B> shifted(vec_t<T, B> z, T top) {
  const vec_t<T, B> t = z - top, least = vec_t<T, B>{} - T(1e30);
  return t < least ? least : t;
}

template <typename T, int B>
MLA_INLINE T row_maximum(const T* z, int64_t C) {
  vec_t<T, B> tops = vec_t<T, B>{} - std::numeric_limits<T>::infinity();
  for_each_vector<T, B>(z, C, [&](vec_t<T, B> v) MLA_LAMBDA { tops = v > tops ? v : tops; });
  return maximum<T, B>(tops);
}

// Σ exp t and Σ t exp t of one row of logits. From here to the weights it is double: weights come from differences of
// entropies, and the rounding of an entropy near log C would be most of the error of the fused logits.
struct ExpSums {
  double plain, weighted;

  double log_sum() const { return std::log(plain); }
  double entropy() const { return log_sum() - weighted / plain; }
};

template <typename T, int B>
MLA_INLINE ExpSums row_exp_sums(const T* z, T top, int64_t C) {
  constexpr int64_t BLOCK = 1024;  // longer sums in T would lose more than the rest of the arithmetic
  ExpSums total{0, 0};
  for (int64_t c = 0; c < C; c += BLOCK) {
    vec_t<T, B> plain = {}, weighted = {};
    for_each_vector<T, B>(z + c, std::min(BLOCK, C - c), [&](vec_t<T, B> v) MLA_LAMBDA {
      const vec_t<T, B> t = shifted<T, B>(v, top);
      const vec_t<T, B> e = exp_nonpositive<B>(t);
      plain += e;
      weighted += t * e;
    });
    total.plain += sum<T, B>(plain);
    total.weighted += sum<T, B>(weighted);
  }
  return total;
}

// λ = softmax(−e) over the present entries of one sample; zeros where absent.
template <typename T>
MLA_INLINE void weights_of(const double* entropy, const bool* present, T* weights, int64_t M) {
  double least = std::numeric_limits<double>::infinity();
  T total = 0;
  for (int64_t m = 0; m < M; ++m)
    if (!present || present[m]) least = std::min(least, entropy[m]);
  for (int64_t m = 0; m < M; ++m) {
    weights[m] = !present || present[m] ? std::exp(static_cast<T>(least - entropy[m])) : T(0);
    total += weights[m];
  }
  for (int64_t m = 0; m < M; ++m)
    if (!present || present[m]) weights[m] /= total;
}

// The M rows of one sample as T: in place where they are T already, else converted into `scratch`.
template <typename In, typename T>
struct Rows {
  const std::vector<const In*>& base;
  const std::vector<int64_t>& stride;
  const int64_t* slot;
  T* scratch;
  int64_t C;

  MLA_INLINE int64_t index(int64_t m, int64_t n) const { return slot ? slot[n * static_cast<int64_t>(base.size()) + m] : n; }
  MLA_INLINE const T* operator()(int64_t m, int64_t n) const {
    const In* from = base[m] + index(m, n) * stride[m];
    if constexpr (std::is_same_v<In, T>) {
      return from;
    } else {
      T* to = scratch + m * C;
      for (int64_t c = 0; c < C; ++c) to[c] = static_cast<T>(from[c]);
      return to;
    }
  }
};

template <int B, typename In, typename T>
MLA_INLINE void forward_samples(
    Rows<In, T> rows, const bool* present, In* fused, T* weights, T* entropy, int64_t M, int64_t begin, int64_t end) {
  const int64_t C = rows.C;
  if constexpr (B > 16)  // few classes: a vector that they fill
    if (C < Simd<T, B>::width) return forward_samples<B / 2>(rows, present, fused, weights, entropy, M, begin, end);
  std::vector<const T*> z(M);
  std::vector<T> top(M);
  std::vector<ExpSums> sums(M);
  std::vector<double> e(M);
  for (int64_t n = begin; n < end; ++n) {
    const bool* here = present ? present + n * M : nullptr;
    T* w = weights + n * M;
    // Each step for all modalities before the next: the machine works at several rows at once, and none waits for another.
    for (int64_t m = 0; m < M; ++m) {
      if (here && !here[m]) continue;
      z[m] = rows(m, n);
      top[m] = row_maximum<T, B>(z[m], C);
    }
    for (int64_t m = 0; m < M; ++m)
      if (!here || here[m]) sums[m] = row_exp_sums<T, B>(z[m], top[m], C);
    for (int64_t m = 0; m < M; ++m) {
      e[m] = !here || here[m] ? sums[m].entropy() : 0;
      entropy[n * M + m] = static_cast<T>(e[m]);
    }
    weights_of(e.data(), here, w, M);
    for_each_range<T, B>(C, [&](int64_t c, int64_t lanes) MLA_LAMBDA {
      vec_t<T, B> mix = {};
      for (int64_t m = 0; m < M; ++m)
        if (!here || here[m]) mix += w[m] * load_lanes<B>(z[m] + c, lanes);
      store_as<B>(fused + n * C + c, mix, lanes);
    });
  }
}

// With v_m = ∂L/∂λ_m + ⟨∂L/∂fused, z_m⟩:   ∂L/∂e_m = ∂L/∂e_m − λ_m (v_m − Σ λ v)   and
//     ∂L/∂z_mc = λ_m ∂L/∂fused_c − ∂L/∂e_m p_c (log p_c + e_m).
template <int B, typename In, typename T>
MLA_INLINE void backward_samples(
    Rows<In, T> rows, const std::vector<In*>& grad_logits, const bool* present, const T* weights, const T* entropy,
    const In* grad_fused, const T* grad_weights, const T* grad_entropy, T* g, int64_t M, int64_t begin, int64_t end) {
  const int64_t C = rows.C;
  if constexpr (B > 16)
    if (C < Simd<T, B>::width)
      return backward_samples<B / 2>(
          rows, grad_logits, present, weights, entropy, grad_fused, grad_weights, grad_entropy, g, M, begin, end);
  std::vector<const T*> z(M);
  std::vector<T> v(M);
  for (int64_t n = begin; n < end; ++n) {
    const bool* here = present ? present + n * M : nullptr;
    const T* w = weights + n * M;
    const T* e = entropy + n * M;
    for (int64_t c = 0; c < C; ++c) g[c] = grad_fused ? static_cast<T>(grad_fused[n * C + c]) : T(0);
    T mean = 0;
    for (int64_t m = 0; m < M; ++m) {
      if (here && !here[m]) continue;
      z[m] = rows(m, n);
      v[m] = (grad_weights ? grad_weights[n * M + m] : T(0)) + (grad_fused ? dot<B>(g, z[m], C) : T(0));
      mean += w[m] * v[m];
    }
    for (int64_t m = 0; m < M; ++m) {
      if (here && !here[m]) {
        if (!rows.slot) std::fill_n(grad_logits[m] + n * C, C, static_cast<In>(0));
        continue;
      }
      In* out = grad_logits[m] + rows.index(m, n) * C;
      const T grad_e = (grad_entropy ? grad_entropy[n * M + m] : T(0)) - w[m] * (v[m] - mean);
      const T top = row_maximum<T, B>(z[m], C);
      const T log_sum = static_cast<T>(row_exp_sums<T, B>(z[m], top, C).log_sum());
      for_each_range<T, B>(C, [&](int64_t c, int64_t lanes) MLA_LAMBDA {
        const vec_t<T, B> log_p = shifted<T, B>(load_lanes<B>(z[m] + c, lanes), top) - log_sum;
        const vec_t<T, B> dz = w[m] * load_lanes<B>(g + c, lanes) - grad_e * (exp_nonpositive<B>(log_p) * (log_p + e[m]));
        store_as<B>(out + c, dz, lanes);
      });
    }
  }
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct Sizes {
  bool stacked, packed;  // one [M, N, C], or one [K, C] with slot
  int64_t M, N, C;
  const int64_t* slot;  // null with N = 0, too
};

// Which samples have which modality: as given, or from the slots.
class Mask {
 public:
  Mask(const Sizes& sizes, const std::optional<Tensor>& present) : here_(present ? present->const_data_ptr<bool>() : nullptr) {
    if (!sizes.packed) return;
    own_.reset(new bool[sizes.N * sizes.M]);
    for (int64_t i = 0; i < sizes.N * sizes.M; ++i) own_[i] = sizes.slot[i] >= 0;
    here_ = own_.get();
  }
  const bool* get() const { return here_; }

 private:
  std::unique_ptr<bool[]> own_;
  const bool* here_;
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
      const Tensor& z = stacked || packed ? logits[0] : logits[m];
      base.push_back(z.const_data_ptr<In>() + (stacked ? m * z.stride(0) : 0));
      stride.push_back(z.stride(dim - 2));
    }
  }
  // Elements for one sample's converted rows; none where they are read in place.
  template <typename T>
  int64_t converted() const {
    return std::is_same_v<In, T> ? 0 : M * C;
  }
  // Multiplications, roughly, that a sample costs.
  int64_t work() const { return 16 * M * C; }
};

template <typename In, typename T>
std::tuple<Tensor, Tensor, Tensor> forward(std::vector<Tensor>& logits, const Sizes& sizes, const bool* present, ScalarType acc) {
  const Layout<In> lay(logits, sizes);
  Tensor fused = empty(logits[0].scalar_type(), lay.N, lay.C);
  Tensor weights = empty(acc, lay.N, lay.M);
  Tensor entropy = empty(acc, lay.N, lay.M);
  In* f = fused.mutable_data_ptr<In>();
  T* w = weights.mutable_data_ptr<T>();
  T* e = entropy.mutable_data_ptr<T>();
  in_parallel(lay.N, lay.work(), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(lay.template converted<T>());
    const Rows<In, T> rows{lay.base, lay.stride, lay.slot, scratch.data(), lay.C};
    vectorized([&](auto bytes) MLA_LAMBDA {
      forward_samples<bytes>(rows, present, f, w, e, lay.M, begin, end);
    });
  });
  return {fused, weights, entropy};
}

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <typename In, typename T>
std::vector<Tensor> backward(
    std::vector<Tensor>& logits, const Sizes& sizes, const bool* present, const Tensor& weights, const Tensor& entropy,
    const std::optional<Tensor>& grad_fused, const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_entropy) {
  const Layout<In> lay(logits, sizes);
  std::vector<Tensor> grads;
  std::vector<In*> to;
  for (const Tensor& z : logits)
    grads.push_back(lay.packed ? torch::stable::new_zeros(z, z.sizes()) : torch::stable::new_empty(z, z.sizes()));
  for (int64_t m = 0; m < lay.M; ++m)
    to.push_back(lay.packed ? grads[0].mutable_data_ptr<In>() : lay.stacked ? grads[0].mutable_data_ptr<In>() + m * lay.N * lay.C : grads[m].mutable_data_ptr<In>());
  const T* w = weights.const_data_ptr<T>();
  const T* e = entropy.const_data_ptr<T>();
  const In* gf = pointer<In>(grad_fused);
  const T* gw = pointer<T>(grad_weights);
  const T* ge = pointer<T>(grad_entropy);
  in_parallel(lay.N, lay.work(), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(lay.C + lay.template converted<T>());  // the gradient of the fused logits first
    const Rows<In, T> rows{lay.base, lay.stride, lay.slot, scratch.data() + lay.C, lay.C};
    vectorized([&](auto bytes) MLA_LAMBDA {
      backward_samples<bytes>(rows, to, present, w, e, gf, gw, ge, scratch.data(), lay.M, begin, end);
    });
  });
  return grads;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
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
  return {false, true, slot.size(1), slot.size(0), C, rows};
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
  return {dim == 3, false, M, N, C, nullptr};
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
  const Sizes sizes = checked_sizes(logits, present, slot);
  present = contiguous(present);
  const Mask mask(sizes, present);
  return for_dtype(logits[0].scalar_type(), [&](auto in, auto acc) {
    const ScalarType wide = std::is_same_v<decltype(acc), double> ? ScalarType::Double : ScalarType::Float;
    return forward<decltype(in), decltype(acc)>(logits, sizes, mask.get(), wide);
  });
}

std::vector<Tensor> entropy_fusion_backward(
    std::vector<Tensor> logits, std::optional<Tensor> present, Tensor weights, Tensor entropy,
    std::optional<Tensor> grad_fused, std::optional<Tensor> grad_weights, std::optional<Tensor> grad_entropy,
    std::optional<Tensor> slot) {
  const Sizes sizes = checked_sizes(logits, present, slot);
  check_rows("weights", weights, sizes.N, sizes.M);
  check_rows("entropy", entropy, sizes.N, sizes.M);
  check_rows("grad_fused", grad_fused, sizes.N, sizes.C);
  check_rows("grad_weights", grad_weights, sizes.N, sizes.M);
  check_rows("grad_entropy", grad_entropy, sizes.N, sizes.M);
  present = contiguous(present);
  const Mask mask(sizes, present);
  grad_fused = contiguous(grad_fused);
  grad_weights = contiguous(grad_weights);
  grad_entropy = contiguous(grad_entropy);
  weights = torch::stable::contiguous(weights);
  entropy = torch::stable::contiguous(entropy);
  return for_dtype(logits[0].scalar_type(), [&](auto in, auto acc) {
    return backward<decltype(in), decltype(acc)>(
        logits, sizes, mask.get(), weights, entropy, grad_fused, grad_weights, grad_entropy);
  });
}

}  // namespace mla_fast
