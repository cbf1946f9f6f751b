// The decode kernel: attention of sequences with 1 to decode_queries new tokens. attention_decode.cu has the plan and the choice of an
// instance; attention_decode_*.cu compile the instances. It does not know how the work was cut, only how to walk its share.
//
// Flash decoding (Dao et al., 2023) over fixed partitions: the rows of a thread block are all (query token, head of the group) pairs of one
// KV head, so that keys and values are read once for the group. Products are taken transposed, S' = K Q' and O' = V' P', because a tensor-core
// product has 16 rows on one side and 8 columns on the other: tokens fill the 16, and the few queries need only multiples of 8.
//
// One thread block lives on an SM. Its work is a chain of steps: step by step its 8 computing warps take 8 neighbouring tiles of tokens, one
// each, and at the end of a partition they merge their results. Every warp streams its tiles through a ring of its own with cp.async; a tile
// without tokens takes its place in the ring too, so that all rings stand at the same slot, and the slot just used is the buffer of the
// merge. A ninth warp looks ahead: it claims ranges of the work list, finds blocks and queries, and writes out the steps.
//
// Invariant: the arithmetic of a row within a partition, of the merge of the warps and of the merge of partitions (merge_into) is written
// once, with its rounding spelled out; masked or absent tiles and partitions change nothing.
#pragma once

#include <type_traits>

#include "attention.h"
#include "launch.h"
#include "mma.cuh"

namespace octavo::cuda {

constexpr int decode_warps = 8, compute_threads = 32 * decode_warps, decode_threads = compute_threads + 32;
constexpr int granule = 8;  // tokens that lie in one block: every block_size is a multiple

// The work list. Unit u of the work is range u / kv_heads for KV head u % kv_heads: neighbours in time read the same blocks.
constexpr int max_ranges = 1024, max_counters = 4096, range_ints = 16, max_decode_seqs = 2048;
constexpr int used_at = 0, claims_at = 32;  // number of ranges; units that thread blocks have claimed after their first
constexpr int ranges_at = 64;
constexpr int counters_at = ranges_at + max_ranges * range_ints;  // [kv_heads, ranges] zeros: partitions of a split item that are finished
constexpr int active_at = counters_at + max_counters;             // [num_seqs] of Sequence
static_assert(active_at % 4 == 0 && ranges_at % 4 == 0, "ranges and sequences are read as 16 bytes");

// An item is one row tile of one sequence; items are in the order of sequences, then row tiles. A range is a run of partitions in that order.
struct Range {
  int first, first_tile, first_partition;  // where it begins: place in the list of active sequences, row tile, partition; first < 0: empty
  int last, last_tile, last_end;           // its last item, and the partition that follows the last one
  int first_slot, first_cut, first_owner;  // of a first item that began before: its partial results, its first cut, the range it begins in
  int last_slot;                           // of a last item that begins here and goes on: its partial results
  int unused[2];
};
struct __align__(16) Sequence {
  int index, query_start, queries, context;
};
static_assert(sizeof(Range) == 12 * 4 && sizeof(Sequence) == 16, "a range has 16 ints: Range, then the sequence of its first item");

struct DecodeLaunch {
  int places;           // of a warp's ring, odd
  int block_shift;      // log2 of block_size, or -1
  int64_t slots;        // partial results per kv head
  float scale_log2;     // of q.k, for exp2
  float cap, cap_log2;  // softcap: scale / softcap, softcap * log2(e)
  float out_scale;
};

__host__ __device__ constexpr int decode_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
// Groups of 8 rows that a thread block takes at once.
__host__ __device__ constexpr int decode_row_groups(int rows, int dim) { return rows <= 8 || dim == 256 ? 1 : 2; }
// Tokens of a warp's tile: a slot must hold 8 rows of float results, and three slots of 8 warps must fit.
__host__ __device__ constexpr int decode_tile(int dim, bool fp8) { return dim == 256 && !fp8 ? 16 : 32; }
__host__ __device__ constexpr int partial_floats(int dim, int row_groups) { return 8 * row_groups * (dim + 2); }  // results, then (maximum, sum)
// Items whose queries are in shared memory at once.
__host__ __device__ constexpr int query_buffers(int dim, int row_groups) {
  return 16384 / (16 * row_groups * dim) < 8 ? 16384 / (16 * row_groups * dim) : 8;
}

struct __align__(16) Step {
  int chunk;                    // of decode_warps tiles, from the start of the context
  int context, low;             // tokens outside [low, context) count nothing
  int first_position;           // of the first new token
  int kv_head, rows, item;      // rows of the row tile that exist; number of the item in this thread block
  int flags;                    // of Flag
  int partition, slot, cut;     // of an item that is split: its partial results, its first cut
  int counter, parts, all;      // where finished partitions are counted; those of this range, and of the item
  int end, unused;              // partition after the item's last
  int cells[32];                // of the first token of every granule: block * block_size + offset
};
enum Flag { item_begins = 1, partition_begins = 2, partition_ends = 4, range_ends = 8, continues = 16, goes_on = 32 };
constexpr int step_places = 8;

struct __align__(16) RowFacts {
  int position;
  float slope;
  int out_row, unused;  // token * heads + head
};

__host__ __device__ constexpr int decode_fixed_bytes(int dim, int row_groups) {
  return (query_buffers(dim, row_groups) * 8 * row_groups * (dim * 2 + 16) + 8192 + decode_warps * row_groups * 64 + step_places * 192 + 64 + 1023) /
         1024 * 1024;
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
__device__ __forceinline__ void merge_into(float2& total, const Merge& w, const float2& o) {
  total.x = __fmaf_rn(total.x, w.old_weight, __fmul_rn(o.x, w.new_weight));
  total.y = __fmaf_rn(total.y, w.old_weight, __fmul_rn(o.y, w.new_weight));
}

__device__ __forceinline__ void wait_places(int places) {  // until at most places - 1 places of the ring are still being filled
  if (places == 3) cp_async_wait<2>();
  else if (places == 5) cp_async_wait<4>();
  else if (places == 7) cp_async_wait<6>();
  else cp_async_wait<0>();
}
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(compute_threads) : "memory"); }  // of the computing warps
__device__ __forceinline__ int seen(const int* p) { return *reinterpret_cast<const volatile int*>(p); }
__device__ __forceinline__ int add_acq_rel(int* p, int value) {
  int old;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
#else
  old = 0;
#endif
  return old;
}

