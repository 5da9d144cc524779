// allocate of one sample: each map is read from memory once, its second reading, into the field, comes from cache.
#include "cpu/allocate.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>

#include "cpu/ordered_sum.h"
#include "star_math.h"

namespace star::STAR_ISA {

namespace {

template <typename T>
T mean_of(const T* values, int64_t count) {
  return T(ordered_sum(count, [&](int64_t i) { return double(values[i]); }) / double(count));
}

// Combines the concepts that are there into the field. False if there is none, or a map is not usable.
template <typename Q, typename T>
bool combine(const AllocateArgs<Q, T>& args, int64_t index, T* __restrict field) {
  const int64_t tokens = args.frames * args.rows * args.columns;
  int64_t present = 0;
  std::fill_n(field, tokens, T(0));
  for (int64_t g = 0; g < args.concepts; g++) {
    const Q* map = args.maps + index * args.sample_stride + g * args.concept_stride;
    int unusable = 0;
#pragma omp simd reduction(| : unusable)
    for (int64_t i = 0; i < tokens; i++) unusable |= !usable_mass(T(map[i]));
    if (unusable) return false;
    const T mean = T(ordered_sum(tokens, [&](int64_t i) { return double(T(map[i])); }) / double(tokens));
    if (!std::isfinite(mean)) return false;
    present += mean > 0;
    if (args.largest) {
#pragma omp simd
      for (int64_t i = 0; i < tokens; i++) {
        const T mass = relative_mass(T(map[i]), mean);
        field[i] = mass > field[i] ? mass : field[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < tokens; i++) field[i] += relative_mass(T(map[i]), mean);
    }
  }
  if (!args.largest)
    for (int64_t i = 0; i < tokens; i++) field[i] /= T(present);
  return present > 0;
}

// Weighted mean of the neighbors along one axis of (outer, size, inner), whose inner places are vectors.
template <typename T>
void smooth_axis(const T* from, T* to, int64_t outer, int64_t size, int64_t inner, double sigma, T* taps, T* norms) {
  const int64_t radius = smoothing_radius(sigma, size);
  for (int64_t d = 0; d <= radius; d++) taps[d] = T(smoothing_tap(d, sigma));
  for (int64_t i = 0; i < size; i++) {
    double sum = 0;
    for (int64_t j = std::max<int64_t>(0, i - radius); j <= std::min(size - 1, i + radius); j++)
      sum += smoothing_tap<double>(i - j, sigma);
    norms[i] = T(1 / sum);
  }
  std::fill_n(to, outer * size * inner, T(0));
  for (int64_t o = 0; o < outer; o++) {
    for (int64_t d = -radius; d <= radius; d++) {
      // All places whose neighbor at distance d is on the grid, in one go.
      const int64_t first = std::max<int64_t>(0, -d), last = std::min(size, size - d);
      const T tap = taps[std::abs(d)];
      T* __restrict target = to + (o * size + first) * inner;
      const T* __restrict source = from + (o * size + first + d) * inner;
#pragma omp simd
      for (int64_t i = 0; i < (last - first) * inner; i++) target[i] += tap * source[i];
    }
    for (int64_t i = 0; i < size; i++)
      for (int64_t k = 0; k < inner; k++) to[(o * size + i) * inner + k] *= norms[i];
  }
}

}  // namespace

template <typename Q, typename T>
void allocate_sample(const AllocateArgs<Q, T>& args, int64_t index, T* scratch) {
  const int64_t columns = args.columns, rows = args.frames * args.rows, tokens = rows * columns, patch = args.patch;
  const int64_t width = columns * patch;
  T *field = scratch, *other = scratch + tokens, *taps = scratch + 2 * tokens, *norms = scratch + 3 * tokens;
  T* weights = args.weights + index * rows * patch * width;
  if (!combine(args, index, field)) {
    std::fill_n(weights, rows * patch * width, T(1));
    return;
  }
  if (args.smooth > 0) {
    smooth_axis(field, other, args.frames, args.rows, columns, args.smooth, taps, norms);
    smooth_axis(other, field, rows, columns, 1, args.smooth, taps, norms);
  }
  if (args.sharpen != 1) {
    T largest = 0;
    for (int64_t i = 0; i < tokens; i++) largest = field[i] > largest ? field[i] : largest;
    for (int64_t i = 0; i < tokens; i++) field[i] = sharpened(field[i], largest, args.sharpen);
  }
  const T mean = mean_of(field, tokens);
  for (int64_t i = 0; i < tokens; i++) field[i] = mixed(field[i], mean, args.cap, args.mix);
  const T total = mean_of(field, tokens);
  for (int64_t row = 0; row < rows; row++) {
    T* line = weights + row * patch * width;
    for (int64_t column = 0; column < columns; column++)
      std::fill_n(line + column * patch, patch, field[row * columns + column] / total);
    for (int64_t copy = 1; copy < patch; copy++) std::copy_n(line, width, line + copy * width);
  }
}

#define STAR_INSTANTIATE(Q, T) template void allocate_sample<Q, T>(const AllocateArgs<Q, T>&, int64_t, T*);
STAR_INSTANTIATE(double, double)
STAR_INSTANTIATE(float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, float)
STAR_INSTANTIATE(torch::headeronly::Half, float)

}  // namespace star::STAR_ISA
