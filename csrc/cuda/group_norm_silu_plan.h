// How group_norm_silu is cut into blocks on a GPU: which regime, which tiles, how much shared memory.
//
// Plain arithmetic on sizes and device numbers. The tests compile it for the host and show that every element is
// covered exactly once. x is (N, C, S); a thread owns vectors of `vector` elements, along the pixels when the image is
// contiguous, along the channels when they are last.
//
// | regime      | launches | x is read | how blocks that share groups add up       |
// |-------------|----------|-----------|-------------------------------------------|
// | cluster     | 1        | once      | distributed shared memory; alone if 1     |
// | cooperative | 1        | once      | a workspace and one barrier over the grid |
// | two-pass    | 3        | twice     | a workspace and a launch in between       |
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>

#include "device_limits.h"

namespace fastdistill::cuda::group_norm_silu {

// ---- the table: every threshold, and why ----------------------------------------------------------------------------
//
// The numbers that say "estimate" come from arithmetic on data sheets; no GPU has run them yet.

constexpr int64_t kSectorBytes = 32;  // the unit of a DRAM and L2 access: rows of a tile are whole ones where possible
constexpr int64_t kLineBytes = 128;
constexpr int kVectorBytes = 16;      // the widest load and store of a thread
constexpr int kWarp = 32;

// On-chip regimes. 512 threads of up to 128 registers are a whole register file: more threads could not keep that
// much, fewer would not have enough loads in flight.
constexpr int kOnChipThreads = 512;
// When there are more blocks than multiprocessors, two share one, so that one loads while the other stores.
constexpr int kSharingThreads = kOnChipThreads / 2;
constexpr int64_t kSharedReserve = 1024;  // that the system takes of every resident block
// Vectors of a tensor that a thread keeps in registers, of one tensor or of each of two: the backward needs more
// registers per channel, and spills with a fourth. Single elements take a register each.
constexpr int kHeldOfOne = 8, kHeldOfTwo = 3, kHeldElements = 16;
// Per-channel values are kept in shared memory. 2560, the widest of the UNets, in one group still leaves room for a
// tile.
constexpr int kMaxChannels = 2560;

// Estimate: a block with no more than 4 vectors for each of its threads is not split over a cluster any further; its
// loads are one wait for memory already, and a barrier over the cluster costs more than the shorter loop saves.
constexpr int64_t kEnoughPerBlock = 4 * kVectorBytes * kOnChipThreads;
// Estimate: up to here (all tensors that are read) L2 holds everything, and rows shorter than a sector cost nothing but
// issue slots; they are taken where they give more blocks.
constexpr int64_t kSmallBytes = 10 << 20;
// Estimate: a barrier over the grid takes as long as a multiprocessor needs to load so much, some 1500 clocks at 64
// bytes each. With less per block a cluster is better although it leaves half of the chip idle.
constexpr int64_t kBarrierBytes = 96 << 10;

// Two-pass regime.
constexpr int kSweepThreads = 256;
constexpr int64_t kBlocksPerWave = 1024;  // estimate: about eight blocks on each of 132 multiprocessors
constexpr int64_t kMaxPasses = 64;        // of a block over its pixels; partial results are 1 % of the traffic by then
constexpr int kCombineThreads = 128;

// ---- problem and tile -----------------------------------------------------------------------------------------------

struct Size {
  int64_t images, channels, pixels, groups;
  bool channels_last;
  int element_bytes;
  int vector;  // elements of a vector: kVectorBytes of them, or 1 where alignment does not allow it

  int64_t per_group() const { return channels / groups; }
  int64_t bytes() const { return images * channels * pixels * element_bytes; }
  int channels_each() const { return channels_last ? vector : 1; }
  int pixels_each() const { return channels_last ? 1 : vector; }
  int64_t pixel_vectors() const { return ceil_div(pixels, pixels_each()); }
};

// What one block works on: `across` threads along the channels times `along` threads along the pixels.
struct Tile {
  int across, along;
  int channels;                // of a tile; the last one may hang over
  int channel_tiles;
  int64_t pixel_tiles;
  int64_t vectors, longer;     // a tile has `vectors` along its pixels, the first `longer` tiles one more
  int helpers;                 // threads that add up one channel, a power of two within a warp

