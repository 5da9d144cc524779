// nft_loss on the GPU, without atomics, every sum in an order that the shapes alone decide.
//
// As policy_loss: nft_loss_sums_kernel leaves the sums over every tile of a sample, one block of nft_loss_finish_kernel adds them
// up, and nft_loss_gradient_kernel reads the inputs again, with each sample's mean errors. Velocities are read in their own
// type, latents in that of the arithmetic: every combination of both would make a release larger for little.
#pragma once
#include "cuda/latents.cuh"

namespace star::cuda {

constexpr int NFT_VECTOR = 4;  // elements of an access: 16 bytes in float32
template <typename T>
constexpr int NFT_RESIDENT = sizeof(T) == 4 ? 6 : 4;  // blocks of a processor at once, as many as have room without spills

// What does not depend on the latents. T: of the arithmetic.
template <typename T>
struct NFTSampleArgs : NFTOptions<T>, Tiling {
  NFTSums* sums;  // (B, tiles)
  T* errors;      // (B, 2): what the loss writes and the gradient reads
  T* loss;
  float* statistics;
};

// V: type of the velocities. Tensors are contiguous; the reference velocity, the weights and the map may be null.
template <typename V, typename T>
struct NFTLossArgs : NFTSampleArgs<T> {
  const V *velocity, *old_velocity, *reference_velocity;
  const T *sample, *clean;
  PerSample sigma, reward_prob;
  const T *weights, *reward_prob_map;  // (B, locations)
  const T* grad_loss;
  V* gradient;

  __device__ __forceinline__ T weight(int64_t location) const { return weights ? weights[location] : T(1); }
  __device__ __forceinline__ T probability(int64_t index, int64_t location) const {
    return reward_prob_map ? reward_prob_map[location] : reward_prob.template at<T>(index);
  }
};

// N elements of the latents.
template <int N, typename V, typename T>
struct NFTElements {
  Vector<V, N> velocity, old_velocity;
  Vector<T, N> sample, clean;

  static __device__ __forceinline__ NFTElements at(const NFTLossArgs<V, T>& args, int64_t offset) {
    return {load<V, N>(args.velocity + offset), load<V, N>(args.old_velocity + offset),
            load<T, N>(args.sample + offset), load<T, N>(args.clean + offset)};
  }
  // Errors of both branches of the k-th element, and how far it has moved.
  __device__ __forceinline__ void errors(int k, T sigma, T sigma_beta, T& deviation, T& positive, T& negative) const {
    nft_errors(sigma, sigma_beta, sample.element[k], clean.element[k], T(velocity.element[k]), T(old_velocity.element[k]),
               deviation, positive, negative);
  }
};

template <typename V, typename T, int N>
__global__ void __launch_bounds__(LOSS_THREADS, NFT_RESIDENT<T>) nft_loss_sums_kernel(const __grid_constant__ NFTLossArgs<V, T> args) {
  struct Shared {
    T weight[TILE], probability[TILE];
    unsigned char odd[LOSS_THREADS * N];  // of each group of threads and location: whether an error is not finite
    double sums[LOSS_WARPS][NFT_SLOTS + 2];
  };
  STAR_SHARED(Shared, shared);
  const unsigned tiles = unsigned(args.tiles);
  const int64_t index = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * args.tile;
  const int length = int(args.locations - first < args.tile ? args.locations - first : args.tile);
  let_next_start();

  double slot[NFT_SLOTS] = {};  // squares of float32 may add up to more than it holds
  T largest = 0, sigma = 0;
  bool odd[N] = {};
  for_each_vector<N>(
      args, index, first, length, [&](int64_t offset) { return NFTElements<N, V, T>::at(args, offset); },
      [&] {
        sigma = args.sigma.template at<T>(index);
        if (threadIdx.x < length) {
          const int64_t at = index * args.locations + first + threadIdx.x;
          shared.weight[threadIdx.x] = args.weight(at), shared.probability[threadIdx.x] = args.probability(index, at);
        }
        __syncthreads();
      },
      [&](const NFTElements<N, V, T>& one, int64_t offset, int location) {
#pragma unroll
        for (int k = 0; k < N; k++) {
          const int here = location + (args.packed ? 0 : k);
          const T weight = shared.weight[here], probability = shared.probability[here];
          T deviation, positive, negative;
          one.errors(k, sigma, sigma * args.beta, deviation, positive, negative);
          const T square = deviation * deviation;
          slot[NFT_POSITIVE] += double(weight * probability * positive * positive);
          slot[NFT_NEGATIVE] += double(weight * (1 - probability) * negative * negative);
          slot[NFT_POSITIVE_ERROR] += double(std::abs(positive)), slot[NFT_NEGATIVE_ERROR] += double(std::abs(negative));
          slot[NFT_DEVIATION] += double(square);
          largest = larger(largest, square);
          odd[k] |= !std::isfinite(positive) || !std::isfinite(negative);
        }
        if (args.kl) {
          const Vector<V, N> reference = load<V, N>(args.reference_velocity + offset);
#pragma unroll
          for (int k = 0; k < N; k++) {
            const T gap = T(one.velocity.element[k]) - T(reference.element[k]);
            slot[NFT_KL] += double(gap * gap);
          }
        }
      },
      [&](int location) {
        if (!args.packed) {
          const int group = threadIdx.x / (args.tile / N);
#pragma unroll
          for (int k = 0; k < N; k++) shared.odd[group * args.tile + location + k] = odd[k];
          return;
        }
        int any = 0;
#pragma unroll
        for (int k = 0; k < N; k++) any |= odd[k], odd[k] = false;
        any = warp_sum(any, args.lanes);
        if (threadIdx.x % args.lanes == 0 && location < length) shared.odd[location] = any > 0;
      });
  __syncthreads();

  T nonfinite = 0;
  if (threadIdx.x < length) {
    const int groups = args.packed ? 1 : LOSS_THREADS * N / args.tile;
    for (int group = 0; group < groups; group++)
      if (shared.odd[group * args.tile + threadIdx.x]) nonfinite = 1;
  }
  const int warp = threadIdx.x / WARP;
#pragma unroll
  for (int k = 0; k < NFT_SLOTS; k++) slot[k] = warp_sum(slot[k]);
  largest = warp_max(largest), nonfinite = warp_sum(nonfinite);
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (int k = 0; k < NFT_SLOTS; k++) shared.sums[warp][k] = slot[k];
    shared.sums[warp][NFT_SLOTS] = largest, shared.sums[warp][NFT_SLOTS + 1] = nonfinite;
  }
  __syncthreads();
  NFTSums& out = args.sums[blockIdx.x];
  if (threadIdx.x == NFT_SLOTS) {
    double most = shared.sums[0][NFT_SLOTS];
    for (int w = 1; w < LOSS_WARPS; w++) most = larger(most, shared.sums[w][NFT_SLOTS]);
    out.largest = most;
  } else if (threadIdx.x < NFT_SLOTS + 2) {
    double sum = 0;
    for (int w = 0; w < LOSS_WARPS; w++) sum += shared.sums[w][threadIdx.x];
    (threadIdx.x < NFT_SLOTS ? out.slot[threadIdx.x] : out.nonfinite) = sum;
  }
}

