// group_norm_silu, forward: moments per split, statistics per group, then y. The first two leave out what the third
// needs per channel as three coefficients.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "group_norm_silu.cuh"

namespace fastdistill {
namespace {

struct Partials {
  float *mean, *m2;  // of one channel over one split, without `add`
};

struct Coefficients {
  float *center, *scale, *shift;  // (N, C): z = (x - center) * scale + shift
};

// Mean and sum of squared deviations in two readings of the split, the second from L1: never E[x^2] - E[x]^2.
template <typename T, int V, int kTeam>
__global__ void __launch_bounds__(kThreads) moments_of_rows(const T* x, int64_t stride_n, Shape s, Partials out) {
  const RunOfRow<kTeam> at(s);
  const T* row = x + at.n * stride_n + at.c * s.S;
  float v[V];
  float total = 0.0f;
  for (int64_t i = at.begin + at.lane * V; i < at.end; i += kTeam * V) {
    load_pack(row + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) total += v[j];
  }
  const auto count = static_cast<float>(at.end - at.begin);
  const float mean = team_sum<kTeam>(total) / count;
  float first = 0.0f, second = 0.0f;
  for (int64_t i = at.begin + at.lane * V; i < at.end; i += kTeam * V) {
    load_pack(row + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = v[j] - mean;
      first += d;
      second += d * d;
    }
  }
  first = team_sum<kTeam>(first);
  second = team_sum<kTeam>(second);
  if (at.active && at.lane == 0) {
    const int64_t i = s.partial(at.n, at.c, at.split);
    out.mean[i] = mean + first / count;
    out.m2[i] = second - first * (first / count);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    moments_of_pixels(const T* x, int64_t stride_n, int64_t stride_s, Shape s, Partials out) {
  const RunOfPixels<V> at(s);
  const T* column = x + at.n * stride_n + at.c;
  float v[V], mean[V] = {}, first[V] = {}, second[V] = {};
  for (int64_t p = at.begin; p < at.end; p += kPixelRows) {
    load_pack(column + p * stride_s, v);
#pragma unroll
    for (int j = 0; j < V; ++j) mean[j] += v[j];
  }
  pixel_row_sum(mean);
  const auto count = static_cast<float>(s.count(at.split));
#pragma unroll
  for (int j = 0; j < V; ++j) mean[j] /= count;
  for (int64_t p = at.begin; p < at.end; p += kPixelRows) {
    load_pack(column + p * stride_s, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = v[j] - mean[j];
      first[j] += d;
      second[j] += d * d;
    }
  }
  pixel_row_sum(first);
  pixel_row_sum(second);
  if (at.active && threadIdx.x < kPixelLanes) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t i = s.partial(at.n, at.c + j, at.split);
      out.mean[i] = mean[j] + first[j] / count;
      out.m2[i] = second[j] - first[j] * (first[j] / count);
    }
  }
}

// One block per (sample, group): Chan's combination over its channels and splits, in double.
__global__ void __launch_bounds__(kGroupThreads)
    statistics_of_groups(Shape s, Partials in, Parameter weight, Parameter bias, Parameter add, float eps, float* mean_out,
                         float* rstd_out, Coefficients out) {
  const int64_t n = blockIdx.x / s.groups, first_channel = blockIdx.x % s.groups * s.per_group;
  const int64_t items = s.per_group * s.splits;
  const double elements = static_cast<double>(s.per_group) * static_cast<double>(s.S);
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < items; i += kGroupThreads) {
    const int64_t c = first_channel + i / s.splits, split = i % s.splits;
    total += static_cast<double>(s.count(split)) * (in.mean[s.partial(n, c, split)] + add.at(n, c, 0.0f));
  }
  const double mean = group_sum(total) / elements;
  double m2 = 0.0;
  for (int64_t i = threadIdx.x; i < items; i += kGroupThreads) {
    const int64_t c = first_channel + i / s.splits, split = i % s.splits, at = s.partial(n, c, split);
    const double d = static_cast<double>(in.mean[at]) + add.at(n, c, 0.0f) - mean;
    m2 += in.m2[at] + static_cast<double>(s.count(split)) * d * d;
  }
  const double rstd = 1.0 / sqrt(group_sum(m2) / elements + eps);
  if (threadIdx.x == 0) {
    mean_out[blockIdx.x] = static_cast<float>(mean);
    rstd_out[blockIdx.x] = static_cast<float>(rstd);
  }
  for (int64_t c = first_channel + threadIdx.x; c < first_channel + s.per_group; c += kGroupThreads) {
    const Center center(mean, add.at(n, c, 0.0f));
    const float scale = static_cast<float>(rstd) * weight.at(0, c, 1.0f);
    out.center[n * s.C + c] = center.center;
    out.scale[n * s.C + c] = scale;
    out.shift[n * s.C + c] = bias.at(0, c, 0.0f) + center.rest * scale;
  }
}

__device__ inline float activate(float x, float center, float scale, float shift, bool silu) {
  const float z = (x - center) * scale + shift;
  return silu ? z * sigmoid(z) : z;
}

template <typename T, int V, int kTeam>
__global__ void __launch_bounds__(kThreads)
    apply_to_rows(const T* x, int64_t stride_n, T* y, Shape s, Coefficients k, bool silu) {
  const RunOfRow<kTeam> at(s);
  const T* from = x + at.n * stride_n + at.c * s.S;
  T* to = y + at.row * s.S;
  const float center = k.center[at.row], scale = k.scale[at.row], shift = k.shift[at.row];
  float v[V];
  for (int64_t i = at.begin + at.lane * V; i < at.end; i += kTeam * V) {
    load_pack(from + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = activate(v[j], center, scale, shift, silu);
    store_pack(to + i, v);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    apply_to_pixels(const T* x, int64_t stride_n, int64_t stride_s, T* y, Shape s, Coefficients k, bool silu) {
  const RunOfPixels<V> at(s);
  if (!at.active) return;
  const T* from = x + at.n * stride_n + at.c;
  T* to = y + at.n * s.S * s.C + at.c;
  float v[V], center[V], scale[V], shift[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t i = at.n * s.C + at.c + j;
    center[j] = k.center[i], scale[j] = k.scale[i], shift[j] = k.shift[i];
  }
  for (int64_t p = at.begin; p < at.end; p += kPixelRows) {
    load_pack(from + p * stride_s, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = activate(v[j], center[j], scale[j], shift[j], silu);
    store_pack(to + p * s.C, v);
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, std::optional<Tensor> add, double eps,
                                                   bool silu) {
  const DeviceScope device(x);
  const cudaStream_t stream = device.stream();
  const Layout layout = layout_of(x);
  const Strides3 stride = layout.stride;
  const Shape s(layout, num_groups);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = float_workspace(x, s.N, num_groups), rstd = float_workspace(x, s.N, num_groups);
  Tensor workspace = float_workspace(x, 2, s.partials()), coefficients = float_workspace(x, 3, s.channels());
  auto* partial = static_cast<float*>(workspace.mutable_data_ptr());
  auto* coefficient = static_cast<float*>(coefficients.mutable_data_ptr());
  const Partials partials{partial, partial + s.partials()};
  const Coefficients k{coefficient, coefficient + s.channels(), coefficient + 2 * s.channels()};

  with_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    const bool packs = reads_in_packs(x, stride, s, 16 / sizeof(T));
    with_vector_and_team<T>(packs, s, [&](auto vector, auto team) {
      constexpr int V = decltype(vector)::value, kTeam = decltype(team)::value;
      if (s.channels_last) {
        const dim3 blocks = pixel_blocks(s, V);
        moments_of_pixels<T, V><<<blocks, kThreads, 0, stream>>>(from, stride.n, stride.s, s, partials);
      } else {
        moments_of_rows<T, V, kTeam><<<row_blocks(s, kTeam), kThreads, 0, stream>>>(from, stride.n, s, partials);
      }
      check_launch("group_norm_silu moments");
      statistics_of_groups<<<static_cast<unsigned int>(s.N * s.groups), kGroupThreads, 0, stream>>>(
          s, partials, per_channel(weight), per_channel(bias), per_sample_and_channel(add), static_cast<float>(eps),
          static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()), k);
      check_launch("group_norm_silu statistics");
      if (s.channels_last) {
        const dim3 blocks = pixel_blocks(s, V);
        apply_to_pixels<T, V><<<blocks, kThreads, 0, stream>>>(from, stride.n, stride.s, to, s, k, silu);
      } else {
        apply_to_rows<T, V, kTeam><<<row_blocks(s, kTeam), kThreads, 0, stream>>>(from, stride.n, to, s, k, silu);
      }
      check_launch("group_norm_silu apply");
    });
  });
  return {y, mean, rstd};
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("group_norm_silu.cuda", TORCH_BOX(&fastdistill::group_norm_silu));
}