// What the looking-ahead warp and the computing warps tell each other, in shared memory. racecheck follows barriers and no flags: it reports these,
// and the steps, queries and rows that they announce. `step` and `item` need no fence: they allow to overwrite, behind a meet() of all readers.
struct Progress {
  int written;        // steps that are written out
  int last;           // number of steps, once known
  int queries_ready;  // items whose queries are there
  int step, item;     // that the computing warps are at
  int merge_all;      // the item that ends was finished here
};

template <class T, bool fp8, int dim, int row_groups>
struct DecodeShared {
  static constexpr int tile_rows = 8 * row_groups, buffers = query_buffers(dim, row_groups), q_bytes = tile_rows * dim * 2;
  unsigned char queries[buffers][q_bytes];
  float4 weights[512];  // [slots, tile_rows] of combine()
  RowFacts rows[buffers][tile_rows];
  float2 stats[decode_warps][tile_rows];  // (maximum, sum)
  Step steps[step_places];
  Progress progress;
};

// The looking-ahead warp.
template <class T, bool fp8, int dim, int row_groups>
__device__ __forceinline__ void look_ahead(const AttentionParams& p, const DecodeLaunch& d, DecodeShared<T, fp8, dim, row_groups>& shared) {
  using Shared = DecodeShared<T, fp8, dim, row_groups>;
  constexpr int tile_rows = Shared::tile_rows, tile_tokens = decode_tile(dim, fp8), chunk_tokens = tile_tokens * decode_warps;
  constexpr int chunks = partition / chunk_tokens;  // of a partition
  constexpr int q_chunks = dim / 8, q_loads = tile_rows * q_chunks / 32;
  const int lane = threadIdx.x % 32, group = p.heads / p.kv_heads, ahead = (d.places + 1) / 2 + 1;
  const Sequence* const active = reinterpret_cast<const Sequence*>(p.work + active_at);
  int written = 0, item = 0;
  const int first_rows = lane < p.num_seqs ? p.rows[lane] : 0;  // at once with the range, not after it
  int unit = blockIdx.x, units = 0;
  if (p.work) units = p.work[used_at] * p.kv_heads;
  while (true) {
    Range r = {};
    Sequence of_lane = {};  // lane i: the sequence at place base + i
    int base = 0;
    const int kv_head = unit % p.kv_heads, range = unit / p.kv_heads;
    if (p.work) {
      const int word = lane < range_ints ? p.work[ranges_at + range * range_ints + lane] : 0;
      if (unit >= units) break;  // after the load of the range has begun
      r = {__shfl_sync(~0u, word, 0), __shfl_sync(~0u, word, 1), __shfl_sync(~0u, word, 2), __shfl_sync(~0u, word, 3), __shfl_sync(~0u, word, 4),
           __shfl_sync(~0u, word, 5), __shfl_sync(~0u, word, 6), __shfl_sync(~0u, word, 7), __shfl_sync(~0u, word, 8), __shfl_sync(~0u, word, 9),
           {0, 0}};
      base = r.first;
      if (r.first == r.last)  // most ranges: no need to wait for the list
        of_lane = {__shfl_sync(~0u, word, 12), __shfl_sync(~0u, word, 13), __shfl_sync(~0u, word, 14), __shfl_sync(~0u, word, 15)};
      else if (r.first >= 0)
        of_lane = active[min(base + lane, r.last)];
    } else {  // without a plan a thread block takes one sequence
      const int queries = p.query_start[range + 1] - p.query_start[range], context = p.context_len[range];
      of_lane = {range, p.query_start[range], queries, context};
      if (queries >= 1 && queries <= decode_queries && context >= 1) {
        r.first_partition = first_visible(context, queries, p.window) / partition;
        r.last_tile = (group * queries - 1) / tile_rows;
        r.last_end = (context + partition - 1) / partition;
      } else {
        r.first = -1;
      }
    }
    if (r.first >= 0) {
      int place = r.first, tile = r.first_tile;
      int row_of_lane = __shfl_sync(~0u, first_rows, of_lane.index & 31);
      if (of_lane.index >= 32) row_of_lane = p.rows[of_lane.index];
      while (true) {
        if (place - base >= 32) {
          base = place;
          of_lane = active[min(base + lane, r.last)];
          row_of_lane = p.rows[of_lane.index];
        }
        const int from_lane = place - base;
        const Sequence s = {__shfl_sync(~0u, of_lane.index, from_lane), __shfl_sync(~0u, of_lane.query_start, from_lane),
                            __shfl_sync(~0u, of_lane.queries, from_lane), __shfl_sync(~0u, of_lane.context, from_lane)};
        const int* const table = p.block_tables + __shfl_sync(~0u, row_of_lane, from_lane) * p.table_stride;
        const bool is_first = place == r.first && tile == r.first_tile, is_last = place == r.last && tile == r.last_tile;
        const int low = first_visible(s.context, s.queries, p.window), rows = min(tile_rows, group * s.queries - tile * tile_rows);
        const int start = low / partition, end = (s.context + partition - 1) / partition;
        const int from = is_first ? r.first_partition : start, to = is_last ? r.last_end : end;
        const bool began = from > start;         // every partition's result waits for those before it
        const bool open = !began && to < end;    // the merged result waits for those after it
        const int slot = began ? r.first_slot : r.last_slot, cut = began ? r.first_cut : to;
        if ((began || open) && slot + 1 + end - cut > d.slots) __trap();  // planned with more room than there is

        // Queries: through registers, since they may need another type. Rows beyond the last and columns beyond head_dim are zeros.
        uint4 q[q_loads];
#pragma unroll
        for (int i = 0; i < q_loads; ++i) {
          const int at = lane + 32 * i, row = tile * tile_rows + at / q_chunks, chunk = at % q_chunks, token = row / group;
          q[i] = make_uint4(0, 0, 0, 0);
          if (token < s.queries && chunk * 8 < p.head_dim)
            q[i] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q) + (s.query_start + token) * p.q_stride +
                                                   (kv_head * group + row - token * group) * p.head_dim + chunk * 8);
        }
        bool stored = false;
        const auto store_queries = [&] {
          while (item - seen(&shared.progress.item) >= Shared::buffers - 1) __nanosleep(64);
          __syncwarp();
          const int buffer = item % Shared::buffers;
#pragma unroll
          for (int i = 0; i < q_loads; ++i) {
            const int at = lane + 32 * i;
            if (fp8 && p.act == bf16) {  // float16 holds a bfloat16 of any query that is not absurd; it saturates
              uint32_t words[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
#pragma unroll
              for (int w = 0; w < 4; ++w) {
                const float near = __uint_as_float(words[w] << 16), far = __uint_as_float(words[w] & 0xffff0000u);
                words[w] = pack2<__half>(near > 65504.0f ? 65504.0f : near < -65504.0f ? -65504.0f : near,
                                         far > 65504.0f ? 65504.0f : far < -65504.0f ? -65504.0f : far);
              }
              q[i] = make_uint4(words[0], words[1], words[2], words[3]);
            }
            *reinterpret_cast<uint4*>(shared.queries[buffer] + swizzled<dim * 2>(at / q_chunks, at % q_chunks)) = q[i];
          }
          if (lane < tile_rows) {
            const int row = min(tile * tile_rows + lane, group * s.queries - 1), token = row / group, head = kv_head * group + row - token * group;
            shared.rows[buffer][lane] = {s.context - s.queries + token, p.alibi ? p.alibi[head] * log2_e : 0.0f,
                                         (s.query_start + token) * p.heads + head, 0};
          }
          __syncwarp();
          __threadfence_block();  // behind the warp's meeting, so that the flag speaks for all lanes
          if (lane == 0) *const_cast<volatile int*>(&shared.progress.queries_ready) = item + 1;
          stored = true;
        };

        const int first_chunk = max(from * chunks, low / chunk_tokens), last_chunk = min(to * chunks, (s.context + chunk_tokens - 1) / chunk_tokens);
        for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
          const int token = chunk * chunk_tokens + lane * granule;
          int cell = 0;  // a granule without a visible token may have no block any more, or none yet
          if (lane * granule < chunk_tokens && token + granule > low && token < s.context) {
            const int block = d.block_shift >= 0 ? token >> d.block_shift : token / p.block_size;
            cell = table[block] * p.block_size + token - block * p.block_size;
          }
          if (!stored && written - seen(&shared.progress.step) > ahead) store_queries();
          while (written - seen(&shared.progress.step) > ahead) __nanosleep(32);
          __syncwarp();
          Step& step = shared.steps[written % step_places];
          step.cells[lane] = cell;
          if (lane == 0) {
            const int part = chunk / chunks;
            const bool begins = chunk == first_chunk, ends = chunk + 1 == last_chunk;
            const int flags = (begins ? item_begins : 0) | (begins || chunk % chunks == 0 ? partition_begins : 0) |
                              (ends || chunk % chunks == chunks - 1 ? partition_ends : 0) | (ends ? range_ends : 0) | (began ? continues : 0) |
                              (open ? goes_on : 0);
            int4* const words = reinterpret_cast<int4*>(&step);
            words[0] = make_int4(chunk, s.context, low, s.context - s.queries);
            words[1] = make_int4(kv_head, rows, item, flags);
            words[2] = make_int4(part, slot, cut, kv_head * (units / p.kv_heads) + (began ? r.first_owner : range));
            words[3] = make_int4(to - from, end - start, end, 0);
          }
          __syncwarp();
          __threadfence_block();
          ++written;
          if (lane == 0) *const_cast<volatile int*>(&shared.progress.written) = written;
        }
        if (!stored) store_queries();
        ++item;
        if (is_last) break;
        if ((tile + 1) * tile_rows < group * s.queries) ++tile;
        else ++place, tile = 0;
      }
    }
    if (!p.work) break;
    // Of as many claims as there are units every thread block makes one in vain; the last leaves the counter as it was found.
    int claim = 0;
    if (lane == 0) {
      claim = atomicAdd(p.work + claims_at, 1);
      if (claim == units - 1) p.work[claims_at] = 0;
    }
    unit = min(static_cast<int>(gridDim.x), units) + __shfl_sync(~0u, claim, 0);
    if (unit >= units) break;
  }
  if (lane == 0) *const_cast<volatile int*>(&shared.progress.last) = written;
}

