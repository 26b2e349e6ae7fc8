// RLS step of the shared head's projection (eqs. 3 and 5), in gradient form:
//
//     k = P x̄        d = x̄ᵀ k        u = k / √(α + d)
//     P⁺ = P − u uᵀ                   G P⁺ = G P − (G u) uᵀ
//
// P is symmetric, so row j of P alone yields k_j and column j of G P: both come out of one reading of P, with x̄ as one
// more row of G. u uᵀ is bitwise symmetric, hence P stays so.
//
// With `pending`, the last u waits there (the true P is P − pending pendingᵀ) until the next step reads P anyway: each row
// is corrected, stored and used while it is in registers, so a step reads and writes P once.
#include "ops.h"
#include "simd.h"

#include <algorithm>

namespace mla_fast {
namespace {

// Above this many rows of [G; x̄] a blocked matrix product does better than products with one row of P at a time.
constexpr int64_t GEMM_ROWS = 14;
// Rows of [G; x̄] that are multiplied with a row of P while it is in registers.
constexpr int64_t GROUP = 7;
// How far ahead of its use P is fetched, in bytes: about what one core can have under way.
constexpr int64_t AHEAD = 1 << 12;

// Rows of `work` elements each that are worth a thread of their own.
int64_t grain(int64_t work) {
  return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(work, 1));
}

// [G; x̄] regrouped for the loop below: V rows at a time, a vector of each beside the other, the tail filled with zeros.
// Rows that lie a power of two apart would otherwise compete for the same few cache lines.
template <typename T, int B>
MLA_INLINE void pack_rows(const T* x_bar, const T* grad, int64_t rows, int64_t s, int64_t padded, T* packed) {
  constexpr int64_t W = Simd<T, B>::width;
  for (int64_t first = 0; first < rows; first += GROUP) {
    const int64_t V = std::min<int64_t>(GROUP, rows - first);
    for (int64_t v = 0; v < V; ++v) {
      const T* row = first + v + 1 == rows ? x_bar : grad + (first + v) * s;
      T* to = packed + first * padded + v * W;
      for (int64_t i = 0; i < s; i += W) store<B>(to + i * V, i + W <= s ? load<B>(row + i) : load_part<B>(row + i, s - i));
    }
  }
}

// R rows of P from row j, each ← row − u_j u if FOLD, against V packed rows A: out[v, j] = Σ_i P[j, i] A[v, i].
template <typename T, int B, int R, int V, bool FOLD>
MLA_INLINE void dot_tile(T* P, const T* u, const T* A, T* out, int64_t j, int64_t s) {
  constexpr int64_t W = Simd<T, B>::width;
  T* row = P + j * s;
  vec_t<T, B> acc[V][R] = {};
  int64_t i = 0;
  for (; i + W <= s; i += W) {
    vec_t<T, B> p[R];
    for (int r = 0; r < R; ++r) {
      // The rows of a tile follow each other in memory, and so do the tiles: one stream.
      __builtin_prefetch(reinterpret_cast<const char*>(row + i * R + r * W) + AHEAD, FOLD);
      p[r] = load<B>(row + r * s + i);
      if constexpr (FOLD) store<B>(row + r * s + i, p[r] = p[r] - u[j + r] * load<B>(u + i));
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      vec_t<T, B> a = load<B>(A + i * V + v * W);
      if constexpr (R > 1) MLA_KEEP_IN_REGISTER(a);
      for (int r = 0; r < R; ++r) acc[v][r] += p[r] * a;
    }
  }
  if (i < s)
    for (int r = 0; r < R; ++r) {
      if constexpr (FOLD)
        for (int64_t t = i; t < s; ++t) row[r * s + t] -= u[j + r] * u[t];
      const vec_t<T, B> p = load_part<B>(row + r * s + i, s - i);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[v][r] += p * load<B>(A + i * V + v * W);
    }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
    for (int r = 0; r < R; ++r) out[v * s + j + r] = sum<T, B>(acc[v][r]);
}

template <typename T, int B, int R, bool FOLD, int V = GROUP>
MLA_INLINE void dot_group(T* P, const T* u, const T* A, T* out, int64_t rows, int64_t j, int64_t s) {
  if (rows >= V) return dot_tile<T, B, R, V, FOLD>(P, u, A, out, j, s);
  if constexpr (V > 1) dot_group<T, B, R, FOLD, V - 1>(P, u, A, out, rows, j, s);
}

// R rows of P against all of [G; x̄].
template <typename T, int B, int R>
MLA_INLINE void read_tile(T* P, const T* u, const T* packed, T* out, int64_t rows, int64_t j, int64_t s, int64_t padded) {
  if (u)
    dot_group<T, B, R, true>(P, u, packed, out, rows, j, s);
  else
    dot_group<T, B, R, false>(P, u, packed, out, rows, j, s);
  for (int64_t v = GROUP; v < rows; v += GROUP)
    dot_group<T, B, R, false>(P, u, packed + v * padded, out + v * s, rows - v, j, s);
}

// [G P; k] row by row of P, which takes up the pending u on the way.
template <typename T>
void read_by_rows(T* P, const T* u, const T* x_bar, const T* grad, T* out, int64_t C, int64_t s) {
  const int64_t rows = C + 1, padded = (s + 15) / 16 * 16;
  AlignedBuffer<T> buffer(rows * padded);
  T* packed = buffer.data();
  vectorized([&](auto bytes) MLA_LAMBDA { pack_rows<T, bytes>(x_bar, grad, rows, s, padded, packed); });
  torch::stable::parallel_for(0, s, grain(rows * s), [&](int64_t begin, int64_t end) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      constexpr int R = bytes == 64 ? 2 : 1;  // as many accumulators as the machine has registers for
      int64_t j = begin;
      for (; j + R <= end; j += R) read_tile<T, bytes, R>(P, u, packed, out, rows, j, s, padded);
      for (; j < end; ++j) read_tile<T, bytes, 1>(P, u, packed, out, rows, j, s, padded);
    });
  });
}