// One block: a warp adds up the tiles of a sample, a thread the samples.
template <typename T>
__global__ void __launch_bounds__(FINISH_WARPS* WARP, 1) nft_loss_finish_kernel(const __grid_constant__ NFTSampleArgs<T> args) {
  struct Shared {
    NFTSums sample[FINISH_WARPS];
  };
  STAR_SHARED(Shared, shared);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  NFTSums all{};
  await_previous();
  for (int64_t base = 0; base < args.batch; base += FINISH_WARPS) {
    const int64_t index = base + warp;
    if (index < args.batch) {
      NFTSums sums{};
#pragma unroll 1
      for (int64_t tile = lane; tile < args.tiles; tile += WARP) add(sums, args.sums[index * args.tiles + tile]);
#pragma unroll
      for (int k = 0; k < NFT_SLOTS; k++) sums.slot[k] = warp_sum(sums.slot[k]);
      sums.largest = warp_max(sums.largest), sums.nonfinite = warp_sum(sums.nonfinite);
      if (lane == 0) shared.sample[warp] = nft_sample<T>(args, sums, args.errors + 2 * index);
    }
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 0; w < FINISH_WARPS && base + w < args.batch; w++) add(all, shared.sample[w]);
    __syncthreads();
  }
  if (threadIdx.x == 0) nft_finish<T>(args, all, args.loss, args.statistics);
}

template <typename V, typename T, int N>
__global__ void __launch_bounds__(LOSS_THREADS, NFT_RESIDENT<T>) nft_loss_gradient_kernel(const __grid_constant__ NFTLossArgs<V, T> args) {
  struct Shared {
    T up[TILE], down[TILE];  // factors of each location's errors
  };
  STAR_SHARED(Shared, shared);
  const unsigned tiles = unsigned(args.tiles);
  const int64_t index = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * args.tile;
  const int length = int(args.locations - first < args.tile ? args.locations - first : args.tile);
  T sigma = 0, share = 0, pull = 0;
  for_each_vector<N>(
      args, index, first, length, [&](int64_t offset) { return NFTElements<N, V, T>::at(args, offset); },
      [&] {
        sigma = args.sigma.template at<T>(index);
        const NFTForces<T> forces = nft_forces<T>(args, sigma, args.errors + 2 * index, *args.grad_loss);
        share = forces.share, pull = forces.pull;
        if (threadIdx.x < length) {
          const int64_t at = index * args.locations + first + threadIdx.x;
          const T weight = args.weight(at), probability = args.probability(index, at);
          shared.up[threadIdx.x] = weight * probability * forces.up;
          shared.down[threadIdx.x] = weight * (1 - probability) * forces.down;
        }
        __syncthreads();
      },
      [&](const NFTElements<N, V, T>& one, int64_t offset, int location) {
        Vector<T, N> gradient;
#pragma unroll
        for (int k = 0; k < N; k++) {
          const int here = location + (args.packed ? 0 : k);
          T deviation, positive, negative;
          one.errors(k, sigma, sigma * args.beta, deviation, positive, negative);
          gradient.element[k] = share * (shared.down[here] * negative - shared.up[here] * positive);
        }
        if (args.kl) {
          const Vector<V, N> reference = load<V, N>(args.reference_velocity + offset);
#pragma unroll
          for (int k = 0; k < N; k++)
            gradient.element[k] += pull * (T(one.velocity.element[k]) - T(reference.element[k]));
        }
        Vector<V, N> out;
#pragma unroll
        for (int k = 0; k < N; k++) out.element[k] = V(gradient.element[k]);
        store(args.gradient + offset, out);
      },
      [](int) {});
}

}  // namespace star::cuda
