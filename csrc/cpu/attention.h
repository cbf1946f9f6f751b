// What the forms of attention share: the problem and its units of work, a small matrix product, where the keys of a partition lie,
// softmax, and how partitions are merged. Invariant: every function here computes a row from that row alone, in one order.
#pragma once

#include <atomic>
#include <cstring>
#include <type_traits>
#include <utility>

#include "parallel.h"
#include "vec.h"

namespace octavo::OCTAVO_ISA {
namespace {

constexpr int64_t partition = 256;
constexpr int64_t key_tile = 64;   // keys whose K and V are widened and rearranged at once
constexpr int64_t unit_rows = 64;  // (query, head) rows that share that work, at least the heads of one query
static_assert(partition % key_tile == 0 && key_tile % lanes == 0);

constexpr float infinity = __builtin_inff();

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Problem {
  float* out;      // [T, Q, D]
  const float* q;  // [T, Q, D]
  int64_t q_stride;
  const void* k_cache;  // [B, S, H, D]
  const void* v_cache;  // [B, S, H, D]
  const int32_t* block_tables;
  int64_t table_stride;
  const int32_t* rows;         // [N]
  const int32_t* query_start;  // [N + 1]
  const int32_t* context_len;  // [N]
  const float* slopes;         // [Q] or null
  int64_t num_blocks, block_size, heads, kv_heads, group, head_dim;
  int64_t padded_dim;  // head_dim up to whole vectors
  float scale, softcap;
  int64_t window;
  std::atomic<int32_t>* bad_block;  // a block number outside the cache, should one be met
};

// One (sequence, run of kv heads, run of queries). Row r is query r / heads, head r % heads of those that share the kv heads. Several
// queries have one kv head, so that all rows read the same keys; a single query may have more, which lie side by side in the cache.
struct Unit {
  int32_t sequence, kv_head, num_kv_heads;
  int32_t heads;                     // query heads: num_kv_heads * group
  int32_t first_query, num_queries;  // within the new tokens of the sequence
  int32_t position;                  // of first_query
  int32_t begin, end;                // partitions that hold a visible key
  int64_t partials;                  // where the unit's partial results begin, when its partitions are split over threads
};

// --- reading ahead --------------------------------------------------------------------------------------------------------------

// Rows of the cache that will be read next. Whoever computes meanwhile asks for them, a few lines at a time and in the order in which they
// lie: a core has room for a few dozen requests and waits when it asks for more, and a run of neighbours wakes its own prefetcher.
struct Ahead {
  const char* base;
  const int64_t* at;  // where the rows are, in elements
  int64_t count;      // rows that are left
  int64_t item_size, row_bytes;
  int64_t offset = 0;  // within the row

