// gaussian_step of a block: mean and next sample in one pass. A tensor in another type than the arithmetic's is converted
// by the block, which stays in the first-level cache.
#include "cpu/gaussian_step.h"

#include <type_traits>

#include "star_math.h"

namespace star::STAR_ISA {

namespace {

// `count` elements in the type of the arithmetic: in place, or converted into the buffer.
template <typename T>
const T* read(const Floats<const void>& array, int64_t at, int64_t count, T* __restrict buffer) {
  const T* result = buffer;
  typed(array, at, [&]<typename Q>(const Q* values) {
    if constexpr (std::is_same_v<Q, T>) {
      result = values;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; i++) buffer[i] = T(values[i]);
    }
  });
  return result;
}

// Noise of elements that begin at a multiple of 4, into a buffer that has room for 3 more.
template <typename T>
void draw(uint64_t seed, int64_t begin, int64_t count, T* __restrict buffer) {
  const int64_t groups = (count + 3) / 4;
#pragma omp simd
  for (int64_t group = 0; group < groups; group++) {
    const Normals drawn = normals(seed, begin / 4 + group);
    for (int k = 0; k < 4; k++) buffer[4 * group + k] = T(drawn.value[k]);
  }
}

}  // namespace

template <typename T>
void gaussian_step_block(const GaussianStepArgs<T>& args, int64_t index, int64_t block) {
  const int64_t begin = block * STEP_BLOCK, left = args.elements - begin;
  const int64_t count = left < STEP_BLOCK ? left : STEP_BLOCK, at = index * args.elements + begin;
  static_assert(STEP_BLOCK % 4 == 0);
  alignas(64) T buffer[4][STEP_BLOCK];
  const T* x = read(args.sample, at, count, buffer[0]);
  const T* v = read(args.velocity, at, count, buffer[1]);
  if (args.unconditional_velocity.data) {
    const T *conditional = v, *unconditional = read(args.unconditional_velocity, at, count, buffer[2]);
    T* __restrict both = buffer[3];
#pragma omp simd
    for (int64_t i = 0; i < count; i++) both[i] = guided(conditional[i], unconditional[i], args.guidance_scale);
    v = both;
  }
  const T* z = nullptr;
  if (args.seeds) {
    draw(uint64_t(args.seeds[index]), begin, count, buffer[2]);
    z = buffer[2];
  } else if (args.noise.data) {
    z = read(args.noise, at, count, buffer[2]);
  }
  const T a = args.a[index], b = args.b[index], s = args.s[index];
  T* __restrict mean = args.mean + at;
  typed(args.prev_sample, at, [&]<typename Q>(Q* __restrict next) {
    if (z) {
#pragma omp simd
      for (int64_t i = 0; i < count; i++) {
        mean[i] = transition_mean(a, x[i], b, v[i]);
        next[i] = Q(transition_sample(mean[i], s, z[i]));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; i++) {
        mean[i] = transition_mean(a, x[i], b, v[i]);
        next[i] = Q(mean[i]);
      }
    }
  });
}

template void gaussian_step_block<double>(const GaussianStepArgs<double>&, int64_t, int64_t);
template void gaussian_step_block<float>(const GaussianStepArgs<float>&, int64_t, int64_t);

}  // namespace star::STAR_ISA
