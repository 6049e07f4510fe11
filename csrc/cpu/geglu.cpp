// geglu on the CPU: which thread does which piece. The loops are in geglu_kernel.cpp.
#include <vector>

#include "../layout.h"
#include "capability.h"
#include "geglu_kernel.h"
#include "tensors.h"

namespace fastdistill {
namespace {

const GegluKernels& kernels_for(ScalarType type) {
  const Element element = element_of(type);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::geglu_kernels(element);
    case Capability::Avx2:
      return avx2::geglu_kernels(element);
    default:
      break;
  }
#endif
  return baseline::geglu_kernels(element);
}

// body(first row, rows, first column, columns) over all of rows x columns in parallel. Rows are cut only where they are
// too long to be one task: a single row of 10240 is worth two threads.
template <typename Body>
void for_pieces(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = (columns + kPiece - 1) / kPiece;
  parallel_for(0, rows * pieces, tasks_per_thread(std::min(columns, kPiece)), [&](int64_t begin, int64_t end) {
    if (pieces == 1) return body(begin, end - begin, int64_t{0}, columns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      body(i / pieces, int64_t{1}, first, std::min(kPiece, columns - first));
    }
  });
}

Tensor geglu(const Tensor& x) {
  const Rows from = rows_of(x, "x");
  const int64_t D = from.length / 2, bytes = static_cast<int64_t>(x.element_size());
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = D;
  Tensor y = with_large_pages(torch::stable::new_empty(x, sizes));
  const char* const in = static_cast<const char*>(x.const_data_ptr());
  char* const out = static_cast<char*>(y.mutable_data_ptr());
  const GegluKernels& k = kernels_for(x.scalar_type());
  for_pieces(from.count, D, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const char* h = in + (row * from.stride + column) * bytes;
    k.forward(h, h + D * bytes, from.stride, out + (row * D + column) * bytes, D, rows, columns);
  });
  return y;
}

Tensor geglu_backward(const Tensor& grad_y, const Tensor& x) {
  const Rows from = rows_of(x, "x"), grad = rows_of(grad_y, "grad_y");
  const int64_t D = grad.length, bytes = static_cast<int64_t>(x.element_size());
  Tensor grad_x = new_output(x);
  const char* const in = static_cast<const char*>(x.const_data_ptr());
  const char* const grad_in = static_cast<const char*>(grad_y.const_data_ptr());
  char* const out = static_cast<char*>(grad_x.mutable_data_ptr());
  const GegluKernels& k = kernels_for(x.scalar_type());
  for_pieces(from.count, D, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const char* h = in + (row * from.stride + column) * bytes;
    char* grad_h = out + (row * 2 * D + column) * bytes;
    k.backward(grad_in + (row * grad.stride + column) * bytes, grad.stride, h, h + D * bytes, from.stride, grad_h,
               grad_h + D * bytes, 2 * D, rows, columns);
  });
  return grad_x;
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("geglu.cpu", TORCH_BOX(&fastdistill::geglu));
  m.impl("geglu_backward.cpu", TORCH_BOX(&fastdistill::geglu_backward));
}
