// Chooses the variant once, by what the processor can do; `SPECDEC_ISA` or set_isa() forces another.
#pragma once
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"

namespace specdec {

// What was built and runs on this machine, the best first.
inline const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> out;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512bf16_kernels && avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
      out.push_back(avx512bf16_kernels());
    if (avx512_kernels && avx512) out.push_back(avx512_kernels());
    if (avx2_kernels && avx2) out.push_back(avx2_kernels());
#endif
    out.push_back(portable_kernels());
    return out;
  }();
  return found;
}

inline const Kernels* named(const std::string& name) {
  for (const Kernels* kernels : usable())
    if (name == kernels->name) return kernels;
  return nullptr;
}

inline std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels = [] {
    const char* wish = std::getenv("SPECDEC_ISA");
    const Kernels* found = wish ? named(wish) : nullptr;
    return found ? found : usable().front();
  }();
  return kernels;
}

inline const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace specdec
