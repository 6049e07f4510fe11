#include "capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fastdistill {
namespace {

Capability supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // f16c came before both
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::Avx512 : avx2 ? Capability::Avx2 : Capability::Baseline;
#else
  return Capability::Baseline;
#endif
}

Capability choose() {
  const char* wanted = std::getenv("FASTDISTILL_CPU_CAPABILITY");
  if (wanted && !std::strcmp(wanted, "baseline")) return Capability::Baseline;
  if (wanted && !std::strcmp(wanted, "avx2")) return std::min(Capability::Avx2, supported());
  return supported();
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace fastdistill

extern "C" __attribute__((visibility("default"))) const char* fastdistill_cpu_capability() {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(fastdistill::cpu_capability())];
}
