// Which threads of layer_norm's CUDA kernels work on which rows. Plain C++: a plan can be tested without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "device_limits.h"

namespace fastdistill::cuda::layer_norm {

constexpr int kWarpThreads = 32;
constexpr int kRowsPerBlock = 4;  // where a warp has a row to itself

enum class Kind {
  kWarp,   // a warp holds a row in its registers, a block has four
  kBlock,  // a block holds a row in its registers
  kLoop,   // a block walks a row as often as it needs it: one too long, or without vectors
};

struct Plan {
  Kind kind;
  int elements;    // that a thread holds at most
  int threads;     // of a block
  int64_t blocks;  // that walk the rows in turns; the forward has one for each
};

// In vectors of 8, 320 columns are up to 16 elements per thread of a warp, 640 up to 24, 1280 are 40. A block's threads
// have 16 each: with more than 512 of them, the registers do not suffice.
constexpr int kBlockElements = 16;
constexpr int kMaxBlockThreads = 512;

inline Plan plan_rows(int64_t columns, int vector, std::initializer_list<int> warp_elements) {
  if (vector > 1) {
    const int64_t vectors = columns / vector;
    for (const int elements : warp_elements)
      if (ceil_div(vectors, kWarpThreads) * vector <= elements)
        return {Kind::kWarp, elements, kRowsPerBlock * kWarpThreads, 0};
    const int64_t threads = ceil_div(columns, int64_t{kBlockElements} * kWarpThreads) * kWarpThreads;
    if (threads <= kMaxBlockThreads) return {Kind::kBlock, kBlockElements, static_cast<int>(threads), 0};
  }
  const int64_t threads = ceil_div(columns, 4 * int64_t{kWarpThreads} * vector) * kWarpThreads;
  return {Kind::kLoop, 0, static_cast<int>(std::min<int64_t>(threads, kMaxBlockThreads)), 0};
}

inline int rows_per_block(const Plan& plan) { return plan.kind == Kind::kWarp ? kRowsPerBlock : 1; }

inline Plan plan_forward(int64_t rows, int64_t columns, int vector) {
  Plan plan = plan_rows(columns, vector, {16, 24, 40});
  plan.blocks = ceil_div(rows, rows_per_block(plan));
  return plan;
}

// The backward also keeps its sums over the rows, so a thread has fewer elements. With sums, as many blocks as are
// resident walk the rows in turns, and each leaves one partial sum per column.
// On a multiprocessor: 168 registers per thread for 16 elements, 255 for 24, which spill with fewer.
constexpr int resident_warp_blocks(int elements) { return elements <= 16 ? 3 : 2; }

inline Plan plan_backward(int64_t rows, int64_t columns, int vector, bool sums, int multiprocessors) {
  Plan plan = plan_rows(columns, vector, {16, 24});
  plan.blocks = ceil_div(rows, rows_per_block(plan));
  const int resident = plan.kind == Kind::kWarp ? resident_warp_blocks(plan.elements) : kMaxBlockThreads / plan.threads;
  if (sums) plan.blocks = std::min(plan.blocks, int64_t{multiprocessors} * resident);
  return plan;
}

}  // namespace fastdistill::cuda::layer_norm
