// policy_loss on the GPU, without atomics, every sum in an order that the shapes alone decide.
//
// The loss takes two launches: policy_loss_sums_kernel reads the inputs and leaves the sums over every tile of a sample, and one
// block of policy_loss_finish_kernel, which starts with it and waits for it, adds the tiles up. The gradient takes one,
// policy_loss_gradient_kernel, which reads the inputs again, from the second-level cache where they fit, and each unit's log-ratio.
// Nothing else is kept between the two.
#pragma once
#include "cuda/latents.cuh"

namespace star::cuda {

// Blocks of a processor at once, for the compiler's choice of registers: as many as it has room for without spills. With
// nine an H100 holds all blocks of a micro batch of nine images of 1024 px.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int MOST_RESIDENT = 9;
#else
constexpr int MOST_RESIDENT = 8;
#endif
template <typename T>
constexpr int RESIDENT = sizeof(T) == 4 ? MOST_RESIDENT : 6;

// What there is one value of for each sample.
enum Field { A, B, S, PRECISION, LOG_NORM, KL_PRECISION, ADVANTAGE, STEP_WEIGHT, OLD_LOG_PROB, FIELDS };

// Of what the lanes of a warp have read; every lane calls it.
template <typename T>
__device__ __forceinline__ T field(T own, Field which) {
  return __shfl_sync(ALL_LANES, own, which);
}

// What does not depend on the types of the latents. T: of the arithmetic.
template <typename T>
struct SampleArgs : LossOptions<T>, Tiling {
  PerSample fields[FIELDS];
  const T *advantage_map, *old_log_prob_map, *weights;  // (B, locations), or null
  LocationSums* sums;                                   // (B, tiles)
  T* log_ratio;                                         // (B,), or (B, locations) for Ratio::location
  T* loss;
  float* statistics;

  // The field of a sample that this lane of a warp reads: one thread would wait for memory once a field.
  __device__ __forceinline__ T read_field(int64_t index) const {
    const int lane = threadIdx.x % WARP;
    return lane < FIELDS && fields[lane].data ? fields[lane].template at<T>(index) : T(lane == STEP_WEIGHT);
  }
  __device__ __forceinline__ SampleTerms<T> terms(T own) const {
    const T a = field(own, A), b = field(own, B), s = field(own, S), precision = field(own, PRECISION);
    const T log_norm = field(own, LOG_NORM), kl_precision = field(own, KL_PRECISION);
    return sample_terms<T>(*this, a, b, s, precision, log_norm, kl_precision, field(own, STEP_WEIGHT));
  }
};

// V: type of the velocities, X: of the latents. Tensors are contiguous; optional ones may be null.
template <typename V, typename X, typename T>
struct PolicyLossArgs : SampleArgs<T> {
  const V *velocity, *reference_velocity;
  const X *sample, *prev_sample;
  const T *old_mean, *grad_loss;
  V* gradient;
};

// N elements of the latents.
template <int N, typename V, typename X, typename T>
struct Elements {
  Vector<V, N> velocity;
  Vector<X, N> sample, prev_sample;
  Vector<T, N> old_mean;
};

// Their part of the log-ratio and of the KL term, `offset` from the start of the tensors.
template <int N, typename V, typename X, typename T>
__device__ __forceinline__ void add_elements(const PolicyLossArgs<V, X, T>& args, T a, T b,
                                             const Elements<N, V, X, T>& elements, int64_t offset, T* delta, T& kl) {
  auto add = [&]<Form form>(std::integral_constant<Form, form>) {
#pragma unroll
    for (int k = 0; k < N; k++)
      delta[k] += term<form>(a, T(elements.sample.element[k]), b, T(elements.velocity.element[k]),
                             T(elements.prev_sample.element[k]), elements.old_mean.element[k]);
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
      const T difference = b * (T(elements.velocity.element[k]) - T(reference.element[k]));
      kl += difference * difference;
    }
  }
}

