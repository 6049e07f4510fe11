// The loops of group_norm_silu for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
//
// Moments in one sweep: deviations are taken from a pivot, the mean of a first sample of at least 1/32 of the values.
// A pivot that far off (its distance d from the mean) would itself raise the variance by d^2 / 32, so the cancellation
// in sum(d^2) - sum(d)^2 / n costs at most a factor of 33 in rounding error, for any input, and about 1 for ordinary
// ones.
#include "group_norm_silu_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

constexpr int64_t kSampleElements = 256;  // of at most 8192 (contiguous)
constexpr int64_t kSamplePixels = 16;     // of at most 512 (channels last)
constexpr int64_t kStrip = 8;             // pixels that share one load of the constants, or of the sums

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T, typename Lanes>
inline Pair load_gradient(const T* p, int64_t stride, Lanes lanes) {
  return stride == 1 ? load(p, lanes) : load_strided(p, stride, lanes);
}

// dz = grad_y * silu'(z)
template <bool kSilu>
inline Pair grad_z(Pair grad_y, Pair z) {
  if constexpr (kSilu) return grad_y * silu_derivative(z);
  return grad_y;
}

// ---- contiguous -----------------------------------------------------------------------------------------------------

template <typename T>
float sample_mean(const T* x, int64_t rows, int64_t length, const float* add) {
  const int64_t sampled_rows = min(rows, (kSampleElements + length - 1) / length);
  const int64_t sampled = min(length, kSampleElements);
  Pair total = {};
  for (int64_t r = 0; r < sampled_rows; ++r) {
    const Pair offset = broadcast_pair(add ? add[r] : 0.0f);
    for_steps(sampled, [&](int64_t i, auto lanes) {
      total = total + keep<T>(load(x + r * length + i, lanes) + offset, lanes);
    });
  }
  return sum(total) / (float)(sampled_rows * sampled);
}

template <typename T>
Moments moments_rows(const void* x_, int64_t rows, int64_t length, const float* add) {
  const T* x = (const T*)x_;
  const float pivot = sample_mean(x, rows, length, add);
  const Pair center = broadcast_pair(pivot);
  Pair first = {}, second = {};
  for (int64_t r = 0; r < rows; ++r) {
    const Pair offset = broadcast_pair(add ? add[r] : 0.0f);
    for_steps(length, [&](int64_t i, auto lanes) {
      const Pair d = keep<T>((load(x + r * length + i, lanes) + offset) - center, lanes);
      first = first + d;
      second = second + d * d;
    });
  }
  const double count = (double)rows * (double)length, from_pivot = sum(first) / count;
  return {count, pivot + from_pivot, sum(second) - from_pivot * from_pivot * count};
}

template <typename T, bool kSilu>
void forward_rows(const T* x, T* y, int64_t rows, int64_t length, ForwardConstants k) {
  for (int64_t r = rows - 1; r >= 0; --r) {
    const Pair center = broadcast_pair(k.center[r]), scale = broadcast_pair(k.scale[r]);
    const Pair shift = broadcast_pair(k.shift[r]);
    for_steps(length, [&](int64_t i, auto lanes) {
      Pair z = (load(x + r * length + i, lanes) - center) * scale + shift;
      if constexpr (kSilu) z = silu(z);
      store(y + r * length + i, z, lanes);
    });
  }
}

template <typename T>
void forward_rows(const void* x, void* y, int64_t rows, int64_t length, ForwardConstants k, bool silu) {
  auto run = silu ? forward_rows<T, true> : forward_rows<T, false>;
  run((const T*)x, (T*)y, rows, length, k);
}

