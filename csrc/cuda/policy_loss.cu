// star::policy_loss_native for CUDA tensors.
#include "cuda/policy_loss.cuh"

#include <string>
#include <tuple>
#include <type_traits>

#include "cuda/launch.h"

namespace star::cuda {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

template <typename V, typename X, typename T>
Result run(const Tensor& velocity, const Tensor& sample, const Tensor& prev_sample, const std::vector<Tensor>& transition,
           const Tensor& advantages, const OptionalTensor& weights, const OptionalTensor& old_mean,
           const OptionalTensor& old_log_prob, const OptionalTensor& reference_velocity,
           const OptionalTensor& step_weights, const std::string& ratio, double clip_low, double clip_high,
           double adv_clip, double kl_coef, bool guard) {
  const CurrentStream stream(velocity);
  const ScalarType type = velocity.scalar_type();
  Inputs inputs;
  PolicyLossArgs<V, X, T> args{};
  args.packed = velocity.dim() == 3;
  args.batch = velocity.size(0);
  args.channels = velocity.size(args.packed ? 2 : 1);
  args.places = args.batch * args.channels == 0 ? 0 : velocity.numel() / (args.batch * args.channels);
  args.tiles = (args.places + TILE - 1) / TILE;
  args.velocity = inputs.pointer<V>(velocity);
  args.reference_velocity = inputs.pointer<V>(reference_velocity);
  args.sample = inputs.pointer<X>(sample);
  args.prev_sample = inputs.pointer<X>(prev_sample);
  args.old_mean = inputs.pointer<T>(old_mean);
  constexpr int N = WIDE<V> > WIDE<X> ? WIDE<V> : WIDE<X>;
  constexpr bool plain = std::is_same_v<V, T> && std::is_same_v<X, T>;
  const bool wide = inputs.aligned && (args.packed ? args.channels : args.places) % N == 0;
  if constexpr (!plain) {
    // Odd sizes of narrow types are rare enough not to have kernels of their own.
    if (!wide)
      return run<T, T, T>(velocity, sample, prev_sample, transition, advantages, weights, old_mean, old_log_prob,
                          reference_velocity, step_weights, ratio, clip_low, clip_high, adv_clip, kl_coef, guard);
  }
  PerSample* fields[] = {&args.a, &args.b, &args.s, &args.precision, &args.log_norm, &args.kl_precision};
  for (int i = 0; i < 6; i++) *fields[i] = inputs.per_sample(transition[i]);
  args.step_weights = inputs.per_sample(step_weights);
  if (advantages.dim() > 1)
    args.advantage_map = inputs.pointer<T>(advantages);
  else
    args.advantages = inputs.per_sample(advantages);
  if (old_log_prob && old_log_prob->dim() > 1)
    args.old_log_prob_map = inputs.pointer<T>(old_log_prob);
  else
    args.old_log_prob = inputs.per_sample(old_log_prob);
  args.weights = inputs.pointer<T>(weights);
  args.form = guard ? Form::guard : old_mean ? Form::delta : Form::log_prob;
  args.ratio = ratio == "token" ? Ratio::token : ratio == "location" ? Ratio::location : Ratio::sample;
  args.clip_low = T(clip_low), args.clip_high = T(clip_high), args.adv_clip = T(adv_clip), args.kl_coef = T(kl_coef);

  Tensor loss = torch::stable::new_empty(velocity, {}, scalar_type<T>);
  Tensor statistics = torch::stable::new_empty(velocity, {10}, ScalarType::Float);
  Tensor gradient = torch::stable::new_empty(velocity, velocity.sizes(), scalar_type<V>);
  args.loss = static_cast<T*>(loss.mutable_data_ptr());
  args.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  args.gradient = static_cast<V*>(gradient.mutable_data_ptr());

  // One workspace: the sums, the edges, and one or two values per location.
  const int64_t all = args.batch * args.places;
  const int64_t sums = args.batch * args.tiles * sizeof(Sums), edges = weights ? args.batch * sizeof(Edge<T>) : 0;
  const int64_t amount = weights ? all * sizeof(T) : 0, factor = args.ratio == Ratio::location ? all * sizeof(T) : 0;
  Tensor workspace = torch::stable::new_empty(velocity, {sums + edges + amount + factor}, ScalarType::Byte);
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

Result policy_loss(const Tensor& velocity, const Tensor& sample, const Tensor& prev_sample, const Tensor& a,
                   const Tensor& b, const Tensor& s, const Tensor& precision, const Tensor& log_norm,
                   const Tensor& kl_precision, const Tensor& advantages, const OptionalTensor& weights,
                   const OptionalTensor& old_mean, const OptionalTensor& old_log_prob,
                   const OptionalTensor& reference_velocity, const OptionalTensor& step_weights,
                   const std::string& ratio, double clip_low, double clip_high, double adv_clip, double kl_coef,
                   bool guard) {
  const ScalarType type = velocity.scalar_type();
  auto call = [&]<typename V, typename X, typename T>(V, X, T) {
    return run<V, X, T>(velocity, sample, prev_sample, {a, b, s, precision, log_norm, kl_precision}, advantages, weights,
                        old_mean, old_log_prob, reference_velocity, step_weights, ratio, clip_low, clip_high, adv_clip,
                        kl_coef, guard);
  };
  if (type == ScalarType::Double || sample.scalar_type() == ScalarType::Double ||
      prev_sample.scalar_type() == ScalarType::Double)
    return call(double(), double(), double());
  const auto latents = [&](ScalarType wanted) {
    return sample.scalar_type() == wanted && prev_sample.scalar_type() == wanted;
  };
  if (type == ScalarType::BFloat16)
    return latents(type) ? call(BFloat16(), BFloat16(), float()) : call(BFloat16(), float(), float());
  // A float16 velocity comes here as float32, for the sake of its gradient.
  return latents(ScalarType::Half) ? call(float(), Half(), float()) : call(float(), float(), float());
}

}  // namespace

STAR_REGISTER(policy_loss, policy_loss)

}  // namespace star::cuda
