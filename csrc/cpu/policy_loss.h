// What the front end (policy_loss_op.cpp) and the kernels (policy_loss_kernel.cpp) of policy_loss agree on.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/tiles.h"
#include "star_math.h"

namespace star {

// V: type of the velocities, X: of the latents, T: of the arithmetic. Tensors are contiguous; optional ones may be null.
template <typename V, typename X, typename T>
struct PolicyLossArgs : LossOptions<T> {
  bool packed;  // (B, L, C) instead of (B, C, H, W)
  const V *velocity, *reference_velocity;
  const X *sample, *prev_sample;
  const T* old_mean;
  const T *a, *b, *s, *precision, *log_norm, *kl_precision;  // (B,)
  const T *advantages, *weights, *old_log_prob, *step_weights;
  bool advantages_per_location, old_log_prob_per_location;
  T* log_ratio;  // of the units, (B,) or (B, locations): what the loss writes and the gradient reads
  T grad_loss;
  V* gradient;      // null: not asked for
  bool directions;  // policy_loss_sums leaves them in the gradient's memory, policy_loss_gradient scales them there

  // Always inlined: the linker must not pick one instruction set's copy for all.
  __attribute__((always_inline)) SampleTerms<T> terms(int64_t index) const {
    return sample_terms<T>(*this, a[index], b[index], s[index], precision[index], log_norm[index], kl_precision[index],
                           step_weights ? step_weights[index] : T(1));
  }
  // Of a location, `at` from the first sample's first, or of its sample.
  __attribute__((always_inline)) T advantage(const SampleTerms<T>& terms, int64_t index, int64_t at) const {
    return used_advantage(advantages[advantages_per_location ? at : index], this->adv_clip, terms.step);
  }
};

// Locations [first, last) of a sample, at most LOSS_TILES tiles. policy_loss_sums writes each tile's sums, and the
// log-ratios of its locations, where they have their own.
#define STAR_DECLARE(ISA)                                                                                           \
  namespace ISA {                                                                                                   \
  template <typename V, typename X, typename T>                                                                     \
  void policy_loss_sums(const PolicyLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last,            \
                        LocationSums* sums);                                                                        \
  template <typename V, typename X, typename T>                                                                     \
  void policy_loss_gradient(const PolicyLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last);       \
  }
STAR_EACH_ISA(STAR_DECLARE)
#undef STAR_DECLARE

}  // namespace star
