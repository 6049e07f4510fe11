// group_norm_silu on the CPU: which thread does which block. The loops themselves are in group_norm_silu_kernel.cpp.
//
// Work is cut into blocks whose borders depend on the shape alone, and partial results are combined in block order, so
// a result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../layout.h"
#include "capability.h"
#include "group_norm_silu_kernel.h"

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kBlock = 8192;           // elements of one moments block: 32 KiB of float32, read twice from L1
constexpr int64_t kBlocksPerTask = 8;      // channels last: blocks combined before they reach the workspace
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it saves

const GroupNormSiluKernels& kernels_for(ScalarType type) {
  const Element element = type == ScalarType::Half       ? Element::Float16
                          : type == ScalarType::BFloat16 ? Element::BFloat16
                                                         : Element::Float32;
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::Avx512:
      return avx512::group_norm_silu_kernels(element);
    case Capability::Avx2:
      return avx2::group_norm_silu_kernels(element);
    default:
      break;
  }
#endif
  return baseline::group_norm_silu_kernels(element);
}

template <typename T>
void widen(const void* from, int64_t stride, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(static_cast<const T*>(from)[i * stride]);
}

// One row of a small parameter tensor (weight, bias, add) as float32.
void read_floats(const Tensor& t, int64_t offset, int64_t stride, int64_t count, float* to) {
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

// Everything both directions know about a call.
struct Problem {
  Layout x;
  int64_t groups, per_group;     // per_group = C / groups channels
  int64_t bytes;                 // per element
  std::vector<float> weight, bias;  // (C,), 1 and 0 where absent
  std::vector<float> add;        // (N, C), empty where absent

  Problem(const Tensor& x_, int64_t groups_, const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_,
          const std::optional<Tensor>& add_)
      : x(layout_of(x_)),
        groups(groups_),
        per_group(x.C / groups_),
        bytes(static_cast<int64_t>(x_.element_size())),
        weight(x.C, 1.0f),
        bias(x.C, 0.0f) {
    if (weight_) read_floats(*weight_, 0, weight_->stride(0), x.C, weight.data());
    if (bias_) read_floats(*bias_, 0, bias_->stride(0), x.C, bias.data());
    if (add_) {
      add.resize(x.N * x.C);
      for (int64_t n = 0; n < x.N; ++n)
        read_floats(*add_, n * add_->stride(0), add_->stride(1), x.C, &add[n * x.C]);
    }
  }

  const float* add_of(int64_t n) const { return add.empty() ? nullptr : &add[n * x.C]; }
  int64_t tasks_per_thread(int64_t elements_per_task) const {
    return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_task));
  }
  // Whole groups as tasks keep a group in cache between its sweeps; with fewer groups than threads, parts of them.
  bool group_per_task() const { return x.N * groups >= torch::stable::get_num_threads(); }
};

// How one group of a contiguous tensor is cut: whole rows (channels) per block, or parts of one row.
struct GroupBlocks {
  int64_t rows, length;  // the group as rows x length; one row where nothing differs between channels
  int64_t rows_per_block, blocks_per_row, count;

  GroupBlocks(const Problem& p)
      : rows(p.add.empty() ? 1 : p.per_group), length(p.add.empty() ? p.per_group * p.x.S : p.x.S) {
    rows_per_block = std::max<int64_t>(1, kBlock / length);
    blocks_per_row = (length + kBlock - 1) / kBlock;
    count = blocks_per_row > 1 ? rows * blocks_per_row : (rows + rows_per_block - 1) / rows_per_block;
  }

  Moments moments(const GroupNormSiluKernels& k, const char* group, const float* add, int64_t bytes, int64_t i) const {
    const int64_t row = blocks_per_row > 1 ? i / blocks_per_row : i * rows_per_block;
    const int64_t start = blocks_per_row > 1 ? i % blocks_per_row * kBlock : 0;
    const int64_t n_rows = blocks_per_row > 1 ? 1 : std::min(rows_per_block, rows - row);
    return k.moments_rows(group + (row * length + start) * bytes, n_rows, std::min(kBlock, length - start), length,
                          add ? add + row : nullptr);
  }
};

// Pixels of a channels-last tensor are cut into tasks of kBlocksPerTask blocks.
struct PixelTasks {
  int64_t rows_per_block, rows_per_task, per_sample;

