// lpips_distance on CUDA: unit vectors over channels, squared difference, weighted sum, mean over pixels. Forward,
// backward, and the sums of what their blocks leave: nothing is atomic.
//
// With u = x / (|x| + eps), v likewise of y, delta = u - v and `scale` = 2 grad / S:
//
//   grad_x = scale (w delta / (|x| + eps) - u / |x| sum_c(w delta u)),   grad_weight = scale / 2 sum_s delta^2
//
// A block has some pixels and all of their channels. It walks them for the norms, for the differences, and in the
// backward for the gradients; after the first time they are in the L1 or L2 cache. Threads that share a pixel add up
// through shared memory (planes) or shuffles (rows). lpips_distance_plan.h says who owns what.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <type_traits>

#include "../layout.h"
#include "device.cuh"
#include "launch.h"
#include "lpips_distance_plan.h"

namespace fastdistill::cuda::lpips {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kEps = 1e-10f;

// ---- the call -------------------------------------------------------------------------------------------------------

struct Image {
  const void* data = nullptr;
  Strides3 stride{};
};
struct Gradient {
  void* data = nullptr;  // null: not wanted
  Strides3 stride{};
};

struct Problem {
  Plan plan;
  int64_t channels, pixels;
  Image x, y;
  const float* weight;
  int64_t weight_stride;
  float* partial;  // forward: (B, tiles)
  // Backward.
  const float* grad;
  int64_t grad_stride;
  Gradient to_x, to_y;
  float* squares;  // (C, B * tiles), or null
};

// ---- device ---------------------------------------------------------------------------------------------------------

// A thread's part of its block: pixels from `pixel` on (kRows: one, otherwise V), and which channels.
template <int V, bool kRows>
struct Part {
  static constexpr int kPixels = kRows ? 1 : V;
  int64_t sample, pixel;
  int64_t first, step;  // channels, or in rows the first of each vector
  int lane, place;      // among the threads that share a pixel; which of the block's pixel places
  bool inside;

  __device__ explicit Part(const Problem& p) {
    const int thread = static_cast<int>(threadIdx.x), across = p.plan.across;
    const int64_t block = blockIdx.x;
    sample = block / p.plan.tiles;
    lane = kRows ? thread % across : thread / across;
    place = kRows ? thread / across : thread % across;
    pixel = block % p.plan.tiles * p.plan.pixels + place * kPixels;
    first = kRows ? lane * V : lane;
    step = kRows ? across * V : p.plan.along();
    inside = pixel < p.pixels;
  }

