// What the launchers share. They use libtorch's stable ABI, and nothing of libtorch_cuda: the same file serves every
// later torch, and imports beside a torch without CUDA. A launch allocates nothing but tensors of torch's caching
// allocator, never waits for the GPU, and goes to the current stream: CUDA graphs can capture it.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <vector>

#include "cuda/device.cuh"
#include "operators.h"

namespace star::cuda {

#ifdef CUDA_ON_HOST

struct CurrentStream {
  explicit CurrentStream(const Tensor&) {}
  int handle = 0;
};

inline void check_launch() {}

// One operator for each order in which the threads may run.
#define STAR_REGISTER(NAME, FUNCTION)                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(star, CPU, library) {                                                         \
    using cuda_on_host::Order, cuda_on_host::Ordered;                                                     \
    library.impl(#NAME "_cuda_forward", TORCH_BOX((&Ordered<Order::forward, &FUNCTION>::call)));          \
    library.impl(#NAME "_cuda_reverse", TORCH_BOX((&Ordered<Order::reverse, &FUNCTION>::call)));          \
    library.impl(#NAME "_cuda_shuffled", TORCH_BOX((&Ordered<Order::shuffled, &FUNCTION>::call)));        \
  }

#else

inline cudaStream_t current_stream(int32_t device) {
#if TORCH_TARGET_VERSION >= 0x020d000000000000
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else  // From libtorch_cuda: what is built beside an older torch does not import beside one without CUDA.
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
  return static_cast<cudaStream_t>(handle);
#endif
}

// Makes the tensor's device current, until the end of the scope, and has its current stream.
struct CurrentStream {
  explicit CurrentStream(const Tensor& tensor)
      : guard(tensor.get_device_index()), handle(current_stream(tensor.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t handle;
};

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "star_kernels: ", cudaGetErrorString(error));
}

// Only GPUs since sm_90 take the attribute.
template <typename Kernel, typename Args>
void launch_early(Kernel kernel, int64_t blocks, int threads, cudaStream_t stream, const Args& args) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args);
}

#define STAR_REGISTER(NAME, FUNCTION)                            \
  static const bool kept_##NAME = star::keep_signature(#NAME, &FUNCTION); \
  STABLE_TORCH_LIBRARY_IMPL(star, CUDA, library) {               \
    library.impl(#NAME "_native", TORCH_BOX((&FUNCTION)));         \
  }

#endif

// Inputs as the kernels read them. Converted copies live as long as this does; what is right already is not copied.
class Pointers {
 public:
  // Contiguous, of type T; null for none.
  template <typename T>
  const T* of(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    alive.push_back(ready(*tensor, scalar_type<T>));
    const auto* data = static_cast<const T*>(alive.back().const_data_ptr());
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return data;
  }

  // Contiguous, in its own type.
  Floats<const void> floats(const Tensor& tensor) {
    alive.push_back(ready(tensor, tensor.scalar_type()));
    const void* data = alive.back().const_data_ptr();
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return {data, floating_type(tensor)};
  }

  // A (B,) tensor where it is.
  PerSample per_sample(const OptionalTensor& tensor) {
    if (!tensor) return {};
    const bool is_double = tensor->scalar_type() == ScalarType::Double;
    const bool fits = is_double || tensor->scalar_type() == ScalarType::Float;
    alive.push_back(fits ? *tensor : torch::stable::to(*tensor, ScalarType::Float));
    return {alive.back().const_data_ptr(), alive.back().stride(0), is_double};
  }

  // Whether every pointer allows accesses of 16 bytes.
  bool aligned = true;

 private:
  std::vector<Tensor> alive;
};

inline int64_t blocks(int64_t count) {
  STD_TORCH_CHECK(count <= 0x7fffffff, "star_kernels: ", count, " blocks are more than a GPU takes at once");
  return count;
}

}  // namespace star::cuda
