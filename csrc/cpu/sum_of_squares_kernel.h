// The loop of squared_norm and gradient_norm, one per instruction set and element type.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

using SumOfSquares = float (*)(const void* values, int64_t count);

#define FASTDISTILL_DECLARE(isa)        \
  namespace isa {                       \
  SumOfSquares sum_of_squares(Element); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
