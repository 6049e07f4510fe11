// group_norm_silu backward on CUDA.
//
// With u = x + add, xhat = (u - mean) * rstd, z = xhat * weight + bias, dz = grad_y * silu'(z), D elements in a group:
//   grad_x = rstd * (weight * dz - sum_D(weight * dz) / D - xhat * sum_D(weight * dz * xhat) / D).
// Three sums over the pixels of a channel are enough for everything else: of dz (grad_bias), of dz * xhat (grad_weight)
// and of xhat. Together they give grad_add, the sum of grad_x over the pixels, without a second look at grad_x.
// The regimes are those of the forward; one more launch adds up the gradients of weight and bias over the batch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "group_norm_silu.cuh"

namespace fastdistill::cuda {
namespace {

constexpr int kWholeThreads = 256;  // half of the forward's: a thread keeps twice as much
constexpr int kWholeElements = 32;  // per thread, of x and of grad_y
constexpr int kBatch = 2;           // loads of each in flight per thread
constexpr int kSums = 3;            // per channel: dz, dz * xhat, xhat
constexpr int kBatchRows = 8;       // of the block that sums over the batch
enum { kDz, kDzXhat, kXhat };

struct Backward {
  Layout x;
  int64_t groups, per_group;
  Parameter weight, bias, add;
  bool silu;
  Tile tile;
  const void *from, *grad_y;
  Strides3 grad_y_stride;
  bool grad_y_vectors;       // vectors of x's kind can be loaded from grad_y at once
  void* grad_x;
  Strides3 grad_x_stride;
  float group_size;
  const float *mean, *rstd;  // (N, G)
  float* grad_add;           // (N, C)
  float* partial;            // (kSums, N, pixel tiles, C)
  float* sums[kSums];        // (N, C) each
  float *mean_dz, *mean_dz_xhat;  // (N, G): the two sums over a group, divided by D, weight included
};

// What a thread keeps of one of its channels: xhat = (x + offset) * rstd, z = xhat * weight + bias.
struct Channel {
  float offset, rstd, weight, bias;
};

__device__ Channel channel(const Backward& b, int64_t n, int64_t c) {
  const int64_t group = n * b.groups + c / b.per_group;
  return {b.add.at(n, c, 0.0f) - b.mean[group], b.rstd[group], b.weight.at(n, c, 1.0f), b.bias.at(n, c, 0.0f)};
}

__device__ float normalise(float x, const Channel& c) { return (x + c.offset) * c.rstd; }

__device__ float grad_z(float grad_y, float xhat, const Channel& c, bool silu) {
  if (!silu) return grad_y;
  const float z = xhat * c.weight + c.bias, s = sigmoid(z);
  return grad_y * (s * (1.0f + z * (1.0f - s)));
}

__device__ float grad_u(float xhat, float dz, const Channel& c, float mean_dz, float mean_dz_xhat) {
  return c.rstd * (c.weight * dz - mean_dz - xhat * mean_dz_xhat);
}

// grad_u summed over the pixels of a channel.
__device__ float grad_add(float pixels, float sum_dz, float sum_xhat, const Channel& c, float mean_dz,
                          float mean_dz_xhat) {
  return c.rstd * (c.weight * sum_dz - pixels * mean_dz - sum_xhat * mean_dz_xhat);
}

template <typename T, int V, bool kChannelsLast>
__device__ Vector<T, V> load_grad_y(const Backward& b, const Lane<V, kChannelsLast>& lane, int64_t s) {
  const T* from = static_cast<const T*>(b.grad_y) + lane.offset(b.grad_y_stride, s);
  if (b.grad_y_vectors) return load_vector<V>(from);
  return load_strided<V>(from, kChannelsLast ? b.grad_y_stride.c : b.grad_y_stride.s);
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kWholeThreads, 1) whole_kernel(const Backward b) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels, kVectors = kWholeElements / V;
  extern __shared__ float scratch[];
  float* group_scratch = scratch + A * b.tile.across * b.tile.along;
  const L lane(b.tile, b.x, blockIdx.x);
  const bool owns = lane.first_channel < lane.last_channel;