template <typename V, typename X, typename T, int N>
__global__ void __launch_bounds__(LOSS_THREADS, RESIDENT<T>) policy_loss_sums_kernel(const __grid_constant__ PolicyLossArgs<V, X, T> args) {
  struct Shared {
    T delta[LOSS_THREADS * N];  // of each group of threads and location: partial sums over the channels
    T weight[TILE];
    T sums[LOSS_WARPS][SLOTS + 2];
  };
  STAR_SHARED(Shared, shared);
  const unsigned tiles = unsigned(args.tiles);
  const int64_t index = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * args.tile;
  const int length = int(args.locations - first < args.tile ? args.locations - first : args.tile);
  let_next_start();

  T delta[N] = {}, kl = 0, read = 0, a = 0, b = 0;
  for_each_vector<N>(
      args, index, first, length,
      [&](int64_t offset) {
        Elements<N, V, X, T> elements{load<V, N>(args.velocity + offset), load<X, N>(args.sample + offset),
                                      load<X, N>(args.prev_sample + offset), {}};
        if (args.old_mean) elements.old_mean = load_once<T, N>(args.old_mean + offset);
        return elements;
      },
      [&] {
        if (threadIdx.x < length)
          shared.weight[threadIdx.x] = args.weights ? args.weights[index * args.locations + first + threadIdx.x] : T(1);
        read = args.read_field(index), a = field(read, A), b = field(read, B);
      },
      [&](const Elements<N, V, X, T>& elements, int64_t offset, int) {
        add_elements(args, a, b, elements, offset, delta, kl);
      },
      [&](int location) {
        if (!args.packed) {
          const int group = threadIdx.x / (args.tile / N);
#pragma unroll
          for (int k = 0; k < N; k++) shared.delta[group * args.tile + location + k] = delta[k];
          return;
        }
        T sum = 0;
#pragma unroll
        for (int k = 0; k < N; k++) sum += delta[k], delta[k] = 0;
        sum = warp_sum(sum, args.lanes);
        if (threadIdx.x % args.lanes == 0 && location < length) shared.delta[location] = sum;
      });
  __syncthreads();

  // From here on a thread has one location.
  const int64_t own = index * args.locations + first + threadIdx.x;
  const SampleTerms<T> terms = args.terms(read);
  const T sample_advantage = field(read, ADVANTAGE), old_log_prob = field(read, OLD_LOG_PROB);
  auto advantage = [&] { return used_advantage(args.advantage_map ? args.advantage_map[own] : sample_advantage, args.adv_clip, terms.step); };
  T slot[SLOTS] = {}, smallest = INFINITY, largest = -INFINITY;
  slot[KL] = kl;
  if (threadIdx.x < length) {
    const T weight = shared.weight[threadIdx.x];
    T log_ratio = 0;
    const int groups = args.packed ? 1 : LOSS_THREADS * N / args.tile;
    for (int group = 0; group < groups; group++) log_ratio += shared.delta[group * args.tile + threadIdx.x];
    log_ratio *= terms.scale;
    if (args.form == Form::log_prob) {
      log_ratio -= terms.offset;
      log_ratio -= args.old_log_prob_map ? args.old_log_prob_map[own] : old_log_prob;
    }
    slot[NONFINITE] = std::isfinite(log_ratio) ? T(0) : T(1);
    if (args.ratio == Ratio::location) {
      const LimitedRatio<T> ratio = limited_ratio(log_ratio);
      const T value = surrogate(ratio, advantage(), args.clip_low, args.clip_high).value;
      add_location(slot, ratio, weight, value, args.clip_low, args.clip_high);
      smallest = largest = ratio.excess;
      args.log_ratio[own] = log_ratio;
    } else if (args.ratio == Ratio::sample) {
      slot[DELTA] = weight * log_ratio, slot[MASS] = 1;
    } else {
      const T force = args.advantage_map ? advantage() : T(1), mass = weight * std::abs(force);
      slot[DELTA] = log_ratio, slot[MASS] = force >= 0 ? mass : T(0), slot[MASS_DOWN] = force >= 0 ? T(0) : mass;
    }
  }

  const int warp = threadIdx.x / WARP;
  const bool per_location = args.ratio == Ratio::location;
#pragma unroll
  for (int k = 0; k < SLOTS; k++)
    if (k <= MASS_DOWN || per_location) slot[k] = warp_sum(slot[k]);
  if (per_location) smallest = warp_min(smallest), largest = warp_max(largest);
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (int k = 0; k < SLOTS; k++) shared.sums[warp][k] = slot[k];
    shared.sums[warp][SLOTS] = smallest, shared.sums[warp][SLOTS + 1] = largest;
  }
  __syncthreads();
  LocationSums& out = args.sums[blockIdx.x];
  if (threadIdx.x < SLOTS) {
    double sum = 0;
    for (int w = 0; w < LOSS_WARPS; w++) sum += double(shared.sums[w][threadIdx.x]);
    out.slot[threadIdx.x] = sum;
  } else if (threadIdx.x == SLOTS) {
    T least = shared.sums[0][SLOTS], most = shared.sums[0][SLOTS + 1];
    for (int w = 1; w < LOSS_WARPS; w++)
      least = smaller(least, shared.sums[w][SLOTS]), most = larger(most, shared.sums[w][SLOTS + 1]);
    out.smallest = least, out.largest = most;
  }
}

