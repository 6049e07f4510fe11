// adamw on CUDA: clipping, AdamW and EMA in one sweep over a list of tensors.
//
// First a small launch decides on the device whether the step is taken, advances the step counters and leaves the factors
// of every tensor in memory; then the sweep. A warp owns 256 elements at a time, a block of the 8-bit moments; a lane has
// eight of them, in two groups of four that are side by side (16 bytes of floats) where the addresses allow it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../eight_bit.h"
#include "device.cuh"
#include "launch.h"
#include "multi_tensor.h"

namespace fastdistill::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kBlocksPerMultiprocessor = 2;
constexpr int kTile = eight_bit::kBlock;  // elements that a warp has at a time
constexpr int kOwn = kTile / kWarp;       // of them, a lane's
constexpr int64_t kChunk = 16384;         // elements of a block of threads
static_assert(kChunk % (kThreads / kWarp * kTile) == 0);

// ---- whether, and with which factors --------------------------------------------------------------------------------

// Numbers on the device are null where the call gave them as plain ones.
struct Control {
  const float *norm, *grad_scale, *found_inf, *lr_tensor, *ema_decay_tensor;
  int64_t* skipped;
  double lr, beta1, beta2, weight_decay, ema_decay;
  float max_grad_norm;
  bool maximize;
};

// In memory, one of the call and one of each tensor.
struct alignas(16) CallFactors {
  float taken;  // 0 or 1
  float grad, decay, ema_weight;
};
struct alignas(16) TensorFactors {
  float step_size, inverse_root, step, unused;
};
static_assert(sizeof(CallFactors) == sizeof(TensorFactors));

constexpr int kStepTensors = 480;
struct StepTable {
  float* step[kStepTensors];
  int count;
};
static_assert(sizeof(StepTable) + sizeof(Control) + 3 * sizeof(void*) <= kParameterBytes);

// `skipped` is counted and `call` written by the first launch of a call, which is given them.
__global__ void __launch_bounds__(kStepTensors) advance_kernel(const StepTable table, const Control control,
                                                               CallFactors* call, TensorFactors* tensors) {
  const float scale = control.grad_scale ? *control.grad_scale : 1.0f;
  const float norm = *control.norm / scale;
  // False for NaN too.
  const bool taken = norm <= 3.402823466e38f && (!control.found_inf || *control.found_inf == 0.0f);
  const double lr = control.lr_tensor ? *control.lr_tensor : control.lr;
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0 && call) {
    const float bound = control.max_grad_norm / (norm + 1e-6f), clip = bound < 1.0f ? bound : 1.0f;
    const double decay = control.ema_decay_tensor ? *control.ema_decay_tensor : control.ema_decay;
    *call = {taken ? 1.0f : 0.0f, (control.maximize ? -clip : clip) / scale,
             static_cast<float>(1.0 - lr * control.weight_decay), static_cast<float>(1.0 - decay)};
    if (!taken && control.skipped) ++*control.skipped;
  }
  if (i < table.count && taken) {
    const float step = *table.step[i] + 1.0f;
    *table.step[i] = step;
    tensors[i] = {static_cast<float>(lr / (1.0 - pow(control.beta1, static_cast<double>(step)))),
                  static_cast<float>(1.0 / sqrt(1.0 - pow(control.beta2, static_cast<double>(step)))), step, 0.0f};
  }
}

// ---- the sweep ------------------------------------------------------------------------------------------------------

struct Entry {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float *master, *ema;
  float *exp_avg_scale, *exp_avg_sq_scale;
  int64_t elements;
};

constexpr int kTensors = 50;
using Table = TensorTable<Entry, kTensors>;

struct Sweep {
  const CallFactors* call;
  const TensorFactors* tensors;  // of the table's, in its order
  float one_minus_beta1, beta2, one_minus_beta2, eps;
};
static_assert(sizeof(Table) + sizeof(Sweep) <= kParameterBytes);

