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

namespace fastdistill::cuda::group_norm_silu {
namespace {

constexpr int kBatch = 2;         // loads of each tensor in flight per thread of a sweep
constexpr int kSums = 3;          // per channel: dz, dz * xhat, xhat
constexpr int kBatchHelpers = 8;  // threads that add up one channel over the batch
enum { kDz, kDzXhat, kXhat };

struct Backward : Call {
  const void *from, *grad_y;
  Strides3 grad_y_stride;
  bool grad_y_vectors;       // vectors of x's kind can be loaded from grad_y at once
  void* grad_x;
  Strides3 grad_x_stride;
  const float *mean, *rstd;  // (N, G)
  float* grad_add;           // (N, C)
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

__device__ int64_t along_vector(const Strides3& stride, bool channels_last) {
  return channels_last ? stride.c : stride.s;
}

// Adds a vector's part to the sums of its channels.
template <typename L, typename T, int V, int A>
__device__ void add_to_sums(float (&sums)[kSums][A], const Vector<T, V>& x, const Vector<T, V>& grad_y,
                            const Channel (&channels)[A], bool silu) {
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const int a = L::channel_of(e);
    const float xhat = normalise(to_float(x.value[e]), channels[a]);
    const float dz = grad_z(to_float(grad_y.value[e]), xhat, channels[a], silu);
    sums[kDz][a] += dz;
    sums[kDzXhat][a] += dz * xhat;
    sums[kXhat][a] += xhat;
  }
}

template <typename L, typename T, int V, int A>
__device__ Vector<T, V> grad_x(const Vector<T, V>& x, const Vector<T, V>& grad_y, const Channel (&channels)[A],
                               const float (&mean_dz)[A], const float (&mean_dz_xhat)[A], bool silu) {
  Vector<T, V> result;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const int a = L::channel_of(e);
    const float xhat = normalise(to_float(x.value[e]), channels[a]);
    const float dz = grad_z(to_float(grad_y.value[e]), xhat, channels[a], silu);
    result.value[e] = from_float<T>(grad_u(xhat, dz, channels[a], mean_dz[a], mean_dz_xhat[a]));
  }
  return result;
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kOnChipThreads, 1) on_chip_kernel(const Backward b) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels, kHeld = held_vectors(V, backward_keeps().tensors);
  FASTDISTILL_DYNAMIC_SHARED(shared);
  const Place place = on_chip_place(b.tile, blockIdx.x);
  const L lane(b.tile, place, b.x.C, b.x.S, static_cast<int>(threadIdx.x));
  const int channels = b.tile.channels, per_group = static_cast<int>(b.per_group), groups = channels / per_group;
  float* const rows = reinterpret_cast<float*>(shared);
  float* const weight = rows + row_floats(b.tile, A);
  float* const own = weight + channels;           // kSums per channel, of this block
  float* const all = own + kSums * channels;      // of all blocks that share the channel
  float* const mean_dz = all + kSums * channels;  // per group, as mean_dz_xhat
  float* const mean_dz_xhat = mean_dz + groups;

  Share<T, V, kHeld> x, grad_y;
  unsigned char* const tile = shared + tile_offset(b.tile, A, b.per_group, backward_keeps());
  x.spare = reinterpret_cast<Vector<T, V>*>(tile) + threadIdx.x;
  grad_y.spare = x.spare + spare_vectors(b.tile, kHeld) * blockDim.x;
  x.load(origin(static_cast<const T*>(b.from), b.x.stride, lane, place.image), b.x.stride.s, lane);
  const T* const from_grad_y = origin(static_cast<const T*>(b.grad_y), b.grad_y_stride, lane, place.image);
  if (b.grad_y_vectors) {
    grad_y.load(from_grad_y, b.grad_y_stride.s, lane);
  } else {
    grad_y.load_strided(from_grad_y, b.grad_y_stride.s, along_vector(b.grad_y_stride, kChannelsLast), lane);
  }
  const int64_t first_channel = place.channel_tile * channels;
  for (int c = static_cast<int>(threadIdx.x); c < channels && first_channel + c < b.x.C;
       c += static_cast<int>(blockDim.x)) {
    weight[c] = b.weight.at(place.image, first_channel + c, 1.0f);
  }
  const int first = static_cast<int>(lane.first_channel - first_channel);
  Channel of_thread[A] = {};
  if (lane.owns()) {
#pragma unroll
    for (int a = 0; a < A; ++a) of_thread[a] = channel(b, place.image, lane.first_channel + a);
  }
  wait_for_copies();

