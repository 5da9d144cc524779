// policy_loss on the GPU, without atomics, every sum in an order that the shapes alone decide.
//
// The loss takes two launches: policy_loss_sums_kernel reads the inputs and leaves the sums over every tile of a sample, and one
// block of policy_loss_finish_kernel adds the tiles up. The gradient takes one, policy_loss_gradient_kernel, which reads the inputs again,
// from the second-level cache where they fit, and each unit's log-ratio. Nothing else is kept between the two.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

constexpr int TILE = 128;  // locations and threads of a block: one each, once the channels are summed
constexpr int TILE_WARPS = TILE / WARP;
constexpr int FINISH_WARPS = 16;

// Blocks of a processor at once, for the compiler's choice of registers. With nine an H100 holds all blocks of a micro
// batch of nine images of 1024 px in float32; code for sm_120 would spill, longer vectors need more registers anyway.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int MOST_RESIDENT = 6;
#else
constexpr int MOST_RESIDENT = 9;
#endif
template <typename T, int N>
constexpr int RESIDENT = sizeof(T) == 4 && N <= 4 ? MOST_RESIDENT : 6;

// What does not depend on the types of the latents. T: of the arithmetic.
template <typename T>
struct SampleArgs : LossOptions<T> {
  int64_t tiles;  // of a sample
  PerSample a, b, s, precision, log_norm, kl_precision, advantages, step_weights, old_log_prob;
  const T *advantage_map, *old_log_prob_map, *weights;  // (B, locations), or null
  LocationSums* sums;                                   // (B, tiles)
  T* log_ratio;                                         // (B,), or (B, locations) for Ratio::location
  T* loss;
  float* statistics;

  __device__ __forceinline__ SampleTerms<T> terms(int64_t index) const {
    return sample_terms<T>(*this, a.template at<T>(index), b.template at<T>(index), s.template at<T>(index),
                           precision.template at<T>(index), log_norm.template at<T>(index),
                           kl_precision.template at<T>(index),
                           step_weights.data ? step_weights.template at<T>(index) : T(1));
  }
  // Of a location, `at` from the first sample's first, or of its sample.
  __device__ __forceinline__ T advantage(const SampleTerms<T>& terms, int64_t index, int64_t at) const {
    const T value = advantage_map ? advantage_map[at] : advantages.template at<T>(index);
    return used_advantage(value, this->adv_clip, terms.step);
  }
};

// V: type of the velocities, X: of the latents. Tensors are contiguous; optional ones may be null.
template <typename V, typename X, typename T>
struct PolicyLossArgs : SampleArgs<T> {
  bool packed;  // (B, L, C) instead of (B, C, H, W)
  int lanes;    // of a warp, that share one location of packed latents; a power of two
  const V *velocity, *reference_velocity;
  const X *sample, *prev_sample;
  const T *old_mean, *grad_loss;
  V* gradient;
};

// Calls each(offset, location) for this thread's vectors of a tile: N locations of one channel, or N channels of one
// location of packed latents. done(location) follows the last vector of the thread's locations; every thread calls it.
template <int N, typename V, typename X, typename T, typename Each, typename Done>
__device__ __forceinline__ void for_each_vector(const PolicyLossArgs<V, X, T>& args, int64_t index, int64_t first,
                                                int length, Each each, Done done) {
  const int64_t start = index * args.channels * args.locations;
  if (!args.packed) {
    // A warp reads neighboring locations; N groups of threads share the channels.
    constexpr int COLUMNS = TILE / N;
    const int location = threadIdx.x % COLUMNS * N, group = threadIdx.x / COLUMNS;
    if (location < length)
#pragma unroll 2
      for (int64_t c = group; c < args.channels; c += N) each(start + c * args.locations + first + location, location);
    done(location);
    return;
  }
  const int lane = threadIdx.x % args.lanes, step = TILE / args.lanes;
  for (int base = 0; base < length; base += step) {  // the same number of rounds for every thread: done() exchanges
    const int location = base + int(threadIdx.x) / args.lanes;
    if (location < length)
      for (int64_t c = lane * N; c < args.channels; c += args.lanes * N)
        each(start + (first + location) * args.channels + c, location);
    done(location);
  }
}

