// squared_norm on CUDA: the samples of all tensors in one launch of up to kMostTensors tensors.
//
// Sums of every piece, a barrier over the grid, then a warp per sample adds up its pieces, in an order that follows from
// sizes alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "device.cuh"
#include "launch.h"
#include "tensor_list.cuh"

namespace fastdistill::cuda {
namespace {

using torch::stable::Tensor;

constexpr int kWarps = kPieceThreads / kWarp;

// Of every sample, dense and `stride` elements after the one before. The first sample's pieces come first, then the
// second's: those of a tensor begin at `first_piece` in each.
struct Source {
  const void* data;
  int64_t stride, size, first_piece;
  ElementType type;
  bool vectors;
};

struct Sources {
  Source entry[kMostTensors];
  int count;
  int64_t samples, pieces;  // `pieces` of one sample
  bool adds;                // to what the launches before have found
};

__global__ void __launch_bounds__(kPieceThreads) squared_norm_kernel(const Sources p, float* partials, float* result) {
  FASTDISTILL_DYNAMIC_SHARED(raw);
  for (int64_t task = blockIdx.x; task < p.samples * p.pieces; task += gridDim.x) {
    const int64_t sample = task / p.pieces, piece = task % p.pieces;
    const Source& source = p.entry[entry_of(p.entry, p.count, piece)];
    const int64_t first = (piece - source.first_piece) * kPiece, count = min(kPiece, source.size - first);
    float total[1] = {};
    with_element(source.type, [&](auto* element) {
      const auto* data = static_cast<decltype(element)>(source.data) + sample * source.stride + first;
      for_elements(data, count, source.vectors, [&](float v) { total[0] += v * v; });
    });
    store_block_sums(total, reinterpret_cast<float*>(raw), partials + task);
  }
  wait_for_all_pieces();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t sample = int64_t{blockIdx.x} * kWarps + warp; sample < p.samples; sample += int64_t{gridDim.x} * kWarps) {
    float total = 0.0f;
    for (int64_t piece = lane; piece < p.pieces; piece += kWarp) total += partials[sample * p.pieces + piece];
    total = sum_over_warp(total);
    if (lane == 0) result[sample] = p.adds ? result[sample] + total : total;
  }
}

Tensor squared_norm(const std::vector<Tensor>& tensors) {
  const OnDeviceOf device(tensors.front());
  const int64_t samples = tensors.front().size(0);
  Tensor result = new_float32(tensors.front(), {samples});
  if (samples == 0) return result;
  for (size_t first = 0; first < tensors.size(); first += kMostTensors) {
    Sources p{};
    p.samples = samples;
    p.adds = first > 0;
    p.count = static_cast<int>(std::min<size_t>(kMostTensors, tensors.size() - first));
    for (int i = 0; i < p.count; ++i) {
      const Tensor& t = tensors[first + i];
      const int64_t stride = t.stride(0), bytes = static_cast<int64_t>(t.element_size());
      const bool vectors = on_vector_boundary(t.const_data_ptr()) && (samples == 1 || stride * bytes % kVectorBytes == 0);
      p.entry[i] = {t.const_data_ptr(), stride,
                    static_cast<int64_t>(t.numel()) / samples, p.pieces, element_type_of(t, "tensors"), vectors};
      p.pieces += ceil_div(p.entry[i].size, kPiece);
    }
    Tensor partials = new_float32(result, {samples * p.pieces});
    constexpr int64_t kShared = kWarps * sizeof(float);
    const Grid grid = waiting_grid("squared_norm", squared_norm_kernel, samples * p.pieces, kShared);
    launch("squared_norm", squared_norm_kernel, grid, device.stream(), p, static_cast<float*>(partials.mutable_data_ptr()),
           static_cast<float*>(result.mutable_data_ptr()));
  }
  return result;
}

}  // namespace
}  // namespace fastdistill::cuda

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("squared_norm.cuda", TORCH_BOX(&fastdistill::cuda::squared_norm));
}
