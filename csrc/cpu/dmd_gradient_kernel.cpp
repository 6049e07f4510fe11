// The loops of dmd_gradient for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
#include "dmd_gradient_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

// Elements of a T in the places that `load` of a P gives its own; T is P or float.
template <typename P, typename T, typename Lanes>
inline Pair load_beside(const T* p, Lanes lanes) {
  if constexpr (sizeof(T) == sizeof(P)) {
    return load(p, lanes);
  } else {
    return load_floats<P>(p, lanes);
  }
}

inline Vec magnitude(Vec v) { return (Vec)((VecI)v & 0x7fffffff); }
inline Pair magnitude(Pair v) { return {magnitude(v.a), magnitude(v.b)}; }

template <typename P, bool kGuided>
struct Guided {
  const P *cond, *uncond;
  Pair scale;

  explicit Guided(GuidedPrediction p)
      : cond((const P*)p.cond), uncond((const P*)p.uncond), scale(broadcast_pair(p.scale)) {}

  template <typename Lanes>
  Pair at(int64_t i, Lanes lanes) const {
    const Pair c = load(cond + i, lanes);
    if constexpr (!kGuided) return c;
    const Pair u = load(uncond + i, lanes);
    return u + scale * (c - u);
  }
};

template <typename P, typename X, typename XT, bool kGuided>
float distance_guided(const X* x, const XT* x_t, Guided<P, kGuided> real, float from_x_t_, float from_pred_, int64_t n) {
  const Pair from_x_t = broadcast_pair(from_x_t_), from_pred = broadcast_pair(from_pred_);
  Pair total = {};
  if (x_t) {
    for_steps(n, [&](int64_t i, auto lanes) {
      const Pair mu = from_x_t * load_beside<P>(x_t + i, lanes) + from_pred * real.at(i, lanes);
      total = total + magnitude(load_beside<P>(x + i, lanes) - mu);
    });
  } else {
    for_steps(n, [&](int64_t i, auto lanes) {
      total = total + magnitude(load_beside<P>(x + i, lanes) - from_pred * real.at(i, lanes));
    });
  }
  return sum(total);
}

template <typename P, typename X, typename XT>
float distance(const void* x, const void* x_t, GuidedPrediction real, float from_x_t, float from_pred, int64_t n) {
  if (real.uncond)
    return distance_guided<P, X, XT>((const X*)x, (const XT*)x_t, Guided<P, true>(real), from_x_t, from_pred, n);
  return distance_guided<P, X, XT>((const X*)x, (const XT*)x_t, Guided<P, false>(real), from_x_t, from_pred, n);
}

// v, and 0 where it is not finite, which is counted: -1 in each lane.
inline Vec guard(Vec v, VecI& count) {
  const VecI finite = v - v == Vec{};
  count += ~finite;
  return (Vec)((VecI)v & finite);
}

inline int64_t sum_of(VecI v) {
  int64_t total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

template <typename P, bool kGuided>
DmdGradientSums gradient_guided(Guided<P, kGuided> real, const P* fake, float factor_, float scale_, float* to,
                                int64_t n) {
  const Pair factor = broadcast_pair(factor_), scale = broadcast_pair(scale_);
  Pair squares = {}, magnitudes = {};
  VecI count = {};
  for_steps(n, [&](int64_t i, auto lanes) {
    const Pair g = factor * (load(fake + i, lanes) - real.at(i, lanes));
    const Pair kept = {guard(g.a, count), guard(g.b, count)};
    store_floats<P>(to + i, scale * kept, lanes);
    squares = squares + kept * kept;
    magnitudes = magnitudes + magnitude(kept);
  });
  return {sum(squares), sum(magnitudes), -sum_of(count)};
}

template <typename P>
DmdGradientSums gradient(GuidedPrediction real, const void* fake, float factor, float scale, float* to, int64_t n) {
  if (real.uncond) return gradient_guided(Guided<P, true>(real), (const P*)fake, factor, scale, to, n);
  return gradient_guided(Guided<P, false>(real), (const P*)fake, factor, scale, to, n);
}

template <typename X>
void backward(const float* g, float factor_, void* grad_x, int64_t n) {
  const Pair factor = broadcast_pair(factor_);
  for_steps(n, [&](int64_t i, auto lanes) {
    store((X*)grad_x + i, factor * load_floats<X>(g + i, lanes), lanes);
  });
}

template <typename P, typename X>
DmdGradientKernels table(bool wide_x_t) {
  return {wide_x_t ? distance<P, X, float> : distance<P, X, P>, gradient<P>, backward<X>};
}

template <typename P>
DmdGradientKernels table(bool wide_x, bool wide_x_t) {
  return wide_x ? table<P, float>(wide_x_t) : table<P, P>(wide_x_t);
}

}  // namespace

DmdGradientKernels dmd_gradient_kernels(Element x, Element x_t, Element predictions) {
  const bool wide_x = x == Element::Float32, wide_x_t = x_t == Element::Float32;
  switch (predictions) {
    case Element::Float16:
      return table<Half>(wide_x, wide_x_t);
    case Element::BFloat16:
      return table<BFloat16>(wide_x, wide_x_t);
    default:
      return table<float, float>(true);
  }
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
