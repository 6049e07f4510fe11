// gradient_norm on CUDA: the sum of squares of each chunk, then their sum and its root in one block. No atomics: the same
// order, and the same result, every time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "device.cuh"
#include "launch.h"
#include "multi_tensor.h"

namespace fastdistill::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kCombineThreads = 1024;
constexpr int64_t kChunk = 65536;  // elements of a block
constexpr int kInFlight = 4;       // loads that a thread has under way

struct Entry {
  const void* data;
  int64_t elements;
};

constexpr int kTensors = 200;
using Table = TensorTable<Entry, kTensors>;
static_assert(sizeof(Table) + 2 * sizeof(void*) <= kParameterBytes);

template <int V, typename T>
__device__ float sum_of_squares(const T* from, int64_t count) {
  float total[kInFlight] = {};
  const int64_t vectors = count / V;
  for (int64_t i = threadIdx.x; i < vectors; i += kInFlight * kThreads) {
    Vector<T, V> x[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t at = i + j * kThreads;
      if (at < vectors) x[j] = load_vector<V>(from + at * V);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j * kThreads >= vectors) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float value = to_float(x[j].value[e]);
        total[j] += value * value;
      }
    }
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) partial_kernel(const Table table, float* partial) {
  __shared__ float scratch[kThreads / kWarp];
  constexpr int V = kVectorBytes / sizeof(T);
  const int block = static_cast<int>(blockIdx.x), tensor = table.find(block);
  const Entry entry = table.entry[tensor];
  const int64_t first = int64_t{block - table.first_block[tensor]} * kChunk;
  const int64_t left = entry.elements - first, count = left < kChunk ? left : kChunk;
  const T* from = static_cast<const T*>(entry.data) + first;
  float total;
  if (reinterpret_cast<uintptr_t>(from) % kVectorBytes == 0) {
    const int64_t whole = count / V * V;
    total = sum_of_squares<V>(from, whole) + sum_of_squares<1>(from + whole, count - whole);
  } else {
    total = sum_of_squares<1>(from, count);
  }
  total = sum_over_block(total, scratch);
  if (threadIdx.x == 0) partial[block] = total;
}

__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const float* partial, int64_t count, float* norm) {
  __shared__ float scratch[kCombineThreads / kWarp];
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kCombineThreads) total += partial[i];
  total = sum_over_block(total, scratch);
  if (threadIdx.x == 0) *norm = sqrtf(total);
}

template <typename T>
void launch_partial(const Table& table, int64_t blocks, float* partial, cudaStream_t stream) {
  launch("gradient_norm", partial_kernel<T>, blocks, kThreads, 0, stream, table, partial);
}

Tensor gradient_norm(std::vector<Tensor> grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: at least one gradient is needed");
  const OnDeviceOf device(grads[0]);
  int64_t chunks = 0;
  for (const Tensor& g : grads) chunks += ceil_div(g.numel(), kChunk);
  Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(grads[0], {chunks}, ScalarType::Float);
  float* const sums = static_cast<float*>(partial.mutable_data_ptr());
  int64_t done = 0;
  ScalarType type{};
  for_tables<Entry, kTensors>(
      grads.size(), kChunk,
      [&](size_t i) {
        type = grads[i].scalar_type();
        return Entry{grads[i].const_data_ptr(), grads[i].numel()};
      },
      [&](size_t i) { return grads[i].numel(); }, [&](size_t i) { return grads[i].scalar_type() != type; },
      [&](const Table& table, int64_t blocks) {
        const auto partial_of = type == ScalarType::Half       ? launch_partial<__half>
                                : type == ScalarType::BFloat16 ? launch_partial<__nv_bfloat16>
                                                               : launch_partial<float>;
        partial_of(table, blocks, sums + done, device.stream());
        done += blocks;
      });
  launch("gradient_norm", combine_kernel, 1, kCombineThreads, 0, device.stream(), static_cast<const float*>(sums),
         chunks, static_cast<float*>(norm.mutable_data_ptr()));
  return norm;
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("gradient_norm.cuda", TORCH_BOX(&fastdistill::cuda::gradient_norm));
}
