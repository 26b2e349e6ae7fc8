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

// One row of out ← G − (G U) Uᵀ, out being g itself or elsewhere. The columns of U are not orthogonal: every product is with g
// itself, not with what the columns before it left over.
template <typename T, int B>
MLA_INLINE void project_row(const T* g, const T* U, T* out, T* gu, int64_t J, int64_t s) {
  for (int64_t j = 0; j < J; ++j) gu[j] = dot<B>(g, U + j * s, s);
  if (out != g) std::memcpy(out, g, s * sizeof(T));
  for (int64_t j = 0; j < J; ++j) axpy<B>(-gu[j], U + j * s, out, s);
}

// G [C, s] → projected [C, s], which may be G, from all rows of means but row `own`, if that is one; squares [C]: ‖·‖² of the
// projected rows, if wanted.
template <typename T>
void run(const Tensor& means, const T* G, T* projected, T* squares, int64_t C, double alpha, int64_t own) {
  const int64_t s = means.size(1);
  const T* x = means.const_data_ptr<T>();
  std::vector<double> wide;
  for (int64_t j = 0; j < means.size(0); ++j)
    if (j != own) wide.insert(wide.end(), x + j * s, x + (j + 1) * s);
  const int64_t J = own < 0 ? means.size(0) : means.size(0) - 1;
  std::vector<double> exact(J * s);
  vectorized([&](auto bytes) MLA_LAMBDA { columns<bytes>(wide.data(), exact.data(), alpha, J, s); });
  // Half a page away from where a row of G begins if both begin pages: a load that has its last 12 bits in common with a store
  // just before it waits for it, which at s = 8192 takes as long again as the rest.
  constexpr int64_t apart = 2048 / sizeof(T);
  std::vector<T> padded(apart + J * s);
  T* U = padded.data() + apart;
  std::copy(exact.begin(), exact.end(), U);
  in_parallel(C, 0.12 * static_cast<double>((2 * J + 1) * s), [&](int64_t begin, int64_t end) {
    std::vector<T> gu(J);
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t c = begin; c < end; ++c) {
        T* row = projected + c * s;
        project_row<T, bytes>(G + c * s, U, row, gu.data(), J, s);
        if (squares) squares[c] = dot<bytes>(row, row, s);
      }
    });
  });
}

// Calls f with a number of the dtype that means and grad share, if that is float32 or float64.
template <class F>
void checked(const char* op, const Tensor& means, const Tensor& grad, const F& f) {
  STD_TORCH_CHECK(means.dim() == 2, op, ": means must be [J, s]");
  check_matrix_pair(op, means, grad, means.size(1));
  if (grad.scalar_type() == ScalarType::Float) return f(float());
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double, op, ": grad must be float32 or float64");
  f(double());
}

}  // namespace

Tensor window_project(Tensor means, Tensor grad, Tensor alpha) {
  if (!means.is_contiguous()) means = torch::stable::contiguous(means);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  const double a = scalar<double>("window_project: alpha", alpha);
  std::optional<Tensor> out;
  checked("window_project", means, grad, [&](auto number) {
    using T = decltype(number);
    out = empty(grad.scalar_type(), grad.size(0), grad.size(1));
    run<T>(means, grad.const_data_ptr<T>(), out->mutable_data_ptr<T>(), nullptr, grad.size(0), a, -1);
  });
  return *out;
}

// gram is the GPU's affair: in double, forming it anew each time is a small part of a step here, and its columns are orthogonalised,
// not solved for.
Tensor window_step_(
    Tensor means,
    Tensor gram,
    int64_t own,
    Tensor x_bar,
    Tensor grad,
    Tensor alpha,
    std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(means.is_contiguous() && 0 <= own && own < means.size(0), "window_step_: own must be a row of contiguous means");
  STD_TORCH_CHECK(grad.is_contiguous(), "window_step_: grad, updated in place, must be contiguous");
  STD_TORCH_CHECK(
      x_bar.numel() == means.size(1) && x_bar.is_contiguous() && x_bar.scalar_type() == means.scalar_type(),
      "window_step_: x_bar must be contiguous [s] of means' dtype");
  const bool bad = found_inf && scalar<float>("window_step_: found_inf", *found_inf) != 0;
  const double a = scalar<double>("window_step_: alpha", alpha);
  std::optional<Tensor> squares;
  checked("window_step_", means, grad, [&](auto number) {
    using T = decltype(number);
    const int64_t C = grad.size(0), s = grad.size(1);
    T* G = grad.mutable_data_ptr<T>();
    squares = empty(grad.scalar_type(), C);
    T* sums = squares->mutable_data_ptr<T>();
    if (bad) {
      for (int64_t c = 0; c < C; ++c) sums[c] = dot<16>(G + c * s, G + c * s, s);
      return;
    }
    run<T>(means, G, G, sums, C, a, own);
    std::memcpy(means.mutable_data_ptr<T>() + own * s, x_bar.const_data_ptr<T>(), s * sizeof(T));
  });
  return *squares;
}

}  // namespace mla_fast
