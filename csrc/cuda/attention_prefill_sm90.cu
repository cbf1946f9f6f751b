// Paged causal attention of sequences with many new tokens on Hopper: wgmma, bulk copies, warps with different tasks. Owns its tiling;
// the list of tiles is prefill_work.h's. It knows no ALiBi, no 8-bit caches and no other architecture (prefill_sm90_takes says so).
//
// After FlashAttention-3 (Shah et al., arXiv 2407.08608). One thread block lives on each multiprocessor and walks through its share of
// (tile, KV head) pairs. A tile is 128 packed rows: packed row r is new token r / group and query head r % group. Per thread block:
//
//   warps 0 and 1              keys; values: one bulk copy for each piece (a page, or `keys` tokens of a larger one) and panel
//   warps 2 and 3              queries, 16 bytes at a time, since a tile may begin in the middle of a token's heads
//   warpgroups 1 and 2         64 rows each: S = Q K^T, softmax, O += P V. While one is at its softmax the other has the tensor cores
//                              (named barriers hand the turn over), and S of the next keys is computed before P V of these is over.
//
// Invariant: a row sees the keys in blocks of `keys` tokens counted from position 0, left to right, and a block of which it sees
// nothing changes none of its bits; so its result depends neither on the batch nor on how the prompt was cut into chunks.
#include <cuda_runtime.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "hopper.cuh"
#include "launch.h"
#include "prefill_work.h"
#include "tensor_map.h"

namespace octavo::cuda {

#ifdef OCTAVO_TENSOR_MAPS
namespace {

constexpr int tile_rows = prefill_tile_rows;
constexpr int group_rows = 64;  // of a warpgroup
constexpr int consumers = tile_rows / group_rows;
constexpr int threads = 128 * (1 + consumers);
constexpr int panel_elements = 64;  // 128 bytes

// A thread block starts with what a register file of 65,536 gives 384 threads, 168 each, and its warpgroups share that out anew.
constexpr int start_registers = 65536 / threads / 8 * 8, producer_registers = 88, consumer_registers = 208;
static_assert(producer_registers + consumers * consumer_registers <= (1 + consumers) * start_registers, "the last warpgroup would wait");

template <int head_dim>
struct Shape {
  static constexpr int panels = head_dim / panel_elements;
  static constexpr int keys = head_dim == 256 ? 64 : 128;    // of a block
  static constexpr int stages = head_dim == 64 ? 4 : 2;      // blocks of keys, and of values, in shared memory
  static constexpr int queries = head_dim == 256 ? 1 : 2;    // tiles of queries in shared memory
  static constexpr uint32_t query_panel = group_rows * 128;  // bytes
  static constexpr uint32_t query_bytes = consumers * panels * query_panel;
  static constexpr uint32_t panel = keys * 128;
  static constexpr uint32_t block_bytes = panels * panel;
  static constexpr size_t shared = 1024 + queries * query_bytes + 2 * stages * block_bytes;
};

struct Arguments {
  void* out;                // act [T, Q, D]
  const void* q;            // act [T, Q, D], rows q_stride elements apart
  const int* block_tables;  // [R, M], rows table_stride apart
  const int* rows;          // [N]
  const int* query_start;   // [N + 1]
  const int* tiles;         // prefill_work.h
  int64_t q_stride, table_stride;
  int heads, kv_heads, group, block_size, window;
  uint32_t by_group;  // 2^32 / group, rounded up; 0 for a group of 1
  float scale, softcap;
};

}  // namespace

#ifdef OCTAVO_HOPPER
namespace {

using namespace hopper;

constexpr int loaders = 64;      // threads that load queries
constexpr int turn_barrier = 1;  // named barriers turn_barrier + warpgroup
constexpr float minus_infinity = -INFINITY;

template <int stages>
struct Ring {  // a place in a ring of buffers, and the parity of the barrier's phase there
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void step() {
    if (++at == stages) at = 0, parity ^= 1;
  }
};

template <int head_dim>
struct Barriers {
  using S = Shape<head_dim>;
  uint64_t query_full[S::queries], query_free[S::queries];
  uint64_t key_full[S::stages], key_free[S::stages];
  uint64_t value_full[S::stages], value_free[S::stages];
  uint64_t value_tail;
};

struct Tile {
  int query_start, first_row, context, fresh;  // first token, first packed row, keys and new tokens of the sequence
  int begin, end;                              // keys that some row of the tile sees; begin is a multiple of the block
};

// Round r of this thread block; every second round runs backwards, which evens out a list that is sorted by length.
__device__ __forceinline__ unsigned item_of(int round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}
__device__ __forceinline__ int head_of(const Arguments& a, unsigned item) { return static_cast<int>(item % static_cast<unsigned>(a.kv_heads)); }

// Which new token a packed row is; exact while row * group is below 2^32.
__device__ __forceinline__ int token_of(const Arguments& a, int row) { return a.by_group ? __umulhi(row, a.by_group) : row; }

// What a warp knows of 32 rounds, one a lane, so that it reads the lists rarely and all at once.
template <int keys>
struct Agenda {
  Tile tile;
  int row;  // of the block tables

