// What a launch plan needs to know about a GPU, as plain numbers: a plan can be made, and tested, for any GPU on any
// machine. Compiles without CUDA.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTDISTILL_HOST_DEVICE __host__ __device__
#else
#define FASTDISTILL_HOST_DEVICE
#endif

namespace fastdistill::cuda {

struct DeviceLimits {
  int multiprocessors;
  int threads;           // of a block
  int64_t shared_bytes;  // of a block that asks for all it can have
  int64_t l2_bytes;
  int cluster;           // blocks of a thread-block cluster; 1 where there are none (before compute capability 9.0)
  bool cooperative;      // whether a grid whose blocks are all resident may wait for all of them
};

FASTDISTILL_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest power of two <= n, for n >= 1.
FASTDISTILL_HOST_DEVICE constexpr int floor_power_of_two(int64_t n) {
  int power = 1;
  while (2 * static_cast<int64_t>(power) <= n && power < (1 << 30)) power *= 2;
  return power;
}

}  // namespace fastdistill::cuda