  template <typename T>
  __device__ const T* at(const Image& image) const {
    return static_cast<const T*>(image.data) + sample * image.stride.n + pixel * image.stride.s;
  }
  template <typename T>
  __device__ T* at(const Gradient& gradient) const {
    return static_cast<T*>(gradient.data) + sample * gradient.stride.n + pixel * gradient.stride.s;
  }
};

template <int V, typename T>
__device__ void load_floats(const T* from, float (&to)[V]) {
  const Vector<T, V> values = load_vector<V>(from);
#pragma unroll
  for (int e = 0; e < V; ++e) to[e] = to_float(values.value[e]);
}

template <int V, typename T>
__device__ void store_floats(T* to, const float (&from)[V]) {
  Vector<T, V> values;
#pragma unroll
  for (int e = 0; e < V; ++e) values.value[e] = from_float<T>(from[e]);
  store_vector(to, values);
}

// The sums of the threads that share a pixel, in each of them. Planes: scratch holds kThreads * kCount floats.
template <bool kRows, int kCount>
__device__ void sum_over_lanes(const Plan& plan, int lane, int place, float (&values)[kCount], float* scratch) {
  if constexpr (kRows) {
    for (int offset = plan.across / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
    }
  } else {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[i * kThreads + threadIdx.x] = values[i];
    // Halves are folded; `along` is a power of two.
    for (int half = plan.along() / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          scratch[i * kThreads + threadIdx.x] += scratch[i * kThreads + threadIdx.x + half * plan.across];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = scratch[i * kThreads + place];
  }
}

// From a sum of squares: 1 / (norm + eps) and 1 / norm. A vector of zeros has 0 for both, and so no gradient.
__device__ float reciprocal(float squares) { return squares == 0.0f ? 0.0f : 1.0f / (sqrtf(squares) + kEps); }
__device__ float slope(float squares) { return squares == 0.0f ? 0.0f : 1.0f / sqrtf(squares); }

// Of each pixel of a thread, for x (first half) and y (second half): the sums of squares over all channels.
template <typename T, int V, bool kRows>
__device__ void squares_of(const Problem& p, const Part<V, kRows>& part, float (&squares)[2 * Part<V, kRows>::kPixels],
                           float* scratch) {
  constexpr int kPixels = Part<V, kRows>::kPixels;
#pragma unroll
  for (int i = 0; i < 2 * kPixels; ++i) squares[i] = 0.0f;
  const T *x = part.template at<T>(p.x), *y = part.template at<T>(p.y);
#pragma unroll 4
  for (int64_t c = part.first; part.inside && c < p.channels; c += part.step) {
    float a[V], b[V];
    load_floats<V>(x + c * p.x.stride.c, a);
    load_floats<V>(y + c * p.y.stride.c, b);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      squares[kRows ? 0 : e] += a[e] * a[e];
      squares[kPixels + (kRows ? 0 : e)] += b[e] * b[e];
    }
  }
  sum_over_lanes<kRows>(p.plan, part.lane, part.place, squares, scratch);
}

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Problem p) {
  using P = Part<V, kRows>;
  constexpr int kPixels = P::kPixels;
  __shared__ float scratch[kRows ? kThreads / kWarp : 2 * kPixels * kThreads];
  const P part(p);
  float r[2 * kPixels];
  squares_of<T>(p, part, r, scratch);
#pragma unroll
  for (int i = 0; i < 2 * kPixels; ++i) r[i] = reciprocal(r[i]);
  const T *x = part.template at<T>(p.x), *y = part.template at<T>(p.y);
  float total = 0.0f;
#pragma unroll 4
  for (int64_t c = part.first; part.inside && c < p.channels; c += part.step) {
    float a[V], b[V];
    load_floats<V>(x + c * p.x.stride.c, a);
    load_floats<V>(y + c * p.y.stride.c, b);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int i = kRows ? 0 : e;
      const float delta = __fmul_rn(a[e], r[i]) - __fmul_rn(b[e], r[kPixels + i]);
      total += p.weight[(c + (kRows ? e : 0)) * p.weight_stride] * (delta * delta);
    }
  }
  if constexpr (!kRows) __syncthreads();
  total = sum_over_block(total, scratch);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = total / p.pixels;
}

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Problem p) {
  using P = Part<V, kRows>;
  constexpr int kPixels = P::kPixels;
  __shared__ float scratch[kRows ? V * kThreads : 2 * kPixels * kThreads];
  const P part(p);
  float r[2 * kPixels], slopes[2 * kPixels], sums[2 * kPixels];
  squares_of<T>(p, part, r, scratch);
#pragma unroll
  for (int i = 0; i < 2 * kPixels; ++i) {
    slopes[i] = slope(r[i]);
    r[i] = reciprocal(r[i]);
    sums[i] = 0.0f;
  }
  const float scale = 2.0f * p.grad[part.sample * p.grad_stride] / p.pixels;
  const T *x = part.template at<T>(p.x), *y = part.template at<T>(p.y);
  // As many rounds for every thread: sums of squares per channel take the whole block.
  if constexpr (kRows) {
    for (int64_t base = 0; base < p.channels; base += part.step) {
      const int64_t c = base + part.first;
      float squares[V] = {};
      if (part.inside && c < p.channels) {
        float a[V], b[V];
        load_floats<V>(x + c * p.x.stride.c, a);
        load_floats<V>(y + c * p.y.stride.c, b);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float u = __fmul_rn(a[e], r[0]), v = __fmul_rn(b[e], r[1]), delta = u - v;
          const float weighted = p.weight[(c + e) * p.weight_stride] * delta;
          sums[0] += weighted * u;
          sums[1] += weighted * v;
          squares[e] = delta * delta;
        }
      }
      if (p.squares == nullptr) continue;
      // Over the pixels of the block: thread (lane, place) of each lane's V channels, place 0 adds them up.
      __syncthreads();
#pragma unroll
      for (int e = 0; e < V; ++e) scratch[e * kThreads + threadIdx.x] = squares[e];
      __syncthreads();
      if (part.place == 0 && c < p.channels) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          float total = 0.0f;
          for (int place = 0; place < p.plan.along(); ++place)
            total += scratch[e * kThreads + place * p.plan.across + part.lane];
          p.squares[(c + e) * gridDim.x + blockIdx.x] = 0.5f * scale * total;
        }
      }
    }
  } else {
    for (int64_t base = 0; base < p.channels; base += part.step) {
      const int64_t c = base + part.first;
      float square = 0.0f;
      if (part.inside && c < p.channels) {
        float a[V], b[V];
        load_floats<V>(x + c * p.x.stride.c, a);
        load_floats<V>(y + c * p.y.stride.c, b);
        const float weight = p.weight[c * p.weight_stride];
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float u = __fmul_rn(a[e], r[e]), v = __fmul_rn(b[e], r[kPixels + e]), delta = u - v;
          sums[e] += weight * delta * u;
          sums[kPixels + e] += weight * delta * v;
          square += delta * delta;
        }
      }
      if (p.squares == nullptr) continue;
      // Neighbouring threads have the same channel: at most 64 pixels.
      __syncthreads();
      scratch[threadIdx.x] = square;
      __syncthreads();
      if (part.place == 0 && c < p.channels) {
        float total = 0.0f;
        for (int place = 0; place < p.plan.across; ++place) total += scratch[threadIdx.x + place];
        p.squares[c * gridDim.x + blockIdx.x] = 0.5f * scale * total;
      }
    }
  }
  if (p.to_x.data == nullptr && p.to_y.data == nullptr) return;
  sum_over_lanes<kRows>(p.plan, part.lane, part.place, sums, scratch);
