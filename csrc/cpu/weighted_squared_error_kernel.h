// The loops of weighted_squared_error, one table of them per instruction set and pair of element types.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// A run of elements of one sample, and its target scale_a a + scale_b b; `b` may be null.
struct SampleRun {
  const void *x, *a, *b;
  float scale_a, scale_b;
  int64_t length;
};

struct WeightedSquaredErrorKernels {
  // sum (x - target)^2
  float (*sum_of_squares)(const SampleRun&);
  // to = factor (x - target), in x's element type
  void (*scaled_difference)(const SampleRun&, float factor, void* to);
};

#define FASTDISTILL_DECLARE(isa)                                                                      \
  namespace isa {                                                                                     \
  const WeightedSquaredErrorKernels& weighted_squared_error_kernels(Element of_x, Element of_target); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
