// As much of the CUDA runtime as the kernels of this project use, for the host: a kernel is an ordinary function, each
// of its threads a fibre, and the runtime's functions answer for the device that a test has described. See
// ../emulator.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Blocks that do not wait for one another run one after the other, and so can share what is static. Those that do must
// use dynamic shared memory.
#define __shared__ static
#define FASTDISTILL_DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 720 };
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
  cudaDevAttrClusterLaunch,
  cudaDevAttrCooperativeLaunch,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0;
  int maxDynamicSharedSizeBytes = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulator {

unsigned char* dynamic_shared();
void wait_for_block();
void arrive_in_cluster();
void wait_for_cluster();
const void* in_block_of_cluster(const void* shared, unsigned rank);
inline void* in_block_of_cluster(void* shared, unsigned rank) {
  return const_cast<void*>(in_block_of_cluster(static_cast<const void*>(shared), rank));
}
void wait_for_grid();
float exchange_in_warp(float value, int lane_mask);
void start_copy(void* shared, const void* from, size_t bytes);
void finish_copies();

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

}  // namespace emulator

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that runs

inline void __syncthreads() { emulator::wait_for_block(); }
inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  return emulator::exchange_in_warp(value, lane_mask);
}
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
#undef __expf  // glibc declares one of its own
#define __expf(a) expf(a)
#define __fdividef(a, b) ((a) / (b))
inline float __fmul_rn(float a, float b) { return a * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "error of the emulator"; }
inline const char* cudaGetErrorString(cudaError_t) { return "the launch is not one that the device could take"; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulator::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
