// Paged attention of a prompt, a chunk of one and a single token of decoding: the contract, the units of work and how threads share them,
// and the form for several queries; attention_decode.h has the form for one.
//
// Keys are walked in partitions of 256 tokens counted from the start of the context. Within a partition a (query, head) has one maximum, one
// sum and one output; partitions are merged left to right. Invariant: this arithmetic and its order depend on the query's own q, keys and
// position alone:
//   * a score is one chain of fused multiply-adds over ascending head_dim; an output is one chain over its ascending visible keys;
//   * the sum of weights runs in lanes (key index modulo `lanes`) and ends in one fixed tree; keys that are not visible add exactly zero;
//   * partitions without a visible key are skipped.
// So which form computes a query, how queries are tiled, which rows share a load of K and V, how a long context is split over threads and
// how many threads run never change a bit. Cells of a block that no visible key occupies are not read into a result, whatever they hold.
#include <atomic>
#include <cstring>

#include "../common/check.h"
#include "../ops.h"
#include "attention.h"
#include "attention_decode.h"

namespace octavo::OCTAVO_ISA {
namespace {

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
    for (int64_t d = 0; d < a.head_dim; d += lanes) transpose_square(row, whole, d, a.head_dim, to + i - first);
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
        seen[i] = visible(u.position + (r + i) / u.heads, a.window, base);
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

// Partition `index` of a unit with several queries: best, sum and values of every row.
template <class T>
void attend_tiles(const Problem& a, const Unit& u, const Buffers& to, int64_t num_rows, int64_t index) {
  const int64_t base = index * partition;
  const int64_t begin = visible(u.position, a.window, base).begin;
  const int64_t end = visible(u.position + u.num_queries - 1, a.window, base).end;
  Cells cells;
  find_cells(a, u, base, begin, cells);
  if (index == u.begin)
    for (int64_t i = begin; i < least(end, begin + key_tile); ++i) prefetch_row(static_cast<const T*>(a.k_cache) + cells.at[i], a.head_dim);
  score<T>(a, to, cells, num_rows, begin, end);
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t position = u.position + r / u.heads;
    const Visible seen = visible(position, a.window, base);
    to.stats[r] = -infinity;
    to.stats[num_rows + r] = 0.0f;
    if (seen.begin < seen.end)
      softmax(a, to.scores + r * partition, seen, base, position, u.kv_head * a.group + r % u.heads, to.stats[r], to.stats[num_rows + r]);
  }
  mix<T>(a, u, to, cells, num_rows, base, begin, end);
}

void load_queries(const Problem& a, const Unit& u, int64_t num_rows, float* to) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t token = a.query_start[u.sequence] + u.first_query + r / u.heads;
    const float* q = a.q + token * a.q_stride + (u.kv_head * a.group + r % u.heads) * a.head_dim;
    std::memcpy(to + r * a.head_dim, q, sizeof(float) * static_cast<size_t>(a.head_dim));
  }
}

float* output_row(const Problem& a, const Unit& u, int64_t r) {
  const int64_t token = a.query_start[u.sequence] + u.first_query + r / u.heads;
  return a.out + (token * a.heads + u.kv_head * a.group + r % u.heads) * a.head_dim;
}

template <class T>
void attend(const Problem& a, const Unit& u, const Buffers& to, int64_t num_rows, int64_t index, bool cold) {
  if (u.num_queries == 1)
    attend_token<T>(a, u, to, index, cold);
  else
    attend_tiles<T>(a, u, to, num_rows, index);
}

// All partitions of a unit by one thread.
template <class T>
void run_unit(const Problem& a, const Unit& u) {
  const int64_t num_rows = u.num_queries * u.heads;
  const Buffers to = buffers(a, num_rows);
  float* best = to.stats + 2 * num_rows;
  float* sum = to.stats + 3 * num_rows;
  load_queries(a, u, num_rows, to.q);
  for (int64_t r = 0; r < num_rows; ++r) {
    best[r] = -infinity;
    sum[r] = 0.0f;
  }
  for (int64_t index = u.begin; index < u.end; ++index) {
    attend<T>(a, u, to, num_rows, index, index == u.begin);
    for (int64_t r = 0; r < num_rows; ++r)
      merge({best + r, sum + r, to.total + r * a.padded_dim}, {to.stats + r, to.stats + num_rows + r, to.part + r * a.padded_dim}, a.padded_dim);
  }
  for (int64_t r = 0; r < num_rows; ++r) finish(output_row(a, u, r), {best + r, sum + r, to.total + r * a.padded_dim}, a.head_dim);
}

// A split unit keeps [partitions, rows] partial results of 16 + padded_dim floats: best and sum, then the values.
constexpr int64_t partial_head = 16;

float* partial_of(const Problem& a, const Unit& u, float* partials, int64_t index, int64_t r) {
  return partials + u.partials + ((index - u.begin) * u.num_queries * u.heads + r) * (partial_head + a.padded_dim);
}

