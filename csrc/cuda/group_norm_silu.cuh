// What the forward and the backward kernels of group_norm_silu share: the call, a thread's share of a tile, sums over
// the pixels of a channel and over the channels of a group, and how blocks that share groups read one another's sums.
//
// A tensor is (N, C, S). A thread owns vectors of V elements: V pixels of one channel when the image is contiguous, V
// channels of one pixel when its channels are last. So the loads of a warp are whole lines in both layouts, and all
// that differs between them is which index a vector runs along. group_norm_silu_plan.h says which block does what.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../layout.h"
#include "device.cuh"
#include "group_norm_silu_plan.h"
#include "launch.h"

namespace fastdistill::cuda::group_norm_silu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- the call -------------------------------------------------------------------------------------------------------

// weight, bias or add: float32 or x's dtype, any strides, or absent.
struct Parameter {
  const void* data;
  ScalarType type;
  int64_t stride_n, stride_c;

  __device__ float at(int64_t n, int64_t c, float absent) const {
    if (data == nullptr) return absent;
    const int64_t i = n * stride_n + c * stride_c;
    if (type == ScalarType::Half) return to_float(static_cast<const __half*>(data)[i]);
    if (type == ScalarType::BFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

inline Parameter parameter(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, ScalarType::Float, 0, 0};
  const bool per_image = tensor->dim() == 2;
  return {tensor->const_data_ptr(), tensor->scalar_type(), per_image ? tensor->stride(0) : 0,
          tensor->stride(per_image ? 1 : 0)};
}

// What both directions are told.
struct Call {
  Layout x;
  int64_t groups, per_group;  // per_group = C / groups channels
  Parameter weight, bias, add;
  bool silu;
  float group_size;  // elements that share one mean
  Tile tile;
  int pixels_each;   // of a vector
  bool cooperative;  // blocks that share groups: of one cluster, or of the whole grid
  bool streaming;
  float* partial;    // partial results that blocks read from one another; a workspace
};

// The call, but for its plan and what it writes.
inline Call call(const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& add, bool silu) {
  Call c{};
  c.x = layout_of(x);
  c.groups = groups;
  c.per_group = c.x.C / groups;
  c.weight = parameter(weight);
  c.bias = parameter(bias);
  c.add = parameter(add);
  c.silu = silu;
  c.group_size = static_cast<float>(c.per_group * c.x.S);
  return c;
}

inline void follow(const Plan& plan, Call* c) {
  c->tile = plan.tile;
  c->cooperative = plan.regime == Regime::kCooperative;
  c->streaming = plan.streaming;
}

inline Size size_of(const Call& c, int64_t bytes, bool vectors) {
  return {c.x.N,    c.x.C, c.x.S, c.groups, c.x.channels_last, static_cast<int>(bytes),
          vectors ? static_cast<int>(kVectorBytes / bytes) : 1};
}

inline int64_t groups_of_tile(const Call& c) { return c.tile.channels / c.per_group; }

inline Grid grid_of(const Plan& plan) {
  return {plan.blocks, plan.threads, plan.shared_bytes, plan.cluster, plan.regime == Regime::kCooperative};
}

// Whether the plan keeps x on chip, and this device can do so: a grid that waits for itself must be resident as a
// whole, which a driver that shares the device out may not allow.
template <typename... Parameters>
bool stays_on_chip(const Plan& plan, const char* name, void (*kernel)(Parameters...)) {
  if (plan.regime != Regime::kCooperative) return plan.regime == Regime::kCluster;
  return all_resident(name, kernel, grid_of(plan));
}

// A float32 tensor on x's device.
inline Tensor floats_like(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

inline float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Whether a thread may load V neighbours along x's vector direction at once: they are neighbours in memory as well, and
// every vector starts at a multiple of its size.
inline bool has_vectors(const void* data, const Strides3& stride, const Layout& x, int64_t bytes) {
  const int64_t along = x.channels_last ? stride.c : stride.s, across = x.channels_last ? stride.s : stride.c;
  const int64_t length = x.channels_last ? x.C : x.S, rows = x.channels_last ? x.S : x.C;
  return along == 1 && length * bytes % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         (rows == 1 || across * bytes % kVectorBytes == 0) && (x.N == 1 || stride.n * bytes % kVectorBytes == 0);
}

template <typename T>
struct Type {
  using type = T;
};
template <int V>
struct Width {
  static constexpr int value = V;
};

// Calls body(Type<T>, Width<V>, std::bool_constant<channels last>) for the call at hand.
template <typename T, typename Body>
void dispatch_layout(bool vectors, bool channels_last, const Body& body) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  if (vectors) {
    channels_last ? body(Type<T>{}, Width<kVector>{}, std::true_type{})
                  : body(Type<T>{}, Width<kVector>{}, std::false_type{});
  } else {
    channels_last ? body(Type<T>{}, Width<1>{}, std::true_type{}) : body(Type<T>{}, Width<1>{}, std::false_type{});
  }
}

template <typename Body>
void dispatch(ScalarType type, bool vectors, bool channels_last, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return dispatch_layout<__half>(vectors, channels_last, body);
    case ScalarType::BFloat16:
      return dispatch_layout<__nv_bfloat16>(vectors, channels_last, body);
    case ScalarType::Float:
      return dispatch_layout<float>(vectors, channels_last, body);
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

// ---- a thread's share of a tile -------------------------------------------------------------------------------------

// Element 0 of the thread's channels in its image.
template <typename T, typename L>
__device__ T* origin(T* data, const Strides3& stride, const L& lane, int64_t image) {
  return data + image * stride.n + lane.first_channel * stride.c;
}

// A thread's vectors of one tensor: the first kHeld in registers, the others in shared memory, in places of its own.
template <typename T, int V, int kHeld>
struct Share {
  Vector<T, V> held[kHeld];
  Vector<T, V>* spare;

  __device__ Vector<T, V> from_spare(int i) const { return load_vector<V>(spare[i * blockDim.x].value); }

  // `from` is the origin of the thread's channels; vectors lie `stride` apart from pixel to pixel.
  template <typename L>
  __device__ void load(const T* from, int64_t stride, const L& lane) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t s = lane.pixel + i * lane.step();
      if (s < lane.last_pixel) held[i] = load_vector<V>(from + s * stride);
    }
    int i = 0;
    for (int64_t s = lane.pixel + kHeld * lane.step(); s < lane.last_pixel; s += lane.step(), ++i) {
      if constexpr (sizeof(Vector<T, V>) == kVectorBytes) {
        start_copy(spare + i * blockDim.x, from + s * stride);
      } else {
        spare[i * blockDim.x] = load_vector<V>(from + s * stride);
      }
    }
  }

  // The same for elements that are `along` apart within a vector.
  template <typename L>
  __device__ void load_strided(const T* from, int64_t stride, int64_t along, const L& lane) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t s = lane.pixel + i * lane.step();
      if (s < lane.last_pixel) held[i] = cuda::load_strided<V>(from + s * stride, along);
    }
    int i = 0;
    for (int64_t s = lane.pixel + kHeld * lane.step(); s < lane.last_pixel; s += lane.step(), ++i) {
      spare[i * blockDim.x] = cuda::load_strided<V>(from + s * stride, along);
    }
  }

  // Between two passes: the compiler may no longer know the vectors, and so converts them again instead of keeping
  // their elements as floats beside them, for which there are no registers.
  __device__ void forget_conversions() {
#ifdef __CUDACC__
    if constexpr (sizeof(T) < 4 && V > 1) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        uint4& bits = reinterpret_cast<uint4&>(held[i]);
        asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
      }
    }
