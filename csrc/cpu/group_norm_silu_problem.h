// What both directions of group_norm_silu on the CPU know about a call, and how its work is cut into blocks.
//
// The borders of what is summed depend on the shape alone, and partial sums are combined in order, so a result does not
// depend on the number of threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>

#include "../layout.h"
#include "capability.h"
#include "group_norm_silu_kernel.h"
#include "tensors.h"

namespace fastdistill {

constexpr int64_t kBlock = 8192;  // elements of one contiguous moments block

inline const GroupNormSiluKernels& kernels_for(ScalarType type) {
  const Element element = element_of(type);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::group_norm_silu_kernels(element);
    case Capability::Avx2:
      return avx2::group_norm_silu_kernels(element);
    default:
      break;
  }
#endif
  return baseline::group_norm_silu_kernels(element);
}

template <typename T>
void widen(const void* from, int64_t stride, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(static_cast<const T*>(from)[i * stride]);
    to[i] = value == value ? value : std::numeric_limits<float>::quiet_NaN();  // see round_to_bfloat16
  }
}

// One row of a small parameter tensor (weight, bias, add) as float32.
inline void read_floats(const Tensor& t, int64_t offset, int64_t stride, int64_t count, float* to) {
  const char* from = static_cast<const char*>(t.const_data_ptr()) + offset * static_cast<int64_t>(t.element_size());
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return widen<torch::headeronly::Half>(from, stride, count, to);
    case ScalarType::BFloat16:
      return widen<torch::headeronly::BFloat16>(from, stride, count, to);
    default:
      return widen<float>(from, stride, count, to);
  }
}

// Not initialised: at 8x8 pixels the constants are a good part of the data.
inline std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// A dense float32 tensor. `torch::stable::new_empty` looks its op up by name: half a microsecond more each.
inline Tensor new_floats(std::initializer_list<int64_t> sizes) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = *(sizes.begin() + 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

// Everything both directions know about a call.
struct Problem {
  Layout x;
  int64_t groups, per_group;              // per_group = C / groups channels
  int64_t bytes;                          // per element
  std::unique_ptr<float[]> weight, bias;  // (C,), 1 and 0 where absent
  std::unique_ptr<float[]> add;           // (N, C), null where absent

  Problem(const Tensor& x_, int64_t groups_, const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_,
          const std::optional<Tensor>& add_)
      : x(layout_of(x_)),
        groups(groups_),
        per_group(x.C / groups_),
        bytes(static_cast<int64_t>(x_.element_size())),
        weight(per_channel(weight_, 1.0f)),
        bias(per_channel(bias_, 0.0f)) {
    if (add_) {
      add = floats(x.N * x.C);
      for (int64_t n = 0; n < x.N; ++n)
        read_floats(*add_, n * add_->stride(0), add_->stride(1), x.C, &add[n * x.C]);
    }
  }

  std::unique_ptr<float[]> per_channel(const std::optional<Tensor>& parameter, float absent) const {
    auto values = floats(x.C);
    if (parameter) {
      read_floats(*parameter, 0, parameter->stride(0), x.C, values.get());
    } else {
      std::fill_n(values.get(), x.C, absent);
    }
    return values;
  }

  const float* add_of(int64_t n) const { return add ? &add[n * x.C] : nullptr; }
  // Whole groups as tasks keep a group in cache between its sweeps; with fewer groups than threads, parts of them.
  bool group_per_task() const { return x.N * groups >= torch::stable::get_num_threads(); }
};

// How one group of a contiguous tensor is cut: whole rows (channels) per block, or parts of one row.
struct GroupBlocks {
  int64_t rows, length;  // the group as rows x length; one row where nothing differs between channels
  int64_t rows_per_block, blocks_per_row, count;

  GroupBlocks(const Problem& p) : rows(p.add ? p.per_group : 1), length(p.add ? p.x.S : p.per_group * p.x.S) {
    rows_per_block = std::max<int64_t>(1, kBlock / length);
    blocks_per_row = (length + kBlock - 1) / kBlock;
    count = blocks_per_row > 1 ? rows * blocks_per_row : (rows + rows_per_block - 1) / rows_per_block;
  }

  Moments moments(const GroupNormSiluKernels& k, const char* group, const float* add, int64_t bytes, int64_t i) const {
    const int64_t row = blocks_per_row > 1 ? i / blocks_per_row : i * rows_per_block;
    const int64_t start = blocks_per_row > 1 ? i % blocks_per_row * kBlock : 0;
    const int64_t n_rows = blocks_per_row > 1 ? 1 : std::min(rows_per_block, rows - row);
    return k.moments_rows(group + (row * length + start) * bytes, n_rows, std::min(kBlock, length - start),
                          add ? add + row : nullptr);
  }
};

// The sums over a channels-last tensor are cut into tasks of whole pixels: about 65536 elements, so that there are
// enough of them, but at least 64 pixels, over which the cost per channel (pivots, combining) is spread, and at most
// 512, so many float32 additions into one accumulator.
struct PixelTasks {
  int64_t rows_per_task, per_sample;

  PixelTasks(const Problem& p) : rows_per_task(std::clamp<int64_t>(65536 / p.x.C, 64, 512)) {
    per_sample = (p.x.S + rows_per_task - 1) / rows_per_task;
  }
};

// body(n, first pixel, pixels) over all pixels, in parallel, the last ones first: they are what the sums left in cache.
template <typename Body>
void for_pixels_backwards(const Problem& p, const Body& body) {
  constexpr int64_t kPiece = 512;
  parallel_for(0, p.x.N * p.x.S, tasks_per_thread(p.x.C), [&](int64_t begin, int64_t end) {
    while (end > begin) {
      const int64_t n = (end - 1) / p.x.S, first = std::max({begin, n * p.x.S, end - kPiece});
      body(n, first - n * p.x.S, end - first);
      end = first;
    }
  });
}

}  // namespace fastdistill
