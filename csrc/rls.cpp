// RLS step of the shared head's projection (eqs. 3 and 5), in gradient form:
//
//     k = P x̄        d = x̄ᵀ k        u = k / √(α + d)
//     P⁺ = P − u uᵀ                   G P⁺ = G P − (G u) uᵀ
//
// P is symmetric, and u uᵀ bitwise so, hence P stays so. With x̄ as one more row of A = [G; x̄], one reading of P's upper
// triangle yields both k and G P: what is right of the diagonal counts once as it stands and once mirrored.
//
// With `pending`, the last u waits there (the true P is P − pending pendingᵀ) until the next step, which reads P anyway and
// corrects, stores and uses it while it is in registers. With `slot` too, the lower triangle waits as well: slot[0] says that
// it is out of date, and a step reads and writes half of P once. Letting more than one u wait, as the CUDA kernels do for large
// P, does not pay here: at s = 512 … 4096 the folding costs what the unwritten P saves.
#include "ops.h"
#include "simd.h"

#include <algorithm>

namespace mla_fast {
namespace {

// Above this many classes a blocked matrix product on all of P does better than the triangle.
constexpr int64_t GEMM_CLASSES = 20;
// P in square blocks: those on the diagonal and to its right are the upper triangle, those on the diagonal are kept whole.
constexpr int64_t SIDE = 64;

// A and A P in blocks of SIDE columns, all rows of a block side by side, so that a block's share stays in the first-level
// cache whatever s is. Zeros follow column s. A's blocks have u as one more row, for the correction.
template <typename T>
struct Packed {
  T *A, *AP;
  int64_t rows;