  // All lanes call it, and once more when 32 rounds are over.
  __device__ __forceinline__ void read(const Arguments& a, int round, unsigned items) {
    const unsigned item = item_of(round + (threadIdx.x & 31));
    if (item >= items) return;
    const int* entry = a.tiles + prefill_header_ints + int64_t{item / static_cast<unsigned>(a.kv_heads)} * prefill_tile_ints;
    const int sequence = entry[0];
    tile.first_row = entry[1];
    tile.query_start = entry[2];
    tile.context = entry[3];
    row = a.rows[sequence];
    tile.fresh = a.query_start[sequence + 1] - tile.query_start;
    const int before = tile.context - tile.fresh, last = min(tile.first_row + tile_rows, tile.fresh * a.group) - 1;
    tile.end = before + token_of(a, last) + 1;
    tile.begin = a.window > 0 ? max(0, before + token_of(a, tile.first_row) - a.window + 1) / keys * keys : 0;
  }
  __device__ __forceinline__ int of(int round, int value) const { return __shfl_sync(0xffffffffu, value, round & 31); }
};

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_of(float x) {  // absolute error 2e-7: a power and a quotient; tanh.approx has 5e-4
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + power_of_two(x * 2.885390082f)));
  return 1.f - 2.f * y;
}

template <bool bf16>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  uint32_t y;
  if constexpr (bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// --- warps 0 and 1 of the producers --------------------------------------------------------------------------------------------------
// Where one block of keys or values lies: lane i copies panel i % panels of piece i / panels, since pieces have at least 8 tokens.
template <int head_dim>
struct Pieces {
  using S = Shape<head_dim>;
  static_assert(S::keys / 8 * S::panels <= 32, "a lane has at most one copy");
  int size, log_block;  // tokens of a piece; log2 of the block size
  int token;            // of the lane's piece within the block of keys
  bool active;          // the lane has a copy

  __device__ explicit Pieces(int block_size) : size(min(block_size, S::keys)), log_block(31 - __clz(block_size)) {
    token = (threadIdx.x & 31) / S::panels * size;
    active = token < S::keys;
  }
  __device__ __forceinline__ int page(const int* table, int block, int end) const {
    const int at = block + token;
    return active && at < end ? table[at >> log_block] : 0;
  }
  // Pieces behind `end` come from a head that does not exist: zeros.
  __device__ __forceinline__ void copy(uint32_t target, const void* map, int head, int kv_heads, int page, int block, int end,
                                       uint32_t barrier) const {
    const int lane = threadIdx.x & 31, panel = lane % S::panels, at = block + token;
    if (lane == 0) barrier_expect(barrier, S::block_bytes);
    __syncwarp();
    if (active)
      copy_box(target + panel * S::panel + token * 128, map, panel * panel_elements, at < end ? head : kv_heads, at & ((1 << log_block) - 1),
               page, barrier);
    __syncwarp();
  }
  // How many tokens behind the context's end are in the same piece as its last one, if that piece is in this block and is copied.
  __device__ __forceinline__ int zeros(int context, int block, int end) const {
    const int piece = context & ~(size - 1);  // where the piece that `context` points into begins
    return context != piece && piece >= block && piece < min(block + S::keys, end) ? piece + size - context : 0;
  }
};

// A warp that brings all blocks of keys, or all blocks of values, of this thread block's items. Copies are issued one lane after the
// other and cost their warp more time than they cost the copy engine: hence two warps.
template <int head_dim, bool values>
__device__ __forceinline__ void load_blocks(const Arguments& a, const void* map, uint64_t* full, uint64_t* free, uint64_t& tail,
                                            uint32_t memory, unsigned items) {
  using S = Shape<head_dim>;
  const int lane = threadIdx.x & 31;
  const Pieces<head_dim> pieces(a.block_size);
  Ring<S::stages> ring;
  uint32_t tail_parity = 0;
  Agenda<S::keys> agenda;
  agenda.read(a, 0, items);
  int begin = agenda.of(0, agenda.tile.begin), end = agenda.of(0, agenda.tile.end), context = agenda.of(0, agenda.tile.context);
  const int* table = a.block_tables + agenda.of(0, agenda.row) * a.table_stride;
  bool more = item_of(0) < items;  // only the last round has gaps, so a gap is the end
  int page = more ? pieces.page(table, begin, end) : 0;
  for (int round = 0; more;) {
    const int head = head_of(a, item_of(round));
    more = item_of(++round) < items;
    if (more && round % 32 == 0) agenda.read(a, round, items);
    const int next_begin = agenda.of(round, agenda.tile.begin), next_end = agenda.of(round, agenda.tile.end);
    const int next_context = agenda.of(round, agenda.tile.context);
    const int* next_table = a.block_tables + agenda.of(round, agenda.row) * a.table_stride;
    for (int block = begin; block < end; block += S::keys) {
      // The pages of the block after this one are looked up before there is room for it.
      const bool last = block + S::keys >= end;
      const int next_page = !last ? pieces.page(table, block + S::keys, end) : more ? pieces.page(next_table, next_begin, next_end) : 0;
      barrier_wait(shared_address(&free[ring.at]), ring.parity ^ 1);
      const uint32_t target = memory + ring.at * S::block_bytes, ready = shared_address(&full[ring.at]);
      // The last piece of a context may hold anything behind its end. Scores there are overwritten, but a value that is NaN would get
      // through a weight of zero.
      const int zeros = values ? pieces.zeros(context, block, end) : 0;
      pieces.copy(target, map, head, a.kv_heads, page, block, end, zeros ? shared_address(&tail) : ready);
      if (zeros) {
        barrier_wait(shared_address(&tail), tail_parity);
        tail_parity ^= 1;
        const uint32_t first = target + (context - block) * 128;
#pragma unroll 1
        for (int panel = 0; panel < S::panels; ++panel)
#pragma unroll 1
          for (int i = lane; i < zeros * 8; i += 32)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(first + panel * S::panel + i * 16), "r"(0) : "memory");
        publish_shared();
        __syncwarp();
        if (lane == 0) barrier_arrive(ready);
      }
      ring.step();
      page = next_page;
    }
    begin = next_begin, end = next_end, context = next_context, table = next_table;
  }
}

