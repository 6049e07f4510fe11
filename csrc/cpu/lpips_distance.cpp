// lpips_distance on the CPU: which thread does which pixels. The loops are in lpips_distance_kernel.cpp.
//
// Blocks of pixels are cut where the shape says, and their sums combined in order, so a result does not depend on the
// number of threads.
#include <algorithm>
#include <tuple>

#include "../layout.h"
#include "capability.h"
#include "floats.h"
#include "lpips_distance_kernel.h"
#include "tensors.h"

namespace fastdistill {
namespace {

const LpipsKernels& kernels_for(ScalarType type) {
  const Element element = element_of(type);
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::lpips_kernels(element);
    case Capability::Avx2:
      return avx2::lpips_kernels(element);
    default:
      break;
  }
#endif
  return baseline::lpips_kernels(element);
}

// A tensor (B, C, *spatial) read or written through three strides.
struct Image {
  char* data = nullptr;  // null: not wanted
  Strides3 stride{};
  int64_t bytes = 0;

  Image() = default;
  explicit Image(const Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        stride(strides_of(t)),
        bytes(static_cast<int64_t>(t.element_size())) {}

  bool has_rows() const { return !data || stride.c == 1; }
  char* at(int64_t n, int64_t s) const { return data ? data + (n * stride.n + s * stride.s) * bytes : nullptr; }
};

// How a call is cut: blocks of pixels, none across two samples.
struct Cut {
  int64_t B, C, S, pixels, per_sample;
  bool rows;

  Cut(const Tensor& x, bool rows_) : B(x.size(0)), C(x.size(1)), S(x.numel() / (x.size(0) * x.size(1))), rows(rows_) {
    // Of planes, two blocks in float32 stay in the second-level cache and a channel's run is no shorter than a step.
    constexpr int64_t kPlanesFloats = 65536, kRowsElements = 16384, kStep = 32;
    pixels = rows ? std::max<int64_t>(1, kRowsElements / C)
                  : std::clamp<int64_t>(kPlanesFloats / (2 * C) / kStep * kStep, kStep, 1024);
    pixels = std::min(pixels, S);
    per_sample = (S + pixels - 1) / pixels;
  }

  int64_t blocks() const { return B * per_sample; }

  // body(block, sample, loops, LpipsBlock, first pixel, scratch) for each, in parallel.
  template <typename Body>
  void for_blocks(const LpipsKernels& kernels, const Image& x, const Image& y, const float* weight,
                  const Body& body) const {
    const LpipsKernels::Loops& loops = rows ? kernels.rows : kernels.planes;
    parallel_for(0, blocks(), tasks_per_thread(C * pixels), [&](int64_t begin, int64_t end) {
      const auto scratch = floats(rows ? 0 : lpips_scratch(C, pixels));
      for (int64_t block = begin; block < end; ++block) {
        const int64_t n = block / per_sample, first = block % per_sample * pixels;
        const LpipsBlock b{{x.at(n, first), x.stride.c, x.stride.s},
                           {y.at(n, first), y.stride.c, y.stride.s},
                           weight,
                           C,
                           std::min(pixels, S - first)};
        body(block, n, first, loops, b, scratch.get());
      }
    });
  }
};

// Channels side by side, unless there is one: pixels then fill the vectors better.
bool as_rows(const Tensor& x, std::initializer_list<Image> images) {
  bool rows = x.size(1) > 1;
  for (const Image& image : images) rows = rows && image.has_rows();
  return rows;
}

Tensor lpips_distance(const Tensor& x, const Tensor& y, const Tensor& weight) {
  Tensor distance = new_floats({x.size(0)});
  if (x.size(0) == 0) return distance;
  const Image from_x(x), from_y(y);
  const Cut cut(x, as_rows(x, {from_x, from_y}));
  const auto w = parameter_floats(weight, cut.C, 0.0f), sums = floats(cut.blocks());
  cut.for_blocks(kernels_for(x.scalar_type()), from_x, from_y, w.get(),
                 [&](int64_t block, int64_t, int64_t, const LpipsKernels::Loops& loops, const LpipsBlock& b,
                     float* scratch) { sums[block] = loops.forward(b, scratch); });
  float* const to = static_cast<float*>(distance.mutable_data_ptr());
  for (int64_t n = 0; n < cut.B; ++n) {
    double total = 0;
    for (int64_t i = 0; i < cut.per_sample; ++i) total += sums[n * cut.per_sample + i];
    to[n] = static_cast<float>(total / static_cast<double>(cut.S));
  }
  return distance;
}

std::tuple<Tensor, Tensor, Tensor> lpips_distance_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                           const Tensor& weight, bool of_x, bool of_y,
                                                           bool of_weight) {
  const int64_t C = x.size(1);
  Tensor grad_x = of_x ? new_output(x) : torch::stable::new_empty(x, {0});
  Tensor grad_y = of_y ? new_output(y) : torch::stable::new_empty(y, {0});
  Tensor grad_weight = new_floats({of_weight ? C : 0});
  float* const to_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  if (of_weight) std::fill_n(to_weight, C, 0.0f);
  if (x.size(0) == 0) return {grad_x, grad_y, grad_weight};

  const Image from_x(x), from_y(y), to_x = of_x ? Image(grad_x) : Image(), to_y = of_y ? Image(grad_y) : Image();
  const Cut cut(x, as_rows(x, {from_x, from_y, to_x, to_y}));
  const auto w = parameter_floats(weight, C, 0.0f), scale = floats(cut.B);
  read_floats(grad, 0, grad.stride(0), cut.B, scale.get());
  const auto sums = floats(of_weight ? cut.blocks() * C : 0);
  const auto pixels = static_cast<float>(cut.S);
  cut.for_blocks(kernels_for(x.scalar_type()), from_x, from_y, w.get(),
                 [&](int64_t block, int64_t n, int64_t first, const LpipsKernels::Loops& loops, const LpipsBlock& b,
                     float* scratch) {
                   loops.backward(b, 2.0f * scale[n] / pixels, {to_x.at(n, first), to_x.stride.c, to_x.stride.s},
                                  {to_y.at(n, first), to_y.stride.c, to_y.stride.s},
                                  of_weight ? &sums[block * C] : nullptr, scratch);
                 });
  for (int64_t c = 0; of_weight && c < C; ++c) {
    double total = 0;
    for (int64_t block = 0; block < cut.blocks(); ++block)
      total += static_cast<double>(scale[block / cut.per_sample]) * sums[block * C + c];
    to_weight[c] = static_cast<float>(total / static_cast<double>(cut.S));
  }
  return {grad_x, grad_y, grad_weight};
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("lpips_distance.cpu", TORCH_BOX(&fastdistill::lpips_distance));
  m.impl("lpips_distance_backward.cpu", TORCH_BOX(&fastdistill::lpips_distance_backward));
}