// N elements' part of the log-ratio and of the KL term, `offset` from the start of the tensors.
template <int N, typename V, typename X, typename T>
__device__ __forceinline__ void add_elements(const PolicyLossArgs<V, X, T>& args, const SampleTerms<T>& terms,
                                             int64_t offset, T* delta, T& kl) {
  const Vector<V, N> v = load<V, N>(args.velocity + offset);
  const Vector<X, N> x = load<X, N>(args.sample + offset), next = load<X, N>(args.prev_sample + offset);
  Vector<T, N> old{};
  if (args.old_mean) old = load<T, N>(args.old_mean + offset);
  auto add = [&]<Form form>(std::integral_constant<Form, form>) {
#pragma unroll
    for (int k = 0; k < N; k++)
      delta[k] += term<form>(terms.a, T(x.element[k]), terms.b, T(v.element[k]), T(next.element[k]), old.element[k]);
  };
  if (args.form == Form::delta)
    add(std::integral_constant<Form, Form::delta>());
  else if (args.form == Form::guard)
    add(std::integral_constant<Form, Form::guard>());
  else
    add(std::integral_constant<Form, Form::log_prob>());
  if (args.reference_velocity) {
    const Vector<V, N> reference = load<V, N>(args.reference_velocity + offset);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const T difference = terms.b * (T(v.element[k]) - T(reference.element[k]));
      kl += difference * difference;
    }
  }
}

template <typename V, typename X, typename T, int N>
__global__ void __launch_bounds__(TILE, RESIDENT<T, N>) policy_loss_sums_kernel(const __grid_constant__ PolicyLossArgs<V, X, T> args) {
  struct Shared {
    T delta[N][TILE];  // N partial sums over the channels
    T sums[TILE_WARPS][SLOTS + 2];
  };
  STAR_SHARED(Shared, shared);
  const int64_t index = blockIdx.x / args.tiles, tile = blockIdx.x % args.tiles, first = tile * TILE;
  const SampleTerms<T> terms = args.terms(index);
  const int length = int(args.locations - first < TILE ? args.locations - first : TILE);

  T delta[N] = {}, kl = 0;
  for_each_vector<N>(
      args, index, first, length,
      [&](int64_t offset, int) { add_elements<N>(args, terms, offset, delta, kl); },
      [&](int location) {
        if (!args.packed) {
          const int group = threadIdx.x / (TILE / N);
#pragma unroll
          for (int k = 0; k < N; k++) shared.delta[group][location + k] = delta[k];
          return;
        }
        T sum = 0;
#pragma unroll
        for (int k = 0; k < N; k++) sum += delta[k], delta[k] = 0;
        sum = warp_sum(sum, args.lanes);
        if (threadIdx.x % args.lanes == 0 && location < length) shared.delta[0][location] = sum;
      });
  __syncthreads();

  // From here on a thread has one location.
  T slot[SLOTS] = {}, smallest = INFINITY, largest = -INFINITY;
  slot[KL] = kl;
  const int location = threadIdx.x;
  if (location < length) {
    const int64_t at = index * args.locations + first + location;
    T log_ratio = 0;
    for (int group = 0; group < (args.packed ? 1 : N); group++) log_ratio += shared.delta[group][location];
    log_ratio *= terms.scale;
    if (args.form == Form::log_prob) {
      log_ratio -= terms.offset;
      log_ratio -= args.old_log_prob_map ? args.old_log_prob_map[at] : args.old_log_prob.template at<T>(index);
    }
    slot[NONFINITE] = std::isfinite(log_ratio) ? T(0) : T(1);
    const T weight = args.weights ? args.weights[at] : T(1);
    if (args.ratio == Ratio::location) {
      const LimitedRatio<T> ratio = limited_ratio(log_ratio);
      const T value = surrogate(ratio, args.advantage(terms, index, at), args.clip_low, args.clip_high).value;
      add_location(slot, ratio, weight, value, args.clip_low, args.clip_high);
      smallest = largest = ratio.excess;
      args.log_ratio[at] = log_ratio;
    } else if (args.ratio == Ratio::sample) {
      slot[DELTA] = weight * log_ratio, slot[MASS] = 1;
    } else {
      const T advantage = args.advantage_map ? args.advantage(terms, index, at) : T(1);
      const T mass = weight * std::abs(advantage);
      slot[DELTA] = log_ratio, slot[MASS] = advantage >= 0 ? mass : T(0), slot[MASS_DOWN] = advantage >= 0 ? T(0) : mass;
    }
  }

  const int warp = threadIdx.x / WARP;
#pragma unroll
  for (int k = 0; k < SLOTS; k++) slot[k] = warp_sum(slot[k]);
  smallest = warp_min(smallest), largest = warp_max(largest);
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (int k = 0; k < SLOTS; k++) shared.sums[warp][k] = slot[k];
    shared.sums[warp][SLOTS] = smallest, shared.sums[warp][SLOTS + 1] = largest;
  }
  __syncthreads();
  LocationSums& out = args.sums[blockIdx.x];
  if (threadIdx.x < SLOTS) {
    double sum = 0;
    for (int w = 0; w < TILE_WARPS; w++) sum += double(shared.sums[w][threadIdx.x]);
    out.slot[threadIdx.x] = sum;
  } else if (threadIdx.x == SLOTS) {
    T least = shared.sums[0][SLOTS], most = shared.sums[0][SLOTS + 1];
    for (int w = 1; w < TILE_WARPS; w++)
      least = smaller(least, shared.sums[w][SLOTS]), most = larger(most, shared.sums[w][SLOTS + 1]);
    out.smallest = least, out.largest = most;
  }
}