template <class T>
void run_partition(const Problem& a, const Unit& u, int64_t index, float* partials) {
  const int64_t num_rows = u.num_queries * u.heads;
  const Buffers to = buffers(a, num_rows);
  load_queries(a, u, num_rows, to.q);
  attend<T>(a, u, to, num_rows, index, true);
  for (int64_t r = 0; r < num_rows; ++r) {
    float* p = partial_of(a, u, partials, index, r);
    p[0] = to.stats[r];
    p[1] = to.stats[num_rows + r];
    std::memcpy(p + partial_head, to.part + r * a.padded_dim, sizeof(float) * static_cast<size_t>(a.padded_dim));
  }
}

void merge_unit(const Problem& a, const Unit& u, float* partials) {
  for (int64_t r = 0; r < u.num_queries * u.heads; ++r) {
    float* total = partial_of(a, u, partials, u.begin, r);
    for (int64_t index = u.begin + 1; index < u.end; ++index) {
      float* right = partial_of(a, u, partials, index, r);
      merge({total, total + 1, total + partial_head}, {right, right + 1, right + partial_head}, a.padded_dim);
    }
    finish(output_row(a, u, r), {total, total + 1, total + partial_head}, a.head_dim);
  }
}

// Writes the units of all sequences, the later queries of a sequence (more keys) first; with a null `to` only counts them. A single query
// takes `token_heads` kv heads at once.
int64_t list_units(const Problem& a, int64_t num_sequences, int64_t token_heads, Unit* to) {
  const int64_t queries = most(1, unit_rows / a.group);
  int64_t count = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t n = a.query_start[s + 1] - a.query_start[s];
    for (int64_t first = (divide_up(n, queries) - 1) * queries; first >= 0 && n > 0; first -= queries) {
      const int64_t position = a.context_len[s] - n + first;
      const int64_t some = least(queries, n - first);
      const int64_t oldest = a.window > 0 ? most(0, position - a.window + 1) : 0;
      const int64_t step = some == 1 ? token_heads : 1;
      for (int64_t h = 0; h < a.kv_heads; h += step, ++count) {
        if (!to) continue;
        const int64_t heads = least(step, a.kv_heads - h);
        to[count] = {static_cast<int32_t>(s),
                     static_cast<int32_t>(h),
                     static_cast<int32_t>(heads),
                     static_cast<int32_t>(heads * a.group),
                     static_cast<int32_t>(first),
                     static_cast<int32_t>(some),
                     static_cast<int32_t>(position),
                     static_cast<int32_t>(oldest / partition),
                     static_cast<int32_t>(divide_up(position + some, partition)),
                     0};
      }
    }
  }
  return count;
}

// How many kv heads a single query takes at once: as many as leave tasks enough for the threads and a tile of keys that fits a cache.
template <class T>
int64_t heads_at_once(const Problem& a, int64_t num_sequences) {
  constexpr int64_t most_bytes = 256 << 10;
  const int64_t room = least(unit_rows / a.group, most_bytes / (key_tile * a.head_dim * static_cast<int64_t>(sizeof(T))));
  const int64_t threads = num_threads();
  if (threads == 1) return most(1, least(a.kv_heads, room));
  int64_t partitions = 0;
  for (int64_t s = 0; s < num_sequences; ++s)
    partitions += divide_up(a.window > 0 ? least(a.window, a.context_len[s]) : a.context_len[s], partition);
  return most(1, least(divide_up(a.kv_heads, divide_up(2 * threads, most(1, partitions))), room));
}

constexpr int64_t most_partials = 16 << 20;  // floats; beyond it units are not split

template <class T>
void run(const Problem& a, int64_t num_sequences) {
  const int64_t token_heads = heads_at_once<T>(a, num_sequences);
  const int64_t num_units = list_units(a, num_sequences, token_heads, nullptr);
  Unit* units = static_cast<Unit*>(scratch(2, num_units * static_cast<int64_t>(sizeof(Unit))));
  list_units(a, num_sequences, token_heads, units);

  // Few units for the threads: their partitions become tasks of their own.
  int64_t floats = 0, num_tasks = 0;
  for (int64_t i = 0; i < num_units; ++i) {
    units[i].partials = floats;
    const int64_t partitions = units[i].end - units[i].begin;
    num_tasks += partitions;
    floats += partitions * units[i].num_queries * units[i].heads * (partial_head + a.padded_dim);
  }
  const int64_t threads = num_threads();
  const bool split = threads > 1 && num_units < 3 * threads && num_tasks > num_units && floats <= most_partials;
  if (!split) {
    const auto one = [&](int64_t i) { run_unit<T>(a, units[i]); };
    int64_t work = 0;  // multiply-adds, roughly
    for (int64_t i = 0; i < num_units; ++i) work += (units[i].end - units[i].begin) * units[i].num_queries * units[i].heads;
    if (work * partition * a.head_dim < (1 << 16))
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
