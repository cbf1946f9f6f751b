// The decode kernel: attention of sequences with 1 to decode_queries new tokens. attention_decode.cu has the plan and the choice of an
// instance; attention_decode_*.cu compile the instances. It does not know how the work was cut, only how to walk its share.
//
// Flash decoding (Dao et al., 2023) over fixed partitions: the rows of a thread block are all (query token, head of the group) pairs of one
// KV head, so that keys and values are read once for the group. Products are taken transposed, S' = K Q' and O' = V' P', because a tensor-core
// product has 16 rows on one side and 8 columns on the other: tokens fill the 16, and the few queries need only multiples of 8.
//
// A partition is dealt to 4 warps in tiles of 16 tokens, tile g to warp g modulo 4. Each warp streams its own tiles through its own ring of
// slots with cp.async, through the ends of partitions, row tiles and sequences alike, so that loads never stop, and meets the others only
// to merge a partition's four results. Invariant: the arithmetic of a row within a partition, of the merge of the warps and of the merge of
// partitions (merge_into) is written once, with its rounding spelled out; masked or absent tiles and partitions change nothing.
#pragma once

#include <type_traits>

#include "attention.h"
#include "launch.h"
#include "mma.cuh"

namespace octavo::cuda {

constexpr int decode_warps = 4, decode_threads = 32 * decode_warps;
constexpr int tile_tokens = 16, partition_tiles = partition / tile_tokens;
static_assert(partition_tiles % decode_warps == 0, "a warp's tiles are the same whatever partition a walk begins with");
constexpr int merge_columns = 64, merge_pitch = merge_columns + 4;  // the pitch spreads rows 2q over all banks

// The work list: what thread block (kv head, j) does is range j, the same for every head.
constexpr int max_ranges = 1024, range_ints = 32, max_decode_seqs = 2048;
constexpr int counters_at = max_ranges * range_ints;   // [kv_heads * ranges] zeros: partitions of a split item that are finished
constexpr int active_at = counters_at + max_ranges;    // [num_seqs] of Sequence
static_assert(active_at % 4 == 0, "sequences are read as 16 bytes");

// An item is one row tile of one sequence; items are in the order of sequences, then row tiles. A range is a run of partitions in that order.
struct Range {
  int first, first_tile, first_partition;  // where it begins: place in the list of active sequences, row tile, partition; first < 0: empty
  int last, last_tile, last_end;           // its last item, and the partition that follows the last one
  int last_first;                          // begin with the last item: it goes on in the next range, which then need not wait for it
  int first_slot, first_cut, first_owner;  // of a first item that began before: its partial results, its first cut, the range it begins in
  int last_slot;                           // of a last item that begins here and goes on: its partial results
  int unused;
};
struct __align__(16) Sequence {
  int index, query_start, queries, context;
};
static_assert(sizeof(Range) == 12 * 4 && sizeof(Sequence) == 16, "a range has 32 ints: Range, then the sequences of its first two items");

struct DecodeLaunch {
  int ranges;         // per kv head
  int stages;         // tiles of a warp in flight
  int block_mask;     // block_size - 1 where that is a power of two, else 0
  bool halves;        // a tile may lie in two blocks: block_size is a multiple of 8 and not of 16
  int64_t slots;      // partial results per kv head
  float scale_log2;   // of q.k, for exp2
  float cap, cap_log2;  // softcap: scale / softcap, softcap * log2(e)
  float out_scale;
};

__host__ __device__ constexpr int decode_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
// Groups of 8 rows that a thread block takes at once.
__host__ __device__ constexpr int decode_row_groups(int rows, int dim) { return rows <= 8 || dim == 256 ? 1 : rows <= 16 ? 2 : 4; }
__host__ __device__ constexpr int decode_blocks_per_sm(int dim) { return dim <= 128 ? 2 : 1; }
// The same where an SM has little shared memory (8.6, 8.9, 12.0).
inline int decode_residents(int dim) { return device().shared_per_sm >= 160 * 1024 ? decode_blocks_per_sm(dim) : dim == 64 ? 2 : 1; }
// Ranges per kv head: as many thread blocks as are resident at once, so the grid is the same for all lengths.
inline int decode_ranges(int kv_heads, int head_dim) {
  const int blocks = decode_residents(decode_dim(head_dim)) * device().num_sms, ranges = (blocks < max_ranges ? blocks : max_ranges) / kv_heads;
  return ranges > 1 ? ranges : 1;
}
__host__ __device__ constexpr int partial_floats(int dim, int row_groups) { return 8 * row_groups * (dim + 2); }  // results, then (maximum, sum)
// Where an item's running result is kept: four row groups leave no registers for it.
__host__ __device__ constexpr bool total_in_shared(int row_groups) { return row_groups == 4; }
// Shared memory but for the ring: queries of two items, the merge buffer, the running result, (maximum, sum) of every warp and row, (position,
// slope) of the rows of two items, every warp's copy of the range, a flag.
__host__ __device__ constexpr int decode_fixed_bytes(int dim, int row_groups) {
  return (2 * row_groups * 8 * dim * 2 + decode_warps * 8 * merge_pitch * 4 + (total_in_shared(row_groups) ? row_groups * 8 * dim * 4 : 0) +
          (total_in_shared(row_groups) ? row_groups * decode_threads * 8 : 0) + (decode_warps + 2) * row_groups * 8 * 8 + decode_warps * 48 + 16 + 1023) / 1024 * 1024;
}

__host__ __device__ inline int first_visible(int context, int queries, int window) {
  const int first = window > 0 ? context - queries - window + 1 : 0;
  return first > 0 ? first : 0;
}

#ifdef __CUDACC__
constexpr float minus_infinity = -__builtin_inff();
constexpr float log2_e = 1.44269504088896340736f;

__device__ __forceinline__ float exp2_approx(float x) {  // to 2 units in the last place; exactly 1 at 0 and 0 at -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float anchored(float m) { return m == minus_infinity ? 0.0f : m; }

// total = total merged with a partition's (m, l, o): the only place where partitions meet.
struct Merge {
  float old_weight, new_weight;
};
__device__ __forceinline__ Merge merge_into(float& total_m, float& total_l, float m, float l) {
  const float best = fmaxf(total_m, m), anchor = anchored(best);
  const Merge w = {exp2_approx(__fsub_rn(total_m, anchor)), exp2_approx(__fsub_rn(m, anchor))};
  total_l = __fmaf_rn(total_l, w.old_weight, __fmul_rn(l, w.new_weight));
  total_m = best;
  return w;
}
__device__ __forceinline__ void merge_into(float4& total, const Merge& w, const float4& o) {
  total.x = __fmaf_rn(total.x, w.old_weight, __fmul_rn(o.x, w.new_weight));
  total.y = __fmaf_rn(total.y, w.old_weight, __fmul_rn(o.y, w.new_weight));
  total.z = __fmaf_rn(total.z, w.old_weight, __fmul_rn(o.z, w.new_weight));
  total.w = __fmaf_rn(total.w, w.old_weight, __fmul_rn(o.w, w.new_weight));
}

__device__ __forceinline__ void wait_tiles(int stages) {  // until at most 2 * stages - 1 slots are still being filled
  if (stages == 4) cp_async_wait<7>();
  else if (stages == 3) cp_async_wait<5>();
  else if (stages == 2) cp_async_wait<3>();
  else cp_async_wait<1>();
}

// Where a walk over the items of a range stands.
struct Cursor {
  int place, tile;
  Sequence s;
};

// Steps to the next item in the order of the range; false at its end.
__device__ __forceinline__ bool advance(Cursor& c, const Range& r, const Sequence* active, int group, int tile_rows) {
  const bool at_last = c.place == r.last && c.tile == r.last_tile;
  int place = c.place, tile = c.tile;
  if (r.last_first && at_last) {
    place = r.first, tile = r.first_tile;
  } else {
    if (at_last) return false;
    if ((tile + 1) * tile_rows < group * c.s.queries) ++tile;
    else ++place, tile = 0;
    if (r.last_first && place == r.last && tile == r.last_tile) return false;
  }
  if (place != c.place) c.s = active[place];
  c.place = place, c.tile = tile;
  return true;
}

// T: __nv_bfloat16 | __half, the type of the products. fp8: the cache has e4m3, T is __half and q and out have the type p.act.
template <class T, bool fp8, int dim, int row_groups>
__global__ void __launch_bounds__(decode_threads, decode_blocks_per_sm(dim))
    decode_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ DecodeLaunch d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr int item_size = fp8 ? 1 : 2, row_bytes = dim * item_size, slot_bytes = tile_tokens * row_bytes;
  constexpr int chunks = row_bytes / 16, rows_at_once = 32 / chunks;  // one cp.async of a warp: rows_at_once tokens
  constexpr int tile_rows = 8 * row_groups, q_row_bytes = dim * 2, q_bytes = tile_rows * q_row_bytes;
  constexpr int q_chunks = dim / 8, q_loads = (tile_rows * q_chunks + decode_threads - 1) / decode_threads;
  constexpr int steps = dim / 16;                           // of the product over head_dim, and tiles of 16 output columns
  constexpr bool q_in_registers = row_groups == 1 || row_groups * dim <= 128;  // else read from shared memory for every tile
  static_assert(rows_at_once <= 8 && 8 % rows_at_once == 0, "a copy stays within half a tile");

  extern __shared__ __align__(1024) unsigned char shared[];
  float* const merge = reinterpret_cast<float*>(shared + 2 * q_bytes);                 // [warps, 8, merge_pitch]
  float4* const kept = reinterpret_cast<float4*>(merge + decode_warps * 8 * merge_pitch);  // [row_groups, dim / 64, threads]
  float2* const kept_stats = reinterpret_cast<float2*>(kept + (total_in_shared(row_groups) ? tile_rows * dim / 4 : 0));  // [row_groups, threads]
  float2* const stats = kept_stats + (total_in_shared(row_groups) ? row_groups * decode_threads : 0);                     // [warps, tile_rows]
  float2* const row_facts = stats + decode_warps * tile_rows;                                                      // [2, tile_rows]
  int* const ranges = reinterpret_cast<int*>(row_facts + 2 * tile_rows);                                           // [warps, 12]
  int* const flag = ranges + decode_warps * 12;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int lane_row = lane / 4, lane_pair = lane % 4;
  const int ring_bytes = 2 * d.stages * slot_bytes;
  const uint32_t ring = shared_address(shared + decode_fixed_bytes(dim, row_groups)) + warp * ring_bytes;
  const int kv_head = blockIdx.x % p.kv_heads, range_index = blockIdx.x / p.kv_heads;
  const int group = p.heads / p.kv_heads;
  const Sequence* const active = reinterpret_cast<const Sequence*>(p.work + active_at);

  dependents_start();
  dependency_wait();

  // --- the range and its first two items
  const int first_rows = lane < p.num_seqs ? p.rows[lane] : 0;  // at once with the range, not after it
  const Range& r = reinterpret_cast<const Range*>(ranges)[warp];
  Cursor next_load, next_use;  // of the loads, and of the products
  bool more_loads = true, more_uses = true;
  Sequence second = {};
  if (p.work) {
    const int word = p.work[range_index * range_ints + lane];
    if (__shfl_sync(~0u, word, 0) < 0) return;
    if (lane < 12) ranges[warp * 12 + lane] = word;
    __syncwarp();
    next_load.place = r.last_first ? r.last : r.first;
    next_load.tile = r.last_first ? r.last_tile : r.first_tile;
    next_load.s = {__shfl_sync(~0u, word, 12), __shfl_sync(~0u, word, 13), __shfl_sync(~0u, word, 14), __shfl_sync(~0u, word, 15)};
    second = {__shfl_sync(~0u, word, 16), __shfl_sync(~0u, word, 17), __shfl_sync(~0u, word, 18), __shfl_sync(~0u, word, 19)};
  } else {  // without a plan a thread block takes one sequence
    const int s = range_index, queries = p.query_start[s + 1] - p.query_start[s], context = p.context_len[s];
    if (queries < 1 || queries > decode_queries || context < 1) return;
    if (lane == 0) {
      Range whole = {};
      whole.first = whole.last = s;
      whole.first_partition = first_visible(context, queries, p.window) / partition;
      whole.last_tile = (group * queries - 1) / tile_rows;
      whole.last_end = (context + partition - 1) / partition;
      reinterpret_cast<Range*>(ranges)[warp] = whole;
    }
    __syncwarp();
    next_load.place = s, next_load.tile = 0;
    next_load.s = {s, p.query_start[s], queries, context};
  }
  next_use = next_load;

  // --- loads: this warp's tiles of all items, in order
  const bool chunk_exists = lane % chunks * 16 < p.head_dim * item_size;  // the rest of a row of the tile is zero
  const int64_t token_bytes = int64_t{p.kv_heads} * p.head_dim * item_size, block_bytes = token_bytes * p.block_size;
  const int64_t lane_offset =
      (int64_t{kv_head} * p.head_dim * item_size) + (chunk_exists ? lane % chunks * 16 : 0) + lane / chunks * token_bytes;
  const char* const keys = static_cast<const char*>(p.k_cache) + lane_offset;
  const char* const values = static_cast<const char*>(p.v_cache) + lane_offset;
  const uint32_t copy_to = swizzled<row_bytes>(lane / chunks, lane % chunks);  // for the first rows_at_once tokens
  int load_tile = 0, load_end = 0, load_first = 0, load_count = 0;            // tiles of 16 tokens from the start of the context
  int load_low = 0, load_context = 0;                                          // tokens outside are zeros
  int load_row = next_load.s.index < 32 ? __shfl_sync(~0u, first_rows, next_load.s.index) : p.rows[next_load.s.index];  // of the block tables
  bool row_is_next = false;                  // load_row is to be read for next_load, whose own words are on their way
  int ids = 0, ids_half = 0, next_ids = 0, next_ids_half = 0;  // lane i: the block of the i-th tile, of 32; of its second half where blocks have 8
  const int* load_table = nullptr;
  int64_t load_offset = 0, load_offset_half = 0;

  const auto fetch_ids = [&](int count, int& id, int& half) {  // of tiles count .. count + 31 of the item
    const int tile = load_first + decode_warps * (count + lane), token = tile * tile_tokens;
    const bool exists = tile < load_end;
    // A half without a visible token may have no block any more, or none yet.
    id = exists && (!d.halves || token + 8 > load_low) ? load_table[token / p.block_size] : 0;
    half = d.halves && exists && token + 8 < load_context ? load_table[(token + 8) / p.block_size] : 0;
  };
  // Takes up the item next_load; what follows it is read ahead.
  const auto enter_load = [&] {
    const Sequence s = next_load.s;
    const bool is_first = next_load.place == r.first && next_load.tile == r.first_tile;
    const bool is_last = next_load.place == r.last && next_load.tile == r.last_tile;
    load_low = first_visible(s.context, s.queries, p.window);
    load_context = s.context;
    const int begin = max(is_first ? r.first_partition * partition_tiles : 0, load_low / tile_tokens);
    load_end = min(is_last ? r.last_end * partition_tiles : 0x7fffffff, (s.context + tile_tokens - 1) / tile_tokens);
    load_first = begin + ((warp - begin) & (decode_warps - 1));
    load_tile = load_first;
    load_count = 0;
    load_table = p.block_tables + load_row * p.table_stride;
    fetch_ids(0, ids, ids_half);
    fetch_ids(32, next_ids, next_ids_half);
    more_loads = row_is_next = advance(next_load, r, active, group, tile_rows);
  };
  const auto copy_tile = [&](const char* from, uint32_t slot) {
    const char* source = from + load_offset;
    const uint32_t first = load_tile * tile_tokens + lane / chunks - load_low, visible = chunk_exists ? load_context - load_low : 0;
#pragma unroll
    for (int i = 0; i < tile_tokens / rows_at_once; ++i) {
      const int row = i * rows_at_once;
      if (row == 8 && d.halves) source = from + load_offset_half;
      const uint32_t to = slot + row * row_bytes + (copy_to ^ (swizzled<row_bytes>(row, 0) - row * row_bytes));
      cp_async16(to, source, first + row < visible);  // wraps around below load_low
      source += rows_at_once * token_bytes;
    }
  };
  bool loading = true;  // the slot being filled has a tile
  const auto load_keys = [&](uint32_t slot) {
    if (row_is_next && load_count > 0) {
      load_row = p.rows[next_load.s.index];
      row_is_next = false;
    }
    while (load_tile >= load_end && more_loads) {
      if (row_is_next) load_row = p.rows[next_load.s.index];
      enter_load();
    }
    loading = load_tile < load_end;
    if (loading) {
      if (load_count == 32) {
        ids = next_ids, ids_half = next_ids_half;
        load_count = 0;
        load_first = load_tile;
        fetch_ids(32, next_ids, next_ids_half);
      }
      const int id = __shfl_sync(~0u, ids, load_count), half = __shfl_sync(~0u, ids_half, load_count);
      const int token = load_tile * tile_tokens;
      load_offset = id * block_bytes + (d.block_mask ? token & d.block_mask : token % p.block_size) * token_bytes;
      if (d.halves) load_offset_half = half * block_bytes + (token + 8) % p.block_size * token_bytes;
      copy_tile(keys, slot);
    }
    cp_async_commit();
  };
  const auto load_values = [&](uint32_t slot) {
    if (loading) {
      copy_tile(values, slot);
      load_tile += decode_warps;
      ++load_count;
    }
    cp_async_commit();
  };

  // --- queries: rows of (token, head) pairs, zeros beyond the last, through registers into one of two places
  uint4 q_ahead[q_loads];
  const auto fetch_queries = [&](const Cursor& c) {
#pragma unroll
    for (int i = 0; i < q_loads; ++i) {
      const int at = thread + i * decode_threads, chunk = at % q_chunks, row = c.tile * tile_rows + at / q_chunks;
      q_ahead[i] = make_uint4(0, 0, 0, 0);
      if (at < tile_rows * q_chunks && row < group * c.s.queries && chunk * 8 < p.head_dim) {
        const int token = row / group, head = kv_head * group + row - token * group;
        q_ahead[i] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q) + (c.s.query_start + token) * p.q_stride +
                                                     head * p.head_dim + chunk * 8);
      }
    }
  };
  const auto store_queries = [&](int buffer, const Cursor& c) {
    if (thread < tile_rows) {
      const int row = min(c.tile * tile_rows + thread, group * c.s.queries - 1), token = row / group;
      row_facts[buffer * tile_rows + thread] =
          make_float2(__int_as_float(c.s.context - c.s.queries + token), p.alibi ? p.alibi[kv_head * group + row - token * group] * log2_e : 0.0f);
    }
#pragma unroll
    for (int i = 0; i < q_loads; ++i) {
      const int at = thread + i * decode_threads;
      if (at >= tile_rows * q_chunks) break;
      if (fp8 && p.act == bf16) {  // float16 holds a bfloat16 of any query that is not absurd; it saturates
        uint32_t* words = &q_ahead[i].x;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float low = __uint_as_float(words[w] << 16), high = __uint_as_float(words[w] & 0xffff0000u);
          words[w] = pack2<__half>(low > 65504.0f ? 65504.0f : low < -65504.0f ? -65504.0f : low,
                                   high > 65504.0f ? 65504.0f : high < -65504.0f ? -65504.0f : high);
        }
      }
      *reinterpret_cast<uint4*>(shared + buffer * q_bytes + swizzled<q_row_bytes>(at / q_chunks, at % q_chunks)) = q_ahead[i];
    }
  };

  Cursor use = next_use;
  fetch_queries(use);
  enter_load();
  for (int i = 0; i < d.stages; ++i) {
    load_keys(ring + 2 * i * slot_bytes);
    load_values(ring + (2 * i + 1) * slot_bytes);
  }
  store_queries(0, use);
  __syncthreads();
  {
    const int place = next_use.place;
    more_uses = r.last_first || !(use.place == r.last && use.tile == r.last_tile);
    if (more_uses) {  // as advance(), but the sequence is in the range's own words
      if (r.last_first) next_use.place = r.first, next_use.tile = r.first_tile;
      else if ((use.tile + 1) * tile_rows < group * use.s.queries) ++next_use.tile;
      else ++next_use.place, next_use.tile = 0;
      if (next_use.place != place) next_use.s = second;
    }
  }

  const auto store_out = [&](const Cursor& c, int row, int column, const float4& v, float sum) {
    if (column >= p.head_dim) return;
    const int packed_row = c.tile * tile_rows + row, token = packed_row / group, head = kv_head * group + packed_row - token * group;
    const float by = __fdiv_rn(d.out_scale, sum);
    const float f[4] = {__fmul_rn(v.x, by), __fmul_rn(v.y, by), __fmul_rn(v.z, by), __fmul_rn(v.w, by)};
    uint16_t* const to_out = static_cast<uint16_t*>(p.out) + (int64_t{c.s.query_start + token} * p.heads + head) * p.head_dim + column;
    const bool as_half = fp8 ? p.act == f16 : std::is_same_v<T, __half>;
    *reinterpret_cast<uint2*>(to_out) = as_half ? make_uint2(pack2<__half>(f[0], f[1]), pack2<__half>(f[2], f[3]))
                                                : make_uint2(pack2<__nv_bfloat16>(f[0], f[1]), pack2<__nv_bfloat16>(f[2], f[3]));
  };

  // The partial results of an item, merged left to right by this thread block: first the weights of all, then their sums. The same
  // arithmetic as merge_into: a maximum is exact in any order.
  const auto combine = [&](const Cursor& c, int rows, const float* partials, int count) {
    constexpr int at_once = 512 / tile_rows, fetched = row_groups == 1 && dim <= 128 ? 32 : 16;  // slots with weights; slots on their way
    constexpr int own = tile_rows * dim / (4 * decode_threads), own_rows = tile_rows / decode_warps;
    float4* const weights = reinterpret_cast<float4*>(merge);  // [at_once, tile_rows]: of the total, of the part, of the part times its sum
    static_assert(at_once * tile_rows * 16 <= decode_warps * 8 * merge_pitch * 4, "the weights fit into the merge buffer");
    const auto slot_at = [&](int n) { return partials + int64_t{n} * partial_floats(dim, row_groups); };
    float4 part_o[fetched], sum_o[own];
    float sum_l[own], best[own_rows];
    const auto fetch = [&](int j, int n) {
      const int place = 4 * (thread + j * decode_threads);
#pragma unroll
      for (int a = 0; a < fetched; ++a)
        if (n + a < count) part_o[a] = __ldcg(reinterpret_cast<const float4*>(slot_at(n + a) + place));
    };
    if (thread < rows * (dim / 4)) fetch(0, 0);
#pragma unroll
    for (int j = 0; j < own; ++j) sum_o[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f), sum_l[j] = 0.0f;
#pragma unroll
    for (int k = 0; k < own_rows; ++k) best[k] = minus_infinity;
    for (int first = 0; first < count; first += at_once) {
#pragma unroll
      for (int k = 0; k < own_rows; ++k) {
        const int row = warp + decode_warps * k;
        if (row >= rows) break;
#pragma unroll
        for (int n = 0; n < at_once; n += 32) {
          const bool exists = n + lane < at_once && first + n + lane < count;
          float2 part = make_float2(minus_infinity, 0.0f);
          if (exists) part = __ldcg(reinterpret_cast<const float2*>(slot_at(first + n + lane) + tile_rows * dim) + row);
          float running = fmaxf(part.x, best[k]);
#pragma unroll
          for (int step = 1; step < 32; step *= 2) {
            const float before = __shfl_up_sync(~0u, running, step);
            if (lane >= step) running = fmaxf(running, before);
          }
          const float before = __shfl_up_sync(~0u, running, 1), old = lane ? before : best[k], anchor = anchored(running);
          const float by = exp2_approx(__fsub_rn(part.x, anchor));
          if (exists) weights[(n + lane) * tile_rows + row] = make_float4(exp2_approx(__fsub_rn(old, anchor)), by, __fmul_rn(part.y, by), 0.0f);
          best[k] = __shfl_sync(~0u, running, 31);
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < own; ++j) {
        const int row = (thread + j * decode_threads) / (dim / 4);
        if (row >= rows) break;
        for (int n = 0; n < at_once && first + n < count; n += fetched) {
          if (j + n + first > 0) fetch(j, first + n);
#pragma unroll
          for (int a = 0; a < fetched; ++a) {
            if (first + n + a < count) {
              const float4 w = weights[(n + a) * tile_rows + row];
              merge_into(sum_o[j], Merge{w.x, w.y}, part_o[a]);
              sum_l[j] = __fmaf_rn(sum_l[j], w.x, w.z);
            }
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < own; ++j) {
      const int at = thread + j * decode_threads;
      if (at < rows * (dim / 4)) store_out(c, at / (dim / 4), at % (dim / 4) * 4, sum_o[j], sum_l[j]);
    }
  };

  // --- products
  const uint32_t read_rows = swizzled<row_bytes>(lane % 16, lane / 16);  // chunk 2 n + c lies at that of chunk c, ^ n << 5
  const int v_row = fp8 ? lane % 16 : lane / 16 * 8 + lane % 8, v_chunk = fp8 ? lane / 16 : lane / 8 % 2;
  const uint32_t read_columns = swizzled<row_bytes>(v_row, v_chunk);
  uint32_t slot = 0;
  int buffer = 0;
  while (true) {
    const Sequence s = use.s;
    const bool is_first = use.place == r.first && use.tile == r.first_tile, is_last = use.place == r.last && use.tile == r.last_tile;
    const int low = first_visible(s.context, s.queries, p.window);
    const int start = low / partition, end = (s.context + partition - 1) / partition;
    const int from = is_first ? r.first_partition : start, to = is_last ? r.last_end : end;
    const bool continues = from > start;         // every partition's result waits for those before it
    const bool goes_on = !continues && to < end;  // the merged result waits for those after it
    const int rows = min(tile_rows, group * s.queries - use.tile * tile_rows);

    const uint32_t q_at = shared_address(shared + buffer * q_bytes);
    const auto read_queries = [&](int i, int step, uint32_t(&b)[2][2]) {  // of steps `step` and `step` + 1
      if constexpr (fp8) {  // the four e4m3 that a lane gets of a key are neighbours: head_dim is taken in that order on both sides
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint2 words = *reinterpret_cast<const uint2*>(
              shared + buffer * q_bytes + swizzled<q_row_bytes>(8 * i + lane_row, 2 * (step + n) + lane_pair / 2) + lane_pair % 2 * 8);
          b[n][0] = words.x, b[n][1] = words.y;
        }
      } else {
        uint32_t words[4];
        ldmatrix_x4(words, q_at + swizzled<q_row_bytes>(8 * i + lane % 8, 2 * step + lane / 8));
        b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
      }
    };
    uint32_t q[q_in_registers ? row_groups : 1][q_in_registers ? steps / 2 : 1][2][2];
    if constexpr (q_in_registers) {
#pragma unroll
      for (int i = 0; i < row_groups; ++i)
#pragma unroll
        for (int k = 0; k < steps / 2; ++k) read_queries(i, 2 * k, q[i][k]);
    }
    bool fetch_ahead = q_loads <= 2 && more_uses;  // the queries of next_use, whose words are still on their way

    // Of the item so far: thread t has columns 64 c + 4 (t % 16) .. of rows 8 i + t / 16.
    float4 in_registers[total_in_shared(row_groups) ? 1 : row_groups][dim / 64];
    const auto total = [&](int i, int c) -> float4& {
      if constexpr (total_in_shared(row_groups)) return kept[(i * (dim / 64) + c) * decode_threads + thread];
      else return in_registers[i][c];
    };
    float2 stats_in_registers[total_in_shared(row_groups) ? 1 : row_groups];
    const auto total_stats = [&](int i) -> float2& {  // (maximum, sum)
      if constexpr (total_in_shared(row_groups)) return kept_stats[i * decode_threads + thread];
      else return stats_in_registers[i];
    };
#pragma unroll
    for (int i = 0; i < row_groups; ++i) {
      total_stats(i) = make_float2(minus_infinity, 0.0f);
#pragma unroll
      for (int c = 0; c < dim / 64; ++c) total(i, c) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    const int first_slot = continues ? r.first_slot : r.last_slot, first_cut = continues ? r.first_cut : r.last_end;
    float* const partials = p.partials + (kv_head * d.slots + first_slot) * partial_floats(dim, row_groups);
    const auto partial = [&](int n) { return partials + int64_t{n} * partial_floats(dim, row_groups); };  // 0: merged up to the first cut
    if ((continues || goes_on) && first_slot + 1 + end - first_cut > d.slots) __trap();  // planned with more room than there is

    for (int part = from; part < to; ++part) {
      float o[steps][row_groups][4];
      float m[row_groups][2], l[row_groups][2];
#pragma unroll
      for (int i = 0; i < row_groups; ++i) {
        m[i][0] = m[i][1] = minus_infinity;
        l[i][0] = l[i][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < steps; ++n) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0.0f;
      }
      const int begin_tile = max(part * partition_tiles, low / tile_tokens);
      const int end_tile = min((part + 1) * partition_tiles, (s.context + tile_tokens - 1) / tile_tokens);
      for (int tile = begin_tile + ((warp - begin_tile) & (decode_warps - 1)); tile < end_tile; tile += decode_warps) {
        wait_tiles(d.stages);
        __syncwarp();
        const uint32_t k_at = ring + slot + read_rows;
        const int token = tile * tile_tokens + lane_row;
        const bool masked = tile * tile_tokens + tile_tokens - 1 > s.context - s.queries ||
                            (p.window > 0 && tile * tile_tokens <= s.context - 1 - p.window);
        uint32_t weights[row_groups][2];
        constexpr int at_once = row_groups < 2 ? row_groups : 2;  // more have no registers
#pragma unroll
        for (int first = 0; first < row_groups; first += at_once) {
          // S' = K Q', in two chains to halve their latency
          float x[at_once][4], y[at_once][4];
#pragma unroll
          for (int i = 0; i < at_once; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[i][e] = y[i][e] = 0.0f;
          const auto multiply = [&](int step, const uint32_t(&a)[4]) {  // step is a constant once unrolled
#pragma unroll
            for (int i = 0; i < at_once; ++i) {
              if constexpr (q_in_registers) {
                const auto& b = q[first + i][step / 2][step % 2];
                mma16816<T>(step % 2 ? y[i] : x[i], a, b[0], b[1]);
              } else {
                uint32_t b[2][2];
                read_queries(first + i, step / 2 * 2, b);
                mma16816<T>(step % 2 ? y[i] : x[i], a, b[step % 2][0], b[step % 2][1]);
              }
            }
          };
#pragma unroll
          for (int n = 0; n < (fp8 ? steps / 2 : steps); ++n) {
            uint32_t words[4];
            ldmatrix_x4(words, k_at ^ (n << 5));
            if constexpr (fp8) {
              const uint32_t a[4] = {e4m3x2_to_half2(words[0]), e4m3x2_to_half2(words[1]), e4m3x2_to_half2(words[0] >> 16),
                                     e4m3x2_to_half2(words[1] >> 16)};
              const uint32_t b[4] = {e4m3x2_to_half2(words[2]), e4m3x2_to_half2(words[3]), e4m3x2_to_half2(words[2] >> 16),
                                     e4m3x2_to_half2(words[3] >> 16)};
              multiply(2 * n, a);
              multiply(2 * n + 1, b);
            } else {
              multiply(n, words);
            }
          }
          if (first + at_once == row_groups) {
            __syncwarp();
            load_keys(ring + slot);
            slot += slot_bytes;
          }

          // softmax: x[i][2 h + e] is token 16 tile + lane_row + 8 h, row 8 (first + i) + 2 pair + e
#pragma unroll
          for (int i = 0; i < at_once; ++i) {
            float factor[2];
            bool moved = false;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float score = __fadd_rn(x[i][e], y[i][e]);
              x[i][e] = __fmul_rn(score, d.scale_log2);
              if (p.softcap > 0.0f) {  // tanh(u) = 1 - 2 / (1 + e^2u)
                const float grown = exp2_approx(__fmul_rn(fminf(__fmul_rn(score, d.cap), 40.0f), 2.0f * log2_e));
                x[i][e] = __fmul_rn(d.cap_log2, __fsub_rn(1.0f, __fdividef(2.0f, __fadd_rn(1.0f, grown))));
              }
            }
            if (masked || p.alibi) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const float2 facts = row_facts[buffer * tile_rows + 8 * (first + i) + 2 * lane_pair + e % 2];
                const int distance = token + e / 2 * 8 - __float_as_int(facts.x);
                if (p.alibi) x[i][e] = __fmaf_rn(facts.y, static_cast<float>(distance), x[i][e]);
                if (distance > 0 || (p.window > 0 && distance <= -p.window)) x[i][e] = minus_infinity;
              }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& row_m = m[first + i][e];
              float best = fmaxf(x[i][e], x[i][e + 2]);
              best = fmaxf(best, __shfl_xor_sync(~0u, best, 4));
              best = fmaxf(best, __shfl_xor_sync(~0u, best, 8));
              best = fmaxf(best, __shfl_xor_sync(~0u, best, 16));
              best = fmaxf(best, row_m);
              const float anchor = anchored(best);
              factor[e] = exp2_approx(__fsub_rn(row_m, anchor));
              moved |= best != row_m;
              row_m = best;
              x[i][e] = exp2_approx(__fsub_rn(x[i][e], anchor));
              x[i][e + 2] = exp2_approx(__fsub_rn(x[i][e + 2], anchor));
              l[first + i][e] = __fmaf_rn(l[first + i][e], factor[e], __fadd_rn(x[i][e], x[i][e + 2]));
            }
            weights[first + i][0] = transposed(pack2<T>(x[i][0], x[i][1]));
            weights[first + i][1] = transposed(pack2<T>(x[i][2], x[i][3]));
            if (__any_sync(~0u, moved)) {  // where no maximum moved the factors are exactly 1, or what they meet is 0
#pragma unroll
              for (int n = 0; n < steps; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[n][first + i][e] = __fmul_rn(o[n][first + i][e], factor[e % 2]);
            }
          }
        }

        // O' += V' P'
        wait_tiles(d.stages);
        __syncwarp();
        const uint32_t v_at = ring + slot + read_columns;
#pragma unroll
        for (int n = 0; n < (fp8 ? steps / 2 : steps); ++n) {
          uint32_t words[4];
          ldmatrix_x4_trans(words, v_at ^ (n << 5));
          if constexpr (fp8) {  // a lane gets two columns of two tokens: the even column becomes row j of V', the odd one row j + 8
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint32_t near = __byte_perm(words[2 * h], 0, 0x3120), far = __byte_perm(words[2 * h + 1], 0, 0x3120);
              const uint32_t a[4] = {e4m3x2_to_half2(near), e4m3x2_to_half2(near >> 16), e4m3x2_to_half2(far), e4m3x2_to_half2(far >> 16)};
#pragma unroll
              for (int i = 0; i < row_groups; ++i) mma16816<T>(o[2 * n + h][i], a, weights[i][0], weights[i][1]);
            }
          } else {
#pragma unroll
            for (int i = 0; i < row_groups; ++i) mma16816<T>(o[n][i], words, weights[i][0], weights[i][1]);
          }
        }
        __syncwarp();
        load_values(ring + slot);
        slot = slot + slot_bytes == ring_bytes ? 0 : slot + slot_bytes;
        if (fetch_ahead && part + 1 == to) {
          fetch_queries(next_use);
          fetch_ahead = false;
        }
      }

      // --- the four warps' results become the partition's
#pragma unroll
      for (int i = 0; i < row_groups; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum = l[i][e];
          sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 4));
          sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 8));
          sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 16));
          if (lane < 4) stats[warp * tile_rows + 8 * i + 2 * lane_pair + e] = make_float2(m[i][e], sum);
        }
      if (part + 1 == to && more_uses) {  // the barrier below shows them to all
        if (q_loads > 2 || fetch_ahead) fetch_queries(next_use);
        store_queries(buffer ^ 1, next_use);
      }
      const int row = thread / 16, column = thread % 16 * 4;
