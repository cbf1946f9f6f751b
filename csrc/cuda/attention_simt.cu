// Paged attention without tensor cores: for float32, for head_dims that are no multiple of 16, and for devices before 8.0. Takes every sequence
// of a step, whatever its number of new tokens, and needs no list of work. It knows one token at a time; it is there to be right and plain.
//
// A thread block takes one token and up to four query heads of one KV head. Keys are walked in partitions of 256 from the start of the context; a
// partition has its own maximum, sum and output, and is merged into the total from left to right. Invariant: this arithmetic depends on the
// token's query, keys and position alone, and keys that the token does not see are not read.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <stdexcept>
#include <string>

#include "attention.h"
#include "launch.h"

namespace octavo::cuda {
namespace {

constexpr int simt_threads = 128;
constexpr int simt_heads = 4;  // query heads a thread block; a warp each in the softmax
constexpr int key_lanes = 8;   // lanes that share the dot product of one key
constexpr int max_dim = 256;
constexpr int dims_a_thread = max_dim / simt_threads;
static_assert(simt_heads * 32 == simt_threads, "a warp for every head");

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__nv_fp8_storage_t x) { return __half2float(static_cast<__half>(__nv_cvt_fp8_to_halfraw(x, __NV_E4M3))); }

__device__ __forceinline__ void from_float(float* to, float x) { *to = x; }
__device__ __forceinline__ void from_float(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// `count` neighbours; more than one are loaded as 16 bytes.
template <class T, int count>
__device__ __forceinline__ void load_floats(float (&to)[count], const T* from) {
  if constexpr (count == 1) {
    to[0] = to_float(*from);
  } else {
    static_assert(count * sizeof(T) == 16, "one load of 16 bytes");
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const T* const items = reinterpret_cast<const T*>(&packed);
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = to_float(items[i]);
  }
}

// T: float | __half | __nv_bfloat16. KV: T, or __nv_fp8_storage_t (a byte) for e4m3. `vector`: keys are whole units of 16 bytes of KV.
template <class T, class KV, bool vector>
__global__ void __launch_bounds__(simt_threads, 4) simt_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int unit = vector ? 16 / static_cast<int>(sizeof(KV)) : 1;
  __shared__ __align__(16) float query[simt_heads][max_dim];
  __shared__ float weights[simt_heads][partition];  // scores, then weights
  __shared__ int cells[partition];
  __shared__ float old_factor[simt_heads], new_factor[simt_heads];
  __shared__ int found;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int token = blockIdx.x, kv_head = blockIdx.y, group = p.heads / p.kv_heads;
  const int first_head = blockIdx.z * simt_heads, num_heads = min(simt_heads, group - first_head);  // within the group
  dependency_wait();
  dependents_start();

  if (thread == 0) found = -1;
  __syncthreads();
  for (int s = thread; s < p.num_seqs; s += simt_threads)
    if (p.query_start[s] <= token && token < p.query_start[s + 1]) found = s;
  __syncthreads();
  const int sequence = found;
  if (sequence < 0) return;
  const int context = p.context_len[sequence];
  if (context == 0) return;
  const int position = context - p.query_start[sequence + 1] + token;
  const int* const table = p.block_tables + p.rows[sequence] * p.table_stride;  // [M]
  const int begin = p.window > 0 ? max(0, position - p.window + 1) : 0, end = position + 1;  // keys that are seen

  const int64_t head = static_cast<int64_t>(kv_head) * group + first_head;
  for (int i = thread; i < simt_heads * p.head_dim; i += simt_threads) {
    const int h = i / p.head_dim, d = i % p.head_dim;
    const T* const q = static_cast<const T*>(p.q) + token * p.q_stride + head * p.head_dim;
    query[h][d] = h < num_heads ? to_float(q[i]) : 0.0f;
  }
  const int64_t cell_size = static_cast<int64_t>(p.kv_heads) * p.head_dim;
  const KV* const k_cache = static_cast<const KV*>(p.k_cache) + static_cast<int64_t>(kv_head) * p.head_dim;
  const KV* const v_cache = static_cast<const KV*>(p.v_cache) + static_cast<int64_t>(kv_head) * p.head_dim;
  const float scale = p.scale * p.k_scale;
  const float slope = p.alibi && warp < num_heads ? p.alibi[head + warp] : 0.0f;

  float best = -INFINITY, total = 0.0f;  // of head `warp`
  float output[simt_heads][dims_a_thread] = {};
  for (int base = begin / partition * partition; base < end; base += partition) {
    const int first = max(begin - base, 0), last = min(end - base, partition);  // [first, last) of the partition is seen
    __syncthreads();  // the partition before is done with
    for (int i = thread; i < partition; i += simt_threads) {
      const int key = base + i;
      if (i >= first && i < last) cells[i] = table[key / p.block_size] * p.block_size + key % p.block_size;
    }
    __syncthreads();

    for (int i0 = first; i0 < last; i0 += simt_threads / key_lanes) {  // all lanes stay for the shuffles
      const int i = i0 + thread / key_lanes;
      float dot[simt_heads] = {};
      if (i < last) {
        const KV* const key = k_cache + cells[i] * cell_size;
#pragma unroll 1
        for (int d = thread % key_lanes * unit; d < p.head_dim; d += key_lanes * unit) {
          float k[unit];
          load_floats<KV, unit>(k, key + d);
#pragma unroll
          for (int h = 0; h < simt_heads; ++h)
#pragma unroll
            for (int e = 0; e < unit; ++e) dot[h] = fmaf(query[h][d + e], k[e], dot[h]);
        }
      }
#pragma unroll
      for (int h = 0; h < simt_heads; ++h) {
#pragma unroll
        for (int step = 1; step < key_lanes; step *= 2) dot[h] += __shfl_xor_sync(0xffffffffu, dot[h], step);
        if (i < last && thread % key_lanes == 0) weights[h][i] = dot[h];
      }
    }
    __syncthreads();

    if (warp < num_heads) {
      float* const score = weights[warp];
      float top = -INFINITY;
      for (int i = first + lane; i < last; i += 32) {
        float x = score[i] * scale;
        if (p.softcap > 0) x = p.softcap * tanhf(__fdividef(x, p.softcap));
        x += slope * static_cast<float>(base + i - position);
        score[i] = x;
        top = fmaxf(top, x);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      float sum = 0.0f;
      for (int i = first + lane; i < last; i += 32) {
        const float weight = expf(score[i] - top);
        score[i] = weight;
        sum += weight;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const float merged = fmaxf(best, top);  // finite: a partition that is walked has a key that is seen
      const float before = expf(best - merged), now = expf(top - merged);
      total = total * before + sum * now;
      best = merged;
      if (lane == 0) {
        old_factor[warp] = before;
        new_factor[warp] = now;
      }
    }
    __syncthreads();

    float part[simt_heads][dims_a_thread] = {};
#pragma unroll
    for (int n = 0; n < dims_a_thread; ++n) {
      const int d = thread + n * simt_threads;
      if (d >= p.head_dim) break;
#pragma unroll 4
      for (int i = first; i < last; ++i) {
        const float v = to_float(v_cache[cells[i] * cell_size + d]);
#pragma unroll
        for (int h = 0; h < simt_heads; ++h) part[h][n] = fmaf(weights[h][i], v, part[h][n]);
      }
    }
#pragma unroll
    for (int h = 0; h < simt_heads; ++h)
#pragma unroll
      for (int n = 0; n < dims_a_thread; ++n)
        if (h < num_heads) output[h][n] = output[h][n] * old_factor[h] + part[h][n] * new_factor[h];
  }

  __syncthreads();  // the factors are read
  if (warp < num_heads && lane == 0) new_factor[warp] = __fdividef(p.v_scale, total);
  __syncthreads();
  T* const out = static_cast<T*>(p.out) + (static_cast<int64_t>(token) * p.heads + head) * p.head_dim;
#pragma unroll
  for (int h = 0; h < simt_heads; ++h)
#pragma unroll
    for (int n = 0; n < dims_a_thread; ++n) {
      const int d = thread + n * simt_threads;
      if (h < num_heads && d < p.head_dim) from_float(out + h * p.head_dim + d, output[h][n] * new_factor[h]);
    }
}

template <class T, class KV>
void launch_type(const AttentionParams& p, cudaStream_t stream) {
  const int group = p.heads / p.kv_heads;
  const int parts = (group + simt_heads - 1) / simt_heads;
  const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(parts));
  const bool vector = p.head_dim * sizeof(KV) % 16 == 0 && reinterpret_cast<uintptr_t>(p.k_cache) % 16 == 0;
  launch("paged_attention", vector ? simt_kernel<T, KV, true> : simt_kernel<T, KV, false>, grid, dim3(simt_threads), 0, stream, p);
}

template <class T>
void launch_act(const AttentionParams& p, cudaStream_t stream) {
  p.kv == e4m3 ? launch_type<T, __nv_fp8_storage_t>(p, stream) : launch_type<T, T>(p, stream);
}

}  // namespace

void launch_simt(const AttentionParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_seqs == 0) return;
  if (p.head_dim > max_dim) throw std::runtime_error("paged_attention: head_dim must be at most 256, got " + std::to_string(p.head_dim));
  if (p.act == f32) return launch_act<float>(p, stream);
  p.act == f16 ? launch_act<__half>(p, stream) : launch_act<__nv_bfloat16>(p, stream);
}

}  // namespace octavo::cuda
