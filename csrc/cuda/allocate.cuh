// allocate on the GPU: one launch, one block per sample. The maps of a sample are a few thousand tokens, which its block
// reads twice (the second time from cache); everything else stays in shared memory, where it fits, or in a workspace.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

constexpr int ALLOCATE_THREADS = 1024;
constexpr int ALLOCATE_WARPS = ALLOCATE_THREADS / WARP;
constexpr int POOL_BYTES = 40960;  // shared memory for fields: two of 4096 tokens in float32, and what belongs to them

// T: type of the arithmetic. The tokens of a map lie side by side.
template <typename T>
struct AllocateArgs {
  int concepts, tokens, rows, columns, patch;  // rows of a frame, tokens of all frames
  Floats<const void> maps;
  int64_t sample_stride, concept_stride;
  bool largest;  // combine: the largest of the concepts instead of their mean
  double smooth;
  T sharpen, cap, mix;
  T* workspace;  // (B, workspace_of(...)), for samples that do not fit the pool
  T* weights;    // (B, tokens / columns * patch, columns * patch)
};

// Values of T that a sample needs: two fields, the taps and norms of the longer axis, the means of the maps.
STAR_HD int64_t workspace_of(int64_t concepts, int64_t tokens, int64_t longer) {
  return 2 * tokens + 2 * longer + concepts;
}

// A share of a map's sum by one warp, for every lane; NaN if the map is not usable there.
template <typename Q, typename T>
__device__ double map_sum(const Q* map, int begin, int end) {
  double sum = 0;
  int unusable = 0;
#pragma unroll 4
  for (int i = begin + threadIdx.x % WARP; i < end; i += WARP) {
    const T mass = T(map[i]);
    unusable |= !usable_mass(mass);
    sum += double(mass);
  }
  sum = warp_sum(sum);
  return warp_sum(unusable) ? NAN : sum;
}

// The maps' means, NaN where one is not usable. Several warps share a map where there are more warps than maps.
template <typename T>
__device__ void map_means(const AllocateArgs<T>& args, int64_t index, T* means, double* sums) {
  const int tokens = args.tokens, warp = threadIdx.x / WARP;
  const int shares = args.concepts < ALLOCATE_WARPS ? ALLOCATE_WARPS / (args.concepts > 0 ? args.concepts : 1) : 1;
  const int share = (tokens + shares - 1) / shares, maps = ALLOCATE_WARPS / shares;
  for (int first = 0; first < args.concepts; first += maps) {
    const int map = first + warp / shares, begin = warp % shares * share;
    double sum = 0;
    if (warp < maps * shares && map < args.concepts)
      typed(args.maps, index * args.sample_stride + map * args.concept_stride, [&]<typename Q>(const Q* values) {
        sum = map_sum<Q, T>(values, begin, begin + share < tokens ? begin + share : tokens);
      });
    if (threadIdx.x % WARP == 0) sums[warp] = sum;
    __syncthreads();
    const int own = first + threadIdx.x;
    if (threadIdx.x < maps && own < args.concepts) {
      double total = 0;
      for (int k = 0; k < shares; k++) total += sums[threadIdx.x * shares + k];
      const T mean = T(total / double(tokens));
      means[own] = std::isfinite(mean) ? mean : T(NAN);
    }
    __syncthreads();
  }
}

// Weighted mean of the neighbors along an axis of `size` places that lie `step` apart. taps: for distances up to radius.
template <typename T>
__device__ void smooth_axis(const T* from, T* to, int tokens, int size, int step, double sigma, const T* taps, T* norms) {
  const int radius = int(smoothing_radius(sigma, size));
  for (int i = threadIdx.x; i < size; i += ALLOCATE_THREADS) {
    double sum = 0;
    for (int j = i > radius ? i - radius : 0; j <= i + radius && j < size; j++) sum += double(taps[j > i ? j - i : i - j]);
    norms[i] = T(1 / sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) {
    const int place = i / step % size;
    T sum = 0;
    for (int d = place > radius ? -radius : -place; d <= radius && place + d < size; d++)
      sum += taps[d < 0 ? -d : d] * from[i + d * step];
    to[i] = sum * norms[place];
  }
  __syncthreads();
}

// pooled: whether a sample fits the pool in shared memory.
template <typename T, bool pooled>
__global__ void __launch_bounds__(ALLOCATE_THREADS, 1) allocate_kernel(const __grid_constant__ AllocateArgs<T> args) {
  struct Shared {
    double sums[ALLOCATE_WARPS];
    T most[ALLOCATE_WARPS];
    T pool[pooled ? POOL_BYTES / sizeof(T) : 1];
  };
  STAR_SHARED(Shared, shared);
  const int64_t index = blockIdx.x;
  const int tokens = args.tokens, longer = args.rows > args.columns ? args.rows : args.columns;
  T* field = pooled ? shared.pool : args.workspace + index * workspace_of(args.concepts, tokens, longer);
  T *other = field + tokens, *taps = other + tokens, *norms = taps + longer, *means = norms + longer;
  const int width = args.columns * args.patch, height = tokens / args.columns * args.patch;
  T* weights = args.weights + index * height * width;

  if (args.smooth > 0)  // distances on the longer axis serve both
    for (int d = threadIdx.x; d <= int(smoothing_radius(args.smooth, longer)); d += ALLOCATE_THREADS)
      taps[d] = T(smoothing_tap<double>(d, args.smooth));
  map_means(args, index, means, shared.sums);
  int present = 0;
  bool usable = true;
  for (int g = 0; g < args.concepts; g++) {
    usable = usable && means[g] == means[g];
    present += means[g] > 0;
  }
  if (!usable || present == 0) {
    for (int j = threadIdx.x; j < height * width; j += ALLOCATE_THREADS) weights[j] = T(1);
    return;
  }

  typed(args.maps, index * args.sample_stride, [&](const auto* maps) {
    for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) {
      T sum = 0;
#pragma unroll 2
      for (int g = 0; g < args.concepts; g++) {
        const T relative = relative_mass(T(maps[g * args.concept_stride + i]), means[g]);
        sum = !args.largest ? sum + relative : relative > sum ? relative : sum;
      }
      field[i] = args.largest ? sum : sum / T(present);
    }
  });
  if (args.smooth > 0) {
    __syncthreads();
    smooth_axis(field, other, tokens, args.rows, args.columns, args.smooth, taps, norms);
    smooth_axis(other, field, tokens, args.columns, 1, args.smooth, taps, norms);
  }
  // From here on a thread has the same tokens in every pass, until the weights are written.
  if (args.sharpen != 1) {
    T most = 0;
    for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) most = field[i] > most ? field[i] : most;
    most = block_max<ALLOCATE_WARPS>(most, shared.most);
    for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) field[i] = sharpened(field[i], most, args.sharpen);
  }
  double sum = 0;
  for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) sum += double(field[i]);
  const T mean = T(block_sum<ALLOCATE_WARPS>(sum, shared.sums) / double(tokens));
  sum = 0;
  for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) {
    field[i] = mixed(field[i], mean, args.cap, args.mix);
    sum += double(field[i]);
  }
  const T total = T(block_sum<ALLOCATE_WARPS>(sum, shared.sums) / double(tokens));
  for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) field[i] /= total;
  __syncthreads();
  for (int y = threadIdx.x / WARP; y < height; y += ALLOCATE_WARPS) {
    const T* line = field + y / args.patch * args.columns;
    for (int x = threadIdx.x % WARP; x < width; x += WARP) weights[y * width + x] = line[x / args.patch];
  }
}

}  // namespace star::cuda
