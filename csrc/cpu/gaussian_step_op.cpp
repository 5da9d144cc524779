// star::gaussian_step_native for CPU tensors: allocates the results, runs the kernel per block of a sample.
#include <algorithm>
#include <tuple>

#include "cpu/gaussian_step.h"
#include "cpu/tensors.h"

namespace star {
namespace {

constexpr int64_t GRAIN = 32;  // blocks: for fewer it is not worth waking a thread

Float float_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return Float::float64;
    case ScalarType::Float: return Float::float32;
    case ScalarType::BFloat16: return Float::bfloat16;
    case ScalarType::Half: return Float::float16;
    default: STD_TORCH_CHECK(false, "gaussian_step: expected floating-point tensors");
  }
}

template <typename T>
std::tuple<Tensor, Tensor> run(const Tensor& sample, const Tensor& velocity, const Tensor& noise, const Tensor& a,
                               const Tensor& b, const Tensor& s) {
  const auto type = scalar_type<T>;
  const Tensor x = ready(sample, sample.scalar_type()), v = ready(velocity, velocity.scalar_type());
  const Tensor z = ready(noise, noise.scalar_type());
  const Tensor fields[3] = {ready(a, type), ready(b, type), ready(s, type)};
  Tensor prev_sample = new_empty(x, x.sizes(), x.scalar_type()), mean = new_empty(x, x.sizes(), type);
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
  parallel_for(0, batch * blocks, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) kernel(args, task / blocks, task % blocks);
  });
  return {prev_sample, mean};
}

std::tuple<Tensor, Tensor> gaussian_step(const Tensor& sample, const Tensor& velocity, const Tensor& noise,
                                         const Tensor& a, const Tensor& b, const Tensor& s) {
  const bool wide = sample.scalar_type() == ScalarType::Double || velocity.scalar_type() == ScalarType::Double;
  return (wide ? run<double> : run<float>)(sample, velocity, noise, a, b, s);
}

}  // namespace

STAR_REGISTER(gaussian_step, gaussian_step)

}  // namespace star
