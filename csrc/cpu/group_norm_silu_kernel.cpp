// The loops of group_norm_silu for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
#include "group_norm_silu_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

// A whole vector, or the first n lanes at the end of a row: the loops are written once and compiled for both.
struct Whole {
  static constexpr int n = kWidth;
};
struct Part {
  int n;
};

template <typename T>
inline Vec load(const T* p, Whole) { return FASTDISTILL_ISA::load(p); }
template <typename T>
inline Vec load(const T* p, Part part) { return load_n(p, part.n); }
template <typename T>
inline void store(T* p, Vec v, Whole) { FASTDISTILL_ISA::store(p, v); }
template <typename T>
inline void store(T* p, Vec v, Part part) { store_n(p, v, part.n); }
inline Vec keep(Vec v, Whole) { return v; }
inline Vec keep(Vec v, Part part) { return keep_n(v, part.n); }

template <typename Body>
inline void for_vectors(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + kWidth <= length; i += kWidth) body(i, Whole{});
  if (i < length) body(i, Part{(int)(length - i)});
}

template <typename T, typename Lanes>
inline Vec load_gradient(const T* p, int64_t stride, Lanes lanes) {
  return stride == 1 ? load(p, lanes) : load_strided(p, stride, lanes.n);
}

inline Vec silu_of(Vec z) { return z * sigmoid(z); }

inline Vec silu_derivative(Vec z) {
  const Vec s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

// dz = grad_y * silu'(z)
template <bool kSilu>
inline Vec grad_z(Vec grad_y, Vec z) {
  if constexpr (kSilu) return grad_y * silu_derivative(z);
  return grad_y;
}

// ---- contiguous -----------------------------------------------------------------------------------------------------

template <typename T>
Moments moments_rows(const void* x_, int64_t rows, int64_t length, int64_t row_stride, const float* add) {
  const T* x = (const T*)x_;
  const double count = (double)rows * (double)length;
  Vec total = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * row_stride;
    const Vec offset = broadcast(add ? add[r] : 0.0f);
    for_vectors(length, [&](int64_t i, auto lanes) { total += keep(load(row + i, lanes) + offset, lanes); });
  }
  const double mean = sum(total) / count;
  // The second sweep is relative to this float; what it differs from the true mean by is put back below.
  const float pivot = (float)mean;
  Vec first = {}, second = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * row_stride;
    const Vec offset = broadcast(add ? add[r] : 0.0f);
    for_vectors(length, [&](int64_t i, auto lanes) {
      const Vec d = keep((load(row + i, lanes) + offset) - pivot, lanes);
      first += d;
      second += d * d;
    });
  }
  const double residual = sum(first) / count;
  return {count, pivot + residual, sum(second) - residual * residual * count};
}

template <typename T, bool kSilu>
void forward_row(const T* x, T* y, int64_t length, float center, float scale, float shift) {
  for_vectors(length, [&](int64_t i, auto lanes) {
    Vec z = (load(x + i, lanes) - center) * scale + shift;
    if constexpr (kSilu) z = silu_of(z);
    store(y + i, z, lanes);
  });
}

template <typename T>
void forward_row(const void* x, void* y, int64_t length, ForwardConstants k, int64_t c, bool silu) {
  auto run = silu ? forward_row<T, true> : forward_row<T, false>;
  run((const T*)x, (T*)y, length, k.center[c], k.scale[c], k.shift[c]);
}

template <typename T, bool kSilu>
void backward_sums_row(const T* x, const T* grad_y, int64_t grad_stride, int64_t length, BackwardConstants k, int64_t c,
                       double* sums) {
  const float center = k.center[c], rstd = k.rstd[c], offset = k.offset[c], weight = k.weight[c], bias = k.bias[c];
  constexpr int64_t kBlock = 4096;  // float32 within a block, double between them
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t n = length - begin < kBlock ? length - begin : kBlock;
    Vec s_dz = {}, s_dz_xhat = {}, s_xhat = {};
    for_vectors(n, [&](int64_t i, auto lanes) {
      const Vec xhat = keep((load(x + begin + i, lanes) - center) * rstd + offset, lanes);
      const Vec dz = grad_z<kSilu>(load_gradient(grad_y + (begin + i) * grad_stride, grad_stride, lanes),
                                   xhat * weight + bias);
      s_dz += dz;
      s_dz_xhat += dz * xhat;
      s_xhat += xhat;
    });
    sums[0] += sum(s_dz);
    sums[1] += sum(s_dz_xhat);
    sums[2] += sum(s_xhat);
  }
}

