// The loop of adamw, one per instruction set, element type and width of the moments.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// What a step does to the elements of one tensor.
struct AdamwFactors {
  float grad;                      // clipping, unscaling and sign of the gradient
  float decay;                     // 1 - lr * weight_decay
  float one_minus_beta1, beta2, one_minus_beta2;
  float step_size;                 // lr / (1 - beta1^step)
  float inverse_root;              // 1 / sqrt(1 - beta2^step)
  float eps;
  float ema_weight;                // 1 - ema_decay
  uint32_t step;
};

// A run of elements of one tensor. 16-bit parameters have a float32 master; `ema` may be null. Moments are floats, or
// codes of 8 bits with a scale per block: then the run begins with a block.
struct AdamwRun {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
  float *master, *ema;
  int64_t first, count;  // `first`: of the run, in the tensor
};

using AdamwLoop = void (*)(const AdamwRun&, const AdamwFactors&);

#define FASTDISTILL_DECLARE(isa)                           \
  namespace isa {                                          \
  AdamwLoop adamw_loop(Element, bool eight_bits, bool ema); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
