// How lpips_distance is cut into blocks on a GPU, and which channels and pixels a thread owns. Plain arithmetic on
// sizes: it also compiles for the host.
#pragma once

#include <cstdint>

#include "device_limits.h"

namespace fastdistill::cuda::lpips {

constexpr int kThreads = 256;

// A block has a run of pixels of one sample and all of their channels. Planes: a thread owns a vector of pixels, and
// `helpers` threads share it, each with every helpers-th channel. Rows: a thread owns vectors of channels of one pixel.
struct Plan {
  int across;   // threads along what is contiguous: vectors of pixels (planes), vectors of channels (rows)
  int pixels;   // of a block
  int64_t tiles;  // blocks of a sample

  FASTDISTILL_HOST_DEVICE int along() const { return kThreads / across; }
};

// Planes: 64 pixels of 16 bits are a 128-byte line. Estimate: a quarter of that where there are few blocks, so that
// about two for each of 132 multiprocessors have something to do.
constexpr int64_t kFewBlocks = 2 * 132;

inline Plan plan(int64_t samples, int64_t channels, int64_t pixels, int vector, bool rows) {
  Plan p{};
  if (rows) {
    // Up to a warp for a pixel's channels, which it then adds up alone.
    p.across = floor_power_of_two(ceil_div(channels, vector) < 32 ? ceil_div(channels, vector) : 32);
    p.pixels = p.along();
  } else {
    constexpr int kLine = 64, kSector = 16;
    const bool few = samples * ceil_div(pixels, kLine) < kFewBlocks;
    const int64_t run = few ? kSector : kLine;
    p.across = static_cast<int>(run / vector);
    while (p.across > 1 && p.across / 2 * vector >= pixels) p.across /= 2;
    p.pixels = p.across * vector;
  }
  p.tiles = ceil_div(pixels, p.pixels);
  return p;
}

}  // namespace fastdistill::cuda::lpips