// T: __nv_bfloat16 | __half, the type of the products. fp8: the cache has e4m3, T is __half and q and out have the type p.act.
template <class T, bool fp8, int dim, int row_groups>
__global__ void __launch_bounds__(decode_threads, 1)
    decode_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ DecodeLaunch d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  using Shared = DecodeShared<T, fp8, dim, row_groups>;
  constexpr int tile_tokens = decode_tile(dim, fp8), chunk_tokens = tile_tokens * decode_warps, tiles16 = tile_tokens / 16;
  constexpr int item_size = fp8 ? 1 : 2, row_bytes = dim * item_size, slot_bytes = tile_tokens * row_bytes;
  constexpr int chunks = row_bytes / 16, rows_at_once = 32 / chunks;  // one cp.async of a warp: rows_at_once tokens
  constexpr int tile_rows = 8 * row_groups, q_row_bytes = dim * 2;
  constexpr int steps = dim / 16;                           // of the product over head_dim, and tiles of 16 output columns
  constexpr bool q_in_registers = row_groups * dim <= 128;  // else read from shared memory for every tile
  static_assert(rows_at_once <= granule && granule % rows_at_once == 0, "a copy stays within a granule");
  static_assert(slot_bytes >= 8 * dim * 4, "a slot serves as the buffer of the merge");
  static_assert(sizeof(Shared) <= decode_fixed_bytes(dim, row_groups), "the ring follows");

  extern __shared__ __align__(1024) unsigned char all_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(all_shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, lane_row = lane / 4, lane_pair = lane % 4;
  dependents_start();
  if (threadIdx.x == compute_threads) shared.progress = {0, 0x7fffffff, 0, 0, 0, 0};
  __syncthreads();
  dependency_wait();
  if (warp == decode_warps) {
    look_ahead(p, d, shared);
    return;
  }

  unsigned char* const rings = all_shared + decode_fixed_bytes(dim, row_groups);
  const int ring_bytes = d.places * slot_bytes;
  const uint32_t ring = shared_address(rings) + warp * ring_bytes;
  const auto wait_step = [&](int n) {  // false: there is no step n
    while (true) {
      if (n < seen(&shared.progress.written)) break;
      if (n >= seen(&shared.progress.last)) return false;
    }
    __threadfence_block();
    __syncwarp();
    return true;
  };

  // --- loads
  const bool chunk_exists = lane % chunks * 16 < p.head_dim * item_size;  // the rest of a row of the tile is zero
  const int head_bytes = p.head_dim * item_size;
  const int64_t token_bytes = int64_t{p.kv_heads} * head_bytes;
  const int64_t lane_offset = (chunk_exists ? lane % chunks * 16 : 0) + lane / chunks * token_bytes;
  const uint32_t copy_to = swizzled<row_bytes>(lane / chunks, lane % chunks);  // for the first rows_at_once tokens
  const auto load = [&](const void* cache, int n, uint32_t slot) {             // this warp's tile of step n
    if (wait_step(n)) {
      const Step& step = shared.steps[n % step_places];
      const int begin = step.chunk * chunk_tokens + warp * tile_tokens, context = step.context, low = step.low;
      if (begin < context && begin + tile_tokens > low) {
        const char* const from = static_cast<const char*>(cache) + step.kv_head * head_bytes + lane_offset;
        const uint32_t first = begin + lane / chunks - low, visible = chunk_exists ? context - low : 0;
#pragma unroll
        for (int g = 0; g < tile_tokens / granule; ++g) {
          const char* source = from + step.cells[warp * (tile_tokens / granule) + g] * token_bytes;
#pragma unroll
          for (int i = 0; i < granule / rows_at_once; ++i) {
            const int row = g * granule + i * rows_at_once;
            const uint32_t to = slot + row * row_bytes + (copy_to ^ (swizzled<row_bytes>(row, 0) - row * row_bytes));
            cp_async16(to, source, first + row < visible);  // wraps around below low
            source += rows_at_once * token_bytes;
          }
        }
      }
    }
    cp_async_commit();
  };

  // --- results
  const auto store_out = [&](int out_row, int column, const float2& v, float by) {
    if (column >= p.head_dim) return;
    uint32_t* const to = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + int64_t{out_row} * p.head_dim + column);
    const bool as_half = fp8 ? p.act == f16 : std::is_same_v<T, __half>;
    *to = as_half ? pack2<__half>(__fmul_rn(v.x, by), __fmul_rn(v.y, by)) : pack2<__nv_bfloat16>(__fmul_rn(v.x, by), __fmul_rn(v.y, by));
  };
  const auto partials_of = [&](const Step& step) { return p.partials + (step.kv_head * d.slots + step.slot) * partial_floats(dim, row_groups); };
  const auto store_partial = [&](const Step& step, int n, int row, const float2(&v)[dim / 64], float part_m, float part_l) {
    float* const to = partials_of(step) + int64_t{n} * partial_floats(dim, row_groups);  // 0: merged up to the first cut
#pragma unroll
    for (int c = 0; c < dim / 64; ++c) __stcg(reinterpret_cast<float2*>(to + row * dim + 64 * c + 2 * lane), v[c]);
    if (lane == 0) __stcg(reinterpret_cast<float2*>(to + tile_rows * dim) + row, make_float2(part_m, part_l));
  };
  // The partial results of an item, merged left to right by this thread block: first the weights of all, then their sums. The same
  // arithmetic as merge_into: a maximum is exact in any order.
  const auto combine = [&](const Step& step, int buffer) {
    static_assert(512 / tile_rows % 32 == 0, "a warp's lanes write the weights of 32 slots");
    constexpr int at_once = 512 / tile_rows, fetched = row_groups == 1 && dim <= 128 ? 16 : 4;  // slots with weights; slots on their way
    constexpr int own = tile_rows * dim / (2 * compute_threads), own_rows = row_groups;
    constexpr int slot_floats = partial_floats(dim, row_groups);
    const float* const partials = partials_of(step);
    const int rows = step.rows, count = 1 + step.end - step.cut, thread = threadIdx.x;
    float2 part_o[fetched], sum_o[own];
    float sum_l[own], best[own_rows];
    const auto fetch = [&](int j, int n) {  // one address, constant distances; what does not exist is -0, which adds nothing to a zero
      const float2* const from = reinterpret_cast<const float2*>(partials + int64_t{n} * slot_floats) + thread + j * compute_threads;
#pragma unroll
      for (int a = 0; a < fetched; ++a) part_o[a] = n + a < count ? __ldcg(from + a * (slot_floats / 2)) : make_float2(-0.0f, -0.0f);
    };
    if (thread < rows * (dim / 2)) fetch(0, 0);
#pragma unroll
    for (int j = 0; j < own; ++j) sum_o[j] = make_float2(0.0f, 0.0f), sum_l[j] = 0.0f;
#pragma unroll
    for (int k = 0; k < own_rows; ++k) best[k] = minus_infinity;
    for (int first = 0; first < count; first += at_once) {
#pragma unroll
      for (int k = 0; k < own_rows; ++k) {
        const int row = warp + decode_warps * k;
        if (row >= rows) break;
        for (int n = 0; n < at_once && first + n < count; n += 32) {
          const bool exists = first + n + lane < count;
          float2 part = make_float2(minus_infinity, 0.0f);
          if (exists) part = __ldcg(reinterpret_cast<const float2*>(partials + int64_t{first + n + lane} * slot_floats + tile_rows * dim) + row);
          float running = fmaxf(part.x, best[k]);
#pragma unroll
          for (int s = 1; s < 32; s *= 2) {
            const float before = __shfl_up_sync(~0u, running, s);
            if (lane >= s) running = fmaxf(running, before);
          }
          const float before = __shfl_up_sync(~0u, running, 1), old = lane ? before : best[k], anchor = anchored(running);
          const float by = exp2_approx(__fsub_rn(part.x, anchor));
          shared.weights[(n + lane) * tile_rows + row] =
              exists ? make_float4(exp2_approx(__fsub_rn(old, anchor)), by, __fmul_rn(part.y, by), 0.0f) : make_float4(1.0f, 0.0f, -0.0f, 0.0f);
          best[k] = __shfl_sync(~0u, running, 31);
        }
      }
      meet();
#pragma unroll
      for (int j = 0; j < own; ++j) {
        const int row = (thread + j * compute_threads) / (dim / 2);
        if (row >= rows) break;
        for (int n = 0; n < at_once && first + n < count; n += fetched) {
          if (j + n + first > 0) fetch(j, first + n);
#pragma unroll
          for (int a = 0; a < fetched; ++a) {
            const float4 w = shared.weights[(n + a) * tile_rows + row];
            merge_into(sum_o[j], Merge{w.x, w.y}, part_o[a]);
            sum_l[j] = __fmaf_rn(sum_l[j], w.x, w.z);
          }
        }
      }
      meet();
    }
#pragma unroll
    for (int j = 0; j < own; ++j) {
      const int at = thread + j * compute_threads, row = at / (dim / 2);
      if (row < rows) store_out(shared.rows[buffer][row].out_row, at % (dim / 2) * 2, sum_o[j], __fdiv_rn(d.out_scale, sum_l[j]));
    }
  };

  // --- steps: keys and values of a step take one place of the ring each, in turn; a place is filled anew when it has been used
  const int keys_ahead = (d.places + 1) / 2;
  for (int i = 0; i < d.places; ++i) load(i % 2 ? p.v_cache : p.k_cache, i / 2, ring + i * slot_bytes);
  const uint32_t read_rows = swizzled<row_bytes>(lane % 16, lane / 16);  // chunk 2 n + c lies at that of chunk c, ^ n << 5
  const int v_row = fp8 ? lane % 16 : lane / 16 * 8 + lane % 8, v_chunk = fp8 ? lane / 16 : lane / 8 % 2;
  const uint32_t read_columns = swizzled<row_bytes>(v_row, v_chunk);
  const uint32_t read_q = fp8 ? swizzled<q_row_bytes>(lane_row, lane_pair / 2) + lane_pair % 2 * 8 : swizzled<q_row_bytes>(lane % 8, lane / 8);
  uint32_t place = 0;
  const auto next_place = [&] { place = place + slot_bytes == ring_bytes ? 0 : place + slot_bytes; };

  uint32_t q[q_in_registers ? row_groups : 1][q_in_registers ? steps / 2 : 1][2][2];
  float o[steps][row_groups][4], m[row_groups][2], l[row_groups][2];
  // Of the item so far: lane i has columns 64 c + 2 i .. of row 8 g + warp.
  float2 total[row_groups][dim / 64], total_stats[row_groups];
  for (int n = 0; wait_step(n); ++n) {
    const Step& step = shared.steps[n % step_places];
    const int flags = step.flags, rows = step.rows, item = step.item, buffer = item % Shared::buffers;
    if (threadIdx.x == 0) *const_cast<volatile int*>(&shared.progress.step) = n;
    const uint32_t q_at = shared_address(shared.queries[buffer]) + read_q;
    const auto read_queries = [&](int i, int k, uint32_t(&b)[2][2]) {  // of steps k and k + 1 of the product
      if constexpr (fp8) {  // the four e4m3 that a lane gets of a key are neighbours: head_dim is taken in that order on both sides
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint2 words = *reinterpret_cast<const uint2*>(shared.queries[buffer] + 8 * i * q_row_bytes + (read_q ^ ((k + h) << 5)));
          b[h][0] = words.x, b[h][1] = words.y;
        }
      } else {
        uint32_t words[4];
        ldmatrix_x4(words, (q_at + 8 * i * q_row_bytes) ^ (k << 5));  // k is even, so its chunks are apart from the lanes'
        b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
      }
    };
    if (flags & item_begins) {
      while (seen(&shared.progress.queries_ready) <= item) {}
      __threadfence_block();
      __syncwarp();
      if constexpr (q_in_registers) {
#pragma unroll
        for (int i = 0; i < row_groups; ++i)
#pragma unroll
          for (int k = 0; k < steps / 2; ++k) read_queries(i, 2 * k, q[i][k]);
      }
#pragma unroll
      for (int i = 0; i < row_groups; ++i) {
        total_stats[i] = make_float2(minus_infinity, 0.0f);
#pragma unroll
        for (int c = 0; c < dim / 64; ++c) total[i][c] = make_float2(0.0f, 0.0f);
      }
    }
    if (flags & partition_begins) {
#pragma unroll
      for (int i = 0; i < row_groups; ++i) {
        m[i][0] = m[i][1] = minus_infinity;
        l[i][0] = l[i][1] = 0.0f;
#pragma unroll
        for (int k = 0; k < steps; ++k) o[k][i][0] = o[k][i][1] = o[k][i][2] = o[k][i][3] = 0.0f;
      }
    }
    const int begin = step.chunk * chunk_tokens + warp * tile_tokens;  // of this warp's tile
    const bool exists = begin < step.context && begin + tile_tokens > step.low;
    uint32_t weights[row_groups][tiles16][2];
    wait_places(d.places);
    __syncwarp();
    if (exists) {
      const uint32_t k_at = ring + place + read_rows;
      const bool masked = begin + tile_tokens - 1 > step.first_position || (p.window > 0 && begin <= step.context - 1 - p.window);
      constexpr int at_once = tiles16 == 1 && row_groups > 1 ? 2 : 1;  // more have no registers
#pragma unroll
      for (int first = 0; first < row_groups; first += at_once) {
        // S' = K Q', in two chains to halve their latency
        float x[tiles16][at_once][4], y[tiles16][at_once][4];
#pragma unroll
        for (int t = 0; t < tiles16; ++t)
#pragma unroll
          for (int i = 0; i < at_once; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[t][i][e] = y[t][i][e] = 0.0f;
#pragma unroll
        for (int k = 0; k < steps / 2; ++k) {
          uint32_t b[at_once][2][2];
          if constexpr (!q_in_registers) {
#pragma unroll
            for (int i = 0; i < at_once; ++i) read_queries(first + i, 2 * k, b[i]);
          }
          const auto multiply = [&](int t, int h, const uint32_t(&a)[4]) {
#pragma unroll
            for (int i = 0; i < at_once; ++i) {
              if constexpr (q_in_registers) mma16816<T>(h ? y[t][i] : x[t][i], a, q[first + i][k][h][0], q[first + i][k][h][1]);
              else mma16816<T>(h ? y[t][i] : x[t][i], a, b[i][h][0], b[i][h][1]);
            }
          };
#pragma unroll
          for (int t = 0; t < tiles16; ++t) {
            const uint32_t tile_at = k_at + t * 16 * row_bytes;
            uint32_t words[4];
            if constexpr (fp8) {
              ldmatrix_x4(words, tile_at ^ (k << 5));
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const uint32_t a[4] = {e4m3x2_to_half2(words[2 * h]), e4m3x2_to_half2(words[2 * h + 1]), e4m3x2_to_half2(words[2 * h] >> 16),
                                       e4m3x2_to_half2(words[2 * h + 1] >> 16)};
                multiply(t, h, a);
              }
            } else {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                ldmatrix_x4(words, tile_at ^ ((2 * k + h) << 5));
                multiply(t, h, words);
              }
            }
          }
        }
        // softmax: x[t][i][2 h + e] is token begin + 16 t + lane_row + 8 h, row 8 (first + i) + 2 pair + e
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
          const int g = first + i;
          const RowFacts* const facts = shared.rows[buffer] + 8 * g + 2 * lane_pair;
#pragma unroll
          for (int t = 0; t < tiles16; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float& score = x[t][i][e];
              score = __fadd_rn(score, y[t][i][e]);
              if (p.softcap > 0.0f) {  // tanh(u) = 1 - 2 / (1 + e^2u)
                const float grown = exp2_approx(__fmul_rn(fminf(__fmul_rn(score, d.cap), 40.0f), 2.0f * log2_e));
                score = __fmul_rn(d.cap_log2, __fsub_rn(1.0f, __fdividef(2.0f, __fadd_rn(1.0f, grown))));
              } else {
                score = __fmul_rn(score, d.scale_log2);
              }
            }
            if (masked || p.alibi) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int distance = begin + 16 * t + lane_row + e / 2 * 8 - facts[e % 2].position;
                if (p.alibi) x[t][i][e] = __fmaf_rn(facts[e % 2].slope, static_cast<float>(distance), x[t][i][e]);
                if (distance > 0 || (p.window > 0 && distance <= -p.window)) x[t][i][e] = minus_infinity;
              }
            }
          }
          float factor[2];
          bool moved = false;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float best = fmaxf(x[0][i][e], x[0][i][e + 2]);