  Vector<T, V> x[kVectors], grad_y[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t s = lane.pixel + i * lane.step();
    if (s >= lane.last_pixel) continue;
    x[i] = load_vector<V>(static_cast<const T*>(b.from) + lane.offset(b.x.stride, s));
    grad_y[i] = load_grad_y<T>(b, lane, s);
  }
  Channel channels[A] = {};
#pragma unroll
  for (int a = 0; a < A; ++a) {
    if (owns) channels[a] = channel(b, lane.n, lane.first_channel + a);
  }
  float sums[kSums][A] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (lane.pixel + i * lane.step() >= lane.last_pixel) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int a = L::channel_of(e);
      const float xhat = normalise(to_float(x[i].value[e]), channels[a]);
      const float dz = grad_z(to_float(grad_y[i].value[e]), xhat, channels[a], b.silu);
      sums[kDz][a] += dz;
      sums[kDzXhat][a] += dz * xhat;
      sums[kXhat][a] += xhat;
    }
  }
  sum_over_pixels(sums, scratch, lane.tx, lane.ty, lane.across, lane.along, lane.active);
  float means[2][A];
#pragma unroll
  for (int a = 0; a < A; ++a) {
    means[kDz][a] = channels[a].weight * sums[kDz][a];
    means[kDzXhat][a] = channels[a].weight * sums[kDzXhat][a];
  }
  sum_over_groups(means, group_scratch, lane.tx, lane.ty, lane.active, b.tile.channels, static_cast<int>(b.per_group));
#pragma unroll
  for (int a = 0; a < A; ++a) {
    means[kDz][a] /= b.group_size;
    means[kDzXhat][a] /= b.group_size;
    if (!owns || lane.ty != 0) continue;
    const int64_t i = lane.n * b.x.C + lane.first_channel + a;
    b.sums[kDz][i] = sums[kDz][a];
    b.sums[kDzXhat][i] = sums[kDzXhat][a];
    b.grad_add[i] = grad_add(static_cast<float>(b.x.S), sums[kDz][a], sums[kXhat][a], channels[a], means[kDz][a],
                             means[kDzXhat][a]);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t s = lane.pixel + i * lane.step();
    if (s >= lane.last_pixel) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int a = L::channel_of(e);
      const float xhat = normalise(to_float(x[i].value[e]), channels[a]);
      const float dz = grad_z(to_float(grad_y[i].value[e]), xhat, channels[a], b.silu);
      x[i].value[e] = from_float<T>(grad_u(xhat, dz, channels[a], means[kDz][a], means[kDzXhat][a]));
    }
    store_vector(static_cast<T*>(b.grad_x) + lane.offset(b.grad_x_stride, s), x[i]);
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads) sums_kernel(const Backward b) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  extern __shared__ float scratch[];
  const L lane(b.tile, b.x, blockIdx.x);
  Channel channels[A] = {};
#pragma unroll
  for (int a = 0; a < A; ++a) {
    if (lane.first_channel + a < lane.last_channel) channels[a] = channel(b, lane.n, lane.first_channel + a);
  }
  float sums[kSums][A] = {};
#pragma unroll 2
  for (int64_t s = lane.pixel; s < lane.last_pixel; s += lane.step()) {
    const Vector<T, V> x = load_vector<V>(static_cast<const T*>(b.from) + lane.offset(b.x.stride, s));
    const Vector<T, V> grad_y = load_grad_y<T>(b, lane, s);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int a = L::channel_of(e);
      const float xhat = normalise(to_float(x.value[e]), channels[a]);
      const float dz = grad_z(to_float(grad_y.value[e]), xhat, channels[a], b.silu);
      sums[kDz][a] += dz;
      sums[kDzXhat][a] += dz * xhat;
      sums[kXhat][a] += xhat;
    }
  }
  sum_over_pixels(sums, scratch, lane.tx, lane.ty, lane.across, lane.along, lane.active);
  if (lane.ty != 0) return;
  const int64_t plane = b.x.N * b.tile.pixel_tiles * b.x.C;
  float* row = b.partial + (lane.n * b.tile.pixel_tiles + lane.pixel_tile) * b.x.C;
#pragma unroll
  for (int a = 0; a < A; ++a) {
    const int64_t c = lane.first_channel + a;
    if (c >= lane.last_channel) continue;
#pragma unroll
    for (int k = 0; k < kSums; ++k) row[k * plane + c] = sums[k][a];
  }
}

