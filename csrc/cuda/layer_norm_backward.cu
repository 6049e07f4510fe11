// layer_norm backward on CUDA: one launch, and a small one that adds up the gradients of weight and bias.
//
//     grad_x = rstd (w dy - m1 - xhat m2) + grad_s,   m1 = mean(w dy),  m2 = mean(w dy xhat)
//
// A warp or a block holds a row of s and of grad_y in registers and reads it once. Blocks walk the rows in turns; a
// thread has the same columns of every one, sums dy xhat and dy over them, and each block leaves one partial sum per
// column. Nothing is atomic.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "layer_norm.cuh"

namespace fastdistill::cuda::layer_norm {
namespace {

constexpr int kSumColumns = 32, kSumRows = 32;  // threads of the kernel that adds up the partial sums

struct Backward {
  int64_t rows;
  int columns;
  Source grad_y, grad_s, s;
  void* grad_x;  // dense
  Parameter weight;
  const float *mean, *rstd;
  float* partial;  // (blocks, 2, columns): sums of dy xhat and of dy; null leaves them out
};

// m1, m2, and the mean of xhat, which is what float32 has lost of the row's mean: |mean| >> std costs no digits.
struct RowSums {
  float mean, rstd, drift, m1, m2, factor;

  __device__ RowSums(const Backward& b, int64_t row) : mean(b.mean[row]), rstd(b.rstd[row]) {}

  // sums: of w dy, of w dy xhat, of xhat before its drift is taken off.
  __device__ void finish(const Backward& b, const float (&sums)[3]) {
    m1 = sums[0] / b.columns;
    drift = sums[2] / b.columns;
    m2 = sums[1] / b.columns - drift * m1;
    // A row of one value: y does not depend on it, but the rounding of w dy times rstd = 1/sqrt(eps) would.
    factor = b.columns > 1 ? rstd : 0.0f;
  }
  __device__ float raw_xhat(float s) const { return (s - mean) * rstd; }
  __device__ float xhat(float s) const { return raw_xhat(s) - drift; }
  __device__ float grad_x(float wdy, float xhat) const { return (wdy - m1 - xhat * m2) * factor; }
};

template <typename T, int V>
__device__ Vector<T, V> load_grad_s(const Backward& b, int64_t row, int c) {
  if (b.grad_s.data == nullptr) return {};
  return load_input<V>(b.grad_s.row<T>(row) + c);
}

template <typename T, int V>
__device__ void store_grad_x(const Backward& b, int64_t row, int c, const float (&grad)[V],
                             const Vector<T, V>& grad_s) {
  Vector<T, V> rounded;
#pragma unroll
  for (int e = 0; e < V; ++e) rounded.value[e] = from_float<T>(grad[e] + to_float(grad_s.value[e]));
  store_vector(static_cast<T*>(b.grad_x) + row * b.columns + c, rounded);
}

template <typename T, int V, int kElements, bool kWarpRow, bool kSums>
__global__ void __launch_bounds__(kWarpRow ? kRowsPerBlock* kWarp : kMaxBlockThreads,
                                  kWarpRow ? resident_warp_blocks(kElements) : 1) held_kernel(const Backward b) {
  using L = Lane<kWarpRow>;
  constexpr int kVectors = kElements / V;
  __shared__ float scratch[3 * kWarp];
  float weight[kVectors][V], grad_weight[kVectors][V] = {}, grad_bias[kVectors][V] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int c = (L::index() + i * L::count()) * V;
    if (c < b.columns) b.weight.read<T>(c, 1.0f, weight[i]);
  }

