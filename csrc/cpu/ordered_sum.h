// Sums in double, in an order that depends on the length alone.
#pragma once
#include <cstdint>

namespace star::STAR_ISA {

template <typename F>
static inline __attribute__((always_inline)) double ordered_sum(int64_t count, F value) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int k = 0; k < 8; k++) lanes[k] += value(i + k);
  for (int k = 0; i < count; i++, k++) lanes[k] += value(i);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace star::STAR_ISA