// --- warps 2 and 3 of the producers ---------------------------------------------------------------------------------------------------
template <int head_dim>
__device__ __forceinline__ void load_queries(const Arguments& a, Barriers<head_dim>& barriers, Tile* tiles, uint32_t queries, unsigned items) {
  using S = Shape<head_dim>;
  constexpr int chunks = head_dim / 8;  // of a row
  const int thread = threadIdx.x - (128 - loaders);
  Ring<S::queries> ring;
  Agenda<S::keys> agenda;
  for (int round = 0; item_of(round) < items; ++round) {
    if (round % 32 == 0) agenda.read(a, round, items);
    Tile tile;
    tile.query_start = agenda.of(round, agenda.tile.query_start);
    tile.first_row = agenda.of(round, agenda.tile.first_row);
    tile.context = agenda.of(round, agenda.tile.context);
    tile.fresh = agenda.of(round, agenda.tile.fresh);
    tile.begin = agenda.of(round, agenda.tile.begin);
    tile.end = agenda.of(round, agenda.tile.end);
    const int head = head_of(a, item_of(round)) * a.group;
    barrier_wait(shared_address(&barriers.query_free[ring.at]), ring.parity ^ 1);
    const uint32_t target = queries + ring.at * S::query_bytes;
    const int rows = min(tile_rows, tile.fresh * a.group - tile.first_row);
    static_assert(loaders % chunks == 0, "a thread has the same chunk of every row");
    const int chunk = thread % chunks;
    for (int row = thread / chunks; row < tile_rows; row += loaders / chunks) {
      const int packed_row = tile.first_row + (row < rows ? row : 0);
      const int token = token_of(a, packed_row);
      const int64_t at = (tile.query_start + token) * a.q_stride + static_cast<int64_t>(head + packed_row - token * a.group) * head_dim;
      const uint32_t place = (row / group_rows * S::panels + chunk / 8) * S::query_panel + row % group_rows * 128 + ((chunk ^ row) & 7) * 16;
      copy_chunk(target + place, static_cast<const uint16_t*>(a.q) + at + chunk * 8, row < rows);
    }
    if (thread == 0) tiles[ring.at] = tile;
    copy_chunks_wait();
    publish_shared();
    barrier_arrive(shared_address(&barriers.query_full[ring.at]));
    ring.step();
  }
}

