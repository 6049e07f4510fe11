// What the CPU drivers of every op need of tensors: element types, new outputs, and how much work a thread is worth.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>

#include "element.h"

namespace fastdistill {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it saves

inline int64_t tasks_per_thread(int64_t elements_per_task) {
  return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_task));
}

inline Element element_of(ScalarType type) {
  return type == ScalarType::Half       ? Element::Float16
         : type == ScalarType::BFloat16 ? Element::BFloat16
                                        : Element::Float32;
}

// An output so large that malloc maps it afresh is first touched by the kernel's own stores, and a page fault per 4 KiB
// costs several times the arithmetic (256x256x256 in float32: 35 ms with them, 9 without), so the system is told that
// large pages will do. Smaller memory is reused by the allocator: advice would outlive the tensor.
inline Tensor with_large_pages(Tensor y) {
#if defined(__linux__)
  constexpr uintptr_t kMapped = 32u << 20, kPage = 4096;
  const uintptr_t size = static_cast<uintptr_t>(y.numel()) * y.element_size();
  if (size >= kMapped) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(y.mutable_data_ptr()) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(y.mutable_data_ptr()) + size) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: a failure changes nothing
  }
#endif
  return y;
}

// Like x, not initialised.
inline Tensor new_output(const Tensor& x) { return with_large_pages(torch::stable::empty_like(x)); }

}  // namespace fastdistill
