// policy_loss on the GPU in two launches, without atomics, every sum in an order that the shapes alone decide.
//
// Launch 1 (policy_loss_ratios) reads the inputs and leaves, for every tile of a sample, the sums that the sample's ratio
// and the statistics need. Beside the tiles one block per sample finds the edge of the top tenth of its weights, which
// depends on nothing else. Launch 2 (policy_loss_gradient) adds up its sample's tiles, reads the inputs again (from the
// second-level cache, where they fit) and writes the gradient; its first block, while the others write, adds up the loss
// and the statistics. No third launch is needed because everything that the loss and the statistics add up over the
// batch is known after launch 1, up to one factor per sample that follows from the sample's sums: even the share of
// the gradient in the top tenth, since a location's gradient is that factor times what launch 1 stored in `amount`.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

constexpr int TILE = THREADS;  // locations of a block: one per thread, once the channels are summed

// Sums over a tile. With a ratio for every location the loss is known in launch 1; otherwise its parts are.
enum Slot { NONFINITE, KL, AMOUNT, DELTA, MASS, AMOUNT_DOWN, MASS_DOWN, SLOTS = 8 };
enum LocationSlot { LOSS = DELTA, SQUARE, LOW, HIGH, EXCESS };

struct Sums {
  double slot[SLOTS];
  double smallest, largest;  // ratio - 1; only with a ratio for every location
};

// The smallest weight of a sample's top tenth, and the part that the locations at this edge count with.
template <typename T>
struct Edge {
  T weight;
  double portion;
};

// V: type of the velocities, X: of the latents, T: of the arithmetic. Tensors are contiguous; optional ones may be null.
template <typename V, typename X, typename T>
struct PolicyLossArgs {
  int64_t batch, channels, places, tiles;
  bool packed;  // (B, L, C) instead of (B, C, H, W)
  int lanes;    // of a warp, that share one location of packed latents; a power of two
  const V *velocity, *reference_velocity;
  const X *sample, *prev_sample;
  const T* old_mean;
  PerSample a, b, s, precision, log_norm, kl_precision, advantages, step_weights, old_log_prob;
  const T *advantage_map, *old_log_prob_map, *weights;  // (B, places)
  Form form;
  Ratio ratio;
  T clip_low, clip_high, adv_clip, kl_coef;
  // Workspace.
  Sums* sums;      // (B, tiles)
  Edge<T>* edges;  // (B,), with weights
  T* amount;       // (B, places), with weights: |gradient| of a location, but for the sample's factor
  T* factor;       // (B, places), with a ratio for every location: gradient / direction
  // Results.
  V* gradient;
  T* loss;
  float* statistics;
};

// What the elements of a sample have in common.
template <typename T>
struct SampleTerms {
  T a, b, scale, offset, step, share;
};

template <typename V, typename X, typename T>
__device__ __forceinline__ SampleTerms<T> sample_terms(const PolicyLossArgs<V, X, T>& args, int64_t index) {
  const bool guard = args.form == Form::guard;
  const T a = args.a.template at<T>(index), b = args.b.template at<T>(index), s = args.s.template at<T>(index);
  const T precision = args.precision.template at<T>(index), kl_precision = args.kl_precision.template at<T>(index);
  T scale = precision / T(args.channels);
  if (guard) scale *= 2 * s;
  const T offset = args.form == Form::log_prob ? args.log_norm.template at<T>(index) : T(0);
  const T step = (args.step_weights.data ? args.step_weights.template at<T>(index) : T(1)) *
                 (guard ? precision / kl_precision : T(1));
  // d delta / d velocity = slope * direction; the loss is a mean over the batch and the locations.
  const T slope = 2 * precision * b / T(args.channels) * (guard ? s : T(1));
  return {a, b, scale, offset, step, slope / T(args.batch * args.places)};
}

template <typename V, typename X, typename T>
__device__ __forceinline__ T advantage(const PolicyLossArgs<V, X, T>& args, const SampleTerms<T>& terms, int64_t index,
                                       int64_t place) {
  const T value = args.advantage_map ? args.advantage_map[index * args.places + place]
                                     : args.advantages.template at<T>(index);
  return clamped(value, -args.adv_clip, args.adv_clip) * terms.step;
}

template <typename T, int N>
struct RatioShared {
  T delta[N][TILE];   // N partial sums over the channels
  T amount[N][TILE];  // of |direction|
  T scratch[WARPS][SLOTS + 2];
};

