// star::allocate_native for CUDA tensors.
#include "cuda/allocate.cuh"

#include "cuda/launch.h"

namespace star::cuda {
namespace {

template <typename T>
Tensor run_as(const AllocateInputs& inputs) {
  const Tensor& maps = inputs.maps;
  const CurrentStream stream(maps);
  const int64_t rows = inputs.rows, columns = inputs.columns, patch = inputs.patch;
  const int64_t batch = maps.size(0), concepts = maps.size(1);
  const int64_t tokens = maps.size(2), height = tokens / columns * patch, width = columns * patch;
  STD_TORCH_CHECK(height * width <= 0x7fffffff, "allocate: a sample of ", height, " x ", width,
                  " places is too large");
  const Tensor read = maps.stride(2) == 1 ? maps : torch::stable::contiguous(maps);
  Tensor weights = new_empty(maps, {batch, height, width}, scalar_type<T>);
  const int64_t needed = workspace_of(concepts, tokens, rows, columns);
  const bool pooled = needed <= int64_t(POOL_BYTES / sizeof(T));
  Tensor workspace = new_empty(maps, {pooled ? 0 : batch * needed}, scalar_type<T>);
  const AllocateArgs<T> args{
      .concepts = int(concepts),
      .tokens = int(tokens),
      .rows = int(rows),
      .columns = int(columns),
      .patch = int(patch),
      .maps = {read.const_data_ptr(), floating_type(read)},
      .sample_stride = read.stride(0),
      .concept_stride = read.stride(1),
      .largest = inputs.combine == "max",
      .smooth = inputs.smooth,
      .sharpen = T(inputs.sharpen),
      .cap = T(inputs.cap),
      .mix = T(inputs.mix),
      .workspace = static_cast<T*>(workspace.mutable_data_ptr()),
      .weights = static_cast<T*>(weights.mutable_data_ptr()),
  };
  if (batch == 0) return weights;
  if (pooled)
    STAR_LAUNCH((allocate_kernel<T, true>), blocks(batch), ALLOCATE_THREADS, stream.handle, args);
  else
    STAR_LAUNCH((allocate_kernel<T, false>), blocks(batch), ALLOCATE_THREADS, stream.handle, args);
  check_launch();
  return weights;
}

Tensor run(const AllocateInputs& inputs) {
  return any_double(inputs.maps) ? run_as<double>(inputs) : run_as<float>(inputs);
}

}  // namespace

STAR_REGISTER(allocate, allocate<run>)

}  // namespace star::cuda
