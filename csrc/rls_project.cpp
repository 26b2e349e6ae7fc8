// RLS step of the shared head's projection (eqs. 3 and 5), in gradient form:
//
//     k = P x̄        d = x̄ᵀ k        u = k / √(α + d)
//     P⁺ = P − u uᵀ                   G P⁺ = G P − (G u) uᵀ
//
// P is symmetric, so k = Σ_j x̄_j P_j: with x̄ as one more row of G, one reading of P's rows P_j yields both k and G P. u uᵀ
// is bitwise symmetric, hence P stays so.
//
// With `pending`, the last u waits there (the true P is P − pending pendingᵀ) until the next step reads P anyway: each row
// is corrected, stored and used while it is in registers, so a step reads and writes P once. Letting more of them wait, as the
// CUDA kernels do for large P, does not pay here: at s = 512 … 4096 the folding costs what the unwritten P saves.
#include "ops.h"
#include "simd.h"

#include <algorithm>

namespace mla_fast {
namespace {

// Above this many classes a blocked matrix product does better than products with a few rows of P at a time.
constexpr int64_t GEMM_CLASSES = 13;
// Rows of [G; x̄] that are multiplied with a row of P while it is in registers.
constexpr int64_t GROUP = 7;
// Rows of P that are multiplied before their sums are added to the result, which keeps rounding errors short.
constexpr int64_t BLOCK = 32;

// The rows of [G; x̄] and of [G P; k].
template <typename T>
struct Stacked {
  const T *grad, *x_bar;
  T *projected, *k;
  int64_t C, s;

  MLA_INLINE const T* in(int64_t v) const { return v < C ? grad + v * s : x_bar; }
  MLA_INLINE T* out(int64_t v) const { return v < C ? projected + v * s : k; }
};

// N vectors of columns from column i, rows [begin, end) of P, against V rows of [G; x̄]: out[v, i] += Σ_j A[v, j] P[j, i].
// With FOLD the rows of P are first corrected, P[j, i] −= u_j u_i, and stored.
template <typename T, int B, int N, int V, bool FOLD>
MLA_INLINE void multiply_tile(T* P, const T* u, const Stacked<T>& rows, int64_t first, int64_t i, int64_t begin, int64_t end) {
  constexpr int64_t W = Simd<T, B>::width;
  const int64_t s = rows.s;
  const T* A[V];
  for (int v = 0; v < V; ++v) A[v] = rows.in(first + v);
  vec_t<T, B> acc[V][N] = {}, u_i[N], p[N];
  for (int n = 0; n < N && FOLD; ++n) u_i[n] = load<B>(u + i + n * W);
  for (int64_t j = begin; j < end; ++j) {
    T* row = P + j * s + i;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(row + BLOCK * s + n * W, 0, 2);  // the next block, into the second-level cache
      p[n] = load<B>(row + n * W);
      if constexpr (FOLD) store<B>(row + n * W, p[n] = p[n] - u[j] * u_i[n]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[v][n] += A[v][j] * p[n];
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* to = rows.out(first + v) + i + n * W;
      store<B>(to, begin == 0 ? acc[v][n] : load<B>(to) + acc[v][n]);
    }
}

// The tile for as many of the rows from `first` as are left, at most GROUP.
template <typename T, int B, int N, bool FOLD, int V = GROUP>
MLA_INLINE void multiply_group(T* P, const T* u, const Stacked<T>& rows, int64_t first, int64_t i, int64_t begin, int64_t end) {
  if (rows.C + 1 - first >= V) return multiply_tile<T, B, N, V, FOLD>(P, u, rows, first, i, begin, end);
  if constexpr (V > 1) multiply_group<T, B, N, FOLD, V - 1>(P, u, rows, first, i, begin, end);
}

// Columns [i, to) of rows [begin, end) of P against all of [G; x̄]; in ever narrower vectors towards the end of a row.
template <typename T, int B, int N>
MLA_INLINE void multiply_columns(T* P, const T* u, const Stacked<T>& rows, int64_t i, int64_t to, int64_t begin, int64_t end) {
  constexpr int64_t tile = N * Simd<T, B>::width;
  for (; i + tile <= to; i += tile) {
    if (u)
      multiply_group<T, B, N, true>(P, u, rows, 0, i, begin, end);
    else
      multiply_group<T, B, N, false>(P, u, rows, 0, i, begin, end);
    for (int64_t v = GROUP; v <= rows.C; v += GROUP) multiply_group<T, B, N, false>(P, u, rows, v, i, begin, end);
  }
  if constexpr (N > 1)
    multiply_columns<T, B, 1>(P, u, rows, i, to, begin, end);
  else if constexpr (B > sizeof(T))
    multiply_columns<T, B / 2, 1>(P, u, rows, i, to, begin, end);
}

// [G P; k] with P read once, a few rows at a time; P takes up the pending u on the way. By symmetry of P each thread may have
// columns of its own, so there is nothing to add up across threads and their number does not change a bit.
template <typename T>
void read_by_rows(T* P, const T* u, const Stacked<T>& rows) {
  const int64_t s = rows.s, lines = (s + 15) / 16;
  in_parallel(lines, (rows.C + 1) * s * 16, [&](int64_t from, int64_t to) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      constexpr int N = bytes == 64 ? 3 : 1;  // as many accumulators as the machine has registers for
      for (int64_t j = 0; j < s; j += BLOCK)
        multiply_columns<T, bytes, N>(P, u, rows, from * 16, std::min(to * 16, s), j, std::min(j + BLOCK, s));
    });
  });
}