  MLA_INLINE T* operand(int64_t block) const { return A + block * (rows + 1) * SIDE; }
  MLA_INLINE T* result(int64_t block) const { return AP + block * rows * SIDE; }
};

template <typename T, int B>
struct Tile {
  static constexpr int64_t W = Simd<T, B>::width;
  static constexpr int N = B == 64 ? 4 : 2;  // vectors of columns: R N of P and what they meet fill the registers
  static constexpr int R = W < 4 ? W : 4;    // rows
};

// A tile of P at `p` against all rows of A: AP[v, i] += Σ_j A[v, j] P[j, i], and with MIRRORED the same of Pᵀ into dots,
// dots[v W + j] += A[v, i] P[j, i], whose lanes are still to be added up. a_j and a_i are A at the tile's rows and columns. With
// FOLD the tile is first corrected, P[j, i] −= u_j u_i, and stored.
template <typename T, int B, bool FOLD, bool MIRRORED>
MLA_INLINE void multiply_tile(
    T* p, int64_t stride, int64_t ahead, const T* a_j, const T* a_i, T* AP, vec_t<T, B>* dots, int64_t rows) {
  constexpr int64_t W = Tile<T, B>::W;
  constexpr int N = Tile<T, B>::N, R = Tile<T, B>::R;
  const T *u_j = a_j + rows * SIDE, *u_i = a_i + rows * SIDE;
  vec_t<T, B> tile[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* at = p + r * stride + n * W;
      __builtin_prefetch(at + ahead, 0, 2);  // into the second-level cache
      tile[r][n] = load<B>(at);
      if constexpr (FOLD) store<B>(at, tile[r][n] = tile[r][n] - u_j[r] * load<B>(u_i + n * W));
    }
  for (int64_t v = 0; v < rows; ++v, a_j += SIDE, a_i += SIDE, AP += SIDE, dots += W) {
    vec_t<T, B> sum[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] = load<B>(AP + n * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[n] += a_j[r] * tile[r][n];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store<B>(AP + n * W, sum[n]);
    if constexpr (MIRRORED) {
      vec_t<T, B> dot[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dot[r] = dots[r];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) dot[r] += load<B>(a_i + n * W) * tile[r][n];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dots[r] = dot[r];
    }
  }
}

// R rows of a block of P, from row j and column i of P on; by way of a copy where P ends within them.
template <typename T, int B, bool FOLD, bool MIRRORED>
MLA_INLINE void multiply_rows(T* P, int64_t s, int64_t j, int64_t i, const T* a_j, const T* a_i, T* AP, vec_t<T, B>* dots, int64_t rows) {
  constexpr int64_t R = Tile<T, B>::R, columns = Tile<T, B>::N * Tile<T, B>::W;
  const int64_t height = std::min(R, s - j), width = std::min(SIDE, s - i);
  T edge[R * SIDE], *p = P + j * s + i;
  const bool whole = height == R && width == SIDE;
  if (!whole) {
    std::fill(edge, edge + R * SIDE, T(0));
    for (int64_t r = 0; r < height; ++r) std::memcpy(edge + r * SIDE, p + r * s, width * sizeof(T));
  }
  for (int64_t n = 0; n < SIDE; n += columns)
    multiply_tile<T, B, FOLD, MIRRORED>(
        (whole ? p : edge) + n, whole ? s : SIDE, whole ? R * s : 0, a_j, a_i + n, AP + n, dots, rows);
  if (FOLD && !whole)
    for (int64_t r = 0; r < height; ++r) std::memcpy(p + r * s, edge + r * SIDE, width * sizeof(T));
}

// The blocks of the upper triangle in block row J.
template <typename T, int B, bool FOLD>
MLA_INLINE void multiply_panel(T* P, int64_t s, int64_t J, const Packed<T>& packed) {
  constexpr int64_t W = Tile<T, B>::W;
  vec_t<T, B> dots[(GEMM_CLASSES + 1) * W];
  const int64_t first = J * SIDE, end = std::min(s, first + SIDE), rows = packed.rows;
  const bool mirrored = end < s;
  for (int64_t q = first; q < end; q += W) {  // as many rows as one vector has lanes
    if (mirrored) std::fill(dots, dots + rows * W, vec_t<T, B>{});
    for (int64_t j = q; j < std::min(q + W, end); j += Tile<T, B>::R) {
      const T* a_j = packed.operand(J) + (j - first);
      multiply_rows<T, B, FOLD, false>(P, s, j, first, a_j, packed.operand(J), packed.result(J), dots, rows);
      for (int64_t I = J + 1; I * SIDE < s; ++I)
        multiply_rows<T, B, FOLD, true>(P, s, j, I * SIDE, a_j, packed.operand(I), packed.result(I), dots + (j - q), rows);
    }
    for (int64_t v = 0; v < rows && mirrored; ++v) {
      T* to = packed.result(J) + v * SIDE + (q - first);
      store<B>(to, load<B>(to) + sums<T, B>(dots + v * W));
    }
  }
}

// Zeros, aligned to a cache line.
template <typename T>
struct Zeros {
  struct alignas(64) Line {
    T values[64 / sizeof(T)];
  };
  std::vector<Line> lines;
  explicit Zeros(int64_t n) : lines((n * sizeof(T) + 63) / 64) {}
  T* data() { return lines.data()->values; }
};

// [G P; k] from the upper triangle of P, which takes up the pending u on the way, and with fold_left the rest of P, too. The
// block rows are dealt out, long and short ones alike, to parts that sum by themselves; how many parts depends on s alone, so
// the number of threads does not change a bit.
template <typename T>
void multiply_triangle(T* P, int64_t s, const T* u, bool fold_left, const T* G, const T* x_bar, int64_t C, T* GP, T* k) {
  const int64_t blocks = (s + SIDE - 1) / SIDE, rows = C + 1, parts = std::clamp<int64_t>(s / 256, 1, 16);
  const int64_t size = blocks * rows * SIDE;  // of A P
  Zeros<T> A(size + blocks * SIDE), AP(parts * size);
  const Packed<T> packed{A.data(), AP.data(), rows};
  for (int64_t b = 0, i = 0; b < blocks; ++b, i += SIDE)
    for (int64_t v = 0; v <= rows; ++v)
      if (const T* from = v < C ? G + v * s : v == C ? x_bar : u)
        std::copy_n(from + i, std::min(SIDE, s - i), packed.operand(b) + v * SIDE);
  const double ns = 0.04 * static_cast<double>((rows + 2) * s * s) / static_cast<double>(parts);
  in_parallel(parts, ns, [&](int64_t begin, int64_t end) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t part = begin; part < end; ++part) {
        const Packed<T> own{packed.A, packed.AP + part * size, rows};
        for (int64_t round = 0; round < blocks; round += 2 * parts)
          for (const int64_t J : {round + part, round + 2 * parts - 1 - part}) {
            if (J >= blocks) break;
            if (u)
              multiply_panel<T, bytes, true>(P, s, J, own);
            else
              multiply_panel<T, bytes, false>(P, s, J, own);
            if (fold_left)
              for (int64_t j = J * SIDE; j < std::min(s, (J + 1) * SIDE); ++j) axpy<bytes>(-u[j], u, P + j * s, J * SIDE);
          }
      }
    });
  });
  for (int64_t b = 0, i = 0; b < blocks; ++b, i += SIDE)
    for (int64_t v = 0; v < rows; ++v) {
      T* to = (v < C ? GP + v * s : k) + i;
      const T* from = packed.result(b) + v * SIDE;
      const int64_t width = std::min(SIDE, s - i);
      std::copy_n(from, width, to);
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t n = 0; n < width; ++n) to[n] += from[part * size + n];
    }
}

