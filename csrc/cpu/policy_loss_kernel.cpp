// policy_loss of one sample: a pass over the inputs that makes the log-ratio, a pass that writes the gradient.
// When the gradient has the type of the arithmetic, the first pass leaves the direction in it and the second only scales
// it, so every input is read from memory once; otherwise the second pass reads the sample again, from cache.
// There are two first passes: with one ratio for the sample the sums stay in registers, else every place has its own.
#include "cpu/policy_loss.h"

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "cpu/ordered_sum.h"
#include "cpu/simd.h"
#include "star_math.h"

namespace star::STAR_ISA {

namespace {

// Where a sample begins in each array. `old` is never null, so that every form may load it.
template <typename V, typename X>
struct Sample {
  const V* velocity;
  const X *sample, *next, *old;
  V* gradient;
};

template <Form form, typename V, typename X, typename T>
Sample<V, X> sample_of(const PolicyLossArgs<V, X, T>& args, int64_t index) {
  const int64_t start = index * args.channels * args.places;
  const X* next = args.prev_sample + start;
  return {args.velocity + start, args.sample + start, next, form == Form::log_prob ? next : args.old_mean + start,
          args.gradient + start};
}

// Calls vector(at, place, count) for every vector of a sample: its first element, that element's place and how many
// elements it has, which is a constant but at the end of a row. Packed, all elements of a vector have the same place.
template <typename T, typename F>
STAR_INLINE void each_vector(bool packed, int64_t channels, int64_t places, F vector) {
  constexpr int64_t WIDTH = LANES<T>;
  const int64_t rows = packed ? places : channels, length = packed ? channels : places;
  for (int64_t row = 0; row < rows; row++) {
    int64_t i = 0;
    for (; i + WIDTH <= length; i += WIDTH) vector(row * length + i, packed ? row : i, WIDTH);
    if (i < length) vector(row * length + i, packed ? row : i, length - i);
  }
}

// A sum of vectors in double, in an order that their number alone decides.
template <typename T>
struct Sum {
  double lanes[LANES<T>] = {};