  for (int64_t row = L::first_row(); row < b.rows; row += L::row_step()) {  // together, the threads of a row
    Vector<T, V> dy[kVectors], s[kVectors], grad_s[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = (L::index() + i * L::count()) * V;
      if (c >= b.columns) continue;
      dy[i] = load_input<V>(b.grad_y.row<T>(row) + c);
      s[i] = load_input<V>(b.s.row<T>(row) + c);
      grad_s[i] = load_grad_s<T, V>(b, row, c);  // all of them before the first store
    }
    RowSums r(b, row);
    float sums[3] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if ((L::index() + i * L::count()) * V >= b.columns) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float xhat = r.raw_xhat(to_float(s[i].value[e])), wdy = weight[i][e] * to_float(dy[i].value[e]);
        sums[0] += wdy;
        sums[1] += wdy * xhat;
        sums[2] += xhat;
      }
    }
    sum_over_row<kWarpRow>(sums, scratch);
    r.finish(b, sums);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = (L::index() + i * L::count()) * V;
      if (c >= b.columns) continue;
      float grad[V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float xhat = r.xhat(to_float(s[i].value[e])), dy_ = to_float(dy[i].value[e]);
        grad[e] = r.grad_x(weight[i][e] * dy_, xhat);
        if constexpr (kSums) {
          grad_weight[i][e] += dy_ * xhat;
          grad_bias[i][e] += dy_;
        }
      }
      store_grad_x<T, V>(b, row, c, grad, grad_s[i]);
    }
  }

  if constexpr (kSums) {
    float* const own = b.partial + int64_t{blockIdx.x} * 2 * b.columns;
    if constexpr (kWarpRow) {
      // The warps of a block, one after the other, in shared memory.
      __shared__ float shared[2][kElements * kWarp];
      for (int warp = 0; warp < kRowsPerBlock; ++warp) {
        if (static_cast<int>(threadIdx.x) / kWarp == warp) {
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
#pragma unroll
            for (int e = 0; e < V; ++e) {
              const int at = (i * V + e) * kWarp + L::index();  // neighbours in neighbouring banks
              shared[0][at] = (warp == 0 ? 0.0f : shared[0][at]) + grad_weight[i][e];
              shared[1][at] = (warp == 0 ? 0.0f : shared[1][at]) + grad_bias[i][e];
            }
          }
        }
        __syncthreads();
      }
      if (threadIdx.x / kWarp != 0) return;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const int at = (i * V + e) * kWarp + L::index();
          grad_weight[i][e] = shared[0][at];
          grad_bias[i][e] = shared[1][at];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = (L::index() + i * L::count()) * V;
      if (c >= b.columns) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        own[c + e] = grad_weight[i][e];
        own[b.columns + c + e] = grad_bias[i][e];
      }
    }
  }
}

// A row too long for registers, or without vectors, is read twice, and the sums over the rows lie in the block's own
// part of `partial`.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxBlockThreads) loop_kernel(const Backward b) {
  __shared__ float scratch[3 * kWarp];
  const int first = static_cast<int>(threadIdx.x) * V, step = static_cast<int>(blockDim.x) * V;
  float* const own = b.partial == nullptr ? nullptr : b.partial + int64_t{blockIdx.x} * 2 * b.columns;
  for (int64_t row = blockIdx.x; row < b.rows; row += gridDim.x) {
    const T *dys = b.grad_y.row<T>(row), *ss = b.s.row<T>(row);
    RowSums r(b, row);
    float sums[3] = {}, weight[V];
#pragma unroll 2
    for (int c = first; c < b.columns; c += step) {
      const Vector<T, V> dy = load_input<V>(dys + c), s = load_input<V>(ss + c);
      b.weight.read<T>(c, 1.0f, weight);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float xhat = r.raw_xhat(to_float(s.value[e])), wdy = weight[e] * to_float(dy.value[e]);
        sums[0] += wdy;
        sums[1] += wdy * xhat;
        sums[2] += xhat;
      }
    }
    sum_over_row<false>(sums, scratch);
    r.finish(b, sums);
#pragma unroll 2
    for (int c = first; c < b.columns; c += step) {
      const Vector<T, V> dy = load_input<V>(dys + c), s = load_input<V>(ss + c);
      b.weight.read<T>(c, 1.0f, weight);
      float grad[V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float xhat = r.xhat(to_float(s.value[e])), dy_ = to_float(dy.value[e]);
        grad[e] = r.grad_x(weight[e] * dy_, xhat);
        if (own != nullptr) {
          const bool has_sum = row != blockIdx.x;
          own[c + e] = (has_sum ? own[c + e] : 0.0f) + dy_ * xhat;
          own[b.columns + c + e] = (has_sum ? own[b.columns + c + e] : 0.0f) + dy_;
        }
      }
      store_grad_x<T, V>(b, row, c, grad, load_grad_s<T, V>(b, row, c));
    }
  }
}