// --- warpgroups 1 and 2 --------------------------------------------------------------------------------------------------------------
// One warpgroup's rows. Arrays of two: the thread's upper and lower row.
template <bool bf16, int head_dim>
struct Rows {
  using S = Shape<head_dim>;
  float o[head_dim / 2];     // O, not yet divided by the sums
  float s[S::keys / 2];      // S, then P in float32
  uint32_t p[S::keys / 4];   // P
  float top[2], sum[2];      // largest score so far; this thread's part of the sum of weights
  int position[2];           // of the row's token
  int low, high;             // positions of the warp's first and last row

  // S = Q K^T. `queries`: the warpgroup's rows.
  __device__ __forceinline__ void scores(uint32_t queries, uint32_t keys) {
    const uint64_t q = operand(queries, 0), k = operand(keys, 0);
#pragma unroll
    for (int i = 0; i < head_dim / 16; ++i) {
      const uint32_t inside = i % 4 * 2;  // 16 elements are 32 bytes; descriptors count 16
      multiply<bf16, S::keys>(s, q + (i / 4 * (S::query_panel >> 4) + inside), k + (i / 4 * (S::panel >> 4) + inside), i > 0);
    }
    products_issued();
  }

  // O += P V.
  __device__ __forceinline__ void mix(uint32_t values) {
    const uint64_t v = operand(values, S::panel);
#pragma unroll
    for (int i = 0; i < S::keys / 16; ++i) multiply_add<bf16, head_dim>(o, p + 4 * i, v + i * (16 * 128 >> 4));
    products_issued();
  }

  // Scores become weights 2^(slope (s - top)); `shrink` is what earlier weights are worth now.
  __device__ __forceinline__ void soften(const Arguments& a, float slope, int block, float (&shrink)[2]) {
    if (a.softcap > 0.f) {
      const float inner = a.scale / a.softcap;
#pragma unroll
      for (int i = 0; i < S::keys / 2; ++i) s[i] = tanh_of(s[i] * inner);
    }
    const int first = block + 2 * (threadIdx.x & 3);
    if (block + S::keys - 1 > low || (a.window > 0 && block <= high - a.window)) {
      const uint32_t window = a.window > 0 ? a.window : INT32_MAX;
#pragma unroll
      for (int j = 0; j < S::keys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (static_cast<uint32_t>(position[e / 2] - first - (8 * j + e % 2)) >= window) s[4 * j + e] = minus_infinity;
    }
    // Both rows step by step together, and four chains of maxima and of sums: there are few warps to fill the gaps.
    float best[4], base[2], sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int e = 0; e < 4; ++e) best[e] = s[e];
#pragma unroll
    for (int i = 4; i < S::keys / 2; ++i) best[i % 4] = fmaxf(best[i % 4], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) best[r] = fmaxf(best[2 * r], best[2 * r + 1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
#pragma unroll
    for (int r = 0; r < 2; ++r) best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 2));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best[r] = fmaxf(best[r], top[r]);
      const float used = best[r] == minus_infinity ? 0.f : best[r];  // a row that has seen no key yet gets weights of zero
      base[r] = used * slope;
      shrink[r] = power_of_two((top[r] - used) * slope);  // exactly 1 where the largest score stays
      top[r] = best[r];
    }
#pragma unroll
    for (int i = 0; i < S::keys / 2; ++i) {
      s[i] = power_of_two(fmaf(s[i], slope, -base[i / 2 % 2]));
      sums[i % 4] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = fmaf(sum[r], shrink[r], sums[2 * r] + sums[2 * r + 1]);
  }

