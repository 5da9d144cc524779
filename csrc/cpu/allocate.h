// What the front end (allocate_op.cpp) and the kernel (allocate_kernel.cpp) of allocate agree on.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace star {

// Q: type of the maps, T: of the arithmetic. Strides are in elements; the tokens of a map lie side by side.
template <typename Q, typename T>
struct AllocateArgs {
  int64_t concepts, frames, rows, columns, patch;
  const Q* maps;
  int64_t sample_stride, concept_stride;
  bool largest;  // combine: the largest of the concepts instead of their mean
  double smooth;
  T sharpen, cap, mix;
  T* weights;  // (B, frames * rows * patch, columns * patch) contiguous
};

// scratch: 4 * frames * rows * columns values of T.
#define STAR_DECLARE(ISA)                                                                \
  namespace ISA {                                                                        \
  template <typename Q, typename T>                                                      \
  void allocate_sample(const AllocateArgs<Q, T>& args, int64_t index, T* scratch);       \
  }
STAR_EACH_ISA(STAR_DECLARE)
#undef STAR_DECLARE

}  // namespace star
