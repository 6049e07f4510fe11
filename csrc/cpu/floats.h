// float32 beside the tensors of a call: its small parameters, read as float32, and what it returns per row or channel.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>

#include "tensors.h"

namespace fastdistill {

template <typename T>
void widen(const void* from, int64_t stride, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(static_cast<const T*>(from)[i * stride]);
    to[i] = value == value ? value : std::numeric_limits<float>::quiet_NaN();  // see round_to_bfloat16
  }
}

// One row of a small parameter tensor (weight, bias, …) as float32.
inline void read_floats(const Tensor& t, int64_t offset, int64_t stride, int64_t count, float* to) {
  const char* from = static_cast<const char*>(t.const_data_ptr()) + offset * static_cast<int64_t>(t.element_size());
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return widen<torch::headeronly::Half>(from, stride, count, to);
    case ScalarType::BFloat16:
      return widen<torch::headeronly::BFloat16>(from, stride, count, to);
    default:
      return widen<float>(from, stride, count, to);
  }
}

// Not initialised: of a small call such arrays are a good part of the data.
inline std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// A dense float32 tensor. `torch::stable::new_empty` looks its op up by name: half a microsecond more each.
inline Tensor new_floats(std::initializer_list<int64_t> sizes) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = *(sizes.begin() + 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

// A parameter (length,) as float32; `absent` throughout where the call has none.
inline std::unique_ptr<float[]> parameter_floats(const std::optional<Tensor>& parameter, int64_t length, float absent) {
  auto values = floats(length);
  if (parameter) {
    read_floats(*parameter, 0, parameter->stride(0), length, values.get());
  } else {
    std::fill_n(values.get(), length, absent);
  }
  return values;
}

}  // namespace fastdistill
