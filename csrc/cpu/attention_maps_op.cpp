// star::attention_maps_native for CPU tensors: lists each row's distinct columns, runs the kernel per (row, query tile).
#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/attention_maps.h"
#include "cpu/tensors.h"

namespace star {
namespace {

struct Columns {
  std::vector<int64_t> column, start = {0}, place;
  int64_t most = 0;
};

// A column that several slots name is computed once.
Columns distinct_columns(const Tensor& index, int64_t keys) {
  Columns columns;
  const Tensor ordered = ready(index, ScalarType::Long);
  const int64_t *slot = ordered.const_data_ptr<int64_t>(), rows = index.size(0), slots = index.size(1) * index.size(2);
  columns.place.reserve(rows * slots);
  std::vector<int64_t> seen(keys, -1);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t i = 0; i < slots; i++, slot++) {
      if (*slot < -1 || *slot >= keys) {
        // Python's ValueError, which STD_TORCH_CHECK cannot raise.
        throw std::invalid_argument("concept_index: got " + std::to_string(*slot) + ", expected -1 or a column in [0, " +
                                    std::to_string(keys) + ")");
      }
      if (*slot >= 0 && seen[*slot] < columns.start.back()) {
        seen[*slot] = int64_t(columns.column.size());
        columns.column.push_back(*slot);
      }
      columns.place.push_back(*slot < 0 ? -1 : seen[*slot] - columns.start.back());
    }
    columns.most = std::max(columns.most, int64_t(columns.column.size()) - columns.start.back());
    columns.start.push_back(int64_t(columns.column.size()));
  }
  return columns;
}

// What was given, contiguous and of type T, or else equal values: memory that the call holds.
template <typename T>
struct Given {
  Tensor tensor;
  std::vector<T> equal;
  const T* data;

  Given(const OptionalTensor& given, int64_t count, T value) {
    if (given) {
      tensor = ready(*given, scalar_type<T>);
      data = tensor.const_data_ptr<T>();
    } else {
      equal.assign(count, value);
      data = equal.data();
    }
  }
};

template <typename Q, typename T>
Tensor run_as(const AttentionMapsInputs& inputs) {
  const auto type = scalar_type<T>;
  const Tensor query = converted(inputs.query, scalar_type<Q>), key = converted(inputs.key, scalar_type<Q>);
  const Tensor& concept_index = inputs.concept_index;
  const int64_t rows = query.size(0), heads = query.size(1), queries = query.size(2);
  const Tensor bias = inputs.key_bias ? ready(*inputs.key_bias, type) : Tensor();
  const Given<T> weight(inputs.concept_weight, concept_index.numel(), 1);
  const Given<T> share(inputs.head_weight, heads, T(1.0 / double(heads)));
  const Tensor norm = inputs.lse ? converted(*inputs.lse, type) : Tensor();
  const Columns columns = distinct_columns(concept_index, key.size(2));
  Tensor maps = new_empty(query, {rows, concept_index.size(1), queries}, type);

  AttentionMapsArgs<Q, T> args{
      .heads = heads,
      .key_heads = key.size(1),
      .queries = queries,
      .keys = key.size(2),
      .width = query.size(3),
      .groups = concept_index.size(1),
      .slots = concept_index.size(2),
      .query = query.const_data_ptr<Q>(),
      .key = key.const_data_ptr<Q>(),
      .query_strides = {query.stride(0), query.stride(1), query.stride(2), query.stride(3)},
      .key_strides = {key.stride(0), key.stride(1), key.stride(2), key.stride(3)},
      .lse = inputs.lse ? norm.const_data_ptr<T>() : nullptr,
      .lse_strides = {},
      .scale = T(inputs.scale),
      .key_bias = inputs.key_bias ? bias.const_data_ptr<T>() : nullptr,
      .head_weight = share.data,
      .column = columns.column.data(),
      .column_start = columns.start.data(),
      .most_columns = columns.most,
      .place = columns.place.data(),
      .weight = weight.data,
      .maps = maps.mutable_data_ptr<T>(),
  };
  if (inputs.lse)
    for (int axis = 0; axis < 3; axis++) args.lse_strides[axis] = norm.stride(axis);

  const auto kernel = STAR_SELECT(attention_maps_tile<Q, T>);
  const int64_t bytes = STAR_SELECT(attention_maps_scratch<T>)(args.width, columns.most);
  const int64_t tiles = (queries + MAP_TILE - 1) / MAP_TILE;
  parallel_for(0, rows * tiles, 1, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t alignment{64};
    const auto free = [](void* memory) { ::operator delete(memory, alignment); };
    const std::unique_ptr<void, decltype(free)> scratch(::operator new(bytes, alignment), free);
    for (int64_t task = begin; task < end; task++) kernel(args, task / tiles, task % tiles, scratch.get());
  });
  return maps;
}

Tensor run(const AttentionMapsInputs& inputs) {
  const ScalarType type = inputs.query.scalar_type();
  if (any_double(inputs.query, inputs.key)) return run_as<double, double>(inputs);
  if (type == ScalarType::BFloat16 && inputs.key.scalar_type() == type) return run_as<BFloat16, float>(inputs);
  if (type == ScalarType::Half && inputs.key.scalar_type() == type) return run_as<Half, float>(inputs);
  return run_as<float, float>(inputs);
}

}  // namespace

STAR_REGISTER(attention_maps, attention_maps<run>)

}  // namespace star
