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
  Floats<const void> sample, velocity;
  Floats<const void> unconditional_velocity, noise;  // any tensor of these sizes for none
  bool guided, noised;
  T guidance_scale;
  const int64_t* seeds;  // (B,), of noise that is drawn here; null for none
  PerSample a, b, s;
  Floats<void> prev_sample;  // in the type of sample
  T* mean;
};

// Noise of the N elements from `place` on of a sample; N is 1 or 4.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> drawn(int64_t seed, int64_t place) {
  const Normals four = normals(uint64_t(seed), uint64_t(place / 4));
  Vector<T, N> out;
  if constexpr (N == 4) {
#pragma unroll
    for (int k = 0; k < 4; k++) out.element[k] = T(four.value[k]);
  } else {
    static_assert(N == 1);
    const int which = int(place % 4);
    const float low = which & 1 ? four.value[1] : four.value[0], high = which & 1 ? four.value[3] : four.value[2];
    out.element[0] = T(which & 2 ? high : low);
  }
  return out;
}

// draws: whether the noise is drawn here. A kernel of its own: the other one keeps its few registers.
template <typename T, int N, bool draws>
__global__ void __launch_bounds__(THREADS) gaussian_step_kernel(const __grid_constant__ GaussianStepArgs<T> args) {
  const unsigned tiles = unsigned(args.tiles);
  const int64_t index = blockIdx.x / tiles, place = (int64_t(blockIdx.x % tiles) * THREADS + threadIdx.x) * N;
  if (place >= args.elements) return;
  const int64_t at = index * args.elements + place;
  const Raw<T, N> raw_x = fetch<T, N>(args.sample, at), raw_v = fetch<T, N>(args.velocity, at);
  const Raw<T, N> raw_u = fetch<T, N>(args.unconditional_velocity, at);
  constexpr bool early = !draws && sizeof(T) == 4;  // four tensors in double at once would spill
  Raw<T, N> raw_z;
  if constexpr (early) raw_z = fetch<T, N>(args.noise, at);
  const T a = args.a.template at<T>(index), b = args.b.template at<T>(index), s = args.s.template at<T>(index);
  const Vector<T, N> x = values_of(raw_x, args.sample);
  const Vector<T, N> u = values_of(raw_u, args.unconditional_velocity);
  Vector<T, N> v = values_of(raw_v, args.velocity), z;
#pragma unroll
  for (int k = 0; k < N; k++)
    v.element[k] = args.guided ? guided(v.element[k], u.element[k], args.guidance_scale) : v.element[k];
  Vector<T, N> mean;
#pragma unroll
  for (int k = 0; k < N; k++) mean.element[k] = transition_mean(a, x.element[k], b, v.element[k]);
  store(args.mean + at, mean);
  if constexpr (draws) {
    z = drawn<T, N>(args.seeds[index], place);
  } else {
    if constexpr (!early) raw_z = fetch<T, N>(args.noise, at);
    z = values_of(raw_z, args.noise);
  }
  const bool noised = draws || args.noised;
  typed(args.prev_sample, at, [&]<typename Q>(Q* to) {
    Vector<Q, N> next;
#pragma unroll
    for (int k = 0; k < N; k++)
      next.element[k] = Q(noised ? transition_sample(mean.element[k], s, z.element[k]) : mean.element[k]);
    store(to, next);
  });
}

}  // namespace star::cuda