template <typename T>
void backward_sums_row(const void* x, const void* grad_y, int64_t grad_stride, int64_t length, BackwardConstants k,
                       int64_t c, bool silu, double* sums) {
  auto run = silu ? backward_sums_row<T, true> : backward_sums_row<T, false>;
  run((const T*)x, (const T*)grad_y, grad_stride, length, k, c, sums);
}

template <typename T, bool kSilu>
void backward_row(const T* x, const T* grad_y, int64_t grad_stride, T* grad_x, int64_t length, BackwardConstants k,
                  int64_t ch) {
  const float center = k.center[ch], rstd = k.rstd[ch], offset = k.offset[ch], weight = k.weight[ch];
  const float bias = k.bias[ch], a = k.a[ch], b = k.b[ch], c = k.c[ch];
  for_vectors(length, [&](int64_t i, auto lanes) {
    const Vec xhat = (load(x + i, lanes) - center) * rstd + offset;
    const Vec dz = grad_z<kSilu>(load_gradient(grad_y + i * grad_stride, grad_stride, lanes), xhat * weight + bias);
    store(grad_x + i, a * dz - b - c * xhat, lanes);
  });
}

template <typename T>
void backward_row(const void* x, const void* grad_y, int64_t grad_stride, void* grad_x, int64_t length,
                  BackwardConstants k, int64_t c, bool silu) {
  auto run = silu ? backward_row<T, true> : backward_row<T, false>;
  run((const T*)x, (const T*)grad_y, grad_stride, (T*)grad_x, length, k, c);
}

// ---- channels last --------------------------------------------------------------------------------------------------

template <typename T>
void moments_pixels(const void* x_, int64_t rows, int64_t row_stride, int64_t C, int64_t groups, const float* add,
                    float* scratch, Moments* moments) {
  const T* x = (const T*)x_;
  const int64_t per_group = C / groups;
  const double count = (double)rows * (double)per_group;
  float* first = scratch;           // per-channel sums of x, later of x - pivot
  float* second = scratch + C;      // per-channel sums of (x - pivot)^2
  float* pivot = scratch + 2 * C;   // the group's mean, less this channel's `add`
  auto group_sum = [&](const float* values, int64_t g) {
    Vec total = {};
    for_vectors(per_group, [&](int64_t i, auto lanes) { total += load(values + g * per_group + i, lanes); });
    return (double)sum(total);
  };

  for_vectors(C, [&](int64_t c, auto lanes) {
    Vec total = add ? load(add + c, lanes) * (float)rows : Vec{};
    for (int64_t r = 0; r < rows; ++r) total += load(x + r * row_stride + c, lanes);
    store(first + c, total, lanes);
  });
  for (int64_t g = 0; g < groups; ++g) {
    const float mean = (float)(group_sum(first, g) / count);
    moments[g].mean = mean;
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) pivot[c] = mean;
  }
  for_vectors(C, [&](int64_t c, auto lanes) {
    const Vec center = load(pivot + c, lanes), offset = add ? load(add + c, lanes) : Vec{};
    Vec s1 = {}, s2 = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec d = (load(x + r * row_stride + c, lanes) + offset) - center;
      s1 += d;
      s2 += d * d;
    }
    store(first + c, s1, lanes);
    store(second + c, s2, lanes);
  });
  for (int64_t g = 0; g < groups; ++g) {
    const double residual = group_sum(first, g) / count;
    moments[g] = {count, moments[g].mean + residual, group_sum(second, g) - residual * residual * count};
  }
}

