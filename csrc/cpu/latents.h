// What the kernels of the losses share: a pass over the latents of a tile, and sums of it.
#pragma once
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace star::STAR_ISA {

// Where locations [first, last) of a sample lie in tensors of latents and of locations.
struct Tile {
  int64_t latents, locations, count;  // the first element, the first location, the number of locations

  template <typename Args>
  Tile(const Args& args, int64_t index, int64_t first, int64_t last)
      : latents(index * args.channels * args.locations + (args.packed ? first * args.channels : first)),
        locations(index * args.locations + first),
        count(last - first) {}

  template <typename Args>
  int64_t rows(const Args& args) const { return args.packed ? count : args.channels; }
};

// Calls vector(at, location, count) for every vector of some rows of a tile, which are channels, or packed locations: its
// first element, that element's location within the tile and how many elements it has, which is a constant but at the end
// of a row. Packed, they all have the same location.
template <bool packed, typename T, typename Args, typename F>
STAR_INLINE void each_vector(const Args& args, const Tile& tile, int64_t begin, int64_t end, F vector) {
  constexpr int64_t WIDTH = LANES<T>;
  const int64_t length = packed ? args.channels : tile.count, stride = packed ? args.channels : args.locations;
  for (int64_t row = begin; row < end; row++) {
    const int64_t start = tile.latents + row * stride;
    int64_t i = 0;
    for (; i + WIDTH <= length; i += WIDTH) vector(start + i, packed ? row : i, WIDTH);
    if (i < length) vector(start + i, packed ? row : i, length - i);
  }
}

// One value for each of a vector's elements, of values of locations.
template <bool packed, typename T>
STAR_INLINE Vector<T> load_location(const T* values, int64_t location, int64_t count) {
  return packed ? broadcast(values[location]) : load_some<T>(values + location, count);
}

// Sums of vectors in double, in an order that their number alone decides. Each step adds to every sum, or to none.
template <typename T, int COUNT>
struct Sums {
  static constexpr int MANY = 64;  // steps that are added up in T before the sums go on in double
  double lanes[COUNT][LANES<T>] = {};
  Vector<T> recent[COUNT] = {};
  int pending = 0;

  STAR_ALWAYS void add(int which, Vector<T> value) { recent[which] += value; }
  STAR_ALWAYS void add_product(int which, Vector<T> left, Vector<T> right) {
    recent[which] = fma(left, right, recent[which]);
  }
  STAR_ALWAYS void next() {
    if (++pending == MANY) flush();
  }
  STAR_ALWAYS void flush() {
    for (int which = 0; which < COUNT; which++) {
      T values[LANES<T>];
      store(values, recent[which]);
#pragma omp simd
      for (int lane = 0; lane < LANES<T>; lane++) lanes[which][lane] += double(values[lane]);
      recent[which] = Vector<T>{};
    }
    pending = 0;
  }
  STAR_ALWAYS double value(int which) {
    flush();
    double sum = 0;
    for (int lane = 0; lane < LANES<T>; lane++) sum += lanes[which][lane];
    return sum;
  }
};

}  // namespace star::STAR_ISA