// P ← P − u uᵀ, last row first: what was read last is still in the cache.
template <typename T>
void fold(T* P, int64_t s, const T* u) {
  in_parallel(s, 0.2 * static_cast<double>(s), [&](int64_t begin, int64_t end) {
    vectorized([&](auto bytes) MLA_LAMBDA {
      for (int64_t j = end - 1; j >= begin; --j) axpy<bytes>(-u[j], u, P + j * s, s);
    });
  });
}

// The blocks left of the diagonal from those above it.
template <typename T>
void mirror(T* P, int64_t s) {
  const int64_t blocks = (s + SIDE - 1) / SIDE;
  in_parallel(blocks, 0.5 * static_cast<double>(SIDE * s), [&](int64_t begin, int64_t end) {
    for (int64_t J = begin; J < end; ++J)
      for (int64_t I = 0; I < J; ++I)
        for (int64_t j = J * SIDE; j < std::min(s, (J + 1) * SIDE); ++j)
          for (int64_t i = I * SIDE; i < (I + 1) * SIDE; ++i) P[j * s + i] = P[i * s + j];
  });
}

// Up to so many multiplications G P is done here: a library's product wakes threads for any size, which for s = 128 and 101 classes
// takes as long as all the rest (on an EPYC 84 µs with one thread, 135 with two).
constexpr int64_t SMALL = 8'000'000;

// out ← G P, of at least ROWS classes, by panels of P's columns, copied to where their rows follow each other. Each number is a sum
// over P's rows from the first to the last; the last rows of G overlap those before them.
template <typename T, int B>
MLA_INLINE void multiply_small(const T* G, const T* P, T* out, int64_t s, int64_t C) {
  constexpr int ROWS = 6, N = Tile<T, B>::N;  // sums that fill the registers
  constexpr int64_t W = Simd<T, B>::width, WIDTH = N * W;
  Zeros<T> copy(s * WIDTH);
  T* panel = copy.data();
  for (int64_t i = 0; i < s; i += WIDTH) {
    const int64_t width = std::min(WIDTH, s - i);
    for (int64_t j = 0; j < s; ++j)
      if (width == WIDTH)
        std::memcpy(panel + j * WIDTH, P + j * s + i, WIDTH * sizeof(T));  // of a size that the compiler knows
      else
        std::memcpy(panel + j * WIDTH, P + j * s + i, width * sizeof(T));
    for (int64_t c = 0; c < C; c += ROWS) {
      const int64_t row = std::min(c, C - ROWS) * s;
      vec_t<T, B> sum[ROWS][N] = {};
      for (int64_t j = 0; j < s; ++j)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sum[r][n] += G[row + r * s + j] * load<B>(panel + j * WIDTH + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        T sums[WIDTH];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store<B>(sums + n * W, sum[r][n]);
        std::memcpy(out + row + r * s + i, sums, width * sizeof(T));
      }
    }
  }
}

// out ← a b. An out= product, unlike matmul, is left alone by autocast.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
}

