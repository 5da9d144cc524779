// star::gaussian_step_native for CPU tensors: allocates the results, runs the kernel per block of a sample.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/gaussian_step.h"

namespace star {
namespace {

constexpr int64_t GRAIN = 32;  // blocks: for fewer it is not worth waking a thread

Float float_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Float::float64;
    case at::kFloat: return Float::float32;
    case at::kBFloat16: return Float::bfloat16;
    case at::kHalf: return Float::float16;
    default: TORCH_CHECK_TYPE(false, "gaussian_step: got ", type, ", expected a floating-point tensor");
  }
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& sample, const at::Tensor& velocity, const at::Tensor& noise,
                                       const at::Tensor& a, const at::Tensor& b, const at::Tensor& s) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const at::Tensor x = sample.contiguous(), v = velocity.contiguous(), z = noise.contiguous();
  const at::Tensor fields[3] = {a.to(type).contiguous(), b.to(type).contiguous(), s.to(type).contiguous()};
  at::Tensor prev_sample = at::empty(x.sizes(), x.options()), mean = at::empty(x.sizes(), x.options().dtype(type));
  const int64_t batch = x.size(0);
  const GaussianStepArgs<T> args{
      .elements = batch ? x.numel() / batch : 0,
      .sample = {x.const_data_ptr(), float_type(x.scalar_type())},
      .velocity = {v.const_data_ptr(), float_type(v.scalar_type())},
      .noise = {z.const_data_ptr(), float_type(z.scalar_type())},
      .a = fields[0].const_data_ptr<T>(),
      .b = fields[1].const_data_ptr<T>(),
      .s = fields[2].const_data_ptr<T>(),
      .prev_sample = prev_sample.mutable_data_ptr(),
      .mean = mean.mutable_data_ptr<T>(),
  };
  const auto kernel = STAR_SELECT(gaussian_step_block<T>);
  const int64_t blocks = (args.elements + STEP_BLOCK - 1) / STEP_BLOCK;
  at::parallel_for(0, batch * blocks, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) kernel(args, task / blocks, task % blocks);
  });
  return {prev_sample, mean};
}

std::tuple<at::Tensor, at::Tensor> gaussian_step(const at::Tensor& sample, const at::Tensor& velocity,
                                                 const at::Tensor& noise, const at::Tensor& a, const at::Tensor& b,
                                                 const at::Tensor& s) {
  const bool wide = sample.scalar_type() == at::kDouble || velocity.scalar_type() == at::kDouble;
  return (wide ? run<double> : run<float>)(sample, velocity, noise, a, b, s);
}

}  // namespace

TORCH_LIBRARY_IMPL(star, CPU, library) { library.impl("gaussian_step_native", &gaussian_step); }

}  // namespace star