// N elements' part of the log-ratio (and of |direction| and the KL term), `offset` from the start of the tensors.
template <int N, typename V, typename X, typename T>
__device__ __forceinline__ void add_elements(const PolicyLossArgs<V, X, T>& args, const SampleTerms<T>& terms,
                                             int64_t offset, T* delta, T* amount, T& kl) {
  const Vector<V, N> v = load<V, N>(args.velocity + offset);
  const Vector<X, N> x = load<X, N>(args.sample + offset), next = load<X, N>(args.prev_sample + offset);
  Vector<T, N> old;
  if (args.old_mean) old = load<T, N>(args.old_mean + offset);
  auto add = [&](auto element) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      T direction;
      delta[k] += element(k, direction);
      amount[k] += std::abs(direction);
    }
  };
  if (args.form == Form::delta) {
    add([&](int k, T& direction) {
      return term<Form::delta>(terms.a, T(x.element[k]), terms.b, T(v.element[k]), T(next.element[k]), old.element[k],
                               direction);
    });
  } else if (args.form == Form::guard) {
    add([&](int k, T& direction) {
      return term<Form::guard>(terms.a, T(x.element[k]), terms.b, T(v.element[k]), T(next.element[k]), old.element[k],
                               direction);
    });
  } else {
    add([&](int k, T& direction) {
      return term<Form::log_prob>(terms.a, T(x.element[k]), terms.b, T(v.element[k]), T(next.element[k]), T(0),
                                  direction);
    });
  }
  if (args.reference_velocity) {
    const Vector<V, N> reference = load<V, N>(args.reference_velocity + offset);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const T difference = terms.b * (T(v.element[k]) - T(reference.element[k]));
      kl += difference * difference;
    }
  }
}

// Calls each(offset, place) for this thread's vectors of a tile: N locations of one channel, or N channels of one
// location of packed latents. done(place) follows the last vector of the thread's locations.
template <int N, typename V, typename X, typename T, typename Each, typename Done>
__device__ __forceinline__ void for_each_vector(const PolicyLossArgs<V, X, T>& args, int64_t index, int64_t first,
                                                int length, Each each, Done done) {
  const int64_t start = index * args.channels * args.places;
  if (!args.packed) {
    // A warp reads neighboring locations; N groups of threads share the channels.
    constexpr int COLUMNS = TILE / N;
    const int place = threadIdx.x % COLUMNS * N, group = threadIdx.x / COLUMNS;
    if (place >= length) return;
#pragma unroll 2
    for (int64_t c = group; c < args.channels; c += N) each(start + c * args.places + first + place, place);
    done(place);
    return;
  }
  const int lane = threadIdx.x % args.lanes, step = THREADS / args.lanes;
  for (int base = 0; base < length; base += step) {  // the same number of rounds for every thread: done() exchanges
    const int place = base + int(threadIdx.x) / args.lanes;
    if (place < length)
      for (int64_t c = lane * N; c < args.channels; c += args.lanes * N)
        each(start + (first + place) * args.channels + c, place);
    done(place);
  }
}

template <typename T>
STAR_HD auto order_key(T value) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr Bits SIGN = Bits(1) << (8 * sizeof(T) - 1);
  Bits bits;
  memcpy(&bits, &value, sizeof(T));
  return bits & SIGN ? ~bits : bits | SIGN;  // an integer in the order of the numbers
}

// The edge of the top tenth of `places` weights, ties and all as in reference.top_share. The edge's bits are found two at
// a time from the top, by counting the weights that are not below each of the three candidates.
template <typename T>
__device__ Edge<T> top_edge(const T* weights, int64_t places, int64_t (*scratch)[3]) {
  using Key = decltype(order_key(T()));
  const double size = TOP_SHARE * double(places);
  const int64_t rank = int64_t(size) + 1;
  Key edge = 0;
  for (int shift = 8 * sizeof(T) - 2; shift >= 0; shift -= 2) {
    int64_t count[3] = {};
#pragma unroll 8
    for (int64_t p = threadIdx.x; p < places; p += THREADS) {
      const Key key = order_key(weights[p]);
#pragma unroll
      for (int digit = 1; digit <= 3; digit++) count[digit - 1] += key >= (edge | (Key(digit) << shift));
    }
    __syncthreads();
    for (int digit = 0; digit < 3; digit++) {
      count[digit] = warp_sum(count[digit]);
      if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP][digit] = count[digit];
    }
    __syncthreads();
    Key chosen = 0;
    for (int digit = 0; digit < 3; digit++) {
      int64_t sum = 0;
      for (int warp = 0; warp < WARPS; warp++) sum += scratch[warp][digit];
      if (sum >= rank) chosen = digit + 1;
    }
    edge |= chosen << shift;
  }
  const Key sign = Key(1) << (8 * sizeof(T) - 1);
  const Key bits = edge & sign ? edge ^ sign : ~edge;
  T weight;
  memcpy(&weight, &bits, sizeof(T));
  int64_t above = 0, tied = 0;
  for (int64_t p = threadIdx.x; p < places; p += THREADS) above += weights[p] > weight, tied += weights[p] == weight;
  above = block_sum(above, &scratch[0][0]);
  tied = block_sum(tied, &scratch[0][0]);
  return {weight, (size - double(above)) / double(tied > 1 ? tied : 1)};
}

