// The loops of lpips_distance, one table of them per instruction set and element type.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// Some pixels of one sample: where the first channel of the first pixel is, and how far apart channels and pixels are.
struct LpipsFeatures {
  const void* data;
  int64_t c, s;
};
struct LpipsGradient {
  void* data;  // null: not wanted
  int64_t c, s;
};

struct LpipsBlock {
  LpipsFeatures x, y;
  const float* weight;
  int64_t channels, pixels;
};

// `planes` takes any strides, and needs scratch; `rows` takes channels that lie side by side, in x, y and gradients.
struct LpipsKernels {
  struct Loops {
    // sum_sc w_c (u_sc - v_sc)^2
    float (*forward)(const LpipsBlock&, float* scratch);
    // The gradients of `scale` times that. sums: (channels,), set to sum_s (u_sc - v_sc)^2; or null.
    void (*backward)(const LpipsBlock&, float scale, LpipsGradient x, LpipsGradient y, float* sums, float* scratch);
  } planes, rows;
};

// Floats of scratch for `pixels` pixels of `channels` channels, for every instruction set.
inline int64_t lpips_scratch(int64_t channels, int64_t pixels) { return (2 * channels + 2) * ((pixels + 31) / 32 * 32); }

#define FASTDISTILL_DECLARE(isa)              \
  namespace isa {                             \
  const LpipsKernels& lpips_kernels(Element); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