// A block per (image, group). Its threads form rows of `columns` channels, as many rows as there are threads for.
__global__ void __launch_bounds__(kCombineThreads) combine_sums_kernel(const Backward b, const int columns) {
  __shared__ float scratch[kCombineThreads];
  const int64_t n = blockIdx.x / b.groups, first_channel = blockIdx.x % b.groups * b.per_group;
  const int64_t splits = b.tile.pixel_tiles, plane = b.x.N * splits * b.x.C;
  const int column = static_cast<int>(threadIdx.x) % columns, row = static_cast<int>(threadIdx.x) / columns;
  const int rows = kCombineThreads / columns;
  float dz = 0.0f, dz_xhat = 0.0f;
  for (int64_t first = 0; first < b.per_group; first += columns) {
    const int64_t c = first_channel + first + column;
    const bool in_group = first + column < b.per_group;
    float sums[kSums][1] = {};
    for (int64_t split = row; in_group && split < splits; split += rows) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k][0] += b.partial[k * plane + (n * splits + split) * b.x.C + c];
    }
    sum_over_pixels(sums, scratch, column, row, columns, rows, true);
    if (!in_group || row != 0) continue;
#pragma unroll
    for (int k = 0; k < kSums; ++k) b.sums[k][n * b.x.C + c] = sums[k][0];
    const float weight = b.weight.at(n, c, 1.0f);
    dz += weight * sums[kDz][0];
    dz_xhat += weight * sums[kDzXhat][0];
  }
  dz = sum_over_block(dz, scratch);
  dz_xhat = sum_over_block(dz_xhat, scratch);
  if (threadIdx.x == 0) {
    b.mean_dz[blockIdx.x] = dz / b.group_size;
    b.mean_dz_xhat[blockIdx.x] = dz_xhat / b.group_size;
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads) apply_kernel(const Backward b) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  // From the last tile to the first: the sums have left the end of x and grad_y in the L2 cache.
  const L lane(b.tile, b.x, gridDim.x - 1 - blockIdx.x);
  if (lane.first_channel >= lane.last_channel) return;
  Channel channels[A];
  float mean_dz[A], mean_dz_xhat[A];
#pragma unroll
  for (int a = 0; a < A; ++a) {
    const int64_t c = lane.first_channel + a, i = lane.n * b.x.C + c;
    channels[a] = channel(b, lane.n, c);
    mean_dz[a] = b.mean_dz[lane.n * b.groups + c / b.per_group];
    mean_dz_xhat[a] = b.mean_dz_xhat[lane.n * b.groups + c / b.per_group];
    if (lane.pixel_tile == 0 && lane.ty == 0) {
      b.grad_add[i] = grad_add(static_cast<float>(b.x.S), b.sums[kDz][i], b.sums[kXhat][i], channels[a], mean_dz[a],
                               mean_dz_xhat[a]);
    }
  }
  // Loads first: the compiler may not move one in front of a store that could overlap it.
  for (int64_t first = lane.pixel; first < lane.last_pixel; first += kBatch * lane.step()) {
    Vector<T, V> x[kBatch], grad_y[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t s = first + i * lane.step();
      if (s >= lane.last_pixel) continue;
      x[i] = load_vector<V>(static_cast<const T*>(b.from) + lane.offset(b.x.stride, s));
      grad_y[i] = load_grad_y<T>(b, lane, s);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t s = first + i * lane.step();
      if (s >= lane.last_pixel) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int a = L::channel_of(e);
        const float xhat = normalise(to_float(x[i].value[e]), channels[a]);
        const float dz = grad_z(to_float(grad_y[i].value[e]), xhat, channels[a], b.silu);
        x[i].value[e] = from_float<T>(grad_u(xhat, dz, channels[a], mean_dz[a], mean_dz_xhat[a]));
      }
      store_vector(static_cast<T*>(b.grad_x) + lane.offset(b.grad_x_stride, s), x[i]);
    }
  }
}