template <typename T, bool kEightBits>
__device__ bool aligned(const Entry& e) {
  constexpr uintptr_t kElements = 4;
  // `master` and `ema` may be null, which is aligned.
  const uintptr_t floats = reinterpret_cast<uintptr_t>(e.master) | reinterpret_cast<uintptr_t>(e.ema);
  const uintptr_t moments = reinterpret_cast<uintptr_t>(e.exp_avg) | reinterpret_cast<uintptr_t>(e.exp_avg_sq);
  const uintptr_t elements = reinterpret_cast<uintptr_t>(e.param) | reinterpret_cast<uintptr_t>(e.grad);
  return floats % 16 == 0 && moments % (kEightBits ? kElements : 16) == 0 && elements % (kElements * sizeof(T)) == 0;
}

// Where a lane's elements lie in a tile: groups of V neighbours.
template <int V>
__device__ int place(int group) {
  return (group * kWarp + static_cast<int>(threadIdx.x) % kWarp) * V;
}

// A lane's elements of the tile at `from`, `count` of which exist; the others are 0.
template <int V, typename T, typename Value, typename Convert>
__device__ void load_own(Value (&to)[kOwn], const T* from, int count, const Convert& convert) {
#pragma unroll
  for (int group = 0; group < kOwn / V; ++group) {
    const int at = place<V>(group);
    Vector<T, V> values{};
    if (V > 1 || at < count) values = load_vector<V>(from + at);
#pragma unroll
    for (int e = 0; e < V; ++e) to[group * V + e] = convert(values.value[e]);
  }
}

template <int V, typename T, typename Value, typename Convert>
__device__ void store_own(T* to, const Value (&from)[kOwn], int count, const Convert& convert) {
#pragma unroll
  for (int group = 0; group < kOwn / V; ++group) {
    const int at = place<V>(group);
    Vector<T, V> values;
#pragma unroll
    for (int e = 0; e < V; ++e) values.value[e] = convert(from[group * V + e]);
    if (V > 1 || at < count) store_vector(to + at, values);
  }
}

struct Widen {
  template <typename T>
  __device__ float operator()(T value) const {
    return to_float(value);
  }
};
template <typename T>
struct Narrow {
  __device__ T operator()(float value) const { return from_float<T>(value); }
};

__device__ inline float largest_of_warp(const float (&values)[kOwn]) {
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) result = fmaxf(result, fabsf(values[i]));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    result = fmaxf(result, __shfl_xor_sync(0xffffffffu, result, offset));
  }
  return result;
}

template <int V>
__device__ void load_moments(float (&m)[kOwn], float (&v)[kOwn], const Entry& e, int64_t tile, int count) {
  const float first_scale = e.exp_avg_scale[tile / kTile], second_scale = e.exp_avg_sq_scale[tile / kTile];
  load_own<V>(m, static_cast<const uint8_t*>(e.exp_avg) + tile, count,
              [&](uint8_t code) { return __uint_as_float(eight_bit::decode_first(code)) * first_scale; });
  load_own<V>(v, static_cast<const uint8_t*>(e.exp_avg_sq) + tile, count,
              [&](uint8_t code) { return __uint_as_float(eight_bit::decode_second(code)) * second_scale; });
}

template <int V>
__device__ void store_moments(const float (&m)[kOwn], const float (&v)[kOwn], const Entry& e, int64_t tile, int count,
                              float step) {
  const float first_scale = largest_of_warp(m), second_scale = largest_of_warp(v);
  if (threadIdx.x % kWarp == 0) {
    e.exp_avg_scale[tile / kTile] = first_scale;
    e.exp_avg_sq_scale[tile / kTile] = second_scale;
  }
  const float first_divisor = first_scale > 0.0f ? first_scale : 1.0f;
  const float second_divisor = second_scale > 0.0f ? second_scale : 1.0f;
  uint32_t first[kOwn], second[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t element = static_cast<uint32_t>(tile + place<V>(i / V) + i % V);
    const uint32_t random = eight_bit::random_bits(element, static_cast<uint32_t>(step));
    const float magnitude = fabsf(m[i]) / first_divisor, square = v[i] / second_divisor;
    const uint32_t threshold = __float_as_uint(eight_bit::first_threshold(random));
    first[i] = eight_bit::encode_first(__float_as_uint(magnitude), threshold, random) | __float_as_uint(m[i]) >> 31 << 7;
    second[i] = eight_bit::encode_second(__float_as_uint(square), random);
  }
  const auto narrow = [](uint32_t code) { return static_cast<uint8_t>(code); };
  store_own<V>(static_cast<uint8_t*>(e.exp_avg) + tile, first, count, narrow);
  store_own<V>(static_cast<uint8_t*>(e.exp_avg_sq) + tile, second, count, narrow);
}

