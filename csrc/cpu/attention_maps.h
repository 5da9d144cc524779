// What the front end (attention_maps_op.cpp) and the kernel (attention_maps_kernel.cpp) of attention_maps agree on.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace star {

constexpr int64_t MAP_TILE = 32;  // queries that one call works on: the same for every instruction set

// Q: type of query and key, T: of the arithmetic. Strides are in elements.
template <typename Q, typename T>
struct AttentionMapsArgs {
  int64_t heads, key_heads, queries, keys, width, groups, slots;  // heads / key_heads neighbors share a key head
  const Q *query, *key;
  int64_t query_strides[4], key_strides[4];  // (B, H, N, D), (B, key heads, S, D)
  const T* lse;                              // null: the kernel makes its own
  int64_t lse_strides[3];                    // (B, H, N)
  T scale;
  const T* key_bias;      // (B, S) contiguous, added to the scaled scores; null for none
  const T* head_weight;   // (H,)
  const int64_t* column;  // distinct key columns of all rows, those of row b in [column_start[b], column_start[b + 1])
  const int64_t* column_start;
  int64_t most_columns;  // of any row
  const int64_t* place;  // (B, G, K): where in the row's columns a slot's column is, -1 for an unused slot
  const T* weight;       // (B, G, K)
  T* maps;               // (B, G, N) contiguous
};

#define STAR_DECLARE(ISA)                                                                                     \
  namespace ISA {                                                                                             \
  template <typename T>                                                                                       \
  int64_t attention_maps_scratch(int64_t width, int64_t most_columns); /* bytes, at an address of 64 bytes */ \
  template <typename Q, typename T>                                                                           \
  void attention_maps_tile(const AttentionMapsArgs<Q, T>& args, int64_t row, int64_t tile, void* scratch);    \
  }
STAR_EACH_ISA(STAR_DECLARE)
#undef STAR_DECLARE

}  // namespace star
