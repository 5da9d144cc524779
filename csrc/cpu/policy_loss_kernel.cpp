// policy_loss of a tile of a sample: a pass over the inputs that sums up, for the loss, and one that writes the gradient.
// With one ratio for the sample the sums stay in registers; else every location's log-ratio is made first.
#include "cpu/policy_loss.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/latents.h"
#include "cpu/ordered_sum.h"

namespace star::STAR_ISA {

namespace {

template <Form form, typename V, typename X, typename T>
STAR_INLINE Vector<T> old_mean(const PolicyLossArgs<V, X, T>& args, int64_t at, int64_t count) {
  if constexpr (form == Form::log_prob) return Vector<T>{};
  return load_some<T>(args.old_mean + at, count);
}

// The gradient of a location's log-ratio to the velocity, but for a factor.
template <Form form, typename T>
STAR_INLINE Vector<T> direction(Vector<T> a, Vector<T> x, Vector<T> b, Vector<T> v, Vector<T> next, Vector<T> old) {
  if constexpr (form == Form::guard) return next - old;
  return next - transition_mean(a, x, b, v);
}

// The sum of a tile's terms, each location's times its weight if there are weights.
template <Form form, bool packed, typename V, typename X, typename T>
Sums<T, 1> term_sum(const PolicyLossArgs<V, X, T>& given, const Tile& tile, int64_t begin, int64_t end,
                const SampleTerms<T>& terms, const T* weights, Sums<T, 1> sum) {
  const PolicyLossArgs<V, X, T> args = given;  // a copy, which no store can change: its pointers stay in registers
  const Vector<T> a = broadcast(terms.a), b = broadcast(terms.b);
  each_vector<packed, T>(args, tile, begin, end, [&](int64_t at, int64_t location, int64_t count) STAR_ALWAYS {
    const Vector<T> x = load_some<T>(args.sample + at, count), v = load_some<T>(args.velocity + at, count);
    const Vector<T> next = load_some<T>(args.prev_sample + at, count), old = old_mean<form>(args, at, count);
    Vector<T> left, right;
    term_factors<form>(a, x, b, v, next, old, left, right);
    if constexpr (std::is_same_v<V, T>)
      if (args.directions) store_some<T>(args.gradient + at, direction<form, T>(a, x, b, v, next, old), count);
    if (weights) left *= load_location<packed>(weights, location, count);
    sum.add_product(0, left, right);
    sum.next();
  });
  return sum;
}

// The same of every tile of a span, channel by channel.
template <Form form, bool packed, typename V, typename X, typename T>
void term_sums(const PolicyLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last,
               const SampleTerms<T>& terms, const T* weights, double* values) {
  Sums<T, 1> sums[LOSS_TILES];
  const int64_t turns = packed ? 1 : args.channels;
  for (int64_t turn = 0; turn < turns; turn++)
    for (int64_t number = 0, at = first; at < last; number++, at += LOSS_TILE) {
      const Tile tile(args, index, at, std::min(at + LOSS_TILE, last));
      const T* own = weights ? weights + tile.locations : nullptr;
      const int64_t begin = packed ? 0 : turn, end = packed ? tile.count : turn + 1;
      sums[number] = term_sum<form, packed>(args, tile, begin, end, terms, own, sums[number]);
    }
  for (int64_t number = 0, at = first; at < last; number++, at += LOSS_TILE) values[number] = sums[number].value(0);
}

// The sum over the channels at each location of a tile.
template <Form form, bool packed, typename V, typename X, typename T>
void location_terms(const PolicyLossArgs<V, X, T>& args, const Tile& tile, const SampleTerms<T>& terms,
                    T* __restrict delta) {
  const Vector<T> a = broadcast(terms.a), b = broadcast(terms.b);
  std::fill_n(delta, tile.count, T(0));
  each_vector<packed, T>(args, tile, 0, tile.rows(args), [&](int64_t at, int64_t location, int64_t count) STAR_ALWAYS {
    const Vector<T> value = term<form>(a, load_some<T>(args.sample + at, count), b,
                                       load_some<T>(args.velocity + at, count),
                                       load_some<T>(args.prev_sample + at, count), old_mean<form>(args, at, count));
    if constexpr (packed) {
      T sum = 0;
      for (int lane = 0; lane < LANES<T>; lane++) sum += value[lane];
      delta[location] += sum;
    } else {
      store_some<T>(delta + location, load_some<T>(delta + location, count) + value, count);
    }
  });
}

// Calls f<form, packed>().
template <typename F>
STAR_INLINE auto with_form(Form form, bool packed, F f) {
  if (form == Form::delta) return packed ? f.template operator()<Form::delta, true>() : f.template operator()<Form::delta, false>();
  if (form == Form::guard) return packed ? f.template operator()<Form::guard, true>() : f.template operator()<Form::guard, false>();
  return packed ? f.template operator()<Form::log_prob, true>() : f.template operator()<Form::log_prob, false>();
}

// Sum of squared differences of the two velocities' means.
template <typename V, typename X, typename T>
double kl_sum(const PolicyLossArgs<V, X, T>& args, const Tile& tile, T b) {
  double sum = 0;
  const int64_t rows = args.packed ? 1 : args.channels;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t start = tile.latents + row * args.locations;
    const V *velocity = args.velocity + start, *reference = args.reference_velocity + start;
    sum += ordered_sum(args.packed ? tile.count * args.channels : tile.count, [&](int64_t i) {
      const double difference = double(b) * (double(T(velocity[i])) - double(T(reference[i])));
      return difference * difference;
    });
  }
  return sum;
}

}  // namespace

