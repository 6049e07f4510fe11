// group_norm_silu on the CPU: which thread does which block. The loops are in group_norm_silu_kernel.cpp.
#include <cmath>
#include <tuple>
#include <vector>

#include "group_norm_silu_problem.h"

namespace fastdistill {
namespace {

struct Forward {
  const Problem& p;
  const GroupNormSiluKernels& k;
  const char* x;
  char* y;
  float *mean, *rstd;
  double eps;
  bool silu;
  std::unique_ptr<float[]> center, scale, shift;  // (N, C)

  void finish_group(int64_t n, int64_t g, const Moments& m) {
    const double r = 1.0 / std::sqrt(m.m2 / m.count + eps);
    mean[n * p.groups + g] = static_cast<float>(m.mean);
    rstd[n * p.groups + g] = static_cast<float>(r);
    const float rounded = static_cast<float>(m.mean), lost = static_cast<float>((m.mean - rounded) * r);
    for (int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c) {
      const int64_t i = n * p.x.C + c;
      scale[i] = static_cast<float>(r) * p.weight[c];
      center[i] = rounded;
      shift[i] = p.bias[c] - lost * p.weight[c];
    }
    if (!p.add) return;
    for (int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c) {
      const int64_t i = n * p.x.C + c;
      const double exact = m.mean - p.add[i];
      center[i] = static_cast<float>(exact);
      shift[i] = static_cast<float>(p.bias[c] - (exact - center[i]) * r * p.weight[c]);
    }
  }

  ForwardConstants constants(int64_t n) const { return {&center[n * p.x.C], &scale[n * p.x.C], &shift[n * p.x.C]}; }

  void contiguous_rows(int64_t n, int64_t c, int64_t rows) const {
    k.forward_rows(x + (n * p.x.stride.n + c * p.x.S) * p.bytes, y + (n * p.x.C + c) * p.x.S * p.bytes, rows, p.x.S,
                   constants(n).from(c), silu);
  }

