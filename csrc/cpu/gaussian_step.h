// What the front end (gaussian_step_op.cpp) and the kernel (gaussian_step_kernel.cpp) of gaussian_step agree on.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "floats.h"

namespace star {

constexpr int64_t STEP_BLOCK = 1024;  // elements that are converted and computed at once

// T: type of the arithmetic. Tensors are contiguous; each keeps its type, so that none is copied as a whole.
template <typename T>
struct GaussianStepArgs {
  int64_t elements;  // of a sample
  Floats<const void> sample, velocity, unconditional_velocity, noise;  // the last two null for none
  T guidance_scale;
  const int64_t* seeds;      // (B,), of noise that is drawn here; null for none
  const T *a, *b, *s;        // (B,)
  Floats<void> prev_sample;  // in the type of sample
  T* mean;
};

// One block of one sample.
#define STAR_DECLARE(ISA)                                                                          \
  namespace ISA {                                                                                  \
  template <typename T>                                                                            \
  void gaussian_step_block(const GaussianStepArgs<T>& args, int64_t index, int64_t block);         \
  }
STAR_EACH_ISA(STAR_DECLARE)
#undef STAR_DECLARE

}  // namespace star
