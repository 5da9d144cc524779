// The per-element mathematics of the operators, once for every device. The specification is star_kernels/reference.py.
// Every device must compile it without contraction into fused multiply-adds (-ffp-contract=off, nvcc -fmad=false):
// policy_loss makes the mean again that gaussian_step stored, and only with the same bits is the ratio exactly 1.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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

// Velocity with classifier-free guidance.
template <typename T>
STAR_HD T guided(T conditional, T unconditional, T scale) {
  return unconditional + scale * (conditional - unconditional);
}

// Four words that a seed and a counter decide: Philox4x32-10 (Salmon et al. 2011), the seed as key.
struct Words {
  uint32_t word[4];
};

STAR_HD Words philox(uint64_t seed, uint64_t counter) {
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  Words at = {{uint32_t(counter), uint32_t(counter >> 32), 0, 0}};
  for (int round = 0; round < 10; round++) {
    const uint64_t first = uint64_t(0xD2511F53u) * at.word[0], second = uint64_t(0xCD9E8D57u) * at.word[2];
    at = {{uint32_t(second >> 32) ^ at.word[1] ^ key[0], uint32_t(second),
           uint32_t(first >> 32) ^ at.word[3] ^ key[1], uint32_t(first)}};
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return at;
}

// Standard normals from two words (Box and Muller 1958): a radius from the first, an angle from the second. Made of sums,
// products and a square root alone, which every device rounds alike: the bits are the same everywhere.
STAR_HD void normal_pair(uint32_t first, uint32_t second, float* normals) {
  // The word times 2^-32 is 2^exponent * (1 + x), 1 + x in sqrt(1/2)..sqrt(2); a polynomial makes the logarithm of it.
  const float word = float(first | 1);
  int32_t bits;
  memcpy(&bits, &word, sizeof(bits));
  bits -= 0x3F3504F3;
  const float exponent = float((bits >> 23) - 32);
  bits = (bits & 0x7FFFFF) + 0x3F3504F3;
  float x;
  memcpy(&x, &bits, sizeof(x));
  x -= 1;
  const float square = x * x;
  float log = -0.076344930f;
  log = log * x + 0.12761575f;
  log = log * x + -0.13160183f;
  log = log * x + 0.14201759f;
  log = log * x + -0.16623357f;
  log = log * x + 0.20001227f;
  log = log * x + -0.25000820f;
  log = log * x + 0.33333331f;
  // ln 2 in two parts; the first has so few bits that the product is exact.
  log = x * square * log - 0.5f * square + exponent * -2.1219444e-4f;
  log = x + log + exponent * 0.693359375f;
  const float radius = std::sqrt(-2 * log);
  // The angle is a number of quarter turns and a rest of at most half of one, whose sine and cosine are Taylor's series.
  const uint32_t turns = (second + 0x20000000u) >> 30;
  const float angle = float(int32_t(second - (turns << 30))) * 1.4629181e-9f, z = angle * angle;
  float sine = 2.7557319e-6f;
  sine = sine * z + -1.9841270e-4f;
  sine = sine * z + 8.333334e-3f;
  sine = sine * z + -0.16666667f;
  sine = angle * z * sine + angle;
  float cosine = -2.7557319e-7f;
  cosine = cosine * z + 2.4801587e-5f;
  cosine = cosine * z + -1.3888889e-3f;
  cosine = cosine * z + 4.1666667e-2f;
  cosine = z * z * cosine - 0.5f * z + 1;
  const float along = turns & 1 ? sine : cosine, across = turns & 1 ? cosine : sine;
  normals[0] = radius * ((turns + 1) & 2 ? -along : along);
  normals[1] = radius * (turns & 2 ? -across : across);
}

// Standard normals, the elements 4 * counter to 4 * counter + 3 of a sample's noise.
struct Normals {
  float value[4];
};

STAR_HD Normals normals(uint64_t seed, uint64_t counter) {
  const Words words = philox(seed, counter);
  Normals out;
  normal_pair(words.word[0], words.word[1], out.value);
  normal_pair(words.word[2], words.word[3], out.value + 2);
  return out;
}

// A NaN stays.
template <typename T>
STAR_HD T clamped(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

enum class Form { delta, guard, log_prob };

// log p - log p_old of one element, but for a factor, is left * right.
// delta: the difference of the squared errors, without cancellation; factor `precision`.
// guard: GRPO-Guard's linear term; factor 2 * precision * s. log_prob: the new log-density alone; factor `precision`.
template <Form form, typename T>
STAR_HD void term_factors(T a, T x, T b, T v, T next, T old, T& left, T& right) {
  const T mean = transition_mean(a, x, b, v);
  if constexpr (form == Form::delta) {
    left = mean - old;
    right = (next - mean) + (next - old);
  } else if constexpr (form == Form::guard) {
    left = next - old;
    right = mean - old;
  } else {
    right = next - mean;
    left = -right;
  }
}

template <Form form, typename T>
STAR_HD T term(T a, T x, T b, T v, T next, T old) {
  T left, right;
  term_factors<form>(a, x, b, v, next, old, left, right);
  return left * right;
}

enum class Ratio { token, location, sample };

// What the locations of a sample have in common.
template <typename T>
struct SampleTerms {
  T a, b;
  T scale, offset;  // a location's log-ratio is scale * (the sum of its terms) - offset - its old log-prob
  T step;           // factor of the advantages
  T share, pull;    // the gradient is share * weight * force * direction + pull * (velocity - reference velocity)
};

// Sizes of a batch, and what does not change from sample to sample.
template <typename T>
struct LossOptions {
  int64_t batch, channels, locations;
  Form form;
  Ratio ratio;
  bool kl;  // there is a reference velocity
  T clip_low, clip_high, adv_clip, kl_coef;
};

template <typename T>
STAR_HD SampleTerms<T> sample_terms(const LossOptions<T>& options, T a, T b, T s, T precision, T log_norm,
                                    T kl_precision, T step_weight) {
  const bool guard = options.form == Form::guard;
  const T channels = T(options.channels), all = T(options.batch * options.locations);
  SampleTerms<T> terms;
  terms.a = a, terms.b = b;
  terms.scale = precision / channels * (guard ? 2 * s : T(1));
  terms.offset = options.form == Form::log_prob ? log_norm : T(0);
  terms.step = step_weight * (guard ? precision / kl_precision : T(1));
  // d log-ratio / d velocity is this slope times the direction; the loss is a mean over the batch and the locations.
  const T slope = 2 * precision * b / channels * (guard ? s : T(1));
  terms.share = slope / all;
  terms.pull = 2 * options.kl_coef * kl_precision * b * b / (channels * all);
  return terms;
}

template <typename T>
STAR_HD T used_advantage(T advantage, T adv_clip, T step) {
  return clamped(advantage, -adv_clip, adv_clip) * step;
}

template <typename T>
struct LimitedRatio {
  T log_ratio, excess;  // excess: ratio - 1, which near 0 has more digits than the ratio
  bool inside;          // of the limit
};

template <typename T>
STAR_HD LimitedRatio<T> limited_ratio(T log_ratio) {
  const T limit = T(LOG_RATIO_LIMIT);
  if (!std::isfinite(log_ratio)) return {T(NAN), T(NAN), false};
  const T limited = clamped(log_ratio, -limit, limit);
  return {limited, std::expm1(limited), limited == log_ratio};
}

template <typename T>
struct Surrogate {
  T value;  // max(-A ratio, -A clip(ratio))
  T force;  // d value / d log-ratio
};

template <typename T>
STAR_HD Surrogate<T> surrogate(const LimitedRatio<T>& ratio, T advantage, T clip_low, T clip_high) {
  const T plain = -advantage * (1 + ratio.excess);
  const T bounded = -advantage * (1 + clamped(ratio.excess, -clip_low, clip_high));
  const bool gate = ratio.inside && (advantage >= 0 ? ratio.excess <= clip_high : ratio.excess >= -clip_low);
  // A NaN must reach the loss and the gradient, which a comparison would hide.
  const bool is_nan = plain != plain;
  return {is_nan || plain > bounded ? plain : bounded, is_nan || gate ? plain : T(0)};
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

// What is summed over the locations of a sample, and which of these sums stands where. With one ratio for the sample its
// surrogate is known only afterwards: DELTA is the sum of the log-ratios (times the weights, for Ratio::sample); MASS and
// MASS_DOWN that of weight * |advantage| where the advantage is not negative, and where it is, or without an advantage for
// each location of the weights alone. With a ratio for every location the rest are sums over these.
enum Slot { NONFINITE, KL, DELTA, MASS, MASS_DOWN, SLOTS = 7 };
enum LocationSlot { LOSS = DELTA, SQUARE, LOW, HIGH, EXCESS };

struct LocationSums {
  double slot[SLOTS];
  double smallest, largest;  // excess; only with a ratio for every location
};

STAR_HD LocationSums no_location_sums() {
  LocationSums sums{};
  sums.smallest = INFINITY, sums.largest = -INFINITY;
  return sums;
}

STAR_HD void add(LocationSums& all, const LocationSums& one) {
  for (int k = 0; k < SLOTS; k++) all.slot[k] += one.slot[k];
  all.smallest = smaller(all.smallest, one.smallest), all.largest = larger(all.largest, one.largest);
}

// Sums over samples. A unit is what the clip acts on: a sample, or a location.
struct BatchSums {
  double loss, square, low, high, excess, smallest, largest, kl, nonfinite, units;
};

STAR_HD BatchSums no_sums() {
  BatchSums sums{};
  sums.smallest = INFINITY, sums.largest = -INFINITY;
  return sums;
}

STAR_HD void add(BatchSums& all, const BatchSums& one) {
  all.loss += one.loss, all.square += one.square, all.low += one.low, all.high += one.high, all.excess += one.excess;
  all.smallest = smaller(all.smallest, one.smallest), all.largest = larger(all.largest, one.largest);
  all.kl += one.kl, all.nonfinite += one.nonfinite, all.units += one.units;
}

// A location's ratio and surrogate, into the sums over its sample's.
template <typename S, typename T>
STAR_HD void add_location(S* slot, const LimitedRatio<T>& ratio, T weight, T value, T clip_low, T clip_high) {
  slot[LOSS] += S(weight * value);
  slot[SQUARE] += S(ratio.log_ratio * ratio.log_ratio);
  slot[LOW] += ratio.excess < -clip_low;
  slot[HIGH] += ratio.excess > clip_high;
  slot[EXCESS] += S(ratio.excess);
}

// What a sample adds to the batch's sums. log_ratio: the sample's, for other ratios than Ratio::location. up, down: its
// advantage and 0, or 1 and -1 where every location has its own.
template <typename T>
STAR_HD BatchSums sample_sums(const LossOptions<T>& options, const LocationSums& sums, T log_ratio, T up, T down,
                              T kl_precision) {
  BatchSums out{};
  out.nonfinite = sums.slot[NONFINITE];
  if (options.kl) out.kl = sums.slot[KL] * double(kl_precision) / double(options.channels * options.locations);
  if (options.ratio == Ratio::location) {
    out.loss = sums.slot[LOSS], out.square = sums.slot[SQUARE], out.low = sums.slot[LOW], out.high = sums.slot[HIGH];
    out.excess = sums.slot[EXCESS], out.smallest = sums.smallest, out.largest = sums.largest;
    out.units = double(options.locations);
    return out;
  }
  const LimitedRatio<T> ratio = limited_ratio(log_ratio);
  out.loss = sums.slot[MASS] * double(surrogate(ratio, up, options.clip_low, options.clip_high).value) +
             sums.slot[MASS_DOWN] * double(surrogate(ratio, down, options.clip_low, options.clip_high).value);
  out.square = double(ratio.log_ratio) * double(ratio.log_ratio);
  out.low = ratio.excess < -options.clip_low, out.high = ratio.excess > options.clip_high;
  out.excess = out.smallest = out.largest = double(ratio.excess);
  out.units = 1;
  return out;
}

constexpr int STATISTICS = 9;

// The loss and the statistics, in the order of reference.STATISTICS.
template <typename T>
STAR_HD void finish(const LossOptions<T>& options, const BatchSums& all, T* loss, float* statistics) {
  const double kl = all.kl / double(options.batch);
  *loss = T(all.loss / double(options.batch * options.locations) + double(options.kl_coef) * kl);
  const double per_unit = 1 / all.units;
  const double values[STATISTICS] = {0.5 * all.square * per_unit,
                                     (all.low + all.high) * per_unit,
                                     all.low * per_unit,
                                     all.high * per_unit,
                                     1 + all.excess * per_unit,
                                     1 + all.smallest,
                                     1 + all.largest,
                                     kl,
                                     all.nonfinite};
  for (int k = 0; k < STATISTICS; k++) statistics[k] = float(values[k]);
}

// nft_loss. Sizes of a batch, and what does not change from sample to sample.
template <typename T>
struct NFTOptions {
  int64_t batch, channels, locations;
  bool kl;  // there is a reference velocity
  bool adaptive;
  T beta, adaptive_min;
  double loss_scale, adv_clip, kl_coef;  // loss_scale: of both branches' terms, adv_clip / beta
};

// Errors of the predictions of the clean latents: the old policy's, and what the policy has moved, for once and against.
template <typename T>
STAR_HD void nft_errors(T sigma, T sigma_beta, T sample, T clean, T velocity, T old, T& deviation, T& positive,
                        T& negative) {
  deviation = velocity - old;
  const T error = sample - sigma * old - clean, moved = sigma_beta * deviation;
  positive = error - moved, negative = error + moved;
}

// What is summed over a sample, and which of these sums stands where. POSITIVE and NEGATIVE: of the branches' squared
// errors times weight and probability; the next two: of the errors' sizes. DEVIATION: of the squared deviations.
enum NFTSlot { NFT_POSITIVE, NFT_NEGATIVE, NFT_POSITIVE_ERROR, NFT_NEGATIVE_ERROR, NFT_DEVIATION, NFT_KL, NFT_SLOTS };

struct NFTSums {
  double slot[NFT_SLOTS];
  double largest;    // squared deviation
  double nonfinite;  // locations
};

STAR_HD void add(NFTSums& all, const NFTSums& one) {
  for (int k = 0; k < NFT_SLOTS; k++) all.slot[k] += one.slot[k];
  all.largest = larger(all.largest, one.largest), all.nonfinite += one.nonfinite;
}

// What a branch's squared error is divided by. error: its mean size over the sample.
template <typename T>
STAR_HD T nft_size(const NFTOptions<T>& options, T error) {
  if (!options.adaptive) return T(1);
  return error < options.adaptive_min ? options.adaptive_min : error;  // a NaN stays
}

// A sample's sums as means, its terms divided by the sizes of its errors, which this writes.
template <typename T>
STAR_HD NFTSums nft_sample(const NFTOptions<T>& options, const NFTSums& sums, T* errors) {
  NFTSums out = sums;
  for (int k = 0; k < NFT_SLOTS; k++) out.slot[k] /= double(options.channels * options.locations);
  for (int k = 0; k < 2; k++) {
    errors[k] = T(out.slot[NFT_POSITIVE_ERROR + k]);
    out.slot[NFT_POSITIVE_ERROR + k] = double(errors[k]);
    out.slot[NFT_POSITIVE + k] /= double(nft_size(options, errors[k]));
  }
  return out;
}

// The gradient is share * weight * ((1 - r) / size * negative - r / size * positive) + pull * (velocity - reference).
template <typename T>
struct NFTForces {
  T up, down;  // one over the size of the positive and of the negative branch's errors
  T share, pull;
};

template <typename T>
STAR_HD NFTForces<T> nft_forces(const NFTOptions<T>& options, T sigma, const T* errors, T grad_loss) {
  const double elements = double(options.batch * options.channels * options.locations);
  return {1 / nft_size(options, errors[0]), 1 / nft_size(options, errors[1]),
          T(2 * options.adv_clip / elements) * sigma * grad_loss, T(2 * options.kl_coef / elements) * grad_loss};
}

constexpr int NFT_STATISTICS = 8;

// The loss and the statistics, in the order of reference.NFT_STATISTICS, from the sum over the samples.
template <typename T>
STAR_HD void nft_finish(const NFTOptions<T>& options, const NFTSums& all, T* loss, float* statistics) {
  double mean[NFT_SLOTS];
  for (int k = 0; k < NFT_SLOTS; k++) mean[k] = all.slot[k] / double(options.batch);
  double value = options.loss_scale * (mean[NFT_POSITIVE] + mean[NFT_NEGATIVE]);
  if (options.kl) value += options.kl_coef * mean[NFT_KL];
  *loss = T(value);
  const double values[NFT_STATISTICS] = {mean[NFT_POSITIVE],
                                         mean[NFT_NEGATIVE],
                                         mean[NFT_POSITIVE_ERROR],
                                         mean[NFT_NEGATIVE_ERROR],
                                         mean[NFT_DEVIATION],
                                         all.largest,
                                         mean[NFT_KL],
                                         all.nonfinite};
  for (int k = 0; k < NFT_STATISTICS; k++) statistics[k] = float(values[k]);
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
