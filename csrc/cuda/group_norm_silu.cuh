// group_norm_silu on CUDA: what its forward and its backward share.
//
// Both run in sweeps over x with partial results per (sample, channel, split) between them, where a split is a run of at
// most kRun spatial values. A team of threads reduces a split; a later, small kernel combines the splits of a group in a
// fixed order. Nothing is atomic, so a repeated call gives the same bits.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "../layout.h"
#include "common.cuh"

namespace fastdistill {

constexpr int kThreads = 256;
constexpr int64_t kRun = 4096;        // contiguous: values of one channel per split; its second reading hits L1
constexpr int64_t kPixelRun = 128;    // channels last: pixels per split
constexpr int kPixelLanes = 32;       // channels last: threads along the channels, and along the pixels of a block
constexpr int kPixelRows = kThreads / kPixelLanes;

struct Shape {
  int64_t N, C, S, groups, per_group;
  int64_t run, splits;     // values per split, splits of one channel
  bool channels_last;

  Shape(const Layout& x, int64_t num_groups)
      : N(x.N), C(x.C), S(x.S), groups(num_groups), per_group(x.C / num_groups), channels_last(x.channels_last) {
    run = channels_last ? kPixelRun : kRun;
    splits = ceil_div(S, run);
  }

  __host__ __device__ int64_t channels() const { return N * C; }
  __host__ __device__ int64_t partials() const { return N * C * splits; }
  // Neighbouring threads write neighbouring partials: along the splits when contiguous, along the channels otherwise.
  __device__ int64_t partial(int64_t n, int64_t c, int64_t split) const {
    return channels_last ? (n * splits + split) * C + c : (n * C + c) * splits + split;
  }
  __device__ int64_t count(int64_t split) const { return min(run, S - split * run); }
};

// ---- contiguous: a team of 32 or 256 threads per (sample, channel, split) --------------------------------------------

template <int kTeam>
struct RunOfRow {
  int64_t n, c, row, split, begin, end;
  int lane;
  bool active;

  __device__ explicit RunOfRow(const Shape& s) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
    lane = threadIdx.x % kTeam;
    active = item < s.partials();
    row = active ? item / s.splits : 0;
    split = active ? item % s.splits : 0;
    n = row / s.C;
    c = row % s.C;
    begin = split * s.run;
    end = active ? min(s.S, begin + s.run) : begin;  // an idle team still takes part in the sums
  }
};

inline unsigned int row_blocks(const Shape& s, int team) {
  return static_cast<unsigned int>(ceil_div(s.partials(), kThreads / team));
}

// ---- channels last: a block of 32 channel vectors x 8 pixel rows per (sample, split, slab of channels) ---------------

template <int V>
struct RunOfPixels {
  int64_t n, c, split, begin, end;
  bool active;

  __device__ explicit RunOfPixels(const Shape& s) {
    n = blockIdx.x / s.splits;
    split = blockIdx.x % s.splits;
    c = (static_cast<int64_t>(blockIdx.y) * kPixelLanes + threadIdx.x % kPixelLanes) * V;
    active = c < s.C;
    begin = split * s.run + threadIdx.x / kPixelLanes;
    end = active ? min(s.S, (split + 1) * s.run) : begin;
  }
};

inline dim3 pixel_blocks(const Shape& s, int vector) {
  return dim3(static_cast<unsigned int>(s.N * s.splits), static_cast<unsigned int>(ceil_div(s.C, kPixelLanes * vector)));
}

// The sum over the pixel rows of a block, for each of a thread's V channels; the same in every row.
template <int V>
__device__ inline void pixel_row_sum(float (&v)[V]) {
  __shared__ float of_row[kPixelRows][kPixelLanes][V];
  const int lane = threadIdx.x % kPixelLanes;
  __syncthreads();  // the previous sum has been read
#pragma unroll
  for (int i = 0; i < V; ++i) of_row[threadIdx.x / kPixelLanes][lane][i] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) {
    v[i] = 0.0f;
#pragma unroll
    for (int row = 0; row < kPixelRows; ++row) v[i] += of_row[row][lane][i];
  }
}

// ---- one block per (sample, group) ----------------------------------------------------------------------------------

constexpr int kGroupThreads = 128;

// The sum over the block of kGroupThreads threads, the same in each, always in the same order.
__device__ inline double group_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  __shared__ double of_warp[kGroupThreads / 32];
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.0;
  for (int warp = 0; warp < kGroupThreads / 32; ++warp) v += of_warp[warp];
  return v;
}

// u - mean = (x - center) + rest, where u = x + add: what float32 loses of center = mean - add is kept in `rest`, so a
// mean of 100 with a deviation of 0.01 keeps its digits.
struct Center {
  float center, rest;

  __device__ Center(double mean, float add) {
    const double exact = mean - add;
    center = static_cast<float>(exact);
    rest = static_cast<float>(center - exact);
  }
};

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + __expf(-z)); }

__device__ inline float grad_z(float grad_y, float z, bool silu) {
  if (!silu) return grad_y;
  const float s = sigmoid(z);
  return grad_y * s * (1.0f + z * (1.0f - s));
}

// ---- choosing a kernel ----------------------------------------------------------------------------------------------

// Calls f with a value of the element type.
template <typename F>
void with_element(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Float:
      return f(float{});
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

inline bool in_packs(const void* data, int64_t element, int64_t vector, std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % (element * vector) != 0) return false;
  for (const int64_t stride : strides)
    if (stride % vector != 0) return false;
  return true;
}

// Whether x can be read `vector` neighbours at a time: along S when contiguous, along C otherwise.
inline bool reads_in_packs(const Tensor& t, const Strides3& s, const Shape& shape, int64_t vector) {
  const auto element = static_cast<int64_t>(t.element_size());
  if (shape.channels_last) return s.c == 1 && in_packs(t.const_data_ptr(), element, vector, {shape.C, s.n, s.s});
  return s.s == 1 && in_packs(t.const_data_ptr(), element, vector, {shape.S, s.n, s.c});
}

// Calls f with (vector, team) as compile-time constants.
template <typename T, typename F>
void with_vector_and_team(bool packs, const Shape& s, const F& f) {
  constexpr int kVector = 16 / sizeof(T);
  using std::integral_constant;
  const int vector = packs ? kVector : 1;
  const bool warp = ceil_div(min(s.run, s.S), vector) <= 128;
  if (packs) {
    warp ? f(integral_constant<int, kVector>{}, integral_constant<int, 32>{})
         : f(integral_constant<int, kVector>{}, integral_constant<int, kThreads>{});
  } else {
    warp ? f(integral_constant<int, 1>{}, integral_constant<int, 32>{})
         : f(integral_constant<int, 1>{}, integral_constant<int, kThreads>{});
  }
}

inline Parameter per_channel(const std::optional<Tensor>& t) { return t ? Parameter(*t, 0, t->stride(0)) : Parameter(); }
inline Parameter per_sample_and_channel(const std::optional<Tensor>& t) {
  return t ? Parameter(*t, t->stride(0), t->stride(1)) : Parameter();
}

inline Tensor float_workspace(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

}  // namespace fastdistill
