// Kernel files are compiled once per instruction set, each into a namespace of its own; the best one is chosen once.
#pragma once
#include <cstdlib>
#include <cstring>

#if defined(STAR_HAS_AVX2)
#include <cpuid.h>
#endif

namespace star {

enum class Isa { baseline, avx2, avx512 };

#if defined(STAR_HAS_AVX2)
// Which clang's __builtin_cpu_supports does not know.
inline bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// The widest instruction set that was compiled and that this processor has; STAR_ISA=baseline|avx2|avx512 lowers it.
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#if defined(STAR_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) best = Isa::avx2;
#endif
#if defined(STAR_HAS_AVX512)
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = Isa::avx512;
#endif
    const char* wish = std::getenv("STAR_ISA");
    if (wish && !std::strcmp(wish, "baseline")) return Isa::baseline;
    if (wish && !std::strcmp(wish, "avx2") && best == Isa::avx512) return Isa::avx2;
    return best;
  }();
  return chosen;
}

}  // namespace star

// Declares a kernel in the namespace of every instruction set that is compiled.
#if defined(STAR_HAS_AVX512)
#define STAR_EACH_ISA(DECLARE) DECLARE(baseline) DECLARE(avx2) DECLARE(avx512)
#define STAR_SELECT(...) \
  (isa() == Isa::avx512 ? &avx512::__VA_ARGS__ : isa() == Isa::avx2 ? &avx2::__VA_ARGS__ : &baseline::__VA_ARGS__)
#else
#define STAR_EACH_ISA(DECLARE) DECLARE(baseline)
#define STAR_SELECT(...) (&baseline::__VA_ARGS__)
#endif
