// group_norm_silu, backward: three sums per channel and split, the coefficients of each group, then grad_x, and the
// gradients of weight and bias over the samples.
//
// With dz = grad_y * silu'(z), xhat = (u - mean) * rstd and means over a group:
//   grad_x = rstd * (weight * dz - mean(weight * dz) - xhat * mean(weight * dz * xhat)) = a * dz - b - c * xhat
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "group_norm_silu.cuh"

namespace fastdistill {
namespace {

struct Sums {
  float *dz, *dz_xhat, *xhat;  // over one split, or (N, C) over all of them
};

// (N, C) each: xhat = (x - center) * rstd + offset, z = xhat * weight + bias, grad_x = a * dz - b - c * xhat.
struct Coefficients {
  float *center, *rstd, *offset, *weight, *bias, *a, *b, *c;
};
constexpr int kCoefficients = 8;

struct Normalised {
  float center, rstd, offset, weight, bias;

  __device__ Normalised(const Coefficients& k, int64_t i)
      : center(k.center[i]), rstd(k.rstd[i]), offset(k.offset[i]), weight(k.weight[i]), bias(k.bias[i]) {}
  __device__ float xhat(float x) const { return (x - center) * rstd + offset; }
  __device__ float z(float xhat) const { return xhat * weight + bias; }
};

__global__ void __launch_bounds__(kThreads)
    prepare(Shape s, const float* mean, const float* rstd, Parameter weight, Parameter bias, Parameter add,
            Coefficients k) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.channels()) return;
  const int64_t n = i / s.C, c = i % s.C, group = n * s.groups + c / s.per_group;
  const Center center(mean[group], add.at(n, c, 0.0f));
  k.center[i] = center.center;
  k.rstd[i] = rstd[group];
  k.offset[i] = center.rest * rstd[group];
  k.weight[i] = weight.at(0, c, 1.0f);
  k.bias[i] = bias.at(0, c, 0.0f);
}

// V gradients: neighbours in one load when V > 1 (the caller has checked that they are), else one from anywhere.
template <typename T, int V, int kTeam>
__global__ void __launch_bounds__(kThreads)
    sums_of_rows(const T* x, int64_t stride_n, const T* grad_y, Strides3 grad, Shape s, Coefficients k, bool silu,
                 Sums out) {
  const RunOfRow<kTeam> at(s);
  const T* row = x + at.n * stride_n + at.c * s.S;
  const T* grad_row = grad_y + at.n * grad.n + at.c * grad.c;
  const Normalised norm(k, at.row);
  float v[V], g[V], dz = 0.0f, dz_xhat = 0.0f, xhat_sum = 0.0f;
  for (int64_t i = at.begin + at.lane * V; i < at.end; i += kTeam * V) {
    load_pack(row + i, v);
    load_pack(grad_row + i * grad.s, g);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float xhat = norm.xhat(v[j]), d = grad_z(g[j], norm.z(xhat), silu);
      dz += d;
      dz_xhat += d * xhat;
      xhat_sum += xhat;
    }
  }
  dz = team_sum<kTeam>(dz);
  dz_xhat = team_sum<kTeam>(dz_xhat);
  xhat_sum = team_sum<kTeam>(xhat_sum);
  if (at.active && at.lane == 0) {
    const int64_t i = s.partial(at.n, at.c, at.split);
    out.dz[i] = dz, out.dz_xhat[i] = dz_xhat, out.xhat[i] = xhat_sum;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    sums_of_pixels(const T* x, int64_t stride_n, int64_t stride_s, const T* grad_y, Strides3 grad, Shape s,
                   Coefficients k, bool silu, Sums out) {
  const RunOfPixels<V> at(s);
  const T* column = x + at.n * stride_n + at.c;
  const T* grad_column = grad_y + at.n * grad.n + at.c * grad.c;
  float v[V], g[V], dz[V] = {}, dz_xhat[V] = {}, xhat_sum[V] = {};
  for (int64_t p = at.begin; p < at.end; p += kPixelRows) {
    load_pack(column + p * stride_s, v);
    load_pack(grad_column + p * grad.s, g);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Normalised norm(k, at.n * s.C + at.c + j);  // from L1 after the first pixel
      const float xhat = norm.xhat(v[j]), d = grad_z(g[j], norm.z(xhat), silu);
      dz[j] += d;
      dz_xhat[j] += d * xhat;
      xhat_sum[j] += xhat;
    }
  }
  pixel_row_sum(dz);
  pixel_row_sum(dz_xhat);
  pixel_row_sum(xhat_sum);
  if (at.active && threadIdx.x < kPixelLanes) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t i = s.partial(at.n, at.c + j, at.split);
      out.dz[i] = dz[j], out.dz_xhat[i] = dz_xhat[j], out.xhat[i] = xhat_sum[j];
    }
  }
}