  STAR_ALWAYS void add(Vector<T> vector) {
    T values[LANES<T>];
    store(values, vector);
#pragma omp simd
    for (int lane = 0; lane < LANES<T>; lane++) lanes[lane] += double(values[lane]);
  }
  STAR_ALWAYS double value() const {
    double sum = 0;
    for (int lane = 0; lane < LANES<T>; lane++) sum += lanes[lane];
    return sum;
  }
};

// First pass where a sample has one ratio: the sum of its terms, weighted if the ratio is.
template <Form form, bool packed, typename V, typename X, typename T>
double whole_pass(const PolicyLossArgs<V, X, T>& args, int64_t index, const T* weights) {
  constexpr int MANY = 64;  // vectors that are added up in T before the sum goes on in double
  const auto [velocity, sample, next, old, gradient] = sample_of<form>(args, index);
  const Vector<T> a = broadcast(args.a[index]), b = broadcast(args.b[index]);
  Sum<T> sum;
  Vector<T> recent{};
  int pending = 0;
  each_vector<T>(packed, args.channels, args.places, [&](int64_t at, int64_t place, int64_t count) STAR_ALWAYS {
    const V* v = velocity + at;
    const X *x = sample + at, *n = next + at, *o = old + at;
    Vector<T> left, right, direction;
    term_factors<form>(a, load_some<T>(x, count), b, load_some<T>(v, count), load_some<T>(n, count),
                       load_some<T>(o, count), left, right, direction);
    if (weights) left *= packed ? broadcast(weights[place]) : load_some<T>(weights + place, count);
    recent = fma(left, right, recent);
    if constexpr (std::is_same_v<V, T>) store_some<T>(gradient + at, direction, count);
    if (++pending == MANY) {
      sum.add(recent);
      recent = Vector<T>{};
      pending = 0;
    }
  });
  sum.add(recent);
  return sum.value();
}

// First pass where the places have ratios of their own: the sum over the channels at each.
template <Form form, bool packed, typename V, typename X, typename T>
void place_pass(const PolicyLossArgs<V, X, T>& args, int64_t index, T* __restrict delta) {
  const auto [velocity, sample, next, old, gradient] = sample_of<form>(args, index);
  const Vector<T> a = broadcast(args.a[index]), b = broadcast(args.b[index]);
  std::fill_n(delta, args.places, T(0));
  each_vector<T>(packed, args.channels, args.places, [&](int64_t at, int64_t place, int64_t count) STAR_ALWAYS {
    Vector<T> direction;
    const Vector<T> terms = term<form>(a, load_some<T>(sample + at, count), b, load_some<T>(velocity + at, count),
                                       load_some<T>(next + at, count), load_some<T>(old + at, count), direction);
    if constexpr (packed) {
      T sum = 0;
      for (int lane = 0; lane < LANES<T>; lane++) sum += terms[lane];
      delta[place] += sum;
    } else {
      store_some<T>(delta + place, load_some<T>(delta + place, count) + terms, count);
    }
    if constexpr (std::is_same_v<V, T>) store_some<T>(gradient + at, direction, count);
  });
}

// Sizes of the policy's gradient over a sample: in all places, in those with a weight above the edge of the top tenth, and
// in those on it.
struct Amounts {
  double total = 0, above = 0, tied = 0;
};

// gradient = scale * factor * direction + the pull of the KL term. factor: one per place, or null for 1.
template <bool weighted, typename V, typename X, typename T>
Amounts second_pass(const PolicyLossArgs<V, X, T>& args, int64_t index, const T* factor, T scale, T edge) {
  constexpr int64_t WIDTH = LANES<T>;
  const auto [velocity, sample, next, old, gradient] =
      args.form == Form::guard ? sample_of<Form::guard>(args, index) : sample_of<Form::log_prob>(args, index);
  const bool guard = args.form == Form::guard;
  const int64_t channels = args.channels, places = args.places;
  const V* reference = args.reference_velocity ? args.reference_velocity + index * channels * places : nullptr;
  const T pull = reference ? 2 * args.kl_coef * args.kl_precision[index] * args.b[index] * args.b[index] /
                                 T(args.batch * channels * places)
                           : T(0);
  const T* weights = args.weights + index * places;
  const Vector<T> a = broadcast(args.a[index]), b = broadcast(args.b[index]), none{};
  // Writes the gradient of some elements, returns its size.
  auto write = [&](int64_t at, int64_t count, Vector<T> factor) STAR_ALWAYS {
    Vector<T> value;
    if constexpr (std::is_same_v<V, T>) {
      value = factor * load_some<T>(gradient + at, count);
    } else {
      const Vector<T> mean =
          transition_mean(a, load_some<T>(sample + at, count), b, load_some<T>(velocity + at, count));
      value = factor * (load_some<T>(next + at, count) - (guard ? load_some<T>(old + at, count) : mean));
    }
    const Vector<T> size = magnitude<T>(value);
    if (pull != 0) value += pull * (load_some<T>(velocity + at, count) - load_some<T>(reference + at, count));
    store_some<T>(gradient + at, value, count);
    return size;
  };
  Sum<T> total, above, tied;
  auto account = [&](Vector<T> size, Vector<T> weight) STAR_ALWAYS {
    total.add(size);
    if constexpr (weighted) {
      above.add(weight > edge ? size : none);
      tied.add(weight == edge ? size : none);
    }
  };
  if (args.packed) {
    for (int64_t place = 0; place < places; place++) {
      const int64_t start = place * channels;
      const Vector<T> f = broadcast(factor ? scale * factor[place] : scale);
      Vector<T> size{};
      int64_t c = 0;
      for (; c + WIDTH <= channels; c += WIDTH) size += write(start + c, WIDTH, f);
      if (c < channels) size += write(start + c, channels - c, f);
      account(size, weighted ? broadcast(weights[place]) : none);
    }
  } else {
    // All channels of some vectors of places: what belongs to the places is loaded once, and stays close by.
    auto tile = [&](int64_t place, auto vectors, int64_t count) STAR_ALWAYS {
      constexpr int N = vectors;
      Vector<T> f[N], size[N];
      for (int k = 0; k < N; k++) {
        f[k] = broadcast(scale);
        if (factor) f[k] *= load_some<T>(factor + place + k * WIDTH, count);
        size[k] = none;
      }
      for (int64_t c = 0; c < channels; c++)
        for (int k = 0; k < N; k++) size[k] += write(c * places + place + k * WIDTH, count, f[k]);
      for (int k = 0; k < N; k++)
        account(size[k], weighted ? load_some<T>(weights + place + k * WIDTH, count) : none);
    };
    constexpr int N = 32;
    int64_t place = 0;
    for (; place + N * WIDTH <= places; place += N * WIDTH) tile(place, std::integral_constant<int, N>{}, WIDTH);
    for (; place < places; place += WIDTH)
      tile(place, std::integral_constant<int, 1>{}, std::min(WIDTH, places - place));
  }
  return {total.value(), above.value(), tied.value()};
}

// The (rank + 1)-th largest of values that are not negative. Such numbers are in the order of their bits, of which every
// pass decides two: a dozen passes over vectors cost less than one selection by swapping.
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
  // The number of bits below the sign's is odd: the last pass decides one of its two again.
  for (int shift = 8 * sizeof(T) - 3; shift >= -1; shift -= 2) {
    const int at = std::max(shift, 0);
    const T one = std::bit_cast<T>(found | Bits(1) << at), two = std::bit_cast<T>(found | Bits(2) << at),
            three = std::bit_cast<T>(found | Bits(3) << at);
    if (!(one <= most)) continue;
    if (three <= least) {
      found |= Bits(3) << at;
      continue;
    }
    Bits ones = 0, twos = 0, threes = 0;
#pragma omp simd reduction(+ : ones, twos, threes)
    for (int64_t i = 0; i < count; i++) {
      ones += values[i] >= one ? 1 : 0;
      twos += values[i] >= two ? 1 : 0;
      threes += values[i] >= three ? 1 : 0;
    }
    const Bits limit = Bits(rank);
    found |= Bits(threes > limit ? 3 : twos > limit ? 2 : ones > limit ? 1 : 0) << at;
  }
  return std::bit_cast<T>(found);
}

// The tenth of the places with the highest weight, ties in proportion; see reference.top_share. scratch: 2 * places.
template <typename T>
struct TopTenth {
  T edge = 0;
  double size, portion = 0;  // places, and share of those on the edge that belong to it

