// star::policy_loss_native for CPU tensors: makes the tensors contiguous and of few types, runs the kernel per sample.
#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/policy_loss.h"
#include "cpu/tensors.h"

namespace star {
namespace {

template <typename V, typename X, typename T>
std::tuple<Tensor, Tensor, Tensor> run(
    const Tensor& velocity, const Tensor& sample, const Tensor& prev_sample,
    const std::vector<Tensor>& transition, const Tensor& advantages, const OptionalTensor& weights,
    const OptionalTensor& old_mean, const OptionalTensor& old_log_prob, const OptionalTensor& reference_velocity,
    const OptionalTensor& step_weights, const std::string& ratio, double clip_low, double clip_high, double adv_clip,
    double kl_coef, bool guard) {
  const auto v_type = scalar_type<V>, x_type = scalar_type<X>;
  const auto t_type = scalar_type<T>;
  std::vector<Tensor> alive;  // converted copies live until the kernel is done
  auto pointer = [&]<typename P>(const OptionalTensor& tensor, ScalarType type, P*) -> const P* {
    if (!tensor) return nullptr;
    alive.push_back(ready(*tensor, type));
    return alive.back().const_data_ptr<P>();
  };
  V* v_tag = nullptr;
  X* x_tag = nullptr;
  T* t_tag = nullptr;
  const bool packed = velocity.dim() == 3;
  const int64_t batch = velocity.size(0), channels = velocity.size(packed ? 2 : 1);
  const int64_t places = batch * channels == 0 ? 0 : velocity.numel() / (batch * channels);
  Tensor gradient = new_empty(velocity, velocity.sizes(), v_type);

  PolicyLossArgs<V, X, T> args{
      .batch = batch,
      .channels = channels,
      .places = places,
      .packed = packed,
      .velocity = pointer(velocity, v_type, v_tag),
      .reference_velocity = pointer(reference_velocity, v_type, v_tag),
      .sample = pointer(sample, x_type, x_tag),
      .prev_sample = pointer(prev_sample, x_type, x_tag),
      .old_mean = pointer(old_mean, x_type, x_tag),
      .a = pointer(transition[0], t_type, t_tag),
      .b = pointer(transition[1], t_type, t_tag),
      .s = pointer(transition[2], t_type, t_tag),
      .precision = pointer(transition[3], t_type, t_tag),
      .log_norm = pointer(transition[4], t_type, t_tag),
      .kl_precision = pointer(transition[5], t_type, t_tag),
      .advantages = pointer(advantages, t_type, t_tag),
      .weights = pointer(weights, t_type, t_tag),
      .old_log_prob = pointer(old_log_prob, t_type, t_tag),
      .step_weights = pointer(step_weights, t_type, t_tag),
      .advantages_per_place = advantages.dim() > 1,
      .old_log_prob_per_place = old_log_prob && old_log_prob->dim() > 1,
      .ratio = ratio == "token" ? Ratio::token : ratio == "location" ? Ratio::location : Ratio::sample,
      .clip_low = T(clip_low),
      .clip_high = T(clip_high),
      .adv_clip = T(adv_clip),
      .kl_coef = T(kl_coef),
      .guard = guard,
      .gradient = gradient.mutable_data_ptr<V>(),
  };
  const auto kernel = STAR_SELECT(policy_loss_sample<V, X, T>);
  std::vector<PolicyLossSums> sums(batch);
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<T[]>(2 * places);
    for (int64_t index = begin; index < end; index++) sums[index] = kernel(args, index, scratch.get());
  });

  PolicyLossSums all;
  for (const PolicyLossSums& one : sums) {
    all.smallest = all.units == 0 || !(one.smallest >= all.smallest) ? one.smallest : all.smallest;
    all.largest = all.units == 0 || !(one.largest <= all.largest) ? one.largest : all.largest;
    all.loss += one.loss, all.square += one.square, all.low += one.low, all.high += one.high;
    all.excess += one.excess, all.kl += one.kl, all.top += one.top, all.total += one.total;
    all.nonfinite += one.nonfinite, all.units += one.units;
  }
  const double kl = all.kl / double(batch);
  Tensor loss = new_empty(velocity, {}, t_type);
  *loss.mutable_data_ptr<T>() = T(all.loss / double(batch * places) + (reference_velocity ? kl_coef * kl : 0.0));
  Tensor statistics = new_empty(velocity, {10}, ScalarType::Float);
  const double values[10] = {
      0.5 * all.square / all.units, (all.low + all.high) / all.units, all.low / all.units,
      all.high / all.units,         1 + all.excess / all.units,       1 + all.smallest,
      1 + all.largest,              kl,                               all.total == 0 ? 0.0 : all.top / all.total,
      all.nonfinite};
  std::copy_n(values, 10, statistics.mutable_data_ptr<float>());
  return {loss, statistics, gradient};
}

std::tuple<Tensor, Tensor, Tensor> policy_loss(
    const Tensor& velocity, const Tensor& sample, const Tensor& prev_sample, const Tensor& a,
    const Tensor& b, const Tensor& s, const Tensor& precision, const Tensor& log_norm,
    const Tensor& kl_precision, const Tensor& advantages, const OptionalTensor& weights,
    const OptionalTensor& old_mean, const OptionalTensor& old_log_prob, const OptionalTensor& reference_velocity,
    const OptionalTensor& step_weights, const std::string& ratio, double clip_low, double clip_high, double adv_clip,
    double kl_coef, bool guard) {
  const auto type = velocity.scalar_type();
  auto call = [&]<typename V, typename X, typename T>(V*, X*, T*) {
    return run<V, X, T>(velocity, sample, prev_sample, {a, b, s, precision, log_norm, kl_precision}, advantages, weights,
                        old_mean, old_log_prob, reference_velocity, step_weights, ratio, clip_low, clip_high,
                        adv_clip, kl_coef, guard);
  };
  double* d = nullptr;
  float* f = nullptr;
  BFloat16* bf = nullptr;
  if (type == ScalarType::Double || sample.scalar_type() == ScalarType::Double ||
      prev_sample.scalar_type() == ScalarType::Double) {
    auto [loss, statistics, gradient] = call(d, d, d);
    return {loss, statistics, converted(gradient, type)};
  }
  const bool same = sample.scalar_type() == type && prev_sample.scalar_type() == type &&
                    (!old_mean || old_mean->scalar_type() == type);
  if (type == ScalarType::BFloat16) return same ? call(bf, bf, f) : call(bf, f, f);
  auto [loss, statistics, gradient] = call(f, f, f);
  return {loss, statistics, converted(gradient, type)};
}

}  // namespace

STAR_REGISTER(policy_loss, policy_loss)

}  // namespace star