  FASTDISTILL_HOST_DEVICE int threads() const { return (across * along + kWarp - 1) / kWarp * kWarp; }
  FASTDISTILL_HOST_DEVICE int64_t blocks(int64_t images) const { return images * channel_tiles * pixel_tiles; }
  // The first vector of a tile along the pixels; of tile pixel_tiles, the end.
  FASTDISTILL_HOST_DEVICE int64_t first_vector(int64_t pixel_tile) const {
    return pixel_tile * vectors + (pixel_tile < longer ? pixel_tile : longer);
  }
};

// Where a block's tile lies.
struct Place {
  int64_t image, channel_tile, pixel_tile;
};

// On chip the blocks that share groups are neighbours, as those of a cluster are.
FASTDISTILL_HOST_DEVICE inline Place on_chip_place(const Tile& tile, unsigned block) {
  const unsigned pixel_tiles = static_cast<unsigned>(tile.pixel_tiles);
  const unsigned channel_tiles = static_cast<unsigned>(tile.channel_tiles);
  const unsigned run = block / pixel_tiles;
  return {run / channel_tiles, run % channel_tiles, block % pixel_tiles};
}

// In a sweep over everything, neighbours share pixels, and so whole lines when the channels are last.
FASTDISTILL_HOST_DEVICE inline Place sweep_place(const Tile& tile, unsigned block) {
  const unsigned pixel_tiles = static_cast<unsigned>(tile.pixel_tiles);
  const unsigned channel_tiles = static_cast<unsigned>(tile.channel_tiles);
  const unsigned run = block / channel_tiles;
  return {run / pixel_tiles, block % channel_tiles, run % pixel_tiles};
}

// A thread's place in its tile, and what it covers: channels [first_channel, last_channel), which are none when the
// tile hangs over, and the vectors that begin at pixel, pixel + step(), ... before last_pixel.
template <int V, bool kChannelsLast>
struct Lane {
  static constexpr int kChannels = kChannelsLast ? V : 1;  // of a vector
  static constexpr int kPixels = kChannelsLast ? 1 : V;

  int tx, ty;  // along the channels, along the pixels
  int along;
  bool active;  // threads that only fill up the last warp take part in nothing but barriers
  int64_t first_channel, last_channel;
  int64_t pixel, last_pixel;
  int64_t tile_pixels;  // of the whole tile

  FASTDISTILL_HOST_DEVICE Lane(const Tile& tile, const Place& place, int64_t channels, int64_t pixels, int thread)
      : along(tile.along) {
    active = thread < tile.across * tile.along;
    tx = kChannelsLast ? thread % tile.across : thread / tile.along;
    ty = kChannelsLast ? thread / tile.across : thread % tile.along;
    const int64_t tile_start = place.channel_tile * tile.channels, tile_end = tile_start + tile.channels;
    const int64_t end = tile_end < channels ? tile_end : channels;
    first_channel = tile_start + tx * kChannels;
    last_channel = !active ? first_channel : first_channel + kChannels < end ? first_channel + kChannels : end;
    const int64_t start = tile.first_vector(place.pixel_tile) * kPixels;
    const int64_t stop = tile.first_vector(place.pixel_tile + 1) * kPixels;
    tile_pixels = (stop < pixels ? stop : pixels) - start;
    last_pixel = owns() ? start + tile_pixels : start;
    pixel = start + ty * int64_t{kPixels};
  }

