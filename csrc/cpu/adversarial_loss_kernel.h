// The loops of adversarial_loss, one table of them per instruction set and element type.
#pragma once

#include <stdint.h>

#include "element.h"

namespace fastdistill {

// f of adversarial_loss: relu(1 + z), z, log(1 + exp(z)).
enum class LossFunction { Hinge, Linear, Softplus };

struct LogitSums {
  float loss, logits, positive, negative;  // f(sign * logit), logit, logits > 0, logits < 0
};

struct AdversarialLossKernels {
  LogitSums (*sums)(LossFunction, float sign, const void* logits, int64_t count);
  // grad = scale * f'(sign * logit)
  void (*gradient)(LossFunction, float sign, float scale, const void* logits, void* grad, int64_t count);
};

#define FASTDISTILL_DECLARE(isa)                                 \
  namespace isa {                                                \
  const AdversarialLossKernels& adversarial_loss_kernels(Element); \
  }
FASTDISTILL_DECLARE(baseline)
#if defined(__x86_64__)
FASTDISTILL_DECLARE(avx2)
FASTDISTILL_DECLARE(avx512)
#endif
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
