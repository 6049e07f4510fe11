// What the forward and the backward kernels of layer_norm share: weight and bias, a thread's part of a row, sums over
// it.
//
// A thread owns vectors of V elements of a row, 16 bytes where address, width and strides allow it, single elements
// elsewhere. layer_norm_plan.h says how many, and which threads share a row.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "../layout.h"
#include "device.cuh"
#include "launch.h"
#include "layer_norm_plan.h"

namespace fastdistill::cuda::layer_norm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of a tensor that the kernel does not write, so that the compiler may move it in front of stores.
template <int V, typename T>
__device__ Vector<T, V> load_input(const T* from) {
#ifdef __CUDACC__
  if constexpr (sizeof(Vector<T, V>) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Vector<T, V>*>(&bits);
  }
#endif
  return load_vector<V>(from);
}

// ---- the call -------------------------------------------------------------------------------------------------------

// weight or bias: float32 or x's dtype, any stride, or absent.
struct Parameter {
  const void* data;
  int64_t stride;
  bool is_float, has_vectors;

  // The values of columns c … c + V - 1; T is x's dtype.
  template <typename T, int V>
  __device__ void read(int c, float absent, float (&to)[V]) const {
    if (data == nullptr) {
#pragma unroll
      for (int e = 0; e < V; ++e) to[e] = absent;
    } else if (is_float) {
      read_as<float, V>(c, to);
    } else {
      read_as<T, V>(c, to);
    }
  }

 private:
  template <typename P, int V>
  __device__ void read_as(int c, float (&to)[V]) const {
    constexpr int kPart = V * sizeof(P) <= kVectorBytes ? V : kVectorBytes / sizeof(P);
    const P* from = static_cast<const P*>(data);
    if (has_vectors) {
#pragma unroll
      for (int part = 0; part < V; part += kPart) {
        const Vector<P, kPart> values = load_input<kPart>(from + c + part);
#pragma unroll
        for (int e = 0; e < kPart; ++e) to[part + e] = to_float(values.value[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) to[e] = to_float(from[(c + e) * stride]);
    }
  }
};

inline bool starts_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; }

inline Parameter parameter(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, 0, false, false};
  const void* data = tensor->const_data_ptr();
  const int64_t stride = tensor->stride(0);
  return {data, stride, tensor->scalar_type() == ScalarType::Float, stride == 1 && starts_aligned(data)};
}

// Rows that are read: dense, any distance apart; or absent.
struct Source {
  const void* data;
  int64_t stride;

  template <typename T>
  __device__ const T* row(int64_t i) const {
    return static_cast<const T*>(data) + i * stride;
  }
};

inline Source source(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), rows_of(tensor, name).stride};
}

inline Source source(const std::optional<Tensor>& tensor, const char* name) {
  return tensor ? source(*tensor, name) : Source{nullptr, 0};
}

// Whether every vector of every row, and of every dense row that is written, starts at a multiple of its size.
inline bool has_vectors(const Rows& rows, int64_t bytes, std::initializer_list<Source> sources) {
  bool all = rows.length * bytes % kVectorBytes == 0;
  for (const Source& s : sources)
    all = all && starts_aligned(s.data) && (rows.count == 1 || s.stride * bytes % kVectorBytes == 0);
  return all;
}

// A float32 tensor on x's device.
inline Tensor new_floats(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

inline float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

template <typename T>
struct Type {
  using type = T;
};
template <int N>
using Constant = std::integral_constant<int, N>;

// Calls body(Type<T>, Constant<V>) for the call at hand.
template <typename T, typename Body>
void dispatch_width(bool vectors, const Body& body) {
  vectors ? body(Type<T>{}, Constant<kVectorBytes / sizeof(T)>{}) : body(Type<T>{}, Constant<1>{});
}

template <typename Body>
void dispatch(ScalarType type, bool vectors, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return dispatch_width<__half>(vectors, body);
    case ScalarType::BFloat16:
      return dispatch_width<__nv_bfloat16>(vectors, body);
    case ScalarType::Float:
      return dispatch_width<float>(vectors, body);
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

// ---- device ---------------------------------------------------------------------------------------------------------

// max(v, 0), except that NaN stays NaN.
__device__ inline float not_negative(float v) { return v < 0.0f ? 0.0f : v; }

// A thread's place in its row, which a warp or the block shares.
template <bool kWarpRow>
struct Lane {
  __device__ static int index() { return static_cast<int>(kWarpRow ? threadIdx.x % kWarp : threadIdx.x); }
  __device__ static int count() { return static_cast<int>(kWarpRow ? kWarp : blockDim.x); }
  __device__ static int64_t first_row() {
    return kWarpRow ? int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarp : int64_t{blockIdx.x};
  }
  __device__ static int64_t row_step() { return int64_t{gridDim.x} * (kWarpRow ? kRowsPerBlock : 1); }
};

// K sums over the threads of a row, in every one of them. scratch: K floats per warp of the block.
template <bool kWarpRow, int K>
__device__ void sum_over_row(float (&value)[K], float* scratch) {
#pragma unroll
  for (int k = 0; k < K; ++k) value[k] = sum_over_warp(value[k]);
  if constexpr (!kWarpRow) {
    const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) scratch[k * kWarp + warp] = value[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      value[k] = 0.0f;
      for (int w = 0; w < warps; ++w) value[k] += scratch[k * kWarp + w];
    }
    __syncthreads();
  }
}

}  // namespace fastdistill::cuda::layer_norm
