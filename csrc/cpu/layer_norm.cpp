// layer_norm on the CPU: which thread does which rows. The loops are in layer_norm_kernel.cpp.
//
// Sums over rows are cut where the shape says and combined in order, so a result does not depend on the number of
// threads.
#include <algorithm>
#include <optional>
#include <tuple>

#include "../layout.h"
#include "capability.h"
#include "floats.h"
#include "layer_norm_kernel.h"
#include "tensors.h"

namespace fastdistill {
namespace {

const LayerNormKernels& kernels_for(ScalarType type) {
  const Element element = element_of(type);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::layer_norm_kernels(element);
    case Capability::Avx2:
      return avx2::layer_norm_kernels(element);
    default:
      break;
  }
#endif
  return baseline::layer_norm_kernels(element);
}

// Rows of a tensor that may be absent.
struct Source {
  const char* data = nullptr;
  int64_t stride = 0, bytes = 0;

  Source(const Tensor& t, const char* name)
      : data(static_cast<const char*>(t.const_data_ptr())),
        stride(rows_of(t, name).stride),
        bytes(static_cast<int64_t>(t.element_size())) {}
  Source(const std::optional<Tensor>& t, const char* name) {
    if (t) *this = Source(*t, name);
  }

  ConstRows from(int64_t row) const { return {data ? data + row * stride * bytes : nullptr, stride}; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, std::optional<Tensor> residual,
                                                      std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                      double eps) {
  const Rows rows = rows_of(x, "x");
  const int64_t D = rows.length, bytes = static_cast<int64_t>(x.element_size());
  const Source from(x, "x"), added(residual, "residual");
  Tensor y = new_output(x);
  Tensor s = residual ? new_output(x) : new_floats({0});
  Tensor mean = new_floats({rows.count}), rstd = new_floats({rows.count});
  const auto w = parameter_floats(weight, D, 1.0f), b = parameter_floats(bias, D, 0.0f);
  char* const to_y = static_cast<char*>(y.mutable_data_ptr());
  char* const to_s = residual ? static_cast<char*>(s.mutable_data_ptr()) : nullptr;
  float* const to_mean = static_cast<float*>(mean.mutable_data_ptr());
  float* const to_rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const LayerNormKernels& k = kernels_for(x.scalar_type());
  parallel_for(0, rows.count, tasks_per_thread(D), [&](int64_t begin, int64_t end) {
    k.forward(from.from(begin), added.from(begin), to_s ? to_s + begin * D * bytes : nullptr, to_y + begin * D * bytes,
              end - begin, D, w.get(), b.get(), eps, to_mean + begin, to_rstd + begin);
  });
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, std::optional<Tensor> grad_s,
                                                       const Tensor& s, std::optional<Tensor> weight,
                                                       const Tensor& mean, const Tensor& rstd, bool parameters) {
  const Rows rows = rows_of(s, "s");
  const int64_t D = rows.length, bytes = static_cast<int64_t>(s.element_size());
  const Source at_y(grad_y, "grad_y"), at_sum(grad_s, "grad_s"), from(s, "s");
  Tensor grad_x = new_output(s);
  Tensor grad_weight = new_floats({parameters ? D : 0}), grad_bias = new_floats({parameters ? D : 0});
  const auto w = parameter_floats(weight, D, 1.0f);
  char* const to = static_cast<char*>(grad_x.mutable_data_ptr());
  const float* const means = static_cast<const float*>(mean.const_data_ptr());
  const float* const rstds = static_cast<const float*>(rstd.const_data_ptr());
  const LayerNormKernels& k = kernels_for(s.scalar_type());

  // Float32 sums over up to 512 rows; double between these blocks.
  const int64_t rows_per_block = std::clamp<int64_t>(65536 / D, 16, 512);
  const int64_t blocks = (rows.count + rows_per_block - 1) / rows_per_block;
  const auto sums = floats(parameters ? blocks * 2 * D : 0);
  parallel_for(0, blocks, tasks_per_thread(rows_per_block * D), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * rows_per_block, count = std::min(rows_per_block, rows.count - first);
      float* const own = parameters ? &sums[block * 2 * D] : nullptr;
      if (own) std::fill_n(own, 2 * D, 0.0f);
      k.backward(at_y.from(first), at_sum.from(first), from.from(first), to + first * D * bytes, count, D, w.get(),
                 means + first, rstds + first, own);
    }
  });
  if (parameters) {
    float* const to_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
    float* const to_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
    for (int64_t i = 0; i < D; ++i) {
      double dw = 0, db = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        dw += sums[block * 2 * D + i];
        db += sums[(block * 2 + 1) * D + i];
      }
      to_weight[i] = static_cast<float>(dw);
      to_bias[i] = static_cast<float>(db);
    }
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("layer_norm.cpu", TORCH_BOX(&fastdistill::layer_norm));
  m.impl("layer_norm_backward.cpu", TORCH_BOX(&fastdistill::layer_norm_backward));
}
