// How weighted_squared_error is cut into blocks on a GPU, and which elements a thread owns. Plain arithmetic on sizes:
// the tests compile it for the host and show that every element is covered exactly once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device_limits.h"

namespace fastdistill::cuda::weighted_squared_error {

constexpr int kThreads = 512;
// Estimates. A call of up to 16 vectors per thread of one cluster (8 latents of 4x64x64 in float32) is left to it: its
// sums meet in shared memory, in one launch. Larger ones get about four blocks for each of 132 multiprocessors.
constexpr int kClusterVectors = 16;
constexpr int64_t kManyBlocks = 4 * 132;

// A block's tile is (samples, elements of a sample): `across` threads along the elements, `along` along the samples.
// Each thread walks `steps` vectors, `across` of them apart.
struct Plan {
  int across, along, vector;
  int64_t steps, row_tiles, column_tiles;
  bool cluster;  // whether all blocks are one cluster

  // Of a cluster a power of two: the last ones may own nothing.
  int64_t blocks() const {
    const int64_t tiles = row_tiles * column_tiles;
    int64_t power = 1;
    while (power < tiles) power *= 2;
    return cluster ? power : tiles;
  }
};

// For `samples` samples of `length` elements, of which a thread owns `vector` neighbours at a time; `cluster`: how many
// blocks one may have, a power of two; 1 where there are no clusters, 0 where none is wanted.
inline Plan plan(int64_t samples, int64_t length, int vector, int cluster) {
  const int64_t lanes = length / vector;
  Plan p{};
  p.vector = vector;
  p.across = 1;
  while (p.across < lanes && p.across < kThreads) p.across *= 2;
  p.along = kThreads / p.across;
  p.row_tiles = ceil_div(samples, p.along);
  const int64_t rounds = ceil_div(lanes, p.across);
  const auto take = [&](int64_t steps) {
    p.steps = std::clamp<int64_t>(steps, 1, rounds);
    p.column_tiles = ceil_div(rounds, p.steps);
  };
  // As few steps as leave no more blocks than a cluster has.
  if (p.row_tiles <= cluster) {
    take(ceil_div(rounds, cluster / p.row_tiles));
    if (p.steps <= kClusterVectors) {
      p.cluster = true;
      return p;
    }
  }
  take(ceil_div(p.row_tiles * rounds, kManyBlocks));
  return p;
}

// What a thread owns: vectors from `column` to before `end`, `step` elements apart, of the sample `row`.
struct Place {
  int64_t row, column, end, step;

  FASTDISTILL_HOST_DEVICE Place(const Plan& p, int64_t samples, int64_t length, unsigned block, int thread) {
    const unsigned column_tiles = static_cast<unsigned>(p.column_tiles);
    row = int64_t{block / column_tiles} * p.along + thread / p.across;
    step = int64_t{p.across} * p.vector;
    const int64_t first = block % column_tiles * (p.steps * step), last = first + p.steps * step;
    column = first + thread % p.across * p.vector;
    end = row < samples ? (last < length ? last : length) : column;
  }
};

}  // namespace fastdistill::cuda::weighted_squared_error
