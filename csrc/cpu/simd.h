// One vector of floats, in the compiler's vector extensions, for the instruction set this file is compiled for.
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

namespace fastdistill {
namespace FASTDISTILL_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t VecI __attribute__((vector_size(kWidth * sizeof(int32_t))));
typedef uint32_t VecU __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef uint16_t VecU16 __attribute__((vector_size(kWidth * sizeof(uint16_t))));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline Vec broadcast(float x) { return x - Vec{}; }

static inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}

static inline void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

static inline Vec load(const BFloat16* p) {
  VecU16 raw;
  memcpy(&raw, p, sizeof(raw));
  return (Vec)(__builtin_convertvector(raw, VecU) << 16);
}

static inline void store(BFloat16* p, Vec v) {
  const VecU bits = (VecU)v;
  const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const VecU quiet_nan = (bits >> 16) | 0x40u;                // rounding could carry a NaN into infinity
  const VecU out = v != v ? quiet_nan : rounded >> 16;
  const VecU16 raw = __builtin_convertvector(out, VecU16);
  memcpy(p, &raw, sizeof(raw));
}

static inline Vec load(const Half* p) {
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

static inline void store(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[i]);
#endif
}

// The first n elements, the rest of the vector 0; n <= kWidth.
template <typename T>
static inline Vec load_n(const T* p, int n) {
  T buffer[kWidth] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <typename T>
static inline void store_n(T* p, Vec v, int n) {
  T buffer[kWidth];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

template <typename T>
static inline Vec load_strided(const T* p, int64_t stride, int n) {
  T buffer[kWidth] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

// v in the first n lanes, 0 in the others.
static inline Vec keep_n(Vec v, int n) {
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < n ? v : Vec{};
}

static inline float sum(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// exp(x) for x <= 88, relative error about 1e-7: Cody-Waite reduction to |r| <= ln(2)/2 and a minimax polynomial.
static inline Vec exp_bounded(Vec x) {
  x = x > -87.0f ? x : broadcast(-87.0f);
  const float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const Vec shifted = x * 1.44269504088896341f + round_magic;
  const Vec n = shifted - round_magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI exponent = (VecI)shifted - (VecI)broadcast(round_magic);
  return (Vec)((VecI)p + (exponent << 23));
}

// 1 / (1 + exp(-z)). Beyond |z| = 87 it is 0 or 1 to float32's last place; NaN stays NaN through the caller's product.
static inline Vec sigmoid(Vec z) {
  const Vec minus_z = z < -87.0f ? broadcast(87.0f) : -z;
  return 1.0f / (1.0f + exp_bounded(minus_z));
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
