// Which instruction set the CPU kernels use: chosen once, at the first call.
#pragma once

namespace fastdistill {

enum class Capability { Baseline, Avx2, Avx512 };

// The best set this processor has, or the lower one that FASTDISTILL_CPU_CAPABILITY=baseline|avx2|avx512 asks for.
Capability cpu_capability();

}  // namespace fastdistill