// One block: a warp adds up the tiles of a sample, a thread the samples.
template <typename T>
__global__ void __launch_bounds__(FINISH_WARPS* WARP) policy_loss_finish_kernel(const __grid_constant__ SampleArgs<T> args) {
  struct Shared {
    BatchSums sample[FINISH_WARPS];
  };
  STAR_SHARED(Shared, shared);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  BatchSums all = no_sums();
  for (int64_t base = 0; base < args.batch; base += FINISH_WARPS) {
    const int64_t index = base + warp;
    if (index < args.batch) {
      LocationSums sums = no_location_sums();
      for (int64_t tile = lane; tile < args.tiles; tile += WARP) add(sums, args.sums[index * args.tiles + tile]);
      for (int k = 0; k < SLOTS; k++) sums.slot[k] = warp_sum(sums.slot[k]);
      sums.smallest = warp_min(sums.smallest), sums.largest = warp_max(sums.largest);
      if (lane == 0) {
        const T log_ratio = T(sums.slot[DELTA] / double(args.locations));
        if (args.ratio != Ratio::location) args.log_ratio[index] = log_ratio;
        const T up = args.advantage_map ? T(1) : args.advantage(args.terms(index), index, 0);
        const T down = args.advantage_map ? T(-1) : T(0);
        shared.sample[warp] =
            sample_sums<T>(args, sums, log_ratio, up, down, args.kl_precision.template at<T>(index));
      }
    }
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 0; w < FINISH_WARPS && base + w < args.batch; w++) add(all, shared.sample[w]);
    __syncthreads();
  }
  if (threadIdx.x == 0) finish<T>(args, all, args.loss, args.statistics);
}

template <typename V, typename X, typename T, int N>
__global__ void __launch_bounds__(TILE, RESIDENT<T, N>) policy_loss_gradient_kernel(const __grid_constant__ PolicyLossArgs<V, X, T> args) {
  const int64_t index = blockIdx.x / args.tiles, first = blockIdx.x % args.tiles * TILE;
  const int length = int(args.locations - first < TILE ? args.locations - first : TILE);
  const SampleTerms<T> terms = args.terms(index);
  const bool guard = args.form == Form::guard, per_location = args.ratio == Ratio::location;
  const T grad_loss = *args.grad_loss, pull = args.reference_velocity ? terms.pull * grad_loss : T(0);
  struct Shared {
    T factor[TILE];  // of each location
  };
  STAR_SHARED(Shared, shared);
  if (threadIdx.x < length) {
    const int64_t at = index * args.locations + first + threadIdx.x;
    const LimitedRatio<T> ratio = limited_ratio(args.log_ratio[per_location ? at : index]);
    const T force = surrogate(ratio, args.advantage(terms, index, at), args.clip_low, args.clip_high).force;
    shared.factor[threadIdx.x] = (args.weights ? args.weights[at] : T(1)) * (force * terms.share * grad_loss);
  }
  __syncthreads();
  for_each_vector<N>(
      args, index, first, length,
      [&](int64_t offset, int location) {
        const Vector<X, N> next = load<X, N>(args.prev_sample + offset);
        Vector<V, N> v, out;
        Vector<T, N> from;  // where the direction comes from: the old mean, or the mean
        if (!guard || pull != 0) v = load<V, N>(args.velocity + offset);
        if (guard) {
          from = load<T, N>(args.old_mean + offset);
        } else {
          const Vector<X, N> x = load<X, N>(args.sample + offset);
#pragma unroll
          for (int k = 0; k < N; k++)
            from.element[k] = transition_mean(terms.a, T(x.element[k]), terms.b, T(v.element[k]));
        }
        Vector<T, N> gradient;
#pragma unroll
        for (int k = 0; k < N; k++)
          gradient.element[k] = shared.factor[location + (args.packed ? 0 : k)] * (T(next.element[k]) - from.element[k]);
        if (pull != 0) {
          const Vector<V, N> reference = load<V, N>(args.reference_velocity + offset);
#pragma unroll
          for (int k = 0; k < N; k++) gradient.element[k] += pull * (T(v.element[k]) - T(reference.element[k]));
        }
#pragma unroll
        for (int k = 0; k < N; k++) out.element[k] = V(gradient.element[k]);
        store(args.gradient + offset, out);
      },
      [](int) {});
}

}  // namespace star::cuda