#pragma unroll
      for (int i = 0; i < row_groups; ++i) {
        if (8 * i >= rows) break;
        Merge by_total = {};
        float part_m = 0.0f, part_l = 0.0f, weight[decode_warps];
#pragma unroll
        for (int c = 0; c < dim / 64; ++c) {
          float* const mine = merge + warp * 8 * merge_pitch + 2 * lane_pair * merge_pitch;
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float* const v = o[4 * c + n][i];
            if constexpr (fp8) {
              *reinterpret_cast<float2*>(mine + 16 * n + 2 * lane_row) = make_float2(v[0], v[2]);
              *reinterpret_cast<float2*>(mine + merge_pitch + 16 * n + 2 * lane_row) = make_float2(v[1], v[3]);
            } else {
              mine[16 * n + lane_row] = v[0];
              mine[16 * n + lane_row + 8] = v[2];
              mine[merge_pitch + 16 * n + lane_row] = v[1];
              mine[merge_pitch + 16 * n + lane_row + 8] = v[3];
            }
          }
          __syncthreads();
          if (c == 0) {
            float2 of_warp[decode_warps];
            part_m = minus_infinity;
#pragma unroll
            for (int w = 0; w < decode_warps; ++w) {
              of_warp[w] = stats[w * tile_rows + 8 * i + row];
              part_m = fmaxf(part_m, of_warp[w].x);
            }
            const float anchor = anchored(part_m);
#pragma unroll
            for (int w = 0; w < decode_warps; ++w) {
              weight[w] = exp2_approx(__fsub_rn(of_warp[w].x, anchor));
              part_l = w ? __fmaf_rn(of_warp[w].y, weight[w], part_l) : __fmul_rn(of_warp[w].y, weight[w]);
            }
            if (!continues) by_total = merge_into(total_stats(i).x, total_stats(i).y, part_m, part_l);
          }
          float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
          for (int w = 0; w < decode_warps; ++w) {
            const float4 v = *reinterpret_cast<const float4*>(merge + (w * 8 + row) * merge_pitch + column);
            sum.x = __fmaf_rn(v.x, weight[w], sum.x);
            sum.y = __fmaf_rn(v.y, weight[w], sum.y);
            sum.z = __fmaf_rn(v.z, weight[w], sum.z);
            sum.w = __fmaf_rn(v.w, weight[w], sum.w);
          }
          if (!continues) {
            merge_into(total(i, c), by_total, sum);
          } else if (8 * i + row < rows) {
            float* const to_slot = partial(1 + part - first_cut);
            __stcg(reinterpret_cast<float4*>(to_slot + (8 * i + row) * dim + 64 * c + column), sum);
            if (c == 0 && column == 0) __stcg(reinterpret_cast<float2*>(to_slot + tile_rows * dim) + 8 * i + row, make_float2(part_m, part_l));
          }
          __syncthreads();
        }
      }
    }

    // --- the item's result
    if (!continues) {
      const int row = thread / 16, column = thread % 16 * 4;
#pragma unroll
      for (int i = 0; i < row_groups; ++i) {
        if (8 * i + row >= rows) break;
#pragma unroll
        for (int c = 0; c < dim / 64; ++c) {
          if (goes_on) __stcg(reinterpret_cast<float4*>(partial(0) + (8 * i + row) * dim + 64 * c + column), total(i, c));
          else store_out(use, 8 * i + row, 64 * c + column, total(i, c), total_stats(i).y);
        }
        if (goes_on && column == 0)
          __stcg(reinterpret_cast<float2*>(partial(0) + tile_rows * dim) + 8 * i + row, total_stats(i));
      }
    }
    if (continues || goes_on) {  // whoever finishes last merges what all have left
      __syncthreads();
      if (thread == 0) {
        int* const counter = p.work + counters_at + kv_head * d.ranges + (continues ? r.first_owner : range_index);
        __threadfence();  // after the barrier it speaks for all threads
        const bool is_last_to_finish = atomicAdd(counter, to - from) + to - from == end - start;
        if (is_last_to_finish) *counter = 0;
        __threadfence();
        *flag = is_last_to_finish;
      }
      __syncthreads();
      if (*flag) combine(use, rows, partials, 1 + end - first_cut);
    }

    if (!more_uses) break;
    use = next_use;
    more_uses = advance(next_use, r, active, group, tile_rows);
    buffer ^= 1;
  }
  cp_async_wait<0>();
#endif
}

#endif  // __CUDACC__
}  // namespace octavo::cuda
