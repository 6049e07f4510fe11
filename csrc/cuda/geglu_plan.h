// How geglu is cut into blocks on a GPU, and which elements a thread owns. Plain arithmetic on sizes: the tests compile it
// for the host and show that every element is covered exactly once.
#pragma once

#include <cstdint>

#include "device_limits.h"

namespace fastdistill::cuda::geglu_plan {

constexpr int kThreads = 128;
constexpr int kBatch = 2;  // rows of a thread: 4 loads in flight forward, 6 backward
// Estimate: with fewer blocks, about eight for each of 132 multiprocessors, a thread has one row, so that more of them
// have something to do.
constexpr int64_t kFewBlocks = 8 * 132;

// A block's tile is (rows, columns of one half): `across` threads along the columns, `along` along the rows.
struct Plan {
  int across, along;
  int64_t rows, columns, row_tiles, column_tiles;

  int64_t blocks() const { return row_tiles * column_tiles; }
};

// For `rows` rows of `columns` columns, of which a thread owns `vector` neighbours.
inline Plan plan(int64_t rows, int64_t columns, int vector) {
  constexpr int kWarp = 32;
  const int64_t lanes = columns / vector;
  // As wide as hangs over by an eighth at most, but not narrower than a warp: 32 vectors for 160, 128 for 640.
  int across = 1;
  while (across < lanes && across < kThreads) across *= 2;
  while (across > kWarp && 8 * ceil_div(lanes, across) * across > 9 * lanes) across /= 2;
  Plan p{};
  p.across = across;
  p.along = kThreads / across;
  p.columns = int64_t{across} * vector;
  p.column_tiles = ceil_div(lanes, across);
  const bool few = p.column_tiles * ceil_div(rows, int64_t{p.along} * kBatch) < kFewBlocks;
  p.rows = int64_t{p.along} * (few ? 1 : kBatch);
  p.row_tiles = ceil_div(rows, p.rows);
  return p;
}

// What a thread owns: `vector` columns from `column` on, in the rows from `row` to before `last`, `along` apart.
struct Place {
  int64_t row, last, column;

  FASTDISTILL_HOST_DEVICE Place(const Plan& p, int64_t rows, int64_t columns, int vector, unsigned block, int thread) {
    const unsigned column_tiles = static_cast<unsigned>(p.column_tiles);
    const int64_t first = block / column_tiles * p.rows;
    const int64_t end = first + p.rows < rows ? first + p.rows : rows;
    column = block % column_tiles * p.columns + thread % p.across * vector;
    row = first + thread / p.across;
    last = column < columns ? end : row;
  }
};

}  // namespace fastdistill::cuda::geglu_plan
