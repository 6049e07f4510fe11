// squared_norm on the CPU: which thread does which piece of which sample. The loop is in sum_of_squares_kernel.cpp.
//
// A sample is summed in pieces that its size alone decides, and these are added up in order, so a result does not
// depend on the number of threads.
#include <vector>

#include "floats.h"
#include "sum_of_squares.h"
#include "tensors.h"

namespace fastdistill {
namespace {

constexpr int64_t kPiece = 16384;

// One of the tensors: where its samples lie and in how many pieces each is summed. `before`: pieces of a sample in the
// tensors in front of it.
struct Source {
  const char* data;
  int64_t stride, size, before, pieces;  // stride in bytes, size in elements
  int64_t element_size;
  SumOfSquares sum;
};

Tensor squared_norm(const std::vector<Tensor>& tensors) {
  const int64_t samples = tensors.front().size(0);
  std::vector<Source> sources;
  int64_t per_sample = 0;
  for (const Tensor& t : tensors) {
    const int64_t bytes = static_cast<int64_t>(t.element_size()), size = t.numel() / std::max<int64_t>(1, samples);
    const int64_t pieces = (size + kPiece - 1) / kPiece;
    sources.push_back({static_cast<const char*>(t.const_data_ptr()), t.stride(0) * bytes, size, per_sample, pieces, bytes,
                       sum_of_squares(t.scalar_type())});
    per_sample += pieces;
  }
  const auto sums = floats(samples * per_sample);
  // A task is a piece of one sample.
  parallel_for(0, samples * per_sample, tasks_per_thread(kPiece), [&](int64_t begin, int64_t end) {
    size_t of = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / per_sample, place = task % per_sample;
      if (place == 0) of = 0;
      while (place >= sources[of].before + sources[of].pieces) ++of;
      const Source& source = sources[of];
      const int64_t first = (place - source.before) * kPiece;
      sums[task] = source.sum(source.data + sample * source.stride + first * source.element_size,
                              std::min(kPiece, source.size - first));
    }
  });
  Tensor result = new_floats({samples});
  float* const to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t sample = 0; sample < samples; ++sample) {
    double total = 0;
    for (int64_t i = 0; i < per_sample; ++i) total += sums[sample * per_sample + i];
    to[sample] = static_cast<float>(total);
  }
  return result;
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) { m.impl("squared_norm.cpu", TORCH_BOX(&fastdistill::squared_norm)); }