template <typename T, bool kEightBits, int V>
__device__ void sweep_tile(const Entry& e, const Sweep& s, const CallFactors& call, const TensorFactors& of,
                           int64_t tile) {
  constexpr bool kMaster = sizeof(T) == 2;
  const int64_t left = e.elements - tile;
  const int count = left < kTile ? static_cast<int>(left) : kTile;
  T* const param = static_cast<T*>(e.param) + tile;
  float p[kOwn], g[kOwn], m[kOwn], v[kOwn], a[kOwn];
  load_own<V>(g, static_cast<const T*>(e.grad) + tile, count, Widen());
  if constexpr (kEightBits) {
    load_moments<V>(m, v, e, tile, count);
  } else {
    load_own<V>(m, static_cast<const float*>(e.exp_avg) + tile, count, Widen());
    load_own<V>(v, static_cast<const float*>(e.exp_avg_sq) + tile, count, Widen());
  }
  if constexpr (kMaster) {
    load_own<V>(p, e.master + tile, count, Widen());
  } else {
    load_own<V>(p, param, count, Widen());
  }
  if (e.ema) load_own<V>(a, e.ema + tile, count, Widen());
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float grad = g[i] * call.grad;
    m[i] += s.one_minus_beta1 * (grad - m[i]);
    v[i] = s.beta2 * v[i] + s.one_minus_beta2 * grad * grad;
    p[i] = p[i] * call.decay - of.step_size * m[i] / (sqrtf(v[i]) * of.inverse_root + s.eps);
  }
  store_own<V>(param, p, count, Narrow<T>());
  if constexpr (kMaster) store_own<V>(e.master + tile, p, count, Widen());
  if constexpr (kEightBits) {
    store_moments<V>(m, v, e, tile, count, of.step);
  } else {
    store_own<V>(static_cast<float*>(e.exp_avg) + tile, m, count, Widen());
    store_own<V>(static_cast<float*>(e.exp_avg_sq) + tile, v, count, Widen());
  }
  if (e.ema) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) a[i] += call.ema_weight * (p[i] - a[i]);
    store_own<V>(e.ema + tile, a, count, Widen());
  }
}

