// The loops of geglu for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
#include "geglu_kernel.h"

#include "normal.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

template <typename T>
void forward(const void* h_, const void* gate_, int64_t x_stride, void* y_, int64_t y_stride, int64_t rows,
             int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const T *h = (const T*)h_ + r * x_stride, *gate = (const T*)gate_ + r * x_stride;
    T* y = (T*)y_ + r * y_stride;
    for_steps(columns, [&](int64_t i, auto lanes) {
      store(y + i, load(h + i, lanes) * gelu(load(gate + i, lanes)), lanes);
    });
  }
}

struct Halves {
  Vec h, gate;
};

inline Halves gradients(Vec grad_y, Vec h, Vec g) {
  constexpr float kInverseRootOf2Pi = 0.398942280f;
  const Normal n = normal(g);
  return {grad_y * (g * n.cdf), grad_y * h * (n.cdf + g * (n.bell * kInverseRootOf2Pi))};
}

template <typename T>
void backward(const void* grad_y_, int64_t grad_y_stride, const void* h_, const void* gate_, int64_t x_stride,
              void* grad_h_, void* grad_gate_, int64_t grad_x_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* grad_y = (const T*)grad_y_ + r * grad_y_stride;
    const T *h = (const T*)h_ + r * x_stride, *gate = (const T*)gate_ + r * x_stride;
    T *grad_h = (T*)grad_h_ + r * grad_x_stride, *grad_gate = (T*)grad_gate_ + r * grad_x_stride;
    for_steps(columns, [&](int64_t i, auto lanes) {
      const Pair gy = load(grad_y + i, lanes), hs = load(h + i, lanes), gs = load(gate + i, lanes);
      const Halves a = gradients(gy.a, hs.a, gs.a), b = gradients(gy.b, hs.b, gs.b);
      store(grad_h + i, {a.h, b.h}, lanes);
      store(grad_gate + i, {a.gate, b.gate}, lanes);
    });
  }
}

template <typename T>
constexpr GegluKernels kKernels = {forward<T>, backward<T>};

}  // namespace

const GegluKernels& geglu_kernels(Element element) {
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
