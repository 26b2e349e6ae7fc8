// The head's forward and backward pass in one: mean cross-entropy of one linear layer (eq. 2) and all of its gradients.
//
//     z = H Wᵀ + b      p = softmax(z)      δ = (p − onehot(y)) / total
//     loss = Σ −log p_y / total      ∂L/∂H = δ W      G = δᵀ H      ∂L/∂b = Σ_n δ      x̄ = Σ_n h / N
//
// For heads so small that a dozen operators on matrices this thin take longer than one loop over all; a few rows of H at a time
// are in the first-level cache for all of it, W and G in the second. One thread.
#include "ops.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mla_fast {
namespace {

// Rows of H at a time.
constexpr int ROWS = 8;
// Logits and δ have rows of whole vectors; what is past C is −∞ in logits and 0 in δ.
constexpr int64_t LANES = 16;

// What the rows of a batch are multiplied with, and what they add to.
template <typename T>
struct Layer {
  const T *weight, *bias;
  T *grad, *grad_bias, *x_bar;
  int64_t C, s, stride, N;
};

// z of R rows of H.
template <typename T, int B, int R>
MLA_INLINE void logits(const T* H, const Layer<T>& layer, T* z) {
  constexpr int64_t W = Simd<T, B>::width;
  const int64_t s = layer.s;
  for (int64_t c = 0; c < layer.C; ++c) {
    const T* w = layer.weight + c * s;
    vec_t<T, B> acc[R] = {};
    int64_t i = 0;
    for (; i + W <= s; i += W) {
      const vec_t<T, B> w_i = load<B>(w + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] += load<B>(H + r * s + i) * w_i;
    }
    for (int r = 0; r < R && i < s; ++r) acc[r] += load_part<B>(H + r * s + i, s - i) * load_part<B>(w + i, s - i);
    for (int r = 0; r < R; ++r) z[r * layer.stride + c] = sum<T, B>(acc[r]) + (layer.bias ? layer.bias[c] : T(0));
  }
}

// z of one row becomes δ; returns −log p_y.
template <typename T, int B>
MLA_INLINE T to_delta(T* z, int64_t y, int64_t stride, T total) {
  constexpr int64_t W = Simd<T, B>::width;
  vec_t<T, B> tops = load<B>(z), sums = {};
  for (int64_t c = W; c < stride; c += W) tops = load<B>(z + c) > tops ? load<B>(z + c) : tops;
  const T top = reduce<T, B>(tops, greater), z_y = z[y] - top;
  for (int64_t c = 0; c < stride; c += W) {
    const vec_t<T, B> e = exp_nonpositive<T, B>(load<B>(z + c) - top);
    store<B>(z + c, e);
    sums += e;
  }
  const T all = sum<T, B>(sums), scale = 1 / (all * total);
  for (int64_t c = 0; c < stride; c += W) store<B>(z + c, load<B>(z + c) * scale);
  z[y] -= 1 / total;
  return std::log(all) - z_y;
}

// Columns of R rows from i on: dH = δ W, G += δᵀ H, x̄ += Σ h / N; in ever narrower vectors towards the end of a row.
template <typename T, int B, int R>
MLA_INLINE void gradients(const T* H, const T* delta, const Layer<T>& layer, T* dH, int64_t i) {
  constexpr int64_t W = Simd<T, B>::width;
  const int64_t s = layer.s;
  for (; i + W <= s; i += W) {
    vec_t<T, B> h[R], acc[R] = {}, all = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) all += h[r] = load<B>(H + r * s + i);
    store<B>(layer.x_bar + i, load<B>(layer.x_bar + i) + all / static_cast<T>(layer.N));
    for (int64_t c = 0; c < layer.C; ++c) {
      const vec_t<T, B> w = load<B>(layer.weight + c * s + i);
      vec_t<T, B> g = load<B>(layer.grad + c * s + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T d = delta[r * layer.stride + c];
        acc[r] += d * w;
        g += d * h[r];
      }
      store<B>(layer.grad + c * s + i, g);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store<B>(dH + r * s + i, acc[r]);
  }
  if constexpr (B > sizeof(T)) gradients<T, B / 2, R>(H, delta, layer, dH, i);
}

// R rows forward and backward; their losses' sum.
template <typename T, int B, int R>
MLA_INLINE double pass(const T* H, const int64_t* y, const Layer<T>& layer, T total, T* z, T* dH) {
  double loss = 0;  // of losses that may be far apart
  std::fill(z, z + R * layer.stride, -std::numeric_limits<T>::infinity());
  logits<T, B, R>(H, layer, z);
  for (int r = 0; r < R; ++r) {
    loss += to_delta<T, B>(z + r * layer.stride, y[r], layer.stride, total);
    for (int64_t c = 0; c < layer.C; ++c) layer.grad_bias[c] += z[r * layer.stride + c];
  }
  gradients<T, B, R>(H, z, layer, dH, 0);
  return loss;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Results run(const Tensor& features, const int64_t* y, const Tensor& weight, const std::optional<Tensor>& bias, T total) {
  const int64_t N = features.size(0), s = features.size(1), C = weight.size(0);
  const ScalarType dtype = features.scalar_type();
  Tensor loss = empty(dtype), grad_features = empty(dtype, N, s), grad = empty(dtype, C, s), grad_bias = empty(dtype, C);
  Tensor mean = empty(dtype, s);
  const T *H = features.const_data_ptr<T>(), *W = weight.const_data_ptr<T>(), *b = bias ? bias->const_data_ptr<T>() : nullptr;
  T *dH = grad_features.mutable_data_ptr<T>(), *G = grad.mutable_data_ptr<T>(), *db = grad_bias.mutable_data_ptr<T>();
  T* x_bar = mean.mutable_data_ptr<T>();
  std::fill(G, G + C * s, T(0));
  std::fill(db, db + C, T(0));
  std::fill(x_bar, x_bar + s, T(0));
  const Layer<T> layer{W, b, G, db, x_bar, C, s, (C + LANES - 1) / LANES * LANES, N};
  std::vector<T> z(ROWS * layer.stride);
  double sum = 0;
  vectorized([&](auto bytes) MLA_LAMBDA {
    constexpr int R = bytes == 64 ? ROWS : ROWS / 2;  // as many accumulators as the machine has registers for
    int64_t n = 0;
    for (; n + R <= N; n += R) sum += pass<T, bytes, R>(H + n * s, y + n, layer, total, z.data(), dH + n * s);
    for (; n < N; ++n) sum += pass<T, bytes, 1>(H + n * s, y + n, layer, total, z.data(), dH + n * s);
  });
  *loss.mutable_data_ptr<T>() = static_cast<T>(sum / total);
  return {loss, grad_features, grad, grad_bias, mean};
}

}  // namespace

Results linear_cross_entropy(
    Tensor features, Tensor target, Tensor weight, std::optional<Tensor> bias, double total) {
  STD_TORCH_CHECK(features.dim() == 2 && weight.dim() == 2, "linear_cross_entropy: features must be [N, s] and weight [C, s]");
  const int64_t N = features.size(0), C = weight.size(0);
  STD_TORCH_CHECK(features.size(1) == weight.size(1), "linear_cross_entropy: features and weight must have as many columns");
  STD_TORCH_CHECK(
      features.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == weight.scalar_type()),
      "linear_cross_entropy: features, weight and bias must have one dtype");
  STD_TORCH_CHECK(!bias || bias->numel() == C, "linear_cross_entropy: bias must be [C]");
  STD_TORCH_CHECK(
      target.scalar_type() == ScalarType::Long && target.numel() == N, "linear_cross_entropy: target must be int64 [N]");
  features = torch::stable::contiguous(features);
  weight = torch::stable::contiguous(weight);
  target = torch::stable::contiguous(target);
  if (bias) bias = torch::stable::contiguous(*bias);
  const int64_t* y = target.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(
      std::all_of(y, y + N, [C](int64_t c) { return 0 <= c && c < C; }), "linear_cross_entropy: target must be in 0 ... C - 1");
  if (features.scalar_type() == ScalarType::Float) return run<float>(features, y, weight, bias, static_cast<float>(total));
  STD_TORCH_CHECK(
      features.scalar_type() == ScalarType::Double, "linear_cross_entropy: features must be float32 or float64");
  return run<double>(features, y, weight, bias, total);
}

}  // namespace mla_fast
