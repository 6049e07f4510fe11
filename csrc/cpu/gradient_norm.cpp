// gradient_norm on the CPU: a sum per chunk, and their sum in double precision, in one order whatever the threads do.
#include <cmath>
#include <vector>

#include "chunks.h"
#include "floats.h"
#include "sum_of_squares.h"

namespace fastdistill {
namespace {

Tensor gradient_norm(std::vector<Tensor> grads) {
  struct From {
    const char* data;
    int64_t bytes;
    SumOfSquares sum;
  };
  std::vector<From> from;
  from.reserve(grads.size());
  for (const Tensor& g : grads) {
    from.push_back({static_cast<const char*>(g.const_data_ptr()), static_cast<int64_t>(g.element_size()),
                    sum_of_squares(g.scalar_type())});
  }
  const Chunks chunks(grads);
  std::vector<float> partial(static_cast<size_t>(chunks.count()));
  chunks.for_each([&](int64_t chunk, size_t tensor, int64_t first, int64_t count) {
    const From& f = from[tensor];
    partial[static_cast<size_t>(chunk)] = f.sum(f.data + first * f.bytes, count);
  });
  double total = 0.0;
  for (const float value : partial) total += value;
  Tensor norm = new_floats({});
  *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) { m.impl("gradient_norm.cpu", TORCH_BOX(&fastdistill::gradient_norm)); }
