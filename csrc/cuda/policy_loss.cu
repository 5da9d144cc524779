// star::policy_loss_native for CUDA tensors.
#include "cuda/policy_loss.cuh"

#include <type_traits>

#include "cuda/launch.h"

namespace star::cuda {
namespace {

template <typename V, typename X, typename T>
PolicyLossResult run_as(const PolicyLossInputs& inputs) {
  const Tensor &velocity = inputs.velocity, &advantages = inputs.advantages;
  const OptionalTensor &weights = inputs.weights, &old_log_prob = inputs.old_log_prob;
  const CurrentStream stream(velocity);
  const ScalarType type = velocity.scalar_type();
  Pointers pointers;
  PolicyLossArgs<V, X, T> args{};
  args.packed = velocity.dim() == 3;
  args.batch = velocity.size(0);
  args.channels = velocity.size(args.packed ? 2 : 1);
  args.places = args.batch * args.channels == 0 ? 0 : velocity.numel() / (args.batch * args.channels);
  args.tiles = (args.places + TILE - 1) / TILE;
  args.velocity = pointers.of<V>(velocity);
  args.reference_velocity = pointers.of<V>(inputs.reference_velocity);
  args.sample = pointers.of<X>(inputs.sample);
  args.prev_sample = pointers.of<X>(inputs.prev_sample);
  args.old_mean = pointers.of<T>(inputs.old_mean);
  constexpr int N = WIDE<V> > WIDE<X> ? WIDE<V> : WIDE<X>;
  constexpr bool plain = std::is_same_v<V, T> && std::is_same_v<X, T>;
  const bool wide = pointers.aligned && (args.packed ? args.channels : args.places) % N == 0;
  if constexpr (!plain) {
    // Odd sizes of narrow types are rare enough not to have kernels of their own.
    if (!wide) return run_as<T, T, T>(inputs);
  }
  args.a = pointers.per_sample(inputs.a);
  args.b = pointers.per_sample(inputs.b);
  args.s = pointers.per_sample(inputs.s);
  args.precision = pointers.per_sample(inputs.precision);
  args.log_norm = pointers.per_sample(inputs.log_norm);
  args.kl_precision = pointers.per_sample(inputs.kl_precision);
  args.step_weights = pointers.per_sample(inputs.step_weights);
  if (advantages.dim() > 1)
    args.advantage_map = pointers.of<T>(advantages);
  else
    args.advantages = pointers.per_sample(advantages);
  if (old_log_prob && old_log_prob->dim() > 1)
    args.old_log_prob_map = pointers.of<T>(old_log_prob);
  else
    args.old_log_prob = pointers.per_sample(old_log_prob);
  args.weights = pointers.of<T>(weights);
  args.form = form_of(inputs), args.ratio = ratio_of(inputs);
  args.clip_low = T(inputs.clip_low), args.clip_high = T(inputs.clip_high);
  args.adv_clip = T(inputs.adv_clip), args.kl_coef = T(inputs.kl_coef);

  Tensor loss = new_empty(velocity, {}, scalar_type<T>);
  Tensor statistics = new_empty(velocity, {STATISTICS}, ScalarType::Float);
  Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
  args.loss = static_cast<T*>(loss.mutable_data_ptr());
  args.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  args.gradient = static_cast<V*>(gradient.mutable_data_ptr());

  // One workspace: the sums, the edges, and one or two values per location.
  const int64_t all = args.batch * args.places;
  const int64_t sums = args.batch * args.tiles * sizeof(Sums), edges = weights ? args.batch * sizeof(Edge<T>) : 0;
  const int64_t amount = weights ? all * sizeof(T) : 0, factor = args.ratio == Ratio::location ? all * sizeof(T) : 0;
  Tensor workspace = new_empty(velocity, {sums + edges + amount + factor}, ScalarType::Byte);
  auto* memory = static_cast<unsigned char*>(workspace.mutable_data_ptr());
  args.sums = reinterpret_cast<Sums*>(memory);
  if (edges) args.edges = reinterpret_cast<Edge<T>*>(memory + sums);
  if (amount) args.amount = reinterpret_cast<T*>(memory + sums + edges);
  if (factor) args.factor = reinterpret_cast<T*>(memory + sums + edges + amount);

  auto launch = [&]<int N>(std::integral_constant<int, N>) {
    args.lanes = 1;
    while (args.lanes < WARP && args.lanes * N < args.channels) args.lanes *= 2;
    const int64_t tiles = blocks(args.batch * (args.tiles + 1));
    if (all > 0) {
      const int64_t with_edges = weights ? tiles : args.batch * args.tiles;
      STAR_LAUNCH((policy_loss_ratios<V, X, T, N>), with_edges, THREADS, stream.handle, args);
    }
    STAR_LAUNCH((policy_loss_gradient<V, X, T, N>), args.batch * args.tiles + 1, THREADS, stream.handle, args);
  };
  if (wide)
    launch(std::integral_constant<int, N>());
  else if constexpr (plain)
    launch(std::integral_constant<int, 1>());
  check_launch();
  return {loss, statistics, gradient.scalar_type() == type ? gradient : torch::stable::to(gradient, type)};
}

PolicyLossResult run(const PolicyLossInputs& inputs) {
  const ScalarType type = inputs.velocity.scalar_type();
  if (any_double(inputs.velocity, inputs.sample, inputs.prev_sample)) return run_as<double, double, double>(inputs);
  const auto latents = [&](ScalarType wanted) {
    return inputs.sample.scalar_type() == wanted && inputs.prev_sample.scalar_type() == wanted;
  };
  if (type == ScalarType::BFloat16)
    return latents(type) ? run_as<BFloat16, BFloat16, float>(inputs) : run_as<BFloat16, float, float>(inputs);
  // A float16 velocity comes here as float32, for the sake of its gradient.
  return latents(ScalarType::Half) ? run_as<float, Half, float>(inputs) : run_as<float, float, float>(inputs);
}

}  // namespace

STAR_REGISTER(policy_loss, policy_loss<run>)

}  // namespace star::cuda
