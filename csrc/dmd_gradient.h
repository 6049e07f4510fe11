// What every implementation of dmd_gradient derives from the arguments of a call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#ifdef __CUDACC__
#define FASTDISTILL_HOST_DEVICE __host__ __device__
#else
#define FASTDISTILL_HOST_DEVICE
#endif

namespace fastdistill::dmd_gradient {

// Below it x equals the teacher's prediction: nothing to divide by. (NORMALISER_BOUND in fastdistill/ops/dmd_gradient.py)
constexpr float kNormaliserBound = 1e-6f;

// A network says (data + data_sigma sigma) * data + (noise + noise_alpha alpha) * noise: see
// fastdistill.diffusion.prediction_terms, which alone knows the conventions.
struct Terms {
  float data, data_sigma, noise, noise_alpha;
};

// mu = from_x_t x_t + from_pred pred
struct ToData {
  float from_x_t, from_pred;

  // By Cramer's rule, as fastdistill.diffusion.convert has it. Without noise in it, a prediction is the data itself.
  FASTDISTILL_HOST_DEVICE ToData(const Terms& t, float alpha, float sigma) {
    const float a = t.data + t.data_sigma * sigma, b = t.noise + t.noise_alpha * alpha;
    const float determinant = alpha * b - sigma * a;
    const bool is_data = t.noise == 0.0f && t.noise_alpha == 0.0f;
    from_x_t = is_data ? 0.0f : b / determinant;
    from_pred = is_data ? 1.0f / a : -sigma / determinant;
  }
};

// alpha or sigma: a float32 tensor of shape () or (B,), or a number where there is none.
struct Coefficient {
  const float* values;
  int64_t stride;
  float value;

  FASTDISTILL_HOST_DEVICE float of(int64_t sample) const { return values ? values[sample * stride] : value; }
};

inline Coefficient coefficient(const std::optional<torch::stable::Tensor>& tensor, double value) {
  if (!tensor) return {nullptr, 0, static_cast<float>(value)};
  return {static_cast<const float*>(tensor->const_data_ptr()), tensor->dim() ? tensor->stride(0) : 0, 0.0f};
}

// What is read: samples that are dense in x's order, `stride` apart.
struct Samples {
  const void* data = nullptr;
  int64_t stride = 0, bytes = 0;

  Samples() = default;
  explicit Samples(const torch::stable::Tensor& t)
      : data(t.const_data_ptr()), stride(t.stride(0)), bytes(static_cast<int64_t>(t.element_size())) {}
  explicit Samples(const std::optional<torch::stable::Tensor>& t) {
    if (t) *this = Samples(*t);
  }
};

// A tensor of x's shape whose samples are in x's order and touch; or, from sizes alone, a contiguous one.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& x, const std::vector<int64_t>& sizes,
                                        const std::vector<int64_t>& strides, int32_t dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, x.get_device_index(),
                                                         &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor new_gradient(const torch::stable::Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(x.strides().begin(), x.strides().end());
  strides[0] = x.numel() / sizes[0];
  return new_tensor(x, sizes, strides, aoti_torch_dtype_float32());
}

}  // namespace fastdistill::dmd_gradient
