// The loops of group_norm_silu, one table of them per instruction set and element type.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// Count, mean and sum of squared deviations; two of them combine exactly (Chan, Golub and LeVeque 1983).
struct Moments {
  double count, mean, m2;
};

// Per-channel constants of one sample: u - mean is taken as x - center, where u = x + add, and what float32 loses of
// center = mean - add comes back through `shift`. So a mean of 100 with a deviation of 0.01 keeps its digits.
struct ForwardConstants {
  const float *center, *scale, *shift;  // z = (x - center) * scale + shift

  ForwardConstants from(int64_t channel) const { return {center + channel, scale + channel, shift + channel}; }
};

struct BackwardConstants {
  const float *center, *rstd, *offset;  // xhat = (x - center) * rstd + offset
  const float *weight, *bias;           // z = xhat * weight + bias
  const float *a, *b, *c;               // grad_x = a * dz - b - c * xhat   (a, b, c unused by the sums)

  BackwardConstants from(int64_t channel) const {
    return {center + channel, rstd + channel, offset + channel, weight + channel,
            bias + channel,   a + channel,    b + channel,      c + channel};
  }
};

// Where the gradient of an element lies: it may have come in another layout than x.
struct GradientStrides {
  int64_t channel, spatial;
};

struct GroupNormSiluKernels {
  // Contiguous: `rows` adjacent channels of `length` elements each; the constants start at the first of them.
  // The moments are those of x + add[row]; add may be null. At most a few thousand elements at a time.
  Moments (*moments_rows)(const void* x, int64_t rows, int64_t length, const float* add);
  // y = silu(z), the last row first: its x is what the moments left in cache.
  void (*forward_rows)(const void* x, void* y, int64_t rows, int64_t length, ForwardConstants k, bool silu);
  // sums: sum(dz), sum(dz * xhat), sum(xhat) per channel, each `sums_stride` after the other; overwritten.
  // kept_dz: where dz is kept from the sums for grad_x, dense like grad_x, which it may be; null to compute it twice.
  void (*backward_sums_rows)(const void* x, const void* grad_y, GradientStrides grad, float* kept_dz, int64_t rows,
                             int64_t length, BackwardConstants k, bool silu, double* sums, int64_t sums_stride);
  void (*backward_rows)(const void* x, const void* grad_y, GradientStrides grad, const float* kept_dz, void* grad_x,
                        int64_t rows, int64_t length, BackwardConstants k, bool silu);

  // Channels last: C channels of `rows` pixels, which are row_stride apart in x, out_stride in y; grad_x is dense.
  // moments[g] are overwritten; scratch holds 3 * C floats. At most a few hundred pixels at a time.
  void (*moments_pixels)(const void* x, int64_t rows, int64_t row_stride, int64_t C, int64_t groups, const float* add,
                         float* scratch, Moments* moments);
  void (*forward_pixels)(const void* x, int64_t row_stride, void* y, int64_t out_stride, int64_t rows, int64_t C,
                         ForwardConstants k, bool silu);
  // sums: (3, C), added to; scratch holds 3 * C floats.
  void (*backward_sums_pixels)(const void* x, int64_t row_stride, const void* grad_y, GradientStrides grad,
                               float* kept_dz, int64_t rows, int64_t C, BackwardConstants k, bool silu, float* scratch,
                               double* sums);
  void (*backward_pixels)(const void* x, int64_t row_stride, const void* grad_y, GradientStrides grad,
                          const float* kept_dz, void* grad_x, int64_t rows, int64_t C, BackwardConstants k, bool silu);
};

inline void combine(Moments& total, const Moments& part) {
  const double count = total.count + part.count;
  const double delta = part.mean - total.mean;
  total.mean += delta * (part.count / count);
  total.m2 += part.m2 + delta * delta * (total.count * part.count / count);
  total.count = count;
}

#define FASTDISTILL_DECLARE(isa)                                \
  namespace isa {                                               \
  const GroupNormSiluKernels& group_norm_silu_kernels(Element); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