#endif
  }
};

// body(first pixel, the vector of each share), for each place in order.
template <typename L, typename Body, typename T, int V, int kHeld, typename... Others>
__device__ void for_each_vector(const L& lane, const Body& body, const Share<T, V, kHeld>& first,
                                const Others&... others) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t s = lane.pixel + i * lane.step();
    if (s < lane.last_pixel) body(s, first.held[i], others.held[i]...);
  }
  int i = 0;
  for (int64_t s = lane.pixel + kHeld * lane.step(); s < lane.last_pixel; s += lane.step(), ++i) {
    body(s, first.from_spare(i), others.from_spare(i)...);
  }
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// sums[k * tile.channels + c] = value[k] of channel c, summed over the threads of the tile that share the channel.
// rows: row_floats(tile, A). All threads may read the sums afterwards.
template <bool kChannelsLast, int K, int A, typename L>
__device__ void sum_over_pixels(const float (&value)[K][A], float* rows, float* sums, const Tile& tile, const L& lane) {
  // In either layout the values of a thread lie at its index: rows of channels, or channels of pixels.
  const int row_stride = kChannelsLast ? tile.channels : 1, column_stride = kChannelsLast ? 1 : tile.along;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (lane.active) {
      constexpr int kWidth = A % 4 == 0 ? 4 : 1;  // shared memory takes 16 bytes of a thread at once
#pragma unroll
      for (int a = 0; a < A; a += kWidth) {
        Vector<float, kWidth> part;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) part.value[e] = value[k][a + e];
        store_vector(rows + threadIdx.x * A + a, part);
      }
    }
    __syncthreads();
    sum_columns(
        tile.channels, tile.along, tile.helpers,
        [&](int row, int c) { return rows[row * row_stride + c * column_stride]; },
        [&](int c, float total) { sums[k * tile.channels + c] = total; });
    __syncthreads();
  }
}