template <typename T, bool kSilu>
void backward_sums_rows(const T* x, const T* grad_y, GradientStrides grad, float* kept_dz, int64_t rows, int64_t length,
                        BackwardConstants k, double* sums, int64_t sums_stride) {
  constexpr int64_t kBlock = 4096;  // float32 within a block, double between them
  for (int64_t r = 0; r < rows; ++r) {
    const Pair center = broadcast_pair(k.center[r]), rstd = broadcast_pair(k.rstd[r]);
    const Pair offset = broadcast_pair(k.offset[r]);
    const Pair weight = broadcast_pair(k.weight[r]), bias = broadcast_pair(k.bias[r]);
    double total[3] = {0, 0, 0};
    for (int64_t begin = 0; begin < length; begin += kBlock) {
      Pair s_dz = {}, s_dz_xhat = {}, s_xhat = {};
      for_steps(min(kBlock, length - begin), [&](int64_t i, auto lanes) {
        const T* at_x = x + r * length + begin + i;
        const T* at_grad = grad_y + r * grad.channel + (begin + i) * grad.spatial;
        const Pair xhat = keep<T>((load(at_x, lanes) - center) * rstd + offset, lanes);
        const Pair dz = grad_z<kSilu>(load_gradient(at_grad, grad.spatial, lanes), xhat * weight + bias);
        if (kept_dz) store_floats<T>(kept_dz + r * length + begin + i, dz, lanes);
        s_dz = s_dz + dz;
        s_dz_xhat = s_dz_xhat + dz * xhat;
        s_xhat = s_xhat + xhat;
      });
      total[0] += sum(s_dz);
      total[1] += sum(s_dz_xhat);
      total[2] += sum(s_xhat);
    }
    for (int i = 0; i < 3; ++i) sums[i * sums_stride + r] = total[i];
  }
}

template <typename T>
void backward_sums_rows(const void* x, const void* grad_y, GradientStrides grad, float* kept_dz, int64_t rows,
                        int64_t length, BackwardConstants k, bool silu, double* sums, int64_t sums_stride) {
  auto run = silu ? backward_sums_rows<T, true> : backward_sums_rows<T, false>;
  run((const T*)x, (const T*)grad_y, grad, kept_dz, rows, length, k, sums, sums_stride);
}

template <typename T, bool kSilu, bool kKept>
void backward_rows(const T* x, const T* grad_y, GradientStrides grad, const float* kept_dz, T* grad_x, int64_t rows,
                   int64_t length, BackwardConstants k) {
  for (int64_t r = rows - 1; r >= 0; --r) {
    const Pair center = broadcast_pair(k.center[r]), rstd = broadcast_pair(k.rstd[r]);
    const Pair offset = broadcast_pair(k.offset[r]);
    const Pair weight = broadcast_pair(k.weight[r]), bias = broadcast_pair(k.bias[r]);
    const Pair a = broadcast_pair(k.a[r]), b = broadcast_pair(k.b[r]), c = broadcast_pair(k.c[r]);
    for_steps(length, [&](int64_t i, auto lanes) {
      const Pair xhat = (load(x + r * length + i, lanes) - center) * rstd + offset;
      Pair dz;
      if constexpr (kKept) {
        dz = load_floats<T>(kept_dz + r * length + i, lanes);
      } else {
        const T* at_grad = grad_y + r * grad.channel + i * grad.spatial;
        dz = grad_z<kSilu>(load_gradient(at_grad, grad.spatial, lanes), xhat * weight + bias);
      }
      store(grad_x + r * length + i, a * dz - b - c * xhat, lanes);
    });
  }
}

template <typename T>
void backward_rows(const void* x, const void* grad_y, GradientStrides grad, const float* kept_dz, void* grad_x,
                   int64_t rows, int64_t length, BackwardConstants k, bool silu) {
  auto run = kept_dz ? backward_rows<T, true, true>
             : silu  ? backward_rows<T, true, false>
                     : backward_rows<T, false, false>;
  run((const T*)x, (const T*)grad_y, grad, kept_dz, (T*)grad_x, rows, length, k);
}

// ---- channels last --------------------------------------------------------------------------------------------------

// Strips of rows are several interleaved streams of memory, which the processor's own prefetcher does not follow: asks
// for the same channels of the next strip. Measured on 512x128x128 float32: 0.33 instead of 0.60 ns per element.
template <typename T>
inline void prefetch_next_strip(const T* p, int64_t row_stride) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kStep; i += kLine) __builtin_prefetch(p + kStrip * row_stride + i);
}

template <typename Body>
inline void for_strips(int64_t rows, const Body& body) {
  for (int64_t begin = 0; begin < rows; begin += kStrip) body(begin, min(rows, begin + kStrip));
}

// Per channel, in channel order: the mean of the first pixels.
template <typename T>
void sample_means(const T* x, int64_t rows, int64_t row_stride, int64_t C, float* means) {
  const int64_t sampled = min(rows, kSamplePixels);
  const Pair inverse = broadcast_pair(1.0f / (float)sampled);
  for_steps(C, [&](int64_t c, auto lanes) {
    Pair total = {};
    for (int64_t r = 0; r < sampled; ++r) total = total + load(x + r * row_stride + c, lanes);
    store_floats<T>(means + c, total * inverse, lanes);
  });
}