template <typename T>
Tensor run(
    const Tensor& P, const Tensor& x_bar, const Tensor& grad, double alpha, const std::optional<Tensor>& pending,
    const std::optional<Tensor>& slot, bool project_first) {
  const int64_t s = P.size(0), C = grad.size(0);
  const T* x = x_bar.const_data_ptr<T>();
  const T* G = grad.const_data_ptr<T>();
  T* p = P.mutable_data_ptr<T>();
  T* waiting = pending ? pending->mutable_data_ptr<T>() : nullptr;
  int32_t* stale = slot ? slot->mutable_data_ptr<int32_t>() : nullptr;  // whether P's lower triangle is out of date

  std::vector<T> scratch(C + s);
  T *gk = scratch.data(), *k = gk + C;
  Tensor result = empty(P.scalar_type(), C, s);
  T* projected = result.mutable_data_ptr<T>();
  const bool by_gemm = C > GEMM_CLASSES;  // with many classes G P is the cost, and a blocked product the way to it
  const bool upper_only = stale && !by_gemm;
  if (stale && *stale && !upper_only) mirror(p, s);
  multiply_triangle(p, s, waiting, waiting && !upper_only, G, x, by_gemm ? 0 : C, projected, k);
  if (stale) *stale = upper_only;
  if (waiting) std::fill(waiting, waiting + s, T(0));  // P has taken it up: should anything below throw, the two still agree
  if (by_gemm && C * s * s <= SMALL)
    vectorized([&](auto bytes) MLA_LAMBDA { multiply_small<T, bytes>(G, p, projected, s, C); });
  else if (by_gemm)
    multiply(grad, P, result);

  double d = 0;
  vectorized([&](auto bytes) MLA_LAMBDA { d = dot<bytes>(x, k, s); });
  in_parallel(C, 0.1 * static_cast<double>(s), [&](int64_t begin, int64_t end) {
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
  if (!waiting) fold(p, s, u);
  if (!project_first)
    in_parallel(C, 0.1 * static_cast<double>(s), [&](int64_t begin, int64_t end) {
      vectorized([&](auto bytes) MLA_LAMBDA {
        for (int64_t c = begin; c < end; ++c) axpy<bytes>(static_cast<T>(-scale * gk[c]), u, projected + c * s, s);
      });
    });
  return result;
}

void check_state(const Tensor& P, const std::optional<Tensor>& pending, const std::optional<Tensor>& slot) {
  STD_TORCH_CHECK(P.dim() == 2 && P.size(0) == P.size(1) && P.is_contiguous(), "rls_project_: P must be contiguous [s, s]");
  STD_TORCH_CHECK(
      P.scalar_type() == ScalarType::Float || P.scalar_type() == ScalarType::Double,
      "rls_project_: P must be float32 or float64");
  STD_TORCH_CHECK(
      !pending || (pending->numel() == P.size(0) && pending->is_contiguous() && pending->scalar_type() == P.scalar_type()),
      "rls_project_: pending must be contiguous [1, s] of P's dtype");
  STD_TORCH_CHECK(
      !slot || (slot->numel() == 2 && slot->is_contiguous() && slot->scalar_type() == ScalarType::Int && pending),
      "rls_project_: slot must be contiguous int32 [2], and come with pending");
}

template <typename T>
void run_fold(const Tensor& P, const Tensor& pending, const std::optional<Tensor>& slot) {
  const int64_t s = P.size(0);
  T *p = P.mutable_data_ptr<T>(), *u = pending.mutable_data_ptr<T>();
  if (slot) {
    int32_t* stale = slot->mutable_data_ptr<int32_t>();
    if (*stale) mirror(p, s);
    *stale = 0;
  }
  fold(p, s, u);
  std::fill(u, u + s, T(0));
}

}  // namespace

Tensor rls_project_(
    Tensor P, Tensor x_bar, Tensor grad, Tensor alpha, std::optional<Tensor> pending, std::optional<Tensor> slot,
    std::optional<Tensor> found_inf, bool project_first) {
  check_state(P, pending, slot);
  check_matrix_pair("rls_project_", x_bar, grad, P.size(0));
  STD_TORCH_CHECK(P.scalar_type() == grad.scalar_type(), "rls_project_: P and grad must have one dtype");
  STD_TORCH_CHECK(x_bar.dim() == 1, "rls_project_: x_bar must be [s]");
  const double a = scalar<double>("rls_project_: alpha", alpha);
  if (!x_bar.is_contiguous()) x_bar = torch::stable::contiguous(x_bar);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  if (found_inf && scalar<float>("rls_project_: found_inf", *found_inf) != 0) return torch::stable::clone(grad);
  return P.scalar_type() == ScalarType::Float ? run<float>(P, x_bar, grad, a, pending, slot, project_first)
                                              : run<double>(P, x_bar, grad, a, pending, slot, project_first);
}

void rls_fold_(Tensor P, Tensor pending, std::optional<Tensor> slot) {
  check_state(P, pending, slot);
  P.scalar_type() == ScalarType::Float ? run_fold<float>(P, pending, slot) : run_fold<double>(P, pending, slot);
}

}  // namespace mla_fast