  __device__ __forceinline__ void rescale(const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) o[i] *= shrink[i / 2 % 2];
  }

  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < S::keys / 4; ++i) p[i] = packed<bf16>(s[2 * i], s[2 * i + 1]);
  }

  // Divides and writes; four threads swap their columns first, so that each writes 16 bytes at a time.
  __device__ __forceinline__ void store(const Arguments& a, const Tile& tile, int row, int head) {
    const int lane = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float share = 1.f / total;
      const int packed_row = tile.first_row + row + 8 * r;
      const int token = token_of(a, packed_row);
      const int64_t at = (static_cast<int64_t>(tile.query_start + token) * a.heads + head + packed_row - token * a.group) * head_dim;
      uint16_t* out = static_cast<uint16_t*>(a.out) + at;
#pragma unroll
      for (int b = 0; b < head_dim / 32; ++b) {
        uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 4 * (4 * b + j) + 2 * r;
          w[j] = packed<bf16>(o[i] * share, o[i + 1] * share);
        }
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2) {  // transposes w over the four threads
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (j & bit) continue;
            const bool upper = lane & bit;
            const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[j] : w[j | bit], bit);
            if (upper)
              w[j] = got;
            else
              w[j | bit] = got;
          }
        }
        if (packed_row < tile.fresh * a.group) *reinterpret_cast<uint4*>(out + (4 * b + lane) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
};

template <bool bf16, int head_dim>
__device__ __forceinline__ void attend(const Arguments& a, Barriers<head_dim>& barriers, const Tile* tiles, uint32_t queries, uint32_t keys,
                                       uint32_t values, unsigned items) {
  using S = Shape<head_dim>;
  const int warpgroup = threadIdx.x / 128 - 1;
  const int lane = threadIdx.x & 31;
  const int row = threadIdx.x / 32 % 4 * 16 + lane / 4 + warpgroup * group_rows;
  const int own_turn = turn_barrier + warpgroup, next_turn = turn_barrier + (warpgroup + 1) % consumers;
  constexpr float log2_e = 1.4426950408889634f;
  const float slope = (a.softcap > 0.f ? a.softcap : a.scale) * log2_e;
  Ring<S::queries> query;
  Ring<S::stages> key, value;
  // One lane for its warp, whose products are over as one. racecheck before 2026.3 has false alarms at mbarriers, at bulk copies that complete them
  // and at warpgroups (its release notes).
  const auto release = [&](uint64_t& barrier) {
    if (lane == 0) barrier_arrive(shared_address(&barrier));
  };
  Rows<bf16, head_dim> rows;
#pragma unroll
  for (float& x : rows.s) x = 0.f;
  if (warpgroup == consumers - 1) named_arrive(next_turn, 256);  // warpgroup 0 has the first turn

  for (int round = 0; item_of(round) < items; ++round) {
    barrier_wait(shared_address(&barriers.query_full[query.at]), query.parity);
    const Tile tile = tiles[query.at];
    const uint32_t q = queries + query.at * S::query_bytes + warpgroup * S::panels * S::query_panel;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.position[r] = tile.context - tile.fresh + token_of(a, tile.first_row + row + 8 * r);
      rows.top[r] = minus_infinity;
      rows.sum[r] = 0.f;
    }
    rows.low = __shfl_sync(0xffffffffu, rows.position[0], 0);
    rows.high = __shfl_sync(0xffffffffu, rows.position[1], 31);
#pragma unroll
    for (float& x : rows.o) x = 0.f;

    float shrink[2];
    barrier_wait(shared_address(&barriers.key_full[key.at]), key.parity);
    settle(rows.s);
    products_begin();
    rows.scores(q, keys + key.at * S::block_bytes);
    products_wait<0>();
    settle(rows.s);
    release(barriers.key_free[key.at]);
    key.step();
    rows.soften(a, slope, tile.begin, shrink);
    rows.pack();

    // Waits for what the next product needs: keys, or behind the last keys the last values.
    const auto next_operand = [&](int block) {
      const bool more = block < tile.end;
      barrier_wait(shared_address(more ? &barriers.key_full[key.at] : &barriers.value_full[value.at]), more ? key.parity : value.parity);
    };
    int block = tile.begin + S::keys;
    next_operand(block);
    while (block < tile.end) {
      named_sync(own_turn, 256);
      settle(rows.s);
      settle(rows.p);
      settle(rows.o);
      products_begin();
      rows.scores(q, keys + key.at * S::block_bytes);
      barrier_wait(shared_address(&barriers.value_full[value.at]), value.parity);
      products_begin();
      rows.mix(values + value.at * S::block_bytes);
      named_arrive(next_turn, 256);
      products_wait<1>();
      settle(rows.s);
      release(barriers.key_free[key.at]);
      key.step();
      rows.soften(a, slope, block, shrink);
      settle(rows.s);
      const int mixed = value.at;
      value.step();
      block += S::keys;
      next_operand(block);  // here, because the loop in it keeps the compiler from waiting for the product before the softmax
      products_wait<0>();
      settle(rows.o);
      release(barriers.value_free[mixed]);
      // A factor of 1 changes nothing, and after the first few blocks most are 1; where a row is short, to ask costs more than to multiply.
      if (head_dim == 64 || __any_sync(0xffffffffu, shrink[0] != 1.f || shrink[1] != 1.f)) rows.rescale(shrink);
      rows.pack();
    }
    __syncwarp();  // all lanes have read `tiles`
    release(barriers.query_free[query.at]);
    query.step();
    settle(rows.p);
    settle(rows.o);
    products_begin();
    rows.mix(values + value.at * S::block_bytes);
    products_wait<0>();
    settle(rows.o);
    release(barriers.value_free[value.at]);
    value.step();
    rows.store(a, tile, row, head_of(a, item_of(round)) * a.group);
  }
  if (warpgroup == 0) named_sync(own_turn, 256);  // takes the turn that is left over
}

}  // namespace
#endif  // OCTAVO_HOPPER