#pragma unroll
            for (int t = 1; t < tiles16; ++t) best = fmaxf(best, fmaxf(x[t][i][e], x[t][i][e + 2]));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 4));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 8));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 16));
            best = fmaxf(best, m[g][e]);
            const float anchor = anchored(best);
            factor[e] = exp2_approx(__fsub_rn(m[g][e], anchor));
            moved |= best != m[g][e];
            m[g][e] = best;
            float sum = 0.0f;
#pragma unroll
            for (int t = 0; t < tiles16; ++t) {
              x[t][i][e] = exp2_approx(__fsub_rn(x[t][i][e], anchor));
              x[t][i][e + 2] = exp2_approx(__fsub_rn(x[t][i][e + 2], anchor));
              sum = __fadd_rn(sum, __fadd_rn(x[t][i][e], x[t][i][e + 2]));
            }
            l[g][e] = __fmaf_rn(l[g][e], factor[e], sum);
          }
#pragma unroll
          for (int t = 0; t < tiles16; ++t) {
            weights[g][t][0] = transposed(pack2<T>(x[t][i][0], x[t][i][1]));
            weights[g][t][1] = transposed(pack2<T>(x[t][i][2], x[t][i][3]));
          }
          // Where no maximum moved the factors are exactly 1, or what they meet is 0; so too at the first tile of a partition.
          if (chunk_tokens < partition && __any_sync(~0u, moved)) {
#pragma unroll
            for (int k = 0; k < steps; ++k)
#pragma unroll
              for (int e = 0; e < 4; ++e) o[k][g][e] = __fmul_rn(o[k][g][e], factor[e % 2]);
          }
        }
      }
    }
    __syncwarp();
    load(p.v_cache, n + keys_ahead - 1, ring + place);
    next_place();

    // O' += V' P'
    wait_places(d.places);
    __syncwarp();
    if (exists) {
      const uint32_t v_at = ring + place + read_columns;
#pragma unroll
      for (int k = 0; k < (fp8 ? steps / 2 : steps); ++k) {
#pragma unroll
        for (int t = 0; t < tiles16; ++t) {
          uint32_t words[4];
          ldmatrix_x4_trans(words, (v_at + t * 16 * row_bytes) ^ (k << 5));
          if constexpr (fp8) {  // a lane gets two columns of two tokens: the even column becomes row j of V', the odd one row j + 8
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint32_t near = __byte_perm(words[2 * h], 0, 0x3120), far = __byte_perm(words[2 * h + 1], 0, 0x3120);
              const uint32_t a[4] = {e4m3x2_to_half2(near), e4m3x2_to_half2(near >> 16), e4m3x2_to_half2(far), e4m3x2_to_half2(far >> 16)};
#pragma unroll
              for (int i = 0; i < row_groups; ++i) mma16816<T>(o[2 * k + h][i], a, weights[i][t][0], weights[i][t][1]);
            }
          } else {
#pragma unroll
            for (int i = 0; i < row_groups; ++i) mma16816<T>(o[k][i], words, weights[i][t][0], weights[i][t][1]);
          }
        }
      }
    }
    __syncwarp();

    if (flags & partition_ends) {  // the warps' results become the partition's
#pragma unroll
      for (int i = 0; i < row_groups; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum = l[i][e];
          sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 4));
          sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 8));
          sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 16));
          if (lane < 4) shared.stats[warp][8 * i + 2 * lane_pair + e] = make_float2(m[i][e], sum);
        }
