// Many tensors in one launch: their addresses travel in the kernel's parameters, so nothing is copied to the device first
// and a graph keeps them. Their elements are cut into pieces that sizes alone decide; a block takes every gridDim-th.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "device.cuh"
#include "launch.h"

namespace fastdistill::cuda {

// Of one launch: parameters are limited to 4 KiB, and an entry has 48 bytes at most.
constexpr int kMostTensors = 64;
constexpr int kPieceThreads = 256;
// Two vectors of 16-bit elements per thread, four of float32.
constexpr int64_t kPiece = int64_t{kPieceThreads} * 16;

enum class ElementType : int32_t { Float32, Float16, BFloat16 };

inline ElementType element_type_of(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ElementType::Float32;
    case ScalarType::Half:
      return ElementType::Float16;
    case ScalarType::BFloat16:
      return ElementType::BFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

inline bool on_vector_boundary(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; }

// body(null pointer to the element type)
template <typename Body>
__device__ void with_element(ElementType type, const Body& body) {
  switch (type) {
    case ElementType::Float16:
      return body(static_cast<const __half*>(nullptr));
    case ElementType::BFloat16:
      return body(static_cast<const __nv_bfloat16*>(nullptr));
    default:
      return body(static_cast<const float*>(nullptr));
  }
}

// Which of `count` entries holds a piece, by the first piece of each.
template <typename Entry>
__device__ int entry_of(const Entry* entries, int count, int64_t piece) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (entries[middle].first_piece <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// body(value) for this thread's share of `count` elements.
template <typename T, typename Body>
__device__ void for_elements(const T* data, int64_t count, bool vectors, const Body& body) {
  constexpr int V = kVectorBytes / sizeof(T);
  int64_t done = 0;
  if (vectors) {
    done = count / V * V;
#pragma unroll 2
    for (int64_t i = int64_t{threadIdx.x} * V; i < done; i += kPieceThreads * V) {
      const Vector<T, V> vector = load_vector<V>(data + i);
#pragma unroll
      for (int e = 0; e < V; ++e) body(to_float(vector.value[e]));
    }
  }
  for (int64_t i = done + threadIdx.x; i < count; i += kPieceThreads) body(to_float(data[i]));
}

// Sums over the block of `Count` values of each thread, written to `to` (global or shared) by the first threads.
// scratch: Count floats for each warp.
template <int Count>
__device__ void store_block_sums(const float (&values)[Count], float* scratch, float* to) {
  constexpr int kWarps = kPieceThreads / kWarp;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const float total = sum_over_warp(values[i]);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp * Count + i] = total;
  }
  __syncthreads();
  if (threadIdx.x < Count) {
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp * Count + threadIdx.x];
    to[threadIdx.x] = total;
  }
  __syncthreads();
}

// After it every block sees what all have written; a grid of one block has only itself to wait for.
__device__ inline void wait_for_all_pieces() {
  if (gridDim.x > 1) {
    wait_for_grid();
  } else {
    __syncthreads();
  }
}

// The grid of a kernel that waits for all pieces: as many blocks as there are pieces and as are resident at once, or one
// where the device cannot have them wait.
template <typename... Parameters>
Grid waiting_grid(const char* name, void (*kernel)(Parameters...), int64_t pieces, int64_t shared_bytes) {
  const DeviceLimits& device = current_device_limits();
  Grid grid{std::max<int64_t>(1, std::min<int64_t>(pieces, device.multiprocessors)), kPieceThreads, shared_bytes};
  grid.cooperative = grid.blocks > 1;
  if (grid.cooperative && !(device.cooperative && all_resident(name, kernel, grid))) {
    grid.blocks = 1;
    grid.cooperative = false;
  }
  return grid;
}

inline torch::stable::Tensor new_float32(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, torch::headeronly::ScalarType::Float);
}

}  // namespace fastdistill::cuda
