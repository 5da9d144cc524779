// attention_maps of MAP_TILE queries of one row. Vectors run over queries, so the queries of a head are transposed once
// and every key column, used in place, meets them as a broadcast: scores, log-sum-exp and maps need no sum across lanes.
// Heads and keys are taken in a fixed order by one thread: the bits depend on neither threads nor batch.
#include "cpu/attention_maps.h"

#include <cmath>

#include "cpu/simd.h"

namespace star::STAR_ISA {

namespace {

constexpr int64_t TILE = MAP_TILE;
constexpr int64_t BLOCK = 64;  // keys whose scores are held at once
#if defined(__AVX512F__)
constexpr int KEYS = 8;  // 8 keys x 2 vectors of queries of 32 registers; else 6 x 2 of 16
#else
constexpr int KEYS = 6;
#endif
constexpr int64_t BLOCK_PADDED = (BLOCK + KEYS - 1) / KEYS * KEYS;

template <typename T>
struct Scratch {
  T *query, *scores, *maps, *keys, *lse;  // (D, TILE), (BLOCK, TILE), (columns, TILE), (BLOCK, D), (TILE,)
  static int64_t size(int64_t width, int64_t columns) {
    return width * TILE + BLOCK_PADDED * TILE + columns * TILE + BLOCK * width + TILE;
  }
  Scratch(void* memory, int64_t width, int64_t columns) {
    query = static_cast<T*>(memory);
    scores = query + width * TILE;
    maps = scores + BLOCK_PADDED * TILE;
    lse = maps + columns * TILE;
    keys = lse + TILE;
  }
};

// LANES<T> values of a row from position d on, zeros beyond its end.
template <typename T, typename Q>
STAR_INLINE Vector<T> load_row(const Q* row, int64_t d, int64_t width, int64_t stride) {
  if (stride == 1 && d + LANES<T> <= width) return load_as<T>(row + d);
  alignas(64) unsigned char bytes[LANES<T> * sizeof(Q)] = {};
  for (int64_t i = 0; i < LANES<T> && d + i < width; i++)
    std::memcpy(bytes + i * sizeof(Q), row + (d + i) * stride, sizeof(Q));
  return load_as<T>(reinterpret_cast<const Q*>(bytes));
}

// The lines of the queries that come next, asked for one at a time between other work: all at once they would fill the
// buffers for misses, and the core would wait as it would for the lines themselves.
struct Ahead {
  const char* line;
  int64_t left, row, next_row;  // lines; lines of a row; bytes from a row's last line to the next row's first
  int64_t in_row = 0;

  template <typename Q, typename T>
  Ahead(const AttentionMapsArgs<Q, T>& args, const Q* query, int64_t count)
      : line(reinterpret_cast<const char*>(query)),
        row((args.width * int64_t(sizeof(Q)) + 63) / 64),
        next_row(args.query_strides[2] * int64_t(sizeof(Q)) - 64 * (row - 1)) {
    left = args.query_strides[3] == 1 ? count * row : 0;
  }
  STAR_ALWAYS void ask() {
    if (left == 0) return;
    __builtin_prefetch(line);
    left--;
    const bool last = ++in_row == row;
    line += last ? next_row : 64;
    in_row = last ? 0 : in_row;
  }
};

// Writes the tile's queries of one head as (D, TILE), the last query repeated beyond the end.
template <typename Q, typename T>
STAR_INLINE void pack_queries(const AttentionMapsArgs<Q, T>& args, const Q* query, int64_t count, T* packed) {
  const int64_t stride = args.query_strides[2], step = args.query_strides[3];
  for (int64_t first = 0; first < TILE; first += LANES<T>) {
    for (int64_t d = 0; d < args.width; d += LANES<T>) {
      Vector<T> rows[LANES<T>];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES<T>; i++) {
        const int64_t at = first + i < count ? first + i : count - 1;
        const Q* row = query + at * stride;
        rows[i] = load_row<T>(row, d, args.width, step);
      }
      transpose<T>(rows);
      const int64_t valid = args.width - d < LANES<T> ? args.width - d : LANES<T>;
      if (valid == LANES<T>) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < LANES<T>; i++) store(packed + (d + i) * TILE + first, rows[i]);
      } else {
        for (int64_t i = 0; i < valid; i++) store(packed + (d + i) * TILE + first, rows[i]);
      }
    }
  }
}

