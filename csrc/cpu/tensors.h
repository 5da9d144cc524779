// What the front ends of the CPU share.
#pragma once
#include <vector>

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

 private:
  std::vector<Tensor> alive;
};

}  // namespace star

#define STAR_REGISTER(NAME, FUNCTION) \
  STABLE_TORCH_LIBRARY_IMPL(star, CPU, library) { library.impl(#NAME "_native", TORCH_BOX((&FUNCTION))); }
