// group_norm_silu forward on CUDA.
//
// On chip: a block keeps its tile, one launch, x is read once. Two-pass: one launch for moments per channel and run of
// pixels, one that combines them per group, one that applies them. Partial moments are combined after Chan, Golub and
// LeVeque (1979), never as E[x^2] - E[x]^2. Nothing is atomic, so a result is the same bit by bit every time.
//
// The mean is kept as (mean, drift): subtracting the rounded mean is exact near it, and its own rounding error comes
// back as the mean of the differences, so |mean| >> std costs no digits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "group_norm_silu.cuh"

namespace fastdistill::cuda::group_norm_silu {
namespace {

constexpr int kBatch = 4;    // loads in flight per thread of a sweep
constexpr int kMoments = 3;  // of a tile: a reference, the mean's distance from it, squared deviations
enum { kReference, kDrift, kSquares };

struct Forward : Call {
  const void* from;
  void* to;
  Strides3 to_stride;
  float eps;
  float *mean, *rstd;   // (N, G)
  float* coefficients;  // (3, N, C): z = (x - centre) * scale + shift
};

__device__ float activate(float z, bool silu) { return silu ? z * sigmoid(z) : z; }

// max(v, 0), except that NaN stays NaN.
__device__ float not_negative(float v) { return v < 0.0f ? 0.0f : v; }

// x - centre is (x + add) - (reference + drift), but for what rounding the centre has lost: the error.
__device__ float centre_of(float reference, float drift, float add, float* error) {
  float of_mean, of_centre;
  const float mean = two_sum(reference, drift, &of_mean), centre = two_sum(mean, -add, &of_centre);
  *error = of_mean + of_centre;
  return centre;
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kOnChipThreads, 1) on_chip_kernel(const Forward f) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  FASTDISTILL_DYNAMIC_SHARED(shared);
  const Place place = on_chip_place(f.tile, blockIdx.x);
  const L lane(f.tile, place, f.x.C, f.x.S, static_cast<int>(threadIdx.x));
  const int channels = f.tile.channels, per_group = static_cast<int>(f.per_group), groups = channels / per_group;
  float* const rows = reinterpret_cast<float*>(shared);
  float* const weight = rows + row_floats(f.tile, A);
  float* const bias = weight + channels;
  float* const add = bias + channels;
  float* const sums = add + channels;           // 2 per channel
  float* const own = sums + 2 * channels;       // kMoments per group, of this block
  float* const all = own + kMoments * groups;   // of all blocks that share the group: reference, drift, rstd

  Share<T, V, held_vectors(V, forward_keeps().tensors)> x;
  unsigned char* const tile = shared + tile_offset(f.tile, A, f.per_group, forward_keeps());
  x.spare = reinterpret_cast<Vector<T, V>*>(tile) + threadIdx.x;
  x.load(origin(static_cast<const T*>(f.from), f.x.stride, lane, place.image), f.x.stride.s, lane);
  const int64_t first_channel = place.channel_tile * channels;
  for (int c = static_cast<int>(threadIdx.x); c < channels && first_channel + c < f.x.C;
       c += static_cast<int>(blockDim.x)) {
    weight[c] = f.weight.at(place.image, first_channel + c, 1.0f);
    bias[c] = f.bias.at(place.image, first_channel + c, 0.0f);
    add[c] = f.add.at(place.image, first_channel + c, 0.0f);
  }
  const int first = static_cast<int>(lane.first_channel - first_channel);
  const GroupOf<A> of(first, per_group);
  wait_for_copies();

  float sum[1][A] = {};
  for_each_vector(
      lane,
      [&](int64_t, const Vector<T, V>& v) {
#pragma unroll
        for (int e = 0; e < V; ++e) sum[0][L::channel_of(e)] += to_float(v.value[e]);
      },
      x);
  sum_over_pixels<kChannelsLast>(sum, rows, sums, f.tile, lane);
  const int64_t groups_left = f.groups - place.channel_tile * groups;
  const int present = groups_left < groups ? static_cast<int>(groups_left) : groups;
  const float pixels = static_cast<float>(lane.tile_pixels), count = pixels * per_group;
  for_each_group(present, [&](int group, int t) {
    float total = 0.0f;
    for (int c = group * per_group + t; c < (group + 1) * per_group; c += kWarp) total += sums[c] + pixels * add[c];
    total = sum_over_warp(total);
    if (t == 0) own[kReference * groups + group] = total / count;
  });
  __syncthreads();