template <typename V, typename X, typename T, int N>
__global__ void __launch_bounds__(THREADS, 2) policy_loss_ratios(const __grid_constant__ PolicyLossArgs<V, X, T> args) {
  union Shared {
    RatioShared<T, N> ratio;
    int64_t counts[WARPS][3];
  };
  STAR_SHARED(Shared, memory);
  const int64_t extra = args.weights ? 1 : 0, index = blockIdx.x / (args.tiles + extra);
  const int64_t tile = blockIdx.x % (args.tiles + extra) - extra;
  if (tile < 0) {
    const Edge<T> edge = top_edge(args.weights + index * args.places, args.places, memory.counts);
    if (threadIdx.x == 0) args.edges[index] = edge;
    return;
  }
  RatioShared<T, N>& shared = memory.ratio;
  const SampleTerms<T> terms = sample_terms(args, index);
  const int64_t first = tile * TILE;
  const int length = int(args.places - first < TILE ? args.places - first : TILE);

  T delta[N] = {}, amount[N] = {}, kl = 0;
  for_each_vector<N>(
      args, index, first, length,
      [&](int64_t offset, int) { add_elements<N>(args, terms, offset, delta, amount, kl); },
      [&](int place) {
        if (!args.packed) {
          const int group = threadIdx.x / (TILE / N);
#pragma unroll
          for (int k = 0; k < N; k++) shared.delta[group][place + k] = delta[k], shared.amount[group][place + k] = amount[k];
          return;
        }
        T delta_sum = 0, amount_sum = 0;
#pragma unroll
        for (int k = 0; k < N; k++) {
          delta_sum += delta[k], amount_sum += amount[k];
          delta[k] = amount[k] = 0;
        }
        delta_sum = warp_sum(delta_sum, args.lanes), amount_sum = warp_sum(amount_sum, args.lanes);
        if (threadIdx.x % args.lanes == 0 && place < length)
          shared.delta[0][place] = delta_sum, shared.amount[0][place] = amount_sum;
      });
  __syncthreads();

  // From here on a thread has one location.
  T slot[SLOTS] = {}, smallest = INFINITY, largest = -INFINITY;
  slot[KL] = kl;
  const int place = threadIdx.x;
  if (place < length) {
    const int64_t at = index * args.places + first + place;
    T log_ratio = 0, size = 0;
    for (int group = 0; group < (args.packed ? 1 : N); group++)
      log_ratio += shared.delta[group][place], size += shared.amount[group][place];
    log_ratio *= terms.scale;
    if (args.form == Form::log_prob) {
      log_ratio -= terms.offset;
      log_ratio -= args.old_log_prob_map ? args.old_log_prob_map[at] : args.old_log_prob.template at<T>(index);
    }
    slot[NONFINITE] = std::isfinite(log_ratio) ? T(0) : T(1);
    const T weight = args.weights ? args.weights[at] : T(1);
    if (args.ratio == Ratio::location) {
      const T force = advantage(args, terms, index, first + place);
      const Surrogate<T> unit = clipped_surrogate(log_ratio, force, args.clip_low, args.clip_high);
      const T factor = weight * unit.force * terms.share;
      size *= std::abs(factor);
      args.factor[at] = factor;
      slot[LOSS] = weight * unit.value;
      slot[SQUARE] = unit.log_ratio * unit.log_ratio;
      slot[LOW] = unit.excess < -args.clip_low;
      slot[HIGH] = unit.excess > args.clip_high;
      slot[EXCESS] = unit.excess;
      slot[AMOUNT] = size;
      smallest = largest = unit.excess;
    } else {
      // One ratio for all, and the gate and value of each sign: what they will be scaled with is the advantage's size.
      const T signed_size = args.advantage_map ? advantage(args, terms, index, first + place) : T(1);
      const T mass = weight * std::abs(signed_size), counted = args.ratio == Ratio::sample ? T(1) : mass;
      size *= std::abs(mass);
      slot[DELTA] = args.ratio == Ratio::sample ? weight * log_ratio : log_ratio;
      if (signed_size >= 0)
        slot[MASS] = counted, slot[AMOUNT] = size;
      else
        slot[MASS_DOWN] = counted, slot[AMOUNT_DOWN] = size;
    }
    if (args.amount) args.amount[at] = size;
  }

  const int warp = threadIdx.x / WARP;
#pragma unroll
  for (int k = 0; k < SLOTS; k++) slot[k] = warp_sum(slot[k]);
  smallest = warp_min(smallest), largest = warp_max(largest);
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (int k = 0; k < SLOTS; k++) shared.scratch[warp][k] = slot[k];
    shared.scratch[warp][SLOTS] = smallest, shared.scratch[warp][SLOTS + 1] = largest;
  }
  __syncthreads();
  Sums& out = args.sums[index * args.tiles + tile];
  if (threadIdx.x < SLOTS) {
    double sum = 0;
    for (int w = 0; w < WARPS; w++) sum += double(shared.scratch[w][threadIdx.x]);
    out.slot[threadIdx.x] = sum;
  } else if (threadIdx.x == SLOTS) {
    T least = shared.scratch[0][SLOTS], most = shared.scratch[0][SLOTS + 1];
    for (int w = 1; w < WARPS; w++)
      least = smaller(least, shared.scratch[w][SLOTS]), most = larger(most, shared.scratch[w][SLOTS + 1]);
    out.smallest = least, out.largest = most;
  }
}

