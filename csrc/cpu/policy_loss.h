// What the front end (policy_loss_op.cpp) and the kernel (policy_loss_kernel.cpp) of policy_loss agree on.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "star_math.h"

namespace star {

// V: type of the velocities, X: of the latents, T: of the arithmetic. Tensors are contiguous; optional ones may be null.
template <typename V, typename X, typename T>
struct PolicyLossArgs {
  int64_t batch, channels, places;
  bool packed;  // (B, L, C) instead of (B, C, H, W)
  const V *velocity, *reference_velocity;
  const X *sample, *prev_sample, *old_mean;
  const T *a, *b, *s, *precision, *log_norm, *kl_precision;  // (B,)
  const T *advantages, *weights, *old_log_prob, *step_weights;
  bool advantages_per_place, old_log_prob_per_place;
  Form form;
  Ratio ratio;
  T clip_low, clip_high, adv_clip, kl_coef;
  V* gradient;
};

// scratch: 2 * places values of T.
#define STAR_DECLARE(ISA)                                                                                 \
  namespace ISA {                                                                                         \
  template <typename V, typename X, typename T>                                                           \
  PolicyLossSums policy_loss_sample(const PolicyLossArgs<V, X, T>& args, int64_t index, T* scratch);      \
  }
STAR_EACH_ISA(STAR_DECLARE)
#undef STAR_DECLARE

}  // namespace star