  FASTDISTILL_HOST_DEVICE bool owns() const { return first_channel < last_channel; }
  FASTDISTILL_HOST_DEVICE int64_t step() const { return int64_t{along} * kPixels; }
  // Pixels of each of its channels that fall to this thread.
  FASTDISTILL_HOST_DEVICE int64_t pixels() const {
    return pixel < last_pixel ? ((last_pixel - pixel - 1) / step() + 1) * kPixels : 0;
  }
  // Which of the thread's channels element e of a vector belongs to.
  FASTDISTILL_HOST_DEVICE static constexpr int channel_of(int e) { return kChannelsLast ? e : 0; }
};

// ---- shared memory --------------------------------------------------------------------------------------------------

// What a kernel on chip keeps: tensors that it reads, and floats in shared memory per channel and per group of its
// tile.
struct Keeps {
  int tensors, per_channel, per_group;
};
FASTDISTILL_HOST_DEVICE constexpr Keeps forward_keeps() { return {1, 5, 6}; }
FASTDISTILL_HOST_DEVICE constexpr Keeps backward_keeps() { return {2, 7, 2}; }

// Vectors of each tensor that a thread keeps in registers; the others lie in shared memory.
FASTDISTILL_HOST_DEVICE constexpr int held_vectors(int vector, int tensors) {
  return vector == 1 ? kHeldElements / tensors : tensors == 1 ? kHeldOfOne : kHeldOfTwo;
}

// Floats in front of a kernel's other arrays that sums over pixels need: one for each of a thread's channels.
FASTDISTILL_HOST_DEVICE inline int row_floats(const Tile& tile, int channels_each) {
  return tile.threads() * channels_each;
}

// Where the vectors begin, in bytes from the start of shared memory.
FASTDISTILL_HOST_DEVICE inline int64_t tile_offset(const Tile& tile, int channels_each, int64_t per_group,
                                                   const Keeps& keeps) {
  const int64_t groups = tile.channels / per_group;
  const int64_t floats =
      row_floats(tile, channels_each) + int64_t{keeps.per_channel} * tile.channels + keeps.per_group * groups;
  return ceil_div(floats * 4, kVectorBytes) * kVectorBytes;
}

// Vectors of one tensor that every thread may have in shared memory; room is kept for the longest tile.
FASTDISTILL_HOST_DEVICE inline int64_t spare_vectors(const Tile& tile, int held) {
  const int64_t each = ceil_div(tile.vectors + (tile.longer > 0 ? 1 : 0), tile.along);
  return each > held ? each - held : 0;
}

// ---- plans ----------------------------------------------------------------------------------------------------------

enum class Regime { kCluster, kCooperative, kTwoPass };

struct Plan {
  Regime regime;
  Tile tile;
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;     // blocks of a cluster
  bool streaming;  // results are not expected to be in L2 when they are read
};

inline int helpers(int threads, int channels) { return floor_power_of_two(std::clamp(threads / channels, 1, kWarp)); }

// A tile of whole groups, the pixels of each image cut into `parts`; none when it does not fit on chip.
inline std::optional<Plan> on_chip(const Size& x, const Keeps& keeps, int64_t groups, int64_t parts, int threads,
                                   int64_t shared_bytes) {
  const int64_t channels = groups * x.per_group(), lanes = channels / x.channels_each();
  if (channels % x.channels_each() != 0 || channels > kMaxChannels || lanes > threads || parts > x.pixel_vectors()) {
    return std::nullopt;
  }
  const int64_t longest = ceil_div(x.pixel_vectors(), parts);
  Plan plan{};
  plan.regime = Regime::kCluster;
  plan.cluster = 1;
  Tile& tile = plan.tile;
  tile.across = static_cast<int>(lanes);
  tile.along = static_cast<int>(std::min<int64_t>(threads / lanes, longest));
  tile.channels = static_cast<int>(channels);
  tile.channel_tiles = static_cast<int>(ceil_div(x.groups, groups));
  tile.pixel_tiles = parts;
  tile.vectors = x.pixel_vectors() / parts;
  tile.longer = x.pixel_vectors() % parts;
  tile.helpers = helpers(tile.threads(), tile.channels);
  plan.threads = tile.threads();
  plan.blocks = tile.blocks(x.images);
  const int64_t spare = spare_vectors(tile, held_vectors(x.vector, keeps.tensors));
  plan.shared_bytes = tile_offset(tile, x.channels_each(), x.per_group(), keeps) +
                      spare * plan.threads * keeps.tensors * x.vector * x.element_bytes;
  if (plan.shared_bytes > shared_bytes) return std::nullopt;
  return plan;
}

// Groups of a tile whose rows are whole sectors, or all there are. A row of pixels is long enough with one group.
inline int64_t sector_groups(const Size& x) {
  if (!x.channels_last) return 1;
  return std::min(std::lcm(kSectorBytes / x.element_bytes, x.per_group()) / x.per_group(), x.groups);
}

inline bool fills(const Plan& plan, const DeviceLimits& device) { return 2 * plan.blocks > device.multiprocessors; }

inline int64_t block_bytes(const Plan& plan, const Size& x, const Keeps& keeps) {
  return x.bytes() * keeps.tensors / plan.blocks;
}

// `sharing`: where there are more blocks than multiprocessors, only blocks of which two fit on one.
inline std::optional<Plan> cluster_plan(const Size& x, const Keeps& keeps, const DeviceLimits& device, bool sharing) {
  std::optional<Plan> best;
  for (int64_t groups = sector_groups(x);; groups /= 2) {
    const int64_t channel_tiles = ceil_div(x.groups, groups);
    std::optional<Plan> largest;
    for (int parts = 1; parts <= device.cluster; parts *= 2) {
      const bool share = sharing && x.images * channel_tiles * parts > device.multiprocessors;
      const std::optional<Plan> plan =
          on_chip(x, keeps, groups, parts, std::min(share ? kSharingThreads : kOnChipThreads, device.threads),
                  share ? device.shared_bytes / 2 - kSharedReserve : device.shared_bytes);
      if (!plan) continue;
      largest = plan;
      largest->cluster = parts;
      if (fills(*plan, device) || block_bytes(*plan, x, keeps) <= kEnoughPerBlock) return largest;
    }
    if (largest && (!best || largest->blocks > best->blocks)) best = largest;
    const bool may_halve = groups > 1 && groups / 2 * x.per_group() % x.channels_each() == 0;
    if (!may_halve || x.bytes() * keeps.tensors > kSmallBytes) return best;
  }
}

// All blocks at once, one on each multiprocessor. The more groups a tile has, the more partial results a block reads
// after the barrier, so of the tiles that use as many multiprocessors the narrowest is taken.
inline std::optional<Plan> cooperative_plan(const Size& x, const Keeps& keeps, const DeviceLimits& device) {
  if (!device.cooperative) return std::nullopt;
  std::optional<Plan> best;
  for (int64_t groups = sector_groups(x);; groups = std::min(2 * groups, x.groups)) {
    const int64_t tiles = x.images * ceil_div(x.groups, groups);
    const int64_t parts = std::min(device.multiprocessors / tiles, x.pixel_vectors());
    if (parts >= 1) {
      const std::optional<Plan> plan =
          on_chip(x, keeps, groups, parts, std::min(kOnChipThreads, device.threads), device.shared_bytes);
      if (plan && (!best || plan->blocks > best->blocks)) best = plan;
    }
    if (groups == x.groups) break;
  }
  if (best) best->regime = Regime::kCooperative;
  return best;
}

// Any channels and a run of pixels.
inline Plan two_pass_plan(const Size& x, const DeviceLimits& device) {
  const int64_t channel_lanes = ceil_div(x.channels, x.channels_each());
  Plan plan{};
  plan.regime = Regime::kTwoPass;
  plan.cluster = 1;
  Tile& tile = plan.tile;
  if (x.channels_last) {
    // A pixel of the tile is one line, more only when there are too few pixels for the threads.
    const int64_t line = kLineBytes / (x.channels_each() * x.element_bytes);
    const int64_t wanted = std::max<int64_t>(line, kSweepThreads / floor_power_of_two(x.pixel_vectors()));
    tile.across = static_cast<int>(std::min<int64_t>({wanted, 2 * floor_power_of_two(channel_lanes), kSweepThreads}));
    tile.along = kSweepThreads / tile.across;
  } else {
    tile.along = static_cast<int>(std::min<int64_t>(kSweepThreads, floor_power_of_two(x.pixel_vectors())));
    tile.across = kSweepThreads / tile.along;
  }
  tile.channels = tile.across * x.channels_each();
  tile.channel_tiles = static_cast<int>(ceil_div(x.channels, tile.channels));
  const int64_t passes = ceil_div(x.pixel_vectors(), tile.along);
  const int64_t each = std::clamp<int64_t>(x.images * tile.channel_tiles * passes / kBlocksPerWave, 1, kMaxPasses);
  tile.pixel_tiles = ceil_div(passes, each);
  tile.vectors = x.pixel_vectors() / tile.pixel_tiles;
  tile.longer = x.pixel_vectors() % tile.pixel_tiles;
  tile.helpers = helpers(kSweepThreads, tile.channels);
  plan.threads = kSweepThreads;
  plan.blocks = tile.blocks(x.images);
  plan.shared_bytes = (row_floats(tile, x.channels_each()) + int64_t{3} * tile.channels) * 4;
  plan.streaming = 2 * x.bytes() > device.l2_bytes;
  return plan;
}

// The regime that serves x.
inline Plan plan(const Size& x, const Keeps& keeps, const DeviceLimits& device) {
  std::optional<Plan> cluster = cluster_plan(x, keeps, device, true);
  if (!cluster) cluster = cluster_plan(x, keeps, device, false);
  if (cluster && (fills(*cluster, device) || block_bytes(*cluster, x, keeps) <= kBarrierBytes)) return *cluster;
  const std::optional<Plan> cooperative = cooperative_plan(x, keeps, device);
  if (cooperative && (!cluster || cooperative->blocks > cluster->blocks)) return *cooperative;
  return cluster ? *cluster : two_pass_plan(x, device);
}

// A combine kernel's threads form rows of so many channels of a group.
inline int combine_columns(int64_t per_group) {
  return std::min(kWarp, 2 * floor_power_of_two(std::max<int64_t>(1, per_group - 1)));
}

}  // namespace fastdistill::cuda::group_norm_silu
