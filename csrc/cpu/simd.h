// Vectors of floats, in the compiler's vector extensions, for the instruction set this file is compiled for.
// Everything lives in a namespace named after that set (FASTDISTILL_ISA) and no C++ library header is used, so that no
// inline function compiled for a newer processor can be linked in place of its plain twin.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#else
#include <torch/headeronly/util/Half.h>
#endif

// The AVX-512 intrinsics are used in their masked form: GCC 12 takes the plain one's undefined operand for a mistake.

namespace fastdistill {
namespace FASTDISTILL_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#define FASTDISTILL_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FASTDISTILL_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define FASTDISTILL_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FASTDISTILL_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#define FASTDISTILL_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FASTDISTILL_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define FASTDISTILL_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FASTDISTILL_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
constexpr int kWidth = 4;
#define FASTDISTILL_EVEN 0, 2, 4, 6
#define FASTDISTILL_ODD 1, 3, 5, 7
#define FASTDISTILL_LOW 0, 4, 1, 5
#define FASTDISTILL_HIGH 2, 6, 3, 7
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t VecI __attribute__((vector_size(kWidth * sizeof(int32_t))));
typedef uint32_t VecU __attribute__((vector_size(kWidth * sizeof(uint32_t))));

#if defined(__clang__)
#define FASTDISTILL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTDISTILL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VecI){__VA_ARGS__})
#endif

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The unit of the loops: kStep elements in two vectors. Which element lies where depends on the type they were loaded
// from (`load`) and does not matter to arithmetic; `load_floats<T>` brings per-element constants into the same places.
struct Pair {
  Vec a, b;
};
constexpr int kStep = 2 * kWidth;

static inline Vec broadcast(float x) { return x - Vec{}; }
static inline Pair broadcast_pair(float x) { return {broadcast(x), broadcast(x)}; }

static inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
static inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
static inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }

// ---- loads and stores -----------------------------------------------------------------------------------------------

static inline Vec load_vec(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}

static inline void store_vec(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

static inline Pair load(const float* p) { return {load_vec(p), load_vec(p + kWidth)}; }

static inline void store(float* p, Pair v) {
  store_vec(p, v.a);
  store_vec(p + kWidth, v.b);
}

// The even elements in a, the odd ones in b: each takes one instruction from a vector of pairs, where widening half a
// vector takes two.
static inline Pair load(const BFloat16* p) {
  VecU pairs;
  memcpy(&pairs, p, sizeof(pairs));
  return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
}

// To nearest, ties to even, in the upper half. Right for every NaN whose lower half is zero, and the others (rounding
// would carry them into zero) do not occur: those of a bfloat16 input have none, and the driver makes its constants so.
static inline VecU round_to_bfloat16(Vec v) {
  const VecU bits = (VecU)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

static inline void store(BFloat16* p, Pair v) {
  const VecU pairs = (round_to_bfloat16(v.a) >> 16) | (round_to_bfloat16(v.b) & 0xffff0000u);
  memcpy(p, &pairs, sizeof(pairs));
}

static inline Vec load_vec(const Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(p[i].bits);
  return v;
#endif
}

static inline void store_vec(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[i]);
#endif
}

static inline Pair load(const Half* p) { return {load_vec(p), load_vec(p + kWidth)}; }

static inline void store(Half* p, Pair v) {
  store_vec(p, v.a);
  store_vec(p + kWidth, v.b);
}

// kStep floats in the places that `load` of a T gives its elements.
template <typename T>
static inline Pair load_floats(const float* p) { return load(p); }
template <>
inline Pair load_floats<BFloat16>(const float* p) {
  const Pair v = load(p);
  return {FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_EVEN), FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_ODD)};
}

template <typename T>
static inline void store_floats(float* p, Pair v) { store(p, v); }
template <>
inline void store_floats<BFloat16>(float* p, Pair v) {
  store(p, {FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_LOW), FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_HIGH)});
}

// ---- the end of a row -----------------------------------------------------------------------------------------------

// A whole step, or its first n elements: the loops are written once and compiled for both. What lies beyond n is loaded
// as 0 and not stored.
struct Whole {
  static constexpr int n = kStep;
};
struct Part {
  int n;
};

template <typename T>
static inline Pair load(const T* p, Whole) { return load(p); }
template <typename T>
static inline Pair load(const T* p, Part part) {
  T buffer[kStep] = {};
  memcpy(buffer, p, part.n * sizeof(T));
  return load(buffer);
}