  x.forget_conversions();
  float centre[A] = {}, moments[2][A] = {};
  if (lane.owns()) {
#pragma unroll
    for (int a = 0; a < A; ++a) centre[a] = own[kReference * groups + of.group[a]] - add[first + a];
  }
  for_each_vector(
      lane,
      [&](int64_t, const Vector<T, V>& v) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const int a = L::channel_of(e);
          const float centred = to_float(v.value[e]) - centre[a];
          moments[0][a] += centred;
          moments[1][a] += centred * centred;
        }
      },
      x);
  sum_over_pixels<kChannelsLast>(moments, rows, sums, f.tile, lane);
  for_each_group(present, [&](int group, int t) {
    float total = 0.0f, squares = 0.0f;
    for (int c = group * per_group + t; c < (group + 1) * per_group; c += kWarp) {
      // Differences to the mean itself, of which the channel's centre is rounded.
      float error;
      two_sum(own[kReference * groups + group], -add[c], &error);
      const float sum_c = sums[c], squares_c = sums[channels + c];
      total += sum_c - pixels * error;
      squares += squares_c - error * (2.0f * sum_c - pixels * error);
    }
    total = sum_over_warp(total);
    squares = sum_over_warp(squares);
    if (t == 0) {
      own[kDrift * groups + group] = total / count;
      own[kSquares * groups + group] = not_negative(squares - total * (total / count));
    }
  });

  Peers peers(f, place, kMoments * groups);
  peers.publish(own);
  for_each_group(present, [&](int group, int t) {
    const float reference = peers.values_of(own, 0)[kReference * groups + group];
    // body(moments of a block, its elements of the group, its mean's distance from `reference`)
    const auto for_peers = [&](const auto& body) {
      for (int peer = t; peer < peers.count; peer += kWarp) {
        const float* m = peers.values_of(own, peer) + group;
        const int64_t start = f.tile.first_vector(peer) * L::kPixels;
        const int64_t stop = f.tile.first_vector(peer + 1) * L::kPixels;
        const float elements = static_cast<float>(((stop < f.x.S ? stop : f.x.S) - start) * per_group);
        body(m, elements, (m[kReference * groups] - reference) + m[kDrift * groups]);
      }
    };
    float drift = 0.0f, squares = 0.0f;
    for_peers([&](const float*, float elements, float apart) { drift += apart * (elements / f.group_size); });
    drift = sum_over_warp(drift);
    for_peers([&](const float* m, float elements, float apart) {
      squares += m[kSquares * groups] + elements * (apart - drift) * (apart - drift);
    });
    const float rstd = 1.0f / sqrtf(sum_over_warp(squares) / f.group_size + f.eps);
    if (t != 0) return;
    all[group] = reference;
    all[groups + group] = drift;
    all[2 * groups + group] = rstd;
    if (peers.own == 0) {
      const int64_t i = place.image * f.groups + place.channel_tile * groups + group;
      f.mean[i] = reference + drift;
      f.rstd[i] = rstd;
    }
  });
  peers.have_read();
  __syncthreads();

  x.forget_conversions();
  float scale[A] = {}, shift[A] = {};
  if (lane.owns()) {
#pragma unroll
    for (int a = 0; a < A; ++a) {
      const int group = of.group[a];
      float error;
      centre[a] = centre_of(all[group], all[groups + group], add[first + a], &error);
      scale[a] = all[2 * groups + group] * weight[first + a];
      shift[a] = bias[first + a] - error * scale[a];
    }
  }
  T* const to = origin(static_cast<T*>(f.to), f.to_stride, lane, place.image);
  for_each_vector(
      lane,
      [&](int64_t s, const Vector<T, V>& v) {
        Vector<T, V> y;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const int a = L::channel_of(e);
          y.value[e] = from_float<T>(activate((to_float(v.value[e]) - centre[a]) * scale[a] + shift[a], f.silu));
        }
        store_vector(to + s * f.to_stride.s, y);
      },
      x);
  peers.before_the_end();
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSweepThreads) moments_kernel(const Forward f) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  FASTDISTILL_DYNAMIC_SHARED(shared);
  const Place place = sweep_place(f.tile, blockIdx.x);
  const L lane(f.tile, place, f.x.C, f.x.S, static_cast<int>(threadIdx.x));
  const int channels = f.tile.channels, first_channel = lane.tx * A;
  float* const rows = reinterpret_cast<float*>(shared);
  float* const common = rows + row_floats(f.tile, A);
  float* const drift = common + channels;
  const T* const from = origin(static_cast<const T*>(f.from), f.x.stride, lane, place.image);

  // Each thread sums differences to a pixel of its own: small whatever |mean| / std is, and as that pixel is one of
  // those summed, it can lie far from the others only if their variance is large too.
  float reference[A] = {}, first[A] = {}, second[A] = {};
  if (lane.pixel < lane.last_pixel) {
    const Vector<T, V> v = load_vector<V>(from + lane.pixel * f.x.stride.s);
#pragma unroll
    for (int a = 0; a < A; ++a) reference[a] = to_float(v.value[a]);
  }
