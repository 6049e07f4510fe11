// dmd_gradient on CUDA: guidance, conversion to data, normaliser, guard, gradient, loss and statistics.
//
// One cooperative launch where the differences of the predictions fit on chip: every input is read once, and the blocks
// wait for the grid twice, for the normaliser of each sample and for the sums of all. Otherwise three launches, which
// read the predictions twice. A grid barrier was taken before clusters and a second launch: it serves samples of any
// size with the same code, and the sums over samples need it anyway. Partial sums lie in a workspace and are added in
// order: nothing is atomic. dmd_gradient_plan.h says which block does what.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../dmd_gradient.h"
#include "device.cuh"
#include "dmd_gradient_plan.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

using namespace dmd_gradient;
using dmd_gradient_plan::kElements;
using dmd_gradient_plan::kThreads;
using dmd_gradient_plan::Plan;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSharedBytes = kThreads * sizeof(double);

enum { kSquares, kMagnitudes, kGuarded, kSums };

struct Problem {
  Plan plan;
  int64_t elements;  // of a sample
  Samples x, x_t, real, fake, uncond;
  Terms terms;
  Coefficient alpha, sigma;
  float guidance_scale, scale;
  float *loss, *gradient, *normaliser, *grad_abs_mean;
  int64_t* guarded;
  float *distances, *sums;  // (blocks) and (kSums, blocks): a workspace
};

// ---- device ---------------------------------------------------------------------------------------------------------

// V elements, 16 bytes at once where there are as many.
template <int V, typename T>
__device__ void read(const T* from, float (&to)[V]) {
  constexpr int kPart = V * sizeof(T) <= kVectorBytes ? V : kVectorBytes / sizeof(T);
#pragma unroll
  for (int part = 0; part < V; part += kPart) {
    const Vector<T, kPart> values = load_past_l1<kPart>(from + part);
#pragma unroll
    for (int e = 0; e < kPart; ++e) to[part + e] = to_float(values.value[e]);
  }
}

template <int V, typename T>
__device__ void write(T* to, const float (&from)[V]) {
  constexpr int kPart = V * sizeof(T) <= kVectorBytes ? V : kVectorBytes / sizeof(T);
#pragma unroll
  for (int part = 0; part < V; part += kPart) {
    Vector<T, kPart> values;
#pragma unroll
    for (int e = 0; e < kPart; ++e) values.value[e] = from_float<T>(from[part + e]);
    store_vector(to + part, values);
  }
}

// The run of vectors of this block.
struct Piece {
  int64_t sample, first, last;

  __device__ Piece(const Problem& p, int vector) {
    sample = blockIdx.x / p.plan.splits;
    const int64_t vectors = p.elements / vector;
    first = blockIdx.x % p.plan.splits * p.plan.vectors_each;
    last = first + p.plan.vectors_each < vectors ? first + p.plan.vectors_each : vectors;
  }

  template <typename T>
  __device__ const T* of(const Samples& t) const {
    return static_cast<const T*>(t.data) + sample * t.stride;
  }
};

template <typename P, int V>
__device__ void read_real(const Problem& p, const Piece& piece, int64_t i, float (&real)[V]) {
  read<V>(piece.of<P>(p.real) + i, real);
  if (p.uncond.data == nullptr) return;
  float uncond[V];
  read<V>(piece.of<P>(p.uncond) + i, uncond);
#pragma unroll
  for (int e = 0; e < V; ++e) real[e] = uncond[e] + p.guidance_scale * (real[e] - uncond[e]);
}

// Sum of |x - mu_real| over the elements from i on; `real` is the guided prediction.
template <typename X, typename XT, int V>
__device__ float distance(const Problem& p, const Piece& piece, int64_t i, const ToData& to_data,
                          const float (&real)[V]) {
  float x[V], x_t[V] = {};
  read<V>(piece.of<X>(p.x) + i, x);
  if (p.x_t.data != nullptr) read<V>(piece.of<XT>(p.x_t) + i, x_t);
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < V; ++e) total += fabsf(x[e] - (to_data.from_x_t * x_t[e] + to_data.from_pred * real[e]));
  return total;
}

