// allocate on the GPU: one launch, one block per sample. The maps of a sample are a few thousand tokens, which its block
// reads twice (the second time from cache) and otherwise keeps in a workspace of two fields that never leaves the cache.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

// T: type of the arithmetic. The tokens of a map lie side by side.
template <typename T>
struct AllocateArgs {
  int64_t concepts;
  int rows, columns, patch;
  Floats<const void> maps;
  int64_t sample_stride, concept_stride;
  bool largest;  // combine: the largest of the concepts instead of their mean
  double smooth;
  T sharpen, cap, mix;
  T* workspace;  // (B, workspace_of(...))
  T* weights;    // (B, rows * patch, columns * patch)
};

// Values of T that a sample needs: two fields, the taps and norms of the longer axis, the means of the maps.
STAR_HD int64_t workspace_of(int64_t concepts, int64_t rows, int64_t columns) {
  return 2 * rows * columns + 2 * (rows > columns ? rows : columns) + concepts;
}

// A map's mean by one warp, for every lane; NaN if the map is not usable.
template <typename T>
__device__ T map_mean(const AllocateArgs<T>& args, int64_t start) {
  const int tokens = args.rows * args.columns;
  double sum = 0;
  int unusable = 0;
  typed(args.maps, start, [&](const auto* map) {
#pragma unroll 4
    for (int i = threadIdx.x % WARP; i < tokens; i += WARP) {
      const T mass = T(map[i]);
      unusable |= !usable_mass(mass);
      sum += double(mass);
    }
  });
  const T mean = T(warp_sum(sum) / double(tokens));
  return warp_sum(unusable) || !std::isfinite(mean) ? T(NAN) : mean;
}

// Weighted mean of the neighbors along an axis of `size` places that lie `step` apart.
template <typename T>
__device__ void smooth_axis(const T* from, T* to, int tokens, int size, int step, double sigma, T* taps, T* norms) {
  const int radius = int(smoothing_radius(sigma, size));
  __syncthreads();
  for (int d = threadIdx.x; d <= radius; d += THREADS) taps[d] = T(smoothing_tap<double>(d, sigma));
  for (int i = threadIdx.x; i < size; i += THREADS) {
    double sum = 0;
    for (int j = i > radius ? i - radius : 0; j <= i + radius && j < size; j++)
      sum += smoothing_tap<double>(i - j, sigma);
    norms[i] = T(1 / sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens; i += THREADS) {
    const int place = i / step % size;
    T sum = 0;
    for (int d = place > radius ? -radius : -place; d <= radius && place + d < size; d++)
      sum += taps[d < 0 ? -d : d] * from[i + d * step];
    to[i] = sum * norms[place];
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 2) allocate_kernel(const __grid_constant__ AllocateArgs<T> args) {
  struct Shared {
    double sums[WARPS];
    T most[WARPS];
  };
  STAR_SHARED(Shared, shared);
  const int64_t index = blockIdx.x;
  const int tokens = args.rows * args.columns, longer = args.rows > args.columns ? args.rows : args.columns;
  T* field = args.workspace + index * workspace_of(args.concepts, args.rows, args.columns);
  T *other = field + tokens, *taps = other + tokens, *norms = taps + longer, *means = norms + longer;
  const int width = args.columns * args.patch, places = args.rows * args.patch * width;
  T* weights = args.weights + index * places;

  for (int64_t g = threadIdx.x / WARP; g < args.concepts; g += WARPS) {
    const T mean = map_mean(args, index * args.sample_stride + g * args.concept_stride);
    if (threadIdx.x % WARP == 0) means[g] = mean;
  }
  __syncthreads();
  int64_t present = 0;
  bool usable = true;
  for (int64_t g = 0; g < args.concepts; g++) {
    usable = usable && means[g] == means[g];
    present += means[g] > 0;
  }
  if (!usable || present == 0) {
    for (int j = threadIdx.x; j < places; j += THREADS) weights[j] = T(1);
    return;
  }

  for (int i = threadIdx.x; i < tokens; i += THREADS) {
    T sum = 0;
    for (int64_t g = 0; g < args.concepts; g++) {
      typed(args.maps, index * args.sample_stride + g * args.concept_stride + i, [&](const auto* mass) {
        const T relative = relative_mass(T(*mass), means[g]);
        sum = !args.largest ? sum + relative : relative > sum ? relative : sum;
      });
    }
    field[i] = args.largest ? sum : sum / T(present);
  }
  if (args.smooth > 0) {
    smooth_axis(field, other, tokens, args.rows, args.columns, args.smooth, taps, norms);
    smooth_axis(other, field, tokens, args.columns, 1, args.smooth, taps, norms);
  }
  // From here on a thread has the same tokens in every pass, until the weights are written.
  if (args.sharpen != 1) {
    T most = 0;
    for (int i = threadIdx.x; i < tokens; i += THREADS) most = field[i] > most ? field[i] : most;
    most = block_max(most, shared.most);
    for (int i = threadIdx.x; i < tokens; i += THREADS) field[i] = sharpened(field[i], most, args.sharpen);
  }
  double sum = 0;
  for (int i = threadIdx.x; i < tokens; i += THREADS) sum += double(field[i]);
  const T mean = T(block_sum(sum, shared.sums) / double(tokens));
  sum = 0;
  for (int i = threadIdx.x; i < tokens; i += THREADS) {
    field[i] = mixed(field[i], mean, args.cap, args.mix);
    sum += double(field[i]);
  }
  const T total = T(block_sum(sum, shared.sums) / double(tokens));  // its barriers make the whole field visible
  for (int j = threadIdx.x; j < places; j += THREADS)
    weights[j] = field[j / width / args.patch * args.columns + j % width / args.patch] / total;
}

}  // namespace star::cuda
