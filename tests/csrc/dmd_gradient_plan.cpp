// Makes the plan of each call on standard input, "samples vectors vector multiprocessors cooperative". Prints for each:
// whether it is one launch, blocks, splits, vectors of a block, and vectors that the blocks of a sample reach.
#include "../../csrc/cuda/dmd_gradient_plan.h"

#include <cstdio>

int main() {
  using namespace fastdistill::cuda;
  long long samples, vectors;
  int vector, multiprocessors, cooperative;
  while (std::scanf("%lld %lld %d %d %d", &samples, &vectors, &vector, &multiprocessors, &cooperative) == 5) {
    const DeviceLimits limits{multiprocessors, 1024, 227 * 1024, 0, 8, cooperative != 0};
    const auto p = dmd_gradient_plan::plan(samples, vectors, vector, limits);
    std::printf("%d %lld %lld %lld %lld\n", p.whole, static_cast<long long>(p.blocks()),
                static_cast<long long>(p.splits), static_cast<long long>(p.vectors_each),
                static_cast<long long>(p.splits * p.vectors_each));
  }
}