template <typename T>
static inline void store(T* p, Pair v, Whole) { store(p, v); }
template <typename T>
static inline void store(T* p, Pair v, Part part) {
  T buffer[kStep];
  store(buffer, v);
  memcpy(p, buffer, part.n * sizeof(T));
}

template <typename T>
static inline Pair load_floats(const float* p, Whole) { return load_floats<T>(p); }
template <typename T>
static inline Pair load_floats(const float* p, Part part) {
  float buffer[kStep] = {};
  memcpy(buffer, p, part.n * sizeof(float));
  return load_floats<T>(buffer);
}

template <typename T>
static inline void store_floats(float* p, Pair v, Whole) { store_floats<T>(p, v); }
template <typename T>
static inline void store_floats(float* p, Pair v, Part part) {
  float buffer[kStep];
  store_floats<T>(buffer, v);
  memcpy(p, buffer, part.n * sizeof(float));
}

template <typename T, typename Lanes>
static inline Pair load_strided(const T* p, int64_t stride, Lanes lanes) {
  T buffer[kStep] = {};
  for (int i = 0; i < lanes.n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

// v, with 0 in place of what lies beyond the end; T is what v was loaded from.
template <typename T>
static inline Pair keep(Pair v, Whole) { return v; }
template <typename T>
static inline Pair keep(Pair v, Part part) {
  float inside[kStep] = {};
  for (int i = 0; i < part.n; ++i) inside[i] = 1.0f;
  const Pair mask = load_floats<T>(inside);
  return {mask.a != 0.0f ? v.a : Vec{}, mask.b != 0.0f ? v.b : Vec{}};
}

template <typename Body>
static inline void for_steps(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= length; i += kStep) body(i, Whole{});
  if (i < length) body(i, Part{(int)(length - i)});
}

// ---- functions ------------------------------------------------------------------------------------------------------

static inline float sum(Pair v) {
  const Vec lanes = v.a + v.b;
#if defined(__AVX2__)
  // Halves by halves, like the loop below, but in registers.
  typedef float Half8 __attribute__((vector_size(32)));
  typedef float Half4 __attribute__((vector_size(16)));
  Half8 eight[kWidth / 8];
  memcpy(eight, &lanes, sizeof(lanes));
  if (kWidth == 16) eight[0] += eight[kWidth / 8 - 1];
  Half4 four[2];
  memcpy(four, eight, sizeof(four));
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
#else
  float values[kWidth];
  store_vec(values, lanes);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
#endif
}

// Between the two; a NaN becomes one of them.
static inline Vec clamp(Vec v, float low, float high) {
#if defined(__AVX512F__)
  const __m512 below = _mm512_maskz_min_ps(0xFFFF, (__m512)v, _mm512_set1_ps(high));
  return (Vec)_mm512_maskz_max_ps(0xFFFF, below, _mm512_set1_ps(low));
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps(_mm256_min_ps((__m256)v, _mm256_set1_ps(high)), _mm256_set1_ps(low));
#else
  v = v < high ? v : broadcast(high);
  return v > low ? v : broadcast(low);
#endif
}

// exp(-z) as 2^n * 2^f with n the integer nearest to -z / ln(2), 2^f by a polynomial that is 1 at 0 (relative error
// 9e-8 on [-1/2, 1/2]). Together about 1e-7 * (1 + |z| / 8). Bounded so that 1 + exp(-z) stays finite.
static inline Vec exp_minus(Vec z) {
  const float to_exponent = -1.44269504088896341f;
  const float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  z = clamp(z, -87.0f, 87.0f);
  const Vec shifted = z * to_exponent + round_magic;
  const Vec f = z * to_exponent - (shifted - round_magic);
  Vec p = f * 1.32647273e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  return (Vec)((VecI)p + ((VecI)shifted << 23));  // the shift leaves n alone of `shifted`
}

static inline Vec sigmoid(Vec z) { return 1.0f / (1.0f + exp_minus(z)); }
static inline Vec silu(Vec z) { return z / (1.0f + exp_minus(z)); }
static inline Vec silu_derivative(Vec z) {
  const Vec s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

static inline Pair silu(Pair z) { return {silu(z.a), silu(z.b)}; }
static inline Pair silu_derivative(Pair z) { return {silu_derivative(z.a), silu_derivative(z.b)}; }

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
