// A list of tensors in one launch: which block does which chunk of which tensor. The table travels in the kernel's
// parameters, so that nothing is copied to the device and a captured launch stands alone. Compiles without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_limits.h"

namespace fastdistill::cuda {

constexpr size_t kParameterBytes = 4096;  // what a kernel may take on every driver

// Up to kTensors tensors; tensor i has the blocks from first_block[i] to before first_block[i + 1].
template <typename Entry, int kTensors>
struct TensorTable {
  Entry entry[kTensors];
  int32_t first_block[kTensors + 1];
  int32_t count;

  // The tensor of a block.
  FASTDISTILL_HOST_DEVICE int find(int32_t block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Fills tables of the tensors 0 … count - 1 and calls launch(table, blocks) for each: when it is full, when the next
// tensor would need more blocks than a grid has, and where `split(i)` says that tensor i cannot stand beside the last.
// entry(i) and elements(i) describe tensor i; empty ones are left out.
template <typename Entry, int kTensors, typename Describe, typename Elements, typename Split, typename Launch>
void for_tables(size_t count, int64_t chunk, const Describe& entry, const Elements& elements, const Split& split,
                const Launch& launch) {
  TensorTable<Entry, kTensors> table{};
  const auto flush = [&] {
    if (table.count > 0) launch(table, int64_t{table.first_block[table.count]});
    table.count = 0;
  };
  for (size_t i = 0; i < count; ++i) {
    const int64_t blocks = ceil_div(elements(i), chunk);
    if (blocks == 0) continue;
    if (table.count > 0) {
      const bool full = table.count == kTensors || table.first_block[table.count] + blocks > INT32_MAX;
      if (full || split(i)) flush();
    }
    table.entry[table.count] = entry(i);
    table.first_block[table.count + 1] = static_cast<int32_t>(table.first_block[table.count] + blocks);
    ++table.count;
  }
  flush();
}

}  // namespace fastdistill::cuda
