// What the front ends share. They use libtorch's stable ABI and its header-only types alone: the same file serves every
// later torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace star {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
constexpr ScalarType scalar_type = torch::headeronly::CppTypeToScalarType<T>::value;

// The tensor itself where it has the type already.
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Contiguous too.
inline Tensor ready(const Tensor& tensor, ScalarType type) {
  const Tensor out = converted(tensor, type);
  return out.is_contiguous() ? out : torch::stable::contiguous(out);
}

}  // namespace star

#define STAR_REGISTER(NAME, FUNCTION) \
  STABLE_TORCH_LIBRARY_IMPL(star, CPU, library) { library.impl(#NAME "_native", TORCH_BOX(&FUNCTION)); }
