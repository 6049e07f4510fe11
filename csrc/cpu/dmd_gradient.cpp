// dmd_gradient on the CPU: which thread does which piece. The loops are in dmd_gradient_kernel.cpp.
//
// A sample is cut into blocks where its size says, and their sums are added in order: a result does not depend on the
// number of threads.
#include "../dmd_gradient.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "capability.h"
#include "dmd_gradient_kernel.h"
#include "tensors.h"

namespace fastdistill {
namespace {

using namespace dmd_gradient;

constexpr int64_t kBlock = 8192;  // float32 sums within, double between

DmdGradientKernels kernels_for(ScalarType x, ScalarType x_t, ScalarType predictions) {
  const Element of_x = element_of(x), of_x_t = element_of(x_t), of_predictions = element_of(predictions);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::dmd_gradient_kernels(of_x, of_x_t, of_predictions);
    case Capability::Avx2:
      return avx2::dmd_gradient_kernels(of_x, of_x_t, of_predictions);
    default:
      break;
  }
#endif
  return baseline::dmd_gradient_kernels(of_x, of_x_t, of_predictions);
}

struct Sums {
  double squares = 0, magnitudes = 0;
  int64_t guarded = 0;

  void add(const DmdGradientSums& other) {
    squares += other.squares;
    magnitudes += other.magnitudes;
    guarded += other.guarded;
  }
};

struct Call {
  DmdGradientKernels k;
  int64_t elements, blocks;  // of a sample
  Samples x, x_t, real, fake, uncond;
  Terms terms;
  Coefficient alpha, sigma;
  float guidance_scale, scale;
  float *gradient, *normaliser;

  const char* at(const Samples& t, int64_t sample, int64_t first) const {
    return t.data ? static_cast<const char*>(t.data) + (sample * t.stride + first) * t.bytes : nullptr;
  }
  GuidedPrediction real_at(int64_t sample, int64_t first) const {
    return {at(real, sample, first), at(uncond, sample, first), guidance_scale};
  }
  int64_t block_size(int64_t block) const { return std::min(kBlock, elements - block * kBlock); }
  ToData to_data(int64_t sample) const { return ToData(terms, alpha.of(sample), sigma.of(sample)); }

  float distance(int64_t sample, int64_t block) const {
    const ToData mu = to_data(sample);
    const int64_t first = block * kBlock;
    return k.distance(at(x, sample, first), at(x_t, sample, first), real_at(sample, first), mu.from_x_t, mu.from_pred,
                      block_size(block));
  }

  // What a sample's differences are multiplied with; NaN where all of it is guarded.
  float factor_of(int64_t sample, double total_distance) const {
    const float mean = static_cast<float>(total_distance / static_cast<double>(elements));
    normaliser[sample] = mean;
    const float factor = to_data(sample).from_pred / mean;
    return mean >= kNormaliserBound && std::isfinite(mean) && std::isfinite(factor) ? factor : NAN;
  }

  DmdGradientSums block_gradient(int64_t sample, int64_t block, float factor) const {
    const int64_t first = block * kBlock, n = block_size(block);
    float* const to = gradient + sample * elements + first;
    if (std::isnan(factor)) {
      std::fill_n(to, n, 0.0f);
      return {0.0f, 0.0f, n};
    }
    return k.gradient(real_at(sample, first), at(fake, sample, first), factor, scale, to, n);
  }

  // A sample after the other: each stays in cache between its two sweeps.
  Sums sample(int64_t i) const {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += distance(i, block);
    const float factor = factor_of(i, total);
    Sums sums;
    for (int64_t block = 0; block < blocks; ++block) sums.add(block_gradient(i, block, factor));
    return sums;
  }