// Of one tile. term: the sum of its terms, where a sample has one ratio.
template <typename V, typename X, typename T>
LocationSums tile_sums(const PolicyLossArgs<V, X, T>& args, int64_t index, const Tile& tile,
                       const SampleTerms<T>& terms, double term) {
  const T* weights = args.weights ? args.weights + tile.locations : nullptr;
  const T* old_map = args.old_log_prob_per_location ? args.old_log_prob + tile.locations : nullptr;
  const T old = args.old_log_prob && !old_map ? args.old_log_prob[index] : T(0);
  auto weight = [&](int64_t i) { return weights ? weights[i] : T(1); };
  LocationSums sums = no_location_sums();
  if (args.reference_velocity) sums.slot[KL] = kl_sum(args, tile, terms.b);

  auto log_ratios = [&](T* delta) {
    with_form(args.form, args.packed,
              [&]<Form form, bool packed>() { location_terms<form, packed>(args, tile, terms, delta); });
    for (int64_t i = 0; i < tile.count; i++) {
      delta[i] = delta[i] * terms.scale - terms.offset - (old_map ? old_map[i] : old);
      sums.slot[NONFINITE] += std::isfinite(delta[i]) ? 0 : 1;
    }
  };
  if (args.ratio == Ratio::location) {
    T* delta = args.log_ratio + tile.locations;
    log_ratios(delta);
    for (int64_t i = 0; i < tile.count; i++) {
      const LimitedRatio<T> ratio = limited_ratio(delta[i]);
      const T advantage = args.advantage(terms, index, tile.locations + i);
      const T value = surrogate(ratio, advantage, args.clip_low, args.clip_high).value;
      add_location(sums.slot, ratio, weight(i), value, args.clip_low, args.clip_high);
      sums.smallest = smaller(sums.smallest, double(ratio.excess)), sums.largest = larger(sums.largest, double(ratio.excess));
    }
    return sums;
  }

  const T* of_ratio = args.ratio == Ratio::sample ? weights : nullptr;
  auto factor = [&](int64_t i) { return of_ratio ? double(of_ratio[i]) : 1.0; };
  const double known = double(terms.offset) + double(old);  // of every location
  double sum = term * double(terms.scale);
  if (known != 0) sum -= known * ordered_sum(tile.count, factor);
  if (old_map) sum -= ordered_sum(tile.count, [&](int64_t i) { return factor(i) * double(old_map[i]); });
  if (!std::isfinite(sum)) {  // location by location, to count those that made it so
    T delta[LOSS_TILE];
    log_ratios(delta);
    sum = ordered_sum(tile.count, [&](int64_t i) { return factor(i) * double(delta[i]); });
  }
  sums.slot[DELTA] = sum;
  if (args.ratio == Ratio::sample || (!weights && !args.advantages_per_location)) {
    sums.slot[MASS] = double(tile.count);
  } else if (!args.advantages_per_location) {
    sums.slot[MASS] = ordered_sum(tile.count, [&](int64_t i) { return double(weights[i]); });
  } else {
    for (int64_t i = 0; i < tile.count; i++) {
      const T advantage = args.advantage(terms, index, tile.locations + i);
      sums.slot[advantage >= 0 ? MASS : MASS_DOWN] += double(weight(i) * std::abs(advantage));
    }
  }
  return sums;
}

