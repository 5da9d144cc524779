// What the CUDA kernels share: 16-byte vectors, sums in a fixed order, values per sample.
// Everything compiles twice: with nvcc for the GPU, and as plain C++ for the tests (tests/cuda_on_host).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#define STAR_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
// The shared memory of a block: one struct per kernel.
#define STAR_SHARED(T, name) __shared__ T name
#endif

#include "floats.h"
#include "star_math.h"

namespace star::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// Elements of T in one 16-byte access.
template <typename T>
constexpr int WIDE = 16 / sizeof(T);

// N neighboring elements, loaded and stored in accesses of 16 bytes (or of one element, N = 1).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T element[N];
};

template <typename T, int N>
STAR_HD Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <typename T, int N>
STAR_HD void store(T* to, const Vector<T, N>& vector) {
  if constexpr (sizeof(vector) % 16 == 0) {
    // Left to itself the compiler takes a vector apart in loops.
    uint4 chunk[sizeof(vector) / 16];
    memcpy(chunk, &vector, sizeof(vector));
    for (int i = 0; i < int(sizeof(vector) / 16); i++) __stwb(reinterpret_cast<uint4*>(to) + i, chunk[i]);
  } else {
    *reinterpret_cast<Vector<T, N>*>(to) = vector;
  }
}

// N elements in the type of the arithmetic.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const Floats<const void>& from, int64_t at) {
  Vector<T, N> out;
  typed(from, at, [&](const auto* values) {
    const auto vector = load<std::remove_cvref_t<decltype(*values)>, N>(values);
#pragma unroll
    for (int k = 0; k < N; k++) out.element[k] = T(vector.element[k]);
  });
  return out;
}

// One value per sample, read in place with its stride and type: converting (B,) tensors would cost a launch for each.
struct PerSample {
  const void* data = nullptr;
  int64_t stride = 0;
  bool is_double = false;

  template <typename T>
  __device__ __forceinline__ T at(int64_t index) const {
    return is_double ? T(static_cast<const double*>(data)[index * stride])
                     : T(static_cast<const float*>(data)[index * stride]);
  }
};

// Every lane gets the same bits: a + b and b + a are the same at each step. `lanes` neighbors, a power of two.
template <typename T>
__device__ __forceinline__ T warp_sum(T value, int lanes = WARP) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_min(T value) {
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    value = smaller(value, __shfl_xor_sync(ALL_LANES, value, offset));
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) value = larger(value, __shfl_xor_sync(ALL_LANES, value, offset));
  return value;
}

// Sum over a block of some warps, for every thread. `scratch` is a value of shared memory for each warp; calls may follow
// each other.
template <int warps, typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < warps; warp++) sum += scratch[warp];
  return sum;
}

// The largest over the block, for every thread; see block_sum.
template <int warps, typename T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  T most = scratch[0];
  for (int warp = 1; warp < warps; warp++) most = larger(most, scratch[warp]);
  return most;
}

}  // namespace star::cuda
