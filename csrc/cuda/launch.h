// The host's side of a launch: errors, device and stream.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <cstdint>

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

// A launch on a one-dimensional grid; an error of the launch itself is raised here, by name.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  STD_TORCH_CHECK(blocks <= INT_MAX, name, ": ", blocks, " blocks are more than a grid can have");
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace fastdistill::cuda
