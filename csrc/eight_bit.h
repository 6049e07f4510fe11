// Moments of Adam in 8 bits: a block of values over its largest magnitude, as small floats with 3 bits of mantissa.
//
// First moments: sign, 4 bits of exponent, 3 of mantissa; 1.0 is code 127, the smallest is 1.25 * 2^-16. Second moments:
// 5 bits of exponent, 3 of mantissa; 1.0 is code 255, the smallest is 1.25 * 2^-32. Code 0 is 0. Rounding is stochastic,
// from a hash of the element and the step: to nearest, a moment that changes by less than half a spacing a step
// would never change. A second moment never becomes 0, which would leave eps alone in the denominator.
// fastdistill/ops/eight_bit.py keeps the same rules.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTDISTILL_EIGHT_BIT static __host__ __device__ __forceinline__
#else
#define FASTDISTILL_EIGHT_BIT static inline
#endif

namespace fastdistill {
namespace eight_bit {

constexpr int kBlock = 256;  // values that share a scale

constexpr int kShift = 20;  // 23 bits of mantissa less 3
constexpr uint32_t kBelow = (1u << kShift) - 1;
constexpr uint32_t kFirstTop = 127, kSecondTop = 255;
constexpr uint32_t kFirstBias = (0x3f800000u >> kShift) - kFirstTop;  // code + bias: the upper bits of the float
constexpr uint32_t kSecondBias = (0x3f800000u >> kShift) - kSecondTop;
constexpr float kFirstSmallest = 1.25f / 65536.0f;
constexpr uint32_t kFirstSmallestBits = (1 + kFirstBias) << kShift;

// Murmur3's finaliser over element and step.
FASTDISTILL_EIGHT_BIT uint32_t random_bits(uint32_t element, uint32_t step) {
  uint32_t h = element * 0x9e3779b1u + step * 0x85ebca77u;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// A magnitude below the smallest is rounded up to it where it is above this.
FASTDISTILL_EIGHT_BIT float first_threshold(uint32_t random) {
  return (float)(int32_t)(random >> (32 - kShift)) * (kFirstSmallest / (float)(1 << kShift));
}

// Of a magnitude |x| <= 1 from its bits; the upper 20 bits of `random`, and the bits of its threshold, decide. Integers
// alone, and no branches, so that compilers vectorise it: positive floats are ordered as their bits are.
FASTDISTILL_EIGHT_BIT uint32_t encode_first(uint32_t bits, uint32_t threshold_bits, uint32_t random) {
  const uint32_t rounded = ((bits + (random >> (32 - kShift))) >> kShift) - kFirstBias;
  const uint32_t below = 0u - (uint32_t)(bits < kFirstSmallestBits);
  const uint32_t code = (below & (uint32_t)(threshold_bits < bits)) | (~below & rounded);
  return code < kFirstTop ? code : kFirstTop;
}

// Of 0 <= x <= 1, from its bits; the lower 20 bits of `random` decide.
FASTDISTILL_EIGHT_BIT uint32_t encode_second(uint32_t bits, uint32_t random) {
  const int32_t rounded = (int32_t)((bits + (random & kBelow)) >> kShift) - (int32_t)kSecondBias;
  const int32_t code = rounded < 1 ? 1 : rounded > (int32_t)kSecondTop ? (int32_t)kSecondTop : rounded;
  return (uint32_t)code & (0u - (uint32_t)(bits != 0));
}

// The bits of the float.
FASTDISTILL_EIGHT_BIT uint32_t decode_first(uint32_t code) {
  const uint32_t magnitude = code & kFirstTop;
  return magnitude == 0 ? 0u : ((magnitude + kFirstBias) << kShift) | ((code & 0x80u) << 24);
}
FASTDISTILL_EIGHT_BIT uint32_t decode_second(uint32_t code) {
  return code == 0 ? 0u : (code + kSecondBias) << kShift;
}

}  // namespace eight_bit
}  // namespace fastdistill
