// The loops of layer_norm, one table of them per instruction set and element type.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// Rows of D elements, side by side, `stride` elements from one to the next. `data` may be null where it says so.
struct ConstRows {
  const void* data;
  int64_t stride;
};

struct LayerNormKernels {
  // y, and s = x + residual rounded to the element type, are dense. Without residual (null) s is x and not written.
  void (*forward)(ConstRows x, ConstRows residual, void* s, void* y, int64_t rows, int64_t D, const float* weight,
                  const float* bias, double eps, float* mean, float* rstd);
  // grad_x is dense; grad_s may be null. sums: those of grad_y * xhat, then of grad_y, per column, (2, D), added to; or
  // null. At most a few hundred rows at a time.
  void (*backward)(ConstRows grad_y, ConstRows grad_s, ConstRows s, void* grad_x, int64_t rows, int64_t D,
                   const float* weight, const float* mean, const float* rstd, float* sums);
};

#define FASTDISTILL_DECLARE(isa)                         \
  namespace isa {                                        \
  const LayerNormKernels& layer_norm_kernels(Element);   \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
