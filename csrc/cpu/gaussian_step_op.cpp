// star::gaussian_step_native for CPU tensors: allocates the results, runs the kernel per block of a sample.
#include "cpu/gaussian_step.h"
#include "cpu/tensors.h"

namespace star {
namespace {

constexpr int64_t GRAIN = 32;  // blocks: for fewer it is not worth waking a thread

template <typename T>
GaussianStepResult run_as(const GaussianStepInputs& inputs) {
  const Tensor& sample = inputs.sample;
  const int64_t batch = sample.size(0);
  Tensor prev_sample = new_empty(sample, sample.sizes(), sample.scalar_type());
  Tensor mean = new_empty(sample, sample.sizes(), scalar_type<T>);
  Pointers pointers;
  const OptionalTensor seeds = inputs.seeds ? OptionalTensor(ready(*inputs.seeds, ScalarType::Long)) : std::nullopt;
  const GaussianStepArgs<T> args{
      .elements = batch ? sample.numel() / batch : 0,
      .sample = pointers.floats(sample),
      .velocity = pointers.floats(inputs.velocity),
      .unconditional_velocity = pointers.floats(inputs.unconditional_velocity),
      .noise = pointers.floats(inputs.noise),
      .guidance_scale = T(inputs.guidance_scale),
      .seeds = seeds ? seeds->const_data_ptr<int64_t>() : nullptr,
      .a = pointers.of<T>(inputs.a),
      .b = pointers.of<T>(inputs.b),
      .s = pointers.of<T>(inputs.s),
      .prev_sample = {prev_sample.mutable_data_ptr(), sample.scalar_type()},
      .mean = mean.mutable_data_ptr<T>(),
  };
  const auto kernel = STAR_SELECT(gaussian_step_block<T>);
  const int64_t blocks = (args.elements + STEP_BLOCK - 1) / STEP_BLOCK;
  parallel_for(0, batch * blocks, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) kernel(args, task / blocks, task % blocks);
  });
  return {prev_sample, mean};
}

GaussianStepResult run(const GaussianStepInputs& inputs) {
  return in_double(inputs) ? run_as<double>(inputs) : run_as<float>(inputs);
}

}  // namespace

STAR_REGISTER(gaussian_step, gaussian_step<run>)

}  // namespace star