#pragma unroll 4
  for (int64_t s = lane.pixel; s < lane.last_pixel; s += lane.step()) {
    const Vector<T, V> v = load_past_l1<V>(from + s * f.x.stride.s);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float centred = to_float(v.value[e]) - reference[L::channel_of(e)];
      first[L::channel_of(e)] += centred;
      second[L::channel_of(e)] += centred * centred;
    }
  }

  // Combined relative to the reference of the tile's first thread of the channel, which always has a pixel.
  if (lane.active && lane.ty == 0) {
#pragma unroll
    for (int a = 0; a < A; ++a) common[first_channel + a] = reference[a];
  }
  __syncthreads();
  const float count = static_cast<float>(lane.pixels()), total = static_cast<float>(lane.tile_pixels);
  float apart[A] = {}, weighted[1][A] = {}, squares[1][A] = {};
#pragma unroll
  for (int a = 0; a < A; ++a) {
    if (count > 0.0f) {
      apart[a] = (reference[a] - common[first_channel + a]) + first[a] / count;
      weighted[0][a] = apart[a] * (count / total);
    }
  }
  sum_over_pixels<kChannelsLast>(weighted, rows, drift, f.tile, lane);
#pragma unroll
  for (int a = 0; a < A; ++a) {
    if (count > 0.0f) {
      const float between = apart[a] - drift[first_channel + a];
      squares[0][a] = not_negative(second[a] - first[a] * (first[a] / count)) + count * between * between;
    }
  }
  float* const deviations = drift + channels;
  sum_over_pixels<kChannelsLast>(squares, rows, deviations, f.tile, lane);
  const int64_t plane = f.x.N * f.tile.pixel_tiles * f.x.C, start = place.channel_tile * channels;
  float* const partial = f.partial + (place.image * f.tile.pixel_tiles + place.pixel_tile) * f.x.C + start;
  for (int c = static_cast<int>(threadIdx.x); c < channels && start + c < f.x.C; c += static_cast<int>(blockDim.x)) {
    partial[kReference * plane + c] = common[c];
    partial[kDrift * plane + c] = drift[c];
    partial[kSquares * plane + c] = deviations[c];
  }
}