// Points at `count` key rows in the type of the arithmetic, in place or converted, the last repeated up to whole KEYS.
template <typename Q, typename T, typename Column>
STAR_INLINE void key_rows(const AttentionMapsArgs<Q, T>& args, const Q* key, Column column, int64_t count, T* converted,
                          const T** rows) {
  const int64_t step = args.key_strides[3];
  for (int64_t j = 0; j < count; j++) {
    const Q* row = key + column(j) * args.key_strides[2];
    if constexpr (std::is_same_v<Q, T>) {
      if (step == 1) {
        rows[j] = row;
        continue;
      }
    }
    T* copy = converted + j * args.width;
    for (int64_t d = 0; d < args.width; d += LANES<T>) {
      const Vector<T> value = load_row<T>(row, d, args.width, step);
      if (d + LANES<T> <= args.width) {
        store(copy + d, value);
      } else {
        std::memcpy(copy + d, &value, (args.width - d) * sizeof(T));
      }
    }
    rows[j] = copy;
  }
  for (int64_t j = count; j < BLOCK_PADDED; j++) rows[j] = rows[count - 1];
}

// bias[j] of `count` keys, zeros up to whole KEYS.
template <typename Q, typename T, typename Column>
STAR_INLINE void key_biases(const AttentionMapsArgs<Q, T>& args, int64_t row, Column column, int64_t count, T* bias) {
  for (int64_t j = 0; j < BLOCK_PADDED; j++)
    bias[j] = args.key_bias && j < count ? args.key_bias[row * args.keys + column(j)] : T(0);
}

// scores[j][i] = scale * q_i . k_j + bias[j] for `count` keys, rounded up to whole KEYS.
template <typename T>
STAR_INLINE void all_scores(const T* query, const T* const* keys, const T* bias, int64_t count, int64_t width, T scale,
                            T* scores, Ahead& ahead) {
  const Vector<T> factor = broadcast(scale);
  for (int64_t j = 0; j < count; j += KEYS) {
    const T* const* next = keys + (j + KEYS < count ? j + KEYS : j);
    for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T)))
      for (int k = 0; k < KEYS; k++) __builtin_prefetch(next[k] + d);
    for (int64_t first = 0; first < TILE; first += 2 * LANES<T>) {
      Vector<T> sum[KEYS][2] = {};
      const T* q = query + first;
      for (int64_t d = 0; d < width; d++, q += TILE) {
        ahead.ask();
        const Vector<T> left = load(q), right = load(q + LANES<T>);
#pragma GCC unroll 8
        for (int k = 0; k < KEYS; k++) {
          const Vector<T> value = broadcast(keys[j + k][d]);
          sum[k][0] = fma(left, value, sum[k][0]);
          sum[k][1] = fma(right, value, sum[k][1]);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < KEYS; k++) {
        const Vector<T> more = broadcast(bias[j + k]);
        store(scores + (j + k) * TILE + first, sum[k][0] * factor + more);
        store(scores + (j + k) * TILE + first + LANES<T>, sum[k][1] * factor + more);
      }
    }
  }
}

// Natural log-sum-exp of the tile's queries over all keys of one head, in one pass with a running maximum.
template <typename Q, typename T>
STAR_INLINE void own_lse(const AttentionMapsArgs<Q, T>& args, int64_t row, const Q* key, const Scratch<T>& scratch,
                         Ahead& ahead) {
  const T* rows[BLOCK_PADDED];
  T bias[BLOCK_PADDED];
  constexpr int vectors = TILE / LANES<T>;
  Vector<T> largest[vectors], sum[vectors];
  for (int v = 0; v < vectors; v++) {
    // Finite, so that a key masked by -inf adds 0 and a row of such keys sums to 0.
    largest[v] = broadcast(std::numeric_limits<T>::lowest());
    sum[v] = broadcast(T(0));
  }
  for (int64_t begin = 0; begin < args.keys; begin += BLOCK) {
    const int64_t count = args.keys - begin < BLOCK ? args.keys - begin : BLOCK;
    const auto column = [&](int64_t j) { return begin + j; };
    key_rows(args, key, column, count, scratch.keys, rows);
    key_biases(args, row, column, count, bias);
    all_scores(scratch.query, rows, bias, count, args.width, args.scale, scratch.scores, ahead);
    for (int v = 0; v < vectors; v++) {
      const T* scores = scratch.scores + v * LANES<T>;
      Vector<T> most = largest[v];
      for (int64_t j = 0; j < count; j++) most = maximum<T>(load(scores + j * TILE), most);
      Vector<T> block[4] = {};
      int64_t j = 0;
      for (; j + 4 <= count; j += 4)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) block[k] += exponential<T>(load(scores + (j + k) * TILE) - most);
      for (; j < count; j++) block[0] += exponential<T>(load(scores + j * TILE) - most);
      sum[v] = fma(sum[v], exponential<T>(largest[v] - most), (block[0] + block[1]) + (block[2] + block[3]));
      largest[v] = most;
    }
  }
  for (int v = 0; v < vectors; v++)
    for (int i = 0; i < LANES<T>; i++) scratch.lse[v * LANES<T> + i] = largest[v][i] + std::log(sum[v][i]);
}

}  // namespace

