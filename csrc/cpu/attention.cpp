// Paged attention: one code path for a prompt, a chunk of one and a single token of decoding.
//
// Keys are walked in partitions of 256 tokens counted from the start of the context. Within a partition a (query, head) has one maximum, one
// sum and one output; partitions are merged left to right. Invariant: this arithmetic and its order depend on the query's own q, keys and
// position alone:
//   * a score is one chain of fused multiply-adds over ascending head_dim; an output is one chain over its ascending visible keys;
//   * the sum of weights runs in lanes (key index modulo `lanes`) and ends in one fixed tree; keys that are not visible add exactly zero;
//   * partitions without a visible key are skipped.
// So how queries are tiled, which rows share a load of K and V, how a long context is split over threads and how many threads run
// never change a bit. Cells of a block that no visible key occupies are not read into a result, whatever they hold.
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "../common/check.h"
#include "../ops.h"
#include "parallel.h"
#include "vec.h"

namespace octavo::OCTAVO_ISA {
namespace {

constexpr int64_t partition = 256;
constexpr int64_t key_tile = 64;   // keys whose K and V are widened and rearranged at once
constexpr int64_t unit_rows = 64;  // (query, head) rows that share that work, at least the heads of one query
static_assert(partition % key_tile == 0 && key_tile % lanes == 0);

constexpr float infinity = __builtin_inff();

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

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

// One (sequence, kv head, run of queries): all its rows read the same keys. Row r is query r / group, head r % group of the kv head.
struct Unit {
  int32_t sequence, kv_head;
  int32_t first_query, num_queries;  // within the new tokens of the sequence
  int32_t position;                  // of first_query
  int32_t begin, end;                // partitions that hold a visible key
  int64_t partials;                  // where the unit's partial results begin, when its partitions are split over threads
};

// --- a small matrix product -----------------------------------------------------------------------------------------------------
// c[r][j] += sum over ascending k of a[r][k] * b[k][j], one chain per element.

struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t depth;
};

constexpr int tile_rows = 6;
constexpr int tile_vectors = lanes == 16 ? 4 : 2;  // tile_rows * tile_vectors chains stay in registers

template <int num_rows, int num_vectors>
void multiply_tile(const Product& p) {
  Vec sum[num_rows][num_vectors];
  for (int r = 0; r < num_rows; ++r)
    for (int v = 0; v < num_vectors; ++v) sum[r][v] = load(p.c + r * p.c_stride + v * lanes);
  for (int64_t k = 0; k < p.depth; ++k) {
    Vec b[num_vectors];
    for (int v = 0; v < num_vectors; ++v) b[v] = load(p.b + k * p.b_stride + v * lanes);
    for (int r = 0; r < num_rows; ++r) {
      const Vec a = broadcast(p.a[r * p.a_stride + k]);
      for (int v = 0; v < num_vectors; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < num_rows; ++r)
    for (int v = 0; v < num_vectors; ++v) store(p.c + r * p.c_stride + v * lanes, sum[r][v]);
}

template <int... index>
constexpr auto tile_table(std::integer_sequence<int, index...>) {
  struct Table {
    void (*entry[sizeof...(index)])(const Product&);
  };
  return Table{{multiply_tile<index / tile_vectors + 1, index % tile_vectors + 1>...}};
}

// `num_rows` is at most tile_rows; columns come in whole vectors.
void multiply(Product p, int64_t num_rows, int64_t columns) {
  static constexpr auto table = tile_table(std::make_integer_sequence<int, tile_rows * tile_vectors>());
  for (int64_t vectors = columns / lanes; vectors > 0; vectors -= tile_vectors) {
    table.entry[(num_rows - 1) * tile_vectors + least(vectors, tile_vectors) - 1](p);
    p.b += tile_vectors * lanes;
    p.c += tile_vectors * lanes;
  }
}

// --- loading keys and values ----------------------------------------------------------------------------------------------------

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

// to[d][i - first] = key i, for begin <= i < end; the rest of a vector of keys is zero, further keys are left as they were. Meanwhile asks for
// the keys of the next tile and for the values of this one.
template <class T>
void load_keys(const Problem& a, const Cells& cells, int64_t first, int64_t begin, int64_t end, float* to) {
  const T* keys = static_cast<const T*>(a.k_cache);
  const T* values = static_cast<const T*>(a.v_cache);
  for (int64_t i = first; i < end; i += lanes) {
    const T* row[lanes];
    for (int j = 0; j < lanes; ++j) {
      const bool exists = i + j >= begin && i + j < end;
      row[j] = exists ? keys + cells.at[i + j] : nullptr;
      if (exists) prefetch_row(values + cells.at[i + j], a.head_dim);
      if (i + j >= begin && i + j + key_tile < cells.end) prefetch_row(keys + cells.at[i + j + key_tile], a.head_dim);
    }
    const bool whole = i >= begin && i + lanes <= end;
    for (int64_t d = 0; d < a.head_dim; d += lanes) {
      const int64_t dims = a.head_dim - d;
      Vec square[lanes];
      if (whole && dims >= lanes)
        for (int j = 0; j < lanes; ++j) square[j] = load(row[j] + d);
      else
        for (int j = 0; j < lanes; ++j) square[j] = row[j] ? load(row[j] + d, dims) : broadcast(0.0f);
      transpose(square);
      for (int64_t j = 0; j < least(lanes, dims); ++j) store(to + (d + j) * key_tile + i - first, square[j]);
    }
  }
}

// to[i - begin][d] = value i, for begin <= i < end; zero from head_dim to padded_dim.
template <class T>
void load_values(const Problem& a, const Cells& cells, int64_t begin, int64_t end, float* to) {
  for (int64_t i = begin; i < end; ++i, to += a.padded_dim) {
    const T* value = static_cast<const T*>(a.v_cache) + cells.at[i];
    int64_t d = 0;
    for (; d + lanes <= a.head_dim; d += lanes) store(to + d, load(value + d));
    if (d < a.head_dim) store(to + d, load(value + d, a.head_dim - d));
  }
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

// scores[r][j] = q.k for the keys [begin, end) of a partition.
template <class T>
void score(const Problem& a, const Buffers& to, const Cells& cells, int64_t num_rows, int64_t begin, int64_t end) {
  for (int64_t tile = begin / key_tile * key_tile; tile < end; tile += key_tile) {
    const int64_t first = most(begin, tile) / lanes * lanes;  // keys come in whole vectors
    const int64_t last = least(end, tile + key_tile);
    load_keys<T>(a, cells, first, most(begin, tile), last, to.keys);
    const int64_t columns = divide_up(last - first, lanes) * lanes;
    for (int64_t r = 0; r < num_rows; r += tile_rows) {
      const int64_t some = least(tile_rows, num_rows - r);
      float* c = to.scores + r * partition + first;
      for (int64_t i = 0; i < some; ++i) std::memset(c + i * partition, 0, sizeof(float) * static_cast<size_t>(columns));
      multiply({to.q + r * a.head_dim, a.head_dim, to.keys, key_tile, c, partition, a.head_dim}, some, columns);
    }
  }
}

// part[r] = sum of weight * value over the visible keys of each row; together where all rows of a tile see a key, alone at the edges.
template <class T>
void mix(const Problem& a, const Unit& u, const Buffers& to, const Cells& cells, int64_t num_rows, int64_t base, int64_t begin, int64_t end) {
  std::memset(to.part, 0, sizeof(float) * static_cast<size_t>(num_rows * a.padded_dim));
  for (int64_t tile = begin / key_tile * key_tile; tile < end; tile += key_tile) {
    const int64_t first = most(begin, tile), last = least(end, tile + key_tile);
    load_values<T>(a, cells, first, last, to.values);
    const auto add = [&](int64_t row, int64_t some, int64_t from, int64_t until) {
      if (from >= until) return;
      multiply({to.scores + row * partition + from, partition, to.values + (from - first) * a.padded_dim, a.padded_dim, to.part + row * a.padded_dim,
                a.padded_dim, until - from},
               some, a.padded_dim);
    };
    for (int64_t r = 0; r < num_rows; r += tile_rows) {
      const int64_t some = least(tile_rows, num_rows - r);
      Visible seen[tile_rows];
      int64_t from = first, until = last;  // what all rows of the tile see
      for (int64_t i = 0; i < some; ++i) {
        seen[i] = visible(u.position + (r + i) / a.group, a.window, base);
        from = most(from, seen[i].begin);
        until = least(until, seen[i].end);
      }
      if (from >= until) {
        for (int64_t i = 0; i < some; ++i) add(r + i, 1, most(first, seen[i].begin), least(last, seen[i].end));
        continue;
      }
      for (int64_t i = 0; i < some; ++i) add(r + i, 1, most(first, seen[i].begin), from);
      add(r, some, from, until);
      for (int64_t i = 0; i < some; ++i) add(r + i, 1, until, least(last, seen[i].end));
    }
  }
}

// Partition `index` of a unit: best, sum and values of every row.
template <class T>
void attend(const Problem& a, const Unit& u, const Buffers& to, int64_t num_rows, int64_t index) {
  const int64_t base = index * partition;
  const int64_t begin = visible(u.position, a.window, base).begin;
  const int64_t end = visible(u.position + u.num_queries - 1, a.window, base).end;
  Cells cells;
  find_cells(a, u, base, begin, cells);
  if (index == u.begin)
    for (int64_t i = begin; i < least(end, begin + key_tile); ++i) prefetch_row(static_cast<const T*>(a.k_cache) + cells.at[i], a.head_dim);
  score<T>(a, to, cells, num_rows, begin, end);
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t position = u.position + r / a.group;
    const Visible seen = visible(position, a.window, base);
    to.stats[r] = -infinity;
    to.stats[num_rows + r] = 0.0f;
    if (seen.begin < seen.end)
      softmax(a, to.scores + r * partition, seen, base, position, u.kv_head * a.group + r % a.group, to.stats[r], to.stats[num_rows + r]);
  }
  mix<T>(a, u, to, cells, num_rows, base, begin, end);
}

void load_queries(const Problem& a, const Unit& u, int64_t num_rows, float* to) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t token = a.query_start[u.sequence] + u.first_query + r / a.group;
    const float* q = a.q + token * a.q_stride + (u.kv_head * a.group + r % a.group) * a.head_dim;
    std::memcpy(to + r * a.head_dim, q, sizeof(float) * static_cast<size_t>(a.head_dim));
  }
}

float* output_row(const Problem& a, const Unit& u, int64_t r) {
  const int64_t token = a.query_start[u.sequence] + u.first_query + r / a.group;
  return a.out + (token * a.heads + u.kv_head * a.group + r % a.group) * a.head_dim;
}

// All partitions of a unit by one thread.
template <class T>
void run_unit(const Problem& a, const Unit& u) {
  const int64_t num_rows = u.num_queries * a.group;
  const Buffers to = buffers(a, num_rows);
  float* best = to.stats + 2 * num_rows;
  float* sum = to.stats + 3 * num_rows;
  load_queries(a, u, num_rows, to.q);
  for (int64_t r = 0; r < num_rows; ++r) {
    best[r] = -infinity;
    sum[r] = 0.0f;
  }
  for (int64_t index = u.begin; index < u.end; ++index) {
    attend<T>(a, u, to, num_rows, index);
    for (int64_t r = 0; r < num_rows; ++r)
      merge({best + r, sum + r, to.total + r * a.padded_dim}, {to.stats + r, to.stats + num_rows + r, to.part + r * a.padded_dim}, a.padded_dim);
  }
  for (int64_t r = 0; r < num_rows; ++r) finish(output_row(a, u, r), {best + r, sum + r, to.total + r * a.padded_dim}, a.head_dim);
}

// A split unit keeps [partitions, rows] partial results of 16 + padded_dim floats: best and sum, then the values.
constexpr int64_t partial_head = 16;

float* partial_of(const Problem& a, const Unit& u, float* partials, int64_t index, int64_t r) {
  return partials + u.partials + ((index - u.begin) * u.num_queries * a.group + r) * (partial_head + a.padded_dim);
}

template <class T>
void run_partition(const Problem& a, const Unit& u, int64_t index, float* partials) {
  const int64_t num_rows = u.num_queries * a.group;
  const Buffers to = buffers(a, num_rows);
  load_queries(a, u, num_rows, to.q);
  attend<T>(a, u, to, num_rows, index);
  for (int64_t r = 0; r < num_rows; ++r) {
    float* p = partial_of(a, u, partials, index, r);
    p[0] = to.stats[r];
    p[1] = to.stats[num_rows + r];
    std::memcpy(p + partial_head, to.part + r * a.padded_dim, sizeof(float) * static_cast<size_t>(a.padded_dim));
  }
}

void merge_unit(const Problem& a, const Unit& u, float* partials) {
  for (int64_t r = 0; r < u.num_queries * a.group; ++r) {
    float* total = partial_of(a, u, partials, u.begin, r);
    for (int64_t index = u.begin + 1; index < u.end; ++index) {
      float* right = partial_of(a, u, partials, index, r);
      merge({total, total + 1, total + partial_head}, {right, right + 1, right + partial_head}, a.padded_dim);
    }
    finish(output_row(a, u, r), {total, total + 1, total + partial_head}, a.head_dim);
  }
}

// Writes the units of all sequences, the later queries of a sequence (more keys) first; with a null `to` only counts them.
int64_t list_units(const Problem& a, int64_t num_sequences, Unit* to) {
  const int64_t queries = most(1, unit_rows / a.group);
  int64_t count = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t n = a.query_start[s + 1] - a.query_start[s];
    for (int64_t first = (divide_up(n, queries) - 1) * queries; first >= 0 && n > 0; first -= queries)
      for (int64_t h = 0; h < a.kv_heads; ++h, ++count) {
        if (!to) continue;
        const int64_t position = a.context_len[s] - n + first;
        const int64_t some = least(queries, n - first);
        const int64_t oldest = a.window > 0 ? most(0, position - a.window + 1) : 0;
        to[count] = {static_cast<int32_t>(s),
                     static_cast<int32_t>(h),
                     static_cast<int32_t>(first),
                     static_cast<int32_t>(some),
                     static_cast<int32_t>(position),
                     static_cast<int32_t>(oldest / partition),
                     static_cast<int32_t>(divide_up(position + some, partition)),
                     0};
      }
  }
  return count;
}