namespace {

// Where it is not compiled for Hopper the kernel is empty, and has no static shared memory: built_for_device() looks at that.
template <bool bf16, int head_dim>
__global__ void __launch_bounds__(threads, 1)
    prefill_kernel(const Arguments a, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
#ifdef OCTAVO_HOPPER
  using S = Shape<head_dim>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Barriers<head_dim> barriers;
  __shared__ Tile tiles[S::queries];
  const uint32_t queries = (shared_address(dynamic) + 1023) / 1024 * 1024;
  const uint32_t keys = queries + S::queries * S::query_bytes;
  const uint32_t values = keys + S::stages * S::block_bytes;
  if (threadIdx.x == 0) {
    prefetch_map(&k_map);
    prefetch_map(&v_map);
    for (int i = 0; i < S::queries; ++i) {
      barrier_init(shared_address(&barriers.query_full[i]), loaders);
      barrier_init(shared_address(&barriers.query_free[i]), 4 * consumers);
    }
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(shared_address(&barriers.key_full[i]), 1);
      barrier_init(shared_address(&barriers.key_free[i]), 4 * consumers);
      barrier_init(shared_address(&barriers.value_full[i]), 1);
      barrier_init(shared_address(&barriers.value_free[i]), 4 * consumers);
    }
    barrier_init(shared_address(&barriers.value_tail), 1);
    barrier_init_done();
  }
  __syncthreads();
  dependency_wait();
  const unsigned items = a.tiles[0] * a.kv_heads;
  if (threadIdx.x < 128) {
    give_registers<producer_registers>();
    if (threadIdx.x < 32) {
      load_blocks<head_dim, false>(a, &k_map, barriers.key_full, barriers.key_free, barriers.value_tail, keys, items);
      dependents_start();
    } else if (threadIdx.x < 64) {
      load_blocks<head_dim, true>(a, &v_map, barriers.value_full, barriers.value_free, barriers.value_tail, values, items);
    } else {
      load_queries<head_dim>(a, barriers, tiles, queries, items);
    }
  } else {
    take_registers<consumer_registers>();
    attend<bf16, head_dim>(a, barriers, tiles, queries, keys, values, items);
  }
#endif
}

// The image that the runtime chose for this device has the kernel's body (a build for 9.0 without "a" has not).
bool built_for_device() {
  static const bool built = [] {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, prefill_kernel<true, 128>), "octavo");
    return attributes.sharedSizeBytes > 0;
  }();
  return built;
}