  // The same by all threads together.
  Sums sample_in_parallel(int64_t i) const {
    std::vector<float> distances(blocks);
    std::vector<DmdGradientSums> parts(blocks);
    const int64_t each = tasks_per_thread(kBlock);
    parallel_for(0, blocks, each, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) distances[block] = distance(i, block);
    });
    double total = 0;
    for (float part : distances) total += part;
    const float factor = factor_of(i, total);
    parallel_for(0, blocks, each, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) parts[block] = block_gradient(i, block, factor);
    });
    Sums sums;
    for (const DmdGradientSums& part : parts) sums.add(part);
    return sums;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, std::optional<Tensor> x_t, const Tensor& pred_real, const Tensor& pred_fake,
    std::optional<Tensor> pred_real_uncond, std::optional<Tensor> alpha, std::optional<Tensor> sigma, double alpha_value,
    double sigma_value, double data, double data_sigma, double noise, double noise_alpha, double guidance_scale,
    double scale) {
  const int64_t samples = x.size(0);
  Tensor gradient = with_large_pages(new_gradient(x));
  Tensor normaliser = new_tensor(x, {samples}, {1}, aoti_torch_dtype_float32());
  Tensor loss = new_tensor(x, {}, {}, aoti_torch_dtype_float32());
  Tensor grad_abs_mean = new_tensor(x, {}, {}, aoti_torch_dtype_float32());
  Tensor guarded = new_tensor(x, {}, {}, aoti_torch_dtype_int64());
  const int64_t elements = x.numel() / samples;
  const Call call{kernels_for(x.scalar_type(), x_t ? x_t->scalar_type() : x.scalar_type(), pred_real.scalar_type()),
                  elements,
                  (elements + kBlock - 1) / kBlock,
                  Samples(x),
                  Samples(x_t),
                  Samples(pred_real),
                  Samples(pred_fake),
                  Samples(pred_real_uncond),
                  {static_cast<float>(data), static_cast<float>(data_sigma), static_cast<float>(noise),
                   static_cast<float>(noise_alpha)},
                  coefficient(alpha, alpha_value),
                  coefficient(sigma, sigma_value),
                  static_cast<float>(guidance_scale),
                  static_cast<float>(scale),
                  static_cast<float*>(gradient.mutable_data_ptr()),
                  static_cast<float*>(normaliser.mutable_data_ptr())};
  std::vector<Sums> sums(samples);
  if (samples >= torch::stable::get_num_threads()) {
    parallel_for(0, samples, tasks_per_thread(elements), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sums[i] = call.sample(i);
    });
  } else {
    for (int64_t i = 0; i < samples; ++i) sums[i] = call.sample_in_parallel(i);
  }
  Sums total;
  for (const Sums& part : sums) {
    total.squares += part.squares;
    total.magnitudes += part.magnitudes;
    total.guarded += part.guarded;
  }
  const double numel = static_cast<double>(x.numel());
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(0.5 * total.squares / numel);
  *static_cast<float*>(grad_abs_mean.mutable_data_ptr()) = static_cast<float>(total.magnitudes / numel);
  *static_cast<int64_t*>(guarded.mutable_data_ptr()) = total.guarded;
  return {loss, gradient, normaliser, grad_abs_mean, guarded};
}

Tensor backward(const Tensor& grad_loss, const Tensor& gradient, ScalarType dtype) {
  const std::vector<int64_t> sizes(gradient.sizes().begin(), gradient.sizes().end());
  const std::vector<int64_t> strides(gradient.strides().begin(), gradient.strides().end());
  const int32_t type = dtype == ScalarType::Half       ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  Tensor grad_x = with_large_pages(new_tensor(gradient, sizes, strides, type));
  const int64_t numel = gradient.numel(), bytes = static_cast<int64_t>(grad_x.element_size());
  const float value = *static_cast<const float*>(grad_loss.const_data_ptr());
  const float factor = value == value ? value : std::numeric_limits<float>::quiet_NaN();  // see round_to_bfloat16
  const float* const g = static_cast<const float*>(gradient.const_data_ptr());
  char* const to = static_cast<char*>(grad_x.mutable_data_ptr());
  const DmdGradientKernels k = kernels_for(dtype, dtype, dtype);
  parallel_for(0, numel, kElementsPerThread,
               [&](int64_t begin, int64_t end) { k.backward(g + begin, factor, to + begin * bytes, end - begin); });
  return grad_x;
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("dmd_gradient.cpu", TORCH_BOX(&fastdistill::forward));
  m.impl("dmd_gradient_backward.cpu", TORCH_BOX(&fastdistill::backward));
}
