// What the library was built for, for fastdistill/_native.py to compare with the machine; read through ctypes.
#include <cuda_runtime.h>

#define FASTDISTILL_EXPORT extern "C" __attribute__((visibility("default")))

FASTDISTILL_EXPORT int fastdistill_cuda_runtime_version() { return CUDART_VERSION; }

// 0 where no driver is installed.
FASTDISTILL_EXPORT int fastdistill_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

FASTDISTILL_EXPORT const char* fastdistill_cuda_architectures() { return FASTDISTILL_CUDA_ARCHS; }