  PixelTasks(const Problem& p)
      : rows_per_block(std::clamp<int64_t>(kBlock / p.x.C, 16, 1024)), rows_per_task(rows_per_block * kBlocksPerTask) {
    per_sample = (p.x.S + rows_per_task - 1) / rows_per_task;
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

struct Forward {
  const Problem& p;
  const GroupNormSiluKernels& k;
  const char* x;
  char* y;
  float *mean, *rstd;
  double eps;
  bool silu;
  std::vector<float> center, scale, shift;  // (N, C)

  void finish_group(int64_t n, int64_t g, const Moments& m) {
    const double r = 1.0 / std::sqrt(m.m2 / m.count + eps);
    mean[n * p.groups + g] = static_cast<float>(m.mean);
    rstd[n * p.groups + g] = static_cast<float>(r);
    for (int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c) {
      const int64_t i = n * p.x.C + c;
      const double exact = m.mean - (p.add.empty() ? 0.0 : p.add[i]);
      center[i] = static_cast<float>(exact);
      const double s = r * p.weight[c];
      scale[i] = static_cast<float>(s);
      shift[i] = static_cast<float>(p.bias[c] - (exact - center[i]) * s);
    }
  }

  ForwardConstants constants(int64_t n) const { return {&center[n * p.x.C], &scale[n * p.x.C], &shift[n * p.x.C]}; }

  void contiguous_row(int64_t n, int64_t c) const {
    k.forward_row(x + (n * p.x.stride.n + c * p.x.S) * p.bytes, y + (n * p.x.C + c) * p.x.S * p.bytes, p.x.S,
                  constants(n), c, silu);
  }

  void contiguous() {
    const GroupBlocks blocks(p);
    auto moments = [&](int64_t n, int64_t g, int64_t block) {
      const float* add = p.add_of(n);
      return blocks.moments(k, x + (n * p.x.stride.n + g * p.per_group * p.x.S) * p.bytes,
                            add ? add + g * p.per_group : nullptr, p.bytes, block);
    };
    if (p.group_per_task()) {
      parallel_for(0, p.x.N * p.groups, p.tasks_per_thread(p.per_group * p.x.S), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / p.groups, g = i % p.groups;
          Moments total{0, 0, 0};
          for (int64_t block = 0; block < blocks.count; ++block) combine(total, moments(n, g, block));
          finish_group(n, g, total);
          // Backwards: the end of the group is what the first sweep left in cache.
          for (int64_t c = (g + 1) * p.per_group - 1; c >= g * p.per_group; --c) contiguous_row(n, c);
        }
      });
      return;
    }
    std::vector<Moments> parts(p.x.N * p.groups * blocks.count);
    parallel_for(0, static_cast<int64_t>(parts.size()), p.tasks_per_thread(kBlock), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        parts[i] = moments(i / blocks.count / p.groups, i / blocks.count % p.groups, i % blocks.count);
    });
    for (int64_t i = 0; i < p.x.N * p.groups; ++i) {
      Moments total{0, 0, 0};
      for (int64_t block = 0; block < blocks.count; ++block) combine(total, parts[i * blocks.count + block]);
      finish_group(i / p.groups, i % p.groups, total);
    }
    parallel_for(0, p.x.N * p.x.C, p.tasks_per_thread(p.x.S), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contiguous_row(i / p.x.C, i % p.x.C);
    });
  }

  void channels_last() {
    const PixelTasks tasks(p);
    const int64_t grain = p.tasks_per_thread(tasks.rows_per_task * p.x.C);
    std::vector<Moments> parts(p.x.N * tasks.per_sample * p.groups);
    parallel_for(0, p.x.N * tasks.per_sample, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(3 * p.x.C);
      std::vector<Moments> block(p.groups);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / tasks.per_sample, first = i % tasks.per_sample * tasks.rows_per_task;
        const int64_t last = std::min(p.x.S, first + tasks.rows_per_task);
        Moments* total = &parts[i * p.groups];
        std::fill(total, total + p.groups, Moments{0, 0, 0});
        for (int64_t row = first; row < last; row += tasks.rows_per_block) {
          k.moments_pixels(x + (n * p.x.stride.n + row * p.x.stride.s) * p.bytes,
                           std::min(tasks.rows_per_block, last - row), p.x.stride.s, p.x.C, p.groups, p.add_of(n),
                           scratch.data(), block.data());
          for (int64_t g = 0; g < p.groups; ++g) combine(total[g], block[g]);
        }
      }
    });
    for (int64_t n = 0; n < p.x.N; ++n)
      for (int64_t g = 0; g < p.groups; ++g) {
        Moments total{0, 0, 0};
        for (int64_t i = 0; i < tasks.per_sample; ++i)
          combine(total, parts[(n * tasks.per_sample + i) * p.groups + g]);
        finish_group(n, g, total);
      }
    parallel_for(0, p.x.N * tasks.per_sample, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {  // backwards, as above
        const int64_t n = i / tasks.per_sample, first = i % tasks.per_sample * tasks.rows_per_task;
        k.forward_pixels(x + (n * p.x.stride.n + first * p.x.stride.s) * p.bytes, p.x.stride.s,
                         y + (n * p.x.S + first) * p.x.C * p.bytes, std::min(tasks.rows_per_task, p.x.S - first),
                         p.x.C, constants(n), silu);
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, std::optional<Tensor> add, double eps,
                                                   bool silu) {
  const Problem p(x, num_groups, weight, bias, add);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {p.x.N, num_groups}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {p.x.N, num_groups}, ScalarType::Float);
  const size_t constants = static_cast<size_t>(p.x.N * p.x.C);
  Forward run{p,
              kernels_for(x.scalar_type()),
              static_cast<const char*>(x.const_data_ptr()),
              static_cast<char*>(y.mutable_data_ptr()),
              static_cast<float*>(mean.mutable_data_ptr()),
              static_cast<float*>(rstd.mutable_data_ptr()),
              eps,
              silu,
              std::vector<float>(constants),
              std::vector<float>(constants),
              std::vector<float>(constants)};
  p.x.channels_last ? run.channels_last() : run.contiguous();
  return {y, mean, rstd};
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct Backward {
  const Problem& p;
  const GroupNormSiluKernels& k;
  const char *x, *grad_y;
  Strides3 grad_stride;
  char* grad_x;
  const float *mean, *rstd;
  float* grad_add;
  bool silu;
  std::vector<float> center, scale, offset, a, b, c;  // (N, C)
  std::vector<double> sums;                           // (N, 3, C): sum(dz), sum(dz * xhat), sum(xhat)

  void prepare() {
    const size_t size = static_cast<size_t>(p.x.N * p.x.C);
    for (auto* v : {&center, &scale, &offset, &a, &b, &c}) v->resize(size);
    sums.assign(3 * size, 0.0);
    for (int64_t i = 0; i < p.x.N * p.x.C; ++i) {
      const int64_t group = i / p.x.C * p.groups + i % p.x.C / p.per_group;
      const double exact = mean[group] - (p.add.empty() ? 0.0 : p.add[i]);
      center[i] = static_cast<float>(exact);
      scale[i] = rstd[group];
      offset[i] = static_cast<float>(-(exact - center[i]) * rstd[group]);
    }
  }

  BackwardConstants constants(int64_t n) const {
    const int64_t i = n * p.x.C;
    return {&center[i], &scale[i], &offset[i], p.weight.data(), p.bias.data(), &a[i], &b[i], &c[i]};
  }

  // From the sums of a group: the constants of grad_x = a * dz - b - c * xhat, and grad_add = sum of grad_x.
  void finish_group(int64_t n, int64_t g) {
    const double* s = &sums[n * 3 * p.x.C];
    const double count = static_cast<double>(p.per_group) * static_cast<double>(p.x.S), r = rstd[n * p.groups + g];
    double m1 = 0, m2 = 0;
    for (int64_t ch = g * p.per_group; ch < (g + 1) * p.per_group; ++ch) {
      m1 += p.weight[ch] * s[ch];
      m2 += p.weight[ch] * s[p.x.C + ch];
    }
    m1 /= count;
    m2 /= count;
    for (int64_t ch = g * p.per_group; ch < (g + 1) * p.per_group; ++ch) {
      const int64_t i = n * p.x.C + ch;
      if (count == 1) {  // the output does not depend on x; rounding errors times rstd = 1/sqrt(eps) would
        a[i] = b[i] = c[i] = grad_add[i] = 0;
        continue;
      }
      a[i] = static_cast<float>(r * p.weight[ch]);
      b[i] = static_cast<float>(r * m1);
      c[i] = static_cast<float>(r * m2);
      grad_add[i] =
          static_cast<float>(r * (p.weight[ch] * s[ch] - static_cast<double>(p.x.S) * m1 - m2 * s[2 * p.x.C + ch]));
    }
  }

  void contiguous_sums(int64_t n, int64_t ch) {
    double row[3] = {0, 0, 0};
    k.backward_sums_row(x + (n * p.x.stride.n + ch * p.x.S) * p.bytes,
                        grad_y + (n * grad_stride.n + ch * grad_stride.c) * p.bytes, grad_stride.s, p.x.S, constants(n),
                        ch, silu, row);
    for (int64_t i = 0; i < 3; ++i) sums[(n * 3 + i) * p.x.C + ch] = row[i];
  }

  void contiguous_row(int64_t n, int64_t ch) const {
    k.backward_row(x + (n * p.x.stride.n + ch * p.x.S) * p.bytes,
                   grad_y + (n * grad_stride.n + ch * grad_stride.c) * p.bytes, grad_stride.s,
                   grad_x + (n * p.x.C + ch) * p.x.S * p.bytes, p.x.S, constants(n), ch, silu);
  }

  void contiguous() {
    if (p.group_per_task()) {
      parallel_for(0, p.x.N * p.groups, p.tasks_per_thread(p.per_group * p.x.S), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / p.groups, g = i % p.groups, first = g * p.per_group, last = first + p.per_group;
          for (int64_t ch = first; ch < last; ++ch) contiguous_sums(n, ch);
          finish_group(n, g);
          for (int64_t ch = last - 1; ch >= first; --ch) contiguous_row(n, ch);
        }
      });
      return;
    }
    const int64_t rows = p.x.N * p.x.C, grain = p.tasks_per_thread(p.x.S);
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contiguous_sums(i / p.x.C, i % p.x.C);
    });
    for (int64_t i = 0; i < p.x.N * p.groups; ++i) finish_group(i / p.groups, i % p.groups);
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contiguous_row(i / p.x.C, i % p.x.C);
    });
  }

  void channels_last() {
    const PixelTasks tasks(p);
    const int64_t grain = p.tasks_per_thread(tasks.rows_per_task * p.x.C), total = p.x.N * tasks.per_sample;
    std::vector<double> parts(total * 3 * p.x.C, 0.0);
    auto at_x = [&](int64_t n, int64_t row) { return x + (n * p.x.stride.n + row * p.x.stride.s) * p.bytes; };
    auto at_grad = [&](int64_t n, int64_t row) {
      return grad_y + (n * grad_stride.n + row * grad_stride.s) * p.bytes;
    };
    parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / tasks.per_sample, first = i % tasks.per_sample * tasks.rows_per_task;
        const int64_t last = std::min(p.x.S, first + tasks.rows_per_task);
        for (int64_t row = first; row < last; row += tasks.rows_per_block)
          k.backward_sums_pixels(at_x(n, row), p.x.stride.s, at_grad(n, row), grad_stride.s, grad_stride.c,
                                 std::min(tasks.rows_per_block, last - row), p.x.C, constants(n), silu,
                                 &parts[i * 3 * p.x.C]);
      }
    });
    for (int64_t i = 0; i < total; ++i)
      for (int64_t j = 0; j < 3 * p.x.C; ++j) sums[i / tasks.per_sample * 3 * p.x.C + j] += parts[i * 3 * p.x.C + j];
    for (int64_t i = 0; i < p.x.N * p.groups; ++i) finish_group(i / p.groups, i % p.groups);
    parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        const int64_t n = i / tasks.per_sample, first = i % tasks.per_sample * tasks.rows_per_task;
        k.backward_pixels(at_x(n, first), p.x.stride.s, at_grad(n, first), grad_stride.s, grad_stride.c,
                          grad_x + (n * p.x.S + first) * p.x.C * p.bytes, std::min(tasks.rows_per_task, p.x.S - first),
                          p.x.C, constants(n), silu);
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad_y, const Tensor& x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, const Tensor& mean, const Tensor& rstd, bool silu) {
  const Problem p(x, num_groups, weight, bias, add);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_empty(x, {p.x.C}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(x, {p.x.C}, ScalarType::Float);
  Tensor grad_add = torch::stable::new_empty(x, {p.x.N, p.x.C}, ScalarType::Float);
  Backward run{p,
               kernels_for(x.scalar_type()),
               static_cast<const char*>(x.const_data_ptr()),
               static_cast<const char*>(grad_y.const_data_ptr()),
               strides_of(grad_y),
               static_cast<char*>(grad_x.mutable_data_ptr()),
               static_cast<const float*>(mean.const_data_ptr()),
               static_cast<const float*>(rstd.const_data_ptr()),
               static_cast<float*>(grad_add.mutable_data_ptr()),
               silu,
               {}, {}, {}, {}, {}, {}, {}};
  run.prepare();
  p.x.channels_last ? run.channels_last() : run.contiguous();
  float* to_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  float* to_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  for (int64_t ch = 0; ch < p.x.C; ++ch) {
    double dw = 0, db = 0;
    for (int64_t n = 0; n < p.x.N; ++n) {
      db += run.sums[n * 3 * p.x.C + ch];
      dw += run.sums[(n * 3 + 1) * p.x.C + ch];
    }
    to_weight[ch] = static_cast<float>(dw);
    to_bias[ch] = static_cast<float>(db);
  }
  return {grad_x, grad_weight, grad_bias, grad_add};
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("group_norm_silu.cpu", TORCH_BOX(&fastdistill::group_norm_silu));
  m.impl("group_norm_silu_backward.cpu", TORCH_BOX(&fastdistill::group_norm_silu_backward));
}