constexpr int64_t most_partials = 16 << 20;  // floats; beyond it units are not split

template <class T>
void run(const Problem& a, int64_t num_sequences) {
  const int64_t num_units = list_units(a, num_sequences, nullptr);
  Unit* units = static_cast<Unit*>(scratch(2, num_units * static_cast<int64_t>(sizeof(Unit))));
  list_units(a, num_sequences, units);

  // Few units for the threads: their partitions become tasks of their own.
  int64_t floats = 0, num_tasks = 0;
  for (int64_t i = 0; i < num_units; ++i) {
    units[i].partials = floats;
    const int64_t partitions = units[i].end - units[i].begin;
    num_tasks += partitions;
    floats += partitions * units[i].num_queries * a.group * (partial_head + a.padded_dim);
  }
  const int64_t threads = num_threads();
  const bool split = threads > 1 && num_units < 3 * threads && num_tasks > num_units && floats <= most_partials;
  if (!split) {
    const auto one = [&](int64_t i) { run_unit<T>(a, units[i]); };
    int64_t work = 0;  // multiply-adds, roughly
    for (int64_t i = 0; i < num_units; ++i) work += (units[i].end - units[i].begin) * units[i].num_queries;
    if (least(work * partition, num_tasks * partition) * a.group * a.head_dim < (1 << 16))
      for (int64_t i = 0; i < num_units; ++i) one(i);
    else
      parallel_tasks(num_units, one);
    return;
  }
  float* partials = static_cast<float*>(scratch(3, floats * static_cast<int64_t>(sizeof(float))));
  parallel_tasks(num_tasks, [&](int64_t task) {
    int64_t i = 0;
    for (; task >= units[i].end - units[i].begin; ++i) task -= units[i].end - units[i].begin;
    run_partition<T>(a, units[i], units[i].begin + task, partials);
  });
  parallel_tasks(num_units, [&](int64_t i) { merge_unit(a, units[i], partials); });
}

}  // namespace

