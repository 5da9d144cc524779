// star::policy_loss_native for CPU tensors: makes the tensors contiguous and of few types, runs the kernel per sample.
#include <memory>
#include <vector>

#include "cpu/policy_loss.h"
#include "cpu/tensors.h"

namespace star {
namespace {

template <typename V, typename X, typename T>
PolicyLossResult run_as(const PolicyLossInputs& inputs) {
  const Tensor& velocity = inputs.velocity;
  const bool packed = velocity.dim() == 3;
  const int64_t batch = velocity.size(0), channels = velocity.size(packed ? 2 : 1);
  const int64_t places = batch * channels == 0 ? 0 : velocity.numel() / (batch * channels);
  Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
  Pointers pointers;
  const PolicyLossArgs<V, X, T> args{
      .batch = batch,
      .channels = channels,
      .places = places,
      .packed = packed,
      .velocity = pointers.of<V>(velocity),
      .reference_velocity = pointers.of<V>(inputs.reference_velocity),
      .sample = pointers.of<X>(inputs.sample),
      .prev_sample = pointers.of<X>(inputs.prev_sample),
      .old_mean = pointers.of<X>(inputs.old_mean),
      .a = pointers.of<T>(inputs.a),
      .b = pointers.of<T>(inputs.b),
      .s = pointers.of<T>(inputs.s),
      .precision = pointers.of<T>(inputs.precision),
      .log_norm = pointers.of<T>(inputs.log_norm),
      .kl_precision = pointers.of<T>(inputs.kl_precision),
      .advantages = pointers.of<T>(inputs.advantages),
      .weights = pointers.of<T>(inputs.weights),
      .old_log_prob = pointers.of<T>(inputs.old_log_prob),
      .step_weights = pointers.of<T>(inputs.step_weights),
      .advantages_per_place = inputs.advantages.dim() > 1,
      .old_log_prob_per_place = inputs.old_log_prob && inputs.old_log_prob->dim() > 1,
      .form = form_of(inputs),
      .ratio = ratio_of(inputs),
      .clip_low = T(inputs.clip_low),
      .clip_high = T(inputs.clip_high),
      .adv_clip = T(inputs.adv_clip),
      .kl_coef = T(inputs.kl_coef),
      .gradient = gradient.mutable_data_ptr<V>(),
  };
  const auto kernel = STAR_SELECT(policy_loss_sample<V, X, T>);
  std::vector<PolicyLossSums> sums(batch);
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<T[]>(2 * places);
    for (int64_t index = begin; index < end; index++) sums[index] = kernel(args, index, scratch.get());
  });

  PolicyLossSums all = no_sums();
  for (const PolicyLossSums& one : sums) add(all, one);
  Tensor loss = new_empty(velocity, {}, scalar_type<T>);
  Tensor statistics = new_empty(velocity, {STATISTICS}, ScalarType::Float);
  finish_statistics(all, batch, places, inputs.kl_coef, loss.mutable_data_ptr<T>(), statistics.mutable_data_ptr<float>());
  return {loss, statistics, converted(gradient, velocity.scalar_type())};
}

PolicyLossResult run(const PolicyLossInputs& inputs) {
  const ScalarType type = inputs.velocity.scalar_type();
  if (any_double(inputs.velocity, inputs.sample, inputs.prev_sample)) return run_as<double, double, double>(inputs);
  if (type != ScalarType::BFloat16) return run_as<float, float, float>(inputs);
  const bool same = inputs.sample.scalar_type() == type && inputs.prev_sample.scalar_type() == type &&
                    (!inputs.old_mean || inputs.old_mean->scalar_type() == type);
  return same ? run_as<BFloat16, BFloat16, float>(inputs) : run_as<BFloat16, float, float>(inputs);
}

}  // namespace

STAR_REGISTER(policy_loss, policy_loss<run>)

}  // namespace star
