// star::gaussian_step_native for CUDA tensors.
#include "cuda/gaussian_step.cuh"

#include "cuda/launch.h"

namespace star::cuda {
namespace {

template <typename T, int N>
void launch(const GaussianStepArgs<T>& args, int64_t count, const CurrentStream& stream) {
  if (args.seeds)
    STAR_LAUNCH((gaussian_step_kernel<T, N, true>), blocks(count), THREADS, stream.handle, args);
  else
    STAR_LAUNCH((gaussian_step_kernel<T, N, false>), blocks(count), THREADS, stream.handle, args);
  check_launch();
}

template <typename T>
GaussianStepResult run_as(const GaussianStepInputs& inputs) {
  const Tensor& sample = inputs.sample;
  const CurrentStream stream(sample);
  Pointers pointers;
  Tensor prev_sample = new_empty(sample, sample.sizes(), sample.scalar_type());
  Tensor mean = new_empty(sample, sample.sizes(), scalar_type<T>);
  const int64_t batch = sample.size(0);
  const OptionalTensor seeds = inputs.seeds ? OptionalTensor(ready(*inputs.seeds, ScalarType::Long)) : std::nullopt;
  const bool narrow = inputs.noise && scalar_type<T> != ScalarType::Double && any_double(*inputs.noise);
  const OptionalTensor noise = narrow ? OptionalTensor(converted(*inputs.noise, scalar_type<T>)) : inputs.noise;
  const Floats<const void> velocity = pointers.floats(inputs.velocity);
  // What is not there is read from the velocity, which is in the cache: a branch around a load takes registers.
  auto or_velocity = [&](const OptionalTensor& tensor) { return tensor ? pointers.floats(*tensor) : velocity; };
  GaussianStepArgs<T> args{
      .elements = batch ? sample.numel() / batch : 0,
      .tiles = 0,
      .sample = pointers.floats(sample),
      .velocity = velocity,
      .unconditional_velocity = or_velocity(inputs.unconditional_velocity),
      .noise = or_velocity(noise),
      .guided = inputs.unconditional_velocity.has_value(),
      .noised = noise.has_value(),
      .guidance_scale = T(inputs.guidance_scale),
      .seeds = seeds ? static_cast<const int64_t*>(seeds->const_data_ptr()) : nullptr,
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
    launch<T, STEP_VECTOR>(args, batch * args.tiles, stream);
  else
    launch<T, 1>(args, batch * args.tiles, stream);
  return {prev_sample, mean};
}

GaussianStepResult run(const GaussianStepInputs& inputs) {
  return in_double(inputs) ? run_as<double>(inputs) : run_as<float>(inputs);
}

}  // namespace

STAR_REGISTER(gaussian_step, gaussian_step<run>)

}  // namespace star::cuda
