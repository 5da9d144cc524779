// policy_loss of one sample: a pass over the inputs that makes each location's log-ratio, a pass that writes the gradient.
// When the gradient has the type of the arithmetic, the first pass leaves the direction in it and the second only scales
// it, so every input is read from memory once; otherwise the second pass reads the sample again, from cache.
#include "cpu/policy_loss.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "cpu/ordered_sum.h"
#include "star_math.h"

namespace star::STAR_ISA {

namespace {

constexpr int64_t BLOCK = 1024;  // locations: the accumulators of a block stay in the first-level cache

template <Form form, typename V, typename X, typename T>
void first_pass(const PolicyLossArgs<V, X, T>& args, int64_t index, T* __restrict delta, T* __restrict amount) {
  constexpr bool keep = std::is_same_v<V, T>;
  const int64_t channels = args.channels, places = args.places, start = index * channels * places;
  const T a = args.a[index], b = args.b[index];
  const V* velocity = args.velocity + start;
  const X *sample = args.sample + start, *next = args.prev_sample + start;
  const X* old = form == Form::log_prob ? next : args.old_mean + start;
  V* gradient = args.gradient + start;
  if (args.packed) {
    for (int64_t p = 0; p < places; p++) {
      T sum = 0, size = 0;
      const int64_t at = p * channels;
#pragma omp simd reduction(+ : sum, size)
      for (int64_t c = 0; c < channels; c++) {
        T direction;
        const int64_t i = at + c;
        sum += term<form>(a, T(sample[i]), b, T(velocity[i]), T(next[i]), T(old[i]), direction);
        size += std::abs(direction);
        if constexpr (keep) gradient[i] = direction;
      }
      delta[p] = sum;
      amount[p] = size;
    }
    return;
  }
  for (int64_t begin = 0; begin < places; begin += BLOCK) {
    const int64_t length = std::min(BLOCK, places - begin);
    T* __restrict block_delta = delta + begin;
    T* __restrict block_amount = amount + begin;
    std::fill_n(block_delta, length, T(0));
    std::fill_n(block_amount, length, T(0));
    for (int64_t c = 0; c < channels; c++) {
      const int64_t at = c * places + begin;
      const V* __restrict v = velocity + at;
      const X *__restrict x = sample + at, *__restrict n = next + at, *__restrict o = old + at;
      V* __restrict g = gradient + at;
#pragma omp simd
      for (int64_t p = 0; p < length; p++) {
        T direction;
        block_delta[p] += term<form>(a, T(x[p]), b, T(v[p]), T(n[p]), T(o[p]), direction);
        block_amount[p] += std::abs(direction);
        if constexpr (keep) g[p] = direction;
      }
    }
  }
}

template <typename V, typename X, typename T>
void second_pass(const PolicyLossArgs<V, X, T>& args, int64_t index, const T* __restrict factor) {
  constexpr bool kept = std::is_same_v<V, T>;
  const int64_t channels = args.channels, places = args.places, start = index * channels * places;
  const T a = args.a[index], b = args.b[index];
  const V* velocity = args.velocity + start;
  const V* reference = args.reference_velocity ? args.reference_velocity + start : velocity;
  const X *sample = args.sample + start, *next = args.prev_sample + start;
  const X* old = args.guard ? args.old_mean + start : next;
  V* gradient = args.gradient + start;
  const bool guard = args.guard;
  const T pull = args.reference_velocity
                     ? 2 * args.kl_coef * args.kl_precision[index] * b * b / T(args.batch * channels * places)
                     : T(0);
  auto element = [&](int64_t i, T scale) {
    T direction;
    if constexpr (kept) {
      direction = gradient[i];
    } else {
      const T mean = transition_mean(a, T(sample[i]), b, T(velocity[i]));
      direction = T(next[i]) - (guard ? T(old[i]) : mean);
    }
    return scale * direction;
  };
  const int64_t outer = args.packed ? places : channels, inner = args.packed ? channels : places;
  for (int64_t row = 0; row < outer; row++) {
    const int64_t at = row * inner;
    if (pull != 0) {
#pragma omp simd
      for (int64_t i = 0; i < inner; i++) {
        const T scale = factor[args.packed ? row : i];
        gradient[at + i] = V(element(at + i, scale) + pull * (T(velocity[at + i]) - T(reference[at + i])));
      }
    } else if (args.packed) {
      const T scale = factor[row];
#pragma omp simd
      for (int64_t i = 0; i < inner; i++) gradient[at + i] = V(element(at + i, scale));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < inner; i++) gradient[at + i] = V(element(at + i, factor[i]));
    }
  }
}

// The (rank + 1)-th largest of values that are not negative. Such numbers are in the order of their bits, of which every
// pass decides one: twenty passes over vectors cost less than one selection by swapping, and need no copy.
template <typename T>
T ranked(const T* values, int64_t count, int64_t rank) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  T least = values[0], most = values[0];
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < count; i++) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  Bits found = 0;
  for (Bits bit = Bits(1) << (8 * sizeof(T) - 2); bit; bit >>= 1) {
    const T candidate = std::bit_cast<T>(found | bit);
    if (!(candidate <= most)) continue;
    Bits reached = 0;
    if (candidate > least)
#pragma omp simd reduction(+ : reached)
      for (int64_t i = 0; i < count; i++) reached += values[i] >= candidate ? 1 : 0;
    if (candidate <= least || reached > Bits(rank)) found |= bit;
  }
  return std::bit_cast<T>(found);
}

