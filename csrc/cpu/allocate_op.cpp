// star::allocate_native for CPU tensors: runs the kernel per sample.
#include <algorithm>
#include <memory>
#include <string>

#include "cpu/allocate.h"
#include "cpu/tensors.h"

namespace star {
namespace {

constexpr int64_t GRAIN = 32768;  // values: for fewer it is not worth waking a thread

template <typename Q, typename T>
Tensor run(const Tensor& maps, int64_t rows, int64_t columns, const std::string& combine, double smooth,
           double sharpen, double cap, double mix, int64_t patch) {
  const int64_t batch = maps.size(0), tokens = rows * columns;
  const Tensor read = maps.stride(2) == 1 ? maps : ready(maps, maps.scalar_type());
  Tensor weights = new_empty(maps, {batch, rows * patch, columns * patch}, scalar_type<T>);
  const AllocateArgs<Q, T> args{
      .concepts = maps.size(1),
      .rows = rows,
      .columns = columns,
      .patch = patch,
      .maps = read.const_data_ptr<Q>(),
      .sample_stride = read.stride(0),
      .concept_stride = read.stride(1),
      .largest = combine == "max",
      .smooth = smooth,
      .sharpen = T(sharpen),
      .cap = T(cap),
      .mix = T(mix),
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

Tensor allocate(const Tensor& maps, int64_t rows, int64_t columns, const std::string& combine, double smooth,
                double sharpen, double cap, double mix, int64_t patch) {
  auto call = [&]<typename Q, typename T>(Q*, T*) {
    return run<Q, T>(maps, rows, columns, combine, smooth, sharpen, cap, mix, patch);
  };
  double* d = nullptr;
  float* f = nullptr;
  BFloat16* bf = nullptr;
  Half* h = nullptr;
  switch (maps.scalar_type()) {
    case ScalarType::Double: return call(d, d);
    case ScalarType::BFloat16: return call(bf, f);
    case ScalarType::Half: return call(h, f);
    case ScalarType::Float: return call(f, f);
    default: STD_TORCH_CHECK(false, "maps: expected a floating-point tensor");
  }
}

}  // namespace

STAR_REGISTER(allocate, allocate)

}  // namespace star
