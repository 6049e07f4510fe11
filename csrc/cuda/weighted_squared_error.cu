// weighted_squared_error on CUDA: mean over samples of weight * mean of (x - (scale_a a + scale_b b))^2.
//
// Forward: each block adds up what its threads own. Where all blocks are one cluster, the first of them adds up the
// others' sums and that is the only launch; otherwise a second one does. Backward: one launch. Sums have one order, that
// of the plan. A thread owns vectors of up to 16 bytes where addresses, lengths and strides allow it, single elements
// elsewhere; weighted_squared_error_plan.h says which.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "device.cuh"
#include "launch.h"
#include "weighted_squared_error_plan.h"

namespace fastdistill::cuda::weighted_squared_error {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- the call -------------------------------------------------------------------------------------------------------

// A tensor (B, …) read as (B, M), M in the order of memory; data is null where the call has none.
struct Samples {
  const void* data = nullptr;
  int64_t stride = 0;

  Samples() = default;
  explicit Samples(const Tensor& t) : data(t.const_data_ptr()), stride(t.stride(0)) {}
};

// A scale or weight: one for each sample, or `value` for all.
struct PerSample {
  const float* data = nullptr;
  int64_t stride = 0;
  float value;

  PerSample(const std::optional<Tensor>& tensor, double value_) : value(static_cast<float>(value_)) {
    if (!tensor) return;
    data = static_cast<const float*>(tensor->const_data_ptr());
    stride = tensor->stride(0);
  }
  __device__ float at(int64_t sample) const { return data ? data[sample * stride] : value; }
};

struct Problem {
  Plan plan;
  int64_t samples, length;
  float mean;  // 1 / numel
  Samples x, a, b;
  PerSample scale_a, scale_b, weight;
};

// Vectors of each tensor that a thread has in flight. Four of 8 elements spill where ptxas aims at 64 registers.
template <int V>
constexpr int kBatch = V == 8 ? 2 : 4;

// ---- device ---------------------------------------------------------------------------------------------------------

__device__ Place place_of(const Problem& p) {
  return Place(p.plan, p.samples, p.length, blockIdx.x, static_cast<int>(threadIdx.x));
}

// use(c, d): d[e] is x - target at element c + e of this thread's sample, for each of its vectors. `load` reads one.
template <typename X, typename T, int V, typename Load, typename Use>
__device__ void for_differences(const Problem& p, const Place& place, const Load& load, const Use& use) {
  if (place.column >= place.end) return;
  const X* x = static_cast<const X*>(p.x.data) + place.row * p.x.stride;
  const T* a = static_cast<const T*>(p.a.data) + place.row * p.a.stride;
  const T* b = static_cast<const T*>(p.b.data);
  if (b) b += place.row * p.b.stride;
  const float scale_a = p.scale_a.at(place.row), scale_b = p.scale_b.at(place.row);
  for (int64_t first = place.column; first < place.end; first += kBatch<V> * place.step) {
    Vector<X, V> of_x[kBatch<V>];
    Vector<T, V> of_a[kBatch<V>], of_b[kBatch<V>];
#pragma unroll
    for (int i = 0; i < kBatch<V>; ++i) {
      const int64_t c = first + i * place.step;
      if (c >= place.end) continue;
      of_x[i] = load(x + c);
      of_a[i] = load(a + c);
      if (b) of_b[i] = load(b + c);
    }
#pragma unroll
    for (int i = 0; i < kBatch<V>; ++i) {
      const int64_t c = first + i * place.step;
      if (c >= place.end) continue;
      float d[V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        float target = scale_a * to_float(of_a[i].value[e]);
        if (b) target += scale_b * to_float(of_b[i].value[e]);
        d[e] = to_float(of_x[i].value[e]) - target;
      }
      use(c, d);
    }
  }
}

// sums: of the blocks, or, where they are one cluster, the loss.
template <typename X, typename T, int V>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Problem p, float* sums) {
  FASTDISTILL_DYNAMIC_SHARED(memory);
  float *const scratch = reinterpret_cast<float*>(memory), *const of_block = scratch + kThreads / kWarp;
  const Place place = place_of(p);
  float squares = 0.0f;
  // The backward reads the same again: what is read here may stay in the caches.
  for_differences<X, T, V>(
      p, place, [](const auto* from) { return load_past_l1<V>(from); },
      [&](int64_t, const float(&d)[V]) {
#pragma unroll
        for (int e = 0; e < V; ++e) squares += d[e] * d[e];
      });
  const float own = place.column < place.end ? squares * p.weight.at(place.row) : 0.0f;
  const float total = sum_over_block(own, scratch) * p.mean;
  if (!p.plan.cluster) {
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
    return;
  }
  if (threadIdx.x == 0) *of_block = total;
  arrive_in_cluster();
  wait_for_cluster();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    float loss = 0.0f;
    for (unsigned rank = 0; rank < gridDim.x; ++rank) loss += *in_block_of_cluster(of_block, rank);
    *sums = loss;
  }
  arrive_in_cluster();  // shared memory lasts until the first block has read it
  wait_for_cluster();
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const float* sums, int64_t count, float* loss) {
  __shared__ float scratch[kThreads / kWarp];
  float own = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) own += sums[i];
  const float total = sum_over_block(own, scratch);
  if (threadIdx.x == 0) *loss = total;
}