// body(group of the tile, lane), once for each group, by all lanes of one warp.
template <typename Body>
__device__ void for_each_group(int groups, const Body& body) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int group = static_cast<int>(threadIdx.x) / kWarp; group < groups; group += warps) {
    body(group, static_cast<int>(threadIdx.x) % kWarp);
  }
}

// Which group of the tile each of a thread's channels belongs to. (Without a division per channel.)
template <int A>
struct GroupOf {
  int group[A];
  __device__ GroupOf(int first_channel, int per_group) {
    int g = first_channel / per_group, channel = first_channel % per_group;
#pragma unroll
    for (int a = 0; a < A; ++a) {
      group[a] = g;
      if (++channel == per_group) {
        channel = 0;
        ++g;
      }
    }
  }
};

// The blocks that share the groups of a tile. Each publishes values; then every one may read those of all.
struct Peers {
  int count, own;
  bool cooperative;
  float* workspace;  // of these blocks, `floats` for each
  int floats;

  __device__ Peers(const Call& c, const Place& place, int floats_)
      : count(static_cast<int>(c.tile.pixel_tiles)),
        own(static_cast<int>(place.pixel_tile)),
        cooperative(c.cooperative),
        workspace(c.partial + (place.image * c.tile.channel_tiles + place.channel_tile) * count * floats_),
        floats(floats_) {}

  __device__ void publish(const float* values) {
    __syncthreads();
    if (cooperative) {
      for (int i = static_cast<int>(threadIdx.x); i < floats; i += static_cast<int>(blockDim.x)) {
        workspace[own * floats + i] = values[i];
      }
      wait_for_grid();
    } else if (count > 1) {
      arrive_in_cluster();
      wait_for_cluster();
    }
  }
  __device__ const float* values_of(const float* values, int peer) const {
    if (cooperative) return workspace + peer * floats;
    return count > 1 ? in_block_of_cluster(values, static_cast<unsigned>(peer)) : values;
  }
  // Shared memory must outlive its readers: every block says when it has read, and waits for the others before it ends.
  __device__ void have_read() const {
    if (!cooperative && count > 1) arrive_in_cluster();
  }
  __device__ void before_the_end() const {
    if (!cooperative && count > 1) wait_for_cluster();
  }
};

}  // namespace fastdistill::cuda::group_norm_silu
