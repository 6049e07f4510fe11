// Device functions that more than one op uses: vectors of elements, per-channel parameters, sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastdistill::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load and store of a thread

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T value[V];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// A load or store of V elements in one instruction; the address is a multiple of its size.
template <int V, typename T>
__device__ inline Vector<T, V> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <int V, typename T>
__device__ inline void store_vector(T* to, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// V elements that may lie anywhere: a gradient in the other layout, or expanded from one value.
template <int V, typename T>
__device__ inline Vector<T, V> load_strided(const T* from, int64_t stride) {
  Vector<T, V> vector;
#pragma unroll
  for (int e = 0; e < V; ++e) vector.value[e] = from[e * stride];
  return vector;
}

// The sigmoid and 1 / (1 + inf) = 0; within 3 units in the last place where it is not tiny.
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

// a + b as the rounded sum and its rounding error, exactly (Knuth).
__device__ inline float two_sum(float a, float b, float* error) {
  const float sum = a + b;
  const float b_part = sum - a;
  *error = (a - (sum - b_part)) + (b - b_part);
  return sum;
}

__device__ inline float sum_over_warp(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over all threads of a block, in every thread. The block has whole warps; scratch holds a float per warp.
__device__ inline float sum_over_block(float value, float* scratch) {
  value = sum_over_warp(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

}  // namespace fastdistill::cuda
