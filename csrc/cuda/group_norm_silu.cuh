// What the forward and the backward kernels of group_norm_silu share: the call, how threads share a tile, and sums
// over the pixels of a channel and over the channels of a group.
//
// A tensor is (N, C, S). A thread owns vectors of V elements: V pixels of one channel when the image is contiguous, V
// channels of one pixel when its channels are last. So the loads of a warp are whole lines in both layouts, and all
// that differs between them is which index a vector runs along.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>

#include "../layout.h"
#include "device.cuh"
#include "launch.h"

namespace fastdistill::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- the call -------------------------------------------------------------------------------------------------------

// weight, bias or add: float32 or x's dtype, any strides, or absent.
struct Parameter {
  const void* data;
  ScalarType type;
  int64_t stride_n, stride_c;

  __device__ float at(int64_t n, int64_t c, float absent) const {
    if (data == nullptr) return absent;
    const int64_t i = n * stride_n + c * stride_c;
    if (type == ScalarType::Half) return to_float(static_cast<const __half*>(data)[i]);
    if (type == ScalarType::BFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

inline Parameter parameter(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, ScalarType::Float, 0, 0};
  const bool per_image = tensor->dim() == 2;
  return {tensor->const_data_ptr(), tensor->scalar_type(), per_image ? tensor->stride(0) : 0,
          tensor->stride(per_image ? 1 : 0)};
}

struct Problem {
  Layout x;
  int64_t groups, per_group;  // per_group = C / groups channels
  Parameter weight, bias, add;
  bool silu;

  Problem(const Tensor& x_, int64_t groups_, const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_,
          const std::optional<Tensor>& add_, bool silu_)
      : x(layout_of(x_)),
        groups(groups_),
        per_group(x.C / groups_),
        weight(parameter(weight_)),
        bias(parameter(bias_)),
        add(parameter(add_)),
        silu(silu_) {}

  // Elements that share one mean.
  float group_size() const { return static_cast<float>(per_group * x.S); }
};

// A float32 tensor on x's device.
inline Tensor floats_like(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

inline float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Whether a thread may load V neighbours along x's vector direction at once: they are neighbours in memory as well, and
// every vector starts at a multiple of its size.
inline bool has_vectors(const void* data, const Strides3& stride, const Layout& x, int64_t bytes) {
  const int64_t along = x.channels_last ? stride.c : stride.s, across = x.channels_last ? stride.s : stride.c;
  const int64_t length = x.channels_last ? x.C : x.S, rows = x.channels_last ? x.S : x.C;
  return along == 1 && length * bytes % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         (rows == 1 || across * bytes % kVectorBytes == 0) && (x.N == 1 || stride.n * bytes % kVectorBytes == 0);
}

template <typename T>
struct Type {
  using type = T;
};
template <int V>
struct Width {
  static constexpr int value = V;
};

// Calls body(Type<T>, Width<V>, std::bool_constant<channels last>) for the call at hand.
template <typename T, typename Body>
void dispatch_layout(bool vectors, bool channels_last, const Body& body) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  if (vectors) {
    channels_last ? body(Type<T>{}, Width<kVector>{}, std::true_type{})
                  : body(Type<T>{}, Width<kVector>{}, std::false_type{});
  } else {
    channels_last ? body(Type<T>{}, Width<1>{}, std::true_type{}) : body(Type<T>{}, Width<1>{}, std::false_type{});
  }
}

template <typename Body>
void dispatch(ScalarType type, bool vectors, bool channels_last, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return dispatch_layout<__half>(vectors, channels_last, body);
    case ScalarType::BFloat16:
      return dispatch_layout<__nv_bfloat16>(vectors, channels_last, body);
    case ScalarType::Float:
      return dispatch_layout<float>(vectors, channels_last, body);
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr int kSplitThreads = 256;
constexpr int kMaxWholeChannels = 1024;  // of one tile: their sums are kept in shared memory
constexpr int kCombineThreads = 128;
constexpr int64_t kBlocksPerWave = 1024;  // about eight blocks on each of 132 multiprocessors
constexpr int64_t kMaxPasses = 64;        // of a block over its pixels; by then the partial results are 1 % of the traffic
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kLineBytes = 128;

// What one block works on: `across` threads along the channels times `along` threads along the pixels.
struct Tile {
  int across, along;
  int channels;            // of the tile
  int64_t pixels;          // of the tile
  int64_t channel_tiles, pixel_tiles;

  int threads() const { return (across * along + kWarp - 1) / kWarp * kWarp; }
  int64_t blocks(int64_t images) const { return images * channel_tiles * pixel_tiles; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest power of two <= n.
inline int floor_power_of_two(int64_t n) {
  int power = 1;
  while (2 * static_cast<int64_t>(power) <= n && power < (1 << 30)) power *= 2;
  return power;
}

// Any channels, a run of pixels; v elements per vector.
inline Tile split_tile(const Layout& x, int v, int64_t bytes) {
  const int channels_each = x.channels_last ? v : 1, pixels_each = x.channels_last ? 1 : v;
  const int64_t channel_lanes = ceil_div(x.C, channels_each), pixel_lanes = ceil_div(x.S, pixels_each);
  Tile tile;
  if (x.channels_last) {
    // A pixel of the tile is one 128-byte line, more only when there are too few pixels for the threads.
    const int64_t line = kLineBytes / (channels_each * bytes);
    const int64_t wanted = std::max<int64_t>(line, kSplitThreads / floor_power_of_two(pixel_lanes));
    tile.across = static_cast<int>(std::min<int64_t>({wanted, 2 * floor_power_of_two(channel_lanes), kSplitThreads}));
    tile.along = kSplitThreads / tile.across;
  } else {
    tile.along = static_cast<int>(std::min<int64_t>(kSplitThreads, floor_power_of_two(pixel_lanes)));
    tile.across = kSplitThreads / tile.along;
  }
  tile.channels = tile.across * channels_each;
  tile.channel_tiles = ceil_div(x.C, tile.channels);
  const int64_t pass = static_cast<int64_t>(tile.along) * pixels_each;
  const int64_t passes = ceil_div(x.S, pass);
  const int64_t each = std::clamp<int64_t>(x.N * tile.channel_tiles * passes / kBlocksPerWave, 1, kMaxPasses);
  tile.pixels = each * pass;
  tile.pixel_tiles = ceil_div(x.S, tile.pixels);
  return tile;
}

// Whole groups with all their pixels, on at most `threads` of at most `elements` each; none when they do not fit.
inline std::optional<Tile> whole_tile(const Problem& p, int v, int64_t bytes, int64_t threads, int64_t elements) {
  const Layout& x = p.x;
  const int channels_each = x.channels_last ? v : 1, pixels_each = x.channels_last ? 1 : v;
  int64_t groups = 1;
  if (x.channels_last) {
    // Rows of whole 32-byte sectors. They may be shorter where that is too much, but not for vectors.
    groups = std::min(std::lcm(kSectorBytes / bytes, p.per_group) / p.per_group, p.groups);
    while (groups > 1 && groups * p.per_group * x.S > elements * threads &&
           groups / 2 * p.per_group % v == 0) {
      groups /= 2;
    }
  }
  const int64_t channels = groups * p.per_group, lanes = channels / channels_each;
  if (channels % channels_each != 0 || channels > kMaxWholeChannels || lanes > threads) return std::nullopt;
  const int64_t vectors = ceil_div(x.S, pixels_each);
  const int64_t along = std::min(threads / lanes, vectors);
  if (ceil_div(vectors, along) * v > elements) return std::nullopt;
  Tile tile;
  tile.across = static_cast<int>(lanes);
  tile.along = static_cast<int>(along);
  tile.channels = static_cast<int>(channels);
  tile.pixels = x.S;
  tile.channel_tiles = ceil_div(p.groups, groups);
  tile.pixel_tiles = 1;
  return tile;
}

// A combine kernel's threads form rows of so many channels of a group.
inline int combine_columns(int64_t per_group) {
  return std::min(kWarp, 2 * floor_power_of_two(std::max<int64_t>(1, per_group - 1)));
}

// ---- device: a thread's place in its tile ---------------------------------------------------------------------------

template <int V, bool kChannelsLast>
struct Lane {
  static constexpr int kChannels = kChannelsLast ? V : 1;  // that a thread owns
  static constexpr int kPixels = kChannelsLast ? 1 : V;    // of one of its vectors

  int tx, ty;           // along the channels, along the pixels
  int across, along;    // threads in either direction
  bool active;          // threads that only fill up the last warp take part in nothing but barriers
  int64_t n;            // image
  int64_t first_channel, last_channel;  // of the thread: [first, last), none when the tile hangs over
  int64_t pixel, last_pixel;            // first of the thread, end of the tile
  int64_t pixel_tile;

  // `block` counts channel tiles first, then pixel tiles, then images.
  __device__ Lane(const Tile& tile, const Layout& x, unsigned block) : across(tile.across), along(tile.along) {
    const int t = static_cast<int>(threadIdx.x);
    active = t < across * along;
    tx = kChannelsLast ? t % across : t / along;
    ty = kChannelsLast ? t / across : t % along;
    const unsigned channel_tiles = static_cast<unsigned>(tile.channel_tiles);
    const unsigned pixel_tiles = static_cast<unsigned>(tile.pixel_tiles);
    const unsigned channel_tile = block % channel_tiles;
    pixel_tile = block / channel_tiles % pixel_tiles;
    n = block / channel_tiles / pixel_tiles;
    const int64_t tile_end = min((channel_tile + int64_t{1}) * tile.channels, x.C);
    first_channel = channel_tile * int64_t{tile.channels} + tx * kChannels;
    last_channel = active ? min(first_channel + kChannels, tile_end) : first_channel;
    const int64_t start = pixel_tile * tile.pixels;
    last_pixel = first_channel < last_channel ? min(start + tile.pixels, x.S) : start;
    pixel = start + ty * int64_t{kPixels};
  }

  __device__ int64_t step() const { return int64_t{along} * kPixels; }
  __device__ int64_t offset(const Strides3& stride, int64_t s) const {
    return n * stride.n + first_channel * stride.c + s * stride.s;
  }
  // Pixels of each of its channels that fall to this thread.
  __device__ int64_t pixels() const {
    return pixel < last_pixel ? ((last_pixel - pixel - 1) / step() + 1) * kPixels : 0;
  }
  // Which of the thread's channels element e of a vector belongs to.
  static __device__ constexpr int channel_of(int e) { return kChannelsLast ? e : 0; }
};

// Each value[k][a] of a channel summed over the threads that share it; afterwards all of them hold the sum.
// scratch: A floats per thread of the tile.
template <int K, int A>
__device__ void sum_over_pixels(float (&value)[K][A], float* scratch, int tx, int ty, int across, int along,
                                bool active) {
  const int plane = across * along;
  float* own = scratch + ty * across + tx;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (active) {
#pragma unroll
      for (int a = 0; a < A; ++a) own[a * plane] = value[k][a];
    }
    __syncthreads();
    for (int left = along; left > 1; left = (left + 1) / 2) {
      const int half = (left + 1) / 2;
      if (active && ty < left - half) {
#pragma unroll
        for (int a = 0; a < A; ++a) own[a * plane] += own[a * plane + half * across];
      }
      __syncthreads();
    }
    if (active) {
#pragma unroll
      for (int a = 0; a < A; ++a) value[k][a] = scratch[a * plane + tx];
    }
    __syncthreads();
  }
}

// Sums per channel, which all threads of a channel hold, added up over each group of a whole tile; afterwards each
// thread holds the totals of the groups of its channels. scratch: a float per channel and one per group.
template <int K, int A>
__device__ void sum_over_groups(float (&value)[K][A], float* scratch, int tx, int ty, bool active, int channels,
                                int per_group) {
  float* totals = scratch + channels;
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (active && ty == 0) {
#pragma unroll
      for (int a = 0; a < A; ++a) scratch[tx * A + a] = value[k][a];
    }
    __syncthreads();
    for (int group = warp; group < channels / per_group; group += warps) {
      float total = 0.0f;
      for (int c = lane; c < per_group; c += kWarp) total += scratch[group * per_group + c];
      total = sum_over_warp(total);
      if (lane == 0) totals[group] = total;
    }
    __syncthreads();
    if (active) {
#pragma unroll
      for (int a = 0; a < A; ++a) value[k][a] = totals[(tx * A + a) / per_group];
    }
    __syncthreads();
  }
}

// Shared memory of the two, in bytes.
template <int V, bool kChannelsLast>
int64_t pixel_sum_bytes(const Tile& tile) {
  return int64_t{Lane<V, kChannelsLast>::kChannels} * tile.across * tile.along * sizeof(float);
}
inline int64_t group_sum_bytes(const Tile& tile, int64_t per_group) {
  return (tile.channels + tile.channels / per_group) * sizeof(float);
}

}  // namespace fastdistill::cuda
