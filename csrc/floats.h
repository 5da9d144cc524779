// Elements of any floating type, for code with too many combinations of types to have one compiled for each.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "star_math.h"

namespace star {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Void: void or const void.
template <typename Void>
struct Floats {
  Void* data;
  ScalarType type;
};

STAR_HD int element_size(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// Calls use(pointer) with the typed address of element `at`. The lambda is for the device that this is compiled for.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Void, typename F>
STAR_HD void typed(const Floats<Void>& floats, int64_t at, F use) {
  auto address = [&]<typename Q>(std::type_identity<Q>) {
    return static_cast<std::conditional_t<std::is_const_v<Void>, const Q, Q>*>(floats.data) + at;
  };
  switch (floats.type) {
    case ScalarType::Double: return use(address(std::type_identity<double>()));
    case ScalarType::BFloat16: return use(address(std::type_identity<BFloat16>()));
    case ScalarType::Half: return use(address(std::type_identity<Half>()));
    default: return use(address(std::type_identity<float>()));
  }
}

}  // namespace star