  TopTenth(const T* weights, int64_t places, T* scratch) : size(TOP_SHARE * double(places)) {
    if (!weights) return;
    const int64_t rank = int64_t(size);
    const T* values = weights;
    int64_t count = places, beyond = 0;
    // A sample of the weights says about where the edge is. What is beyond is only counted, what is near is looked at.
    constexpr int64_t EVERY = 16, WIDTH = LANES<T>, ENOUGH = 2048;
    if (places >= ENOUGH) {
      const int64_t sampled = places / EVERY, middle = int64_t(TOP_SHARE * double(sampled));
      for (int64_t i = 0; i < sampled; i++) scratch[i] = weights[i * EVERY];
      const int64_t margin = int64_t(3 * std::sqrt(TOP_SHARE * (1 - TOP_SHARE) * double(sampled))) + 1;
      const T high = ranked(scratch, sampled, std::max(middle - margin, int64_t(0)));
      const T low = ranked(scratch, sampled, std::min(middle + margin, sampled - 1));
      int64_t near = 0, above = 0;
      Vector<IntegerOf<T>> over{};
      for (int64_t start = 0; start < places; start += WIDTH) {
        const int64_t length = std::min(WIDTH, places - start);
        const Vector<T> group = load_some<T>(weights + start, length);
        over += group > high;  // -1 where it holds
        if (!any((group >= low) & (group <= high))) continue;
        for (int64_t i = start; i < start + length; i++) {
          scratch[near] = weights[i];
          near += weights[i] >= low && weights[i] <= high;
        }
      }
      for (int lane = 0; lane < WIDTH; lane++) above -= over[lane];
      if (above <= rank && rank < above + near) values = scratch, count = near, beyond = above;
    }
    edge = ranked(values, count, rank - beyond);
    IntegerOf<T> above = 0, tied = 0;
#pragma omp simd reduction(+ : above, tied)
    for (int64_t i = 0; i < count; i++) {
      above += values[i] > edge ? 1 : 0;
      tied += values[i] == edge ? 1 : 0;
    }
    portion = (size - double(beyond + above)) / std::max(double(tied), 1.0);
  }
};

// Calls f<form, packed>().
template <typename F>
STAR_INLINE auto with_form(Form form, bool packed, F f) {
  if (form == Form::delta) return packed ? f.template operator()<Form::delta, true>() : f.template operator()<Form::delta, false>();
  if (form == Form::guard) return packed ? f.template operator()<Form::guard, true>() : f.template operator()<Form::guard, false>();
  return packed ? f.template operator()<Form::log_prob, true>() : f.template operator()<Form::log_prob, false>();
}

}  // namespace

