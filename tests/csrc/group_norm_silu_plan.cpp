// Checks the launch plans of group_norm_silu, compiled for the host; see test_group_norm_silu_plan.py.
//
// Reads a line per problem: multiprocessors threads shared_bytes l2_bytes cluster cooperative, N C S G, channels_last
// element_bytes vector tensors. Writes a line for each: "regime cluster blocks threads shared_bytes channels", or
// "wrong: " and what is.
#include "group_norm_silu_plan.h"

#include <climits>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

using namespace fastdistill::cuda;
using namespace fastdistill::cuda::group_norm_silu;

namespace {

struct Wrong {
  std::string what;
};

void require(bool condition, const char* what) {
  if (!condition) throw Wrong{what};
}

void require_once(const std::vector<int>& counts, const char* what) {
  for (int count : counts) require(count == 1, what);
}

Place place(const Plan& plan, unsigned block) {
  return plan.regime == Regime::kTwoPass ? sweep_place(plan.tile, block) : on_chip_place(plan.tile, block);
}

// A tile's elements are the product of its channels and its pixels, so each is shown to be cut without gap or overlap:
// blocks over tiles, threads over a tile's channels, threads and their steps over its pixels.
template <int V, bool kLast>
void check_coverage(const Plan& plan, const Size& x, int tensors) {
  using L = Lane<V, kLast>;
  const Tile& tile = plan.tile;
  std::vector<int> tiles(static_cast<size_t>(plan.blocks));
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const Place p = place(plan, static_cast<unsigned>(block));
    require(p.image >= 0 && p.image < x.images && p.channel_tile >= 0 && p.channel_tile < tile.channel_tiles &&
                p.pixel_tile >= 0 && p.pixel_tile < tile.pixel_tiles,
            "a block lies outside of x");
    ++tiles[static_cast<size_t>((p.image * tile.channel_tiles + p.channel_tile) * tile.pixel_tiles + p.pixel_tile)];
  }
  require_once(tiles, "a tile is not one block's");

  std::vector<int> channels(static_cast<size_t>(x.channels));
  for (int64_t channel_tile = 0; channel_tile < tile.channel_tiles; ++channel_tile) {
    for (int thread = 0; thread < plan.threads; ++thread) {
      const L lane(tile, {0, channel_tile, 0}, x.channels, x.pixels, thread);
      const L first(tile, {0, channel_tile, 0}, x.channels, x.pixels, kLast ? lane.tx : lane.tx * tile.along);
      if (!lane.active) continue;
      require(lane.first_channel == first.first_channel && lane.last_channel == first.last_channel,
              "threads of one column have different channels");
      require(!lane.owns() || V == 1 || !kLast || lane.last_channel - lane.first_channel == V,
              "a vector hangs over the channels");
      if (lane.ty != 0) continue;
      for (int64_t c = lane.first_channel; c < lane.last_channel; ++c) ++channels[static_cast<size_t>(c)];
    }
  }
  require_once(channels, "a channel is not one thread column's");

  const int64_t held = plan.regime == Regime::kTwoPass
                           ? INT64_MAX
                           : held_vectors(V, tensors) + spare_vectors(tile, held_vectors(V, tensors));
  std::vector<int> vectors(static_cast<size_t>(x.pixel_vectors()));
  for (int64_t pixel_tile = 0; pixel_tile < tile.pixel_tiles; ++pixel_tile) {
    int64_t counted = 0;
    for (int ty = 0; ty < tile.along; ++ty) {
      const L lane(tile, {0, 0, pixel_tile}, x.channels, x.pixels, kLast ? ty * tile.across : ty);
      require(lane.ty == ty && lane.tx == 0, "a thread is not where its index says");
      int64_t own = 0;
      for (int64_t s = lane.pixel; s < lane.last_pixel; s += lane.step(), ++own) {
        require(s % L::kPixels == 0 && s + L::kPixels <= x.pixels, "a vector hangs over the pixels");
        ++vectors[static_cast<size_t>(s / L::kPixels)];
      }
      require(own * L::kPixels == lane.pixels(), "a thread miscounts its pixels");
      require(own <= held, "a thread has more vectors than places for them");
      counted += lane.pixels();
      require(ty != 0 || own > 0, "a tile has no pixel");
    }
    const L lane(tile, {0, 0, pixel_tile}, x.channels, x.pixels, 0);
    require(counted == lane.tile_pixels, "a tile miscounts its pixels");
  }
  require_once(vectors, "a vector is not one thread's");
}

