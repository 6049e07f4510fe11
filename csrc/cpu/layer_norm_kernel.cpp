// The loops of layer_norm for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
//
// Two passes over a row for its mean and its variance: a row is small, and the second pass finds it in cache. The mean's
// own rounding error is the mean of the differences to it (`drift`), and goes into xhat: a mean of 100 at a deviation of
// 0.01 keeps its digits.
#include "layer_norm_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

constexpr int64_t kStripBytes = 32768;  // of x in a strip; longer rows are worked on one by one, to stay in cache

template <typename T>
inline const T* row(ConstRows rows, int64_t i) {
  return (const T*)rows.data + i * rows.stride;
}

// Calls strip(first row, Count<rows of the strip>).
template <int R>
struct Count {
  static constexpr int value = R;
};
template <typename Body>
inline void for_strips(int64_t rows, int64_t row_bytes, const Body& strip) {
  int64_t i = 0;
  if (kLayerNormStrip * row_bytes <= kStripBytes)
    for (; i + kLayerNormStrip <= rows; i += kLayerNormStrip) strip(i, Count<kLayerNormStrip>{});
  for (; i < rows; ++i) strip(i, Count<1>{});
}

template <typename T, int R>
void forward_strip(const T* const (&x)[R], const T* const (&residual)[R], T* s, T* y, int64_t D, const float* weight,
                   const float* bias, double eps, float* mean, float* rstd) {
  const T* u[R];
  Pair total[R] = {};
  if (s) {
    for (int r = 0; r < R; ++r) u[r] = s + r * D;
    for_steps(D, [&](int64_t i, auto lanes) {
      for (int r = 0; r < R; ++r) {
        store(s + r * D + i, load(x[r] + i, lanes) + load(residual[r] + i, lanes), lanes);
        total[r] = total[r] + load(u[r] + i, lanes);  // as rounded
      }
    });
  } else {
    for (int r = 0; r < R; ++r) u[r] = x[r];
    for_steps(D, [&](int64_t i, auto lanes) {
      for (int r = 0; r < R; ++r) total[r] = total[r] + load(u[r] + i, lanes);
    });
  }
  Pair center[R], first[R] = {}, second[R] = {};
  for (int r = 0; r < R; ++r) center[r] = broadcast_pair(sum(total[r]) / (float)D);
  for_steps(D, [&](int64_t i, auto lanes) {
    for (int r = 0; r < R; ++r) {
      const Pair d = keep<T>(load(u[r] + i, lanes) - center[r], lanes);
      first[r] = first[r] + d;
      second[r] = second[r] + d * d;
    }
  });
  Pair scale[R], offset[R];
  for (int r = 0; r < R; ++r) {
    const double drift = sum(first[r]) / (double)D, variance = sum(second[r]) / (double)D - drift * drift;
    const double reciprocal = 1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps);
    mean[r] = (float)(center[r].a[0] + drift);
    rstd[r] = (float)reciprocal;
    scale[r] = broadcast_pair(rstd[r]);
    offset[r] = broadcast_pair((float)(-drift * reciprocal));
  }
  for_steps(D, [&](int64_t i, auto lanes) {
    const Pair w = load_floats<T>(weight + i, lanes), b = load_floats<T>(bias + i, lanes);
    for (int r = 0; r < R; ++r) {
      const Pair xhat = (load(u[r] + i, lanes) - center[r]) * scale[r] + offset[r];
      store(y + r * D + i, xhat * w + b, lanes);
    }
  });
}

template <typename T>
void forward(ConstRows x, ConstRows residual, void* s, void* y, int64_t rows, int64_t D, const float* weight,
             const float* bias, double eps, float* mean, float* rstd) {
  for_strips(rows, D * (int64_t)sizeof(T), [&](int64_t i, auto count) {
    constexpr int R = decltype(count)::value;
    const T *from[R], *added[R];
    for (int r = 0; r < R; ++r) {
      from[r] = row<T>(x, i + r);
      added[r] = residual.data ? row<T>(residual, i + r) : nullptr;
    }
    forward_strip<T, R>(from, added, s ? (T*)s + i * D : nullptr, (T*)y + i * D, D, weight, bias, eps, mean + i,
                        rstd + i);
  });
}

