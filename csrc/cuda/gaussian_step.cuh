// gaussian_step on the GPU: one launch, each element read and written once, every tensor in its own type.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

constexpr int THREADS = 256;
constexpr int STEP_VECTOR = 8;  // elements of a thread: 16 bytes of the narrowest type, two accesses of float32

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
  const int64_t index = blockIdx.x / args.tiles;
  const int64_t place = (blockIdx.x % args.tiles * THREADS + threadIdx.x) * N;
  if (place >= args.elements) return;
  const int64_t at = index * args.elements + place;
  const T a = args.a.template at<T>(index), b = args.b.template at<T>(index), s = args.s.template at<T>(index);
  const Vector<T, N> x = load<T, N>(args.sample, at), v = load<T, N>(args.velocity, at), z = load<T, N>(args.noise, at);
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