  void contiguous() {
    const GroupBlocks blocks(p);
    auto moments = [&](int64_t n, int64_t g, int64_t block) {
      const float* add = p.add_of(n);
      return blocks.moments(k, x + (n * p.x.stride.n + g * p.per_group * p.x.S) * p.bytes,
                            add ? add + g * p.per_group : nullptr, p.bytes, block);
    };
    if (p.group_per_task()) {
      parallel_for(0, p.x.N * p.groups, tasks_per_thread(p.per_group * p.x.S), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / p.groups, g = i % p.groups;
          Moments total{0, 0, 0};
          for (int64_t block = 0; block < blocks.count; ++block) combine(total, moments(n, g, block));
          finish_group(n, g, total);
          contiguous_rows(n, g * p.per_group, p.per_group);
        }
      });
      return;
    }
    std::vector<Moments> parts(p.x.N * p.groups * blocks.count);
    parallel_for(0, static_cast<int64_t>(parts.size()), tasks_per_thread(kBlock), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        parts[i] = moments(i / blocks.count / p.groups, i / blocks.count % p.groups, i % blocks.count);
    });
    for (int64_t i = 0; i < p.x.N * p.groups; ++i) {
      Moments total{0, 0, 0};
      for (int64_t block = 0; block < blocks.count; ++block) combine(total, parts[i * blocks.count + block]);
      finish_group(i / p.groups, i % p.groups, total);
    }
    parallel_for(0, p.x.N * p.x.C, tasks_per_thread(p.x.S), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contiguous_rows(i / p.x.C, i % p.x.C, 1);
    });
  }

  const char* x_at(int64_t n, int64_t pixel, int64_t channel) const {
    return x + (n * p.x.stride.n + pixel * p.x.stride.s + channel) * p.bytes;
  }

  void pixels(int64_t n, int64_t first, int64_t rows, int64_t channel, int64_t channels) const {
    k.forward_pixels(x_at(n, first, channel), p.x.stride.s, y + ((n * p.x.S + first) * p.x.C + channel) * p.bytes,
                     p.x.C, rows, channels, constants(n).from(channel), silu);
  }

  // Both sweeps over a slab by one thread. The partial moments are those of channels_last(), and so is the result.
  void slab(const Slabs& slabs, const PixelTasks& tasks, int64_t n, int64_t slab, float* scratch, Moments* parts) {
    const int64_t group = slab * slabs.groups, groups = slabs.groups_of(p, slab);
    const int64_t channel = group * p.per_group, channels = groups * p.per_group;
    const float* add = p.add ? p.add_of(n) + channel : nullptr;
    for (int64_t i = 0; i < tasks.per_sample; ++i) {
      const int64_t first = i * tasks.rows_per_task;
      k.moments_pixels(x_at(n, first, channel), std::min(tasks.rows_per_task, p.x.S - first), p.x.stride.s, channels,
                       groups, add, scratch, &parts[i * groups]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      Moments total{0, 0, 0};
      for (int64_t i = 0; i < tasks.per_sample; ++i) combine(total, parts[i * groups + g]);
      finish_group(n, group + g, total);
    }
    for (int64_t i = tasks.per_sample - 1; i >= 0; --i) {
      const int64_t first = i * tasks.rows_per_task;
      pixels(n, first, std::min(tasks.rows_per_task, p.x.S - first), channel, channels);
    }
  }

  void channels_last() {
    const PixelTasks tasks(p);
    if (const Slabs slabs(p); slabs.serve(p)) {
      const int64_t grain = tasks_per_thread(slabs.channels * p.x.S);
      parallel_for(0, p.x.N * slabs.per_sample, grain, [&](int64_t begin, int64_t end) {
        const auto scratch = floats(3 * slabs.channels);
        std::vector<Moments> parts(tasks.per_sample * slabs.groups);
        for (int64_t i = begin; i < end; ++i)
          slab(slabs, tasks, i / slabs.per_sample, i % slabs.per_sample, scratch.get(), parts.data());
      });
      return;
    }
    const int64_t grain = tasks_per_thread(tasks.rows_per_task * p.x.C);
    std::vector<Moments> parts(p.x.N * tasks.per_sample * p.groups);
    parallel_for(0, p.x.N * tasks.per_sample, grain, [&](int64_t begin, int64_t end) {
      const auto scratch = floats(3 * p.x.C);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / tasks.per_sample, first = i % tasks.per_sample * tasks.rows_per_task;
        k.moments_pixels(x_at(n, first, 0), std::min(tasks.rows_per_task, p.x.S - first), p.x.stride.s, p.x.C, p.groups,
                         p.add_of(n), scratch.get(), &parts[i * p.groups]);
      }
    });
    for (int64_t n = 0; n < p.x.N; ++n)
      for (int64_t g = 0; g < p.groups; ++g) {
        Moments total{0, 0, 0};
        for (int64_t i = 0; i < tasks.per_sample; ++i)
          combine(total, parts[(n * tasks.per_sample + i) * p.groups + g]);
        finish_group(n, g, total);
      }
    for_pixels_backwards(p, [&](int64_t n, int64_t first, int64_t rows) { pixels(n, first, rows, 0, p.x.C); });
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, std::optional<Tensor> add, double eps,
                                                   bool silu) {
  const Problem p(x, num_groups, weight, bias, add);
  Tensor y = new_output(x);
  Tensor mean = new_floats({p.x.N, num_groups});
  Tensor rstd = new_floats({p.x.N, num_groups});
  const int64_t constants = p.x.N * p.x.C;
  Forward run{p,
              kernels_for(x.scalar_type()),
              static_cast<const char*>(x.const_data_ptr()),
              static_cast<char*>(y.mutable_data_ptr()),
              static_cast<float*>(mean.mutable_data_ptr()),
              static_cast<float*>(rstd.mutable_data_ptr()),
              eps,
              silu,
              floats(constants),
              floats(constants),
              floats(constants)};
  p.x.channels_last ? run.channels_last() : run.contiguous();
  return {y, mean, rstd};
}

}  // namespace
}  // namespace fastdistill

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("group_norm_silu.cpu", TORCH_BOX(&fastdistill::group_norm_silu));
}