// grad_x = rstd (w dy - m1 - xhat m2) + grad_s,   m1 = mean(w dy),  m2 = mean(w dy xhat)
template <typename T, int R, bool kSums>
void backward_strip(const T* const (&grad_y)[R], const T* const (&grad_s)[R], const T* const (&s)[R], T* grad_x,
                    int64_t D, const float* weight, const float* mean, const float* rstd, float* sums) {
  Pair center[R], scale[R], s_wdy[R] = {}, s_wdy_xhat[R] = {}, s_xhat[R] = {};
  for (int r = 0; r < R; ++r) {
    center[r] = broadcast_pair(mean[r]);
    scale[r] = broadcast_pair(rstd[r]);
  }
  for_steps(D, [&](int64_t i, auto lanes) {
    const Pair w = load_floats<T>(weight + i, lanes);
    for (int r = 0; r < R; ++r) {
      const Pair xhat = keep<T>((load(s[r] + i, lanes) - center[r]) * scale[r], lanes);
      const Pair wdy = load(grad_y[r] + i, lanes) * w;
      s_wdy[r] = s_wdy[r] + wdy;
      s_wdy_xhat[r] = s_wdy_xhat[r] + wdy * xhat;
      s_xhat[r] = s_xhat[r] + xhat;
    }
  });
  // A row of one value: y does not depend on it, but the rounding of w dy times rstd = 1/sqrt(eps) would.
  Pair drift[R], a[R], b[R], factor[R];
  for (int r = 0; r < R; ++r) {
    const double m1 = sum(s_wdy[r]) / (double)D, off = sum(s_xhat[r]) / (double)D;
    const double m2 = sum(s_wdy_xhat[r]) / (double)D - off * m1;
    drift[r] = broadcast_pair((float)off);
    a[r] = broadcast_pair((float)m1);
    b[r] = broadcast_pair((float)m2);
    factor[r] = D > 1 ? scale[r] : Pair{};
  }
  for_steps(D, [&](int64_t i, auto lanes) {
    const Pair w = load_floats<T>(weight + i, lanes);
    Pair dw = {}, db = {};
    for (int r = 0; r < R; ++r) {
      const Pair xhat = (load(s[r] + i, lanes) - center[r]) * scale[r] - drift[r];
      const Pair dy = load(grad_y[r] + i, lanes);
      Pair dx = (dy * w - a[r] - xhat * b[r]) * factor[r];
      if (grad_s[r]) dx = dx + load(grad_s[r] + i, lanes);
      store(grad_x + r * D + i, dx, lanes);
      if constexpr (kSums) {
        dw = dw + dy * xhat;
        db = db + dy;
      }
    }
    if constexpr (kSums) {
      store_floats<T>(sums + i, load_floats<T>(sums + i, lanes) + dw, lanes);
      store_floats<T>(sums + D + i, load_floats<T>(sums + D + i, lanes) + db, lanes);
    }
  });
}

template <typename T>
void backward(ConstRows grad_y, ConstRows grad_s, ConstRows s, void* grad_x, int64_t rows, int64_t D,
              const float* weight, const float* mean, const float* rstd, float* sums) {
  for_strips(rows, D * (int64_t)sizeof(T), [&](int64_t i, auto count) {
    constexpr int R = decltype(count)::value;
    const T *at_y[R], *at_sum[R], *from[R];
    for (int r = 0; r < R; ++r) {
      at_y[r] = row<T>(grad_y, i + r);
      at_sum[r] = grad_s.data ? row<T>(grad_s, i + r) : nullptr;
      from[r] = row<T>(s, i + r);
    }
    auto run = sums ? backward_strip<T, R, true> : backward_strip<T, R, false>;
    run(at_y, at_sum, from, (T*)grad_x + i * D, D, weight, mean + i, rstd + i, sums);
  });
}

template <typename T>
constexpr LayerNormKernels kKernels = {forward<T>, backward<T>};

}  // namespace

const LayerNormKernels& layer_norm_kernels(Element element) {
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
