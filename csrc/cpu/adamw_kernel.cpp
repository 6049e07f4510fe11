// The loop of adamw for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
#include "adamw_kernel.h"

#include "../eight_bit.h"
#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

using eight_bit::kBlock;

template <typename T>
constexpr bool kHasMaster = sizeof(T) == 2;

inline Vec root(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

inline Vec step(Vec p, Vec g, Vec* m, Vec* v, const AdamwFactors& f) {
  *m += f.one_minus_beta1 * (g - *m);
  *v = f.beta2 * *v + f.one_minus_beta2 * g * g;
  return p * f.decay - f.step_size * *m / (root(*v) * f.inverse_root + f.eps);
}

// The elements from `first` on, whose moments are `exp_avg` and `exp_avg_sq`.
template <typename T, bool kEma>
void sweep(const AdamwRun& run, const AdamwFactors& f, int64_t first, int64_t count, float* exp_avg,
           float* exp_avg_sq) {
  T* const param = (T*)run.param + first;
  const T* const grad = (const T*)run.grad + first;
  float *const master = run.master + first, *const ema = run.ema + first;
  for_steps(count, [&](int64_t i, auto lanes) {
    const Pair g = load(grad + i, lanes);
    Pair m = load_floats<T>(exp_avg + i, lanes), v = load_floats<T>(exp_avg_sq + i, lanes), p;
    if constexpr (kHasMaster<T>) {
      p = load_floats<T>(master + i, lanes);
    } else {
      p = load(param + i, lanes);
    }
    p.a = step(p.a, g.a * f.grad, &m.a, &v.a, f);
    p.b = step(p.b, g.b * f.grad, &m.b, &v.b, f);
    store_floats<T>(exp_avg + i, m, lanes);
    store_floats<T>(exp_avg_sq + i, v, lanes);
    if constexpr (kHasMaster<T>) store_floats<T>(master + i, p, lanes);
    store(param + i, p, lanes);
    if constexpr (kEma) {
      Pair a = load_floats<T>(ema + i, lanes);
      a.a += f.ema_weight * (p.a - a.a);
      a.b += f.ema_weight * (p.b - a.b);
      store_floats<T>(ema + i, a, lanes);
    }
  });
}

template <typename T, bool kEma>
void in_floats(const AdamwRun& run, const AdamwFactors& f) {
  sweep<T, kEma>(run, f, 0, run.count, (float*)run.exp_avg, (float*)run.exp_avg_sq);
}

// ---- moments of 8 bits: a block at a time through arrays of floats, in loops that the compiler vectorises --------------

// Magnitudes are ordered as their bits are; a maximum of integers is vectorised, one of floats is not.
inline float largest(const float* values, int count) {
  uint32_t bits[kBlock], result = 0;
  memcpy(bits, values, count * sizeof(float));
  for (int i = 0; i < count; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffffu;
    result = magnitude > result ? magnitude : result;
  }
  float largest;
  memcpy(&largest, &result, sizeof(largest));
  return largest;
}

inline void decode(const uint8_t* first, const uint8_t* second, float first_scale, float second_scale, float* m,
                   float* v, int count) {
  uint32_t bits[2][kBlock];
  for (int i = 0; i < count; ++i) {
    bits[0][i] = eight_bit::decode_first(first[i]);
    bits[1][i] = eight_bit::decode_second(second[i]);
  }
  memcpy(m, bits[0], count * sizeof(float));
  memcpy(v, bits[1], count * sizeof(float));
  for (int i = 0; i < count; ++i) {
    m[i] *= first_scale;
    v[i] *= second_scale;
  }
}

inline void encode(const float* m, const float* v, float first_scale, float second_scale, uint8_t* first,
                   uint8_t* second, int count, uint32_t element, uint32_t step) {
  float magnitude[kBlock], square[kBlock], threshold[kBlock];
  uint32_t bits[4][kBlock], random[kBlock], codes[2][kBlock];
  const float first_divisor = first_scale > 0.0f ? first_scale : 1.0f;
  const float second_divisor = second_scale > 0.0f ? second_scale : 1.0f;
  for (int i = 0; i < count; ++i) {
    magnitude[i] = __builtin_fabsf(m[i]) / first_divisor;
    square[i] = v[i] / second_divisor;
    random[i] = eight_bit::random_bits(element + (uint32_t)i, step);
    threshold[i] = eight_bit::first_threshold(random[i]);
  }
  memcpy(bits[0], magnitude, count * sizeof(float));
  memcpy(bits[1], square, count * sizeof(float));
  memcpy(bits[2], threshold, count * sizeof(float));
  memcpy(bits[3], m, count * sizeof(float));
  for (int i = 0; i < count; ++i) {
    codes[0][i] = eight_bit::encode_first(bits[0][i], bits[2][i], random[i]) | (bits[3][i] >> 31 << 7);
    codes[1][i] = eight_bit::encode_second(bits[1][i], random[i]);
  }
  for (int i = 0; i < count; ++i) {
    first[i] = (uint8_t)codes[0][i];
    second[i] = (uint8_t)codes[1][i];
  }
}

template <typename T, bool kEma>
void in_eight_bits(const AdamwRun& run, const AdamwFactors& f) {
  float m[kBlock], v[kBlock];
  for (int64_t i = 0; i < run.count; i += kBlock) {
    const int count = (int)(run.count - i < kBlock ? run.count - i : kBlock);
    uint8_t *first = (uint8_t*)run.exp_avg + i, *second = (uint8_t*)run.exp_avg_sq + i;
    float *first_scale = run.exp_avg_scale + i / kBlock, *second_scale = run.exp_avg_sq_scale + i / kBlock;
    decode(first, second, *first_scale, *second_scale, m, v, count);
    sweep<T, kEma>(run, f, i, count, m, v);
    *first_scale = largest(m, count);
    *second_scale = largest(v, count);
    encode(m, v, *first_scale, *second_scale, first, second, count, (uint32_t)(run.first + i), f.step);
  }
}

template <typename T>
AdamwLoop loop(bool eight_bits, bool ema) {
  if (eight_bits) return ema ? in_eight_bits<T, true> : in_eight_bits<T, false>;
  return ema ? in_floats<T, true> : in_floats<T, false>;
}

}  // namespace

AdamwLoop adamw_loop(Element element, bool eight_bits, bool ema) {
  switch (element) {
    case Element::Float16:
      return loop<Half>(eight_bits, ema);
    case Element::BFloat16:
      return loop<BFloat16>(eight_bits, ema);
    default:
      return loop<float>(eight_bits, ema);
  }
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
