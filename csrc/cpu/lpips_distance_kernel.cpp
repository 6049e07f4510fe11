// The loops of lpips_distance for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
//
// With r = 1 / (|x| + eps), u = r x, delta = u - v and `scale` the gradient of the distance:
//
//   grad_x = scale (r w delta - u / |x| sum_c(w delta u))
//
// and likewise for y with the signs turned. Norms first and differences after: sums of squares and products in one
// sweep would leave no digits where x and y are close.
#include "lpips_distance_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

constexpr float kEps = 1e-10f;

inline Vec root(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// From a sum of squares: 1 / (norm + eps) and 1 / norm. A vector of zeros has 0 for both, and so no gradient.
inline Vec reciprocal(Vec squares) { return squares == 0.0f ? Vec{} : 1.0f / (root(squares) + kEps); }
inline Vec slope(Vec squares) { return squares == 0.0f ? Vec{} : 1.0f / root(squares); }

inline float reciprocal(float squares) { return squares == 0.0f ? 0.0f : 1.0f / (__builtin_sqrtf(squares) + kEps); }
inline float slope(float squares) { return squares == 0.0f ? 0.0f : 1.0f / __builtin_sqrtf(squares); }

// A product that stays one: fused into the subtraction behind it, u would differ from v where x is y.
inline Pair product(Pair a, Pair b) {
  Pair p = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(p.a), "+x"(p.b));
#elif defined(__aarch64__)
  asm("" : "+w"(p.a), "+w"(p.b));
#else
  asm("" : "+m"(p.a), "+m"(p.b));
#endif
  return p;
}

inline Pair scaled(float factor, Pair v) { return broadcast_pair(factor) * v; }

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

// ---- planes: vectors along the pixels -------------------------------------------------------------------------------

template <typename T, typename Lanes>
inline void store_strided(T* p, int64_t stride, Pair v, Lanes lanes) {
  if (stride == 1) return store(p, v, lanes);
  T buffer[kStep];
  store(buffer, v);
  for (int i = 0; i < lanes.n; ++i) p[i * stride] = buffer[i];
}

// Planes lie too far apart for the processor to see what comes next, so it is told. `bytes` of a channel `ahead` later.
constexpr int kAhead = 8;
template <int kWrite>
inline void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, kWrite);
}

// The block in float32, step of pixels behind step, in each channel behind channel: both sweeps over it run through
// memory, with what a pixel has of its own in registers. In place, planes a power of two apart would drive each other
// out of the caches between two sweeps. Places beyond the last pixel hold 0.
struct Scratch {
  int64_t steps, channels;
  float *x, *y, *x_squares, *y_squares;

  Scratch(const LpipsBlock& b, float* memory) : steps((b.pixels + kStep - 1) / kStep), channels(b.channels) {
    x = memory;
    y = x + channels * steps * kStep;
    x_squares = y + channels * steps * kStep;
    y_squares = x_squares + steps * kStep;
  }
};

template <typename T>
void take_in(LpipsFeatures from, int64_t channels, int64_t pixels, float* values, float* squares) {
  for (int64_t i = 0; i < pixels; i += kStep) store(squares + i, Pair{});
  for (int64_t c = 0; c < channels; ++c) {
    const T* p = (const T*)from.data + c * from.c;
    if (from.s == 1 && c + kAhead < channels) prefetch<0>((const char*)(p + kAhead * from.c), pixels * sizeof(T));
    for_steps(pixels, [&](int64_t i, auto lanes) {
      const Pair v = from.s == 1 ? load(p + i, lanes) : load_strided(p + i * from.s, from.s, lanes);
      store(values + i * channels + c * kStep, v);
      store(squares + i, load(squares + i) + v * v);
    });
  }
}

// A step of pixels: its channels, and reciprocals and slopes of its norms.
struct Step {
  const float *x, *y;
  Pair rx, ry, x_slope, y_slope;

  Step(const Scratch& s, int64_t i) : x(s.x + i * s.channels * kStep), y(s.y + i * s.channels * kStep) {
    const Pair xx = load(s.x_squares + i * kStep), yy = load(s.y_squares + i * kStep);
    rx = {reciprocal(xx.a), reciprocal(xx.b)};
    ry = {reciprocal(yy.a), reciprocal(yy.b)};
    x_slope = {slope(xx.a), slope(xx.b)};
    y_slope = {slope(yy.a), slope(yy.b)};
  }

  Pair u(int64_t c) const { return product(load(x + c * kStep), rx); }
  Pair v(int64_t c) const { return product(load(y + c * kStep), ry); }
};

template <typename T>
void write_out(LpipsGradient to, const LpipsBlock& b, const float* values) {
  for (int64_t c = 0; to.data && c < b.channels; ++c) {
    T* p = (T*)to.data + c * to.c;
    if (to.s == 1 && c + kAhead < b.channels) prefetch<1>((const char*)(p + kAhead * to.c), b.pixels * sizeof(T));
    for_steps(b.pixels, [&](int64_t i, auto lanes) {
      store_strided(p + i * to.s, to.s, load(values + i * b.channels + c * kStep), lanes);
    });
  }
}

template <typename T>
Scratch take_in(const LpipsBlock& b, float* memory) {
  const Scratch s(b, memory);
  take_in<T>(b.x, b.channels, b.pixels, s.x, s.x_squares);
  take_in<T>(b.y, b.channels, b.pixels, s.y, s.y_squares);
  return s;
}

