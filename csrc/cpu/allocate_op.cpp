// star::allocate_native for CPU tensors: runs the kernel per sample.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>

#include "cpu/allocate.h"

namespace star {
namespace {

constexpr int64_t GRAIN = 32768;  // values: for fewer it is not worth waking a thread

template <typename Q, typename T>
at::Tensor run(const at::Tensor& maps, int64_t rows, int64_t columns, c10::string_view combine, double smooth,
               double sharpen, double cap, double mix, int64_t patch) {
  const int64_t batch = maps.size(0), tokens = rows * columns;
  const at::Tensor read = maps.stride(2) == 1 ? maps : maps.contiguous();
  const auto options = maps.options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor weights = at::empty({batch, rows * patch, columns * patch}, options);
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
  at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[4 * tokens]);
    for (int64_t index = begin; index < end; index++) kernel(args, index, scratch.get());
  });
  return weights;
}

at::Tensor allocate(const at::Tensor& maps, int64_t rows, int64_t columns, c10::string_view combine, double smooth,
                    double sharpen, double cap, double mix, int64_t patch) {
  auto call = [&]<typename Q, typename T>(Q*, T*) {
    return run<Q, T>(maps, rows, columns, combine, smooth, sharpen, cap, mix, patch);
  };
  double* d = nullptr;
  float* f = nullptr;
  c10::BFloat16* bf = nullptr;
  c10::Half* h = nullptr;
  switch (maps.scalar_type()) {
    case at::kDouble: return call(d, d);
    case at::kBFloat16: return call(bf, f);
    case at::kHalf: return call(h, f);
    case at::kFloat: return call(f, f);
    default: TORCH_CHECK_TYPE(false, "maps: got ", maps.scalar_type(), ", expected a floating-point tensor");
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(star, CPU, library) { library.impl("allocate_native", &allocate); }

}  // namespace star