  float sums[kSums][A] = {};
  for_each_vector(
      lane,
      [&](int64_t, const Vector<T, V>& x_, const Vector<T, V>& grad_y_) {
        add_to_sums<L>(sums, x_, grad_y_, of_thread, b.silu);
      },
      x, grad_y);
  sum_over_pixels<kChannelsLast>(sums, rows, own, b.tile, lane);
  Peers peers(b, place, kSums * channels);
  peers.publish(own);
  sum_columns(
      kSums * channels, peers.count, b.tile.helpers,
      [&](int peer, int i) { return peers.values_of(own, peer)[i]; }, [&](int i, float total) { all[i] = total; });
  peers.have_read();
  __syncthreads();
  for_each_group(groups, [&](int group, int t) {
    float dz = 0.0f, dz_xhat = 0.0f;
    for (int c = group * per_group + t; c < (group + 1) * per_group && first_channel + c < b.x.C; c += kWarp) {
      dz += weight[c] * all[kDz * channels + c];
      dz_xhat += weight[c] * all[kDzXhat * channels + c];
    }
    dz = sum_over_warp(dz);
    dz_xhat = sum_over_warp(dz_xhat);
    if (t != 0) return;
    mean_dz[group] = dz / b.group_size;
    mean_dz_xhat[group] = dz_xhat / b.group_size;
  });
  __syncthreads();

  x.forget_conversions();
  grad_y.forget_conversions();
  float means[2][A] = {};
  if (lane.owns()) {
    const GroupOf<A> of(first, per_group);
#pragma unroll
    for (int a = 0; a < A; ++a) {
      means[kDz][a] = mean_dz[of.group[a]];
      means[kDzXhat][a] = mean_dz_xhat[of.group[a]];
      if (lane.ty != 0 || peers.own != 0) continue;
      const int64_t i = place.image * b.x.C + lane.first_channel + a;
      const float *dz = all + kDz * channels, *dz_xhat = all + kDzXhat * channels, *xhat = all + kXhat * channels;
      b.sums[kDz][i] = dz[first + a];
      b.sums[kDzXhat][i] = dz_xhat[first + a];
      b.grad_add[i] = grad_add(static_cast<float>(b.x.S), dz[first + a], xhat[first + a], of_thread[a], means[kDz][a],
                               means[kDzXhat][a]);
    }
  }
  T* const to = origin(static_cast<T*>(b.grad_x), b.grad_x_stride, lane, place.image);
  for_each_vector(
      lane,
      [&](int64_t s, const Vector<T, V>& x_, const Vector<T, V>& grad_y_) {
        store_vector(to + s * b.grad_x_stride.s,
                     grad_x<L>(x_, grad_y_, of_thread, means[kDz], means[kDzXhat], b.silu));
      },
      x, grad_y);
  peers.before_the_end();
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSweepThreads, 2) sums_kernel(const Backward b) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  FASTDISTILL_DYNAMIC_SHARED(shared);
  const Place place = sweep_place(b.tile, blockIdx.x);
  const L lane(b.tile, place, b.x.C, b.x.S, static_cast<int>(threadIdx.x));
  float* const rows = reinterpret_cast<float*>(shared);
  float* const of_tile = rows + row_floats(b.tile, A);
  Channel of_thread[A] = {};
  if (lane.owns()) {
#pragma unroll
    for (int a = 0; a < A; ++a) of_thread[a] = channel(b, place.image, lane.first_channel + a);
  }
  const T* const from = origin(static_cast<const T*>(b.from), b.x.stride, lane, place.image);
  const T* const from_grad_y = origin(static_cast<const T*>(b.grad_y), b.grad_y_stride, lane, place.image);
  float sums[kSums][A] = {};
#pragma unroll 2
  for (int64_t s = lane.pixel; s < lane.last_pixel; s += lane.step()) {
    const Vector<T, V> x = load_past_l1<V>(from + s * b.x.stride.s);
    const Vector<T, V> grad_y = b.grad_y_vectors
                                    ? load_past_l1<V>(from_grad_y + s * b.grad_y_stride.s)
                                    : load_strided<V>(from_grad_y + s * b.grad_y_stride.s,
                                                      along_vector(b.grad_y_stride, kChannelsLast));
    add_to_sums<L>(sums, x, grad_y, of_thread, b.silu);
  }
  sum_over_pixels<kChannelsLast>(sums, rows, of_tile, b.tile, lane);
  const int64_t plane = b.x.N * b.tile.pixel_tiles * b.x.C, start = place.channel_tile * b.tile.channels;
  float* const partial = b.partial + (place.image * b.tile.pixel_tiles + place.pixel_tile) * b.x.C + start;
  for (int c = static_cast<int>(threadIdx.x); c < b.tile.channels && start + c < b.x.C;
       c += static_cast<int>(blockDim.x)) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) partial[k * plane + c] = of_tile[k * b.tile.channels + c];
  }
}

