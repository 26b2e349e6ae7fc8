// The arithmetic every CPU operator is written in: vectors of GCC's and Clang's own extension, so that one source serves
// AVX-512, AVX2, SSE2 and NEON. A kernel is a template on the vector size in bytes; `vectorized` calls it with the widest
// one this machine has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// A kernel is compiled for the machine it was chosen for only if it is inlined into `vectorized`, lambdas included.
#define MLA_INLINE inline __attribute__((always_inline))
#define MLA_LAMBDA __attribute__((always_inline))

namespace mla_fast {

template <int B>
using Bytes = std::integral_constant<int, B>;

#if defined(__x86_64__)
template <class Kernel>
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))) void with_avx512(const Kernel& kernel) {
  kernel(Bytes<64>{});
}

template <class Kernel>
__attribute__((target("avx2,fma"))) void with_avx2(const Kernel& kernel) {
  kernel(Bytes<32>{});
}

inline int widest_vector() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  return avx2 && avx512 ? 64 : avx2 ? 32 : 16;
}

template <class Kernel>
void vectorized(const Kernel& kernel) {
  static const int bytes = widest_vector();
  if (bytes == 64) return with_avx512(kernel);
  if (bytes == 32) return with_avx2(kernel);
  kernel(Bytes<16>{});
}
#else
template <class Kernel>
void vectorized(const Kernel& kernel) {
  kernel(Bytes<16>{});
}
#endif

template <typename T, int B>
struct Simd {
  typedef T vec __attribute__((vector_size(B)));
  static constexpr int64_t width = B / sizeof(T);
};

template <typename T, int B>
using vec_t = typename Simd<T, B>::vec;

template <int B, typename T>
MLA_INLINE vec_t<T, B> load(const T* from) {
  vec_t<T, B> v;
  std::memcpy(&v, from, B);
  return v;
}

// The first n elements of a vector, the others `fill`.
template <int B, typename T>
MLA_INLINE vec_t<T, B> load_part(const T* from, int64_t n, T fill = 0) {
  vec_t<T, B> v = vec_t<T, B>{} + fill;
  std::memcpy(&v, from, n * sizeof(T));
  return v;
}

template <int B, typename T>
MLA_INLINE void store(T* to, vec_t<T, B> v) {
  std::memcpy(to, &v, B);
}

// All lanes combined by `op`, by halves.
template <typename T, int B, class Op>
MLA_INLINE T reduce(vec_t<T, B> v, const Op& op) {
  if constexpr (B == 2 * sizeof(T)) {
    return op(v[0], v[1]);
  } else {
    vec_t<T, B / 2> half[2];
    std::memcpy(half, &v, B);
    return reduce<T, B / 2>(op(half[0], half[1]), op);
  }
}

template <typename T, int B>
MLA_INLINE T sum(vec_t<T, B> v) {
  return reduce<T, B>(v, [](auto a, auto b) MLA_LAMBDA { return a + b; });
}

template <typename T, int B>
MLA_INLINE T maximum(vec_t<T, B> v) {
  return reduce<T, B>(v, [](auto a, auto b) MLA_LAMBDA { return a > b ? a : b; });
}

#if defined(__clang__) || __GNUC__ >= 12
template <typename T, int B, int... lanes>
MLA_INLINE vec_t<T, B> add_neighbours(vec_t<T, B> a, vec_t<T, B> b, std::integer_sequence<int, lanes...>) {
  return __builtin_shufflevector(a, b, 2 * lanes...) + __builtin_shufflevector(a, b, 2 * lanes + 1 ...);
}
#endif

// In lane i the sum of v[i]'s lanes, of as many vectors as one has lanes. They are overwritten: each addition halves their number.
template <typename T, int B>
MLA_INLINE vec_t<T, B> sums(vec_t<T, B>* v) {
  constexpr int W = Simd<T, B>::width;
#if defined(__clang__) || __GNUC__ >= 12
#pragma GCC unroll 4
  for (int n = W / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = add_neighbours<T, B>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>());
  return v[0];
#else
  vec_t<T, B> result;
  for (int i = 0; i < W; ++i) result[i] = sum<T, B>(v[i]);
  return result;
#endif
}

// Σ a_i b_i over n elements, in the lanes of four independent vectors: the error grows with n / lanes, and no addition
// waits for the one before it.
template <int B, typename T>
MLA_INLINE T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t W = Simd<T, B>::width;
  vec_t<T, B> acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int v = 0; v < 4; ++v) acc[v] += load<B>(a + i + v * W) * load<B>(b + i + v * W);
  for (; i + W <= n; i += W) acc[0] += load<B>(a + i) * load<B>(b + i);
  if (i < n) acc[1] += load_part<B>(a + i, n - i) * load_part<B>(b + i, n - i);
  return sum<T, B>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// y ← y + c x over n elements.
template <int B, typename T>
MLA_INLINE void axpy(T c, const T* x, T* y, int64_t n) {
  constexpr int64_t W = Simd<T, B>::width;
  const vec_t<T, B> factor = vec_t<T, B>{} + c;
  int64_t i = 0;
  for (; i + W <= n; i += W) store<B>(y + i, load<B>(y + i) + factor * load<B>(x + i));
  for (; i < n; ++i) y[i] += c * x[i];
}

// exp(t) for t ≤ 0 in every lane; 0 below −87, where float32 has no normal result. NaN stays NaN.
template <int B>
MLA_INLINE vec_t<float, B> exp_nonpositive(vec_t<float, B> t) {
  using vec = vec_t<float, B>;
  using bits = vec_t<int32_t, B>;
  constexpr float ROUND = 12582912.f;  // 1.5 · 2²³: adding it rounds to an integer
  const vec n = (t * 1.44269504f + ROUND) - ROUND;
  const vec r = (t - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  vec y = vec{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const bits exponent = (__builtin_convertvector(n, bits) + 127) << 23;
  vec power;
  std::memcpy(&power, &exponent, B);
  return t < -87.f ? vec{} : y * power;
}

template <int B>
MLA_INLINE vec_t<double, B> exp_nonpositive(vec_t<double, B> t) {
  for (int64_t i = 0; i < Simd<double, B>::width; ++i) t[i] = std::exp(t[i]);
  return t;
}

}  // namespace mla_fast
