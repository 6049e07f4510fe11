// adversarial_loss on CUDA: all heads in one launch per direction, of up to kMostTensors heads.
//
// Forward: sums of every piece, a barrier over the grid, then the first block adds up the pieces of each head and the
// heads. Backward: pointwise. The order of every sum follows from sizes alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "device.cuh"
#include "launch.h"
#include "tensor_list.cuh"

namespace fastdistill::cuda {
namespace {

using torch::stable::Tensor;

constexpr int kSums = 4;     // of a piece: f, logits, logits > 0, logits < 0
constexpr int kColumns = 5;  // of the statistics: the means of these and of the sign
constexpr int kWarps = kPieceThreads / kWarp;

// ---- the call -------------------------------------------------------------------------------------------------------

struct Head {
  const void* logits;
  void* grad;
  int64_t count, first_piece;
  ElementType type;
  bool vectors;
};

struct Heads {
  Head entry[kMostTensors];
  int count, first, ups;  // `first`: heads in the launches before; the first `ups` of all are to be raised
  int64_t pieces;

  __device__ float sign(int i) const { return first + i < ups ? -1.0f : 1.0f; }
};

struct ForwardOutputs {
  float* partials;    // (pieces, kSums)
  float* statistics;  // (2 + all, kColumns)
  float* loss;
  int all;  // heads; the launch that has the last of them adds them up
  float weight;
};

struct BackwardInputs {
  const void* grad_loss;
  ElementType grad_type;
  float weight;
};

// ---- device ---------------------------------------------------------------------------------------------------------

// A NaN is neither above nor below 0 and must stay one: comparisons are written so that what they do not hold for is kept.
__device__ float relu(float z) { return z < 0.0f ? 0.0f : z; }

struct Hinge {
  static __device__ float value(float z) { return relu(1.0f + z); }
  static __device__ float slope(float z) { return 1.0f + z <= 0.0f ? 0.0f : 1.0f; }
};
struct Linear {
  static __device__ float value(float z) { return z; }
  static __device__ float slope(float) { return 1.0f; }
};
struct Softplus {
  static __device__ float value(float z) { return relu(z) + log1pf(__expf(-fabsf(z))); }
  static __device__ float slope(float z) { return sigmoid(z); }
};

// What all pieces of head i came to, as means, by one warp.
__device__ void store_head(const Heads& heads, const ForwardOutputs& out, int i) {
  const Head& head = heads.entry[i];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t pieces = ceil_div(head.count, kPiece);
  const float* partials = out.partials + head.first_piece * kSums;
  float total[kSums] = {};
  for (int64_t piece = lane; piece < pieces; piece += kWarp) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) total[s] += partials[piece * kSums + s];
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) total[s] = sum_over_warp(total[s]) / static_cast<float>(max(head.count, int64_t{1}));
  if (lane == 0) {
    float* row = out.statistics + int64_t{2 + heads.first + i} * kColumns;
#pragma unroll
    for (int s = 0; s < kSums; ++s) row[s] = total[s];
    row[kSums] = total[2] - total[3];
  }
}

// The mean over the heads of either kind, a thread per number; then the loss.
__device__ void store_groups(const Heads& heads, const ForwardOutputs& out, float* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 2 * kColumns) {
    const bool up = thread < kColumns;
    const int first = up ? 0 : heads.ups, last = up ? heads.ups : out.all, column = thread % kColumns;
    float total = 0.0f;
    for (int i = first; i < last; ++i) total += out.statistics[int64_t{2 + i} * kColumns + column];
    out.statistics[thread] = last > first ? total / static_cast<float>(last - first) : 0.0f;
    shared[thread] = total;
  }
  __syncthreads();
  if (thread == 0) *out.loss = out.weight * (shared[0] + shared[kColumns]);
}

template <typename Function>
__global__ void __launch_bounds__(kPieceThreads) forward_kernel(const Heads heads, const ForwardOutputs out) {
  FASTDISTILL_DYNAMIC_SHARED(raw);
  float* const shared = reinterpret_cast<float*>(raw);
  for (int64_t piece = blockIdx.x; piece < heads.pieces; piece += gridDim.x) {
    const int i = entry_of(heads.entry, heads.count, piece);
    const Head& head = heads.entry[i];
    const int64_t first = (piece - head.first_piece) * kPiece, count = min(kPiece, head.count - first);
    const float sign = heads.sign(i);
    float sums[kSums] = {};
    with_element(head.type, [&](auto* element) {
      const auto* logits = static_cast<decltype(element)>(head.logits) + first;
      for_elements(logits, count, head.vectors, [&](float v) {
        sums[0] += Function::value(sign * v);
        sums[1] += v;
        sums[2] += v > 0.0f ? 1.0f : 0.0f;
        sums[3] += v < 0.0f ? 1.0f : 0.0f;
      });
    });
    store_block_sums(sums, shared, out.partials + piece * kSums);
  }
  wait_for_all_pieces();
  if (blockIdx.x > 0) return;
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < heads.count; i += kWarps) store_head(heads, out, i);
  __syncthreads();
  if (heads.first + heads.count == out.all) store_groups(heads, out, shared);
}