// Stores scale * g, g = factor * difference, 0 where that is not finite. A guarded sample has no finite factor.
template <int V>
__device__ void store_gradient(const Problem& p, const Piece& piece, int64_t i, float factor,
                               const float (&difference)[V], float (&sums)[kSums]) {
  float g[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float value = factor * difference[e];
    const bool finite = value - value == 0.0f;
    g[e] = finite ? value : 0.0f;
    sums[kSquares] += g[e] * g[e];
    sums[kMagnitudes] += fabsf(g[e]);
    sums[kGuarded] += finite ? 0.0f : 1.0f;
    g[e] *= p.scale;
  }
  write<V>(p.gradient + piece.sample * p.elements + i, g);
}

// Over the values of all threads, in every thread, in a fixed order.
template <typename T>
__device__ T tree_sum(T value, unsigned char* shared) {
  T* const values = reinterpret_cast<T*>(shared);
  values[threadIdx.x] = value;
  __syncthreads();
  for (unsigned offset = kThreads / 2; offset > 0; offset /= 2) {
    if (threadIdx.x < offset) values[threadIdx.x] += values[threadIdx.x + offset];
    __syncthreads();
  }
  const T total = values[0];
  __syncthreads();
  return total;
}

__device__ void publish(float* to, float value, unsigned char* shared) {
  const float total = sum_over_block(value, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) to[blockIdx.x] = total;
}

__device__ void publish_sums(const Problem& p, const float (&sums)[kSums], unsigned char* shared) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) publish(p.sums + k * int64_t{gridDim.x}, sums[k], shared);
}

__device__ ToData to_data_of(const Problem& p, int64_t sample) {
  return ToData(p.terms, p.alpha.of(sample), p.sigma.of(sample));
}

// What the differences of this block's sample are multiplied with; NaN where the sample is guarded.
__device__ float factor_of(const Problem& p, const Piece& piece, float from_pred, unsigned char* shared) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.plan.splits; i += kThreads) sum += p.distances[piece.sample * p.plan.splits + i];
  const float mean = static_cast<float>(tree_sum(sum, shared) / static_cast<double>(p.elements));
  if (blockIdx.x % p.plan.splits == 0 && threadIdx.x == 0) p.normaliser[piece.sample] = mean;
  const bool usable = mean >= kNormaliserBound && mean - mean == 0.0f;
  return usable ? from_pred / mean : NAN;
}

// By one block, over what all blocks have left.
__device__ void finish(const Problem& p, unsigned char* shared) {
  const int64_t blocks = p.plan.blocks();
  double squares = 0, magnitudes = 0;
  int64_t guarded = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    squares += p.sums[kSquares * blocks + i];
    magnitudes += p.sums[kMagnitudes * blocks + i];
    guarded += static_cast<int64_t>(p.sums[kGuarded * blocks + i]);
  }
  squares = tree_sum(squares, shared);
  magnitudes = tree_sum(magnitudes, shared);
  guarded = tree_sum(guarded, shared);
  if (threadIdx.x != 0) return;
  const double numel = static_cast<double>(p.plan.samples * p.elements);
  *p.loss = static_cast<float>(0.5 * squares / numel);
  *p.grad_abs_mean = static_cast<float>(magnitudes / numel);
  *p.guarded = guarded;
}

template <typename X, typename XT, typename P, int V>
__global__ void __launch_bounds__(kThreads, 1) whole_kernel(const Problem p) {
  FASTDISTILL_DYNAMIC_SHARED(shared);
  constexpr int kVectors = kElements / V;
  const Piece piece(p, V);
  const ToData to_data = to_data_of(p, piece.sample);
  float difference[kVectors][V], total = 0.0f;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int64_t vector = piece.first + threadIdx.x + j * kThreads;
    if (vector >= piece.last) continue;
    float real[V];
    read_real<P>(p, piece, vector * V, real);
    read<V>(piece.of<P>(p.fake) + vector * V, difference[j]);
    total += distance<X, XT>(p, piece, vector * V, to_data, real);
#pragma unroll
    for (int e = 0; e < V; ++e) difference[j][e] -= real[e];
  }
  publish(p.distances, total, shared);
  wait_for_grid();
  const float factor = factor_of(p, piece, to_data.from_pred, shared);
  float sums[kSums] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int64_t vector = piece.first + threadIdx.x + j * kThreads;
    if (vector < piece.last) store_gradient(p, piece, vector * V, factor, difference[j], sums);
  }
  publish_sums(p, sums, shared);
  wait_for_grid();
  if (blockIdx.x == 0) finish(p, shared);
}

