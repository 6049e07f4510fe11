// geglu on CUDA: y = h * gelu(gate), h and gate the halves of a row of x. Forward and backward, one launch each.
//
// A thread owns vectors of 16 bytes in `kBatch` rows, where address, width and strides allow it, single elements
// elsewhere; it loads all of them before it computes. geglu_plan.h says which thread owns what.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>
#include <vector>

#include "../layout.h"
#include "device.cuh"
#include "geglu_plan.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using geglu_plan::kBatch;
using geglu_plan::kThreads;
using geglu_plan::Place;
using geglu_plan::Plan;

// ---- the call -------------------------------------------------------------------------------------------------------

struct Problem {
  Plan plan;
  int64_t rows, columns;  // of y
  const void *x, *grad_y;
  int64_t x_stride, grad_y_stride;
  void* to;  // y or grad_x, dense
};

// Whether every vector of every row starts at a multiple of its size.
bool aligned(const void* data, int64_t rows, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && (rows == 1 || stride * bytes % kVectorBytes == 0);
}

// ---- device ---------------------------------------------------------------------------------------------------------

// In one instruction, said in PTX: left to itself, nvcc 13 takes one of a thread's two stores apart into 4 bytes each.
template <int V, typename T>
__device__ void store_whole(T* to, const Vector<T, V>& vector) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) * V == kVectorBytes) {
    const float4 raw = *reinterpret_cast<const float4*>(&vector);
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(raw.x), "f"(raw.y), "f"(raw.z), "f"(raw.w)
                 : "memory");
    return;
  }
#endif
  store_vector(to, vector);
}

struct Normal {
  float cdf, bell;  // Phi(g); exp(-g^2 / 2), the density times sqrt(2 pi)
};

// Phi(-a) = exp(-a^2 / 2) R(a) for a >= 0, where R(a) = erfcx(a / sqrt(2)) / 2 is smooth: a polynomial in
// t = 1 / (1 + 0.305 a) without a constant term (the form of Hastings, 1955), fitted for the smallest largest relative
// error on [0, 14]: 9.4e-8. So a far tail keeps its digits, where 1 + erff(g / sqrt(2)) has none below -5, and one
// exponential serves the derivative as well.
__device__ Normal normal(float g) {
  const float bell = __expf(-0.5f * g * g);
  const float t = __fdividef(1.0f, 1.0f + 0.305f * fabsf(g));
  float p = t * 0.03669918f - 0.152988269f;
  p = p * t + 0.185716829f;
  p = p * t - 0.0379767611f;
  p = p * t + 0.121021644f;
  p = p * t + 0.103420876f;
  p = p * t + 0.122466815f;
  p = p * t + 0.121639733f;
  const float tail = bell * (p * t);
  return {g < 0.0f ? tail : 1.0f - tail, bell};
}

template <int V>
__device__ Place place_of(const Problem& p) {
  return Place(p.plan, p.rows, p.columns, V, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Problem p) {
  const Place place = place_of<V>(p);
  const T* x = static_cast<const T*>(p.x) + place.column;
  T* y = static_cast<T*>(p.to) + place.column;
  Vector<T, V> h[kBatch], gate[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int64_t row = place.row + i * p.plan.along;
    if (row >= place.last) continue;
    h[i] = load_last<V>(x + row * p.x_stride);
    gate[i] = load_last<V>(x + row * p.x_stride + p.columns);
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int64_t row = place.row + i * p.plan.along;
    if (row >= place.last) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float g = to_float(gate[i].value[e]);
      h[i].value[e] = from_float<T>(to_float(h[i].value[e]) * (g * normal(g).cdf));
    }
    store_whole(y + row * p.columns, h[i]);
  }
}

