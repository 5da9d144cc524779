// star::attention_maps_native and star::write_attention_maps_native for CPU tensors: list each row's distinct columns, run
// the kernel per (row, query tile).
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

// A column that several slots name is computed once. In ascending order: a table by column would be as long as the keys.
Columns distinct_columns(const Tensor& index, int64_t keys) {
  Columns columns;
  const Tensor ordered = ready(index, ScalarType::Long);
  const int64_t *slot = ordered.const_data_ptr<int64_t>(), rows = index.size(0), slots = index.size(1) * index.size(2);
  std::vector<int64_t>& column = columns.column;
  column.reserve(rows * slots);
  columns.place.reserve(rows * slots);
  columns.start.reserve(rows + 1);
  for (int64_t row = 0; row < rows; row++, slot += slots) {
    for (const int64_t* one = slot; one < slot + slots; one++) {
      if (*one < -1 || *one >= keys) {
        // Python's ValueError, which STD_TORCH_CHECK cannot raise.
        throw std::invalid_argument("concept_index: got " + std::to_string(*one) + ", expected -1 or a column in [0, " +
                                    std::to_string(keys) + ")");
      }
      if (*one >= 0) column.push_back(*one);
    }
    const auto first = column.begin() + columns.start.back();
    std::sort(first, column.end());
    column.erase(std::unique(first, column.end()), column.end());
    for (const int64_t* one = slot; one < slot + slots; one++)
      columns.place.push_back(*one < 0 ? -1 : std::lower_bound(first, column.end(), *one) - first);
    columns.most = std::max(columns.most, int64_t(column.size()) - columns.start.back());
    columns.start.push_back(int64_t(column.size()));
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

// Of the rows from first_row on, as many as concept_index has, and the queries from first_query on, as many as maps has.
template <typename Q, typename T>
void write_as(const AttentionMapsInputs& inputs, int64_t first_row, int64_t first_query, const Tensor& maps) {
  const auto type = scalar_type<T>;
  const Tensor query = converted(inputs.query, scalar_type<Q>), key = converted(inputs.key, scalar_type<Q>);
  const Tensor& concept_index = inputs.concept_index;
  const int64_t rows = concept_index.size(0), heads = query.size(1), queries = maps.size(2);
  const Tensor bias = inputs.key_bias ? ready(*inputs.key_bias, type) : Tensor();
  const Given<T> weight(inputs.concept_weight, concept_index.numel(), 1);
  const Given<T> share(inputs.head_weight, heads, T(1.0 / double(heads)));
  const Tensor norm = inputs.lse ? converted(*inputs.lse, type) : Tensor();
  const Columns columns = distinct_columns(concept_index, key.size(2));

  AttentionMapsArgs<Q, T> args{
      .heads = heads,
      .key_heads = key.size(1),
      .queries = queries,
      .keys = key.size(2),
      .width = query.size(3),
      .groups = concept_index.size(1),
      .slots = concept_index.size(2),
      .query = query.const_data_ptr<Q>() + first_row * query.stride(0) + first_query * query.stride(2),
      .key = key.const_data_ptr<Q>() + first_row * key.stride(0),
      .query_strides = {query.stride(0), query.stride(1), query.stride(2), query.stride(3)},
      .key_strides = {key.stride(0), key.stride(1), key.stride(2), key.stride(3)},
      .lse = nullptr,
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
  if (inputs.lse) {
    for (int axis = 0; axis < 3; axis++) args.lse_strides[axis] = norm.stride(axis);
    args.lse = norm.const_data_ptr<T>() + first_row * norm.stride(0) + first_query * norm.stride(2);
  }

  const auto kernel = STAR_SELECT(attention_maps_tile<Q, T>);
  const int64_t bytes = STAR_SELECT(attention_maps_scratch<T>)(args.width, columns.most);
  const int64_t tiles = (queries + MAP_TILE - 1) / MAP_TILE;
  parallel_for(0, rows * tiles, 1, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t alignment{64};
    const auto free = [](void* memory) { ::operator delete(memory, alignment); };
    const std::unique_ptr<void, decltype(free)> scratch(::operator new(bytes, alignment), free);
    for (int64_t task = begin; task < end; task++) kernel(args, task / tiles, task % tiles, scratch.get());
  });
}

void write_part(const AttentionMapsInputs& inputs, int64_t first_row, int64_t first_query, const Tensor& maps) {
  const ScalarType type = inputs.query.scalar_type();
  const bool same = inputs.key.scalar_type() == type;
  const auto run = any_double(inputs.query, inputs.key)   ? &write_as<double, double>
                   : same && type == ScalarType::BFloat16 ? &write_as<BFloat16, float>
                   : same && type == ScalarType::Half     ? &write_as<Half, float>
                                                          : &write_as<float, float>;
  run(inputs, first_row, first_query, maps);
}

Tensor run(const AttentionMapsInputs& inputs) {
  const ScalarType type = any_double(inputs.query, inputs.key) ? ScalarType::Double : ScalarType::Float;
  const std::initializer_list<int64_t> sizes = {inputs.query.size(0), inputs.concept_index.size(1), inputs.query.size(2)};
  Tensor maps = new_empty(inputs.query, sizes, type);
  write_part(inputs, 0, 0, maps);
  return maps;
}

void write(const WriteAttentionMapsInputs& inputs) {
  const auto& [query, key, concept_index, concept_weight, lse, scale, head_weight, key_bias] = inputs.maps;
  const Tensor& out = inputs.out;
  const int64_t rows = concept_index.size(0), last_row = inputs.first_row + rows;
  const int64_t queries = out.size(2), last_query = inputs.first_query + queries;
  const ScalarType type = any_double(query, key) ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(out.scalar_type() == type && out.is_contiguous(), "out: expected contiguous memory of the maps' type");
  STD_TORCH_CHECK(out.size(0) == rows && out.size(1) == concept_index.size(1), "out: has another shape than the maps");
  STD_TORCH_CHECK(inputs.first_row >= 0 && last_row <= query.size(0) && last_row <= key.size(0) &&
                      (!lse || last_row <= lse->size(0)),
                  "first_row: there are fewer rows");
  STD_TORCH_CHECK(inputs.first_query >= 0 && last_query <= query.size(2) && (!lse || last_query <= lse->size(2)),
                  "first_query: there are fewer queries");
  write_part(inputs.maps, inputs.first_row, inputs.first_query, out);
}

}  // namespace

STAR_REGISTER(attention_maps, attention_maps<run>)
STAR_REGISTER(write_attention_maps, write_attention_maps<write>)

}  // namespace star
