// gaussian_step on the GPU: one launch, each element read and written once, every tensor in its own type.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

constexpr int THREADS = 256;
constexpr int STEP_VECTOR = 4;  // elements of a thread: one access of 16 bytes in float32

// T: type of the arithmetic. Tensors are contiguous.
template <typename T>
struct GaussianStepArgs {
  int64_t elements, tiles;  // of a sample
  Floats<const void> sample, velocity, noise;
  PerSample a, b, s;
  Floats<void> prev_sample;  // in the type of sample
  T* mean;
};

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) gaussian_step_kernel(const __grid_constant__ GaussianStepArgs<T> args) {
  const unsigned tiles = unsigned(args.tiles);
  const int64_t index = blockIdx.x / tiles, place = (int64_t(blockIdx.x % tiles) * THREADS + threadIdx.x) * N;
  if (place >= args.elements) return;
  const int64_t at = index * args.elements + place;
  const Raw<T, N> raw_x = fetch<T, N>(args.sample, at), raw_v = fetch<T, N>(args.velocity, at);
  const Raw<T, N> raw_z = fetch<T, N>(args.noise, at);
  const T a = args.a.template at<T>(index), b = args.b.template at<T>(index), s = args.s.template at<T>(index);
  const Vector<T, N> x = values_of(raw_x, args.sample), v = values_of(raw_v, args.velocity);
  const Vector<T, N> z = values_of(raw_z, args.noise);
  Vector<T, N> mean;
#pragma unroll
  for (int k = 0; k < N; k++) mean.element[k] = transition_mean(a, x.element[k], b, v.element[k]);
  store(args.mean + at, mean);
  typed(args.prev_sample, at, [&]<typename Q>(Q* to) {
    Vector<Q, N> next;
#pragma unroll
    for (int k = 0; k < N; k++) next.element[k] = Q(transition_sample(mean.element[k], s, z.element[k]));
    store(to, next);
  });
}

}  // namespace star::cuda