// One warp per (sample, channel): its sums over the splits, in a fixed order.
__global__ void __launch_bounds__(kThreads) sums_of_channels(Shape s, Sums in, Sums out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= s.channels()) return;
  const int64_t n = i / s.C, c = i % s.C;
  double dz = 0.0, dz_xhat = 0.0, xhat = 0.0;
  for (int64_t split = threadIdx.x % 32; split < s.splits; split += 32) {
    const int64_t at = s.partial(n, c, split);
    dz += in.dz[at], dz_xhat += in.dz_xhat[at], xhat += in.xhat[at];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    dz += __shfl_xor_sync(0xffffffffu, dz, offset);
    dz_xhat += __shfl_xor_sync(0xffffffffu, dz_xhat, offset);
    xhat += __shfl_xor_sync(0xffffffffu, xhat, offset);
  }
  if (threadIdx.x % 32 == 0) {
    out.dz[i] = static_cast<float>(dz);
    out.dz_xhat[i] = static_cast<float>(dz_xhat);
    out.xhat[i] = static_cast<float>(xhat);
  }
}

// One block per (sample, group): a, b, c, and grad_add = the sum of grad_x over a channel.
__global__ void __launch_bounds__(kGroupThreads)
    coefficients_of_groups(Shape s, Sums sums, Coefficients k, float* grad_add) {
  const int64_t first = blockIdx.x / s.groups * s.C + blockIdx.x % s.groups * s.per_group;
  const double elements = static_cast<double>(s.per_group) * static_cast<double>(s.S);
  double m1 = 0.0, m2 = 0.0;
  for (int64_t i = first + threadIdx.x; i < first + s.per_group; i += kGroupThreads) {
    m1 += static_cast<double>(k.weight[i]) * sums.dz[i];
    m2 += static_cast<double>(k.weight[i]) * sums.dz_xhat[i];
  }
  m1 = group_sum(m1) / elements;
  m2 = group_sum(m2) / elements;
  // Of a group of one value the output does not depend on x; rounding errors times rstd = 1/sqrt(eps) would.
  const double on = elements > 1.0 ? 1.0 : 0.0;
  for (int64_t i = first + threadIdx.x; i < first + s.per_group; i += kGroupThreads) {
    const double rstd = on * k.rstd[i];
    k.a[i] = static_cast<float>(rstd * k.weight[i]);
    k.b[i] = static_cast<float>(rstd * m1);
    k.c[i] = static_cast<float>(rstd * m2);
    const double of_dz = static_cast<double>(k.weight[i]) * sums.dz[i];
    grad_add[i] = static_cast<float>(rstd * (of_dz - static_cast<double>(s.S) * m1 - m2 * sums.xhat[i]));
  }
}

template <typename T, int V, int kTeam>
__global__ void __launch_bounds__(kThreads)
    apply_to_rows(const T* x, int64_t stride_n, const T* grad_y, Strides3 grad, T* grad_x, Shape s, Coefficients k,
                  bool silu) {
  const RunOfRow<kTeam> at(s);
  const T* row = x + at.n * stride_n + at.c * s.S;
  const T* grad_row = grad_y + at.n * grad.n + at.c * grad.c;
  T* to = grad_x + at.row * s.S;
  const Normalised norm(k, at.row);
  const float a = k.a[at.row], b = k.b[at.row], c = k.c[at.row];
  float v[V], g[V];
  for (int64_t i = at.begin + at.lane * V; i < at.end; i += kTeam * V) {
    load_pack(row + i, v);
    load_pack(grad_row + i * grad.s, g);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float xhat = norm.xhat(v[j]);
      v[j] = a * grad_z(g[j], norm.z(xhat), silu) - b - c * xhat;
    }
    store_pack(to + i, v);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    apply_to_pixels(const T* x, int64_t stride_n, int64_t stride_s, const T* grad_y, Strides3 grad, T* grad_x, Shape s,
                    Coefficients k, bool silu) {
  const RunOfPixels<V> at(s);
  if (!at.active) return;
  const T* from = x + at.n * stride_n + at.c;
  const T* grad_column = grad_y + at.n * grad.n + at.c * grad.c;
  T* to = grad_x + at.n * s.S * s.C + at.c;
  float v[V], g[V];
  for (int64_t p = at.begin; p < at.end; p += kPixelRows) {
    load_pack(from + p * stride_s, v);
    load_pack(grad_column + p * grad.s, g);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t i = at.n * s.C + at.c + j;
      const Normalised norm(k, i);
      const float xhat = norm.xhat(v[j]);
      v[j] = k.a[i] * grad_z(g[j], norm.z(xhat), silu) - k.b[i] - k.c[i] * xhat;
    }
    store_pack(to + p * s.C, v);
  }
}

