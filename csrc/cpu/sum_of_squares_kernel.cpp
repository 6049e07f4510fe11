// The loop of squared_norm and gradient_norm for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
#include "sum_of_squares_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

template <typename T>
float sum_of_squares(const void* values_, int64_t count) {
  const T* values = (const T*)values_;
  Pair total[2] = {};  // they take turns, because one alone waits for each addition
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    const Pair a = load(values + i), b = load(values + i + kStep);
    total[0] = total[0] + a * a;
    total[1] = total[1] + b * b;
  }
  for_steps(count - i, [&](int64_t j, auto lanes) {
    const Pair v = load(values + i + j, lanes);
    total[0] = total[0] + v * v;
  });
  return sum(total[0] + total[1]);
}

}  // namespace

SumOfSquares sum_of_squares(Element element) {
  switch (element) {
    case Element::Float16:
      return sum_of_squares<Half>;
    case Element::BFloat16:
      return sum_of_squares<BFloat16>;
    default:
      return sum_of_squares<float>;
  }
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
