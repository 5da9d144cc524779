// The operators' arguments by name, and the functions that the devices register, whose parameters are those of the schemas
// in star_kernels/ops.py. Fronts use libtorch's stable ABI and its header-only types alone: the same file serves every
// later torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "floats.h"
#include "signatures.h"

namespace star {

using torch::stable::new_empty;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A type as torch.library prints it.
template <typename T>
constexpr const char* schema_type = nullptr;
template <>
inline constexpr const char* schema_type<Tensor> = "Tensor";
template <>
inline constexpr const char* schema_type<OptionalTensor> = "Optional[Tensor]";
template <>
inline constexpr const char* schema_type<std::string> = "str";
template <>
inline constexpr const char* schema_type<int64_t> = "int";
template <>
inline constexpr const char* schema_type<double> = "float";
template <>
inline constexpr const char* schema_type<bool> = "bool";

template <typename... Types>
std::string schema_types(const std::tuple<Types...>*) {
  static_assert(((schema_type<Types> != nullptr) && ...), "a type without a schema_type");
  std::string out;
  ((out += (out.empty() ? "" : ", ") + std::string(schema_type<Types>)), ...);
  return out;
}

template <typename T>
std::string schema_types(const T*) {
  return schema_type<T>;
}

inline std::string schema_types(const void*) { return ""; }

// Keeps the signature of a function that is registered as an operator's; true, for a variable to hold.
template <typename Result, typename... Arguments>
bool keep_signature(const char* name, Result (*)(Arguments...)) {
  const std::tuple<std::remove_cvref_t<Arguments>...>* arguments = nullptr;
  const Result* result = nullptr;
  signatures()[name] = schema_types(arguments) + " -> " + schema_types(result);
  return true;
}

template <typename T>
constexpr ScalarType scalar_type = torch::headeronly::CppTypeToScalarType<T>::value;

// The tensor itself where it has the type already.
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Contiguous too.
inline Tensor ready(const Tensor& tensor, ScalarType type) {
  const Tensor out = converted(tensor, type);
  return out.is_contiguous() ? out : torch::stable::contiguous(out);
}

struct AttentionMapsInputs {
  Tensor query, key, concept_index;
  OptionalTensor concept_weight, lse;
  double scale;
  OptionalTensor head_weight, key_bias;
};

template <Tensor (*run)(const AttentionMapsInputs&)>
Tensor attention_maps(const Tensor& query, const Tensor& key, const Tensor& concept_index,
                      const OptionalTensor& concept_weight, const OptionalTensor& lse, double scale,
                      const OptionalTensor& head_weight, const OptionalTensor& key_bias) {
  return run({query, key, concept_index, concept_weight, lse, scale, head_weight, key_bias});
}

struct WriteAttentionMapsInputs {
  AttentionMapsInputs maps;
  int64_t first_row, first_query;
  Tensor out;
};

template <void (*run)(const WriteAttentionMapsInputs&)>
void write_attention_maps(const Tensor& query, const Tensor& key, const Tensor& concept_index,
                          const OptionalTensor& concept_weight, const OptionalTensor& lse, double scale,
                          const OptionalTensor& head_weight, const OptionalTensor& key_bias, int64_t first_row,
                          int64_t first_query, const Tensor& out) {
  run({{query, key, concept_index, concept_weight, lse, scale, head_weight, key_bias}, first_row, first_query, out});
}

struct AllocateInputs {
  Tensor maps;            // (B, G, frames * rows * columns)
  int64_t rows, columns;  // of a frame
  std::string combine;
  double smooth, sharpen, cap, mix;
  int64_t patch;
};

template <Tensor (*run)(const AllocateInputs&)>
Tensor allocate(const Tensor& maps, int64_t rows, int64_t columns, const std::string& combine, double smooth,
                double sharpen, double cap, double mix, int64_t patch) {
  return run({maps, rows, columns, combine, smooth, sharpen, cap, mix, patch});
}

struct GaussianStepInputs {
  Tensor sample, velocity;
  OptionalTensor noise;
  Tensor a, b, s;
  OptionalTensor unconditional_velocity;
  double guidance_scale;
  OptionalTensor seeds;  // (B,) int64
};

using GaussianStepResult = std::tuple<Tensor, Tensor>;  // prev_sample, mean

template <GaussianStepResult (*run)(const GaussianStepInputs&)>
GaussianStepResult gaussian_step(const Tensor& sample, const Tensor& velocity, const OptionalTensor& noise,
                                 const Tensor& a, const Tensor& b, const Tensor& s,
                                 const OptionalTensor& unconditional_velocity, double guidance_scale,
                                 const OptionalTensor& seeds) {
  return run({sample, velocity, noise, a, b, s, unconditional_velocity, guidance_scale, seeds});
}

// Whether the arithmetic is in double.
inline bool in_double(const GaussianStepInputs& inputs) {
  auto is_double = [](const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; };
  return is_double(inputs.sample) || is_double(inputs.velocity) ||
         (inputs.unconditional_velocity && is_double(*inputs.unconditional_velocity));
}

struct PolicyLossInputs {
  Tensor velocity, sample, prev_sample;
  Tensor a, b, s, precision, log_norm, kl_precision;
  Tensor advantages;
  OptionalTensor weights, old_mean, old_log_prob, reference_velocity, step_weights;
  std::string ratio;
  double clip_low, clip_high, adv_clip, kl_coef;
  bool guard;
};

using PolicyLossResult = std::tuple<Tensor, Tensor, Tensor>;  // loss, statistics, log_ratio
using PolicyLossWithGradientResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // and the velocity's gradient

// run: policy_loss or policy_loss_with_gradient of a device.
template <auto run>
auto policy_loss(const Tensor& velocity, const Tensor& sample, const Tensor& prev_sample, const Tensor& a,
                 const Tensor& b, const Tensor& s, const Tensor& precision, const Tensor& log_norm,
                 const Tensor& kl_precision, const Tensor& advantages, const OptionalTensor& weights,
                 const OptionalTensor& old_mean, const OptionalTensor& old_log_prob,
                 const OptionalTensor& reference_velocity, const OptionalTensor& step_weights,
                 const std::string& ratio, double clip_low, double clip_high, double adv_clip, double kl_coef,
                 bool guard) {
  return run({velocity, sample, prev_sample, a, b, s, precision, log_norm, kl_precision, advantages, weights, old_mean,
              old_log_prob, reference_velocity, step_weights, ratio, clip_low, clip_high, adv_clip, kl_coef, guard});
}

struct PolicyLossGradientInputs {
  Tensor grad_loss, log_ratio;
  PolicyLossInputs loss;
};

template <Tensor (*run)(const PolicyLossGradientInputs&)>
Tensor policy_loss_gradient(const Tensor& grad_loss, const Tensor& log_ratio, const Tensor& velocity,
                            const Tensor& sample, const Tensor& prev_sample, const Tensor& a, const Tensor& b,
                            const Tensor& s, const Tensor& precision, const Tensor& log_norm,
                            const Tensor& kl_precision, const Tensor& advantages, const OptionalTensor& weights,
                            const OptionalTensor& old_mean, const OptionalTensor& old_log_prob,
                            const OptionalTensor& reference_velocity, const OptionalTensor& step_weights,
                            const std::string& ratio, double clip_low, double clip_high, double adv_clip,
                            double kl_coef, bool guard) {
  return run({grad_loss, log_ratio,
              {velocity, sample, prev_sample, a, b, s, precision, log_norm, kl_precision, advantages, weights, old_mean,
               old_log_prob, reference_velocity, step_weights, ratio, clip_low, clip_high, adv_clip, kl_coef, guard}});
}

struct NFTLossInputs {
  Tensor velocity, old_velocity, sample, clean, sigma, reward_prob;
  OptionalTensor weights, reference_velocity;
  double beta;
  bool adaptive;
  double adaptive_min, adv_clip, kl_coef;
};

using NFTLossResult = std::tuple<Tensor, Tensor, Tensor>;  // loss, statistics, errors
using NFTLossWithGradientResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // and the velocity's gradient

// run: nft_loss or nft_loss_with_gradient of a device.
template <auto run>
auto nft_loss(const Tensor& velocity, const Tensor& old_velocity, const Tensor& sample, const Tensor& clean,
              const Tensor& sigma, const Tensor& reward_prob, const OptionalTensor& weights,
              const OptionalTensor& reference_velocity, double beta, bool adaptive, double adaptive_min,
              double adv_clip, double kl_coef) {
  return run({velocity, old_velocity, sample, clean, sigma, reward_prob, weights, reference_velocity, beta, adaptive,
              adaptive_min, adv_clip, kl_coef});
}

struct NFTLossGradientInputs {
  Tensor grad_loss, errors;
  NFTLossInputs loss;
};

template <Tensor (*run)(const NFTLossGradientInputs&)>
Tensor nft_loss_gradient(const Tensor& grad_loss, const Tensor& errors, const Tensor& velocity,
                         const Tensor& old_velocity, const Tensor& sample, const Tensor& clean, const Tensor& sigma,
                         const Tensor& reward_prob, const OptionalTensor& weights,
                         const OptionalTensor& reference_velocity, double beta, bool adaptive, double adaptive_min,
                         double adv_clip, double kl_coef) {
  return run({grad_loss, errors,
              {velocity, old_velocity, sample, clean, sigma, reward_prob, weights, reference_velocity, beta, adaptive,
               adaptive_min, adv_clip, kl_coef}});
}

template <typename T>
NFTOptions<T> nft_options(const NFTLossInputs& inputs) {
  const Tensor& velocity = inputs.velocity;
  const int64_t batch = velocity.size(0), channels = velocity.size(velocity.dim() == 3 ? 2 : 1);
  return {
      .batch = batch,
      .channels = channels,
      .locations = batch * channels == 0 ? 0 : velocity.numel() / (batch * channels),
      .kl = inputs.reference_velocity.has_value(),
      .adaptive = inputs.adaptive,
      .beta = T(inputs.beta),
      .adaptive_min = T(inputs.adaptive_min),
      .loss_scale = inputs.adv_clip / inputs.beta,
      .adv_clip = inputs.adv_clip,
      .kl_coef = inputs.kl_coef,
  };
}

template <typename T>
LossOptions<T> loss_options(const PolicyLossInputs& inputs) {
  const Tensor& velocity = inputs.velocity;
  const int64_t batch = velocity.size(0), channels = velocity.size(velocity.dim() == 3 ? 2 : 1);
  return {
      .batch = batch,
      .channels = channels,
      .locations = batch * channels == 0 ? 0 : velocity.numel() / (batch * channels),
      .form = inputs.guard ? Form::guard : inputs.old_mean ? Form::delta : Form::log_prob,
      .ratio = inputs.ratio == "token"      ? Ratio::token
               : inputs.ratio == "location" ? Ratio::location
                                            : Ratio::sample,
      .kl = inputs.reference_velocity.has_value(),
      .clip_low = T(inputs.clip_low),
      .clip_high = T(inputs.clip_high),
      .adv_clip = T(inputs.adv_clip),
      .kl_coef = T(inputs.kl_coef),
  };
}

// The tensor's type, one of those that `typed` knows.
inline ScalarType floating_type(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "star_kernels: expected a floating-point tensor");
  return type;
}

