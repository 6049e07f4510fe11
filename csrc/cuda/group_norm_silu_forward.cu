// group_norm_silu forward on CUDA.
//
// Whole: a block holds whole groups in registers, one launch, x is read once. Split: one launch for moments per channel
// and run of pixels, one that combines them per group (Chan, Golub and LeVeque 1979), one that applies them. Nothing is
// atomic, so a result is the same bit by bit every time; and never E[x^2] - E[x]^2.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "group_norm_silu.cuh"

namespace fastdistill::cuda {
namespace {

constexpr int kBatch = 4;  // loads in flight per thread

// A whole tile: its threads at most, and the elements that each keeps. 32 single elements would not fit into the registers.
constexpr int kWholeThreads = 512;
template <int V>
constexpr int kWholeElements = V == 1 ? 16 : 32;

struct Forward {
  Layout x;
  int64_t groups, per_group;
  Parameter weight, bias, add;
  bool silu;
  Tile tile;
  const void* from;
  void* to;
  Strides3 to_stride;
  float group_size, eps;
  float *mean, *rstd;        // (N, G)
  float *partial;            // (3, N, pixel tiles, C): a reference, the mean's distance from it, squared deviations
  float *coefficients;       // (3, N, C): z = (x - centre) * scale + shift
};

__device__ float activate(float z, bool silu) { return silu ? z * sigmoid(z) : z; }

// max(v, 0), except that NaN stays NaN.
__device__ float not_negative(float v) { return v < 0.0f ? 0.0f : v; }

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kWholeThreads, 1) whole_kernel(const Forward f) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels, kVectors = kWholeElements<V> / V;
  extern __shared__ float scratch[];
  float* group_scratch = scratch + A * f.tile.across * f.tile.along;
  const L lane(f.tile, f.x, blockIdx.x);
  const bool owns = lane.first_channel < lane.last_channel;

  Vector<T, V> data[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t s = lane.pixel + i * lane.step();
    if (s < lane.last_pixel) data[i] = load_vector<V>(static_cast<const T*>(f.from) + lane.offset(f.x.stride, s));
  }
  float add[A], mean[1][A] = {};
#pragma unroll
  for (int a = 0; a < A; ++a) add[a] = owns ? f.add.at(lane.n, lane.first_channel + a, 0.0f) : 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (lane.pixel + i * lane.step() >= lane.last_pixel) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) mean[0][L::channel_of(e)] += to_float(data[i].value[e]) + add[L::channel_of(e)];
  }
  const auto over_group = [&](auto& value) {
    sum_over_pixels(value, scratch, lane.tx, lane.ty, lane.across, lane.along, lane.active);
    sum_over_groups(value, group_scratch, lane.tx, lane.ty, lane.active, f.tile.channels,
                    static_cast<int>(f.per_group));
  };
  over_group(mean);
#pragma unroll
  for (int a = 0; a < A; ++a) mean[0][a] /= f.group_size;

  // The mean is kept as (mean, drift): subtracting the rounded mean is exact near it, and its own rounding error comes
  // back as the mean of the differences, so |mean| >> std costs no digits.
  float moments[2][A] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (lane.pixel + i * lane.step() >= lane.last_pixel) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int a = L::channel_of(e);
      const float centred = (to_float(data[i].value[e]) + add[a]) - mean[0][a];
      moments[0][a] += centred;
      moments[1][a] += centred * centred;
    }
  }
  over_group(moments);
  float scale[A], shift[A];
#pragma unroll
  for (int a = 0; a < A; ++a) {
    const float drift = moments[0][a] / f.group_size;
    const float rstd = 1.0f / sqrtf(not_negative(moments[1][a] / f.group_size - drift * drift) + f.eps);
    const int64_t c = lane.first_channel + a;
    scale[a] = owns ? rstd * f.weight.at(lane.n, c, 1.0f) : 0.0f;
    shift[a] = owns ? f.bias.at(lane.n, c, 0.0f) - drift * scale[a] : 0.0f;
    if (owns && lane.ty == 0 && c % f.per_group == 0) {
      const int64_t group = lane.n * f.groups + c / f.per_group;
      f.mean[group] = mean[0][a] + drift;
      f.rstd[group] = rstd;
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t s = lane.pixel + i * lane.step();
    if (s >= lane.last_pixel) continue;
    Vector<T, V> y;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int a = L::channel_of(e);
      const float centred = (to_float(data[i].value[e]) + add[a]) - mean[0][a];
      y.value[e] = from_float<T>(activate(centred * scale[a] + shift[a], f.silu));
    }
    store_vector(static_cast<T*>(f.to) + lane.offset(f.to_stride, s), y);
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads) moments_kernel(const Forward f) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  extern __shared__ float scratch[];
  const L lane(f.tile, f.x, blockIdx.x);
  const T* from = static_cast<const T*>(f.from);

  // Each thread sums differences to a pixel of its own: small whatever |mean| / std is, and as that pixel is one of
  // those summed, it can lie far from the others only if their variance is large too.
  float reference[A] = {}, first[A] = {}, second[A] = {};
  if (lane.pixel < lane.last_pixel) {
    const Vector<T, V> v = load_vector<V>(from + lane.offset(f.x.stride, lane.pixel));
#pragma unroll
    for (int a = 0; a < A; ++a) reference[a] = to_float(v.value[a]);
  }
