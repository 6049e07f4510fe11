// weighted_squared_error on the CPU: which thread does which piece. The loops are in weighted_squared_error_kernel.cpp.
//
// Samples are cut where their length says and the partial sums are combined in order, so a result does not depend on
// the number of threads.
#include <optional>

#include "capability.h"
#include "floats.h"
#include "tensors.h"
#include "weighted_squared_error_kernel.h"

namespace fastdistill {
namespace {

constexpr int64_t kPiece = 16384;

const WeightedSquaredErrorKernels& kernels_for(const Tensor& x, const Tensor& a) {
  const Element of_x = element_of(x.scalar_type()), of_target = element_of(a.scalar_type());
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::weighted_squared_error_kernels(of_x, of_target);
    case Capability::Avx2:
      return avx2::weighted_squared_error_kernels(of_x, of_target);
    default:
      break;
  }
#endif
  return baseline::weighted_squared_error_kernels(of_x, of_target);
}

// A scale or weight: one for each sample, or `value` for all.
class PerSample {
 public:
  PerSample(const std::optional<Tensor>& tensor, double value) : value_(static_cast<float>(value)) {
    if (!tensor) return;
    data_ = static_cast<const float*>(tensor->const_data_ptr());
    stride_ = tensor->stride(0);
  }
  float at(int64_t sample) const { return data_ ? data_[sample * stride_] : value_; }
  bool same_for_all() const { return !data_ || stride_ == 0; }

 private:
  const float* data_ = nullptr;
  int64_t stride_ = 0;
  float value_;
};

// A tensor (B, …) read as (B, M), M in the order of memory.
struct Samples {
  char* data = nullptr;
  int64_t stride = 0, bytes = 0;

  Samples() = default;
  explicit Samples(const Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        stride(t.stride(0)),
        bytes(static_cast<int64_t>(t.element_size())) {}

  char* at(int64_t sample, int64_t element) const {
    return data ? data + (sample * stride + element) * bytes : nullptr;
  }
};

struct Problem {
  int64_t samples, length;
  double mean;  // 1 / numel
  Samples x, a, b;
  PerSample scale_a, scale_b, weight;

  Problem(const Tensor& x_, const Tensor& a_, const std::optional<Tensor>& b_, const PerSample& scale_a_,
          const PerSample& scale_b_, const PerSample& weight_)
      : samples(x_.size(0)),
        length(x_.numel() / samples),
        mean(1.0 / static_cast<double>(x_.numel())),
        x(x_),
        a(a_),
        b(b_ ? Samples(*b_) : Samples()),
        scale_a(scale_a_),
        scale_b(scale_b_),
        weight(weight_) {
    // Where samples neither lie apart nor differ, they are one: a call of many small ones is not one of many loops.
    const bool dense = x.stride == length && a.stride == length && (!b.data || b.stride == length);
    if (dense && scale_a.same_for_all() && scale_b.same_for_all() && weight.same_for_all()) {
      length *= samples;
      samples = 1;
    }
  }

  int64_t pieces() const { return (length + kPiece - 1) / kPiece; }

  // body(piece, sample, first element, run) over all pieces in parallel.
  template <typename Body>
  void for_pieces(const Body& body) const {
    const int64_t per_sample = pieces();
    parallel_for(0, samples * per_sample, tasks_per_thread(std::min(length, kPiece)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / per_sample, first = i % per_sample * kPiece;
        body(i, sample, first,
             SampleRun{x.at(sample, first), a.at(sample, first), b.at(sample, first), scale_a.at(sample),
                       scale_b.at(sample), std::min(kPiece, length - first)});
      }
    });
  }
};

Tensor weighted_squared_error(const Tensor& x, const Tensor& a, std::optional<Tensor> b, std::optional<Tensor> scale_a,
                              std::optional<Tensor> scale_b, std::optional<Tensor> weight, double value_a,
                              double value_b, double value_weight) {
  const Problem p(x, a, b, {scale_a, value_a}, {scale_b, value_b}, {weight, value_weight});
  const WeightedSquaredErrorKernels& k = kernels_for(x, a);
  const auto sums = floats(p.samples * p.pieces());
  p.for_pieces([&](int64_t piece, int64_t, int64_t, const SampleRun& run) { sums[piece] = k.sum_of_squares(run); });
  double total = 0;
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    double squares = 0;
    for (int64_t i = 0; i < p.pieces(); ++i) squares += sums[sample * p.pieces() + i];
    total += p.weight.at(sample) * squares;
  }
  Tensor loss = new_floats({});
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total * p.mean);
  return loss;
}

Tensor weighted_squared_error_backward(const Tensor& grad, const Tensor& x, const Tensor& a, std::optional<Tensor> b,
                                       std::optional<Tensor> scale_a, std::optional<Tensor> scale_b,
                                       std::optional<Tensor> weight, double value_a, double value_b,
                                       double value_weight) {
  const Problem p(x, a, b, {scale_a, value_a}, {scale_b, value_b}, {weight, value_weight});
  const WeightedSquaredErrorKernels& k = kernels_for(x, a);
  Tensor grad_x = new_output(x);
  Samples to(grad_x);
  const double outer = 2 * p.mean * *static_cast<const float*>(grad.const_data_ptr());
  p.for_pieces([&](int64_t, int64_t sample, int64_t first, const SampleRun& run) {
    k.scaled_difference(run, static_cast<float>(outer * p.weight.at(sample)), to.at(sample, first));
  });
  return grad_x;
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("weighted_squared_error.cpu", TORCH_BOX(&fastdistill::weighted_squared_error));
  m.impl("weighted_squared_error_backward.cpu", TORCH_BOX(&fastdistill::weighted_squared_error_backward));
}
