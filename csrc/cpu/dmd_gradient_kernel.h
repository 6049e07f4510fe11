// The loops of dmd_gradient, one table of them per instruction set and element types.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// The teacher's prediction: `cond`, or `uncond + scale * (cond - uncond)` where there is an unconditional one.
struct GuidedPrediction {
  const void *cond, *uncond;
  float scale;

  GuidedPrediction from(int64_t bytes) const {
    return {(const char*)cond + bytes, uncond ? (const char*)uncond + bytes : nullptr, scale};
  }
};

struct DmdGradientSums {
  float squares, magnitudes;
  int64_t guarded;
};

// `n` elements in a row, of one sample.
struct DmdGradientKernels {
  // sum of |x - mu|, mu = from_x_t x_t + from_pred real; x_t may be null
  float (*distance)(const void* x, const void* x_t, GuidedPrediction real, float from_x_t, float from_pred, int64_t n);
  // Writes scale g, with g = factor (fake - real), 0 where that is not finite; sums are over g.
  DmdGradientSums (*gradient)(GuidedPrediction real, const void* fake, float factor, float scale, float* to, int64_t n);
  // grad_x = factor gradient, in x's type
  void (*backward)(const float* gradient, float factor, void* grad_x, int64_t n);
};

// Predictions have one type; x and x_t have it too, or are float32.
#define FASTDISTILL_DECLARE(isa)                                                      \
  namespace isa {                                                                     \
  DmdGradientKernels dmd_gradient_kernels(Element x, Element x_t, Element predictions); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