// Left to itself the compiler overlaps tiles in 254 registers, and one block fills a multiprocessor.
template <typename T, bool kEightBits>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) sweep_kernel(const Table table, const Sweep s) {
  const CallFactors call = *s.call;
  if (call.taken == 0.0f) return;
  const int block = static_cast<int>(blockIdx.x), tensor = table.find(block);
  const Entry e = table.entry[tensor];
  const TensorFactors of = s.tensors[tensor];
  const int64_t begin = int64_t{block - table.first_block[tensor]} * kChunk;
  const int64_t end = begin + kChunk < e.elements ? begin + kChunk : e.elements;
  const bool vectors = aligned<T, kEightBits>(e);
#pragma unroll 1
  for (int64_t tile = begin + threadIdx.x / kWarp * kTile; tile < end; tile += kThreads / kWarp * kTile) {
    if (vectors && tile + kTile <= end) {
      sweep_tile<T, kEightBits, 4>(e, s, call, of, tile);
    } else {
      sweep_tile<T, kEightBits, 1>(e, s, call, of, tile);
    }
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

const float* number(const std::optional<Tensor>& scalar) {
  return scalar ? static_cast<const float*>(scalar->const_data_ptr()) : nullptr;
}

template <typename T>
T* data_of(const std::vector<Tensor>& tensors, size_t i) {
  return tensors.empty() ? nullptr : static_cast<T*>(tensors[i].mutable_data_ptr());
}

template <typename T>
void launch_sweep(bool eight_bits, const Table& table, int64_t blocks, const Sweep& s, cudaStream_t stream) {
  launch("adamw", eight_bits ? sweep_kernel<T, true> : sweep_kernel<T, false>, blocks, kThreads, 0, stream, table, s);
}

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> masters,
           std::vector<Tensor> emas, std::vector<Tensor> scales, std::optional<Tensor> skipped, Tensor norm,
           std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> lr_tensor,
           std::optional<Tensor> ema_decay_tensor, double lr, double beta1, double beta2, double eps,
           double weight_decay, double max_grad_norm, double ema_decay, bool maximize) {
  STD_TORCH_CHECK(!params.empty(), "params: at least one parameter is needed");
  const OnDeviceOf device(params[0]);
  const cudaStream_t stream = device.stream();
  const ScalarType type = params[0].scalar_type();
  const bool eight_bits = !scales.empty();

  Control control{};
  control.norm = static_cast<const float*>(norm.const_data_ptr());
  control.grad_scale = number(grad_scale);
  control.found_inf = number(found_inf);
  control.lr_tensor = number(lr_tensor);
  control.ema_decay_tensor = number(ema_decay_tensor);
  control.skipped = skipped ? static_cast<int64_t*>(skipped->mutable_data_ptr()) : nullptr;
  control.lr = lr;
  control.beta1 = beta1;
  control.beta2 = beta2;
  control.weight_decay = weight_decay;
  control.max_grad_norm = static_cast<float>(max_grad_norm);
  control.ema_decay = ema_decay;
  control.maximize = maximize;

  const int64_t count = static_cast<int64_t>(params.size());
  Tensor factors = torch::stable::new_empty(params[0], {count + 1, 4}, ScalarType::Float);
  auto* const call = static_cast<CallFactors*>(factors.mutable_data_ptr());
  auto* const of_tensors = reinterpret_cast<TensorFactors*>(call + 1);
  for (int64_t first = 0; first < count; first += kStepTensors) {
    StepTable table{};
    table.count = static_cast<int>(count - first < kStepTensors ? count - first : kStepTensors);
    for (int i = 0; i < table.count; ++i) {
      table.step[i] = static_cast<float*>(steps[static_cast<size_t>(first + i)].mutable_data_ptr());
    }
    launch("adamw", advance_kernel, 1, kStepTensors, 0, stream, table, control, first == 0 ? call : nullptr,
           of_tensors + first);
  }

  Sweep s{};
  s.call = call;
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.eps = static_cast<float>(eps);
  size_t last = 0;
  const auto entry = [&](size_t i) {
    last = i;
    Entry e{};
    e.param = params[i].mutable_data_ptr();
    e.grad = grads[i].const_data_ptr();
    e.exp_avg = exp_avgs[i].mutable_data_ptr();
    e.exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr();
    e.master = data_of<float>(masters, i);
    e.ema = data_of<float>(emas, i);
    e.exp_avg_scale = data_of<float>(scales, i);
    e.exp_avg_sq_scale = eight_bits ? e.exp_avg_scale + scales[i].size(1) : nullptr;
    e.elements = params[i].numel();
    return e;
  };
  // A table's tensors are neighbours in the list, so that its factors are those from its first on.
  const auto behind_a_gap = [&](size_t i) { return i != last + 1; };
  for_tables<Entry, kTensors>(
      params.size(), kChunk, entry, [&](size_t i) { return params[i].numel(); }, behind_a_gap,
      [&](const Table& table, int64_t blocks) {
        s.tensors = of_tensors + (last + 1 - static_cast<size_t>(table.count));
        const auto sweep = type == ScalarType::Half       ? launch_sweep<__half>
                           : type == ScalarType::BFloat16 ? launch_sweep<__nv_bfloat16>
                                                          : launch_sweep<float>;
        sweep(eight_bits, table, blocks, s, stream);
      });
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) { m.impl("adamw.cuda", TORCH_BOX(&fastdistill::cuda::adamw)); }
