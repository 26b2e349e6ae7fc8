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

inline constexpr auto plus = [](auto a, auto b) MLA_LAMBDA { return a + b; };
inline constexpr auto greater = [](auto a, auto b) MLA_LAMBDA { return a > b ? a : b; };

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
  return reduce<T, B>(v, plus);
}

#if defined(__clang__) || __GNUC__ >= 12
template <typename T, int B, class Op, int... lanes>
MLA_INLINE vec_t<T, B> combine_neighbours(vec_t<T, B> a, vec_t<T, B> b, const Op& op, std::integer_sequence<int, lanes...>) {
  return op(__builtin_shufflevector(a, b, 2 * lanes...), __builtin_shufflevector(a, b, 2 * lanes + 1 ...));
}
#endif

// In lane i all lanes of v[i] combined by `op`, of as many vectors as one has lanes. They are overwritten: each round halves
// their number.
template <typename T, int B, class Op>
MLA_INLINE vec_t<T, B> reduce_each(vec_t<T, B>* v, const Op& op) {
  constexpr int W = Simd<T, B>::width;
#if defined(__clang__) || __GNUC__ >= 12
#pragma GCC unroll 4
  for (int n = W / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = combine_neighbours<T, B>(v[2 * i], v[2 * i + 1], op, std::make_integer_sequence<int, W>());
  return v[0];
#else
  vec_t<T, B> result;
  for (int i = 0; i < W; ++i) result[i] = reduce<T, B>(v[i], op);
  return result;
#endif
}

template <typename T, int B>
MLA_INLINE vec_t<T, B> sums(vec_t<T, B>* v) {
  return reduce_each<T, B>(v, plus);
}

template <typename T, int B>
MLA_INLINE vec_t<T, B> maxima(vec_t<T, B>* v) {
  return reduce_each<T, B>(v, greater);
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

// ln 2 in two parts, of which the first times a small integer is exact.
constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;

// Below it exp(t) is not a normal number.
template <typename T>
constexpr T EXP_LEAST = sizeof(T) == 4 ? -87 : -708;

// 1.5 · 2²³ or 1.5 · 2⁵²: adding it rounds to an integer, which is in the lowest bits then.
template <typename T>
constexpr T ROUND = sizeof(T) == 4 ? 12582912 : 6755399441055744;

// y 2ⁿ, with n + ROUND for n; both y and the result normal numbers.
template <int B, typename T>
MLA_INLINE vec_t<T, B> times_power(vec_t<T, B> y, vec_t<T, B> n) {
  using bits = vec_t<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>, B>;
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  return reinterpret_cast<vec_t<T, B>>(reinterpret_cast<bits>(y) + (reinterpret_cast<bits>(n) << mantissa));
}

// exp(t) for EXP_LEAST ≤ t ≤ 0 in every lane, to an ulp or two; in float32 ln 2 is rounded, which adds 1e-8 |t|. NaN stays NaN.
template <int B>
MLA_INLINE vec_t<float, B> exp_normal(vec_t<float, B> t) {
  const vec_t<float, B> n = t * 1.44269504f + ROUND<float>, r = t - (n - ROUND<float>) * 0.693147181f;
  vec_t<float, B> y = r * 1.381459879e-3f + 8.368716575e-3f;
  y = y * r + 4.166838899e-2f;
  y = y * r + 1.666652113e-1f;
  y = y * r + 4.999999404e-1f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  return t == t ? times_power<B, float>(y, n) : t;
}

template <int B>
MLA_INLINE vec_t<double, B> exp_normal(vec_t<double, B> t) {
  const vec_t<double, B> n = t * 1.44269504088896340736 + ROUND<double>, count = n - ROUND<double>;
  const vec_t<double, B> r = (t - count * LN2_HIGH) - count * LN2_LOW;
  vec_t<double, B> y = r / 6227020800. + 1. / 479001600;  // Taylor's series to r¹³, where it ends below half an ulp
  for (double factorial : {39916800., 3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2., 1., 1.}) y = y * r + 1 / factorial;
  return t == t ? times_power<B, double>(y, n) : t;
}

// The greater of both; NaN where t is.
template <int B, typename T>
MLA_INLINE vec_t<T, B> at_least(T least, vec_t<T, B> t) {
  const vec_t<T, B> bound = vec_t<T, B>{} + least;
  return bound > t ? bound : t;
}

// exp(t) for any t ≤ 0; 0 below EXP_LEAST.
template <typename T, int B>
MLA_INLINE vec_t<T, B> exp_nonpositive(vec_t<T, B> t) {
  return t < EXP_LEAST<T> ? vec_t<T, B>{} : exp_normal<B>(t);
}

// log(x) of a normal x > 0 in every lane, to two ulp or so. NaN stays NaN.
template <int B>
MLA_INLINE vec_t<double, B> log_positive(vec_t<double, B> x) {
  using vec = vec_t<double, B>;
  using bits = vec_t<int64_t, B>;
  constexpr int64_t ROOT_HALF = 0x3fe6a09e667f3bcd;  // √½ as it is stored
  const bits b = reinterpret_cast<bits>(x), n = (b - ROOT_HALF) >> 52;  // x = 2ⁿ m with √½ ≤ m < √2
  const vec m = reinterpret_cast<vec>(b - (n << 52)), power = __builtin_convertvector(n, vec);
  const vec f = (m - 1) / (m + 1), f2 = f * f;  // log m = 2 artanh f
  vec y = vec{} + 2. / 19;
#pragma GCC unroll 8
  for (int k = 17; k >= 3; k -= 2) y = y * f2 + 2. / k;
  y = power * LN2_HIGH + (2 * f + (y * f2 * f + power * LN2_LOW));
  return x == x ? y : x;
}

}  // namespace mla_fast
