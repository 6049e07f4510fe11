// The loops of geglu, one table of them per instruction set and element type.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// A run of columns of some rows: `h` and `gate` are the two halves of x at its first column. Strides are in elements.
struct GegluKernels {
  // y = h * gelu(gate)
  void (*forward)(const void* h, const void* gate, int64_t x_stride, void* y, int64_t y_stride, int64_t rows,
                  int64_t columns);
  // grad_h = grad_y * gelu(gate), grad_gate = grad_y * h * gelu'(gate)
  void (*backward)(const void* grad_y, int64_t grad_y_stride, const void* h, const void* gate, int64_t x_stride,
                   void* grad_h, void* grad_gate, int64_t grad_x_stride, int64_t rows, int64_t columns);
};

#define FASTDISTILL_DECLARE(isa)              \
  namespace isa {                             \
  const GegluKernels& geglu_kernels(Element); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
