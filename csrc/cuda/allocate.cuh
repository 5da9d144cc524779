// allocate on the GPU: one launch, one block per sample. The maps of a sample are a few thousand tokens, which its block
// reads twice (the second time from cache); everything else stays in shared memory, where it fits, or in a workspace.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

constexpr int ALLOCATE_THREADS = 1024;
constexpr int ALLOCATE_WARPS = ALLOCATE_THREADS / WARP;
constexpr int EACH = 4;  // tokens of a thread at once: their accesses wait for memory together
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

// Values of T that a sample needs: two fields, the taps of the longer axis, the norms of both, the means of the maps.
STAR_HD int64_t workspace_of(int64_t concepts, int64_t tokens, int64_t rows, int64_t columns) {
  return 2 * tokens + (rows > columns ? rows : columns) + rows + columns + concepts;
}

// A share of a map's sum by one warp, for every lane; NaN if the map is not usable there.
template <typename Q, typename T>
__device__ double map_sum(const Q* map, int begin, int end) {
  double sum = 0;
  int unusable = 0;
#pragma unroll 8
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
    if (warp < maps && first + warp < args.concepts) {
      const int lane = threadIdx.x % WARP;
      const T mean = T(warp_sum(lane < shares ? sums[warp * shares + lane] : 0.0) / double(tokens));
      if (lane == 0) means[first + warp] = std::isfinite(mean) ? mean : T(NAN);
    }
    __syncthreads();
  }
}

// What the taps of a token's neighbors along an axis of `size` places are divided by. taps: for distances up to radius.
template <typename T>
__device__ T smoothing_norm(const T* taps, int place, int size, int radius) {
  double sum = 0;
  for (int j = place > radius ? place - radius : 0; j <= place + radius && j < size; j++)
    sum += double(taps[j > place ? j - place : place - j]);
  return T(1) / T(sum);
}

// Weighted mean of the neighbors in a token's row, or in its column.
template <bool in_row, typename T>
__device__ void smooth_axis(const T* from, T* to, int tokens, int rows, int columns, int radius, const T* taps,
                            const T* norms) {
  const int size = in_row ? columns : rows, step = in_row ? 1 : columns;
  for (int first = threadIdx.x; first < tokens; first += EACH * ALLOCATE_THREADS) {
    T sum[EACH] = {};
    int place[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const unsigned i = first + k * ALLOCATE_THREADS;
      place[k] = i < tokens ? in_row ? i % unsigned(columns) : i / unsigned(columns) % unsigned(rows) : 0;
    }
    for (int d = -radius; d <= radius; d++) {
      const T tap = taps[d < 0 ? -d : d];
#pragma unroll
      for (int k = 0; k < EACH; k++) {
        const int i = first + k * ALLOCATE_THREADS;
        if (i < tokens && unsigned(place[k] + d) < unsigned(size)) sum[k] += tap * from[i + d * step];
      }
    }
#pragma unroll
    for (int k = 0; k < EACH; k++)
      if (const int i = first + k * ALLOCATE_THREADS; i < tokens) to[i] = sum[k] * norms[place[k]];
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
  T* field = pooled ? shared.pool : args.workspace + index * workspace_of(args.concepts, tokens, args.rows, args.columns);
  T *other = field + tokens, *taps = other + tokens, *norms = taps + longer;
  T *column_norms = norms + args.rows, *means = column_norms + args.columns;
  const int row_radius = int(smoothing_radius(args.smooth, args.rows));
  const int column_radius = int(smoothing_radius(args.smooth, args.columns));
  const int width = args.columns * args.patch, height = tokens / args.columns * args.patch;
  T* weights = args.weights + index * height * width;

  const bool smoothed = args.smooth > 0 && args.concepts > 0;
  if (smoothed) {  // distances on the longer axis serve both; a sigma that T holds, and no weight changes
    const T sigma = T(clamped(args.smooth, 0x1p-60, 0x1p60));
    for (int d = threadIdx.x; d <= int(smoothing_radius(args.smooth, longer)); d += ALLOCATE_THREADS)
      taps[d] = smoothing_tap<T>(d, sigma);
  }
  map_means(args, index, means, shared.sums);
  if (smoothed) {
    for (int i = threadIdx.x; i < args.rows; i += ALLOCATE_THREADS)
      norms[i] = smoothing_norm(taps, i, args.rows, row_radius);
    for (int i = ALLOCATE_THREADS - 1 - int(threadIdx.x); i < args.columns; i += ALLOCATE_THREADS)
      column_norms[i] = smoothing_norm(taps, i, args.columns, column_radius);
  }
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
#pragma unroll (sizeof(T) == 4 ? EACH : 1)  // more would spill
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
  if (smoothed) {
    __syncthreads();
    smooth_axis<false>(field, other, tokens, args.rows, args.columns, row_radius, taps, norms);
    smooth_axis<true>(other, field, tokens, args.rows, args.columns, column_radius, taps, column_norms);
  }
  // From here on a thread has the same tokens in every pass.
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
  for (int i = threadIdx.x; i < tokens; i += ALLOCATE_THREADS) {
    const T weight = field[i] / total;
    T* corner = weights + i / args.columns * args.patch * width + i % args.columns * args.patch;
    if (args.patch == 2) {
      for (int row = 0; row < 2; row++) store(corner + row * width, Vector<T, 2>{weight, weight});
    } else {
      for (int row = 0; row < args.patch; row++)
        for (int column = 0; column < args.patch; column++) corner[row * width + column] = weight;
    }
  }
}

}  // namespace star::cuda