#pragma unroll
  for (int i = 0; i < 2 * kPixels; ++i) sums[i] *= slopes[i];
  T *to_x = part.template at<T>(p.to_x), *to_y = part.template at<T>(p.to_y);
#pragma unroll 2
  for (int64_t c = part.first; part.inside && c < p.channels; c += part.step) {
    float a[V], b[V], of_x[V], of_y[V];
    load_floats<V>(x + c * p.x.stride.c, a);
    load_floats<V>(y + c * p.y.stride.c, b);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int i = kRows ? 0 : e, j = kPixels + i;
      const float u = __fmul_rn(a[e], r[i]), v = __fmul_rn(b[e], r[j]);
      const float weighted = p.weight[(c + (kRows ? e : 0)) * p.weight_stride] * (u - v);
      of_x[e] = scale * (weighted * r[i] - u * sums[i]);
      of_y[e] = scale * (v * sums[j] - weighted * r[j]);
    }
    if (p.to_x.data != nullptr) store_floats<V>(to_x + c * p.to_x.stride.c, of_x);
    if (p.to_y.data != nullptr) store_floats<V>(to_y + c * p.to_y.stride.c, of_y);
  }
}

// to[row] = the sum of `columns` neighbouring values.
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(const float* from, int64_t columns, float* to) {
  __shared__ float scratch[kThreads / kWarp];
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < columns; i += kThreads) total += from[blockIdx.x * columns + i];
  total = sum_over_block(total, scratch);
  if (threadIdx.x == 0) to[blockIdx.x] = total;
}

// ---- host -----------------------------------------------------------------------------------------------------------