template <typename T>
float planes_forward(const LpipsBlock& b, float* memory) {
  const Scratch s = take_in<T>(b, memory);
  Pair total[2] = {};
  for (int64_t i = 0; i < s.steps; ++i) {
    const Step step(s, i);
    for (int64_t c = 0; c < b.channels; ++c) {
      const Pair delta = step.u(c) - step.v(c);
      total[c % 2] = total[c % 2] + scaled(b.weight[c], delta * delta);
    }
  }
  return sum(total[0] + total[1]);
}

template <typename T>
void planes_backward(const LpipsBlock& b, float scale, LpipsGradient to_x, LpipsGradient to_y, float* sums,
                     float* memory) {
  const Scratch s = take_in<T>(b, memory);
  for (int64_t c = 0; sums && c < b.channels; ++c) sums[c] = 0.0f;
  for (int64_t i = 0; i < s.steps; ++i) {
    const Step step(s, i);
    Pair of_x = {}, of_y = {};
    for (int64_t c = 0; c < b.channels; ++c) {
      const Pair u = step.u(c), v = step.v(c), delta = u - v, weighted = scaled(b.weight[c], delta);
      of_x = of_x + weighted * u;
      of_y = of_y + weighted * v;
      if (sums) sums[c] += sum(delta * delta);
    }
    const Pair x_sum = scaled(scale, of_x * step.x_slope), y_sum = scaled(scale, of_y * step.y_slope);
    float *grad_x = s.x + i * b.channels * kStep, *grad_y = s.y + i * b.channels * kStep;
    for (int64_t c = 0; c < b.channels; ++c) {
      const Pair u = step.u(c), v = step.v(c), weighted = scaled(scale * b.weight[c], u - v);
      store(grad_x + c * kStep, weighted * step.rx - u * x_sum);
      store(grad_y + c * kStep, v * y_sum - weighted * step.ry);
    }
  }
  write_out<T>(to_x, b, s.x);
  write_out<T>(to_y, b, s.y);
}

// ---- rows: vectors along the channels -------------------------------------------------------------------------------

struct Squares {
  float x, y;
};

template <typename T>
inline Squares squares_of(const T* x, const T* y, int64_t channels) {
  Pair of_x[2] = {}, of_y[2] = {};
  for_steps_in_turns(channels, [&](int64_t i, auto lanes, int turn) {
    const Pair a = load(x + i, lanes), b = load(y + i, lanes);
    of_x[turn] = of_x[turn] + a * a;
    of_y[turn] = of_y[turn] + b * b;
  });
  return {sum(of_x[0] + of_x[1]), sum(of_y[0] + of_y[1])};
}

template <typename T>
float rows_forward(const LpipsBlock& b, float*) {
  Pair total[2] = {};
  for (int64_t s = 0; s < b.pixels; ++s) {
    const T *x = (const T*)b.x.data + s * b.x.s, *y = (const T*)b.y.data + s * b.y.s;
    const Squares squares = squares_of(x, y, b.channels);
    const float rx = reciprocal(squares.x), ry = reciprocal(squares.y);
    for_steps_in_turns(b.channels, [&](int64_t i, auto lanes, int turn) {
      const Pair delta = product(load(x + i, lanes), broadcast_pair(rx)) - product(load(y + i, lanes), broadcast_pair(ry));
      total[turn] = total[turn] + load_floats<T>(b.weight + i, lanes) * delta * delta;
    });
  }
  return sum(total[0] + total[1]);
}

template <typename T>
void rows_backward(const LpipsBlock& b, float scale, LpipsGradient to_x, LpipsGradient to_y, float* sums, float*) {
  for (int64_t i = 0; sums && i < b.channels; ++i) sums[i] = 0.0f;
  for (int64_t s = 0; s < b.pixels; ++s) {
    const T *x = (const T*)b.x.data + s * b.x.s, *y = (const T*)b.y.data + s * b.y.s;
    const Squares squares = squares_of(x, y, b.channels);
    const float rx = reciprocal(squares.x), ry = reciprocal(squares.y);
    Pair of_x[2] = {}, of_y[2] = {};
    for_steps_in_turns(b.channels, [&](int64_t i, auto lanes, int turn) {
      const Pair u = product(load(x + i, lanes), broadcast_pair(rx)), v = product(load(y + i, lanes), broadcast_pair(ry)), delta = u - v;
      const Pair weighted = load_floats<T>(b.weight + i, lanes) * delta;
      of_x[turn] = of_x[turn] + weighted * u;
      of_y[turn] = of_y[turn] + weighted * v;
      if (sums) store_floats<T>(sums + i, load_floats<T>(sums + i, lanes) + delta * delta, lanes);
    });
    if (!to_x.data && !to_y.data) continue;
    const float x_sum = scale * sum(of_x[0] + of_x[1]) * slope(squares.x);
    const float y_sum = scale * sum(of_y[0] + of_y[1]) * slope(squares.y);
    T *grad_x = (T*)to_x.data + s * to_x.s, *grad_y = (T*)to_y.data + s * to_y.s;
    for_steps(b.channels, [&](int64_t i, auto lanes) {
      const Pair u = product(load(x + i, lanes), broadcast_pair(rx)), v = product(load(y + i, lanes), broadcast_pair(ry));
      const Pair weighted = scaled(scale, load_floats<T>(b.weight + i, lanes) * (u - v));
      if (to_x.data) store(grad_x + i, scaled(rx, weighted) - scaled(x_sum, u), lanes);
      if (to_y.data) store(grad_y + i, scaled(y_sum, v) - scaled(ry, weighted), lanes);
    });
  }
}

template <typename T>
constexpr LpipsKernels kKernels = {{planes_forward<T>, planes_backward<T>}, {rows_forward<T>, rows_backward<T>}};

}  // namespace

const LpipsKernels& lpips_kernels(Element element) {
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
