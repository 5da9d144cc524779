// star::gaussian_step_native for CUDA tensors.
#include "cuda/gaussian_step.cuh"

#include <tuple>

#include "cuda/launch.h"

namespace star::cuda {
namespace {

template <typename T>
std::tuple<Tensor, Tensor> run(const Tensor& sample, const Tensor& velocity, const Tensor& noise, const Tensor& a,
                               const Tensor& b, const Tensor& s) {
  const CurrentStream stream(sample);
  Inputs inputs;
  Tensor prev_sample = torch::stable::new_empty(sample, sample.sizes(), sample.scalar_type());
  Tensor mean = torch::stable::new_empty(sample, sample.sizes(), scalar_type<T>);
  const int64_t batch = sample.size(0);
  GaussianStepArgs<T> args{
      .elements = batch ? sample.numel() / batch : 0,
      .tiles = 0,
      .sample = inputs.floats(sample),
      .velocity = inputs.floats(velocity),
      .noise = inputs.floats(noise),
      .a = inputs.per_sample(a),
      .b = inputs.per_sample(b),
      .s = inputs.per_sample(s),
      .prev_sample = {prev_sample.mutable_data_ptr(), sample.scalar_type()},
      .mean = static_cast<T*>(mean.mutable_data_ptr()),
  };
  if (args.elements == 0) return {prev_sample, mean};
  const bool wide = inputs.aligned && args.elements % STEP_VECTOR == 0;
  const int64_t tile = THREADS * (wide ? STEP_VECTOR : 1);
  args.tiles = (args.elements + tile - 1) / tile;
  if (wide)
    STAR_LAUNCH((gaussian_step_kernel<T, STEP_VECTOR>), blocks(batch * args.tiles), THREADS, stream.handle, args);
  else
    STAR_LAUNCH((gaussian_step_kernel<T, 1>), blocks(batch * args.tiles), THREADS, stream.handle, args);
  check_launch();
  return {prev_sample, mean};
}

std::tuple<Tensor, Tensor> gaussian_step(const Tensor& sample, const Tensor& velocity, const Tensor& noise,
                                         const Tensor& a, const Tensor& b, const Tensor& s) {
  const bool wide = sample.scalar_type() == ScalarType::Double || velocity.scalar_type() == ScalarType::Double;
  return (wide ? run<double> : run<float>)(sample, velocity, noise, a, b, s);
}

}  // namespace

STAR_REGISTER(gaussian_step, gaussian_step)

}  // namespace star::cuda
