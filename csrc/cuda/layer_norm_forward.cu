// layer_norm forward on CUDA, one launch: a warp or a block holds a row in registers and reads it once; a row too long
// for a block, or without vectors, is walked three times. Two passes for mean and variance, never E[x^2] - E[x]^2.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "layer_norm.cuh"

namespace fastdistill::cuda::layer_norm {
namespace {

struct Forward {
  int64_t rows;
  int columns;
  Source x, residual;
  void *s, *y;  // dense; s is null without residual: it is x
  Parameter weight, bias;
  float eps;
  float *mean, *rstd;
};

// x + residual: rounded, written to s and then used as rounded.
template <typename T, int V>
__device__ Vector<T, V> store_sum(const Forward& f, int64_t row, int c, Vector<T, V> x, const Vector<T, V>& residual) {
#pragma unroll
  for (int e = 0; e < V; ++e) x.value[e] = from_float<T>(to_float(x.value[e]) + to_float(residual.value[e]));
  store_vector(static_cast<T*>(f.s) + row * f.columns + c, x);
  return x;
}

// The mean is kept as (mean, drift): subtracting the rounded mean is exact near it, and its own rounding error comes
// back as the mean of the differences, so |mean| >> std costs no digits.
struct Statistics {
  float mean, drift, rstd;

  // moments: sums of the differences to `mean` and of their squares.
  __device__ Statistics(const Forward& f, float mean_, const float (&moments)[2]) : mean(mean_) {
    drift = moments[0] / f.columns;
    rstd = 1.0f / sqrtf(not_negative(moments[1] / f.columns - drift * drift) + f.eps);
  }
};

template <typename T, int V>
__device__ void store_normalised(const Forward& f, int64_t row, int c, const Vector<T, V>& u, const Statistics& s) {
  float weight[V], bias[V];
  f.weight.read<T>(c, 1.0f, weight);
  f.bias.read<T>(c, 0.0f, bias);
  Vector<T, V> y;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float xhat = ((to_float(u.value[e]) - s.mean) - s.drift) * s.rstd;
    y.value[e] = from_float<T>(xhat * weight[e] + bias[e]);
  }
  store_vector(static_cast<T*>(f.y) + row * f.columns + c, y);
}

template <typename T, int V, int kElements, bool kWarpRow>
__global__ void __launch_bounds__(kWarpRow ? kRowsPerBlock* kWarp : kMaxBlockThreads) held_kernel(const Forward f) {
  using L = Lane<kWarpRow>;
  constexpr int kVectors = kElements / V;
  __shared__ float scratch[2 * kWarp];
  const int64_t row = L::first_row();
  if (row >= f.rows) return;  // a whole warp, or a whole block

  Vector<T, V> u[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int c = (L::index() + i * L::count()) * V;
    if (c < f.columns) u[i] = load_input<V>(f.x.row<T>(row) + c);
  }
  if (f.s != nullptr) {
    Vector<T, V> residual[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = (L::index() + i * L::count()) * V;
      if (c < f.columns) residual[i] = load_input<V>(f.residual.row<T>(row) + c);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = (L::index() + i * L::count()) * V;
      if (c < f.columns) u[i] = store_sum<T, V>(f, row, c, u[i], residual[i]);
    }
  }
  float total[1] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if ((L::index() + i * L::count()) * V >= f.columns) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) total[0] += to_float(u[i].value[e]);
  }
  sum_over_row<kWarpRow>(total, scratch);
  const float mean = total[0] / f.columns;
  float moments[2] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if ((L::index() + i * L::count()) * V >= f.columns) continue;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float centred = to_float(u[i].value[e]) - mean;
      moments[0] += centred;
      moments[1] += centred * centred;
    }
  }
  sum_over_row<kWarpRow>(moments, scratch);
  const Statistics s(f, mean, moments);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int c = (L::index() + i * L::count()) * V;
    if (c < f.columns) store_normalised<T, V>(f, row, c, u[i], s);
  }
  if (L::index() == 0) {
    f.mean[row] = mean + s.drift;
    f.rstd[row] = s.rstd;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxBlockThreads) loop_kernel(const Forward f) {
  __shared__ float scratch[2 * kWarp];
  const int64_t row = blockIdx.x;
  const int first = static_cast<int>(threadIdx.x) * V, step = static_cast<int>(blockDim.x) * V;
  const T* const from = f.s == nullptr ? f.x.row<T>(row) : static_cast<const T*>(f.s) + row * f.columns;
  float total[1] = {};
#pragma unroll 2
  for (int c = first; c < f.columns; c += step) {
    Vector<T, V> u = load_input<V>(f.x.row<T>(row) + c);
    if (f.s != nullptr) u = store_sum<T, V>(f, row, c, u, load_input<V>(f.residual.row<T>(row) + c));
#pragma unroll
    for (int e = 0; e < V; ++e) total[0] += to_float(u.value[e]);
  }
  sum_over_row<false>(total, scratch);
  const float mean = total[0] / f.columns;
  float moments[2] = {};
#pragma unroll 2
  for (int c = first; c < f.columns; c += step) {  // of s, each thread reads what it has written itself
    const Vector<T, V> u = load_vector<V>(from + c);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float centred = to_float(u.value[e]) - mean;
      moments[0] += centred;
      moments[1] += centred * centred;
    }
  }
  sum_over_row<false>(moments, scratch);
  const Statistics s(f, mean, moments);
