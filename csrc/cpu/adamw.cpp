// adamw on the CPU: whether the step is taken, its factors, and which thread does which chunk of which tensor.
#include <cmath>
#include <optional>
#include <vector>

#include "../eight_bit.h"
#include "adamw_kernel.h"
#include "capability.h"
#include "chunks.h"

namespace fastdistill {
namespace {

static_assert(Chunks::kElements % eight_bit::kBlock == 0, "a chunk begins with a block");

AdamwLoop loop_for(ScalarType type, bool eight_bits, bool ema) {
  const Element element = element_of(type);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::adamw_loop(element, eight_bits, ema);
    case Capability::Avx2:
      return avx2::adamw_loop(element, eight_bits, ema);
    default:
      break;
  }
#endif
  return baseline::adamw_loop(element, eight_bits, ema);
}

float value_of(const std::optional<Tensor>& scalar, double otherwise) {
  return scalar ? *static_cast<const float*>(scalar->const_data_ptr()) : static_cast<float>(otherwise);
}

template <typename T>
T* data_of(const std::vector<Tensor>& tensors, size_t i) {
  return tensors.empty() ? nullptr : static_cast<T*>(tensors[i].mutable_data_ptr());
}

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> masters,
           std::vector<Tensor> emas, std::vector<Tensor> scales, std::optional<Tensor> skipped, Tensor norm,
           std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> lr_tensor,
           std::optional<Tensor> ema_decay_tensor, double lr_value, double beta1, double beta2, double eps,
           double weight_decay, double max_grad_norm, double ema_decay, bool maximize) {
  const float scale = value_of(grad_scale, 1.0);
  const float total = value_of(norm, 0.0) / scale;
  if (!std::isfinite(total) || value_of(found_inf, 0.0) != 0.0f) {
    if (skipped) ++*static_cast<int64_t*>(skipped->mutable_data_ptr());
    return;
  }
  const double lr = lr_tensor ? value_of(lr_tensor, 0.0) : lr_value;
  const float clip = std::min(1.0f, static_cast<float>(max_grad_norm) / (total + 1e-6f));
  AdamwFactors common{};
  common.grad = (maximize ? -clip : clip) / scale;
  common.decay = static_cast<float>(1.0 - lr * weight_decay);
  common.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  common.beta2 = static_cast<float>(beta2);
  common.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  common.eps = static_cast<float>(eps);
  common.ema_weight = static_cast<float>(1.0 - (ema_decay_tensor ? value_of(ema_decay_tensor, 0.0) : ema_decay));

  struct Task {
    AdamwRun run;
    AdamwFactors factors;
    AdamwLoop loop;
    int64_t bytes, moment_bytes;
  };
  std::vector<Task> tasks(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    float& step = *static_cast<float*>(steps[i].mutable_data_ptr());
    step += 1.0f;
    Task& t = tasks[i];
    t.factors = common;
    t.factors.step = static_cast<uint32_t>(step);
    t.factors.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))));
    t.factors.inverse_root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))));
    t.bytes = static_cast<int64_t>(params[i].element_size());
    t.moment_bytes = static_cast<int64_t>(exp_avgs[i].element_size());
    t.loop = loop_for(params[i].scalar_type(), !scales.empty(), !emas.empty());
    t.run.param = params[i].mutable_data_ptr();
    t.run.grad = grads[i].const_data_ptr();
    t.run.exp_avg = exp_avgs[i].mutable_data_ptr();
    t.run.exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr();
    t.run.exp_avg_scale = data_of<float>(scales, i);
    t.run.exp_avg_sq_scale = scales.empty() ? nullptr : t.run.exp_avg_scale + scales[i].size(1);
    t.run.master = data_of<float>(masters, i);
    t.run.ema = data_of<float>(emas, i);
  }
  Chunks(params).for_each([&](int64_t, size_t tensor, int64_t first, int64_t count) {
    const Task& t = tasks[tensor];
    AdamwRun run = t.run;
    run.param = static_cast<char*>(run.param) + first * t.bytes;
    run.grad = static_cast<const char*>(run.grad) + first * t.bytes;
    run.exp_avg = static_cast<char*>(run.exp_avg) + first * t.moment_bytes;
    run.exp_avg_sq = static_cast<char*>(run.exp_avg_sq) + first * t.moment_bytes;
    run.exp_avg_scale += run.exp_avg_scale ? first / eight_bit::kBlock : 0;
    run.exp_avg_sq_scale += run.exp_avg_sq_scale ? first / eight_bit::kBlock : 0;
    run.master += run.master ? first : 0;
    run.ema += run.ema ? first : 0;
    run.first = first;
    run.count = count;
    t.loop(run, t.factors);
  });
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) { m.impl("adamw.cpu", TORCH_BOX(&fastdistill::adamw)); }
