// star::nft_loss_native, its gradient, and both in one for CPU tensors: make the tensors contiguous and of few types, run
// the kernels tile by tile, add the tiles up in their order.
#include <stdexcept>
#include <vector>

#include "cpu/nft_loss.h"
#include "cpu/tensors.h"

namespace star {
namespace {

template <typename V, typename X, typename T>
NFTLossArgs<V, X, T> arguments(const NFTLossInputs& inputs, Pointers& pointers) {
  NFTLossArgs<V, X, T> args{nft_options<T>(inputs)};
  args.packed = inputs.velocity.dim() == 3;
  args.velocity = pointers.of<V>(inputs.velocity);
  args.old_velocity = pointers.of<V>(inputs.old_velocity);
  args.reference_velocity = pointers.of<V>(inputs.reference_velocity);
  args.sample = pointers.of<X>(inputs.sample);
  args.clean = pointers.of<X>(inputs.clean);
  args.sigma = pointers.of<T>(inputs.sigma);
  args.reward_prob = pointers.of<T>(inputs.reward_prob);
  args.weights = pointers.of<T>(inputs.weights);
  args.reward_prob_per_location = inputs.reward_prob.dim() > 1;
  return args;
}

// One that is not a number passes, and shows in the loss.
template <typename T>
void check_probability(const T* values, int64_t count, const char* words) {
  bool outside = false;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < count; i++) outside |= (values[i] < 0) | (values[i] > 1);
  if (outside) throw std::invalid_argument(words);
}

// Writes the gradient too if there is memory for it.
template <typename V, typename X, typename T>
NFTLossResult loss_as(NFTLossArgs<V, X, T>& args, const Tensor& like) {
  check_probability(args.sigma, args.batch, "sigma: has values outside [0, 1]");
  check_probability(args.reward_prob, args.batch * (args.reward_prob_per_location ? args.locations : 1),
                    "reward_prob: has values outside [0, 1]");
  Tensor loss = new_empty(like, {}, scalar_type<T>);
  Tensor statistics = new_empty(like, {NFT_STATISTICS}, ScalarType::Float);
  Tensor errors = new_empty(like, {args.batch, 2}, scalar_type<T>);
  args.errors = errors.mutable_data_ptr<T>();

  const auto sum_tiles = STAR_SELECT(nft_loss_sums<V, X, T>);
  const auto write_gradient = STAR_SELECT(nft_loss_gradient<V, X, T>);
  std::vector<NFTSums> sums(args.batch * tiles(args));
  std::vector<NFTSums> samples(args.batch);
  each_sample(
      args,
      [&](int64_t index, int64_t first, int64_t last) {
        sum_tiles(args, index, first, last, &sums[index * tiles(args) + first / LOSS_TILE]);
      },
      [&](int64_t index) {
        NFTSums sample{};
        for (int64_t tile = 0; tile < tiles(args); tile++) add(sample, sums[index * tiles(args) + tile]);
        samples[index] = nft_sample<T>(args, sample, args.errors + 2 * index);
      },
      [&](int64_t index, int64_t first, int64_t last) { write_gradient(args, index, first, last); });

  NFTSums all{};
  for (const NFTSums& sample : samples) add(all, sample);
  nft_finish<T>(args, all, loss.mutable_data_ptr<T>(), statistics.mutable_data_ptr<float>());
  return {loss, statistics, errors};
}

NFTLossResult loss(const NFTLossInputs& inputs) {
  return with_types(inputs, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    Pointers pointers;
    NFTLossArgs<V, X, T> args = arguments<V, X, T>(inputs, pointers);
    return loss_as(args, inputs.velocity);
  });
}

Tensor gradient(const NFTLossGradientInputs& inputs) {
  return with_types(inputs.loss, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    Pointers pointers;
    NFTLossArgs<V, X, T> args = arguments<V, X, T>(inputs.loss, pointers);
    const Tensor& velocity = inputs.loss.velocity;
    Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
    args.errors = const_cast<T*>(pointers.of<T>(inputs.errors));
    args.grad_loss = *pointers.of<T>(inputs.grad_loss);
    args.gradient = gradient.mutable_data_ptr<V>();
    const auto kernel = STAR_SELECT(nft_loss_gradient<V, X, T>);
    each_span(args, 0, args.batch,
              [&](int64_t index, int64_t first, int64_t last) { kernel(args, index, first, last); });
    return converted(gradient, velocity.scalar_type());
  });
}

NFTLossWithGradientResult loss_with_gradient(const NFTLossInputs& inputs) {
  return with_types(inputs, [&]<typename V, typename X, typename T>(Types<V, X, T>) {
    Pointers pointers;
    NFTLossArgs<V, X, T> args = arguments<V, X, T>(inputs, pointers);
    const Tensor& velocity = inputs.velocity;
    Tensor gradient = new_empty(velocity, velocity.sizes(), scalar_type<V>);
    args.grad_loss = 1;
    args.gradient = gradient.mutable_data_ptr<V>();
    const NFTLossResult result = loss_as(args, velocity);  // which fills the gradient: a copy must come after it
    return std::tuple_cat(result, std::tuple(converted(gradient, velocity.scalar_type())));
  });
}

}  // namespace

STAR_REGISTER(nft_loss, nft_loss<loss>)
STAR_REGISTER(nft_loss_gradient, nft_loss_gradient<gradient>)
STAR_REGISTER(nft_loss_with_gradient, nft_loss<loss_with_gradient>)

}  // namespace star