// A block per (image, group). Its threads form rows of `columns` channels, as many rows as there are threads for.
__global__ void __launch_bounds__(kCombineThreads) combine_moments_kernel(const Forward f, const int columns) {
  __shared__ float scratch[kCombineThreads / kWarp];
  const int64_t n = blockIdx.x / f.groups, group = blockIdx.x % f.groups, first_channel = group * f.per_group;
  const int64_t splits = f.tile.pixel_tiles, plane = f.x.N * splits * f.x.C;
  const float* partial = f.partial + n * splits * f.x.C + first_channel;
  const float reference = partial[0] + f.add.at(n, first_channel, 0.0f);
  const int column = static_cast<int>(threadIdx.x) % columns, row = static_cast<int>(threadIdx.x) / columns;
  const int rows = kCombineThreads / columns;

  // body(partial result, its number of pixels, its mean's distance from `reference`)
  const auto for_partials = [&](const auto& body) {
    for (int64_t c = column; c < f.per_group; c += columns) {
      const float add = f.add.at(n, first_channel + c, 0.0f);
      for (int64_t split = row; split < splits; split += rows) {
        const float* p = partial + split * f.x.C + c;
        const int64_t start = f.tile.first_vector(split) * f.pixels_each;
        const float count = static_cast<float>(min(f.tile.first_vector(split + 1) * f.pixels_each, f.x.S) - start);
        float error;
        const float near = two_sum(p[0], add, &error);
        body(p, count, (near - reference) + (p[plane] + error));
      }
    }
  };
  float sum = 0.0f;
  for_partials([&](const float*, float count, float apart) { sum += apart * (count / f.group_size); });
  const float drift = sum_over_block(sum, scratch);
  float squares = 0.0f;
  for_partials([&](const float* p, float count, float apart) {
    squares += p[2 * plane] + count * (apart - drift) * (apart - drift);
  });
  const float rstd = 1.0f / sqrtf(sum_over_block(squares, scratch) / f.group_size + f.eps);
  if (threadIdx.x == 0) {
    f.mean[blockIdx.x] = reference + drift;
    f.rstd[blockIdx.x] = rstd;
  }
  for (int64_t c = first_channel + threadIdx.x; c < first_channel + f.per_group; c += kCombineThreads) {
    float error;
    const float centre = centre_of(reference, drift, f.add.at(n, c, 0.0f), &error);
    const float scale = rstd * f.weight.at(n, c, 1.0f);
    float* coefficient = f.coefficients + n * f.x.C + c;
    coefficient[0] = centre;
    coefficient[f.x.N * f.x.C] = scale;
    coefficient[2 * f.x.N * f.x.C] = f.bias.at(n, c, 0.0f) - error * scale;
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSweepThreads) apply_kernel(const Forward f) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  // From the last tile to the first: the moments have left the end of x in the L2 cache.
  const Place place = sweep_place(f.tile, gridDim.x - 1 - blockIdx.x);
  const L lane(f.tile, place, f.x.C, f.x.S, static_cast<int>(threadIdx.x));
  if (!lane.owns()) return;
  float centre[A], scale[A], shift[A];
#pragma unroll
  for (int a = 0; a < A; ++a) {
    const float* coefficient = f.coefficients + place.image * f.x.C + lane.first_channel + a;
    centre[a] = coefficient[0];
    scale[a] = coefficient[f.x.N * f.x.C];
    shift[a] = coefficient[2 * f.x.N * f.x.C];
  }
  const T* const from = origin(static_cast<const T*>(f.from), f.x.stride, lane, place.image);
  T* const to = origin(static_cast<T*>(f.to), f.to_stride, lane, place.image);
  // Loads first: the compiler may not move one in front of a store that could overlap it.
  for (int64_t first = lane.pixel; first < lane.last_pixel; first += kBatch * lane.step()) {
    Vector<T, V> data[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t s = first + i * lane.step();
      if (s < lane.last_pixel) data[i] = load_last<V>(from + s * f.x.stride.s);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t s = first + i * lane.step();
      if (s >= lane.last_pixel) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int a = L::channel_of(e);
        const float z = (to_float(data[i].value[e]) - centre[a]) * scale[a] + shift[a];
        data[i].value[e] = from_float<T>(activate(z, f.silu));
      }
      store_vector(to + s * f.to_stride.s, data[i], f.streaming);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, std::optional<Tensor> add, double eps,
                                           bool silu) {
  const OnDeviceOf device(x);
  Tensor y = torch::stable::empty_like(x);
  Forward f{};
  static_cast<Call&>(f) = call(x, num_groups, weight, bias, add, silu);
  Tensor mean = floats_like(x, {f.x.N, f.groups});
  Tensor rstd = floats_like(x, {f.x.N, f.groups});
  f.from = x.const_data_ptr();
  f.to = y.mutable_data_ptr();
  f.to_stride = layout_of(y).stride;
  f.eps = static_cast<float>(eps);
  f.mean = data_of(mean);
  f.rstd = data_of(rstd);
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  const bool vectors = has_vectors(f.from, f.x.stride, f.x, bytes) && has_vectors(f.to, f.to_stride, f.x, bytes);
  const Size size = size_of(f, bytes, vectors);
  f.pixels_each = size.pixels_each();
  const DeviceLimits& limits = current_device_limits();
  const Plan plan = group_norm_silu::plan(size, forward_keeps(), limits);

  dispatch(x.scalar_type(), vectors, f.x.channels_last, [&](auto type, auto width, auto last) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(width)::value;
    constexpr bool kLast = decltype(last)::value;
    if (stays_on_chip(plan, "group_norm_silu, on chip", on_chip_kernel<T, V, kLast>)) {
      follow(plan, &f);
      std::optional<Tensor> partial;
      if (f.cooperative) {
        partial = floats_like(x, {plan.blocks * kMoments * groups_of_tile(f)});
        f.partial = data_of(*partial);
      }
      launch("group_norm_silu, on chip", on_chip_kernel<T, V, kLast>, grid_of(plan), device.stream(), f);
      return;
    }
    const Plan sweep = two_pass_plan(size, limits);
    follow(sweep, &f);
    Tensor partial = floats_like(x, {kMoments, f.x.N, f.tile.pixel_tiles, f.x.C});
    Tensor coefficients = floats_like(x, {3, f.x.N, f.x.C});
    f.partial = data_of(partial);
    f.coefficients = data_of(coefficients);
    launch("group_norm_silu, moments", moments_kernel<T, V, kLast>, grid_of(sweep), device.stream(), f);
    launch("group_norm_silu, combination", combine_moments_kernel, f.x.N * f.groups, kCombineThreads, 0,
           device.stream(), f, combine_columns(f.per_group));
    launch("group_norm_silu, application", apply_kernel<T, V, kLast>, sweep.blocks, sweep.threads, 0, device.stream(),
           f);
  });
  return {y, mean, rstd};
}

}  // namespace
}  // namespace fastdistill::cuda::group_norm_silu

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("group_norm_silu.cuda", TORCH_BOX(&fastdistill::cuda::group_norm_silu::forward));
}
