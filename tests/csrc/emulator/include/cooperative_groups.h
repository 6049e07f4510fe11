#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void barrier_arrive() const { emulator::arrive_in_cluster(); }
  void barrier_wait() const { emulator::wait_for_cluster(); }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  template <typename T>
  T* map_shared_rank(T* shared, unsigned rank) const {
    return reinterpret_cast<T*>(emulator::in_block_of_cluster(shared, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
  void sync() const { emulator::wait_for_grid(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