template <typename T>
void moments_pixels(const void* x_, int64_t rows, int64_t row_stride, int64_t C, int64_t groups, const float* add,
                    float* scratch, Moments* moments) {
  const T* x = (const T*)x_;
  float *pivot = scratch, *first = scratch + C, *second = scratch + 2 * C;
  sample_means(x, rows, row_stride, C, pivot);
  memset(first, 0, 2 * C * sizeof(float));
  for_strips(rows, [&](int64_t begin, int64_t end) {
    for_steps(C, [&](int64_t c, auto lanes) {
      const Pair center = load_floats<T>(pivot + c, lanes);
      Pair s1 = load_floats<T>(first + c, lanes), s2 = load_floats<T>(second + c, lanes);
      for (int64_t r = begin; r < end; ++r) {
        prefetch_next_strip(x + r * row_stride + c, row_stride);
        const Pair d = load(x + r * row_stride + c, lanes) - center;
        s1 = s1 + d;
        s2 = s2 + d * d;
      }
      store_floats<T>(first + c, s1, lanes);
      store_floats<T>(second + c, s2, lanes);
    });
  });

  // From channels to groups. In double, relative to the group's first channel, so that a common mean costs no digits.
  const int64_t per_group = C / groups;
  const double n = (double)rows, inverse_n = 1.0 / n, inverse_channels = 1.0 / (double)per_group;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t from = g * per_group;
    const double reference = (double)pivot[from] + (add ? add[from] : 0.0f);
    double shift = 0, square = 0, within = 0;
    for (int64_t c = from; c < from + per_group; ++c) {
      const double from_pivot = first[c] * inverse_n;
      const double delta = ((double)pivot[c] + (add ? add[c] : 0.0f)) - reference + from_pivot;
      shift += delta;
      square += delta * delta;
      within += second[c] - first[c] * from_pivot;
    }
    const double between = square - shift * shift * inverse_channels;
    moments[g] = {n * (double)per_group, reference + shift * inverse_channels, within + n * between};
  }
}

template <typename T, bool kSilu>
void forward_pixels(const T* x, int64_t row_stride, T* y, int64_t out_stride, int64_t rows, int64_t C,
                    ForwardConstants k) {
  for_strips(rows, [&](int64_t begin, int64_t end) {
    for_steps(C, [&](int64_t c, auto lanes) {
      const Pair center = load_floats<T>(k.center + c, lanes), scale = load_floats<T>(k.scale + c, lanes);
      const Pair shift = load_floats<T>(k.shift + c, lanes);
      for (int64_t r = begin; r < end; ++r) {
        prefetch_next_strip(x + r * row_stride + c, row_stride);
        Pair z = (load(x + r * row_stride + c, lanes) - center) * scale + shift;
        if constexpr (kSilu) z = silu(z);
        store(y + r * out_stride + c, z, lanes);
      }
    });
  });
}

template <typename T>
void forward_pixels(const void* x, int64_t row_stride, void* y, int64_t out_stride, int64_t rows, int64_t C,
                    ForwardConstants k, bool silu) {
  auto run = silu ? forward_pixels<T, true> : forward_pixels<T, false>;
  run((const T*)x, row_stride, (T*)y, out_stride, rows, C, k);
}

template <typename T, bool kSilu>
void backward_sums_pixels(const T* x, int64_t row_stride, const T* grad_y, GradientStrides grad, float* kept_dz,
                          int64_t rows, int64_t C, BackwardConstants k, float* scratch, double* sums) {
  constexpr int64_t kBlock = 64;  // pixels: float32 within a block, double between them
  for (int64_t block = 0; block < rows; block += kBlock) {
    memset(scratch, 0, 3 * C * sizeof(float));
    for_strips(min(kBlock, rows - block), [&](int64_t begin, int64_t end) {
      for_steps(C, [&](int64_t c, auto lanes) {
        const Pair center = load_floats<T>(k.center + c, lanes), rstd = load_floats<T>(k.rstd + c, lanes);
        const Pair offset = load_floats<T>(k.offset + c, lanes);
        const Pair weight = load_floats<T>(k.weight + c, lanes), bias = load_floats<T>(k.bias + c, lanes);
        Pair s_dz = load_floats<T>(scratch + c, lanes), s_dz_xhat = load_floats<T>(scratch + C + c, lanes);
        Pair s_xhat = load_floats<T>(scratch + 2 * C + c, lanes);
        for (int64_t r = block + begin; r < block + end; ++r) {
          const T* at_grad = grad_y + r * grad.spatial + c * grad.channel;
          prefetch_next_strip(x + r * row_stride + c, row_stride);
          prefetch_next_strip(at_grad, grad.spatial);
          const Pair xhat = (load(x + r * row_stride + c, lanes) - center) * rstd + offset;
          const Pair dz = grad_z<kSilu>(load_gradient(at_grad, grad.channel, lanes), xhat * weight + bias);
          if (kept_dz) store_floats<T>(kept_dz + r * C + c, dz, lanes);
          s_dz = s_dz + dz;
          s_dz_xhat = s_dz_xhat + dz * xhat;
          s_xhat = s_xhat + xhat;
        }
        store_floats<T>(scratch + c, s_dz, lanes);
        store_floats<T>(scratch + C + c, s_dz_xhat, lanes);
        store_floats<T>(scratch + 2 * C + c, s_xhat, lanes);
      });
    });
    for (int64_t i = 0; i < 3 * C; ++i) sums[i] += scratch[i];
  }
}

