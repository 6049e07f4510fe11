// How dmd_gradient is cut into blocks on a GPU. Plain arithmetic on sizes: the tests compile it for the host.
#pragma once

#include <cstdint>

#include "device_limits.h"

namespace fastdistill::cuda::dmd_gradient_plan {

constexpr int kThreads = 512;
constexpr int kElements = 24;              // that a thread keeps: 32 of them spill for sm_80 and sm_100 where they are read one by one
constexpr int64_t kSweepElements = 16384;  // of a block that keeps nothing; few enough to be counted in a float

// Every block works on a run of vectors of one sample, `splits` blocks on each sample.
struct Plan {
  bool whole;  // one launch: differences stay in registers, blocks wait for the grid
  int64_t samples, splits, vectors_each;

  FASTDISTILL_HOST_DEVICE int64_t blocks() const { return samples * splits; }
};

inline Plan sweep_plan(int64_t samples, int64_t vectors, int vector) {
  const int64_t each = kSweepElements / vector;
  return {false, samples, ceil_div(vectors, each), each};
}

// For `samples` of `vectors` vectors of `vector` elements. One launch where all differences fit on chip: on 132
// multiprocessors 1.6 million elements in up to 132 samples.
inline Plan plan(int64_t samples, int64_t vectors, int vector, const DeviceLimits& limits) {
  const int64_t at_once = limits.multiprocessors / samples;  // blocks of a sample
  if (limits.cooperative && at_once > 0) {
    const int64_t wanted = ceil_div(vectors, kThreads), splits = wanted < at_once ? wanted : at_once;
    const int64_t each = ceil_div(vectors, splits);
    if (each * vector <= int64_t{kThreads} * kElements) return {true, samples, ceil_div(vectors, each), each};
  }
  return sweep_plan(samples, vectors, vector);
}

}  // namespace fastdistill::cuda::dmd_gradient_plan
