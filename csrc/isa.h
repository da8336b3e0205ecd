// Instruction sets: what the processor has, and what the environment variable COVGRPO_CPU_ISA restricts us to.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#define COVGRPO_X86 1
#define COVGRPO_AVX2 __attribute__((target("avx2,fma")))
#define COVGRPO_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define COVGRPO_AVX512BF16 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#else
#define COVGRPO_X86 0
#define COVGRPO_AVX2
#define COVGRPO_AVX512
#endif

namespace covgrpo {

enum class Isa : int { baseline, avx2, avx512, avx512bf16 };

constexpr const char* ISA_NAMES[] = {"baseline", "avx2", "avx512", "avx512bf16"};

inline Isa best_isa() {
#if COVGRPO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

// The instruction set to use. The variable is read at every call, so that tests can go through all of them. Throws
// invalid_argument where it names no instruction set, runtime_error where it names one that the processor lacks.
inline Isa chosen_isa() {
  static const Isa best = best_isa();
  const char* wanted = std::getenv("COVGRPO_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == "auto") return best;
  for (int i = 0; i < 4; ++i) {
    if (std::string(wanted) != ISA_NAMES[i]) continue;
    if (i > static_cast<int>(best))
      throw std::runtime_error(std::string("COVGRPO_CPU_ISA=") + wanted +
                               " can't run here: the processor has no more than " + ISA_NAMES[static_cast<int>(best)]);
    return static_cast<Isa>(i);
  }
  throw std::invalid_argument(
      std::string("COVGRPO_CPU_ISA must be 'auto', 'baseline', 'avx2', 'avx512' or 'avx512bf16', got '") + wanted +
      "'");
}

}  // namespace covgrpo
