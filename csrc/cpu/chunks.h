// A list of tensors cut into chunks: the tasks of the ops that sweep over many tensors at once.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace fastdistill {

class Chunks {
 public:
  static constexpr int64_t kElements = 16384;  // five arrays of them lie in a second-level cache

  explicit Chunks(const std::vector<Tensor>& tensors) {
    first_.reserve(tensors.size() + 1);
    lengths_.reserve(tensors.size());
    for (const Tensor& t : tensors) {
      lengths_.push_back(t.numel());
      first_.push_back(first_.back() + (t.numel() + kElements - 1) / kElements);
    }
  }

  int64_t count() const { return first_.back(); }

  // body(chunk, tensor, first element, elements) for every chunk, in parallel.
  template <typename Body>
  void for_each(const Body& body) const {
    parallel_for(0, count(), tasks_per_thread(kElements), [&](int64_t begin, int64_t end) {
      size_t tensor = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= first_[tensor + 1]) ++tensor;
        const int64_t element = (chunk - first_[tensor]) * kElements;
        body(chunk, tensor, element, std::min(kElements, lengths_[tensor] - element));
      }
    });
  }

 private:
  std::vector<int64_t> first_{0};  // of each tensor's chunks
  std::vector<int64_t> lengths_;
};

}  // namespace fastdistill