// [G P; k] by one blocked product of the stacked rows [G; x̄].
template <typename T>
Tensor read_by_gemm(const Tensor& P, const T* x_bar, const T* grad, int64_t C, int64_t s) {
  Tensor stacked = empty_matrix(C + 1, s, P.scalar_type());
  T* rows = stacked.mutable_data_ptr<T>();
  std::memcpy(rows, grad, C * s * sizeof(T));
  std::memcpy(rows + C * s, x_bar, s * sizeof(T));
  return torch::stable::matmul(stacked, P);
}

// P ← P − u uᵀ, last row first: what was read last is still in the cache.
template <typename T>
void fold(T* P, const T* u, int64_t s) {
  torch::stable::parallel_for(0, s, grain(s), [&](int64_t begin, int64_t end) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t j = end - 1; j >= begin; --j) axpy<bytes>(-u[j], u, P + j * s, s);
    });
  });
}

template <typename T>
Tensor run(const Tensor& P, const Tensor& x_bar, const Tensor& grad, double alpha, const std::optional<Tensor>& pending, bool project_first) {
  const int64_t s = P.size(0), C = grad.size(0);
  const T* x = x_bar.const_data_ptr<T>();
  const T* G = grad.const_data_ptr<T>();
  T* p = P.mutable_data_ptr<T>();
  T* waiting = pending ? pending->mutable_data_ptr<T>() : nullptr;

  const bool by_gemm = C + 1 > GEMM_ROWS;
  if (by_gemm && waiting) fold(p, waiting, s);
  Tensor read = by_gemm ? read_by_gemm<T>(P, x, G, C, s) : empty_matrix(C + 1, s, P.scalar_type());
  T* projected = read.mutable_data_ptr<T>();
  T* k = projected + C * s;
  if (!by_gemm) read_by_rows<T>(p, waiting, x, G, projected, C, s);

  double d = 0;
  vectorized([&](auto bytes) MLA_LAMBDA { d = dot<bytes>(x, k, s); });
  std::vector<T> gk(C);
  torch::stable::parallel_for(0, C, grain(s), [&](int64_t begin, int64_t end) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t c = begin; c < end; ++c) gk[c] = dot<bytes>(G + c * s, k, s);
    });
  });
  // A NaN or Inf anywhere in x̄ shows in d, and one anywhere in G in its row of G k.
  double scale = 1.0 / std::sqrt(alpha + d);
  const bool rejected = !std::isfinite(scale) || !std::all_of(gk.begin(), gk.end(), [](T v) { return std::isfinite(v); });
  if (rejected) {
    std::memcpy(projected, G, C * s * sizeof(T));
    if (waiting) std::fill(waiting, waiting + s, T(0));
    return first_rows(read, C);
  }

  T* u = waiting ? waiting : k;
  for (int64_t i = 0; i < s; ++i) u[i] = static_cast<T>(scale * k[i]);
  if (!waiting) fold(p, u, s);
  if (!project_first)
    torch::stable::parallel_for(0, C, grain(s), [&](int64_t begin, int64_t end) {
      vectorized([&](auto bytes) MLA_LAMBDA {
        for (int64_t c = begin; c < end; ++c) axpy<bytes>(static_cast<T>(-scale * gk[c]), u, projected + c * s, s);
      });
    });
  return first_rows(read, C);
}

void check_state(const Tensor& P, const std::optional<Tensor>& pending) {
  STD_TORCH_CHECK(P.dim() == 2 && P.size(0) == P.size(1) && P.is_contiguous(), "rls_project_: P must be contiguous [s, s]");
  STD_TORCH_CHECK(
      P.scalar_type() == ScalarType::Float || P.scalar_type() == ScalarType::Double,
      "rls_project_: P must be float32 or float64");
  STD_TORCH_CHECK(
      !pending || (pending->numel() == P.size(0) && pending->is_contiguous() && pending->scalar_type() == P.scalar_type()),
      "rls_project_: pending must be contiguous [s] of P's dtype");
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
    Tensor P, Tensor x_bar, Tensor grad, Tensor alpha, std::optional<Tensor> pending, std::optional<Tensor> found_inf, bool project_first) {
  check_state(P, pending);
  check_matrix_pair("rls_project_", x_bar, grad, P.size(0));
  STD_TORCH_CHECK(P.scalar_type() == grad.scalar_type(), "rls_project_: P and grad must have one dtype");
  if (found_inf && *found_inf->const_data_ptr<float>() != 0) return torch::stable::clone(grad);
  if (!x_bar.is_contiguous()) x_bar = torch::stable::contiguous(x_bar);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  const double a = *alpha.const_data_ptr<double>();
  return P.scalar_type() == ScalarType::Float ? run<float>(P, x_bar, grad, a, pending, project_first)
                                              : run<double>(P, x_bar, grad, a, pending, project_first);
}

void rls_fold_(Tensor P, Tensor pending) {
  check_state(P, pending);
  P.scalar_type() == ScalarType::Float ? run_fold<float>(P, pending) : run_fold<double>(P, pending);
}

}  // namespace mla_fast
