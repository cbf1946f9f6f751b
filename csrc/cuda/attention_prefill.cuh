// The kernel behind attention_prefill.cu: causal attention of tiles of new tokens over a paged context, on the tensor cores that every
// device from 8.0 on has (FlashAttention-2: Dao 2023, arXiv:2307.08691). attention_prefill_{bf16,f16,fp8}.cu make its instances. It
// knows tiles (prefill_work.h) and blocks of the cache; it does not know which tokens are in a step or why.
//
// A thread block has 4 warps and takes 64 or 128 packed rows of one KV head; each warp owns 16 or 32 of them, alone, through all keys. Keys are
// walked in tiles of `keys`, counted from the start of the context, left to right. Invariant: a row's arithmetic depends on its query, its
// keys and its position alone:
//   * the size of a key tile depends on head_dim only; the order of the sums within one is that of the matrix instruction;
//   * a tile that shows a row none of its keys changes nothing of that row: its weights are exact zeros, its factor an exact one;
//   * a row decides by itself when its sums are scaled anew (prefill_slack).
// So how rows are tiled, and which rows share a warp, never changes a bit. Keys that no row of the thread block sees are not read: their
// place in shared memory holds zeros, whatever the cache or the block table has there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "attention.h"
#include "launch.h"
#include "mma.cuh"
#include "prefill_work.h"

namespace octavo::cuda {

constexpr int prefill_threads = 128;
constexpr int prefill_block = 8;  // tokens in a block of the cache are a multiple of this
// Weights are exp2(score - best), and `best` follows the largest score only when that is ahead by more than this: weights of up to 2^8 are as
// exact as those up to 1, and sums are seldom scaled again. It is a row's own decision, so no bit depends on other rows.
constexpr float prefill_slack = 8.0f;

// The sizes of an instance. `dim` is the head_dim it has room for; `m_tiles` blocks of 16 rows belong to each of the 4 warps.
template <bool fp8, int dim, int m_tiles>
struct PrefillShape {
  static constexpr int rows = 64 * m_tiles;
  static constexpr int keys = dim > 128 ? 32 : 64;
  static constexpr int pitch = dim + 8;  // elements from row to row: an odd number of 16-byte units, so ldmatrix meets no bank twice
  static constexpr int q_bytes = rows * pitch * 2;
  static constexpr int kv_bytes = keys * pitch * 2;
  static constexpr int raw_bytes = fp8 ? keys * dim : 0;  // e4m3 keys or values as they come from the cache
  static constexpr int facts = 5;         // ints, see the kernel
  static constexpr int shared = q_bytes + 2 * kv_bytes + 2 * raw_bytes + facts * 4;
  // Copies of keys and values: `columns` threads side by side take a row, 16 bytes each, and every thread takes rows_each rows that follow one
  // another, which lie in one block of the cache.
  static constexpr int units = dim * (fp8 ? 1 : 2) / 16;
  static constexpr int columns = units <= 4 ? 4 : units <= 8 ? 8 : units <= 16 ? 16 : 32;
  static constexpr int rows_each = keys * columns / prefill_threads;
  static constexpr int steps_at_once = dim == 96 ? 3 : 4;  // of 16 dims: all of them at once would keep too much in registers
  // Thread blocks an SM should hold: bounds the registers.
  static constexpr int blocks = m_tiles == 2 ? 2 : dim == 64 && !fp8 ? 4 : dim > 128 ? 2 : 3;
  static_assert(dim % 16 == 0 && keys % 16 == 0, "matrix instructions take 16 at a time");
  static_assert(rows <= prefill_tile_rows && prefill_tile_rows % rows == 0, "a tile of the list is cut into whole parts");
  static_assert(units <= columns && prefill_block % rows_each == 0, "the rows of a thread lie in one block of the cache");
};

// What the softmax needs, worked out once on the host. Scores are kept in units of log2, for exp2.
struct PrefillScores {
  float factor;   // of q.k
  float softcap;  // > 0: factor gives score / softcap, and the result is softcap_log2 * tanh
  float softcap_log2;
  float exponent;     // of a kept score, in exp2
  bool plain;         // scores are kept as q.k, and `exponent` has the factor
  int group;          // query heads a KV head
  int cell_bytes;     // of a cell of the cache: its heads' keys or values
  uint32_t by_group;  // see divide()
  uint32_t by_block;
};

inline PrefillScores prefill_scores(const AttentionParams& p) {
  constexpr float log2e = 1.44269504088896340736f;
  const auto inverse = [](int by) { return by == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + by - 1) / by); };
  PrefillScores s = {};
  const float scale = p.scale * p.k_scale;
  s.group = p.heads / p.kv_heads;
  s.cell_bytes = p.kv_heads * p.head_dim * (p.kv == e4m3 ? 1 : 2);
  s.by_group = inverse(s.group);
  s.by_block = inverse(p.block_size);
  s.softcap = p.softcap;
  s.plain = p.softcap <= 0 && !p.alibi && scale > 0;
  s.factor = p.softcap > 0 ? scale / p.softcap : scale * log2e;
  s.softcap_log2 = p.softcap * log2e;
  s.exponent = s.plain ? scale * log2e : 1.0f;
  return s;
}

