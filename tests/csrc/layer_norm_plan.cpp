// Reads calls "rows columns vector multiprocessors", prints the launch plan of each as the CUDA library makes it: kind,
// elements, threads, blocks, rows per block, of the forward, of the backward with sums and of the one without.
#include "../../csrc/cuda/layer_norm_plan.h"

#include <cstdio>

using namespace fastdistill::cuda::layer_norm;

static void print(const Plan& plan) {
  std::printf("%d %d %d %lld %d ", static_cast<int>(plan.kind), plan.elements, plan.threads,
              static_cast<long long>(plan.blocks), rows_per_block(plan));
}

int main() {
  long long rows, columns;
  int vector, multiprocessors;
  while (std::scanf("%lld %lld %d %d", &rows, &columns, &vector, &multiprocessors) == 4) {
    print(plan_forward(rows, columns, vector));
    print(plan_backward(rows, columns, vector, true, multiprocessors));
    print(plan_backward(rows, columns, vector, false, multiprocessors));
    std::puts("");
  }
}
