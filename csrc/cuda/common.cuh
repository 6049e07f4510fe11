// What the CUDA ops share: streams and errors, vector loads and stores, sums over a team of threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fastdistill {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device current for the scope and knows the stream that torch is using there.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- elements and vectors -------------------------------------------------------------------------------------------

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T narrow(float v);
template <>
__device__ inline float narrow<float>(float v) { return v; }
template <>
__device__ inline __half narrow<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

// V neighbours as floats in one load; the address is a multiple of the pack's size.
template <int V, typename T>
__device__ inline void load_pack(const T* from, float (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = widen(pack.values[i]);
}

template <int V, typename T>
__device__ inline void store_pack(T* to, const float (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.values[i] = narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// A small parameter in x's dtype or float32, with any stride; `otherwise` where absent.
struct Parameter {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t stride_n = 0, stride_c = 0;

  Parameter() = default;
  Parameter(const Tensor& t, int64_t n_stride, int64_t c_stride)
      : data(t.const_data_ptr()), type(t.scalar_type()), stride_n(n_stride), stride_c(c_stride) {}

  __device__ float at(int64_t n, int64_t c, float otherwise) const {
    if (data == nullptr) return otherwise;
    const int64_t i = n * stride_n + c * stride_c;
    if (type == ScalarType::Half) return widen(static_cast<const __half*>(data)[i]);
    if (type == ScalarType::BFloat16) return widen(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

// ---- sums over a team -----------------------------------------------------------------------------------------------

// The sum over a team of kTeam neighbouring threads (8, 32, or the whole block of 256), the same in each of them and
// always added in the same order. Every thread of the block takes part.
template <int kTeam>
__device__ inline float team_sum(float v) {
  constexpr int kWidth = kTeam < 32 ? kTeam : 32;
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset, kWidth);
  if constexpr (kTeam > 32) {
    __shared__ float of_warp[kTeam / 32];
    __syncthreads();  // the previous sum has been read
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kTeam / 32; ++warp) v += of_warp[warp];
  }
  return v;
}

}  // namespace fastdistill