// x / n by the inverse of n, 2^32 / n rounded up, or 0 for n = 1; right while x * n < 2^32: keys up to 2^25 in blocks of 128.
__device__ __forceinline__ int divide(int x, uint32_t inverse) { return inverse ? static_cast<int>(__umulhi(x, inverse)) : x; }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh to about 1e-7: by exp2, since the device's tanh.approx has 11 bits.
__device__ __forceinline__ float tanh_exp2(float x) {
  const float e = exp2_fast(fminf(x * 2.88539008177792681472f, 126.0f));
  return 1.0f - __fdividef(2.0f, e + 1.0f);
}

// 16 e4m3 of `raw` become 16 elements of `to`.
template <class T>
__device__ __forceinline__ void widen16(T* to, const uint8_t* raw) {
  const uint4 packed = *reinterpret_cast<const uint4*>(raw);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    wide[i] = e4m3x2_to_half2(words[i / 2] >> (i % 2 * 16));
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const float2 f = __half22float2(reinterpret_cast<const __half2&>(wide[i]));
      wide[i] = pack2<T>(f.x, f.y);
    }
  }
  // Four lanes store their first half, the next four their second: so eight lanes, whose halves are 32 bytes apart, meet no bank twice.
  const int late = threadIdx.x / 4 % 2;
  const uint4 low = make_uint4(wide[0], wide[1], wide[2], wide[3]), high = make_uint4(wide[4], wide[5], wide[6], wide[7]);
  uint4* out = reinterpret_cast<uint4*>(to);
  out[late] = late ? high : low;
  out[1 - late] = late ? low : high;
}

// Starts copying this thread's part of a tile of keys or values: rows_each rows from `cell` on, to `to`. Row i becomes zeros unless
// 0 <= first + i < count.
template <int rows_each>
__device__ __forceinline__ void copy_rows(uint32_t to, int to_pitch_bytes, const char* cache, int cell, int cell_bytes, int first, unsigned count) {
  const char* from = cache + static_cast<int64_t>(cell) * cell_bytes;
#pragma unroll
  for (int i = 0; i < rows_each; ++i) {
    cp_async16(to + i * to_pitch_bytes, from, static_cast<unsigned>(first + i) < count);
    from += cell_bytes;
  }
}

