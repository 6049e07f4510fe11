// The sum of squares of a run of elements, by the best instruction set there is.
#pragma once

#include "capability.h"
#include "sum_of_squares_kernel.h"
#include "tensors.h"

namespace fastdistill {

inline SumOfSquares sum_of_squares(ScalarType type) {
  const Element element = element_of(type);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::sum_of_squares(element);
    case Capability::Avx2:
      return avx2::sum_of_squares(element);
    default:
      break;
  }
#endif
  return baseline::sum_of_squares(element);
}

}  // namespace fastdistill