// P ← P − u uᵀ, last row first: what was read last is still in the cache.
template <typename T>
void fold(T* P, const T* u, int64_t s) {
  in_parallel(s, s, [&](int64_t begin, int64_t end) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t j = end - 1; j >= begin; --j) axpy<bytes>(-u[j], u, P + j * s, s);
    });
  });
}

// out ← a b. An out= product, unlike matmul, is left alone by autocast.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
}

template <typename T>
Tensor run(const Tensor& P, const Tensor& x_bar, const Tensor& grad, double alpha, const std::optional<Tensor>& pending, bool project_first) {
  const int64_t s = P.size(0), C = grad.size(0);
  const T* x = x_bar.const_data_ptr<T>();
  const T* G = grad.const_data_ptr<T>();
  T* p = P.mutable_data_ptr<T>();
  T* waiting = pending ? pending->mutable_data_ptr<T>() : nullptr;

  std::vector<T> scratch(C + s);
  T *gk = scratch.data(), *k = gk + C;
  Tensor result = empty(P.scalar_type(), C, s);
  T* projected = result.mutable_data_ptr<T>();
  // With many classes G P is the cost, and a blocked product the way to it; k alone comes from the pass over P then.
  const bool by_gemm = C > GEMM_CLASSES;
  read_by_rows<T>(p, waiting, {G, x, projected, k, by_gemm ? 0 : C, s});
  if (waiting) std::fill(waiting, waiting + s, T(0));  // P has taken it up: should anything below throw, the two still agree
  if (by_gemm) multiply(grad, P, result);

  double d = 0;
  vectorized([&](auto bytes) MLA_LAMBDA { d = dot<bytes>(x, k, s); });
  in_parallel(C, s, [&](int64_t begin, int64_t end) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t c = begin; c < end; ++c) gk[c] = dot<bytes>(G + c * s, k, s);
    });
  });
  // A NaN or Inf anywhere in x̄ shows in d, and one anywhere in G in its row of G k.
  if (!std::isfinite(d) || !std::all_of(gk, gk + C, [](T v) { return std::isfinite(v); })) {
    std::memcpy(projected, G, C * s * sizeof(T));
    return result;
  }
  // P ⪰ 0, so d < 0 is rounding: x̄ is projected away already, and dividing by α + d would only amplify what is left of it.
  const double scale = d > 0 ? 1.0 / std::sqrt(alpha + d) : 0.0;

  T* u = waiting ? waiting : k;
  for (int64_t i = 0; i < s; ++i) u[i] = static_cast<T>(scale * k[i]);
  if (!waiting) fold(p, u, s);
  if (!project_first)
    in_parallel(C, s, [&](int64_t begin, int64_t end) {
      vectorized([&](auto bytes) MLA_LAMBDA {
        for (int64_t c = begin; c < end; ++c) axpy<bytes>(static_cast<T>(-scale * gk[c]), u, projected + c * s, s);
      });
    });
  return result;
}

void check_state(const Tensor& P, const std::optional<Tensor>& pending) {
  STD_TORCH_CHECK(P.dim() == 2 && P.size(0) == P.size(1) && P.is_contiguous(), "rls_project_: P must be contiguous [s, s]");
  STD_TORCH_CHECK(
      P.scalar_type() == ScalarType::Float || P.scalar_type() == ScalarType::Double,
      "rls_project_: P must be float32 or float64");
  STD_TORCH_CHECK(
      !pending || (pending->numel() == P.size(0) && pending->is_contiguous() && pending->scalar_type() == P.scalar_type()),
      "rls_project_: pending must be contiguous [1, s] of P's dtype");
}

template <typename T>
void run_fold(const Tensor& P, const Tensor& pending) {
  const int64_t s = P.size(0);
  T* u = pending.mutable_data_ptr<T>();
  fold(P.mutable_data_ptr<T>(), u, s);
  std::fill(u, u + s, T(0));
}

}  // namespace

Tensor rls_project_(
    Tensor P, Tensor x_bar, Tensor grad, Tensor alpha, std::optional<Tensor> pending, std::optional<Tensor> /* slot, for R > 1 */,
    std::optional<Tensor> found_inf, bool project_first) {
  check_state(P, pending);
  check_matrix_pair("rls_project_", x_bar, grad, P.size(0));
  STD_TORCH_CHECK(P.scalar_type() == grad.scalar_type(), "rls_project_: P and grad must have one dtype");
  STD_TORCH_CHECK(x_bar.dim() == 1, "rls_project_: x_bar must be [s]");
  const double a = scalar<double>("rls_project_: alpha", alpha);
  if (!x_bar.is_contiguous()) x_bar = torch::stable::contiguous(x_bar);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  if (found_inf && scalar<float>("rls_project_: found_inf", *found_inf) != 0) return torch::stable::clone(grad);
  return P.scalar_type() == ScalarType::Float ? run<float>(P, x_bar, grad, a, pending, project_first)
                                              : run<double>(P, x_bar, grad, a, pending, project_first);
}

void rls_fold_(Tensor P, Tensor pending, std::optional<Tensor> /* slot */) {
  check_state(P, pending);
  P.scalar_type() == ScalarType::Float ? run_fold<float>(P, pending) : run_fold<double>(P, pending);
}

}  // namespace mla_fast