// grad_h = grad_y g Phi(g), grad_g = grad_y h (Phi(g) + g phi(g))
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Problem p) {
  constexpr float kInverseRootOf2Pi = 0.398942280f;
  const Place place = place_of<V>(p);
  const T* x = static_cast<const T*>(p.x) + place.column;
  const T* grad_y = static_cast<const T*>(p.grad_y) + place.column;
  T* grad_h = static_cast<T*>(p.to) + place.column;
  T* grad_gate = grad_h + p.columns;
  Vector<T, V> grad[kBatch], h[kBatch], gate[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int64_t row = place.row + i * p.plan.along;
    if (row >= place.last) continue;
    grad[i] = load_last<V>(grad_y + row * p.grad_y_stride);
    h[i] = load_last<V>(x + row * p.x_stride);
    gate[i] = load_last<V>(x + row * p.x_stride + p.columns);
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int64_t row = place.row + i * p.plan.along;
    if (row >= place.last) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float gy = to_float(grad[i].value[e]), g = to_float(gate[i].value[e]);
      const Normal n = normal(g);
      gate[i].value[e] =
          from_float<T>(gy * to_float(h[i].value[e]) * (n.cdf + g * (n.bell * kInverseRootOf2Pi)));
      h[i].value[e] = from_float<T>(gy * (g * n.cdf));
    }
    store_whole(grad_h + row * 2 * p.columns, h[i]);
    store_whole(grad_gate + row * 2 * p.columns, gate[i]);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Calls body(element, vector width) as a null pointer and an integral constant of the call's type and width.
template <typename Body>
void dispatch(ScalarType type, bool vectors, const Body& body) {
  const auto with = [&](auto* element) {
    constexpr int kVector = kVectorBytes / sizeof(*element);
    vectors ? body(element, std::integral_constant<int, kVector>{})
            : body(element, std::integral_constant<int, 1>{});
  };
  switch (type) {
    case ScalarType::Half:
      return with(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return with(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Float:
      return with(static_cast<float*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

Tensor geglu(const Tensor& x) {
  const OnDeviceOf device(x);
  const Rows from = rows_of(x, "x");
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= 2;
  Tensor y = torch::stable::new_empty(x, sizes);
  Problem p{};
  p.rows = from.count;
  p.columns = from.length / 2;
  p.x = x.const_data_ptr();
  p.x_stride = from.stride;
  p.to = y.mutable_data_ptr();
  const bool vectors = aligned(p.x, p.rows, p.x_stride, bytes) && aligned(p.to, 2, p.columns, bytes);
  dispatch(x.scalar_type(), vectors, [&](auto* element, auto width) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr int V = decltype(width)::value;
    p.plan = geglu_plan::plan(p.rows, p.columns, V);
    launch("geglu", forward_kernel<T, V>, p.plan.blocks(), kThreads, 0, device.stream(), p);
  });
  return y;
}

Tensor geglu_backward(const Tensor& grad_y, const Tensor& x) {
  const OnDeviceOf device(x);
  const Rows from = rows_of(x, "x"), grad = rows_of(grad_y, "grad_y");
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  Tensor grad_x = torch::stable::empty_like(x);
  Problem p{};
  p.rows = from.count;
  p.columns = grad.length;
  p.x = x.const_data_ptr();
  p.x_stride = from.stride;
  p.grad_y = grad_y.const_data_ptr();
  p.grad_y_stride = grad.stride;
  p.to = grad_x.mutable_data_ptr();
  const bool vectors = aligned(p.x, p.rows, p.x_stride, bytes) && aligned(p.to, 2, p.columns, bytes) &&
                       aligned(p.grad_y, p.rows, p.grad_y_stride, bytes);
  dispatch(x.scalar_type(), vectors, [&](auto* element, auto width) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr int V = decltype(width)::value;
    p.plan = geglu_plan::plan(p.rows, p.columns, V);
    launch("geglu_backward", backward_kernel<T, V>, p.plan.blocks(), kThreads, 0, device.stream(), p);
  });
  return grad_x;
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("geglu.cuda", TORCH_BOX(&fastdistill::cuda::geglu));
  m.impl("geglu_backward.cuda", TORCH_BOX(&fastdistill::cuda::geglu_backward));
}
