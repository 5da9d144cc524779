// nft_loss of a tile of a sample: a pass over the inputs that sums up, for the loss, and one that writes the gradient.
#include "cpu/nft_loss.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>

#include "cpu/latents.h"

namespace star::STAR_ISA {

namespace {

template <typename T>
struct TileSums {
  Sums<T, NFT_SLOTS> sums;
  Vector<T> largest{};  // squared deviation
};

// Both branches' errors of a vector, with what it takes to weight them.
template <bool packed, typename V, typename X, typename T>
struct Branches {
  Vector<T> velocity, deviation, positive, negative, weight, probability;

  STAR_ALWAYS Branches(const NFTLossArgs<V, X, T>& args, int64_t index, const Tile& tile, int64_t at, int64_t location,
                       int64_t count) {
    velocity = load_some<T>(args.velocity + at, count);
    const Vector<T> sigma = broadcast(args.sigma[index]), sigma_beta = broadcast(args.sigma[index] * args.beta);
    nft_errors(sigma, sigma_beta, load_some<T>(args.sample + at, count), load_some<T>(args.clean + at, count), velocity,
               load_some<T>(args.old_velocity + at, count), deviation, positive, negative);
    weight = args.weights ? load_location<packed>(args.weights + tile.locations, location, count) : broadcast(T(1));
    probability = args.reward_prob_per_location
                      ? load_location<packed>(args.reward_prob + tile.locations, location, count)
                      : broadcast(args.reward_prob[index]);
  }
};

// Adds some rows of a tile to its sums.
template <bool packed, typename V, typename X, typename T>
TileSums<T> add_rows(const NFTLossArgs<V, X, T>& given, int64_t index, const Tile& tile, int64_t begin, int64_t end,
                     TileSums<T> out) {
  const NFTLossArgs<V, X, T> args = given;  // a copy, which no store can change: its pointers stay in registers
  each_vector<packed, T>(args, tile, begin, end, [&](int64_t at, int64_t location, int64_t count) STAR_ALWAYS {
    const Branches<packed, V, X, T> one(args, index, tile, at, location, count);
    out.sums.add_product(NFT_POSITIVE, one.weight * one.probability * one.positive, one.positive);
    out.sums.add_product(NFT_NEGATIVE, one.weight * (1 - one.probability) * one.negative, one.negative);
    out.sums.add(NFT_POSITIVE_ERROR, magnitude<T>(one.positive));
    out.sums.add(NFT_NEGATIVE_ERROR, magnitude<T>(one.negative));
    const Vector<T> square = one.deviation * one.deviation;
    out.sums.add(NFT_DEVIATION, square);
    out.largest = maximum<T>(out.largest, square);
    if (args.reference_velocity) {
      const Vector<T> gap = one.velocity - load_some<T>(args.reference_velocity + at, count);
      out.sums.add_product(NFT_KL, gap, gap);
    }
    out.sums.next();
  });
  return out;
}

// Locations of a tile at which an error is not finite.
template <bool packed, typename V, typename X, typename T>
double count_nonfinite(const NFTLossArgs<V, X, T>& args, int64_t index, const Tile& tile) {
  bool odd[LOSS_TILE] = {};
  each_vector<packed, T>(args, tile, 0, tile.rows(args), [&](int64_t at, int64_t location, int64_t count) STAR_ALWAYS {
    const Branches<packed, V, X, T> one(args, index, tile, at, location, count);
    for (int64_t i = 0; i < count; i++)
      odd[packed ? location : location + i] |= !std::isfinite(one.positive[i]) || !std::isfinite(one.negative[i]);
  });
  return double(std::count(odd, odd + tile.count, true));
}

template <bool packed, typename V, typename X, typename T>
void sums_of(const NFTLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last, NFTSums* sums) {
  TileSums<T> all[LOSS_TILES];
  const int64_t turns = packed ? 1 : args.channels;
  for (int64_t turn = 0; turn < turns; turn++)
    for (int64_t number = 0, at = first; at < last; number++, at += LOSS_TILE) {
      const Tile tile(args, index, at, std::min(at + LOSS_TILE, last));
      const int64_t begin = packed ? 0 : turn, end = packed ? tile.count : turn + 1;
      all[number] = add_rows<packed>(args, index, tile, begin, end, all[number]);
    }
  for (int64_t number = 0, at = first; at < last; number++, at += LOSS_TILE) {
    NFTSums& out = sums[number];
    for (int k = 0; k < NFT_SLOTS; k++) out.slot[k] = all[number].sums.value(k);
    out.largest = 0, out.nonfinite = 0;
    for (int lane = 0; lane < LANES<T>; lane++) out.largest = std::max(out.largest, double(all[number].largest[lane]));
    // The largest hides a NaN, the sum does not.
    if (std::isnan(out.slot[NFT_DEVIATION])) out.largest = NAN;
    if (!std::isfinite(out.slot[NFT_POSITIVE_ERROR] + out.slot[NFT_NEGATIVE_ERROR]))
      out.nonfinite = count_nonfinite<packed>(args, index, Tile(args, index, at, std::min(at + LOSS_TILE, last)));
  }
}

template <bool packed, typename V, typename X, typename T>
void write_gradient(const NFTLossArgs<V, X, T>& given, int64_t index, const Tile& tile) {
  const NFTLossArgs<V, X, T> args = given;  // as above
  const NFTForces<T> forces = nft_forces<T>(args, args.sigma[index], args.errors + 2 * index, args.grad_loss);
  const Vector<T> up = broadcast(forces.up), down = broadcast(forces.down);
  const Vector<T> share = broadcast(forces.share), pull = broadcast(forces.pull);
  each_vector<packed, T>(args, tile, 0, tile.rows(args), [&](int64_t at, int64_t location, int64_t count) STAR_ALWAYS {
    const Branches<packed, V, X, T> one(args, index, tile, at, location, count);
    Vector<T> value = share * (one.weight * (1 - one.probability) * down * one.negative -
                               one.weight * one.probability * up * one.positive);
    if (args.reference_velocity)
      value += pull * (one.velocity - load_some<T>(args.reference_velocity + at, count));
    store_some<T>(args.gradient + at, value, count);
  });
}

}  // namespace

template <typename V, typename X, typename T>
void nft_loss_sums(const NFTLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last, NFTSums* sums) {
  args.packed ? sums_of<true>(args, index, first, last, sums) : sums_of<false>(args, index, first, last, sums);
}

template <typename V, typename X, typename T>
void nft_loss_gradient(const NFTLossArgs<V, X, T>& args, int64_t index, int64_t first, int64_t last) {
  const Tile tile(args, index, first, last);
  args.packed ? write_gradient<true>(args, index, tile) : write_gradient<false>(args, index, tile);
}

#define STAR_INSTANTIATE(V, X, T)                                                                            \
  template void nft_loss_sums<V, X, T>(const NFTLossArgs<V, X, T>&, int64_t, int64_t, int64_t, NFTSums*); \
  template void nft_loss_gradient<V, X, T>(const NFTLossArgs<V, X, T>&, int64_t, int64_t, int64_t);
STAR_INSTANTIATE(double, double, double)
STAR_INSTANTIATE(float, float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, torch::headeronly::BFloat16, float)
STAR_INSTANTIATE(torch::headeronly::Half, float, float)
STAR_INSTANTIATE(torch::headeronly::Half, torch::headeronly::Half, float)

}  // namespace star::STAR_ISA