template <typename Body>
void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return body(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

// body(element, vector width, rows): the widest vectors that every address, size and stride allows.
template <typename Body>
void dispatch(ScalarType type, bool vectors, bool rows, const Body& body) {
  with_type(type, [&](auto* element) {
    constexpr int kVector = kVectorBytes / sizeof(*element);
    const auto with = [&](auto width) {
      rows ? body(element, width, std::true_type{}) : body(element, width, std::false_type{});
    };
    vectors ? with(std::integral_constant<int, kVector>{}) : with(std::integral_constant<int, 1>{});
  });
}

struct Access {
  bool rows, vectors;
};

// A dimension of one element may carry any stride.
struct Check {
  int64_t B, C, S, bytes;

  bool rows(const Strides3& s) const { return s.c == 1; }
  bool vectors(const void* data, const Strides3& s, bool rows) const {
    const auto whole = [&](int64_t stride) { return stride * bytes % kVectorBytes == 0; };
    const int64_t length = rows ? C : S, other = rows ? s.s : s.c, others = rows ? S : C;
    return (rows ? s.c : s.s) == 1 && whole(length) && (others == 1 || whole(other)) && (B == 1 || whole(s.n)) &&
           reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  }
};

Access access_of(const Tensor& x, const Problem& p) {
  const Check check{x.size(0), p.channels, p.pixels, static_cast<int64_t>(x.element_size())};
  const Gradient images[] = {{const_cast<void*>(p.x.data), p.x.stride}, {const_cast<void*>(p.y.data), p.y.stride},
                             p.to_x, p.to_y};
  Access access{p.channels > 1, true};
  for (const Gradient& image : images) access.rows = access.rows && (!image.data || check.rows(image.stride));
  for (const Gradient& image : images)
    access.vectors = access.vectors && (!image.data || check.vectors(image.data, image.stride, access.rows));
  return access;
}

Problem problem_of(const Tensor& x, const Tensor& y, const Tensor& weight) {
  Problem p{};
  p.channels = x.size(1);
  p.pixels = x.numel() / (x.size(0) * x.size(1));
  p.x = {x.const_data_ptr(), strides_of(x)};
  p.y = {y.const_data_ptr(), strides_of(y)};
  p.weight = static_cast<const float*>(weight.const_data_ptr());
  p.weight_stride = weight.stride(0);
  return p;
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

void sum_rows(const char* name, const Tensor& from, int64_t rows, int64_t columns, Tensor& to, cudaStream_t stream) {
  launch(name, sum_rows_kernel, rows, kThreads, 0, stream, static_cast<const float*>(from.const_data_ptr()), columns,
         static_cast<float*>(to.mutable_data_ptr()));
}

Tensor lpips_distance(const Tensor& x, const Tensor& y, const Tensor& weight) {
  const OnDeviceOf device(x);
  const int64_t B = x.size(0);
  Tensor distance = new_floats(x, {B});
  if (B == 0) return distance;
  Problem p = problem_of(x, y, weight);
  const Access access = access_of(x, p);
  dispatch(x.scalar_type(), access.vectors, access.rows, [&](auto* element, auto width, auto rows) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr int V = decltype(width)::value;
    constexpr bool kRows = decltype(rows)::value;
    p.plan = plan(B, p.channels, p.pixels, V, kRows);
    Tensor partial = new_floats(x, {B, p.plan.tiles});
    p.partial = static_cast<float*>(partial.mutable_data_ptr());
    launch("lpips_distance", forward_kernel<T, V, kRows>, B * p.plan.tiles, kThreads, 0, device.stream(), p);
    sum_rows("lpips_distance", partial, B, p.plan.tiles, distance, device.stream());
  });
  return distance;
}

std::tuple<Tensor, Tensor, Tensor> lpips_distance_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                           const Tensor& weight, bool of_x, bool of_y,
                                                           bool of_weight) {
  const OnDeviceOf device(x);
  const int64_t B = x.size(0);
  Tensor grad_x = of_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_y = of_y ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  Tensor grad_weight = new_floats(x, {of_weight ? x.size(1) : 0});
  if (B == 0) return {grad_x, grad_y, of_weight ? torch::stable::zero_(grad_weight) : grad_weight};
  Problem p = problem_of(x, y, weight);
  p.grad = static_cast<const float*>(grad.const_data_ptr());
  p.grad_stride = grad.stride(0);
  if (of_x) p.to_x = {grad_x.mutable_data_ptr(), strides_of(grad_x)};
  if (of_y) p.to_y = {grad_y.mutable_data_ptr(), strides_of(grad_y)};
  const Access access = access_of(x, p);
  dispatch(x.scalar_type(), access.vectors, access.rows, [&](auto* element, auto width, auto rows) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr int V = decltype(width)::value;
    constexpr bool kRows = decltype(rows)::value;
    p.plan = plan(B, p.channels, p.pixels, V, kRows);
    Tensor squares = new_floats(x, {of_weight ? p.channels : 0, B * p.plan.tiles});
    p.squares = of_weight ? static_cast<float*>(squares.mutable_data_ptr()) : nullptr;
    launch("lpips_distance_backward", backward_kernel<T, V, kRows>, B * p.plan.tiles, kThreads, 0, device.stream(), p);
    if (of_weight)
      sum_rows("lpips_distance_backward", squares, p.channels, B * p.plan.tiles, grad_weight, device.stream());
  });
  return {grad_x, grad_y, grad_weight};
}

}  // namespace
}  // namespace fastdistill::cuda::lpips

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("lpips_distance.cuda", TORCH_BOX(&fastdistill::cuda::lpips::lpips_distance));
  m.impl("lpips_distance_backward.cuda", TORCH_BOX(&fastdistill::cuda::lpips::lpips_distance_backward));
}