template <typename X, typename XT, typename P, int V>
__global__ void __launch_bounds__(kThreads) distance_kernel(const Problem p) {
  FASTDISTILL_DYNAMIC_SHARED(shared);
  const Piece piece(p, V);
  const ToData to_data = to_data_of(p, piece.sample);
  float total = 0.0f;
#pragma unroll 2
  for (int64_t vector = piece.first + threadIdx.x; vector < piece.last; vector += kThreads) {
    float real[V];
    read_real<P>(p, piece, vector * V, real);
    total += distance<X, XT>(p, piece, vector * V, to_data, real);
  }
  publish(p.distances, total, shared);
}

template <typename P, int V>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const Problem p) {
  FASTDISTILL_DYNAMIC_SHARED(shared);
  const Piece piece(p, V);
  const float factor = factor_of(p, piece, to_data_of(p, piece.sample).from_pred, shared);
  float sums[kSums] = {};
#pragma unroll 2
  for (int64_t vector = piece.first + threadIdx.x; vector < piece.last; vector += kThreads) {
    float real[V], difference[V];
    read_real<P>(p, piece, vector * V, real);
    read<V>(piece.of<P>(p.fake) + vector * V, difference);
#pragma unroll
    for (int e = 0; e < V; ++e) difference[e] -= real[e];
    store_gradient(p, piece, vector * V, factor, difference, sums);
  }
  publish_sums(p, sums, shared);
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const Problem p) {
  FASTDISTILL_DYNAMIC_SHARED(shared);
  finish(p, shared);
}