__global__ void __launch_bounds__(kThreads) parameter_gradients(Shape s, Sums sums, float* grad_weight, float* grad_bias) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= s.C) return;
  double weight = 0.0, bias = 0.0;
  for (int64_t n = 0; n < s.N; ++n) weight += sums.dz_xhat[n * s.C + c], bias += sums.dz[n * s.C + c];
  grad_weight[c] = static_cast<float>(weight);
  grad_bias[c] = static_cast<float>(bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad_y, const Tensor& x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, const Tensor& mean, const Tensor& rstd, bool silu) {
  const DeviceScope device(x);
  const cudaStream_t stream = device.stream();
  const Layout layout = layout_of(x);
  const Strides3 stride = layout.stride, grad = strides_of(grad_y);
  const Shape s(layout, num_groups);
  const int64_t channels = s.channels();
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_empty(x, {s.C}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(x, {s.C}, ScalarType::Float);
  Tensor grad_add = float_workspace(x, s.N, s.C);
  Tensor partials = float_workspace(x, 3, s.partials()), totals = float_workspace(x, 3, channels);
  Tensor coefficients = float_workspace(x, kCoefficients, channels);
  auto* partial = static_cast<float*>(partials.mutable_data_ptr());
  auto* total = static_cast<float*>(totals.mutable_data_ptr());
  auto* row = static_cast<float*>(coefficients.mutable_data_ptr());
  const Sums of_splits{partial, partial + s.partials(), partial + 2 * s.partials()};
  const Sums of_channels{total, total + channels, total + 2 * channels};
  const Coefficients k{row,
                       row + channels,
                       row + 2 * channels,
                       row + 3 * channels,
                       row + 4 * channels,
                       row + 5 * channels,
                       row + 6 * channels,
                       row + 7 * channels};
  const auto blocks_of = [](int64_t items, int64_t per_block) {
    return static_cast<unsigned int>(ceil_div(items, per_block));
  };

  prepare<<<blocks_of(channels, kThreads), kThreads, 0, stream>>>(
      s, static_cast<const float*>(mean.const_data_ptr()), static_cast<const float*>(rstd.const_data_ptr()),
      per_channel(weight), per_channel(bias), per_sample_and_channel(add), k);
  check_launch("group_norm_silu_backward prepare");
  with_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* grad_from = static_cast<const T*>(grad_y.const_data_ptr());
    auto* to = static_cast<T*>(grad_x.mutable_data_ptr());
    constexpr int64_t kVector = 16 / sizeof(T);
    const bool packs = reads_in_packs(x, stride, s, kVector) && reads_in_packs(grad_y, grad, s, kVector);
    with_vector_and_team<T>(packs, s, [&](auto vector, auto team) {
      constexpr int V = decltype(vector)::value, kTeam = decltype(team)::value;
      if (s.channels_last) {
        sums_of_pixels<T, V><<<pixel_blocks(s, V), kThreads, 0, stream>>>(from, stride.n, stride.s, grad_from, grad, s,
                                                                         k, silu, of_splits);
      } else {
        sums_of_rows<T, V, kTeam>
            <<<row_blocks(s, kTeam), kThreads, 0, stream>>>(from, stride.n, grad_from, grad, s, k, silu, of_splits);
      }
      check_launch("group_norm_silu_backward sums");
      sums_of_channels<<<blocks_of(channels, kThreads / 32), kThreads, 0, stream>>>(s, of_splits, of_channels);
      check_launch("group_norm_silu_backward channels");
      coefficients_of_groups<<<static_cast<unsigned int>(s.N * s.groups), kGroupThreads, 0, stream>>>(
          s, of_channels, k, static_cast<float*>(grad_add.mutable_data_ptr()));
      check_launch("group_norm_silu_backward coefficients");
      if (s.channels_last) {
        apply_to_pixels<T, V><<<pixel_blocks(s, V), kThreads, 0, stream>>>(from, stride.n, stride.s, grad_from, grad, to,
                                                                          s, k, silu);
      } else {
        apply_to_rows<T, V, kTeam>
            <<<row_blocks(s, kTeam), kThreads, 0, stream>>>(from, stride.n, grad_from, grad, to, s, k, silu);
      }
      check_launch("group_norm_silu_backward apply");
    });
  });
  parameter_gradients<<<blocks_of(s.C, kThreads), kThreads, 0, stream>>>(
      s, of_channels, static_cast<float*>(grad_weight.mutable_data_ptr()),
      static_cast<float*>(grad_bias.mutable_data_ptr()));
  check_launch("group_norm_silu_backward parameters");
  return {grad_x, grad_weight, grad_bias, grad_add};
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("group_norm_silu_backward.cuda", TORCH_BOX(&fastdistill::group_norm_silu_backward));
}
