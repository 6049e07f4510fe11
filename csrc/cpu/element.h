// The element types of the CPU kernels.
#pragma once

namespace fastdistill {

enum class Element { Float32, Float16, BFloat16 };

}  // namespace fastdistill