// Adds up `partial` (blocks, 2, columns) in a fixed order: a thread every kSumRows-th block, then a warp a column.
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    sum_kernel(const float* partial, int64_t blocks, int64_t columns, float* grad_weight, float* grad_bias) {
  __shared__ float scratch[kSumRows][kSumColumns + 1];
  const int x = static_cast<int>(threadIdx.x) % kSumColumns, y = static_cast<int>(threadIdx.x) / kSumColumns;
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + x;  // of 2 * columns
  float total = 0.0f;
  if (column < 2 * columns) {
#pragma unroll 4
    for (int64_t i = y; i < blocks; i += kSumRows) total += partial[i * 2 * columns + column];
  }
  scratch[y][x] = total;
  __syncthreads();
  // A warp has a column's sums in its threads.
  const float sum = sum_over_warp(scratch[x][y]);
  const int64_t to = int64_t{blockIdx.x} * kSumColumns + y;
  if (x != 0 || to >= 2 * columns) return;
  (to < columns ? grad_weight[to] : grad_bias[to - columns]) = sum;
}

template <typename T, int V, bool kSums>
void run(const Backward& b, const Plan& plan, cudaStream_t stream) {
  void (*kernel)(Backward) = loop_kernel<T, V>;
  if constexpr (V > 1) {
    if (plan.kind == Kind::kBlock) kernel = held_kernel<T, V, kBlockElements, false, kSums>;
    if (plan.kind == Kind::kWarp)
      kernel = plan.elements == 16 ? held_kernel<T, V, 16, true, kSums> : held_kernel<T, V, 24, true, kSums>;
  }
  launch("layer_norm_backward", kernel, plan.blocks, plan.threads, 0, stream, b);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, std::optional<Tensor> grad_s,
                                                       const Tensor& s, std::optional<Tensor> weight,
                                                       const Tensor& mean, const Tensor& rstd, bool parameters) {
  const OnDeviceOf device(s);
  const Rows rows = rows_of(s, "s");
  const int64_t D = rows.length, per_column = parameters ? D : 0;
  Tensor grad_x = torch::stable::empty_like(s);
  Tensor grad_weight = new_floats(s, {per_column}), grad_bias = new_floats(s, {per_column});
  Backward b{};
  b.rows = rows.count;
  b.columns = static_cast<int>(D);
  b.grad_y = source(grad_y, "grad_y");
  b.grad_s = source(grad_s, "grad_s");
  b.s = source(s, "s");
  b.grad_x = grad_x.mutable_data_ptr();
  b.weight = parameter(weight);
  b.mean = static_cast<const float*>(mean.const_data_ptr());
  b.rstd = static_cast<const float*>(rstd.const_data_ptr());
  const bool vectors = has_vectors(rows, static_cast<int64_t>(s.element_size()),
                                   {b.grad_y, b.grad_s, b.s, Source{b.grad_x, D}});
  dispatch(s.scalar_type(), vectors, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(width)::value;
    const Plan plan = plan_backward(rows.count, D, V, parameters, current_device_limits().multiprocessors);
    if (!parameters) return run<T, V, false>(b, plan, device.stream());
    Tensor partial = new_floats(s, {plan.blocks, 2, D});
    b.partial = floats_of(partial);
    run<T, V, true>(b, plan, device.stream());
    launch("layer_norm_backward: sums", sum_kernel, (2 * D + kSumColumns - 1) / kSumColumns, kSumColumns * kSumRows, 0,
           device.stream(), static_cast<const float*>(b.partial), plan.blocks, D, floats_of(grad_weight),
           floats_of(grad_bias));
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastdistill::cuda::layer_norm

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("layer_norm_backward.cuda", TORCH_BOX(&fastdistill::cuda::layer_norm::layer_norm_backward));
}
