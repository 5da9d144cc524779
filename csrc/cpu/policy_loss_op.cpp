// star::policy_loss_native, its gradient, and both in one for CPU tensors: make the tensors contiguous and of few types, run
// the kernels tile by tile, add the tiles up in their order.
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cpu/policy_loss.h"
#include "cpu/tensors.h"

namespace star {
namespace {

template <typename V, typename X, typename T>
PolicyLossArgs<V, X, T> arguments(const PolicyLossInputs& inputs, Pointers& pointers) {
  PolicyLossArgs<V, X, T> args{loss_options<T>(inputs)};
  args.packed = inputs.velocity.dim() == 3;
  args.velocity = pointers.of<V>(inputs.velocity);
  args.reference_velocity = pointers.of<V>(inputs.reference_velocity);
  args.sample = pointers.of<X>(inputs.sample);
  args.prev_sample = pointers.of<X>(inputs.prev_sample);
  args.old_mean = pointers.of<T>(inputs.old_mean);
  args.a = pointers.of<T>(inputs.a);
  args.b = pointers.of<T>(inputs.b);
  args.s = pointers.of<T>(inputs.s);
  args.precision = pointers.of<T>(inputs.precision);
  args.log_norm = pointers.of<T>(inputs.log_norm);
  args.kl_precision = pointers.of<T>(inputs.kl_precision);
  args.advantages = pointers.of<T>(inputs.advantages);
  args.weights = pointers.of<T>(inputs.weights);
  args.old_log_prob = pointers.of<T>(inputs.old_log_prob);
  args.step_weights = pointers.of<T>(inputs.step_weights);
  args.advantages_per_location = inputs.advantages.dim() > 1;
  args.old_log_prob_per_location = inputs.old_log_prob && inputs.old_log_prob->dim() > 1;
  return args;
}

// Writes the gradient too if there is memory for it.
template <typename V, typename X, typename T>
PolicyLossResult loss_as(PolicyLossArgs<V, X, T>& args, const Tensor& like) {
  const bool per_location = args.ratio == Ratio::location;
  Tensor loss = new_empty(like, {}, scalar_type<T>);
  Tensor statistics = new_empty(like, {STATISTICS}, ScalarType::Float);
  Tensor log_ratio = per_location ? new_empty(like, {args.batch, args.locations}, scalar_type<T>)
                                  : new_empty(like, {args.batch}, scalar_type<T>);
  args.log_ratio = log_ratio.mutable_data_ptr<T>();
  args.directions = args.gradient && !per_location && std::is_same_v<V, T>;

  for (int64_t index = 0; index < args.batch; index++)
    if (!(args.s[index] > 0))
      throw std::invalid_argument("transition.s: has values <= 0; a deterministic step has no density to train on");

  const auto sum_tiles = STAR_SELECT(policy_loss_sums<V, X, T>);
  const auto write_gradient = STAR_SELECT(policy_loss_gradient<V, X, T>);
  std::vector<LocationSums> sums(args.batch * tiles(args));
  std::vector<BatchSums> samples(args.batch);
  auto finish_sample = [&](int64_t index) {
    LocationSums sample = no_location_sums();
    for (int64_t tile = 0; tile < tiles(args); tile++) add(sample, sums[index * tiles(args) + tile]);
    if (!per_location) args.log_ratio[index] = T(sample.slot[DELTA] / double(args.locations));
    const T up = args.advantages_per_location ? T(1) : args.advantage(args.terms(index), index, index);
    const T down = args.advantages_per_location ? T(-1) : T(0);
    const T log_ratio = per_location ? T(0) : args.log_ratio[index];
    samples[index] = sample_sums<T>(args, sample, log_ratio, up, down, args.kl_precision[index]);
  };
  each_sample(
      args,
      [&](int64_t index, int64_t first, int64_t last) {
        sum_tiles(args, index, first, last, &sums[index * tiles(args) + first / LOSS_TILE]);
      },
      finish_sample, [&](int64_t index, int64_t first, int64_t last) { write_gradient(args, index, first, last); });

  BatchSums all = no_sums();
  for (const BatchSums& sample : samples) add(all, sample);
  finish<T>(args, all, loss.mutable_data_ptr<T>(), statistics.mutable_data_ptr<float>());
  return {loss, statistics, log_ratio};
}

PolicyLossResult loss(const PolicyLossInputs& inputs) {
  return with_types(inputs, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    Pointers pointers;
    PolicyLossArgs<V, X, T> args = arguments<V, X, T>(inputs, pointers);
    return loss_as(args, inputs.velocity);
  });
}

Tensor gradient(const PolicyLossGradientInputs& inputs) {
  return with_types(inputs.loss, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    Pointers pointers;
    PolicyLossArgs<V, X, T> args = arguments<V, X, T>(inputs.loss, pointers);
    const Tensor& velocity = inputs.loss.velocity;
    Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
    args.log_ratio = const_cast<T*>(pointers.of<T>(inputs.log_ratio));
    args.grad_loss = *pointers.of<T>(inputs.grad_loss);
    args.gradient = gradient.mutable_data_ptr<V>();
    const auto kernel = STAR_SELECT(policy_loss_gradient<V, X, T>);
    each_span(args, 0, args.batch,
              [&](int64_t index, int64_t first, int64_t last) { kernel(args, index, first, last); });
    return converted(gradient, velocity.scalar_type());
  });
}

PolicyLossWithGradientResult loss_with_gradient(const PolicyLossInputs& inputs) {
  return with_types(inputs, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    Pointers pointers;
    PolicyLossArgs<V, X, T> args = arguments<V, X, T>(inputs, pointers);
    const Tensor& velocity = inputs.velocity;
    Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
    args.grad_loss = 1;
    args.gradient = gradient.mutable_data_ptr<V>();
    const PolicyLossResult result = loss_as(args, velocity);  // which fills the gradient: a copy must come after it
    return std::tuple_cat(result, std::tuple(converted(gradient, velocity.scalar_type())));
  });
}

}  // namespace

STAR_REGISTER(policy_loss, policy_loss<loss>)
STAR_REGISTER(policy_loss_gradient, policy_loss_gradient<gradient>)
STAR_REGISTER(policy_loss_with_gradient, policy_loss<loss_with_gradient>)

}  // namespace star
