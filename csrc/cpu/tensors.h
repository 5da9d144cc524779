// What the front ends of the CPU share.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/tiles.h"
#include "operators.h"

namespace star {

using torch::stable::parallel_for;

// Tensors as kernels read them. Converted copies live as long as this does.
class Pointers {
 public:
  // Contiguous, of type T; null for none.
  template <typename T>
  const T* of(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    alive.push_back(ready(*tensor, scalar_type<T>));
    return alive.back().const_data_ptr<T>();
  }

  // Contiguous, in its own type.
  Floats<const void> floats(const Tensor& tensor) {
    alive.push_back(ready(tensor, tensor.scalar_type()));
    return {alive.back().const_data_ptr(), floating_type(tensor)};
  }

  // Null for none.
  Floats<const void> floats(const OptionalTensor& tensor) {
    return tensor ? floats(*tensor) : Floats<const void>{nullptr, ScalarType::Float};
  }

 private:
  std::vector<Tensor> alive;
};

// Whether every thread can have samples of its own.
template <typename Args>
bool enough_samples(const Args& args) {
  return args.batch >= int64_t(torch::stable::get_num_threads());
}

// Calls span(sample, first location, last) for all locations of samples, on all threads. A span is one tile where threads
// are more than the samples, else several.
template <typename Args, typename F>
void each_span(const Args& args, int64_t begin, int64_t end, F span) {
  const int64_t length = LOSS_TILE * (enough_samples(args) ? LOSS_TILES : 1), each = (args.locations + length - 1) / length;
  parallel_for(begin * each, end * each, 1, [&](int64_t first, int64_t last) {
    for (int64_t number = first; number < last; number++) {
      const int64_t at = number % each * length;
      span(number / each, at, std::min(at + length, args.locations));
    }
  });
}

// Calls sum for all spans of every sample, finish(sample), and if there is memory for a gradient, write for all spans.
// One sample after the other, a sample's inputs are still in cache when its gradient is made. Threads that are more than
// the samples share out their tiles instead.
template <typename Args, typename Sum, typename Finish, typename Write>
void each_sample(const Args& args, Sum sum, Finish finish, Write write) {
  auto run = [&](int64_t begin, int64_t end) {
    each_span(args, begin, end, sum);
    for (int64_t index = begin; index < end; index++) finish(index);
    if (args.gradient) each_span(args, begin, end, write);
  };
  if (args.gradient && enough_samples(args))
    parallel_for(0, args.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; index++) run(index, index + 1);
    });
  else
    run(0, args.batch);
}

}  // namespace star

#define STAR_REGISTER(NAME, FUNCTION)                                           \
  static const bool kept_##NAME = star::keep_signature(#NAME, &FUNCTION); \
  STABLE_TORCH_LIBRARY_IMPL(star, CPU, library) { library.impl(#NAME "_native", TORCH_BOX((&FUNCTION))); }