// Whether the arithmetic is in double: as soon as one of the tensors is.
template <typename... Tensors>
bool any_double(const Tensors&... tensors) {
  return ((tensors.scalar_type() == ScalarType::Double) || ...);
}

// V: type of the velocities, X: of the latents, T: of the arithmetic.
template <typename V, typename X, typename T>
struct Types {};

// Calls use(Types<V, X, T>()) with the types that the losses have kernels for, to which their tensors are converted.
// others: velocities beside the first. Latents: first and second.
template <typename F>
auto with_types(const Tensor& velocity, std::initializer_list<const Tensor*> others, const Tensor& first,
                const Tensor& second, F use) {
  const ScalarType type = velocity.scalar_type();
  if (any_double(velocity, first, second)) return use(Types<double, double, double>());
  // Another velocity in another type keeps its bits: all are read in the arithmetic's.
  for (const Tensor* other : others)
    if (other && other->scalar_type() != type) return use(Types<float, float, float>());
  const bool same = first.scalar_type() == type && second.scalar_type() == type;
  if (type == ScalarType::BFloat16)
    return same ? use(Types<BFloat16, BFloat16, float>()) : use(Types<BFloat16, float, float>());
  if (type == ScalarType::Half) return same ? use(Types<Half, Half, float>()) : use(Types<Half, float, float>());
  return use(Types<float, float, float>());
}

inline const Tensor* address(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

template <typename F>
auto with_types(const PolicyLossInputs& inputs, F use) {
  return with_types(inputs.velocity, {address(inputs.reference_velocity)}, inputs.sample, inputs.prev_sample, use);
}

template <typename F>
auto with_types(const NFTLossInputs& inputs, F use) {
  return with_types(inputs.velocity, {&inputs.old_velocity, address(inputs.reference_velocity)}, inputs.sample,
                    inputs.clean, use);
}

}  // namespace star