// A block per (image, group).
__global__ void __launch_bounds__(kCombineThreads) combine_sums_kernel(const Backward b, const int helpers) {
  __shared__ float scratch[kCombineThreads / kWarp];
  const int64_t n = blockIdx.x / b.groups, first_channel = blockIdx.x % b.groups * b.per_group;
  const int64_t splits = b.tile.pixel_tiles, plane = b.x.N * splits * b.x.C;
  float of_group[2] = {};
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const float* const partial = b.partial + k * plane + n * splits * b.x.C + first_channel;
    sum_columns(
        static_cast<int>(b.per_group), static_cast<int>(splits), helpers,
        [&](int split, int c) { return partial[split * b.x.C + c]; },
        [&](int c, float total) {
          b.sums[k][n * b.x.C + first_channel + c] = total;
          if (k != kXhat) of_group[k] += b.weight.at(n, first_channel + c, 1.0f) * total;
        });
  }
  const float dz = sum_over_block(of_group[kDz], scratch);
  const float dz_xhat = sum_over_block(of_group[kDzXhat], scratch);
  if (threadIdx.x == 0) {
    b.mean_dz[blockIdx.x] = dz / b.group_size;
    b.mean_dz_xhat[blockIdx.x] = dz_xhat / b.group_size;
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kSweepThreads) apply_kernel(const Backward b) {
  using L = Lane<V, kChannelsLast>;
  constexpr int A = L::kChannels;
  // From the last tile to the first: the sums have left the end of x and grad_y in the L2 cache.
  const Place place = sweep_place(b.tile, gridDim.x - 1 - blockIdx.x);
  const L lane(b.tile, place, b.x.C, b.x.S, static_cast<int>(threadIdx.x));
  if (!lane.owns()) return;
  Channel of_thread[A];
  float mean_dz[A], mean_dz_xhat[A];
#pragma unroll
  for (int a = 0; a < A; ++a) {
    const int64_t c = lane.first_channel + a, i = place.image * b.x.C + c;
    of_thread[a] = channel(b, place.image, c);
    mean_dz[a] = b.mean_dz[place.image * b.groups + c / b.per_group];
    mean_dz_xhat[a] = b.mean_dz_xhat[place.image * b.groups + c / b.per_group];
    if (place.pixel_tile == 0 && lane.ty == 0) {
      b.grad_add[i] = grad_add(static_cast<float>(b.x.S), b.sums[kDz][i], b.sums[kXhat][i], of_thread[a], mean_dz[a],
                               mean_dz_xhat[a]);
    }
  }
  const T* const from = origin(static_cast<const T*>(b.from), b.x.stride, lane, place.image);
  const T* const from_grad_y = origin(static_cast<const T*>(b.grad_y), b.grad_y_stride, lane, place.image);
  T* const to = origin(static_cast<T*>(b.grad_x), b.grad_x_stride, lane, place.image);
  // Loads first: the compiler may not move one in front of a store that could overlap it.
  for (int64_t first = lane.pixel; first < lane.last_pixel; first += kBatch * lane.step()) {
    Vector<T, V> x[kBatch], grad_y[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t s = first + i * lane.step();
      if (s >= lane.last_pixel) continue;
      x[i] = load_last<V>(from + s * b.x.stride.s);
      grad_y[i] = b.grad_y_vectors ? load_last<V>(from_grad_y + s * b.grad_y_stride.s)
                                   : load_strided<V>(from_grad_y + s * b.grad_y_stride.s,
                                                     along_vector(b.grad_y_stride, kChannelsLast));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t s = first + i * lane.step();
      if (s >= lane.last_pixel) continue;
      store_vector(to + s * b.grad_x_stride.s,
                   grad_x<L>(x[i], grad_y[i], of_thread, mean_dz, mean_dz_xhat, b.silu), b.streaming);
    }
  }
}