// One sum of a sample's tiles; every lane of every warp gets the same bits.
template <typename V, typename X, typename T>
__device__ __forceinline__ double sample_sum(const PolicyLossArgs<V, X, T>& args, int64_t index, int slot) {
  double sum = 0;
#pragma unroll 1
  for (int64_t tile = threadIdx.x % WARP; tile < args.tiles; tile += WARP)
    sum += args.sums[index * args.tiles + tile].slot[slot];
  return warp_sum(sum);
}

// The surrogate of a sample's one ratio, for advantages of the two signs (or for its one advantage, twice).
template <typename T>
struct TwoSigns {
  Surrogate<T> up, down;
};

template <typename V, typename X, typename T>
__device__ __forceinline__ TwoSigns<T> sample_surrogate(const PolicyLossArgs<V, X, T>& args,
                                                        const SampleTerms<T>& terms, int64_t index) {
  const T log_ratio = T(sample_sum(args, index, DELTA) / double(args.places));
  const T up = args.advantage_map ? T(1) : advantage(args, terms, index, 0);
  const T down = args.advantage_map ? T(-1) : up;
  return {clipped_surrogate(log_ratio, up, args.clip_low, args.clip_high),
          clipped_surrogate(log_ratio, down, args.clip_low, args.clip_high)};
}

