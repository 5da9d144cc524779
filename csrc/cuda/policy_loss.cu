// star::policy_loss_native and its gradient for CUDA tensors.
#include "cuda/policy_loss.cuh"

#include <type_traits>

#include "cuda/launch.h"

namespace star::cuda {
namespace {

// The tensors of latents, and whether kernels may read them N elements at a time.
template <typename V, typename X, typename T>
struct Latents {
  static constexpr int N = WIDE<T>;  // 16 bytes of narrower types need more registers than all blocks of a batch have
  static constexpr bool plain = std::is_same_v<V, T> && std::is_same_v<X, T>;
  PolicyLossArgs<V, X, T> args;
  bool wide;

  Latents(const PolicyLossInputs& inputs, Pointers& pointers) : args{{loss_options<T>(inputs)}} {
    STD_TORCH_CHECK(args.channels <= 0x7fffffff && args.locations <= 0x7fffffff, "policy_loss: a sample of ",
                    args.channels, " x ", args.locations, " elements is too large");
    args.packed = inputs.velocity.dim() == 3;
    args.velocity = pointers.of<V>(inputs.velocity);
    args.reference_velocity = pointers.of<V>(inputs.reference_velocity);
    args.sample = pointers.of<X>(inputs.sample);
    args.prev_sample = pointers.of<X>(inputs.prev_sample);
    args.old_mean = pointers.of<T>(inputs.old_mean);
    wide = pointers.aligned && (args.packed ? args.channels : args.locations) % N == 0;
    set_tiling(args, wide ? N : 1);
  }

  // Calls launch<vector>(blocks) with the width of the accesses and a block for each tile.
  template <typename F>
  void each_tile(F launch) const {
    const int64_t count = blocks(args.batch * args.tiles);
    if (count == 0) return;
    if (wide)
      launch.template operator()<N>(count);
    else if constexpr (plain)
      launch.template operator()<1>(count);
    check_launch();
  }
};

OptionalTensor one_per_sample(const OptionalTensor& tensor) {
  return tensor && tensor->dim() == 1 ? tensor : std::nullopt;
}

OptionalTensor one_per_location(const OptionalTensor& tensor) {
  return tensor && tensor->dim() > 1 ? tensor : std::nullopt;
}

// What belongs to samples and locations.
template <typename T>
void set_samples(SampleArgs<T>& args, const PolicyLossInputs& inputs, Pointers& pointers) {
  const OptionalTensor given[FIELDS] = {inputs.a, inputs.b, inputs.s, inputs.precision, inputs.log_norm,
                                        inputs.kl_precision, one_per_sample(inputs.advantages), inputs.step_weights,
                                        one_per_sample(inputs.old_log_prob)};
  for (int k = 0; k < FIELDS; k++) args.fields[k] = pointers.per_sample(given[k]);
  args.weights = pointers.of<T>(inputs.weights);
  args.advantage_map = pointers.of<T>(one_per_location(inputs.advantages));
  args.old_log_prob_map = pointers.of<T>(one_per_location(inputs.old_log_prob));
}

template <typename V, typename X, typename T>
PolicyLossResult loss_as(const PolicyLossInputs& inputs) {
  const CurrentStream stream(inputs.velocity);
  Pointers pointers;
  Latents<V, X, T> latents(inputs, pointers);
  if constexpr (!latents.plain) {
    // Odd sizes of narrow types are rare enough not to have kernels of their own.
    if (!latents.wide) return loss_as<T, T, T>(inputs);
  }
  PolicyLossArgs<V, X, T>& args = latents.args;
  set_samples(args, inputs, pointers);
  const Tensor& like = inputs.velocity;
  Tensor loss = new_empty(like, {}, scalar_type<T>), statistics = new_empty(like, {STATISTICS}, ScalarType::Float);
  Tensor log_ratio = args.ratio == Ratio::location ? new_empty(like, {args.batch, args.locations}, scalar_type<T>)
                                                   : new_empty(like, {args.batch}, scalar_type<T>);
  Tensor sums = new_empty(like, {args.batch * args.tiles * int64_t(sizeof(LocationSums))}, ScalarType::Byte);
  args.loss = static_cast<T*>(loss.mutable_data_ptr());
  args.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  args.log_ratio = static_cast<T*>(log_ratio.mutable_data_ptr());
  args.sums = static_cast<LocationSums*>(sums.mutable_data_ptr());
  latents.each_tile([&]<int N>(int64_t count) {
    STAR_LAUNCH((policy_loss_sums_kernel<V, X, T, N>), count, LOSS_THREADS, stream.handle, args);
  });
  const SampleArgs<T>& samples = args;
  STAR_LAUNCH_EARLY((policy_loss_finish_kernel<T>), 1, FINISH_WARPS * WARP, stream.handle, samples);
  check_launch();
  return {loss, statistics, log_ratio};
}

template <typename V, typename X, typename T>
Tensor gradient_as(const PolicyLossGradientInputs& inputs) {
  const Tensor& velocity = inputs.loss.velocity;
  const CurrentStream stream(velocity);
  Pointers pointers;
  Latents<V, X, T> latents(inputs.loss, pointers);
  if constexpr (!latents.plain) {
    if (!latents.wide) return gradient_as<T, T, T>(inputs);
  }
  PolicyLossArgs<V, X, T>& args = latents.args;
  set_samples(args, inputs.loss, pointers);
  Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
  args.log_ratio = const_cast<T*>(pointers.of<T>(inputs.log_ratio));
  args.grad_loss = pointers.of<T>(inputs.grad_loss);
  args.gradient = static_cast<V*>(gradient.mutable_data_ptr());
  latents.each_tile([&]<int N>(int64_t count) {
    STAR_LAUNCH((policy_loss_gradient_kernel<V, X, T, N>), count, LOSS_THREADS, stream.handle, args);
  });
  return gradient;
}

PolicyLossResult loss(const PolicyLossInputs& inputs) {
  return with_types(inputs, [&]<typename V, typename X, typename T>(Types<V, X, T>) { return loss_as<V, X, T>(inputs); });
}

Tensor gradient(const PolicyLossGradientInputs& inputs) {
  return with_types(inputs.loss, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    return converted(gradient_as<V, X, T>(inputs), inputs.loss.velocity.scalar_type());
  });
}

}  // namespace

STAR_REGISTER(policy_loss, policy_loss<loss>)
STAR_REGISTER(policy_loss_gradient, policy_loss_gradient<gradient>)

}  // namespace star::cuda
