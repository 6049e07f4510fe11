// The backward of group_norm_silu on the CPU: which thread does which block. The loops are in
// group_norm_silu_kernel.cpp.
#include <tuple>
#include <vector>

#include "group_norm_silu_problem.h"

namespace fastdistill {
namespace {

// dz is kept only where it stays in a cache: writing it to memory and back costs more than computing it twice.
constexpr int64_t kKeptElements = 65536;             // of a group: a quarter of a second-level cache of 1 MiB
constexpr int64_t kKeptInSharedCache = 2048 * 1024;  // of a tensor: a quarter of a last-level cache of 32 MiB

struct Backward {
  const Problem& p;
  const GroupNormSiluKernels& k;
  const char *x, *grad_y;
  Strides3 grad_stride;
  char* grad_x;
  const float *mean, *rstd;
  float* grad_add;
  bool silu;
  std::unique_ptr<float[]> center, scale, offset, a, b, c;  // (N, C)
  std::vector<double> sums;                                 // (N, 3, C): sum(dz), sum(dz * xhat), sum(xhat)

  void prepare() {
    const int64_t size = p.x.N * p.x.C;
    for (auto* v : {&center, &scale, &offset, &a, &b, &c}) *v = floats(size);
    sums.assign(static_cast<size_t>(3 * size), 0.0);
    for (int64_t group = 0; group < p.x.N * p.groups; ++group) {
      for (int64_t i = group * p.per_group; i < (group + 1) * p.per_group; ++i) {
        const double exact = mean[group] - (p.add ? p.add[i] : 0.0);
        center[i] = static_cast<float>(exact);
        scale[i] = rstd[group];
        offset[i] = static_cast<float>(-(exact - center[i]) * rstd[group]);
      }
    }
  }

  BackwardConstants constants(int64_t n) const {
    const int64_t i = n * p.x.C;
    return {&center[i], &scale[i], &offset[i], p.weight.get(), p.bias.get(), &a[i], &b[i], &c[i]};
  }

  GradientStrides grad() const { return {grad_stride.c, grad_stride.s}; }

  // dz costs an exponential; a float32 grad_x has room for it until it is overwritten.
  float* dz_in_grad_x(int64_t element) const {
    return p.bytes == sizeof(float) ? reinterpret_cast<float*>(grad_x) + element : nullptr;
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

  void contiguous_sums(int64_t n, int64_t c, int64_t rows, float* kept_dz) {
    k.backward_sums_rows(x + (n * p.x.stride.n + c * p.x.S) * p.bytes,
                         grad_y + (n * grad_stride.n + c * grad_stride.c) * p.bytes, grad(), kept_dz, rows, p.x.S,
                         constants(n).from(c), silu, &sums[n * 3 * p.x.C + c], p.x.C);
  }

  void contiguous_rows(int64_t n, int64_t c, int64_t rows, const float* kept_dz) const {
    k.backward_rows(x + (n * p.x.stride.n + c * p.x.S) * p.bytes,
                    grad_y + (n * grad_stride.n + c * grad_stride.c) * p.bytes, grad(), kept_dz,
                    grad_x + (n * p.x.C + c) * p.x.S * p.bytes, rows, p.x.S, constants(n).from(c), silu);
  }

  void contiguous() {
    if (p.group_per_task()) {
      const int64_t size = p.per_group * p.x.S;
      const bool fits_in_cache = size <= kKeptElements;
      parallel_for(0, p.x.N * p.groups, tasks_per_thread(size), [&](int64_t begin, int64_t end) {
        const auto scratch = p.bytes != sizeof(float) && fits_in_cache ? floats(size) : nullptr;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / p.groups, g = i % p.groups;
          float* kept_dz = scratch ? scratch.get() : dz_in_grad_x(i * size);
          contiguous_sums(n, g * p.per_group, p.per_group, kept_dz);
          finish_group(n, g);
          contiguous_rows(n, g * p.per_group, p.per_group, kept_dz);
        }
      });
      return;
    }
    const int64_t rows = p.x.N * p.x.C, grain = tasks_per_thread(p.x.S);
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contiguous_sums(i / p.x.C, i % p.x.C, 1, dz_in_grad_x(i * p.x.S));
    });
    for (int64_t i = 0; i < p.x.N * p.groups; ++i) finish_group(i / p.groups, i % p.groups);
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contiguous_rows(i / p.x.C, i % p.x.C, 1, dz_in_grad_x(i * p.x.S));
    });
  }

  void channels_last() {
    const PixelTasks tasks(p);
    const int64_t grain = tasks_per_thread(tasks.rows_per_task * p.x.C), total = p.x.N * tasks.per_sample;
    std::vector<double> parts(total * 3 * p.x.C, 0.0);
    auto at_x = [&](int64_t n, int64_t row) { return x + (n * p.x.stride.n + row * p.x.stride.s) * p.bytes; };
    auto at_grad = [&](int64_t n, int64_t row) {
      return grad_y + (n * grad_stride.n + row * grad_stride.s) * p.bytes;
    };
    const bool fits_in_cache = p.x.N * p.x.C * p.x.S <= kKeptInSharedCache;
    auto kept = [&](int64_t n, int64_t row) {
      return fits_in_cache ? dz_in_grad_x((n * p.x.S + row) * p.x.C) : nullptr;
    };
    parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
      const auto scratch = floats(3 * p.x.C);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / tasks.per_sample, first = i % tasks.per_sample * tasks.rows_per_task;
        k.backward_sums_pixels(at_x(n, first), p.x.stride.s, at_grad(n, first), grad(), kept(n, first),
                               std::min(tasks.rows_per_task, p.x.S - first), p.x.C, constants(n), silu, scratch.get(),
                               &parts[i * 3 * p.x.C]);
      }
    });
    for (int64_t i = 0; i < total; ++i)
      for (int64_t j = 0; j < 3 * p.x.C; ++j) sums[i / tasks.per_sample * 3 * p.x.C + j] += parts[i * 3 * p.x.C + j];
    for (int64_t i = 0; i < p.x.N * p.groups; ++i) finish_group(i / p.groups, i % p.groups);
    for_pixels_backwards(p, [&](int64_t n, int64_t first, int64_t rows) {
      k.backward_pixels(at_x(n, first), p.x.stride.s, at_grad(n, first), grad(), kept(n, first),
                        grad_x + (n * p.x.S + first) * p.x.C * p.bytes, rows, p.x.C, constants(n), silu);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad_y, const Tensor& x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, const Tensor& mean, const Tensor& rstd, bool silu) {
  const Problem p(x, num_groups, weight, bias, add);
  Tensor grad_x = new_output(x);
  Tensor grad_weight = new_floats({p.x.C});
  Tensor grad_bias = new_floats({p.x.C});
  Tensor grad_add = new_floats({p.x.N, p.x.C});
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
  m.impl("group_norm_silu_backward.cpu", TORCH_BOX(&fastdistill::group_norm_silu_backward));
}
