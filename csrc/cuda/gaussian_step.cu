// star::gaussian_step_native for CUDA tensors.
#include "cuda/gaussian_step.cuh"

#include "cuda/launch.h"

namespace star::cuda {
namespace {

template <typename T>
GaussianStepResult run_as(const GaussianStepInputs& inputs) {
  const Tensor& sample = inputs.sample;
  const CurrentStream stream(sample);
  Pointers pointers;
  Tensor prev_sample = new_empty(sample, sample.sizes(), sample.scalar_type());
  Tensor mean = new_empty(sample, sample.sizes(), scalar_type<T>);
  const int64_t batch = sample.size(0);
  GaussianStepArgs<T> args{
      .elements = batch ? sample.numel() / batch : 0,
      .tiles = 0,
      .sample = pointers.floats(sample),
      .velocity = pointers.floats(inputs.velocity),
      .noise = pointers.floats(any_double(inputs.noise) ? converted(inputs.noise, scalar_type<T>) : inputs.noise),
      .a = pointers.per_sample(inputs.a),
      .b = pointers.per_sample(inputs.b),
      .s = pointers.per_sample(inputs.s),
      .prev_sample = {prev_sample.mutable_data_ptr(), sample.scalar_type()},
      .mean = static_cast<T*>(mean.mutable_data_ptr()),
  };
  if (args.elements == 0) return {prev_sample, mean};
  const bool wide = pointers.aligned && args.elements % STEP_VECTOR == 0;
  const int64_t tile = THREADS * (wide ? STEP_VECTOR : 1);
  args.tiles = (args.elements + tile - 1) / tile;
  if (wide)
    STAR_LAUNCH((gaussian_step_kernel<T, STEP_VECTOR>), blocks(batch * args.tiles), THREADS, stream.handle, args);
  else
    STAR_LAUNCH((gaussian_step_kernel<T, 1>), blocks(batch * args.tiles), THREADS, stream.handle, args);
  check_launch();
  return {prev_sample, mean};
}

GaussianStepResult run(const GaussianStepInputs& inputs) {
  return any_double(inputs.sample, inputs.velocity) ? run_as<double>(inputs) : run_as<float>(inputs);
}

}  // namespace

STAR_REGISTER(gaussian_step, gaussian_step<run>)

}  // namespace star::cuda