// One block: a warp adds up the tiles of a sample, a thread the samples.
template <typename T>
__global__ void __launch_bounds__(FINISH_WARPS* WARP, 1) policy_loss_finish_kernel(const __grid_constant__ SampleArgs<T> args) {
  struct Shared {
    BatchSums sample[FINISH_WARPS];
  };
  STAR_SHARED(Shared, shared);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  BatchSums all = no_sums();
  for (int64_t base = 0; base < args.batch; base += FINISH_WARPS) {
    const int64_t index = base + warp;
    const T read = index < args.batch ? args.read_field(index) : T(0);
    await_previous();
    if (index < args.batch) {
      const T advantage = used_advantage(field(read, ADVANTAGE), args.adv_clip, args.terms(read).step);
      const T kl_precision = field(read, KL_PRECISION);
      LocationSums sums = no_location_sums();
      const bool per_location = args.ratio == Ratio::location;
#pragma unroll 4
      for (int64_t tile = lane; tile < args.tiles; tile += WARP) {
        const LocationSums& one = args.sums[index * args.tiles + tile];
#pragma unroll
        for (int k = 0; k < SLOTS; k++)
          if (k <= MASS_DOWN || per_location) sums.slot[k] += one.slot[k];
        if (per_location)
          sums.smallest = smaller(sums.smallest, one.smallest), sums.largest = larger(sums.largest, one.largest);
      }
#pragma unroll
      for (int k = 0; k < SLOTS; k++)
        if (k <= MASS_DOWN || per_location) sums.slot[k] = warp_sum(sums.slot[k]);
      if (per_location) sums.smallest = warp_min(sums.smallest), sums.largest = warp_max(sums.largest);
      if (lane == 0) {
        const T log_ratio = T(sums.slot[DELTA] / double(args.locations));
        if (args.ratio != Ratio::location) args.log_ratio[index] = log_ratio;
        const T up = args.advantage_map ? T(1) : advantage, down = args.advantage_map ? T(-1) : T(0);
        shared.sample[warp] = sample_sums<T>(args, sums, log_ratio, up, down, kl_precision);
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
__global__ void __launch_bounds__(LOSS_THREADS, RESIDENT<T>) policy_loss_gradient_kernel(const __grid_constant__ PolicyLossArgs<V, X, T> args) {
  struct Shared {
    T factor[TILE];  // of each location
  };
  STAR_SHARED(Shared, shared);
  const unsigned tiles = unsigned(args.tiles);
  const int64_t index = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * args.tile;
  const int length = int(args.locations - first < args.tile ? args.locations - first : args.tile);
  const bool guard = args.form == Form::guard;
  T a = 0, b = 0, pull = 0;
  struct Read {
    Vector<X, N> prev_sample, sample;
    Vector<V, N> velocity;
  };
  for_each_vector<N>(
      args, index, first, length,
      [&](int64_t offset) {
        Read read{load<X, N>(args.prev_sample + offset), {}, {}};
        if (!guard) read.sample = load<X, N>(args.sample + offset);
        if (!guard || args.reference_velocity) read.velocity = load<V, N>(args.velocity + offset);
        return read;
      },
      [&] {
        const int64_t at = index * args.locations + first + threadIdx.x;
        const bool inside = threadIdx.x < length;
        T log_ratio = 0, weight = 1;
        if (inside) log_ratio = args.log_ratio[args.ratio == Ratio::location ? at : index];
        if (inside && args.weights) weight = args.weights[at];
        const T grad_loss = *args.grad_loss;
        const T own = args.read_field(index);
        const SampleTerms<T> terms = args.terms(own);
        T advantage = field(own, ADVANTAGE);
        a = terms.a, b = terms.b;
        if (args.reference_velocity) pull = terms.pull * grad_loss;
        if (inside) {
          if (args.advantage_map) advantage = args.advantage_map[at];
          advantage = used_advantage(advantage, args.adv_clip, terms.step);
          const T force = surrogate(limited_ratio(log_ratio), advantage, args.clip_low, args.clip_high).force;
          shared.factor[threadIdx.x] = weight * (force * terms.share * grad_loss);
        }
        __syncthreads();
      },
      [&](const Read& read, int64_t offset, int location) {
        Vector<V, N> out;
        Vector<T, N> from;  // where the direction comes from: the old mean, or the mean
        if (guard) {
          from = load<T, N>(args.old_mean + offset);
        } else {
#pragma unroll
          for (int k = 0; k < N; k++)
            from.element[k] = transition_mean(a, T(read.sample.element[k]), b, T(read.velocity.element[k]));
        }
        Vector<T, N> gradient;
#pragma unroll
        for (int k = 0; k < N; k++)
          gradient.element[k] =
              shared.factor[location + (args.packed ? 0 : k)] * (T(read.prev_sample.element[k]) - from.element[k]);
        if (pull != 0) {
          const Vector<V, N> reference = load<V, N>(args.reference_velocity + offset);
#pragma unroll
          for (int k = 0; k < N; k++)
            gradient.element[k] += pull * (T(read.velocity.element[k]) - T(reference.element[k]));
        }
#pragma unroll
        for (int k = 0; k < N; k++) out.element[k] = V(gradient.element[k]);
        store(args.gradient + offset, out);
      },
      [](int) {});
}

}  // namespace star::cuda