// T: __nv_bfloat16 | __half. The cache has T, or e4m3 if fp8.
template <class T, bool fp8, int dim, int m_tiles>
__global__ void __launch_bounds__(prefill_threads, PrefillShape<fp8, dim, m_tiles>::blocks)
    prefill_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ PrefillScores scores,
                   const int* list) {  // prefill_work(); no __restrict__: it must not be read before dependency_wait
#if __CUDA_ARCH__ >= 800
  using S = PrefillShape<fp8, dim, m_tiles>;
  constexpr int keys = S::keys, pitch = S::pitch, item_size = fp8 ? 1 : 2;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const sq = reinterpret_cast<T*>(shared);                           // [rows, pitch], of each warp its own; the output at last
  T* const sk = reinterpret_cast<T*>(shared + S::q_bytes);              // [keys, pitch]
  T* const sv = reinterpret_cast<T*>(shared + S::q_bytes + S::kv_bytes);  // [keys, pitch]
  uint8_t* const raw_k = shared + S::q_bytes + 2 * S::kv_bytes;         // [keys, dim]
  uint8_t* const raw_v = raw_k + S::raw_bytes;                          // [keys, dim]
  // [5]: first_position, skipped, block_rows, token_row, kv_head: seldom wanted, and each would cost a register.
  int* const facts = reinterpret_cast<int*>(raw_v + S::raw_bytes);

  dependency_wait();
  dependents_start();

  // --- which rows and keys ---
  const int kv_head = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.kv_heads));
  const int part = static_cast<int>(blockIdx.x / static_cast<unsigned>(p.kv_heads));
  constexpr int parts = prefill_tile_rows / S::rows;
  const int* const tile = list + prefill_header_ints + static_cast<int64_t>(part / parts) * prefill_tile_ints;
  const int num_tiles = list[0];  // loaded beside the tile, which lies in the list's memory even beyond its end
  const int sequence = tile[0], first_row = tile[1] + part % parts * S::rows, start = tile[2], context = tile[3];
  if (part / parts >= num_tiles) return;
  const int group = scores.group, new_tokens = p.query_start[sequence + 1] - start, num_rows = new_tokens * group;
  if (first_row >= num_rows) return;
  const int* const table = p.block_tables + p.rows[sequence] * p.table_stride;
  const int first_token = first_row / group, skipped = first_row - first_token * group;  // rows before ours of the first token
  const int token_row = start + first_token;  // of q and out
  const int block_rows = min(S::rows, num_rows - first_row);
  const int first_position = context - new_tokens + first_token;
  const int end = first_position + divide(skipped + block_rows - 1, scores.by_group) + 1;  // keys [begin, end) are seen by some row
  const int begin = p.window > 0 ? max(0, first_position - p.window + 1) : 0;
  const int first_tile = begin / keys * keys;  // its first key

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  // --- this thread's part of the copies ---
  const int unit = thread % S::columns, own_row = thread / S::columns * S::rows_each;
  const int head_bytes = p.head_dim * item_size;
  const int offset = kv_head * head_bytes + min(unit * 16, head_bytes - 16);  // in a cell
  const unsigned count = unit * 16 < head_bytes ? end - begin : 0;
  const auto cell_of = [&](int first_key) {  // of own_row; not read if none of the thread's keys is seen
    const int key = first_key + own_row;
    if (key + S::rows_each <= begin || key >= end) return 0;
    const int block = divide(key, scores.by_block);
    return table[block] * p.block_size + key - block * p.block_size;
  };
  constexpr int copy_pitch = fp8 ? dim : pitch * 2;  // bytes
  const uint32_t k_to = shared_address(fp8 ? raw_k : shared + S::q_bytes) + own_row * copy_pitch + unit * 16;
  const uint32_t v_to = k_to + (fp8 ? S::raw_bytes : S::kv_bytes);
  const auto copy = [&](uint32_t to, const void* cache, int cell, int first_key) {
    const char* const from = static_cast<const char*>(cache) + offset;
    if (unit < S::units) copy_rows<S::rows_each>(to, copy_pitch, from, cell, scores.cell_bytes, first_key + own_row - begin, count);
  };

  // --- the queries, and the first keys ---
  int cell = cell_of(first_tile), next_cell = cell_of(first_tile + keys);
  if (thread == 0) {
    facts[0] = first_position;
    facts[1] = skipped;
    facts[2] = block_rows;
    facts[3] = token_row;
    facts[4] = kv_head;
  }
  constexpr int q_units = dim / 8;