#pragma unroll 4
  for (int64_t s = lane.pixel; s < lane.last_pixel; s += lane.step()) {
    const Vector<T, V> v = load_vector<V>(from + lane.offset(f.x.stride, s));
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float centred = to_float(v.value[e]) - reference[L::channel_of(e)];
      first[L::channel_of(e)] += centred;
      second[L::channel_of(e)] += centred * centred;
    }
  }

  // Combined relative to the reference of the tile's first thread of the channel, which always has a pixel.
  const int plane = lane.across * lane.along;
  if (lane.active && lane.ty == 0) {
#pragma unroll
    for (int a = 0; a < A; ++a) scratch[a * plane + lane.tx] = reference[a];
  }
  __syncthreads();
  float common[A] = {};
  if (lane.active) {
#pragma unroll
    for (int a = 0; a < A; ++a) common[a] = scratch[a * plane + lane.tx];
  }
  __syncthreads();
  const float count = static_cast<float>(lane.pixels());
  const float total = static_cast<float>(lane.last_pixel - lane.pixel_tile * f.tile.pixels);
  float apart[A] = {}, drift[1][A] = {}, m2[1][A] = {};
#pragma unroll
  for (int a = 0; a < A; ++a) {
    if (count > 0.0f) {
      apart[a] = (reference[a] - common[a]) + first[a] / count;
      drift[0][a] = apart[a] * (count / total);
    }
  }
  sum_over_pixels(drift, scratch, lane.tx, lane.ty, lane.across, lane.along, lane.active);
#pragma unroll
  for (int a = 0; a < A; ++a) {
    if (count > 0.0f) {
      const float between = apart[a] - drift[0][a];
      m2[0][a] = not_negative(second[a] - first[a] * (first[a] / count)) + count * between * between;
    }
  }
  sum_over_pixels(m2, scratch, lane.tx, lane.ty, lane.across, lane.along, lane.active);
  if (lane.ty != 0) return;
  const int64_t plane_of_partials = f.x.N * f.tile.pixel_tiles * f.x.C;
  float* row = f.partial + (lane.n * f.tile.pixel_tiles + lane.pixel_tile) * f.x.C;
#pragma unroll
  for (int a = 0; a < A; ++a) {
    const int64_t c = lane.first_channel + a;
    if (c >= lane.last_channel) continue;
    row[c] = common[a];
    row[plane_of_partials + c] = drift[0][a];
    row[2 * plane_of_partials + c] = m2[0][a];
  }
}