#pragma unroll 2
  for (int c = first; c < f.columns; c += step) store_normalised<T, V>(f, row, c, load_vector<V>(from + c), s);
  if (threadIdx.x == 0) {
    f.mean[row] = mean + s.drift;
    f.rstd[row] = s.rstd;
  }
}

template <typename T, int V>
void run(const Forward& f, cudaStream_t stream) {
  const Plan plan = plan_forward(f.rows, f.columns, V);
  void (*kernel)(Forward) = loop_kernel<T, V>;
  if constexpr (V > 1) {
    if (plan.kind == Kind::kBlock) kernel = held_kernel<T, V, kBlockElements, false>;
    if (plan.kind == Kind::kWarp)
      kernel = plan.elements == 16   ? held_kernel<T, V, 16, true>
               : plan.elements == 24 ? held_kernel<T, V, 24, true>
                                     : held_kernel<T, V, 40, true>;
  }
  launch("layer_norm", kernel, plan.blocks, plan.threads, 0, stream, f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, std::optional<Tensor> residual,
                                                      std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                      double eps) {
  const OnDeviceOf device(x);
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(rows.length <= INT_MAX, "x: at most 2^31 - 1 values in a row, got ", rows.length);
  Tensor y = torch::stable::empty_like(x);
  Tensor s = residual ? torch::stable::empty_like(x) : new_floats(x, {0});
  Tensor mean = new_floats(x, {rows.count}), rstd = new_floats(x, {rows.count});
  Forward f{};
  f.rows = rows.count;
  f.columns = static_cast<int>(rows.length);
  f.x = source(x, "x");
  f.residual = source(residual, "residual");
  f.s = residual ? s.mutable_data_ptr() : nullptr;
  f.y = y.mutable_data_ptr();
  f.weight = parameter(weight);
  f.bias = parameter(bias);
  f.eps = static_cast<float>(eps);
  f.mean = floats_of(mean);
  f.rstd = floats_of(rstd);
  const Source to_y{f.y, rows.length}, to_s{f.s, rows.length};
  const bool vectors = has_vectors(rows, static_cast<int64_t>(x.element_size()), {f.x, f.residual, to_y, to_s});
  dispatch(x.scalar_type(), vectors, [&](auto type, auto width) {
    run<typename decltype(type)::type, decltype(width)::value>(f, device.stream());
  });
  return {y, s, mean, rstd};
}

}  // namespace
}  // namespace fastdistill::cuda::layer_norm

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("layer_norm.cuda", TORCH_BOX(&fastdistill::cuda::layer_norm::layer_norm));
}
