// The loops of adversarial_loss for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
//
// A NaN is neither above nor below 0 and must stay one: comparisons are written so that what they do not hold for is kept.
#include "adversarial_loss_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

inline Vec relu(Vec z) { return z < 0.0f ? Vec{} : z; }

// log(1 + u) for u in [0, 1] as 2 artanh(s) with s = u / (2 + u); artanh(s) / s is a polynomial in s^2 that is 1 at 0
// (relative error 5e-9), so a small u keeps its digits.
inline Vec log1p(Vec u) {
  const Vec s = u / (2.0f + u), s2 = s * s;
  Vec p = s2 * 0.140146668f + 0.139989278f;
  p = p * s2 + 0.200109043f;
  p = p * s2 + 0.333332051f;
  return 2.0f * s * (1.0f + s2 * p);
}

struct Hinge {
  static Vec value(Vec z) { return relu(1.0f + z); }
  static Vec slope(Vec z) { return 1.0f + z <= 0.0f ? Vec{} : broadcast(1.0f); }
};
struct Linear {
  static Vec value(Vec z) { return z; }
  static Vec slope(Vec) { return broadcast(1.0f); }
};
struct Softplus {
  static Vec value(Vec z) { return relu(z) + log1p(exp_minus(z < 0.0f ? -z : z)); }
  static Vec slope(Vec z) { return z != z ? z : sigmoid(z); }
};

template <typename F, typename T>
LogitSums sums_of(float sign, const T* logits, int64_t count) {
  const Vec one = broadcast(1.0f);
  Pair loss{}, total{}, positive{}, negative{};
  for_steps(count, [&](int64_t i, auto lanes) {
    const Pair v = load(logits + i, lanes);
    loss = loss + keep<T>({F::value(sign * v.a), F::value(sign * v.b)}, lanes);
    total = total + v;
    positive = positive + Pair{v.a > 0.0f ? one : Vec{}, v.b > 0.0f ? one : Vec{}};
    negative = negative + Pair{v.a < 0.0f ? one : Vec{}, v.b < 0.0f ? one : Vec{}};
  });
  return {sum(loss), sum(total), sum(positive), sum(negative)};
}

template <typename F, typename T>
void gradient_of(float sign, float scale, const T* logits, T* grad, int64_t count) {
  for_steps(count, [&](int64_t i, auto lanes) {
    const Pair v = load(logits + i, lanes);
    store(grad + i, {scale * F::slope(sign * v.a), scale * F::slope(sign * v.b)}, lanes);
  });
}

template <typename T>
LogitSums sums(LossFunction function, float sign, const void* logits, int64_t count) {
  switch (function) {
    case LossFunction::Hinge:
      return sums_of<Hinge>(sign, (const T*)logits, count);
    case LossFunction::Linear:
      return sums_of<Linear>(sign, (const T*)logits, count);
    default:
      return sums_of<Softplus>(sign, (const T*)logits, count);
  }
}

template <typename T>
void gradient(LossFunction function, float sign, float scale, const void* logits, void* grad, int64_t count) {
  switch (function) {
    case LossFunction::Hinge:
      return gradient_of<Hinge>(sign, scale, (const T*)logits, (T*)grad, count);
    case LossFunction::Linear:
      return gradient_of<Linear>(sign, scale, (const T*)logits, (T*)grad, count);
    default:
      return gradient_of<Softplus>(sign, scale, (const T*)logits, (T*)grad, count);
  }
}

template <typename T>
constexpr AdversarialLossKernels kKernels = {sums<T>, gradient<T>};

}  // namespace

const AdversarialLossKernels& adversarial_loss_kernels(Element element) {
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