// One warp's sums over one sample.
template <typename V, typename X, typename T>
__device__ PolicyLossSums sample_totals(const PolicyLossArgs<V, X, T>& args, int64_t index) {
  const SampleTerms<T> terms = sample_terms(args, index);
  PolicyLossSums out{};
  out.nonfinite = sample_sum(args, index, NONFINITE);
  if (args.reference_velocity)
    out.kl = sample_sum(args, index, KL) * double(args.kl_precision.template at<T>(index)) /
             double(args.channels * args.places);
  double up = 1, down = 1;  // what the stored amounts are scaled with
  if (args.ratio == Ratio::location) {
    out.loss = sample_sum(args, index, LOSS), out.square = sample_sum(args, index, SQUARE);
    out.low = sample_sum(args, index, LOW), out.high = sample_sum(args, index, HIGH);
    out.excess = sample_sum(args, index, EXCESS), out.total = sample_sum(args, index, AMOUNT);
    double least = INFINITY, most = -INFINITY;
    for (int64_t tile = threadIdx.x % WARP; tile < args.tiles; tile += WARP) {
      const Sums& sums = args.sums[index * args.tiles + tile];
      least = smaller(least, sums.smallest), most = larger(most, sums.largest);
    }
    out.smallest = warp_min(least), out.largest = warp_max(most);
    out.units = double(args.places);
  } else {
    const TwoSigns<T> unit = sample_surrogate(args, terms, index);
    out.loss = sample_sum(args, index, MASS) * double(unit.up.value);
    up = std::abs(double(unit.up.force * terms.share)), down = std::abs(double(unit.down.force * terms.share));
    out.total = sample_sum(args, index, AMOUNT) * up;
    if (args.advantage_map) {
      out.loss += sample_sum(args, index, MASS_DOWN) * double(unit.down.value);
      out.total += sample_sum(args, index, AMOUNT_DOWN) * down;
    }
    out.square = double(unit.up.log_ratio) * double(unit.up.log_ratio);
    out.low = unit.up.excess < -args.clip_low, out.high = unit.up.excess > args.clip_high;
    out.excess = out.smallest = out.largest = unit.up.excess;
    out.units = 1;
  }
  if (!args.weights) {
    out.top = TOP_SHARE * out.total;
    return out;
  }
  const Edge<T> edge = args.edges[index];
  const T *weights = args.weights + index * args.places, *amount = args.amount + index * args.places;
  const bool signs = args.advantage_map && args.ratio != Ratio::location;
  double above = 0, tied = 0;
#pragma unroll 4
  for (int64_t p = threadIdx.x % WARP; p < args.places; p += WARP) {
    const T weight = weights[p];
    double part = amount[p];
    part *= !signs || args.advantage_map[index * args.places + p] * terms.step >= 0 ? up : down;
    above += weight > edge.weight ? part : 0.0;
    tied += weight == edge.weight ? part : 0.0;
  }
  out.top = warp_sum(above) + edge.portion * warp_sum(tied);
  return out;
}

template <typename V, typename X, typename T>
__device__ void write_statistics(const PolicyLossArgs<V, X, T>& args, PolicyLossSums* scratch) {
  const int warp = threadIdx.x / WARP;
  PolicyLossSums& all = scratch[WARPS];  // not in registers, which the other blocks would lack
  if (threadIdx.x == 0) all = no_sums();
  for (int64_t base = 0; base < args.batch; base += WARPS) {
    if (base + warp < args.batch) {
      const PolicyLossSums totals = sample_totals(args, base + warp);
      if (threadIdx.x % WARP == 0) scratch[warp] = totals;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 0; w < WARPS && base + w < args.batch; w++) add(all, scratch[w]);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0)
    finish_statistics(all, args.batch, args.places, double(args.kl_coef), args.loss, args.statistics);
}

template <typename V, typename X, typename T, int N>
__global__ void __launch_bounds__(THREADS, 3) policy_loss_gradient(const __grid_constant__ PolicyLossArgs<V, X, T> args) {
  union Shared {
    T factor[TILE];
    PolicyLossSums totals[WARPS + 1];
  };
  STAR_SHARED(Shared, shared);
  if (blockIdx.x == 0) {  // the first to start, because it takes longest
    write_statistics(args, shared.totals);
    return;
  }
  const int64_t index = (blockIdx.x - 1) / args.tiles, first = (blockIdx.x - 1) % args.tiles * TILE;
  const int length = int(args.places - first < TILE ? args.places - first : TILE);
  const int thread = threadIdx.x;
  const SampleTerms<T> terms = sample_terms(args, index);
  if (args.ratio == Ratio::location) {
    if (thread < length) shared.factor[thread] = args.factor[index * args.places + first + thread];
  } else {
    const TwoSigns<T> unit = sample_surrogate(args, terms, index);
    if (thread < length) {
      const int64_t place = first + thread;
      const T signed_size = args.advantage_map ? advantage(args, terms, index, place) : T(1);
      const T force = signed_size >= 0 ? unit.up.force : unit.down.force;
      const T weight = args.weights ? args.weights[index * args.places + place] : T(1);
      shared.factor[thread] = weight * std::abs(signed_size) * force * terms.share;
    }
  }
  __syncthreads();

  const bool guard = args.form == Form::guard;
  const T pull = args.reference_velocity ? 2 * args.kl_coef * args.kl_precision.template at<T>(index) * terms.b *
                                               terms.b / T(args.batch * args.channels * args.places)
                                         : T(0);
  for_each_vector<N>(
      args, index, first, length,
      [&](int64_t offset, int place) {
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
          gradient.element[k] = shared.factor[place + (args.packed ? 0 : k)] * (T(next.element[k]) - from.element[k]);
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