template <typename Function>
__global__ void __launch_bounds__(kPieceThreads) backward_kernel(const Heads heads, const BackwardInputs in) {
  const int64_t piece = blockIdx.x;
  const int i = entry_of(heads.entry, heads.count, piece);
  const Head& head = heads.entry[i];
  const int64_t first = (piece - head.first_piece) * kPiece, count = min(kPiece, head.count - first);
  const float sign = heads.sign(i);
  float grad_loss = 0.0f;
  with_element(in.grad_type, [&](auto* element) {
    grad_loss = to_float(*static_cast<decltype(element)>(in.grad_loss));
  });
  const float scale = sign * grad_loss * (in.weight / static_cast<float>(head.count));
  with_element(head.type, [&](auto* element) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
    constexpr int V = kVectorBytes / sizeof(T);
    const T* logits = static_cast<const T*>(head.logits) + first;
    T* grad = static_cast<T*>(head.grad) + first;
    int64_t done = 0;
    if (head.vectors) {
      done = count / V * V;
#pragma unroll 2
      for (int64_t at = int64_t{threadIdx.x} * V; at < done; at += kPieceThreads * V) {
        Vector<T, V> vector = load_vector<V>(logits + at);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          vector.value[e] = from_float<T>(scale * Function::slope(sign * to_float(vector.value[e])));
        }
        store_vector(grad + at, vector);
      }
    }
    for (int64_t at = done + threadIdx.x; at < count; at += kPieceThreads) {
      grad[at] = from_float<T>(scale * Function::slope(sign * to_float(logits[at])));
    }
  });
}

// ---- host -----------------------------------------------------------------------------------------------------------

// body(a value of the function's type)
template <typename Body>
void with_function(const std::string& name, const Body& body) {
  if (name == "hinge") return body(Hinge{});
  if (name == "linear") return body(Linear{});
  STD_TORCH_CHECK(name == "softplus", "function: expected hinge, linear or softplus, got ", name);
  body(Softplus{});
}

// body(heads) for as many launches as there must be. grads: one for each head, or none.
template <typename Body>
void for_launches(const std::vector<Tensor>& logits, const std::vector<Tensor>& grads, int64_t ups, const Body& body) {
  for (size_t first = 0; first < logits.size(); first += kMostTensors) {
    Heads heads{};
    heads.first = static_cast<int>(first);
    heads.ups = static_cast<int>(ups);
    heads.count = static_cast<int>(std::min<size_t>(kMostTensors, logits.size() - first));
    for (int i = 0; i < heads.count; ++i) {
      const Tensor& t = logits[first + i];
      void* const grad = grads.empty() ? nullptr : grads[first + i].mutable_data_ptr();
      heads.entry[i] = {t.const_data_ptr(), grad,       static_cast<int64_t>(t.numel()),
                        heads.pieces,       element_type_of(t, "logits"),
                        on_vector_boundary(t.const_data_ptr()) && on_vector_boundary(grad)};
      heads.pieces += ceil_div(heads.entry[i].count, kPiece);
    }
    body(heads);
  }
}

std::tuple<Tensor, Tensor> adversarial_loss(const std::vector<Tensor>& logits, int64_t ups, const std::string& function,
                                            double weight) {
  const OnDeviceOf device(logits.front());
  const int64_t all = static_cast<int64_t>(logits.size());
  Tensor loss = new_float32(logits.front(), {}), statistics = new_float32(logits.front(), {2 + all, kColumns});
  for_launches(logits, {}, ups, [&](const Heads& heads) {
    Tensor partials = new_float32(logits.front(), {heads.pieces, kSums});
    const ForwardOutputs out{static_cast<float*>(partials.mutable_data_ptr()),
                             static_cast<float*>(statistics.mutable_data_ptr()),
                             static_cast<float*>(loss.mutable_data_ptr()), static_cast<int>(all),
                             static_cast<float>(weight)};
    with_function(function, [&](auto f) {
      const auto kernel = forward_kernel<decltype(f)>;
      constexpr int64_t kShared = std::max(kWarps * kSums, 2 * kColumns) * sizeof(float);
      launch("adversarial_loss", kernel, waiting_grid("adversarial_loss", kernel, heads.pieces, kShared),
             device.stream(), heads, out);
    });
  });
  return {loss, statistics};
}

std::vector<Tensor> adversarial_loss_backward(const Tensor& grad_loss, const std::vector<Tensor>& logits, int64_t ups,
                                              const std::string& function, double weight) {
  const OnDeviceOf device(logits.front());
  std::vector<Tensor> grads;
  for (const Tensor& t : logits) grads.push_back(torch::stable::empty_like(t));
  const BackwardInputs in{grad_loss.const_data_ptr(), element_type_of(grad_loss, "grad_loss"),
                          static_cast<float>(weight)};
  for_launches(logits, grads, ups, [&](const Heads& heads) {
    if (heads.pieces == 0) return;
    with_function(function, [&](auto f) {
      launch("adversarial_loss_backward", backward_kernel<decltype(f)>, heads.pieces, kPieceThreads, 0, device.stream(),
             heads, in);
    });
  });
  return grads;
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("adversarial_loss.cuda", TORCH_BOX(&fastdistill::cuda::adversarial_loss));
  m.impl("adversarial_loss_backward.cuda", TORCH_BOX(&fastdistill::cuda::adversarial_loss_backward));
}
