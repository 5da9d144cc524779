// Sums in double, in an order that depends on the length alone.
#pragma once
#include <cstdint>

namespace star::STAR_ISA {

template <typename F>
static inline __attribute__((always_inline)) double ordered_sum(int64_t count, F value) {
  constexpr int LANES = 16;
  double lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
#pragma omp simd
    for (int k = 0; k < LANES; k++) lanes[k] += value(i + k);
  for (int k = 0; i < count; i++, k++) lanes[k] += value(i);
  for (int half = LANES / 2; half; half /= 2)
    for (int k = 0; k < half; k++) lanes[k] += lanes[k + half];
  return lanes[0];
}

}  // namespace star::STAR_ISA
