// The loops of weighted_squared_error for the instruction set that FASTDISTILL_ISA names. Compiled once per set.
#include "weighted_squared_error_kernel.h"

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {
namespace {

// bfloat16 is loaded with its even elements in one vector and its odd ones in the other. A type that meets it in one
// expression is brought into the same places.
template <typename T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<BFloat16> = true;

template <typename T, typename Other, typename Lanes>
static inline Pair load_beside(const T* p, Lanes lanes) {
  const Pair v = load(p, lanes);
  if constexpr (kPaired<Other> && !kPaired<T>)
    return {FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_EVEN), FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_ODD)};
  else
    return v;
}

template <typename T, typename Other, typename Lanes>
static inline void store_beside(T* p, Pair v, Lanes lanes) {
  if constexpr (kPaired<Other> && !kPaired<T>)
    v = {FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_LOW), FASTDISTILL_SHUFFLE(v.a, v.b, FASTDISTILL_HIGH)};
  store(p, v, lanes);
}

// body(i, x - target at i, lanes) over the run. What lies beyond its end is 0 in every tensor.
template <typename X, typename T, typename Body>
static inline void for_differences(const SampleRun& run, const Body& body) {
  const X* const x = (const X*)run.x;
  const T *const a = (const T*)run.a, *const b = (const T*)run.b;
  const Pair scale_a = broadcast_pair(run.scale_a), scale_b = broadcast_pair(run.scale_b);
  if (b) {
    for_steps(run.length, [&](int64_t i, auto lanes) {
      const Pair target = scale_a * load_beside<T, X>(a + i, lanes) + scale_b * load_beside<T, X>(b + i, lanes);
      body(i, load_beside<X, T>(x + i, lanes) - target, lanes);
    });
  } else {
    for_steps(run.length, [&](int64_t i, auto lanes) {
      body(i, load_beside<X, T>(x + i, lanes) - scale_a * load_beside<T, X>(a + i, lanes), lanes);
    });
  }
}

// What `keep` selects by: the places of the elements are bfloat16's where either type is.
template <typename X, typename T>
struct Places {
  typedef X type;
};
template <typename X>
struct Places<X, BFloat16> {
  typedef BFloat16 type;
};

template <typename X, typename T>
float sum_of_squares(const SampleRun& run) {
  // Two sums take turns, because one alone waits for each addition.
  Pair even = broadcast_pair(0.0f), odd = even;
  for_differences<X, T>(run, [&](int64_t, Pair d, auto lanes) {
    d = keep<typename Places<X, T>::type>(d, lanes);  // an infinite scale makes NaN of the 0 beyond the end
    const Pair next = even + d * d;
    even = odd;
    odd = next;
  });
  return sum(even + odd);
}

static inline Vec plain_nan(Vec v) { return v == v ? v : broadcast(__builtin_nanf("")); }

template <typename X, typename T>
void scaled_difference(const SampleRun& run, float factor, void* to) {
  const Pair factors = broadcast_pair(factor);
  for_differences<X, T>(run, [&](int64_t i, Pair d, auto lanes) {
    d = factors * d;
    if (kPaired<X> && !kPaired<T>) d = {plain_nan(d.a), plain_nan(d.b)};  // see round_to_bfloat16
    store_beside<X, T>((X*)to + i, d, lanes);
  });
}

template <typename X, typename T>
constexpr WeightedSquaredErrorKernels kKernels = {sum_of_squares<X, T>, scaled_difference<X, T>};

template <typename X>
const WeightedSquaredErrorKernels& kernels_of(Element of_target) {
  switch (of_target) {
    case Element::Float16:
      return kKernels<X, Half>;
    case Element::BFloat16:
      return kKernels<X, BFloat16>;
    default:
      return kKernels<X, float>;
  }
}

}  // namespace

const WeightedSquaredErrorKernels& weighted_squared_error_kernels(Element of_x, Element of_target) {
  switch (of_x) {
    case Element::Float16:
      return kernels_of<Half>(of_target);
    case Element::BFloat16:
      return kernels_of<BFloat16>(of_target);
    default:
      return kernels_of<float>(of_target);
  }
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
