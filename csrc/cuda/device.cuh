// Device functions that more than one op uses: vectors of elements, per-channel parameters, sums over a block.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>

// Declares `unsigned char* name`, the block's dynamic shared memory. (The emulator of the tests has its own.)
#ifndef FASTDISTILL_DYNAMIC_SHARED
#define FASTDISTILL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fastdistill::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load and store of a thread

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T value[V];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// A load or store of V elements in one instruction; the address is a multiple of its size.
template <int V, typename T>
__device__ inline Vector<T, V> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <int V, typename T>
__device__ inline void store_vector(T* to, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// The same for what this multiprocessor does not read again: it takes no line of the L1 cache.
template <int V, typename T>
__device__ inline Vector<T, V> load_past_l1(const T* from) {
#ifdef __CUDACC__
  if constexpr (sizeof(Vector<T, V>) == 16) {
    uint4 bits;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
        : "l"(from));
    return *reinterpret_cast<const Vector<T, V>*>(&bits);
  }
#endif
  return load_vector<V>(from);
}

// The same for what nobody reads again: the first to leave every cache.
template <int V, typename T>
__device__ inline Vector<T, V> load_last(const T* from) {
  if constexpr (sizeof(Vector<T, V>) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Vector<T, V>*>(&bits);
  }
  return load_vector<V>(from);
}

// A store that is the first to leave the caches where `streaming`: results that are too many to be found there.
template <int V, typename T>
__device__ inline void store_vector(T* to, const Vector<T, V>& vector, bool streaming) {
  if constexpr (sizeof(Vector<T, V>) == 16) {
    if (streaming) {
      __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&vector));
      return;
    }
  }
  store_vector(to, vector);
}

// Starts to copy 16 bytes from global to shared memory; both addresses are multiples of 16.
__device__ inline void start_copy(void* shared, const void* from) { __pipeline_memcpy_async(shared, from, 16); }

// Waits for the copies that this thread has started; only this thread may read them without a barrier.
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// V elements that may lie anywhere: a gradient in the other layout, or expanded from one value.
template <int V, typename T>
__device__ inline Vector<T, V> load_strided(const T* from, int64_t stride) {
  Vector<T, V> vector;
#pragma unroll
  for (int e = 0; e < V; ++e) vector.value[e] = from[e * stride];
  return vector;
}

// The sigmoid and 1 / (1 + inf) = 0; within 3 units in the last place where it is not tiny.
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

// a + b as the rounded sum and its rounding error, exactly (Knuth).
__device__ inline float two_sum(float a, float b, float* error) {
  const float sum = a + b;
  const float b_part = sum - a;
  *error = (a - (sum - b_part)) + (b - b_part);
  return sum;
}

__device__ inline float sum_over_warp(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over all threads of a block, in every thread. The block has whole warps; scratch holds a float per warp.
__device__ inline float sum_over_block(float value, float* scratch) {
  value = sum_over_warp(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

// Sums of `rows` values each, for many columns: `store(column, total)` is called once for each, by one thread.
// `helpers` neighbouring threads, a power of two within a warp, share a column. Every thread of the block takes part.
template <typename Value, typename Store>
__device__ void sum_columns(int columns, int rows, int helpers, const Value& value, const Store& store) {
  const int thread = static_cast<int>(threadIdx.x), at_once = static_cast<int>(blockDim.x) / helpers;
  for (int first = 0; first < columns; first += at_once) {
    const int column = first + thread / helpers;
    float total = 0.0f;
    if (column < columns) {
#pragma unroll 4
      for (int row = thread % helpers; row < rows; row += helpers) total += value(row, column);
    }
    for (int offset = helpers / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (column < columns && thread % helpers == 0) store(column, total);
  }
}

// ---- thread-block clusters and grids --------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTDISTILL_CLUSTERS 1
#endif

// Every thread of the cluster arrives once and waits once; what was written to shared memory before an arrival can be
// read in the whole cluster after the wait. Without clusters (before compute capability 9.0) a block is one of its own.
__device__ inline void arrive_in_cluster() {
#ifdef FASTDISTILL_CLUSTERS
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ inline void wait_for_cluster() {
#ifdef FASTDISTILL_CLUSTERS
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// The same place in the shared memory of another block of the cluster.
template <typename T>
__device__ const T* in_block_of_cluster(const T* shared, unsigned rank) {
#ifdef FASTDISTILL_CLUSTERS
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

// Every block of a grid that was launched as cooperative waits for all; what was written before can be read after.
__device__ inline void wait_for_grid() { cooperative_groups::this_grid().sync(); }

}  // namespace fastdistill::cuda
