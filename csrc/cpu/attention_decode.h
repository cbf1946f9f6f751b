// Attention of a single query: the form of a decode step, where time is spent reading the cache once.
//
// A unit may cover several kv heads, whose rows lie side by side, so that memory is read in the order in which it lies: a tile of keys
// for one head after the other, then the next tile, which has been asked for meanwhile. The arithmetic is that of the other form, bit
// for bit; what differs is how the operands reach it:
//   * bfloat16 keys are transposed two dims at a time, half the work, and widened on their way into the product;
//   * values go from the cache into registers, because hardly a second tile of rows would read them from a buffer again.
#pragma once

#include "attention.h"

namespace octavo::OCTAVO_ISA {
namespace {

// to[d][i - first] = element d of key i, for begin <= i < end, as 32 bits: a key is `width` elements of type Element, which is T, or float
// where two T's are taken for one. The rest of a vector of keys is zero, further keys are left as they were.
template <class Element, class T>
void transpose_keys(const T* keys, const int64_t* at, int64_t first, int64_t begin, int64_t end, int64_t width, Ahead& ahead, float* to) {
  for (int64_t i = first; i < end; i += lanes) {
    const Element* row[lanes];
    for (int j = 0; j < lanes; ++j) row[j] = i + j >= begin && i + j < end ? reinterpret_cast<const Element*>(keys + at[i + j]) : nullptr;
    const bool whole = i >= begin && i + lanes <= end;
    for (int64_t d = 0; d < width; d += lanes) {
      ahead.ask(lanes * lanes * 4 / 64 / 4);  // a quarter of these rows; multiply() asks for the rest
      transpose_square(row, whole, d, width, to + i - first);
    }
  }
}

// scores[r][j] = q.k for the keys [begin, end) of one tile, for the rows of one kv head.
template <bool pairs, class T>
void score_tile(const Problem& a, const T* keys, const int64_t* at, int64_t first, int64_t begin, int64_t end, Ahead& ahead, const float* q,
                float* scores, float* buffer) {
  using Element = std::conditional_t<pairs, float, T>;
  const int64_t width = pairs ? a.head_dim / 2 : a.head_dim;
  transpose_keys<Element>(keys, at, first, begin, end, width, ahead, buffer);
  const int64_t columns = divide_up(end - first, lanes) * lanes;
  for (int64_t r = 0; r < a.group; r += tile_rows) {
    const int64_t some = least(tile_rows, a.group - r);
    float* c = scores + r * partition + first;
    for (int64_t i = 0; i < some; ++i) std::memset(c + i * partition, 0, sizeof(float) * static_cast<size_t>(columns));
    multiply<pairs>({q + r * a.head_dim, a.head_dim, buffer, key_tile, c, partition, width, &ahead}, some, columns);
  }
}

// part[r] += sum over ascending keys of weight * value, for `num_vectors` vectors of dims; a last one of fewer dims comes alone.
template <class T>
struct Mixture {
  const float* weights;  // [rows, partition], from the first key on
  const T* values;
  const int64_t* at;
  int64_t count;
  float* part;
  int64_t part_stride;
  int64_t dims;  // of the last vector
};

template <class T, int num_rows, int num_vectors, bool whole>
void mix_tile(const Mixture<T>& p, Ahead& ahead) {
  Vec sum[num_rows][num_vectors];
  for (int r = 0; r < num_rows; ++r)
    for (int v = 0; v < num_vectors; ++v) sum[r][v] = load(p.part + r * p.part_stride + v * lanes);
  for (int64_t i = 0; i < p.count; ++i) {
    const T* value = p.values + p.at[i];
    ahead.ask(divide_up(num_vectors * lanes * static_cast<int64_t>(sizeof(T)), 64));
    Vec b[num_vectors];
    for (int v = 0; v < num_vectors; ++v) b[v] = whole ? load(value + v * lanes) : load(value, p.dims);
    for (int r = 0; r < num_rows; ++r) {
      const Vec weight = broadcast(p.weights[r * partition + i]);
      for (int v = 0; v < num_vectors; ++v) sum[r][v] = fma(weight, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < num_rows; ++r)
    for (int v = 0; v < num_vectors; ++v) store(p.part + r * p.part_stride + v * lanes, sum[r][v]);
}

template <class T, int... index>
constexpr auto mix_table(std::integer_sequence<int, index...>) {
  struct Table {
    void (*entry[sizeof...(index)])(const Mixture<T>&, Ahead&);
  };
  return Table{{mix_tile<T, index / (tile_vectors + 1) + 1, most(1, index % (tile_vectors + 1)), (index % (tile_vectors + 1) > 0)>...}};
}

// For all dims and rows of one kv head; `ahead` is asked for once.
template <class T>
void mix_values(const Problem& a, Mixture<T> p, Ahead& ahead) {
  static constexpr auto table = mix_table<T>(std::make_integer_sequence<int, tile_rows * (tile_vectors + 1)>());
  for (int64_t r = 0; r < a.group; r += tile_rows) {
    const auto* entries = table.entry + (least(tile_rows, a.group - r) - 1) * (tile_vectors + 1);
    Mixture<T> rows = p;
    rows.weights += r * partition;
    rows.part += r * p.part_stride;
    for (int64_t d = 0; d < a.head_dim;) {
      const int64_t vectors = least((a.head_dim - d) / lanes, tile_vectors);
      rows.dims = a.head_dim - d;
      entries[vectors](rows, ahead);
      d += most(1, vectors) * lanes;
      rows.values += most(1, vectors) * lanes;
      rows.part += most(1, vectors) * lanes;
    }
  }
}

// Partition `index` of a unit with one query: best, sum and values of every row. `cold`: nobody has asked for its first tile.
template <class T>
void attend_token(const Problem& a, const Unit& u, const Buffers& to, int64_t index, bool cold) {
  const int64_t base = index * partition;
  const Visible seen = visible(u.position, a.window, base);
  Cells cells;
  find_cells(a, u, base, seen.begin, cells);
  const T* keys = static_cast<const T*>(a.k_cache);
  const T* values = static_cast<const T*>(a.v_cache);
  const auto rows_from = [&](const T* cache, int64_t begin, int64_t end) {
    return Ahead{reinterpret_cast<const char*>(cache), cells.at + begin, least(key_tile, end - begin), sizeof(T),
                 u.num_kv_heads * a.head_dim * static_cast<int64_t>(sizeof(T))};
  };
  if (cold) rows_from(keys, seen.begin, seen.end).ask(1 << 20);

  for (int64_t tile = seen.begin / key_tile * key_tile; tile < seen.end; tile += key_tile) {
    const int64_t begin = most(seen.begin, tile), end = least(seen.end, tile + key_tile);
    const int64_t first = begin / lanes * lanes;  // keys come in whole vectors
    Ahead ahead = end < seen.end ? rows_from(keys, end, seen.end) : rows_from(values, seen.begin, seen.end);
    for (int64_t h = 0; h < u.num_kv_heads; ++h) {
      const int64_t head = h * a.head_dim;
      const float* q = to.q + h * a.group * a.head_dim;
      float* scores = to.scores + h * a.group * partition;
      constexpr bool has_pairs = std::is_same_v<T, BFloat16>;
      if (has_pairs && a.head_dim % 2 == 0)
        score_tile<has_pairs, T>(a, keys + head, cells.at, first, begin, end, ahead, q, scores, to.keys);
      else
        score_tile<false, T>(a, keys + head, cells.at, first, begin, end, ahead, q, scores, to.keys);
    }
  }
  for (int64_t r = 0; r < u.heads; ++r)
    softmax(a, to.scores + r * partition, seen, base, u.position, u.kv_head * a.group + r, to.stats[r], to.stats[u.heads + r]);
  std::memset(to.part, 0, sizeof(float) * static_cast<size_t>(u.heads * a.padded_dim));
  for (int64_t begin = seen.begin; begin < seen.end; begin += key_tile) {
    const int64_t end = least(seen.end, begin + key_tile);
    Ahead ahead = end < seen.end ? rows_from(values, end, seen.end) : rows_from(keys, seen.end, cells.end);
    for (int64_t h = 0; h < u.num_kv_heads; ++h) {
      const int64_t head = h * a.head_dim;
      const float* weights = to.scores + h * a.group * partition + begin;
      float* part = to.part + h * a.group * a.padded_dim;
      mix_values<T>(a, {weights, values + head, cells.at + begin, end - begin, part, a.padded_dim, 0}, ahead);
    }
  }
}

}  // namespace
}  // namespace octavo::OCTAVO_ISA