template <typename T>
int64_t attention_maps_scratch(int64_t width, int64_t most_columns) {
  return Scratch<T>::size(width, most_columns) * int64_t(sizeof(T));
}

template <typename Q, typename T>
void attention_maps_tile(const AttentionMapsArgs<Q, T>& args, int64_t row, int64_t tile, void* memory) {
  constexpr int vectors = TILE / LANES<T>;
  const Scratch<T> scratch(memory, args.width, args.most_columns);
  const int64_t begin = tile * TILE, count = args.queries - begin < TILE ? args.queries - begin : TILE;
  const int64_t* column = args.column + args.column_start[row];
  const int64_t columns = args.column_start[row + 1] - args.column_start[row];
  const T* rows[BLOCK_PADDED];
  T bias[BLOCK_PADDED];
  std::memset(scratch.maps, 0, columns * TILE * sizeof(T));

  for (int64_t head = 0; columns > 0 && head < args.heads; head++) {
    const Q* query = args.query + row * args.query_strides[0] + head * args.query_strides[1] + begin * args.query_strides[2];
    const int64_t key_head = head / (args.heads / args.key_heads);
    const Q* key = args.key + row * args.key_strides[0] + key_head * args.key_strides[1];
    pack_queries(args, query, count, scratch.query);
    const int64_t after = begin + TILE < args.queries ? count : 0;  // the next tile is most likely this thread's too
    Ahead ahead = head + 1 < args.heads
                      ? Ahead(args, query + args.query_strides[1], count)
                      : Ahead(args, query - head * args.query_strides[1] + TILE * args.query_strides[2], after);
    if (args.lse) {
      const T* lse = args.lse + row * args.lse_strides[0] + head * args.lse_strides[1] + begin * args.lse_strides[2];
      const int64_t next = head + 1 < args.heads ? args.lse_strides[1] : 0;
      for (int64_t i = 0; i < TILE; i++) {
        const T* one = lse + (i < count ? i : count - 1) * args.lse_strides[2];
        scratch.lse[i] = *one;
        if (i % LANES<T> == 0) __builtin_prefetch(one + next);
      }
    } else {
      own_lse(args, row, key, scratch, ahead);
    }
    const Vector<T> share = broadcast(args.head_weight[head]), empty = broadcast(-std::numeric_limits<T>::infinity());
    for (int64_t first = 0; first < columns; first += BLOCK) {
      const int64_t some = columns - first < BLOCK ? columns - first : BLOCK;
      const auto chosen = [&](int64_t j) { return column[first + j]; };
      key_rows(args, key, chosen, some, scratch.keys, rows);
      key_biases(args, row, chosen, some, bias);
      all_scores(scratch.query, rows, bias, some, args.width, args.scale, scratch.scores, ahead);
      for (int v = 0; v < vectors; v++) {
        const Vector<T> lse = load(scratch.lse + v * LANES<T>);
        const T* scores = scratch.scores + v * LANES<T>;
        T* maps = scratch.maps + first * TILE + v * LANES<T>;
#pragma GCC unroll 4
        for (int64_t j = 0; j < some; j++) {
          const Vector<T> probability = exponential<T>(load(scores + j * TILE) - lse);
          const Vector<T> kept = lse == empty ? broadcast(T(0)) : probability;
          store(maps + j * TILE, fma(kept, share, load(maps + j * TILE)));
        }
      }
    }
  }

  for (int64_t group = 0; group < args.groups; group++) {
    const int64_t at = (row * args.groups + group) * args.slots;
    Vector<T> sum[vectors] = {};
    for (int64_t slot = at; slot < at + args.slots; slot++) {
      if (args.place[slot] < 0) continue;
      const T* map = scratch.maps + args.place[slot] * TILE;
      for (int v = 0; v < vectors; v++) sum[v] = fma(load(map + v * LANES<T>), broadcast(args.weight[slot]), sum[v]);
    }
    std::memcpy(args.maps + (row * args.groups + group) * args.queries + begin, sum, count * sizeof(T));
  }
}

template int64_t attention_maps_scratch<float>(int64_t, int64_t);
template int64_t attention_maps_scratch<double>(int64_t, int64_t);
#define STAR_INSTANTIATE(Q, T) \
  template void attention_maps_tile<Q, T>(const AttentionMapsArgs<Q, T>&, int64_t, int64_t, void*);
STAR_INSTANTIATE(double, double)
STAR_INSTANTIATE(float, float)
STAR_INSTANTIATE(torch::headeronly::BFloat16, float)
STAR_INSTANTIATE(torch::headeronly::Half, float)

}  // namespace star::STAR_ISA