template <typename V, typename X, typename T>
void policy_loss_sums(const PolicyLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last,
                      LocationSums* sums) {
  const SampleTerms<T> terms = args.terms(index);
  double values[LOSS_TILES] = {};
  if (args.ratio != Ratio::location)
    with_form(args.form, args.packed, [&]<Form form, bool packed>() {
      term_sums<form, packed>(args, index, first, last, terms, args.ratio == Ratio::sample ? args.weights : nullptr,
                              values);
    });
  for (int64_t number = 0, at = first; at < last; number++, at += LOSS_TILE)
    sums[number] = tile_sums(args, index, Tile(args, index, at, std::min(at + LOSS_TILE, last)), terms, values[number]);
}

template <typename V, typename X, typename T>
void policy_loss_gradient(const PolicyLossArgs<V, X, T>& given, int64_t index, int64_t first, int64_t last) {
  const PolicyLossArgs<V, X, T> args = given;  // as above
  const Tile tile(args, index, first, last);
  const SampleTerms<T> terms = args.terms(index);
  const bool per_location = args.ratio == Ratio::location;
  const T* log_ratio = args.log_ratio + (per_location ? tile.locations : index);
  LimitedRatio<T> ratio = limited_ratio(log_ratio[0]);
  T force = 0, factor[LOSS_TILES * LOSS_TILE];
  for (int64_t i = 0; i < tile.count; i++) {
    if (per_location) ratio = limited_ratio(log_ratio[i]);
    if (i == 0 || per_location || args.advantages_per_location)
      force = surrogate(ratio, args.advantage(terms, index, tile.locations + i), args.clip_low, args.clip_high).force;
    factor[i] = (args.weights ? args.weights[tile.locations + i] : T(1)) * (force * terms.share * args.grad_loss);
  }
  const Vector<T> a = broadcast(terms.a), b = broadcast(terms.b), pull = broadcast(terms.pull * args.grad_loss);
  with_form(args.form, args.packed, [&]<Form form, bool packed>() STAR_ALWAYS {
    each_vector<packed, T>(args, tile, 0, tile.rows(args), [&](int64_t at, int64_t location, int64_t count) STAR_ALWAYS {
      Vector<T> value;
      if (args.directions)
        value = load_some<T>(args.gradient + at, count);
      else
        value = direction<form, T>(a, load_some<T>(args.sample + at, count), b, load_some<T>(args.velocity + at, count),
                                   load_some<T>(args.prev_sample + at, count), old_mean<form>(args, at, count));
      value *= load_location<packed>(factor, location, count);
      if (args.reference_velocity)
        value += pull * (load_some<T>(args.velocity + at, count) - load_some<T>(args.reference_velocity + at, count));
      store_some<T>(args.gradient + at, value, count);
    });
  });
}

#define STAR_INSTANTIATE(V, X, T)                                                                       \
  template void policy_loss_sums<V, X, T>(const PolicyLossArgs<V, X, T>&, int64_t, int64_t, int64_t, LocationSums*); \
  template void policy_loss_gradient<V, X, T>(const PolicyLossArgs<V, X, T>&, int64_t, int64_t, int64_t);
STAR_INSTANTIATE(double, double, double)
STAR_INSTANTIATE(float, float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, torch::headeronly::BFloat16, float)
STAR_INSTANTIATE(torch::headeronly::Half, float, float)
STAR_INSTANTIATE(torch::headeronly::Half, torch::headeronly::Half, float)

}  // namespace star::STAR_ISA