#pragma unroll 4
  for (int at = thread; at < S::rows * q_units; at += prefill_threads) {
    const int row = at / q_units, unit = at % q_units, packed = skipped + row;
    const int token = divide(packed, scores.by_group), head = kv_head * group + packed - token * group;
    const bool valid = row < block_rows && unit * 8 < p.head_dim;
    const T* from = static_cast<const T*>(p.q) + (valid ? (token_row + token) * p.q_stride + head * p.head_dim + unit * 8 : 0);
    cp_async16(shared_address(sq + row * pitch + unit * 8), from, valid);
  }
  copy(k_to, p.k_cache, cell, first_tile);
  if constexpr (fp8) copy(v_to, p.v_cache, cell, first_tile);
  cp_async_commit();
  __syncthreads();  // facts

  // --- what a thread holds: of each block of 16 rows, rows lane / 4 and lane / 4 + 8 ---
  const int warp_row = warp * 16 * m_tiles;
  // Place of a row among the packed rows of its sequence, counted from first_token; the rows after the last one repeat it.
  const auto packed_row = [facts](int row) { return facts[1] + min(row, facts[2] - 1); };
  const auto position_of = [&](int row) { return facts[0] + divide(packed_row(row), scores.by_group); };
  const int lowest = position_of(warp_row), highest = warp_row < block_rows ? position_of(warp_row + 16 * m_tiles - 1) : -1;
  float o[m_tiles][dim / 8][4];
  float best[m_tiles][2], sum[m_tiles][2];
