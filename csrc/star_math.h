// The per-element mathematics of the operators, once for every device. The specification is star_kernels/reference.py.
#pragma once
#include <cmath>

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

// log p - log p_old of one element, but for the factor `precision`, without cancellation.
template <typename T>
STAR_HD T delta_term(T mean, T old_mean, T prev_sample) {
  return (mean - old_mean) * ((prev_sample - mean) + (prev_sample - old_mean));
}

// GRPO-Guard's linear term, but for the factor 2 * precision * s.
template <typename T>
STAR_HD T guard_term(T mean, T old_mean, T prev_sample) {
  return (prev_sample - old_mean) * (mean - old_mean);
}

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
  log_ratio = log_ratio < -limit ? -limit : (log_ratio > limit ? limit : log_ratio);
  const T excess = std::expm1(log_ratio);
  const T clipped = excess < -clip_low ? -clip_low : (excess > clip_high ? clip_high : excess);
  const T plain = -advantage * (1 + excess);
  const T bounded = -advantage * (1 + clipped);
  const bool gate = inside && (advantage >= 0 ? excess <= clip_high : excess >= -clip_low);
  // A NaN advantage must reach the loss, which a comparison would hide.
  const T value = plain != plain ? plain : (plain > bounded ? plain : bounded);
  return {log_ratio, excess, value, gate || plain != plain ? plain : T(0)};
}

}  // namespace star