// A cache [B, S, H, D] as boxes of one piece of tokens, one head, one panel. The number of blocks is not known and need not be: the
// block tables are trusted.
CUtensorMap map_of(const void* cache, const AttentionParams& p, int keys) {
  const auto kv_heads = static_cast<cuuint64_t>(p.kv_heads), row = static_cast<cuuint64_t>(p.head_dim) * 2;
  const auto block_size = static_cast<cuuint64_t>(p.block_size);
  const cuuint64_t size[] = {static_cast<cuuint64_t>(p.head_dim), kv_heads, block_size, 1u << 30};
  const cuuint64_t stride[] = {row, row * kv_heads, row * kv_heads * block_size};
  const cuuint32_t box[] = {panel_elements, 1, static_cast<cuuint32_t>(p.block_size < keys ? p.block_size : keys), 1};
  return tensor_map("paged_attention: tensor map", p.act == bf16, cache, size, stride, box);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <bool bf16, int head_dim>
void launch_instance(const AttentionParams& p, int64_t items, cudaStream_t stream) {
  using S = Shape<head_dim>;
  Arguments a;
  a.out = p.out;
  a.q = p.q;
  a.block_tables = p.block_tables;
  a.rows = p.rows;
  a.query_start = p.query_start;
  a.tiles = prefill_work(p.work, p.num_seqs);
  a.q_stride = p.q_stride;
  a.table_stride = p.table_stride;
  a.heads = p.heads;
  a.kv_heads = p.kv_heads;
  a.group = p.heads / p.kv_heads;
  a.by_group = a.group == 1 ? 0 : static_cast<uint32_t>(((int64_t{1} << 32) + a.group - 1) / a.group);
  a.block_size = p.block_size;
  a.window = p.window;
  a.scale = p.scale;
  a.softcap = p.softcap;
  const int64_t sms = device().num_sms;
  launch("paged_attention", prefill_kernel<bf16, head_dim>, dim3(static_cast<unsigned>(items < sms ? items : sms)), dim3(threads), S::shared,
         stream, a, map_of(p.k_cache, p, S::keys), map_of(p.v_cache, p, S::keys));
}

}  // namespace

bool prefill_sm90_takes(const AttentionParams& p) {
  const bool types = (p.act == bf16 || p.act == f16) && p.kv == p.act && !p.alibi;
  const bool sizes = (p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256) && p.block_size >= 8 && (p.block_size & (p.block_size - 1)) == 0;
  const bool memory = aligned(p.out) && aligned(p.q) && aligned(p.k_cache) && aligned(p.v_cache) && p.q_stride % 8 == 0;
  return types && sizes && memory && p.scale > 0.f && device().capability == 90 && built_for_device() && tensor_map_encoder();
}

void launch_prefill_sm90(const AttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = max_prefill_tiles(p.num_seqs, p.num_tokens, p.heads / p.kv_heads), items = tiles * p.kv_heads;
  if (p.max_query <= decode_queries || items == 0) return;
  const int64_t room = (p.work_size - decode_work_ints(p.num_seqs) - prefill_header_ints) / prefill_tile_ints;
  const auto refuse = [&](const char* what) { throw std::runtime_error("paged_attention: " + std::to_string(tiles) + what); };
  if (room < tiles) refuse((" tiles of queries do not fit in a work list with room for " + std::to_string(room)).c_str());
  if (items > INT32_MAX) refuse(" tiles of queries are too many for one step");
  if (p.head_dim == 64) p.act == bf16 ? launch_instance<true, 64>(p, items, stream) : launch_instance<false, 64>(p, items, stream);
  if (p.head_dim == 128) p.act == bf16 ? launch_instance<true, 128>(p, items, stream) : launch_instance<false, 128>(p, items, stream);
  if (p.head_dim == 256) p.act == bf16 ? launch_instance<true, 256>(p, items, stream) : launch_instance<false, 256>(p, items, stream);
}

#else  // a toolkit without tensor maps

bool prefill_sm90_takes(const AttentionParams&) { return false; }
void launch_prefill_sm90(const AttentionParams&, cudaStream_t) {}

#endif

}  // namespace octavo::cuda
