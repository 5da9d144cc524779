// star::allocate_native for CPU tensors: runs the kernel per sample.
#include <algorithm>
#include <memory>

#include "cpu/allocate.h"
#include "cpu/tensors.h"

namespace star {
namespace {

constexpr int64_t GRAIN = 32768;  // values: for fewer it is not worth waking a thread

template <typename Q, typename T>
Tensor run_as(const AllocateInputs& inputs) {
  const Tensor& maps = inputs.maps;
  const int64_t batch = maps.size(0), rows = inputs.rows, columns = inputs.columns, patch = inputs.patch;
  const int64_t tokens = maps.size(2), frames = tokens / (rows * columns);
  const Tensor read = maps.stride(2) == 1 ? maps : ready(maps, maps.scalar_type());
  Tensor weights = new_empty(maps, {batch, frames * rows * patch, columns * patch}, scalar_type<T>);
  const AllocateArgs<Q, T> args{
      .concepts = maps.size(1),
      .frames = frames,
      .rows = rows,
      .columns = columns,
      .patch = patch,
      .maps = read.const_data_ptr<Q>(),
      .sample_stride = read.stride(0),
      .concept_stride = read.stride(1),
      .largest = inputs.combine == "max",
      .smooth = inputs.smooth,
      .sharpen = T(inputs.sharpen),
      .cap = T(inputs.cap),
      .mix = T(inputs.mix),
      .weights = weights.mutable_data_ptr<T>(),
  };
  const auto kernel = STAR_SELECT(allocate_sample<Q, T>);
  const int64_t work = std::max<int64_t>(1, tokens * (args.concepts + patch * patch));
  const int64_t grain = std::max<int64_t>(1, GRAIN / work);
  parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[4 * tokens]);
    for (int64_t index = begin; index < end; index++) kernel(args, index, scratch.get());
  });
  return weights;
}

Tensor run(const AllocateInputs& inputs) {
  switch (floating_type(inputs.maps)) {
    case ScalarType::Double: return run_as<double, double>(inputs);
    case ScalarType::BFloat16: return run_as<BFloat16, float>(inputs);
    case ScalarType::Half: return run_as<Half, float>(inputs);
    default: return run_as<float, float>(inputs);
  }
}

}  // namespace

STAR_REGISTER(allocate, allocate<run>)

}  // namespace star