// Share of `amount` in the tenth of the places with the highest weight, ties in proportion; see reference.top_share.
template <typename T>
double top_amount(const T* weights, const T* amount, int64_t places, double total) {
  const double size = 0.1 * double(places);
  if (!weights) return total * (size / double(places));
  const T edge = ranked(weights, places, int64_t(size));
  int64_t above = 0, tied = 0;
  for (int64_t p = 0; p < places; p++) above += weights[p] > edge;
  for (int64_t p = 0; p < places; p++) tied += weights[p] == edge;
  const double portion = (size - double(above)) / std::max(double(tied), 1.0);
  return ordered_sum(places, [&](int64_t p) {
    return double(weights[p] > edge ? amount[p] : weights[p] == edge ? T(portion) * amount[p] : T(0));
  });
}

}  // namespace

template <typename V, typename X, typename T>
PolicyLossSums policy_loss_sample(const PolicyLossArgs<V, X, T>& args, int64_t index, T* scratch) {
  const int64_t channels = args.channels, places = args.places;
  T *delta = scratch, *amount = scratch + places, *factor = scratch + 2 * places;
  const T b = args.b[index], precision = args.precision[index], s = args.s[index];
  const T* weights = args.weights ? args.weights + index * places : nullptr;
  PolicyLossSums sums;

  T scale = precision / T(channels), offset = 0;
  if (args.guard) {
    first_pass<Form::guard>(args, index, delta, amount);
    scale *= 2 * s;
  } else if (args.old_mean) {
    first_pass<Form::delta>(args, index, delta, amount);
  } else {
    first_pass<Form::log_prob>(args, index, delta, amount);
    offset = args.log_norm[index];
  }
  const T* old_log_prob = args.old_log_prob;
  if (old_log_prob) {
    old_log_prob += index * (args.old_log_prob_per_place ? places : 1);
    for (int64_t p = 0; p < places; p++)
      delta[p] = (delta[p] * scale - offset) - old_log_prob[args.old_log_prob_per_place ? p : 0];
  } else {
    for (int64_t p = 0; p < places; p++) delta[p] *= scale;
  }
  const double whole = ordered_sum(places, [&](int64_t p) { return double(delta[p]); });
  if (!std::isfinite(whole))
    sums.nonfinite = ordered_sum(places, [&](int64_t p) { return std::isfinite(delta[p]) ? 0.0 : 1.0; });

  const T step = (args.step_weights ? args.step_weights[index] : T(1)) *
                 (args.guard ? precision / args.kl_precision[index] : T(1));
  auto advantage = [&](int64_t p) {
    const T value = args.advantages[args.advantages_per_place ? index * places + p : index];
    return clamped(value, -args.adv_clip, args.adv_clip) * step;
  };
  auto weight = [&](int64_t p) { return weights ? weights[p] : T(1); };
  // d delta / d velocity = slope * direction; the loss is a mean over the batch and the places.
  const T slope = 2 * precision * b / T(channels) * (args.guard ? s : T(1));
  const T share = slope / T(args.batch * places);
  auto count = [&](const Surrogate<T>& unit) {
    sums.square += double(unit.log_ratio) * double(unit.log_ratio);
    sums.low += unit.excess < -args.clip_low;
    sums.high += unit.excess > args.clip_high;
    sums.excess += unit.excess;
    // Written so that a NaN stays.
    sums.smallest = sums.units == 0 || !(unit.excess >= sums.smallest) ? double(unit.excess) : sums.smallest;
    sums.largest = sums.units == 0 || !(unit.excess <= sums.largest) ? double(unit.excess) : sums.largest;
    sums.units += 1;
  };

  if (args.ratio == Ratio::location) {
    for (int64_t p = 0; p < places; p++) {
      const Surrogate<T> unit = clipped_surrogate(delta[p], advantage(p), args.clip_low, args.clip_high);
      count(unit);
      sums.loss += double(weight(p)) * double(unit.value);
      factor[p] = weight(p) * unit.force * share;
    }
  } else {
    const bool weighted = args.ratio == Ratio::sample && weights;
    const double sum =
        weighted ? ordered_sum(places, [&](int64_t p) { return double(weights[p]) * double(delta[p]); }) : whole;
    const T log_ratio = T(sum / double(places));
    if (args.ratio == Ratio::token && args.advantages_per_place) {
      // One ratio and two signs: the gate and the value of each sign, scaled by the size of each place's advantage.
      const Surrogate<T> up = clipped_surrogate(log_ratio, T(1), args.clip_low, args.clip_high);
      const Surrogate<T> down = clipped_surrogate(log_ratio, T(-1), args.clip_low, args.clip_high);
      count(up);
      for (int64_t p = 0; p < places; p++) {
        const T size = advantage(p);
        const Surrogate<T>& unit = size >= 0 ? up : down;
        delta[p] = weight(p) * std::abs(size) * unit.value;
        factor[p] = weight(p) * std::abs(size) * unit.force * share;
      }
      sums.loss = ordered_sum(places, [&](int64_t p) { return double(delta[p]); });
    } else {
      const Surrogate<T> unit = clipped_surrogate(log_ratio, advantage(0), args.clip_low, args.clip_high);
      count(unit);
      const T scaled = unit.force * share;
      for (int64_t p = 0; p < places; p++) factor[p] = weight(p) * scaled;
      const double mass = args.ratio == Ratio::token && weights
                              ? ordered_sum(places, [&](int64_t p) { return double(weights[p]); })
                              : double(places);
      sums.loss = mass * double(unit.value);
    }
  }

  for (int64_t p = 0; p < places; p++) amount[p] *= std::abs(factor[p]);
  sums.total = ordered_sum(places, [&](int64_t p) { return double(amount[p]); });
  sums.top = top_amount(weights, amount, places, sums.total);

  if (args.reference_velocity) {
    const V *v = args.velocity + index * channels * places, *r = args.reference_velocity + index * channels * places;
    sums.kl = ordered_sum(channels * places, [&](int64_t i) {
      const double difference = double(b) * (double(T(v[i])) - double(T(r[i])));
      return difference * difference;
    });
    sums.kl *= double(args.kl_precision[index]) / double(channels * places);
  }
  second_pass(args, index, factor);
  return sums;
}

#define STAR_INSTANTIATE(V, X, T) \
  template PolicyLossSums policy_loss_sample<V, X, T>(const PolicyLossArgs<V, X, T>&, int64_t, T*);
STAR_INSTANTIATE(double, double, double)
STAR_INSTANTIATE(float, float, float)
STAR_INSTANTIATE(c10::BFloat16, float, float)
STAR_INSTANTIATE(c10::BFloat16, c10::BFloat16, float)

}  // namespace star::STAR_ISA
