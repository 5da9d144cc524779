// The per-element mathematics of the operators, once for every device. The specification is star_kernels/reference.py.
// Every device must compile it without contraction into fused multiply-adds (-ffp-contract=off, nvcc -fmad=false):
// policy_loss makes the mean again that gaussian_step stored, and only with the same bits is the ratio exactly 1.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define STAR_HD __host__ __device__ __forceinline__
#else
// Never emitted as a shared inline function: the linker must not pick one instruction set's copy for all.
#define STAR_HD static inline __attribute__((always_inline))
#endif

namespace star {

constexpr double LOG_RATIO_LIMIT = 30.0;

template <typename T>
STAR_HD T transition_mean(T a, T sample, T b, T velocity) {
  return a * sample + b * velocity;
}

template <typename T>
STAR_HD T transition_sample(T mean, T s, T noise) {
  return mean + s * noise;
}

// A NaN stays.
template <typename T>
STAR_HD T clamped(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

enum class Form { delta, guard, log_prob };

// log p - log p_old of one element, but for a factor, is left * right; the direction is that of its gradient.
// delta: the difference of the squared errors, without cancellation; factor `precision`.
// guard: GRPO-Guard's linear term; factor 2 * precision * s. log_prob: the new log-density alone; factor `precision`.
template <Form form, typename T>
STAR_HD void term_factors(T a, T x, T b, T v, T next, T old, T& left, T& right, T& direction) {
  const T mean = transition_mean(a, x, b, v);
  if constexpr (form == Form::delta) {
    direction = next - mean;
    left = mean - old;
    right = direction + (next - old);
  } else if constexpr (form == Form::guard) {
    direction = next - old;
    left = direction;
    right = mean - old;
  } else {
    direction = next - mean;
    left = -direction;
    right = direction;
  }
}

template <Form form, typename T>
STAR_HD T term(T a, T x, T b, T v, T next, T old, T& direction) {
  T left, right;
  term_factors<form>(a, x, b, v, next, old, left, right, direction);
  return left * right;
}

enum class Ratio { token, location, sample };

template <typename T>
struct Surrogate {
  T log_ratio;  // limited
  T excess;     // ratio - 1
  T value;      // max(-A ratio, -A clip(ratio))
  T force;      // d value / d log-ratio
};

template <typename T>
STAR_HD Surrogate<T> clipped_surrogate(T log_ratio, T advantage, T clip_low, T clip_high) {
  const T limit = T(LOG_RATIO_LIMIT);
  if (!std::isfinite(log_ratio)) {
    const T nan = T(NAN);
    return {nan, nan, nan, nan};
  }
  const bool inside = log_ratio >= -limit && log_ratio <= limit;
  log_ratio = clamped(log_ratio, -limit, limit);
  const T excess = std::expm1(log_ratio);
  const T clipped = clamped(excess, -clip_low, clip_high);
  const T plain = -advantage * (1 + excess);
  const T bounded = -advantage * (1 + clipped);
  const bool gate = inside && (advantage >= 0 ? excess <= clip_high : excess >= -clip_low);
  // A NaN advantage must reach the loss, which a comparison would hide.
  const T value = plain != plain ? plain : (plain > bounded ? plain : bounded);
  return {log_ratio, excess, value, gate || plain != plain ? plain : T(0)};
}

// NaN wins, as in torch.min and torch.max.
template <typename T>
STAR_HD T smaller(T x, T y) {
  return x != x || x < y ? x : y;
}

template <typename T>
STAR_HD T larger(T x, T y) {
  return x != x || x > y ? x : y;
}

// The share of a sample's locations, those of highest weight, whose part in the gradient is a statistic.
constexpr double TOP_SHARE = 0.1;
constexpr int STATISTICS = 10;

// Sums over one sample or several. A unit is what the clip acts on: a sample, or a location.
struct PolicyLossSums {
  double loss, square, low, high, excess, smallest, largest, kl, top, total, nonfinite, units;
};

STAR_HD PolicyLossSums no_sums() {
  PolicyLossSums sums{};
  sums.smallest = INFINITY, sums.largest = -INFINITY;
  return sums;
}

STAR_HD void add(PolicyLossSums& all, const PolicyLossSums& one) {
  all.loss += one.loss, all.square += one.square, all.low += one.low, all.high += one.high, all.excess += one.excess;
  all.smallest = smaller(all.smallest, one.smallest), all.largest = larger(all.largest, one.largest);
  all.kl += one.kl, all.top += one.top, all.total += one.total, all.nonfinite += one.nonfinite, all.units += one.units;
}

// The loss and the statistics, in the order of api.Statistics, from the sums over a batch.
template <typename T>
STAR_HD void finish_statistics(const PolicyLossSums& all, int64_t batch, int64_t locations, double kl_coef, T* loss,
                               float* statistics) {
  const double kl = all.kl / double(batch);
  *loss = T(all.loss / double(batch * locations) + kl_coef * kl);
  const double values[STATISTICS] = {0.5 * all.square / all.units,
                                     (all.low + all.high) / all.units,
                                     all.low / all.units,
                                     all.high / all.units,
                                     1 + all.excess / all.units,
                                     1 + all.smallest,
                                     1 + all.largest,
                                     kl,
                                     all.total == 0 ? 0.0 : all.top / all.total,
                                     all.nonfinite};
  for (int k = 0; k < STATISTICS; k++) statistics[k] = float(values[k]);
}

// Allocation, in the order in which it is done. A map is usable if every mass is.
template <typename T>
STAR_HD bool usable_mass(T mass) {
  return mass >= 0 && std::isfinite(mass);
}

// In units of the map's mean. A map without mass is a concept that is not there.
template <typename T>
STAR_HD T relative_mass(T mass, T mean) {
  return mean > 0 ? mass / mean : T(0);
}

// Weight of a neighbor in the smoothing, before the sum over the neighbors on the grid is divided out.
template <typename T>
STAR_HD T smoothing_tap(long long distance, T sigma) {
  const T scaled = T(distance) / sigma;
  return std::exp(T(-0.5) * scaled * scaled);
}

// Furthest neighbor in the smoothing.
STAR_HD long long smoothing_radius(double sigma, long long size) {
  const double radius = std::ceil(3 * sigma);
  return radius < double(size) ? (long long)(radius) : size - 1;
}

// `largest` of the field cancels when the field is brought to mean 1, and keeps the power from overflowing.
template <typename T>
STAR_HD T sharpened(T field, T largest, T exponent) {
  return exponent == 1 ? field : std::pow(field / largest, exponent);
}

template <typename T>
STAR_HD T mixed(T field, T mean, T cap, T mix) {
  return (1 - mix) + mix * clamped(field / mean, T(0), cap);
}

}  // namespace star