template <typename T>
void backward_sums_pixels(const void* x, int64_t row_stride, const void* grad_y, GradientStrides grad, float* kept_dz,
                          int64_t rows, int64_t C, BackwardConstants k, bool silu, float* scratch, double* sums) {
  auto run = silu ? backward_sums_pixels<T, true> : backward_sums_pixels<T, false>;
  run((const T*)x, row_stride, (const T*)grad_y, grad, kept_dz, rows, C, k, scratch, sums);
}

template <typename T, bool kSilu, bool kKept>
void backward_pixels(const T* x, int64_t row_stride, const T* grad_y, GradientStrides grad, const float* kept_dz,
                     T* grad_x, int64_t rows, int64_t C, BackwardConstants k) {
  for_strips(rows, [&](int64_t begin, int64_t end) {
    for_steps(C, [&](int64_t c, auto lanes) {
      const Pair center = load_floats<T>(k.center + c, lanes), rstd = load_floats<T>(k.rstd + c, lanes);
      const Pair offset = load_floats<T>(k.offset + c, lanes);
      const Pair weight = load_floats<T>(k.weight + c, lanes), bias = load_floats<T>(k.bias + c, lanes);
      const Pair k_a = load_floats<T>(k.a + c, lanes), k_b = load_floats<T>(k.b + c, lanes);
      const Pair k_c = load_floats<T>(k.c + c, lanes);
      for (int64_t r = begin; r < end; ++r) {
        prefetch_next_strip(x + r * row_stride + c, row_stride);
        const Pair xhat = (load(x + r * row_stride + c, lanes) - center) * rstd + offset;
        Pair dz;
        if constexpr (kKept) {
          prefetch_next_strip(kept_dz + r * C + c, C);
          dz = load_floats<T>(kept_dz + r * C + c, lanes);
        } else {
          const T* at_grad = grad_y + r * grad.spatial + c * grad.channel;
          prefetch_next_strip(at_grad, grad.spatial);
          dz = grad_z<kSilu>(load_gradient(at_grad, grad.channel, lanes), xhat * weight + bias);
        }
        store(grad_x + r * C + c, k_a * dz - k_b - k_c * xhat, lanes);
      }
    });
  });
}

template <typename T>
void backward_pixels(const void* x, int64_t row_stride, const void* grad_y, GradientStrides grad, const float* kept_dz,
                     void* grad_x, int64_t rows, int64_t C, BackwardConstants k, bool silu) {
  auto run = kept_dz ? backward_pixels<T, true, true>
             : silu  ? backward_pixels<T, true, false>
                     : backward_pixels<T, false, false>;
  run((const T*)x, row_stride, (const T*)grad_y, grad, kept_dz, (T*)grad_x, rows, C, k);
}

template <typename T>
constexpr GroupNormSiluKernels kKernels = {
    moments_rows<T>,   forward_rows<T>,   backward_sums_rows<T>,   backward_rows<T>,
    moments_pixels<T>, forward_pixels<T>, backward_sums_pixels<T>, backward_pixels<T>,
};

}  // namespace

const GroupNormSiluKernels& group_norm_silu_kernels(Element element) {
  switch (element) {
    case Element::Float16:
      return kKernels<Half>;
    case Element::BFloat16:
      return kKernels<BFloat16>;
    default:
      return kKernels<float>;
  }
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