template <int V>
void check_layout(const Plan& plan, const Size& x, int tensors) {
  x.channels_last ? check_coverage<V, true>(plan, x, tensors) : check_coverage<V, false>(plan, x, tensors);
}

void check(const Plan& plan, const Size& x, const Keeps& keeps, const DeviceLimits& device) {
  const Tile& tile = plan.tile;
  require(plan.threads >= 1 && plan.threads % kWarp == 0, "threads");
  require(plan.threads == tile.threads(), "threads of the plan and of the tile differ");
  require(plan.blocks == x.images * tile.channel_tiles * tile.pixel_tiles, "blocks");
  require(plan.blocks >= 1 && plan.blocks <= INT_MAX, "more blocks than a grid has");
  require(tile.helpers >= 1 && tile.helpers <= kWarp && (tile.helpers & (tile.helpers - 1)) == 0, "helpers");
  if (plan.regime != Regime::kTwoPass) {
    require(plan.threads <= device.threads && plan.shared_bytes <= device.shared_bytes, "limits of the device");
    require(plan.threads <= kOnChipThreads, "more threads than the kernel was compiled for");
    require(tile.channels % x.per_group() == 0, "a tile cuts a group");
    require(tile.channels <= kMaxChannels, "channels");
    const int64_t offset = tile_offset(tile, x.channels_each(), x.per_group(), keeps);
    const int64_t spare = spare_vectors(tile, held_vectors(x.vector, keeps.tensors));
    require(offset % kVectorBytes == 0, "vectors in shared memory are not aligned");
    require(offset + spare * plan.threads * keeps.tensors * x.vector * x.element_bytes <= plan.shared_bytes,
            "shared memory is too small for the tile");
  } else {
    // Of no device in particular: what any of them grants unasked.
    require(plan.threads == kSweepThreads && plan.shared_bytes <= 48 * 1024, "a sweep's limits");
  }
  if (plan.regime == Regime::kCluster) {
    require(plan.cluster == tile.pixel_tiles, "a cluster is not the blocks that share groups");
    require(plan.cluster >= 1 && plan.cluster <= device.cluster, "cluster size");
    require(plan.blocks % plan.cluster == 0, "the cluster does not divide the grid");
  } else {
    require(plan.cluster == 1, "a cluster where there is none");
  }
  if (plan.regime == Regime::kCooperative) {
    require(device.cooperative && plan.blocks <= device.multiprocessors, "a grid that cannot be resident");
  }
  switch (x.vector) {
    case 1:
      return check_layout<1>(plan, x, keeps.tensors);
    case 4:
      return check_layout<4>(plan, x, keeps.tensors);
    case 8:
      return check_layout<8>(plan, x, keeps.tensors);
    default:
      throw Wrong{"vector"};
  }
}

std::string describe(const std::string& line) {
  std::istringstream in(line);
  DeviceLimits device{};
  Size x{};
  int tensors = 0;
  in >> device.multiprocessors >> device.threads >> device.shared_bytes >> device.l2_bytes >> device.cluster >>
      device.cooperative >> x.images >> x.channels >> x.pixels >> x.groups >> x.channels_last >> x.element_bytes >>
      x.vector >> tensors;
  if (!in) return "wrong: the line cannot be read";
  const Keeps keeps = tensors == 1 ? forward_keeps() : backward_keeps();
  const Plan chosen = plan(x, keeps, device);
  try {
    check(chosen, x, keeps, device);
    // What serves where a cooperative grid cannot be resident.
    if (chosen.regime == Regime::kCooperative) check(two_pass_plan(x, device), x, keeps, device);
  } catch (const Wrong& wrong) {
    return "wrong: " + wrong.what;
  }
  const char* names[] = {"cluster", "cooperative", "two-pass"};
  std::ostringstream out;
  out << names[static_cast<int>(chosen.regime)] << ' ' << chosen.cluster << ' ' << chosen.blocks << ' '
      << chosen.threads << ' ' << chosen.shared_bytes << ' ' << chosen.tile.channels;
  return out.str();
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << describe(line) << '\n';
}
