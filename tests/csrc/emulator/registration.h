// Included in front of every source: what it registers for CUDA serves CPU tensors here.
#pragma once
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
