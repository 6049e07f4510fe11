// The loop of gradient_norm for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
#include "gradient_norm_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

template <typename T>
float sum_of_squares(const void* from_, int64_t count) {
  const T* from = (const T*)from_;
  Pair total = {}, other = {};  // two sums: one would wait for itself
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    const Pair x = load(from + i), y = load(from + i + kStep);
    total = total + x * x;
    other = other + y * y;
  }
  for_steps(count - i, [&](int64_t j, auto lanes) {
    const Pair x = load(from + i + j, lanes);
    total = total + x * x;
  });
  return sum(total + other);
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
