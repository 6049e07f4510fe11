// The host's side of a launch: errors, device and stream, limits of the device.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <cstdint>
#include <map>
#include <mutex>

#include "device_limits.h"

namespace fastdistill::cuda {

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

// For its lifetime the device of `tensor` is the current one; `stream()` is torch's current stream on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == TORCH_SUCCESS,
                    "torch has no current CUDA stream for device ", index_);
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Blocks of a cluster that every GPU with clusters can have; 16 would need one that says so.
constexpr int kPortableCluster = 8;

// Of the current device, asked once. The result lives as long as the process.
inline const DeviceLimits& current_device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
  };
  DeviceLimits limits{};
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits.threads = attribute(cudaDevAttrMaxThreadsPerBlock);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  limits.cluster = attribute(cudaDevAttrClusterLaunch) ? kPortableCluster : 1;
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  return known.emplace(device, limits).first->second;
}

// A one-dimensional grid.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;           // blocks of a cluster; divides `blocks`
  bool cooperative = false;  // all blocks are resident at once, and may wait for one another
};

// Dynamic shared memory beyond what is granted unasked must be asked for, per kernel and device. All there is at once,
// so that what another thread has asked for is never taken back.
template <typename... Parameters>
void allow_shared(const char* name, void (*kernel)(Parameters...), int64_t bytes) {
  constexpr int64_t kUnasked = 48 * 1024;
  if (bytes <= kUnasked) return;
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, function), name);
  if (bytes <= attributes.maxDynamicSharedSizeBytes) return;
  const int64_t all = current_device_limits().shared_bytes - static_cast<int64_t>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(all)), name);
}

// Whether all blocks of the grid can be resident on the current device at once. Asks the driver, not the device.
template <typename... Parameters>
bool all_resident(const char* name, void (*kernel)(Parameters...), const Grid& grid) {
  int per_multiprocessor = 0;
  allow_shared(name, kernel, grid.shared_bytes);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, reinterpret_cast<const void*>(kernel),
                                                      grid.threads, static_cast<size_t>(grid.shared_bytes)),
        name);
  return int64_t{per_multiprocessor} * current_device_limits().multiprocessors >= grid.blocks;
}

// An error of the launch itself is raised here, by name.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            const Arguments&... arguments) {
  STD_TORCH_CHECK(grid.blocks <= INT_MAX, name, ": ", grid.blocks, " blocks are more than a grid can have");
  allow_shared(name, kernel, grid.shared_bytes);
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (grid.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status != cudaSuccess) cudaGetLastError();  // or torch would find it again at its next launch
  check(status, name);
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  launch(name, kernel, Grid{blocks, threads, shared_bytes}, stream, arguments...);
}

}  // namespace fastdistill::cuda
