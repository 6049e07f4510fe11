// The loops of layer_norm for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
//
// Two passes over a row for its mean and its variance: a row is small, and the second pass finds it in cache. The
// mean's own rounding error is the mean of the differences to it (`drift`), and goes into xhat: a mean of 100 at a
// deviation of 0.01 keeps its digits.
#include "layer_norm_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

template <typename T>
inline const T* row(ConstRows rows, int64_t i) {
  return (const T*)rows.data + i * rows.stride;
}

// body(i, lanes, turn): two sums take turns, because one alone waits for each addition.
template <typename Body>
inline void for_steps_in_turns(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + 2 * kStep <= length; i += 2 * kStep) {
    body(i, Whole{}, 0);
    body(i + kStep, Whole{}, 1);
  }
  for_steps(length - i, [&](int64_t j, auto lanes) { body(i + j, lanes, 0); });
}

inline float sum(const Pair (&parts)[2]) { return sum(parts[0] + parts[1]); }

// s, where there is a residual, is written and then read as rounded.
template <typename T>
void forward_row(const T* x, const T* residual, T* s, T* y, int64_t D, const float* weight, const float* bias,
                 double eps, float* mean, float* rstd) {
  Pair total[2] = {};
  if (residual) {
    for_steps_in_turns(D, [&](int64_t i, auto lanes, int turn) {
      store(s + i, load(x + i, lanes) + load(residual + i, lanes), lanes);
      total[turn] = total[turn] + load(s + i, lanes);
    });
    x = s;
  } else {
    for_steps_in_turns(D, [&](int64_t i, auto lanes, int turn) { total[turn] = total[turn] + load(x + i, lanes); });
  }
  const float center = sum(total) / (float)D;
  const Pair centers = broadcast_pair(center);
  Pair first[2] = {}, second[2] = {};
  for_steps_in_turns(D, [&](int64_t i, auto lanes, int turn) {
    const Pair d = keep<T>(load(x + i, lanes) - centers, lanes);
    first[turn] = first[turn] + d;
    second[turn] = second[turn] + d * d;
  });
  const double drift = sum(first) / (double)D, variance = sum(second) / (double)D - drift * drift;
  const double reciprocal = 1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps);
  *mean = (float)(center + drift);
  *rstd = (float)reciprocal;
  const Pair scale = broadcast_pair(*rstd), offset = broadcast_pair((float)(-drift * reciprocal));
  for_steps(D, [&](int64_t i, auto lanes) {
    const Pair xhat = (load(x + i, lanes) - centers) * scale + offset;
    store(y + i, xhat * load_floats<T>(weight + i, lanes) + load_floats<T>(bias + i, lanes), lanes);
  });
}

template <typename T>
void forward(ConstRows x, ConstRows residual, void* s, void* y, int64_t rows, int64_t D, const float* weight,
             const float* bias, double eps, float* mean, float* rstd) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* added = residual.data ? row<T>(residual, i) : nullptr;
    forward_row(row<T>(x, i), added, (T*)s + (added ? i * D : 0), (T*)y + i * D, D, weight, bias, eps, mean + i,
                rstd + i);
  }
}

// grad_x = rstd (w dy - m1 - xhat m2) + grad_s,   m1 = mean(w dy),  m2 = mean(w dy xhat)
template <typename T, bool kSums>
void backward_row(const T* grad_y, const T* grad_s, const T* s, T* grad_x, int64_t D, const float* weight, float mean,
                  float rstd, float* sums) {
  const Pair center = broadcast_pair(mean), scale = broadcast_pair(rstd);
  Pair s_wdy[2] = {}, s_wdy_xhat[2] = {}, s_xhat[2] = {};
  for_steps_in_turns(D, [&](int64_t i, auto lanes, int turn) {
    const Pair xhat = keep<T>((load(s + i, lanes) - center) * scale, lanes);
    const Pair wdy = load(grad_y + i, lanes) * load_floats<T>(weight + i, lanes);
    s_wdy[turn] = s_wdy[turn] + wdy;
    s_wdy_xhat[turn] = s_wdy_xhat[turn] + wdy * xhat;
    s_xhat[turn] = s_xhat[turn] + xhat;
  });
  const double m1 = sum(s_wdy) / (double)D, off = sum(s_xhat) / (double)D;
  const double m2 = sum(s_wdy_xhat) / (double)D - off * m1;
  const Pair drift = broadcast_pair((float)off), a = broadcast_pair((float)m1), b = broadcast_pair((float)m2);
  // A row of one value: y does not depend on it, but the rounding of w dy times rstd = 1/sqrt(eps) would.
  const Pair factor = D > 1 ? scale : Pair{};
  for_steps(D, [&](int64_t i, auto lanes) {
    const Pair xhat = (load(s + i, lanes) - center) * scale - drift, dy = load(grad_y + i, lanes);
    Pair dx = (dy * load_floats<T>(weight + i, lanes) - a - xhat * b) * factor;
    if (grad_s) dx = dx + load(grad_s + i, lanes);
    store(grad_x + i, dx, lanes);
    if constexpr (kSums) {
      store_floats<T>(sums + i, load_floats<T>(sums + i, lanes) + dy * xhat, lanes);
      store_floats<T>(sums + D + i, load_floats<T>(sums + D + i, lanes) + dy, lanes);
    }
  });
}

template <typename T>
void backward(ConstRows grad_y, ConstRows grad_s, ConstRows s, void* grad_x, int64_t rows, int64_t D,
              const float* weight, const float* mean, const float* rstd, float* sums) {
  auto run = sums ? backward_row<T, true> : backward_row<T, false>;
  for (int64_t i = 0; i < rows; ++i) {
    const T* added = grad_s.data ? row<T>(grad_s, i) : nullptr;
    run(row<T>(grad_y, i), added, row<T>(s, i), (T*)grad_x + i * D, D, weight, mean[i], rstd[i], sums);
  }
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
