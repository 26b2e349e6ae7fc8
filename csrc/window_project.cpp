// Window projection: P = I − U Uᵀ from the latest feature mean of every other modality, never formed as s × s.
//
//     for each mean x̄_j:   k = x̄_j − U (Uᵀ x̄_j)      u_j = k / √(α + x̄_jᵀ k)
//     G P = G − (G U) Uᵀ
//
// The row loop reads a row of G, keeps it in the first-level cache and writes it once.
#include "ops.h"
#include "simd.h"

#include <algorithm>

namespace mla_fast {
namespace {

// U [J, s] (row j is u_j) from means [J, s]; in double, since nearly parallel means leave little of each other.
template <int B>
MLA_INLINE void columns(const double* means, double* U, double alpha, int64_t J, int64_t s) {
  for (int64_t j = 0; j < J; ++j) {
    const double* x = means + j * s;
    double* k = U + j * s;
    std::copy(x, x + s, k);
    for (int64_t i = 0; i < j; ++i) axpy<B>(-dot<B>(U + i * s, x, s), U + i * s, k, s);
    const double left = alpha + std::max(dot<B>(x, k, s), 0.0);
    // What rounding leaves of a mean that depends on others is no mean.
    const double scale = left > 1e-15 * dot<B>(x, x, s) ? 1.0 / std::sqrt(left) : 0.0;
    for (int64_t i = 0; i < s; ++i) k[i] *= scale;
  }
}

// One row of out ← G − (G U) Uᵀ. The columns of U are not orthogonal: every product is with g itself, not with what the
// columns before it left over.
template <typename T, int B>
MLA_INLINE void project_row(const T* g, const T* U, T* out, T* gu, int64_t J, int64_t s) {
  for (int64_t j = 0; j < J; ++j) gu[j] = dot<B>(g, U + j * s, s);
  std::memcpy(out, g, s * sizeof(T));
  for (int64_t j = 0; j < J; ++j) axpy<B>(-gu[j], U + j * s, out, s);
}

// From all rows of means but row `own`, if that is one.
template <typename T>
Tensor run(const Tensor& means, const Tensor& grad, double alpha, int64_t own) {
  const int64_t C = grad.size(0), s = grad.size(1);
  Tensor out = empty(grad.scalar_type(), C, s);
  const T* x = means.const_data_ptr<T>();
  const T* G = grad.const_data_ptr<T>();
  T* projected = out.mutable_data_ptr<T>();
  std::vector<double> wide;
  for (int64_t j = 0; j < means.size(0); ++j)
    if (j != own) wide.insert(wide.end(), x + j * s, x + (j + 1) * s);
  const int64_t J = own < 0 ? means.size(0) : means.size(0) - 1;
  std::vector<double> exact(J * s);
  vectorized([&](auto bytes) MLA_LAMBDA { columns<bytes>(wide.data(), exact.data(), alpha, J, s); });
  const std::vector<T> U(exact.begin(), exact.end());
  in_parallel(C, (2 * J + 1) * s, [&](int64_t begin, int64_t end) {
    std::vector<T> gu(J);
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t c = begin; c < end; ++c) project_row<T, bytes>(G + c * s, U.data(), projected + c * s, gu.data(), J, s);
    });
  });
  return out;
}

Tensor checked_run(const Tensor& means, Tensor grad, const Tensor& alpha, int64_t own) {
  STD_TORCH_CHECK(means.dim() == 2, "window_project: means must be [J, s]");
  check_matrix_pair("window_project", means, grad, means.size(1));
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  const double a = scalar<double>("window_project: alpha", alpha);
  if (grad.scalar_type() == ScalarType::Float) return run<float>(means, grad, a, own);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double, "window_project: grad must be float32 or float64");
  return run<double>(means, grad, a, own);
}

}  // namespace

Tensor window_project(Tensor means, Tensor grad, Tensor alpha) {
  return checked_run(means.is_contiguous() ? means : torch::stable::contiguous(means), grad, alpha, -1);
}

Tensor window_step_(Tensor means, int64_t own, Tensor x_bar, Tensor grad, Tensor alpha, std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(means.is_contiguous() && 0 <= own && own < means.size(0), "window_step_: own must be a row of contiguous means");
  STD_TORCH_CHECK(
      x_bar.numel() == means.size(1) && x_bar.is_contiguous() && x_bar.scalar_type() == means.scalar_type(),
      "window_step_: x_bar must be contiguous [s] of means' dtype");
  Tensor projected = checked_run(means, grad, alpha, own);
  if (!found_inf || scalar<float>("window_step_: found_inf", *found_inf) == 0) {
    const int64_t bytes = means.size(1) * (means.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(double));
    std::memcpy(static_cast<char*>(means.mutable_data_ptr()) + own * bytes, x_bar.const_data_ptr(), bytes);
  }
  return projected;
}

}  // namespace mla_fast