// sums (N, C) of dz and dz * xhat over the batch: a block per kWarp channels.
__global__ void __launch_bounds__(kWarp* kBatchHelpers)
    sum_over_batch_kernel(const Backward b, float* grad_weight, float* grad_bias) {
  const int64_t first = blockIdx.x * int64_t{kWarp};
  const int channels = b.x.C - first < kWarp ? static_cast<int>(b.x.C - first) : kWarp;
  const auto sum = [&](const float* sums, float* to) {
    sum_columns(
        channels, static_cast<int>(b.x.N), kBatchHelpers, [&](int n, int c) { return sums[n * b.x.C + first + c]; },
        [&](int c, float total) { to[first + c] = total; });
  };
  sum(b.sums[kDz], grad_bias);
  sum(b.sums[kDzXhat], grad_weight);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, int64_t num_groups,
                                                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                    std::optional<Tensor> add, const Tensor& mean, const Tensor& rstd,
                                                    bool silu) {
  const OnDeviceOf device(x);
  Tensor grad_x = torch::stable::empty_like(x);
  Backward b{};
  static_cast<Call&>(b) = call(x, num_groups, weight, bias, add, silu);
  Tensor grad_weight = floats_like(x, {b.x.C});
  Tensor grad_bias = floats_like(x, {b.x.C});
  Tensor grad_add = floats_like(x, {b.x.N, b.x.C});
  // The sums over the pixels of one image already are the gradients of weight and bias.
  Tensor sum_dz = b.x.N == 1 ? grad_bias : floats_like(x, {b.x.N, b.x.C});
  Tensor sum_dz_xhat = b.x.N == 1 ? grad_weight : floats_like(x, {b.x.N, b.x.C});
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  b.from = x.const_data_ptr();
  b.grad_y = grad_y.const_data_ptr();
  b.grad_y_stride = strides_of(grad_y);
  b.grad_y_vectors = has_vectors(b.grad_y, b.grad_y_stride, b.x, bytes);
  b.grad_x = grad_x.mutable_data_ptr();
  b.grad_x_stride = layout_of(grad_x).stride;
  b.mean = data_of(mean);
  b.rstd = data_of(rstd);
  b.grad_add = data_of(grad_add);
  b.sums[kDz] = data_of(sum_dz);
  b.sums[kDzXhat] = data_of(sum_dz_xhat);
  const bool vectors =
      has_vectors(b.from, b.x.stride, b.x, bytes) && has_vectors(b.grad_x, b.grad_x_stride, b.x, bytes);
  const Size size = size_of(b, bytes, vectors);
  b.pixels_each = size.pixels_each();
  const DeviceLimits& limits = current_device_limits();
  const Plan plan = group_norm_silu::plan(size, backward_keeps(), limits);

  dispatch(x.scalar_type(), vectors, b.x.channels_last, [&](auto type, auto width, auto last) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(width)::value;
    constexpr bool kLast = decltype(last)::value;
    if (stays_on_chip(plan, "group_norm_silu_backward, on chip", on_chip_kernel<T, V, kLast>)) {
      follow(plan, &b);
      std::optional<Tensor> partial;
      if (b.cooperative) {
        partial = floats_like(x, {plan.blocks * kSums * b.tile.channels});
        b.partial = data_of(*partial);
      }
      launch("group_norm_silu_backward, on chip", on_chip_kernel<T, V, kLast>, grid_of(plan), device.stream(), b);
      return;
    }
    const Plan sweep = two_pass_plan(size, limits);
    follow(sweep, &b);
    Tensor partial = floats_like(x, {kSums, b.x.N, b.tile.pixel_tiles, b.x.C});
    Tensor sum_xhat = floats_like(x, {b.x.N, b.x.C});
    Tensor mean_dz = floats_like(x, {b.x.N, b.groups});
    Tensor mean_dz_xhat = floats_like(x, {b.x.N, b.groups});
    b.partial = data_of(partial);
    b.sums[kXhat] = data_of(sum_xhat);
    b.mean_dz = data_of(mean_dz);
    b.mean_dz_xhat = data_of(mean_dz_xhat);
    launch("group_norm_silu_backward, sums", sums_kernel<T, V, kLast>, grid_of(sweep), device.stream(), b);
    launch("group_norm_silu_backward, combination", combine_sums_kernel, b.x.N * b.groups, kCombineThreads, 0,
           device.stream(), b, helpers(kCombineThreads, static_cast<int>(b.per_group)));
    launch("group_norm_silu_backward, application", apply_kernel<T, V, kLast>, sweep.blocks, sweep.threads, 0,
           device.stream(), b);
  });
  if (b.x.N > 1) {
    launch("group_norm_silu_backward, sum over the batch", sum_over_batch_kernel, ceil_div(b.x.C, kWarp),
           kWarp * kBatchHelpers, 0, device.stream(), b, data_of(grad_weight), data_of(grad_bias));
  }
  return {grad_x, grad_weight, grad_bias, grad_add};
}

}  // namespace
}  // namespace fastdistill::cuda::group_norm_silu

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("group_norm_silu_backward.cuda", TORCH_BOX(&fastdistill::cuda::group_norm_silu::backward));
}
