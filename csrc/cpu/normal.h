// The normal distribution on vectors: P(X < g) and the bell exp(-g^2 / 2) it is made of.
#pragma once

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

struct Normal {
  Vec cdf, bell;  // Phi(g); exp(-g^2 / 2), the density times sqrt(2 pi)
};

// Phi(-a) = exp(-a^2 / 2) R(a) for a >= 0, where R(a) = erfcx(a / sqrt(2)) / 2 is smooth: a polynomial in
// t = 1 / (1 + 0.305 a) without a constant term (the form of Hastings, 1955), fitted for the smallest largest relative
// error on [0, 14]: 9.4e-8, with its rounding 5e-7. So a far tail keeps its digits, where 1 + erf(g / sqrt(2)) has none
// below -5, and one exponential serves the derivative as well. Beyond |g| = 13.2 the tail is 0.
static inline Normal normal(Vec g) {
  const Vec a = (Vec)((VecI)g & 0x7fffffff);
  const Vec half_square = 0.5f * g * g;
  const Vec bell = half_square < 87.0f ? exp_minus(half_square) : Vec{};
  const Vec t = 1.0f / (1.0f + 0.305f * a);
  Vec p = t * 0.03669918f - 0.152988269f;
  p = p * t + 0.185716829f;
  p = p * t - 0.0379767611f;
  p = p * t + 0.121021644f;
  p = p * t + 0.103420876f;
  p = p * t + 0.122466815f;
  p = p * t + 0.121639733f;
  const Vec tail = bell * (p * t);
  return {g < 0.0f ? tail : 1.0f - tail, bell};
}

static inline Vec gelu(Vec g) { return g * normal(g).cdf; }
static inline Pair gelu(Pair g) { return {gelu(g.a), gelu(g.b)}; }

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