// sums (N, C) of dz and dz * xhat over the batch: a block per kWarp channels, kBatchRows rows of threads over the images.
__global__ void __launch_bounds__(kWarp* kBatchRows)
    sum_over_batch_kernel(const Backward b, float* grad_weight, float* grad_bias) {
  __shared__ float scratch[kWarp * kBatchRows];
  const int column = static_cast<int>(threadIdx.x) % kWarp, row = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t c = blockIdx.x * int64_t{kWarp} + column;
  float sums[2][1] = {};
  for (int64_t n = row; c < b.x.C && n < b.x.N; n += kBatchRows) {
    sums[kDz][0] += b.sums[kDz][n * b.x.C + c];
    sums[kDzXhat][0] += b.sums[kDzXhat][n * b.x.C + c];
  }
  sum_over_pixels(sums, scratch, column, row, kWarp, kBatchRows, true);
  if (row != 0 || c >= b.x.C) return;
  grad_bias[c] = sums[kDz][0];
  grad_weight[c] = sums[kDzXhat][0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad_y, const Tensor& x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, const Tensor& mean, const Tensor& rstd, bool silu) {
  const OnDeviceOf device(x);
  const Problem p(x, num_groups, weight, bias, add, silu);
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = floats_like(x, {p.x.C});
  Tensor grad_bias = floats_like(x, {p.x.C});
  Tensor grad_add = floats_like(x, {p.x.N, p.x.C});
  // The sums over the pixels of one image already are the gradients of weight and bias.
  Tensor sum_dz = p.x.N == 1 ? grad_bias : floats_like(x, {p.x.N, p.x.C});
  Tensor sum_dz_xhat = p.x.N == 1 ? grad_weight : floats_like(x, {p.x.N, p.x.C});
  Backward b{};
  b.x = p.x;
  b.groups = p.groups;
  b.per_group = p.per_group;
  b.weight = p.weight;
  b.bias = p.bias;
  b.add = p.add;
  b.silu = silu;
  b.from = x.const_data_ptr();
  b.grad_y = grad_y.const_data_ptr();
  b.grad_y_stride = strides_of(grad_y);
  b.grad_y_vectors = has_vectors(b.grad_y, b.grad_y_stride, p.x, bytes);
  b.grad_x = grad_x.mutable_data_ptr();
  b.grad_x_stride = layout_of(grad_x).stride;
  b.group_size = p.group_size();
  b.mean = data_of(mean);
  b.rstd = data_of(rstd);
  b.grad_add = data_of(grad_add);
  b.sums[kDz] = data_of(sum_dz);
  b.sums[kDzXhat] = data_of(sum_dz_xhat);
  const bool vectors = has_vectors(b.from, b.x.stride, b.x, bytes) && has_vectors(b.grad_x, b.grad_x_stride, b.x, bytes);
  const int v = vectors ? static_cast<int>(kVectorBytes / bytes) : 1;

  if (const std::optional<Tile> whole = whole_tile(p, v, bytes, kWholeThreads, kWholeElements)) {
    b.tile = *whole;
    dispatch(x.scalar_type(), vectors, p.x.channels_last, [&](auto type, auto width, auto last) {
      using T = typename decltype(type)::type;
      constexpr int V = decltype(width)::value;
      constexpr bool kLast = decltype(last)::value;
      const int64_t shared = pixel_sum_bytes<V, kLast>(b.tile) + group_sum_bytes(b.tile, p.per_group);
      launch("group_norm_silu_backward, whole groups", whole_kernel<T, V, kLast>, b.tile.blocks(p.x.N),
             b.tile.threads(), shared, device.stream(), b);
    });
  } else {
    b.tile = split_tile(p.x, v, bytes);
    Tensor partial = floats_like(x, {kSums, p.x.N, b.tile.pixel_tiles, p.x.C});
    Tensor sum_xhat = floats_like(x, {p.x.N, p.x.C});
    Tensor mean_dz = floats_like(x, {p.x.N, p.groups});
    Tensor mean_dz_xhat = floats_like(x, {p.x.N, p.groups});
    b.partial = data_of(partial);
    b.sums[kXhat] = data_of(sum_xhat);
    b.mean_dz = data_of(mean_dz);
    b.mean_dz_xhat = data_of(mean_dz_xhat);
    dispatch(x.scalar_type(), vectors, p.x.channels_last, [&](auto type, auto width, auto last) {
      using T = typename decltype(type)::type;
      constexpr int V = decltype(width)::value;
      constexpr bool kLast = decltype(last)::value;
      launch("group_norm_silu_backward, sums", sums_kernel<T, V, kLast>, b.tile.blocks(p.x.N), kSplitThreads,
             pixel_sum_bytes<V, kLast>(b.tile), device.stream(), b);
      launch("group_norm_silu_backward, combination", combine_sums_kernel, p.x.N * p.groups, kCombineThreads, 0,
             device.stream(), b, combine_columns(p.per_group));
      launch("group_norm_silu_backward, application", apply_kernel<T, V, kLast>, b.tile.blocks(p.x.N), kSplitThreads, 0,
             device.stream(), b);
    });
  }
  if (p.x.N > 1) {
    launch("group_norm_silu_backward, sum over the batch", sum_over_batch_kernel, ceil_div(p.x.C, kWarp),
           kWarp * kBatchRows, 0, device.stream(), b, data_of(grad_weight), data_of(grad_bias));
  }
  return {grad_x, grad_weight, grad_bias, grad_add};
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("group_norm_silu_backward.cuda", TORCH_BOX(&fastdistill::cuda::group_norm_silu_backward));
}