  // Inlined by force: GCC takes a function that only prefetches for one without any effect, and drops the calls.
  [[gnu::always_inline]] inline void ask(int64_t lines) {
    for (; lines > 0 && count > 0; --lines) {
      __builtin_prefetch(base + *at * item_size + offset);
      offset += 64;
      if (offset < row_bytes) continue;
      offset = 0;
      ++at;
      --count;
    }
  }
};

// --- a small matrix product -----------------------------------------------------------------------------------------------------
// c[r][j] += sum over ascending k of a[r][k] * b[k][j], one chain per element. With `pairs` every 32 bits of b are two bfloat16, the
// rows 2k (low half) and 2k + 1, and `depth` counts them.

struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t depth;
  Ahead* ahead = nullptr;  // asked for three quarters of as many bytes as are read of b
};

constexpr int tile_rows = 6;
constexpr int tile_vectors = lanes == 16 ? 4 : 2;  // tile_rows * tile_vectors chains stay in registers

template <bool pairs, int num_rows, int num_vectors>
void multiply_tile(const Product& p) {
  Vec sum[num_rows][num_vectors];
  for (int r = 0; r < num_rows; ++r)
    for (int v = 0; v < num_vectors; ++v) sum[r][v] = load(p.c + r * p.c_stride + v * lanes);
  for (int64_t k = 0; k < p.depth; ++k) {
    if (p.ahead) p.ahead->ask(divide_up(3 * num_vectors * lanes * 4 / 4, 64));
    Vec b[num_vectors];
    for (int v = 0; v < num_vectors; ++v) b[v] = load(p.b + k * p.b_stride + v * lanes);
    if constexpr (pairs) {
      for (int r = 0; r < num_rows; ++r) {
        const Vec a = broadcast(p.a[r * p.a_stride + 2 * k]);
        for (int v = 0; v < num_vectors; ++v) sum[r][v] = fma(a, low_bfloat16(b[v]), sum[r][v]);
      }
      for (int v = 0; v < num_vectors; ++v) b[v] = high_bfloat16(b[v]);
    }
    for (int r = 0; r < num_rows; ++r) {
      const Vec a = broadcast(p.a[r * p.a_stride + (pairs ? 2 * k + 1 : k)]);
      for (int v = 0; v < num_vectors; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < num_rows; ++r)
    for (int v = 0; v < num_vectors; ++v) store(p.c + r * p.c_stride + v * lanes, sum[r][v]);
}

template <bool pairs, int... index>
constexpr auto tile_table(std::integer_sequence<int, index...>) {
  struct Table {
    void (*entry[sizeof...(index)])(const Product&);
  };
  return Table{{multiply_tile<pairs, index / tile_vectors + 1, index % tile_vectors + 1>...}};
}

// `num_rows` is at most tile_rows; columns come in whole vectors.
template <bool pairs = false>
void multiply(Product p, int64_t num_rows, int64_t columns) {
  static constexpr auto table = tile_table<pairs>(std::make_integer_sequence<int, tile_rows * tile_vectors>());
  for (int64_t vectors = columns / lanes; vectors > 0; vectors -= tile_vectors) {
    table.entry[(num_rows - 1) * tile_vectors + least(vectors, tile_vectors) - 1](p);
    p.b += tile_vectors * lanes;
    p.c += tile_vectors * lanes;
  }
}

// --- cells of the cache -------------------------------------------------------------------------------------------------------------

// Where the keys of a partition lie: offsets of their rows, the same in both caches. Keys shortly after the partition are here to be prefetched.
struct Cells {
  int64_t at[partition + key_tile];
  int64_t end;  // relative to the partition; offsets before the first visible key are not set
};

void find_cells(const Problem& a, const Unit& u, int64_t base, int64_t begin, Cells& to) {
  const int32_t* table = a.block_tables + a.rows[u.sequence] * a.table_stride;
  const int64_t width = a.kv_heads * a.head_dim;
  to.end = least(u.position + u.num_queries - base, partition + key_tile);
  for (int64_t i = begin; i < to.end;) {
    const int64_t offset = (base + i) % a.block_size;
    int64_t block = table[(base + i) / a.block_size];
    if (block < 0 || block >= a.num_blocks) {
      a.bad_block->store(static_cast<int32_t>(block), std::memory_order_relaxed);
      block = 0;
    }
    int64_t cell = (block * a.block_size + offset) * width + u.kv_head * a.head_dim;
    for (const int64_t end = least(to.end, i + a.block_size - offset); i < end; ++i, cell += width) to.at[i] = cell;
  }
}

template <class T>
inline void prefetch_row(const T* row, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
}

// to[(d + j) * key_tile + k] = element d + j of the k-th of a vector of keys, for the dims [d, width), as many as a vector has; zero for a
// key that is not there (null). `whole`: all are.
template <class Element>
inline void transpose_square(const Element* const* row, bool whole, int64_t d, int64_t width, float* to) {
  const int64_t dims = width - d;
  Vec square[lanes];
  if (whole && dims >= lanes)
    for (int j = 0; j < lanes; ++j) square[j] = load(row[j] + d);
  else
    for (int j = 0; j < lanes; ++j) square[j] = row[j] ? load(row[j] + d, dims) : broadcast(0.0f);
  transpose(square);
  for (int64_t j = 0; j < least(lanes, dims); ++j) store(to + (d + j) * key_tile, square[j]);
}

// --- softmax --------------------------------------------------------------------------------------------------------------------

// What a row knows after some partitions: maximum, sum of weights, weighted values; maximum = -inf with sum = 0 means "nothing yet".
struct Partial {
  float* best;
  float* sum;
  float* values;  // [padded_dim]
};

float exp_of(float x) {
  float lane[lanes];
  store(lane, exp(broadcast(x)));
  return lane[0];
}

// total <- total merged with the partition to its right.
void merge(const Partial& total, const Partial& right, int64_t padded_dim) {
  if (*right.sum == 0.0f && *right.best == -infinity) return;
  if (*total.sum == 0.0f && *total.best == -infinity) {
    *total.best = *right.best;
    *total.sum = *right.sum;
    std::memcpy(total.values, right.values, sizeof(float) * static_cast<size_t>(padded_dim));
    return;
  }
  const float best = *total.best > *right.best ? *total.best : *right.best;
  const float keep = exp_of(*total.best - best), add = exp_of(*right.best - best);
  *total.best = best;
  *total.sum = *total.sum * keep + *right.sum * add;
  for (int64_t d = 0; d < padded_dim; d += lanes)
    store(total.values + d, fma(load(right.values + d), broadcast(add), load(total.values + d) * broadcast(keep)));
}

void finish(float* out, const Partial& total, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += lanes) store(out + d, load(total.values + d) / broadcast(*total.sum), head_dim - d);
}

// Visible keys of a row within the partition that starts at `base`: [begin, end), relative to it; empty where begin >= end.
struct Visible {
  int64_t begin, end;
};
Visible visible(int64_t position, int64_t window, int64_t base) {
  const int64_t first = window > 0 ? position - window + 1 : 0;
  return {most(first - base, 0), least(position + 1 - base, partition)};
}

// Turns the products q.k of one row into weights, in place, and gives their maximum and sum.
void softmax(const Problem& a, float* scores, Visible seen, int64_t base, int64_t position, int64_t head, float& best, float& sum) {
  float lane_index[lanes];
  for (int i = 0; i < lanes; ++i) lane_index[i] = static_cast<float>(i);
  const Vec index = load(lane_index);
  const int64_t start = seen.begin / lanes * lanes;
  const Vec scale = broadcast(a.scale), cap = broadcast(a.softcap), inverse_cap = broadcast(1.0f / a.softcap), nothing = broadcast(-infinity);
  Vec top = nothing;
  for (int64_t i = start; i < seen.end; i += lanes) {
    Vec s = load(scores + i) * scale;
    if (a.softcap > 0.0f) s = cap * tanh(s * inverse_cap);
    if (a.slopes) s = fma(broadcast(a.slopes[head]), index + broadcast(static_cast<float>(base + i - position)), s);
    s = select(between(seen.begin - i, seen.end - i), s, nothing);
    store(scores + i, s);
    top = max(s, top);
  }
  best = reduce_max(top);
  Vec total = broadcast(0.0f);
  for (int64_t i = start; i < seen.end; i += lanes) {
    const Vec weight = select(between(seen.begin - i, seen.end - i), exp(load(scores + i) - broadcast(best)), broadcast(0.0f));
    store(scores + i, weight);
    total = total + weight;
  }
  sum = reduce_add(total);
}

// --- a unit of work -------------------------------------------------------------------------------------------------------------

struct Buffers {
  float* q;       // [rows, D]
  float* scores;  // [rows, 256]
  float* part;    // [rows, padded_dim]
  float* total;   // [rows, padded_dim]
  float* stats;   // [4, rows]: best and sum of the partition, then of the total
  float* keys;    // [D, 64]
  float* values;  // [64, padded_dim]
};

Buffers buffers(const Problem& a, int64_t num_rows) {
  const int64_t sizes[] = {num_rows * a.head_dim, num_rows * partition,  num_rows * a.padded_dim, num_rows * a.padded_dim,
                           4 * num_rows,          a.head_dim * key_tile, key_tile * a.padded_dim};
  int64_t total = 0;
  for (int64_t size : sizes) total += divide_up(size, 16) * 16;
  float* at = static_cast<float*>(scratch(1, total * static_cast<int64_t>(sizeof(float))));
  float* part[7];
  for (int i = 0; i < 7; ++i) {
    part[i] = at;
    at += divide_up(sizes[i], 16) * 16;
  }
  return {part[0], part[1], part[2], part[3], part[4], part[5], part[6]};
}

}  // namespace
}  // namespace octavo::OCTAVO_ISA