template <typename X, typename T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Problem p, const float* grad, X* grad_x, int64_t grad_x_stride) {
  const Place place = place_of(p);
  if (place.column >= place.end) return;
  const float outer = 2.0f * p.mean * *grad * p.weight.at(place.row);
  X* const to = grad_x + place.row * grad_x_stride;
  for_differences<X, T, V>(
      p, place, [](const auto* from) { return load_last<V>(from); },
      [&](int64_t c, const float(&d)[V]) {
        Vector<X, V> result;
#pragma unroll
        for (int e = 0; e < V; ++e) result.value[e] = from_float<X>(outer * d[e]);
        store_vector(to + c, result);
      });
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Calls body(null pointer of the type).
template <typename Body>
void with_element(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return body(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "x, a and b: expected float32, float16 or bfloat16");
  }
}

// Whether every sample's vectors of `vector` elements start at multiples of their size.
bool aligned(const void* data, int64_t samples, int64_t stride, int64_t bytes, int vector) {
  return reinterpret_cast<uintptr_t>(data) % (vector * bytes) == 0 && (samples == 1 || stride % vector == 0);
}

Problem problem_of(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const PerSample& scale_a,
                   const PerSample& scale_b, const PerSample& weight) {
  const int64_t samples = x.size(0);
  return {{},
          samples,
          x.numel() / samples,
          static_cast<float>(1.0 / static_cast<double>(x.numel())),
          Samples(x),
          Samples(a),
          b ? Samples(*b) : Samples(),
          scale_a,
          scale_b,
          weight};
}

// Plans the problem and calls body(null pointers of x's and a's element types, vector width as a constant). `to`: what
// is written, in x's dtype; null where nothing is.
template <typename Body>
void dispatch(Problem& p, const Tensor& x, const Tensor& a, int cluster, const Samples& to, const Body& body) {
  with_element(x.scalar_type(), [&](auto* of_x) {
    with_element(a.scalar_type(), [&](auto* of_a) {
      constexpr int kX = sizeof(*of_x), kA = sizeof(*of_a), kVector = kVectorBytes / (kX > kA ? kX : kA);
      const bool vectors = p.length % kVector == 0 && aligned(p.x.data, p.samples, p.x.stride, kX, kVector) &&
                           aligned(p.a.data, p.samples, p.a.stride, kA, kVector) &&
                           aligned(p.b.data, p.samples, p.b.stride, kA, kVector) &&
                           aligned(to.data, p.samples, to.stride, kX, kVector);
      p.plan = plan(p.samples, p.length, vectors ? kVector : 1, cluster);
      vectors ? body(of_x, of_a, std::integral_constant<int, kVector>{})
              : body(of_x, of_a, std::integral_constant<int, 1>{});
    });
  });
}

Tensor forward(const Tensor& x, const Tensor& a, std::optional<Tensor> b, std::optional<Tensor> scale_a,
               std::optional<Tensor> scale_b, std::optional<Tensor> weight, double value_a, double value_b,
               double value_weight) {
  const OnDeviceOf device(x);
  Problem p = problem_of(x, a, b, {scale_a, value_a}, {scale_b, value_b}, {weight, value_weight});
  Tensor loss = torch::stable::new_empty(x, {}, ScalarType::Float);
  dispatch(p, x, a, current_device_limits().cluster, {}, [&](auto* of_x, auto* of_a, auto width) {
    using X = std::remove_pointer_t<decltype(of_x)>;
    using T = std::remove_pointer_t<decltype(of_a)>;
    constexpr auto kernel = forward_kernel<X, T, decltype(width)::value>;
    const int64_t blocks = p.plan.blocks();
    Grid grid{blocks, kThreads, (kThreads / kWarp + 1) * sizeof(float)};
    float* const to_loss = static_cast<float*>(loss.mutable_data_ptr());
    if (p.plan.cluster) {
      grid.cluster = static_cast<int>(blocks);
      launch("weighted_squared_error", kernel, grid, device.stream(), p, to_loss);
      return;
    }
    Tensor sums = torch::stable::new_empty(x, {blocks}, ScalarType::Float);
    float* const to_sums = static_cast<float*>(sums.mutable_data_ptr());
    launch("weighted_squared_error", kernel, grid, device.stream(), p, to_sums);
    launch("weighted_squared_error", combine_kernel, 1, kThreads, 0, device.stream(),
           static_cast<const float*>(to_sums), blocks, to_loss);
  });
  return loss;
}

Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& a, std::optional<Tensor> b,
                std::optional<Tensor> scale_a, std::optional<Tensor> scale_b, std::optional<Tensor> weight,
                double value_a, double value_b, double value_weight) {
  const OnDeviceOf device(x);
  Problem p = problem_of(x, a, b, {scale_a, value_a}, {scale_b, value_b}, {weight, value_weight});
  Tensor grad_x = torch::stable::empty_like(x);
  const Samples to(grad_x);
  dispatch(p, x, a, 0, to, [&](auto* of_x, auto* of_a, auto width) {
    using X = std::remove_pointer_t<decltype(of_x)>;
    using T = std::remove_pointer_t<decltype(of_a)>;
    launch("weighted_squared_error_backward", backward_kernel<X, T, decltype(width)::value>, p.plan.blocks(), kThreads,
           0, device.stream(), p, static_cast<const float*>(grad.const_data_ptr()),
           static_cast<X*>(grad_x.mutable_data_ptr()), to.stride);
  });
  return grad_x;
}

}  // namespace
}  // namespace fastdistill::cuda::weighted_squared_error

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("weighted_squared_error.cuda", TORCH_BOX(&fastdistill::cuda::weighted_squared_error::forward));
  m.impl("weighted_squared_error_backward.cuda", TORCH_BOX(&fastdistill::cuda::weighted_squared_error::backward));
}