#pragma unroll
  for (int m = 0; m < m_tiles; ++m) {
    best[m][0] = best[m][1] = -INFINITY;
    sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
    for (int n = 0; n < dim / 8; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.0f;
  }
  // Where this lane's row lies that ldmatrix reads: A (queries) and B (keys) from rows, values transposed.
  const uint32_t q_from = shared_address(sq + (warp_row + lane % 16) * pitch + lane / 16 * 8);
  const uint32_t k_from = shared_address(sk + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  const uint32_t v_from = shared_address(sv + lane % 16 * pitch + lane / 16 * 8);

  for (int first_key = first_tile; first_key < end; first_key += keys) {
    cp_async_wait<0>();
    if constexpr (fp8) {
      __syncthreads();  // all are done with the tile before. What a thread widens it has copied itself.
      if (unit < S::units) {
#pragma unroll 1
        for (int i = 0; i < S::rows_each; ++i) {
          T* const to = sk + (own_row + i) * pitch + unit * 16;
          const uint8_t* const from = raw_k + (own_row + i) * dim + unit * 16;
          widen16(to, from);
          widen16(to + keys * pitch, from + S::raw_bytes);
        }
      }
    }
    __syncthreads();  // the keys are there, and nobody reads the values of the tile before
    if constexpr (fp8) {
      if (first_key + keys < end) {
        copy(k_to, p.k_cache, next_cell, first_key + keys);
        copy(v_to, p.v_cache, next_cell, first_key + keys);
      }
    } else {
      copy(v_to, p.v_cache, cell, first_key);
      cell = next_cell;
    }
    next_cell = cell_of(first_key + 2 * keys);
    cp_async_commit();

    const bool seen = first_key <= highest && (p.window <= 0 || first_key + keys - 1 > lowest - p.window);  // by a row of this warp
    float s[m_tiles][keys / 8][4];
    if (seen) {
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
#pragma unroll
        for (int n = 0; n < keys / 8; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
#pragma unroll(S::steps_at_once)
      for (int d = 0; d < dim / 16; ++d) {
        uint32_t a[m_tiles][4];
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) ldmatrix_x4(a[m], q_from + (m * 16 * pitch + d * 16) * 2);
#pragma unroll
        for (int n = 0; n < keys / 16; ++n) {
          uint32_t b[4];
          ldmatrix_x4(b, k_from + (n * 16 * pitch + d * 16) * 2);
#pragma unroll
          for (int m = 0; m < m_tiles; ++m) {
            mma16816<T>(s[m][2 * n], a[m], b[0], b[1]);
            mma16816<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    if constexpr (!fp8) {
      cp_async_wait<0>();
      __syncthreads();  // the values are there, and nobody reads the keys any more
      if (first_key + keys < end) copy(k_to, p.k_cache, cell, first_key + keys);
      cp_async_commit();
    }
    if (!seen) continue;

    // --- softmax ---
    if (!scores.plain) {
      if (scores.softcap > 0) {
#pragma unroll
        for (int m = 0; m < m_tiles; ++m)
#pragma unroll
          for (int n = 0; n < keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[m][n][e] = scores.softcap_log2 * tanh_exp2(s[m][n][e] * scores.factor);
      } else {
#pragma unroll
        for (int m = 0; m < m_tiles; ++m)
#pragma unroll
          for (int n = 0; n < keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[m][n][e] *= scores.factor;
      }
      if (p.alibi) {
#pragma unroll
        for (int m = 0; m < m_tiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int packed = packed_row(warp_row + m * 16 + lane / 4 + h * 8), token = divide(packed, scores.by_group);
            const float slope = p.alibi[facts[4] * scores.group + packed - token * scores.group] * 1.44269504088896340736f;
            const float first = slope * static_cast<float>(facts[0] + token - first_key - lane % 4 * 2);  // of this thread's first key
#pragma unroll
            for (int n = 0; n < keys / 8; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) s[m][n][h * 2 + e] = fmaf(slope, static_cast<float>(n * 8 + e), s[m][n][h * 2 + e] - first);
          }
      }
    }
    if (first_key + keys - 1 > lowest || (p.window > 0 && first_key <= highest - p.window)) {
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int last = position_of(warp_row + m * 16 + lane / 4 + h * 8) - first_key - lane % 4 * 2;  // the row sees (before, last]
          const int before = p.window > 0 ? last - p.window : -keys - 1;
#pragma unroll
          for (int n = 0; n < keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (n * 8 + e > last || n * 8 + e <= before) s[m][n][h * 2 + e] = -INFINITY;
        }
    }
    float factor[m_tiles][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < m_tiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = s[m][0][h * 2];
#pragma unroll
        for (int n = 0; n < keys / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][h * 2], s[m][n][h * 2 + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const bool raised = (top - best[m][h]) * scores.exponent > prefill_slack;
        moved |= raised;
        factor[m][h] = raised ? exp2_fast((best[m][h] - top) * scores.exponent) : 1.0f;
        best[m][h] = raised ? top : best[m][h];
        const float anchor = best[m][h] == -INFINITY ? 0.0f : best[m][h];  // nothing seen yet: all weights are 0
        const float offset = anchor * scores.exponent;
        float part_sum = 0.0f;
#pragma unroll
        for (int n = 0; n < keys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float weight = exp2_fast(fmaf(s[m][n][h * 2 + e], scores.exponent, -offset));
            s[m][n][h * 2 + e] = weight;
            part_sum += weight;
          }
        sum[m][h] = fmaf(sum[m][h], factor[m][h], part_sum);
      }
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
#pragma unroll
        for (int n = 0; n < dim / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[m][n][e] *= factor[m][e / 2];
    }

    // --- weights times values ---
#pragma unroll
    for (int k = 0; k < keys / 16; ++k) {
      uint32_t a[m_tiles][4];
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) {
        a[m][0] = pack2<T>(s[m][2 * k][0], s[m][2 * k][1]);
        a[m][1] = pack2<T>(s[m][2 * k][2], s[m][2 * k][3]);
        a[m][2] = pack2<T>(s[m][2 * k + 1][0], s[m][2 * k + 1][1]);
        a[m][3] = pack2<T>(s[m][2 * k + 1][2], s[m][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < dim / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_from + (k * 16 * pitch + n * 16) * 2);
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) {
          mma16816<T>(o[m][2 * n], a[m], b[0], b[1]);
          mma16816<T>(o[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // --- divide, and store by way of this warp's own rows of shared memory ---
  __syncwarp();
#pragma unroll
  for (int m = 0; m < m_tiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[m][h];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float by = total > 0.0f ? p.v_scale / total : 0.0f;
      T* const to = sq + (warp_row + m * 16 + lane / 4 + h * 8) * pitch + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < dim / 8; ++n) *reinterpret_cast<uint32_t*>(to + n * 8) = pack2<T>(o[m][n][h * 2] * by, o[m][n][h * 2 + 1] * by);
    }
  __syncwarp();
#pragma unroll 4
  for (int at = lane; at < 16 * m_tiles * q_units; at += 32) {
    const int row = warp_row + at / q_units, unit = at % q_units, packed = facts[1] + row;
    if (row >= facts[2] || unit * 8 >= p.head_dim) continue;
    const int token = divide(packed, scores.by_group), head = facts[4] * scores.group + packed - token * scores.group;
    const int64_t to = (static_cast<int64_t>(facts[3] + token) * p.heads + head) * p.head_dim + unit * 8;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + to) = *reinterpret_cast<const uint4*>(sq + row * pitch + unit * 8);
  }
#endif
}

template <class T, bool fp8, int dim, int m_tiles>
void launch_prefill_instance(const AttentionParams& p, cudaStream_t stream) {
  using S = PrefillShape<fp8, dim, m_tiles>;
  const int64_t parts = max_prefill_tiles(p.num_seqs, p.num_tokens, p.heads / p.kv_heads) * (prefill_tile_rows / S::rows);
  launch("paged_attention", prefill_kernel<T, fp8, dim, m_tiles>, dim3(static_cast<unsigned>(parts * p.kv_heads)), dim3(prefill_threads), S::shared,
         stream, p, prefill_scores(p), prefill_work(p.work, p.num_seqs));
}

// Rows of a thread block: 128, which take the fewest loads a product, where that makes enough thread blocks to fill the device evenly; else 64. And
// 64 where the output of 128 would not fit in registers. Measured on an H100; the choice changes no bit.
template <class T, bool fp8>
void launch_prefill_type(const AttentionParams& p, cudaStream_t stream) {
  const int64_t tiles_an_sm = static_cast<int64_t>(p.num_tokens) * p.heads / prefill_tile_rows / device().num_sms;
  const bool wide = tiles_an_sm >= (p.head_dim <= 64 ? 16 : 2);
  if (p.head_dim <= 64) return wide ? launch_prefill_instance<T, fp8, 64, 2>(p, stream) : launch_prefill_instance<T, fp8, 64, 1>(p, stream);
  if (p.head_dim <= 96) return wide ? launch_prefill_instance<T, fp8, 96, 2>(p, stream) : launch_prefill_instance<T, fp8, 96, 1>(p, stream);
  if (p.head_dim <= 128) return wide ? launch_prefill_instance<T, fp8, 128, 2>(p, stream) : launch_prefill_instance<T, fp8, 128, 1>(p, stream);
  launch_prefill_instance<T, fp8, 256, 1>(p, stream);
}

// attention_prefill_{bf16,f16,fp8}.cu
void launch_prefill_bf16(const AttentionParams& p, cudaStream_t stream);
void launch_prefill_f16(const AttentionParams& p, cudaStream_t stream);
void launch_prefill_bf16_fp8(const AttentionParams& p, cudaStream_t stream);
void launch_prefill_f16_fp8(const AttentionParams& p, cudaStream_t stream);

}  // namespace octavo::cuda