#pragma unroll
      for (int i = 0; i < row_groups; ++i) {
        if (8 * i >= rows) break;
        // Row y of the buffer has column x at x ^ 8 (y / 2 % 4): four row pairs of a warp fall into different banks.
        float* const mine = reinterpret_cast<float*>(rings + warp * ring_bytes + place) + 2 * lane_pair * dim;
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          float* const near = mine + ((16 * odd + (fp8 ? 2 : 1) * lane_row) ^ (8 * lane_pair));
          float* const far = mine + ((16 * odd + lane_row + 8) ^ (8 * lane_pair));
#pragma unroll
          for (int k = odd; k < steps; k += 2) {
            const float* const v = o[k][i];
            const int column = k / 2 * 32;
            if constexpr (fp8) {
              *reinterpret_cast<float2*>(near + column) = make_float2(v[0], v[2]);
              *reinterpret_cast<float2*>(near + dim + column) = make_float2(v[1], v[3]);
            } else {
              near[column] = v[0];
              far[column] = v[2];
              near[dim + column] = v[1];
              far[dim + column] = v[3];
            }
          }
        }
        meet();
        if (8 * i + warp < rows) {
          float part_m = minus_infinity, part_l = 0.0f, weight[decode_warps];
#pragma unroll
          for (int w = 0; w < decode_warps; ++w) part_m = fmaxf(part_m, shared.stats[w][8 * i + warp].x);
          const float anchor = anchored(part_m);
#pragma unroll
          for (int w = 0; w < decode_warps; ++w) {
            const float2 stat = shared.stats[w][8 * i + warp];
            weight[w] = exp2_approx(__fsub_rn(stat.x, anchor));
            part_l = __fmaf_rn(stat.y, weight[w], part_l);
          }
          float2 part[dim / 64];
#pragma unroll
          for (int c = 0; c < dim / 64; ++c) part[c] = make_float2(0.0f, 0.0f);
          const float* from = reinterpret_cast<const float*>(rings + place) + warp * dim + ((2 * lane) ^ (8 * (warp / 2)));
#pragma unroll
          for (int w = 0; w < decode_warps; ++w) {
#pragma unroll
            for (int c = 0; c < dim / 64; ++c) {
              const float2 v = *reinterpret_cast<const float2*>(from + 64 * c);
              part[c].x = __fmaf_rn(v.x, weight[w], part[c].x);
              part[c].y = __fmaf_rn(v.y, weight[w], part[c].y);
            }
            from += ring_bytes / 4;
          }
          if (flags & continues) {
            store_partial(step, 1 + step.partition - step.cut, 8 * i + warp, part, part_m, part_l);
          } else {
            const Merge by = merge_into(total_stats[i].x, total_stats[i].y, part_m, part_l);
#pragma unroll
            for (int c = 0; c < dim / 64; ++c) merge_into(total[i][c], by, part[c]);
          }
        }
        meet();
      }
      if (flags & range_ends) {
        if (!(flags & continues)) {
#pragma unroll
          for (int i = 0; i < row_groups; ++i) {
            if (8 * i + warp >= rows) break;
            if (flags & goes_on) {
              store_partial(step, 0, 8 * i + warp, total[i], total_stats[i].x, total_stats[i].y);
            } else {
              const float by = __fdiv_rn(d.out_scale, total_stats[i].y);
#pragma unroll
              for (int c = 0; c < dim / 64; ++c) store_out(shared.rows[buffer][8 * i + warp].out_row, 64 * c + 2 * lane, total[i][c], by);
            }
          }
        }
        if (flags & (continues | goes_on)) {  // whoever finishes last merges what all have left
          meet();
          if (threadIdx.x == 0) {
            int* const counter = p.work + counters_at + step.counter;
            const bool all = add_acq_rel(counter, step.parts) + step.parts == step.all;  // after the barrier it speaks for all threads
            if (all) *counter = 0;
            shared.progress.merge_all = all;
          }
          meet();
          if (shared.progress.merge_all) combine(step, buffer);
        }
        if (threadIdx.x == 0) *const_cast<volatile int*>(&shared.progress.item) = item + 1;
      }
    }
    load(p.k_cache, n + keys_ahead, ring + place);
    next_place();
  }
  cp_async_wait<0>();
#endif
}

#endif  // __CUDACC__
}  // namespace octavo::cuda