void paged_attention(const Tensor& out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables, const Tensor& rows_tensor,
                     const Tensor& query_start, const Tensor& context_len, double scale, int64_t window, double softcap, const Tensor* alibi_slopes,
                     double k_scale, double v_scale, const Tensor*, const Tensor*, int64_t) {
  Contract c("paged_attention");
  c.tensor("q", q, "TQD", f32, rows);
  c.tensor("out", out, "TQD", f32);
  c.tensor("k_cache", k_cache, "BSHD", storage_types);
  c.tensor("v_cache", v_cache, "BSHD", k_cache.dtype);
  c.tensor("block_tables", block_tables, "RM", i32, rows);
  c.tensor("rows", rows_tensor, "N", i32);
  c.tensor("query_start", query_start, "U", i32);
  c.tensor("context_len", context_len, "N", i32);
  if (alibi_slopes) c.tensor("alibi_slopes", *alibi_slopes, "Q", f32);
  c.require(k_scale == 1 && v_scale == 1, "k_scale = %g and v_scale = %g, but a cache of this type has no scales", k_scale, v_scale);
  const auto number = [](int64_t x) { return static_cast<long long>(x); };
  c.require(c['H'] > 0 && c['Q'] % c['H'] == 0 && c['D'] > 0, "%lld query heads do not share %lld kv heads of %lld dims", number(c['Q']), number(c['H']),
            number(c['D']));
  c.require(window >= 0, "window = %lld is negative", number(window));
  c.require(c['U'] == c['N'] + 1, "query_start has %lld entries for %lld sequences, expected one more", number(c['U']), number(c['N']));
  const int32_t* row = rows_tensor.ptr<const int32_t>();
  const int32_t* start = query_start.ptr<const int32_t>();
  const int32_t* context = context_len.ptr<const int32_t>();
  const int64_t capacity = c['M'] * c['S'];
  c.require(start[0] == 0 && start[c['N']] == c['T'], "query_start runs from %d to %d, but there are %lld tokens", start[0], start[c['N']], number(c['T']));
  for (int64_t s = 0; s < c['N']; ++s) {
    const int32_t n = start[s + 1] - start[s];
    c.require(n >= 0, "query_start[%lld] = %d, but the next is %d", number(s), start[s], start[s + 1]);
    c.require(row[s] >= 0 && row[s] < c['R'], "rows[%lld] = %d, but block_tables has %lld rows", number(s), row[s], number(c['R']));
    c.require(context[s] >= n && context[s] <= capacity, "context_len[%lld] = %d, expected %d new tokens at least and %lld that fit the block table at most",
              number(s), context[s], n, number(capacity));
  }
  if (c['T'] == 0) return;
  c.require(c['B'] > 0, "the cache has no blocks");

  std::atomic<int32_t> bad_block{0};
  Problem a;
  a.out = out.ptr<float>();
  a.q = q.ptr<const float>();
  a.q_stride = q.stride[0];
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.block_tables = block_tables.ptr<const int32_t>();
  a.table_stride = block_tables.stride[0];
  a.rows = row;
  a.query_start = start;
  a.context_len = context;
  a.slopes = alibi_slopes ? alibi_slopes->ptr<const float>() : nullptr;
  a.num_blocks = c['B'];
  a.block_size = c['S'];
  a.heads = c['Q'];
  a.kv_heads = c['H'];
  a.group = c['Q'] / c['H'];
  a.head_dim = c['D'];
  a.padded_dim = divide_up(c['D'], lanes) * lanes;
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.window = window;
  a.bad_block = &bad_block;
  if (k_cache.dtype == f32)
    run<float>(a, c['N']);
  else if (k_cache.dtype == bf16)
    run<BFloat16>(a, c['N']);
  else
    run<Float16>(a, c['N']);
  c.require(bad_block == 0, "block_tables names block %d, but the cache has %lld", bad_block.load(), number(c['B']));
}

}  // namespace octavo::OCTAVO_ISA
