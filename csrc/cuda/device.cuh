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
// The same for a kernel that says where it needs the launch before it (await_previous): all that precedes starts early.
#define STAR_LAUNCH_EARLY(kernel, blocks, threads, stream, ...) \
  launch_early(kernel, blocks, threads, stream, __VA_ARGS__)
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
  // Left to itself the compiler takes a vector apart in loops.
  if constexpr (sizeof(vector) % 16 == 0) {
    uint4 chunk[sizeof(vector) / 16];
    memcpy(chunk, &vector, sizeof(vector));
    for (int i = 0; i < int(sizeof(vector) / 16); i++) __stwb(reinterpret_cast<uint4*>(to) + i, chunk[i]);
  } else if constexpr (sizeof(vector) == 8) {
    uint2 chunk;
    memcpy(&chunk, &vector, sizeof(vector));
    __stwb(reinterpret_cast<uint2*>(to), chunk);
  } else {
    *reinterpret_cast<Vector<T, N>*>(to) = vector;
  }
}

// The same for what no later launch reads: it leaves the second-level cache before anything else.
template <typename T, int N>
STAR_HD Vector<T, N> load_once(const T* from) {
  Vector<T, N> vector;
  if constexpr (sizeof(vector) % 16 == 0) {
    uint4 chunk[sizeof(vector) / 16];
    for (int i = 0; i < int(sizeof(vector) / 16); i++) chunk[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    memcpy(&vector, chunk, sizeof(vector));
  } else {
    vector = *reinterpret_cast<const Vector<T, N>*>(from);
  }
  return vector;
}

// N elements of a type at most as wide as T, as they lie in memory: to convert one tensor before the next is read would
// wait for memory each time.
template <typename T, int N>
struct Raw {
  alignas(16) unsigned char bytes[N * sizeof(T)];
};

template <typename T, int N>
__device__ __forceinline__ Raw<T, N> fetch(const Floats<const void>& from, int64_t at) {
  Raw<T, N> raw;
  if constexpr (N % 4 == 0) {  // without a branch for each type, in which the compiler would wait
    using Half = Vector<float, N / 2>;  // as many bytes as N elements of 2 bytes
    const int size = element_size(from.type);
    const auto* bytes = static_cast<const char*>(from.data) + at * size;
    if (size == 2) {
      const Half narrow = *reinterpret_cast<const Half*>(bytes);
      memcpy(raw.bytes, &narrow, sizeof(narrow));
    }
#pragma unroll
    for (int k = 0; k < int(sizeof(raw) / 16); k++)
      if (size > 2 && k * 4 < N * size / 4) {
        const uint4 chunk = reinterpret_cast<const uint4*>(bytes)[k];
        memcpy(raw.bytes + 16 * k, &chunk, 16);
      }
  } else {
    typed(from, at, [&]<typename Q>(const Q* values) {
      if constexpr (sizeof(Q) <= sizeof(T)) memcpy(raw.bytes, values, N * sizeof(Q));
    });
  }
  return raw;
}

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> values_of(const Raw<T, N>& raw, const Floats<const void>& from) {
  Vector<T, N> out;
  typed(from, 0, [&]<typename Q>(const Q*) {
    if constexpr (sizeof(Q) <= sizeof(T)) {
      Vector<Q, N> vector;
      memcpy(&vector, raw.bytes, sizeof(vector));
#pragma unroll
      for (int k = 0; k < N; k++) out.element[k] = T(vector.element[k]);
    }
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

// A launch that was told to start early waits here for the whole of the one before it, which lets it start with
// `let_next_start`. Before sm_90 launches start one after the other anyway.
__device__ __forceinline__ void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

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
  const int lane = threadIdx.x % WARP;
  return warp_sum(lane < warps ? scratch[lane] : T(0));
}

// The largest over the block, for every thread; see block_sum.
template <int warps, typename T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  const int lane = threadIdx.x % WARP;
  return warp_max(scratch[lane < warps ? lane : 0]);
}

}  // namespace star::cuda