template <typename T, bool kSilu>
void forward_pixels(const T* x, int64_t row_stride, T* y, int64_t rows, int64_t C, ForwardConstants k) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * row_stride;
    T* to = y + r * C;
    for_vectors(C, [&](int64_t c, auto lanes) {
      Vec z = (load(from + c, lanes) - load(k.center + c, lanes)) * load(k.scale + c, lanes) + load(k.shift + c, lanes);
      if constexpr (kSilu) z = silu_of(z);
      store(to + c, z, lanes);
    });
  }
}

template <typename T>
void forward_pixels(const void* x, int64_t row_stride, void* y, int64_t rows, int64_t C, ForwardConstants k,
                    bool silu) {
  auto run = silu ? forward_pixels<T, true> : forward_pixels<T, false>;
  run((const T*)x, row_stride, (T*)y, rows, C, k);
}

template <typename T, bool kSilu>
void backward_sums_pixels(const T* x, int64_t row_stride, const T* grad_y, int64_t grad_row_stride,
                          int64_t grad_channel_stride, int64_t rows, int64_t C, BackwardConstants k, double* sums) {
  for_vectors(C, [&](int64_t c, auto lanes) {
    const Vec center = load(k.center + c, lanes), rstd = load(k.rstd + c, lanes), offset = load(k.offset + c, lanes);
    const Vec weight = load(k.weight + c, lanes), bias = load(k.bias + c, lanes);
    Vec s_dz = {}, s_dz_xhat = {}, s_xhat = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec xhat = (load(x + r * row_stride + c, lanes) - center) * rstd + offset;
      const T* grad = grad_y + r * grad_row_stride + c * grad_channel_stride;
      const Vec dz = grad_z<kSilu>(load_gradient(grad, grad_channel_stride, lanes), xhat * weight + bias);
      s_dz += dz;
      s_dz_xhat += dz * xhat;
      s_xhat += xhat;
    }
    for (int i = 0; i < lanes.n; ++i) {
      sums[c + i] += s_dz[i];
      sums[C + c + i] += s_dz_xhat[i];
      sums[2 * C + c + i] += s_xhat[i];
    }
  });
}

template <typename T>
void backward_sums_pixels(const void* x, int64_t row_stride, const void* grad_y, int64_t grad_row_stride,
                          int64_t grad_channel_stride, int64_t rows, int64_t C, BackwardConstants k, bool silu,
                          double* sums) {
  auto run = silu ? backward_sums_pixels<T, true> : backward_sums_pixels<T, false>;
  run((const T*)x, row_stride, (const T*)grad_y, grad_row_stride, grad_channel_stride, rows, C, k, sums);
}

template <typename T, bool kSilu>
void backward_pixels(const T* x, int64_t row_stride, const T* grad_y, int64_t grad_row_stride,
                     int64_t grad_channel_stride, T* grad_x, int64_t rows, int64_t C, BackwardConstants k) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * row_stride;
    const T* grad = grad_y + r * grad_row_stride;
    T* to = grad_x + r * C;
    for_vectors(C, [&](int64_t c, auto lanes) {
      const Vec xhat =
          (load(from + c, lanes) - load(k.center + c, lanes)) * load(k.rstd + c, lanes) + load(k.offset + c, lanes);
      const Vec dz = grad_z<kSilu>(load_gradient(grad + c * grad_channel_stride, grad_channel_stride, lanes),
                                   xhat * load(k.weight + c, lanes) + load(k.bias + c, lanes));
      store(to + c, load(k.a + c, lanes) * dz - load(k.b + c, lanes) - load(k.c + c, lanes) * xhat, lanes);
    });
  }
}

template <typename T>
void backward_pixels(const void* x, int64_t row_stride, const void* grad_y, int64_t grad_row_stride,
                     int64_t grad_channel_stride, void* grad_x, int64_t rows, int64_t C, BackwardConstants k,
                     bool silu) {
  auto run = silu ? backward_pixels<T, true> : backward_pixels<T, false>;
  run((const T*)x, row_stride, (const T*)grad_y, grad_row_stride, grad_channel_stride, (T*)grad_x, rows, C, k);
}

template <typename T>
constexpr GroupNormSiluKernels kKernels = {
    moments_rows<T>,   forward_row<T>,    backward_sums_row<T>,    backward_row<T>,
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
