// star::nft_loss_native and its gradient for CUDA tensors.
#include "cuda/nft_loss.cuh"

#include <type_traits>

#include "cuda/launch.h"

namespace star::cuda {
namespace {

// The arguments of both launches over the latents, and whether kernels may read them NFT_VECTOR elements at a time.
template <typename V, typename T>
struct Launch {
  NFTLossArgs<V, T> args;
  bool wide;

  Launch(const NFTLossInputs& inputs, Pointers& pointers) : args{{nft_options<T>(inputs)}} {
    STD_TORCH_CHECK(args.channels <= 0x7fffffff && args.locations <= 0x7fffffff, "nft_loss: a sample of ", args.channels,
                    " x ", args.locations, " elements is too large");
    args.packed = inputs.velocity.dim() == 3;
    args.velocity = pointers.of<V>(inputs.velocity);
    args.old_velocity = pointers.of<V>(inputs.old_velocity);
    args.reference_velocity = pointers.of<V>(inputs.reference_velocity);
    args.sample = pointers.of<T>(inputs.sample);
    args.clean = pointers.of<T>(inputs.clean);
    // Doubles are rare enough for one form of their kernels.
    wide = sizeof(T) == 4 && pointers.aligned && (args.packed ? args.channels : args.locations) % NFT_VECTOR == 0;
    const bool per_location = inputs.reward_prob.dim() > 1;
    args.sigma = pointers.per_sample(inputs.sigma);
    args.weights = pointers.of<T>(inputs.weights);
    if (per_location)
      args.reward_prob_map = pointers.of<T>(inputs.reward_prob);
    else
      args.reward_prob = pointers.per_sample(inputs.reward_prob);
    set_tiling(args, wide ? NFT_VECTOR : 1);
  }

  // Calls launch<vector>(blocks) with the width of the accesses and a block for each tile.
  template <typename F>
  void each_tile(F launch) const {
    const int64_t count = blocks(args.batch * args.tiles);
    if (count == 0) return;
    if constexpr (sizeof(T) == 4)
      if (wide) launch.template operator()<NFT_VECTOR>(count);
    if constexpr (std::is_same_v<V, T>)
      if (!wide) launch.template operator()<1>(count);
    check_launch();
  }
};

template <typename V, typename T>
NFTLossResult loss_as(const NFTLossInputs& inputs) {
  const Tensor& like = inputs.velocity;
  const CurrentStream stream(like);
  Pointers pointers;
  Launch<V, T> launch(inputs, pointers);
  if constexpr (!std::is_same_v<V, T>) {
    // Odd sizes of narrow types are rare enough not to have kernels of their own.
    if (!launch.wide) return loss_as<T, T>(inputs);
  }
  NFTLossArgs<V, T>& args = launch.args;
  Tensor loss = new_empty(like, {}, scalar_type<T>);
  Tensor statistics = new_empty(like, {NFT_STATISTICS}, ScalarType::Float);
  Tensor errors = new_empty(like, {args.batch, 2}, scalar_type<T>);
  Tensor sums = new_empty(like, {args.batch * args.tiles * int64_t(sizeof(NFTSums))}, ScalarType::Byte);
  args.loss = static_cast<T*>(loss.mutable_data_ptr());
  args.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  args.errors = static_cast<T*>(errors.mutable_data_ptr());
  args.sums = static_cast<NFTSums*>(sums.mutable_data_ptr());
  launch.each_tile([&]<int N>(int64_t count) {
    STAR_LAUNCH((nft_loss_sums_kernel<V, T, N>), count, LOSS_THREADS, stream.handle, args);
  });
  const NFTSampleArgs<T>& samples = args;
  STAR_LAUNCH_EARLY((nft_loss_finish_kernel<T>), 1, FINISH_WARPS * WARP, stream.handle, samples);
  check_launch();
  return {loss, statistics, errors};
}

template <typename V, typename T>
Tensor gradient_as(const NFTLossGradientInputs& inputs) {
  const Tensor& velocity = inputs.loss.velocity;
  const CurrentStream stream(velocity);
  Pointers pointers;
  Launch<V, T> launch(inputs.loss, pointers);
  if constexpr (!std::is_same_v<V, T>) {
    if (!launch.wide) return gradient_as<T, T>(inputs);
  }
  NFTLossArgs<V, T>& args = launch.args;
  Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
  args.errors = const_cast<T*>(pointers.of<T>(inputs.errors));
  args.grad_loss = pointers.of<T>(inputs.grad_loss);
  args.gradient = static_cast<V*>(gradient.mutable_data_ptr());
  launch.each_tile([&]<int N>(int64_t count) {
    STAR_LAUNCH((nft_loss_gradient_kernel<V, T, N>), count, LOSS_THREADS, stream.handle, args);
  });
  return gradient;
}

NFTLossResult loss(const NFTLossInputs& inputs) {
  return with_types(inputs, [&]<typename V, typename X, typename T>(Types<V, X, T>) { return loss_as<V, T>(inputs); });
}

Tensor gradient(const NFTLossGradientInputs& inputs) {
  return with_types(inputs.loss, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    return converted(gradient_as<V, T>(inputs), inputs.loss.velocity.scalar_type());
  });
}

}  // namespace

STAR_REGISTER(nft_loss, nft_loss<loss>)
STAR_REGISTER(nft_loss_gradient, nft_loss_gradient<gradient>)

}  // namespace star::cuda
