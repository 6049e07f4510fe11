// What the library was built with and what the driver can run, read through ctypes before any kernel is chosen.
#include <cuda_runtime.h>

#ifndef FASTDISTILL_CUDA_ARCHS
#error "the build passes -DFASTDISTILL_CUDA_ARCHS, such as '\"8.0;9.0a\"'"
#endif

#define FASTDISTILL_EXPORT extern "C" __attribute__((visibility("default")))

// The CUDA runtime that is linked in, as major * 1000 + minor * 10.
FASTDISTILL_EXPORT int fastdistill_cuda_runtime_version() { return CUDART_VERSION; }

// The newest CUDA that the installed driver runs, in the same form; 0 without a driver.
FASTDISTILL_EXPORT int fastdistill_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// The architectures that there is machine code for.
FASTDISTILL_EXPORT const char* fastdistill_cuda_architectures() { return FASTDISTILL_CUDA_ARCHS; }