// A block per (image, group). Its threads form rows of `columns` channels, as many rows as there are threads for.
__global__ void __launch_bounds__(kCombineThreads) combine_moments_kernel(const Forward f, const int columns) {
  __shared__ float scratch[kCombineThreads / kWarp];
  const int64_t n = blockIdx.x / f.groups, group = blockIdx.x % f.groups, first_channel = group * f.per_group;
  const int64_t splits = f.tile.pixel_tiles, plane = f.x.N * splits * f.x.C;
  const float* partial = f.partial + n * splits * f.x.C + first_channel;
  const float reference = partial[0];
  const int column = static_cast<int>(threadIdx.x) % columns, row = static_cast<int>(threadIdx.x) / columns;
  const int rows = kCombineThreads / columns;

  // body(partial result, its number of pixels, its mean's distance from `reference`)
  const auto for_partials = [&](const auto& body) {
    for (int64_t c = column; c < f.per_group; c += columns) {
      const float add = f.add.at(n, first_channel + c, 0.0f);
      for (int64_t split = row; split < splits; split += rows) {
        const float* p = partial + split * f.x.C + c;
        const float count = static_cast<float>(min(f.x.S - split * f.tile.pixels, f.tile.pixels));
        body(p, count, (p[0] - reference) + (p[plane] + add));
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
    const float centre = two_sum(reference, drift - f.add.at(n, c, 0.0f), &error);
    const float scale = rstd * f.weight.at(n, c, 1.0f);
    float* coefficient = f.coefficients + n * f.x.C + c;
    coefficient[0] = centre;
    coefficient[f.x.N * f.x.C] = scale;
    coefficient[2 * f.x.N * f.x.C] = f.bias.at(n, c, 0.0f) - error * scale;
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads) apply_kernel(const Forward f) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  // From the last tile to the first: the moments have left the end of x in the L2 cache.
  const L lane(f.tile, f.x, gridDim.x - 1 - blockIdx.x);
  if (lane.first_channel >= lane.last_channel) return;
  float centre[A], scale[A], shift[A];
#pragma unroll
  for (int a = 0; a < A; ++a) {
    const float* coefficient = f.coefficients + lane.n * f.x.C + lane.first_channel + a;
    centre[a] = coefficient[0];
    scale[a] = coefficient[f.x.N * f.x.C];
    shift[a] = coefficient[2 * f.x.N * f.x.C];
  }
  // Loads first: the compiler may not move one in front of a store that could overlap it.
  for (int64_t first = lane.pixel; first < lane.last_pixel; first += kBatch * lane.step()) {
    Vector<T, V> data[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t s = first + i * lane.step();
      if (s < lane.last_pixel) data[i] = load_vector<V>(static_cast<const T*>(f.from) + lane.offset(f.x.stride, s));
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
      store_vector(static_cast<T*>(f.to) + lane.offset(f.to_stride, s), data[i]);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, std::optional<Tensor> add, double eps,
                                                   bool silu) {
  const OnDeviceOf device(x);
  const Problem p(x, num_groups, weight, bias, add, silu);
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = floats_like(x, {p.x.N, p.groups});
  Tensor rstd = floats_like(x, {p.x.N, p.groups});
  Forward f{};
  f.x = p.x;
  f.groups = p.groups;
  f.per_group = p.per_group;
  f.weight = p.weight;
  f.bias = p.bias;
  f.add = p.add;
  f.silu = silu;
  f.from = x.const_data_ptr();
  f.to = y.mutable_data_ptr();
  f.to_stride = layout_of(y).stride;
  f.group_size = p.group_size();
  f.eps = static_cast<float>(eps);
  f.mean = data_of(mean);
  f.rstd = data_of(rstd);
  const bool vectors = has_vectors(f.from, f.x.stride, f.x, bytes) && has_vectors(f.to, f.to_stride, f.x, bytes);
  const int v = vectors ? static_cast<int>(kVectorBytes / bytes) : 1;

  if (const std::optional<Tile> whole = whole_tile(p, v, bytes, kWholeThreads, v == 1 ? kWholeElements<1> : kWholeElements<8>)) {
    f.tile = *whole;
    dispatch(x.scalar_type(), vectors, p.x.channels_last, [&](auto type, auto width, auto last) {
      using T = typename decltype(type)::type;
      constexpr int V = decltype(width)::value;
      constexpr bool kLast = decltype(last)::value;
      const int64_t shared = pixel_sum_bytes<V, kLast>(f.tile) + group_sum_bytes(f.tile, p.per_group);
      launch("group_norm_silu, whole groups", whole_kernel<T, V, kLast>, f.tile.blocks(p.x.N), f.tile.threads(), shared,
             device.stream(), f);
    });
    return {y, mean, rstd};
  }

  f.tile = split_tile(p.x, v, bytes);
  Tensor partial = floats_like(x, {3, p.x.N, f.tile.pixel_tiles, p.x.C});
  Tensor coefficients = floats_like(x, {3, p.x.N, p.x.C});
  f.partial = data_of(partial);
  f.coefficients = data_of(coefficients);
  dispatch(x.scalar_type(), vectors, p.x.channels_last, [&](auto type, auto width, auto last) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(width)::value;
    constexpr bool kLast = decltype(last)::value;
    launch("group_norm_silu, moments", moments_kernel<T, V, kLast>, f.tile.blocks(p.x.N), kSplitThreads,
           pixel_sum_bytes<V, kLast>(f.tile), device.stream(), f);
    launch("group_norm_silu, combination", combine_moments_kernel, p.x.N * p.groups, kCombineThreads, 0,
           device.stream(), f, combine_columns(p.per_group));
    launch("group_norm_silu, application", apply_kernel<T, V, kLast>, f.tile.blocks(p.x.N), kSplitThreads, 0,
           device.stream(), f);
  });
  return {y, mean, rstd};
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("group_norm_silu.cuda", TORCH_BOX(&fastdistill::cuda::group_norm_silu));
}
