// What both directions of group_norm_silu on the CPU know about a call, and how its work is cut into blocks.
//
// The borders of what is summed depend on the shape alone, and partial sums are combined in order, so a result does not
// depend on the number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>

#include "../layout.h"
#include "capability.h"
#include "floats.h"
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
        weight(parameter_floats(weight_, x.C, 1.0f)),
        bias(parameter_floats(bias_, x.C, 0.0f)) {
    if (add_) {
      add = floats(x.N * x.C);
      for (int64_t n = 0; n < x.N; ++n)
        read_floats(*add_, n * add_->stride(0), add_->stride(1), x.C, &add[n * x.C]);
    }
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

// Slabs of a channels-last tensor: whole groups with all their pixels, which a thread can keep in its second-level cache
// between its sweeps, as it keeps a group of a contiguous one. Of whole vectors, or loads would have to be split.
struct Slabs {
  int64_t groups = 0, channels = 0, per_sample = 0;

  explicit Slabs(const Problem& p) {
    constexpr int64_t kVectorElements = 32, kCacheBytes = 768 << 10;  // three quarters of 1 MiB
    const int64_t whole_vectors = std::lcm(kVectorElements, p.per_group);
    if (whole_vectors * p.x.S * p.bytes > kCacheBytes) return;
    channels = whole_vectors;
    groups = whole_vectors / p.per_group;
    per_sample = (p.groups + groups - 1) / groups;
  }

  // Fewer slabs than threads would leave some idle.
  bool serve(const Problem& p) const { return per_sample > 0 && p.x.N * per_sample >= torch::stable::get_num_threads(); }
  int64_t groups_of(const Problem& p, int64_t slab) const { return std::min(groups, p.groups - slab * groups); }
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
