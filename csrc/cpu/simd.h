// Short vectors of the instruction set that a kernel file is compiled for: a few operations, an exponential, a transpose.
// Everything is always inlined: the linker must never pick one instruction set's copy of a function for all of them.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define STAR_ALWAYS __attribute__((always_inline))  // for lambdas and members
#define STAR_INLINE static inline STAR_ALWAYS

namespace star::STAR_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <typename T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using IntegerOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <typename T>
STAR_INLINE Vector<T> load(const T* from) {
  Vector<T> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
template <typename T>
STAR_INLINE void store(T* to, Vector<T> value) {
  std::memcpy(to, &value, sizeof(value));
}
template <typename T>
STAR_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// a * b + c, rounded once where the processor can. The build forbids the compiler to do so by itself.
STAR_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
STAR_INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// Loads LANES<T> values of the type Q of memory as the type T of arithmetic.
template <typename T, typename Q>
STAR_INLINE Vector<T> load_as(const Q* from) {
  if constexpr (std::is_same_v<Q, T>) {
    return load<T>(from);
  } else if constexpr (std::is_same_v<Q, torch::headeronly::BFloat16>) {
    typedef uint16_t Bits __attribute__((vector_size(VECTOR_BYTES / 2)));
    Bits bits;
    std::memcpy(&bits, from, sizeof(bits));
    return (Vector<float>)(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
  } else {
    static_assert(std::is_same_v<Q, torch::headeronly::Half>);
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    Vector<float> value;
    for (int i = 0; i < LANES<float>; i++) value[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i].x);
    return value;
#endif
  }
}

// The first `count` values of a vector, with zeros behind them. For the whole vector when the compiler knows the count.
template <typename T, typename Q>
STAR_INLINE Vector<T> load_some(const Q* from, int64_t count) {
  if (count == LANES<T>) return load_as<T>(from);
  Q part[LANES<T>] = {};
  for (int64_t i = 0; i < count; i++) part[i] = from[i];
  return load_as<T>(part);
}
template <typename T, typename Q>
STAR_INLINE void store_some(Q* to, Vector<T> value, int64_t count) {
  if (std::is_same_v<Q, T> && count == LANES<T>) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = Q(value[i]);
  }
}

template <typename T>
STAR_INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

template <typename T>
STAR_INLINE Vector<T> magnitude(Vector<T> value) {
  using Integers = Vector<IntegerOf<T>>;
  return (Vector<T>)((Integers)value & broadcast(std::numeric_limits<IntegerOf<T>>::max()));
}

// e^x to about one unit in the last place, with 0, infinity, NaN and subnormal results where they belong.
template <typename T>
STAR_INLINE Vector<T> exponential(Vector<T> x) {
  constexpr bool single = sizeof(T) == 4;
  using Integer = IntegerOf<T>;
  using Integers = Vector<Integer>;
  constexpr int mantissa = single ? 23 : 52;
  constexpr Integer bias = single ? 127 : 1023;
  // Beyond these e^x is 0 or infinite anyway; a NaN passes both comparisons.
  const Vector<T> low = broadcast(T(single ? -104 : -746)), high = broadcast(T(single ? 89 : 710));
  x = x < low ? low : x;
  x = x > high ? high : x;
  // x = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^mantissa rounds to an integer, left in the low bits.
  const Vector<T> magic = broadcast(T(3) * T(Integer(1) << (mantissa - 1)));
  const Vector<T> shifted = fma(x, broadcast(T(1.4426950408889634074)), magic);
  const Vector<T> n = shifted - magic;
  const Integers power = (Integers)shifted - (Integers)magic;
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  Vector<T> r = fma(n, broadcast(T(single ? -0.693359375 : -0.693145751953125)), x);
  r = fma(n, broadcast(T(single ? 2.12194440e-4 : -1.42860682030941723212e-6)), r);
  // Taylor's series: the first term left out is below a tenth of the type's rounding error.
  constexpr int degree = single ? 7 : 13;
  constexpr double inverse_factorial[] = {1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,
                                          1.0 / 120,  1.0 / 720,   1.0 / 5040,   1.0 / 40320,   1.0 / 362880,
                                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  Vector<T> value = broadcast(T(inverse_factorial[degree]));
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; k--) value = fma(value, r, broadcast(T(inverse_factorial[k])));
#if defined(__AVX512F__)
  if constexpr (single) return (Vector<T>)_mm512_scalef_ps((__m512)value, (__m512)n);
#endif
  // 2^n as two factors: one alone would overflow or be subnormal at the ends of the range.
  const Integers half = power >> 1;
  const Vector<T> first = (Vector<T>)((half + bias) << mantissa);
  const Vector<T> second = (Vector<T>)((power - half + bias) << mantissa);
  return value * first * second;
}

template <int size, typename V, size_t... lane>
STAR_INLINE void exchange(V& a, V& b, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane);
#if defined(__clang__) || __GNUC__ >= 12
  const V first = __builtin_shufflevector(a, b, (lane & size ? lanes + lane - size : lane)...);
  b = __builtin_shufflevector(a, b, (lane & size ? lanes + lane : lane + size)...);
#else
  using Lanes = decltype(a < b);  // integers as wide as the numbers
  const V first = __builtin_shuffle(a, b, Lanes{(lane & size ? lanes + lane - size : lane)...});
  b = __builtin_shuffle(a, b, Lanes{(lane & size ? lanes + lane : lane + size)...});
#endif
  a = first;
}

// rows[i][j] <-> rows[j][i]: swaps blocks of size 1, 2, 4, ... off the diagonal.
template <typename T, int size = 1>
STAR_INLINE void transpose(Vector<T>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES<T>; i++)
    if (!(i & size)) exchange<size>(rows[i], rows[i + size], std::make_index_sequence<LANES<T>>{});
  if constexpr (2 * size < LANES<T>) transpose<T, 2 * size>(rows);
}

}  // namespace star::STAR_ISA