template <typename V, typename X, typename T>
PolicyLossSums policy_loss_sample(const PolicyLossArgs<V, X, T>& args, int64_t index, T* scratch) {
  const int64_t channels = args.channels, places = args.places;
  const T b = args.b[index], precision = args.precision[index], s = args.s[index];
  const T* weights = args.weights ? args.weights + index * places : nullptr;
  const TopTenth<T> top(weights, places, scratch);
  const Form form = args.form;
  // log-ratio of a place = scale * the sum of its terms - offset - its old log-prob
  const T scale = precision / T(channels) * (form == Form::guard ? 2 * s : T(1));
  const T offset = form == Form::log_prob ? args.log_norm[index] : T(0);
  // d log-ratio / d velocity = slope * direction; the loss is a mean over the batch and the places.
  const T slope = 2 * precision * b / T(channels) * (form == Form::guard ? s : T(1));
  const T share = slope / T(args.batch * places);
  const T step = (args.step_weights ? args.step_weights[index] : T(1)) *
                 (form == Form::guard ? precision / args.kl_precision[index] : T(1));
  auto advantage = [&](int64_t p) {
    const T value = args.advantages[args.advantages_per_place ? index * places + p : index];
    return clamped(value, -args.adv_clip, args.adv_clip) * step;
  };
  PolicyLossSums sums = no_sums();
  auto surrogate = [&](T log_ratio, T advantage) {
    const Surrogate<T> unit = clipped_surrogate(log_ratio, advantage, args.clip_low, args.clip_high);
    sums.square += double(unit.log_ratio) * double(unit.log_ratio);
    sums.low += unit.excess < -args.clip_low;
    sums.high += unit.excess > args.clip_high;
    sums.excess += unit.excess;
    sums.smallest = smaller(sums.smallest, double(unit.excess)), sums.largest = larger(sums.largest, double(unit.excess));
    sums.units += 1;
    return unit;
  };
  // Of the weights, where the sample has one value.
  auto mass = [&] {
    return args.ratio == Ratio::token && weights
               ? ordered_sum(places, [&](int64_t p) { return double(weights[p]); })
               : double(places);
  };
  auto kl = [&] {
    if (!args.reference_velocity) return 0.0;
    const V *v = args.velocity + index * channels * places, *r = args.reference_velocity + index * channels * places;
    const double sum = ordered_sum(channels * places, [&](int64_t i) {
      const double difference = double(b) * (double(T(v[i])) - double(T(r[i])));
      return difference * difference;
    });
    return sum * double(args.kl_precision[index]) / double(channels * places);
  };
  sums.kl = kl();

  auto finish = [&](const T* factor, T scale) {
    const Amounts amounts = weights ? second_pass<true>(args, index, factor, scale, top.edge)
                                    : second_pass<false>(args, index, factor, scale, top.edge);
    sums.total = amounts.total;
    sums.top = weights ? amounts.above + top.portion * amounts.tied : TOP_SHARE * amounts.total;
  };

  if (args.ratio != Ratio::location && !args.advantages_per_place && !args.old_log_prob_per_place) {
    const double pass = with_form(form, args.packed, [&]<Form form, bool packed>() {
      return whole_pass<form, packed>(args, index, args.ratio == Ratio::sample ? weights : nullptr);
    });
    const T old = args.old_log_prob ? args.old_log_prob[index] : T(0);
    const double log_ratio = double(scale) * pass / double(places) - double(offset) - double(old);
    // One that is not finite goes on below, where the places that made it so are counted.
    if (std::isfinite(log_ratio)) {
      const Surrogate<T> unit = surrogate(T(log_ratio), advantage(0));
      sums.loss = mass() * double(unit.value);
      finish(weights, unit.force * share);
      return sums;
    }
  }

  T *delta = scratch, *factor = scratch + places;
  with_form(form, args.packed, [&]<Form form, bool packed>() { place_pass<form, packed>(args, index, delta); });
  for (int64_t p = 0; p < places; p++) {
    const T old = args.old_log_prob ? args.old_log_prob[args.old_log_prob_per_place ? index * places + p : index] : T(0);
    delta[p] = (delta[p] * scale - offset) - old;
  }
  const double sum = ordered_sum(places, [&](int64_t p) { return double(delta[p]); });
  if (!std::isfinite(sum))
    sums.nonfinite = ordered_sum(places, [&](int64_t p) { return std::isfinite(delta[p]) ? 0.0 : 1.0; });
  auto weight = [&](int64_t p) { return weights ? weights[p] : T(1); };

  if (args.ratio == Ratio::location) {
    for (int64_t p = 0; p < places; p++) {
      const Surrogate<T> unit = surrogate(delta[p], advantage(p));
      sums.loss += double(weight(p)) * double(unit.value);
      factor[p] = weight(p) * unit.force * share;
    }
  } else {
    const bool weighted = args.ratio == Ratio::sample && weights;
    const double whole_sum =
        weighted ? ordered_sum(places, [&](int64_t p) { return double(weights[p]) * double(delta[p]); }) : sum;
    const T log_ratio = T(whole_sum / double(places));
    if (args.ratio == Ratio::token && args.advantages_per_place) {
      // One ratio and two signs: the gate and the value of each sign, scaled by the size of each place's advantage.
      const Surrogate<T> up = surrogate(log_ratio, T(1));
      const Surrogate<T> down = clipped_surrogate(log_ratio, T(-1), args.clip_low, args.clip_high);
      for (int64_t p = 0; p < places; p++) {
        const T size = advantage(p);
        const Surrogate<T>& unit = size >= 0 ? up : down;
        delta[p] = weight(p) * std::abs(size) * unit.value;
        factor[p] = weight(p) * std::abs(size) * unit.force * share;
      }
      sums.loss = ordered_sum(places, [&](int64_t p) { return double(delta[p]); });
    } else {
      const Surrogate<T> unit = surrogate(log_ratio, advantage(0));
      for (int64_t p = 0; p < places; p++) factor[p] = weight(p) * (unit.force * share);
      sums.loss = mass() * double(unit.value);
    }
  }

  finish(factor, T(1));
  return sums;
}

#define STAR_INSTANTIATE(V, X, T) \
  template PolicyLossSums policy_loss_sample<V, X, T>(const PolicyLossArgs<V, X, T>&, int64_t, T*);
STAR_INSTANTIATE(double, double, double)
STAR_INSTANTIATE(float, float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, torch::headeronly::BFloat16, float)

}  // namespace star::STAR_ISA
