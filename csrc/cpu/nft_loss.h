// What the front end (nft_loss_op.cpp) and the kernels (nft_loss_kernel.cpp) of nft_loss agree on.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/tiles.h"
#include "star_math.h"

namespace star {

// V: type of the velocities, X: of the latents, T: of the arithmetic. Tensors are contiguous; optional ones may be null.
template <typename V, typename X, typename T>
struct NFTLossArgs : NFTOptions<T> {
  bool packed;  // (B, L, C) instead of (B, C, H, W)
  const V *velocity, *old_velocity, *reference_velocity;
  const X *sample, *clean;
  const T *sigma, *reward_prob, *weights;
  bool reward_prob_per_location;
  T* errors;  // (B, 2): what the loss writes and the gradient reads
  T grad_loss;
  V* gradient;  // null: not asked for
};

// Locations [first, last) of a sample, at most LOSS_TILES tiles. nft_loss_sums writes each tile's sums.
#define STAR_DECLARE(ISA)                                                                                        \
  namespace ISA {                                                                                                \
  template <typename V, typename X, typename T>                                                                  \
  void nft_loss_sums(const NFTLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last, NFTSums* sums); \
  template <typename V, typename X, typename T>                                                                  \
  void nft_loss_gradient(const NFTLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last);          \
  }
STAR_EACH_ISA(STAR_DECLARE)
#undef STAR_DECLARE

}  // namespace star
