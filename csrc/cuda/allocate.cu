// star::allocate_native for CUDA tensors.
#include "cuda/allocate.cuh"

#include <string>

#include "cuda/launch.h"

namespace star::cuda {
namespace {

template <typename T>
Tensor run(const Tensor& maps, int64_t rows, int64_t columns, const std::string& combine, double smooth, double sharpen,
           double cap, double mix, int64_t patch) {
  const CurrentStream stream(maps);
  const int64_t batch = maps.size(0), concepts = maps.size(1);
  STD_TORCH_CHECK(rows * patch * columns * patch <= 0x7fffffff, "allocate: a sample of ", rows * patch, " x ",
                  columns * patch, " places is too large");
  const Tensor read = maps.stride(2) == 1 ? maps : torch::stable::contiguous(maps);
  Tensor weights = torch::stable::new_empty(maps, {batch, rows * patch, columns * patch}, scalar_type<T>);
  Tensor workspace =
      torch::stable::new_empty(maps, {batch * workspace_of(concepts, rows, columns)}, scalar_type<T>);
  const AllocateArgs<T> args{
      .concepts = concepts,
      .rows = int(rows),
      .columns = int(columns),
      .patch = int(patch),
      .maps = {read.const_data_ptr(), read.scalar_type()},
      .sample_stride = read.stride(0),
      .concept_stride = read.stride(1),
      .largest = combine == "max",
      .smooth = smooth,
      .sharpen = T(sharpen),
      .cap = T(cap),
      .mix = T(mix),
      .workspace = static_cast<T*>(workspace.mutable_data_ptr()),
      .weights = static_cast<T*>(weights.mutable_data_ptr()),
  };
  if (batch > 0) STAR_LAUNCH((allocate_kernel<T>), blocks(batch), THREADS, stream.handle, args);
  check_launch();
  return weights;
}

Tensor allocate(const Tensor& maps, int64_t rows, int64_t columns, const std::string& combine, double smooth,
                double sharpen, double cap, double mix, int64_t patch) {
  const bool wide = maps.scalar_type() == ScalarType::Double;
  return (wide ? run<double> : run<float>)(maps, rows, columns, combine, smooth, sharpen, cap, mix, patch);
}

}  // namespace

STAR_REGISTER(allocate, allocate)

}  // namespace star::cuda