// grad_x = grad_loss * gradient
template <typename X, int V>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* grad_loss, const float* gradient, X* grad_x, const int64_t numel) {
  const float factor = *grad_loss;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (first + V <= numel) {
    float g[V];
    read<V>(gradient + first, g);
#pragma unroll
    for (int e = 0; e < V; ++e) g[e] *= factor;
    write<V>(grad_x + first, g);
  } else {
    for (int64_t i = first; i < numel; ++i) grad_x[i] = from_float<X>(gradient[i] * factor);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

bool starts_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; }

// Whether every vector of every sample starts at a multiple of 16 bytes.
bool aligned(const Samples& t, int64_t samples) {
  return t.data == nullptr || (starts_aligned(t.data) && (samples == 1 || t.stride * t.bytes % kVectorBytes == 0));
}

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>) with the element type of `type`.
template <typename Body>
void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return body(Type<__half>{});
    case ScalarType::BFloat16:
      return body(Type<__nv_bfloat16>{});
    case ScalarType::Float:
      return body(Type<float>{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

// Calls body(Type<float>) or body(Type<P>): x and x_t are float32 or have the type of the predictions.
template <typename P, typename Body>
void dispatch_beside(ScalarType type, const Body& body) {
  type == ScalarType::Float ? body(Type<float>{}) : body(Type<P>{});
}

template <typename X, typename XT, typename P, int V>
void run(Problem p, const Tensor& x, cudaStream_t stream) {
  const int64_t samples = x.size(0), vectors = p.elements / V;
  p.plan = dmd_gradient_plan::plan(samples, vectors, V, current_device_limits());
  const Grid together{p.plan.blocks(), kThreads, kSharedBytes, 1, true};
  const bool whole = p.plan.whole && all_resident("dmd_gradient", whole_kernel<X, XT, P, V>, together);
  if (!whole) p.plan = dmd_gradient_plan::sweep_plan(samples, vectors, V);
  const int64_t blocks = p.plan.blocks();
  Tensor workspace = torch::stable::new_empty(x, {(1 + kSums) * blocks}, ScalarType::Float);
  p.distances = static_cast<float*>(workspace.mutable_data_ptr());
  p.sums = p.distances + blocks;
  if (whole) {
    launch("dmd_gradient", whole_kernel<X, XT, P, V>, together, stream, p);
    return;
  }
  launch("dmd_gradient, distance", distance_kernel<X, XT, P, V>, blocks, kThreads, kSharedBytes, stream, p);
  launch("dmd_gradient, gradient", gradient_kernel<P, V>, blocks, kThreads, kSharedBytes, stream, p);
  launch("dmd_gradient, sums", finish_kernel, 1, kThreads, kSharedBytes, stream, p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, std::optional<Tensor> x_t, const Tensor& pred_real, const Tensor& pred_fake,
    std::optional<Tensor> pred_real_uncond, std::optional<Tensor> alpha, std::optional<Tensor> sigma, double alpha_value,
    double sigma_value, double data, double data_sigma, double noise, double noise_alpha, double guidance_scale,
    double scale) {
  const OnDeviceOf device(x);
  const int64_t samples = x.size(0);
  Tensor gradient = new_gradient(x);
  Tensor normaliser = new_tensor(x, {samples}, {1}, aoti_torch_dtype_float32());
  Tensor loss = new_tensor(x, {}, {}, aoti_torch_dtype_float32());
  Tensor grad_abs_mean = new_tensor(x, {}, {}, aoti_torch_dtype_float32());
  Tensor guarded = new_tensor(x, {}, {}, aoti_torch_dtype_int64());
  Problem p{};
  p.elements = x.numel() / samples;
  p.x = Samples(x);
  p.x_t = Samples(x_t);
  p.real = Samples(pred_real);
  p.fake = Samples(pred_fake);
  p.uncond = Samples(pred_real_uncond);
  p.terms = {static_cast<float>(data), static_cast<float>(data_sigma), static_cast<float>(noise),
             static_cast<float>(noise_alpha)};
  p.alpha = coefficient(alpha, alpha_value);
  p.sigma = coefficient(sigma, sigma_value);
  p.guidance_scale = static_cast<float>(guidance_scale);
  p.scale = static_cast<float>(scale);
  p.loss = static_cast<float*>(loss.mutable_data_ptr());
  p.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  p.normaliser = static_cast<float*>(normaliser.mutable_data_ptr());
  p.grad_abs_mean = static_cast<float*>(grad_abs_mean.mutable_data_ptr());
  p.guarded = static_cast<int64_t*>(guarded.mutable_data_ptr());
  bool vectors = starts_aligned(p.gradient);
  for (const Samples& t : {p.x, p.x_t, p.real, p.fake, p.uncond}) vectors = vectors && aligned(t, samples);

  const ScalarType x_type = x.scalar_type(), x_t_type = x_t ? x_t->scalar_type() : x_type;
  dispatch(pred_real.scalar_type(), [&](auto predictions) {
    using P = typename decltype(predictions)::type;
    constexpr int kVector = kVectorBytes / sizeof(P);
    dispatch_beside<P>(x_type, [&](auto of_x) {
      dispatch_beside<P>(x_t_type, [&](auto of_x_t) {
        using X = typename decltype(of_x)::type;
        using XT = typename decltype(of_x_t)::type;
        vectors && p.elements % kVector == 0 ? run<X, XT, P, kVector>(p, x, device.stream())
                                             : run<X, XT, P, 1>(p, x, device.stream());
      });
    });
  });
  return {loss, gradient, normaliser, grad_abs_mean, guarded};
}

Tensor backward(const Tensor& grad_loss, const Tensor& gradient, ScalarType dtype) {
  const OnDeviceOf device(gradient);
  const std::vector<int64_t> sizes(gradient.sizes().begin(), gradient.sizes().end());
  const std::vector<int64_t> strides(gradient.strides().begin(), gradient.strides().end());
  const int32_t type = dtype == ScalarType::Half       ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  Tensor grad_x = new_tensor(gradient, sizes, strides, type);
  const float* const factor = static_cast<const float*>(grad_loss.const_data_ptr());
  const float* const g = static_cast<const float*>(gradient.const_data_ptr());
  const int64_t numel = gradient.numel();
  dispatch(dtype, [&](auto of_x) {
    using X = typename decltype(of_x)::type;
    constexpr int kVector = kVectorBytes / sizeof(X);
    X* const to = static_cast<X*>(grad_x.mutable_data_ptr());
    const bool vectors = starts_aligned(g) && starts_aligned(to);
    const int64_t blocks = ceil_div(ceil_div(numel, vectors ? kVector : 1), kThreads);
    launch("dmd_gradient_backward", vectors ? backward_kernel<X, kVector> : backward_kernel<X, 1>, blocks, kThreads, 0,
           device.stream(), factor, g, to, numel);
  });
  return grad_x;
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("dmd_gradient.cuda", TORCH_BOX(&fastdistill::cuda::forward));
  m.impl("dmd_gradient_backward.cuda", TORCH_BOX(&fastdistill::cuda::backward));
}
