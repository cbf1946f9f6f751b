// The blocks of the KV cache: rotary positions with the norms of heads before and the write after them, writing and reading tokens by slot,
// copying blocks within a pool and between the device and pinned host memory. Owns no layout beyond [blocks, block_size, heads, head_dim];
// knows no requests. Invariants: a head is worked on by one group of lanes, whose size depends on the head's shape alone; a slot that is
// not in the cache is left out; lists of blocks lie in host memory and are checked before anything is written.
#include <algorithm>
#include <vector>

#include "common/check.h"
#include "launch.h"
#include "ops.h"
#include "vec.cuh"

namespace octavo::cuda {
namespace {

constexpr int block_threads = 128;
constexpr int64_t index_limit = int64_t{1} << 31;  // what a Divider takes

// Calls f with the Types of an activation and of the cache, which is the same or e4m3.
template <class F>
void with_cache(DType act, DType cache, const F& f) {
  with_act(act, [&](auto type) {
    if (cache == e4m3)
      f(type, Type<E4m3>{});
    else
      f(type, type);
  });
}

// --- heads --------------------------------------------------------------------------------------------------------------------------
struct HeadParams {
  void* q;                   // [T, Hq, D]
  void* k;                   // [T, Hk, D]
  const void* v;             // [T, Hk, D]
  void* k_cache;             // [slots, Hk, D]; null: k is rotated in place
  void* v_cache;             // [slots, Hk, D]
  const int64_t* slots;      // [T]
  const int64_t* positions;  // [T]
  const float* cos_sin;      // [max_pos, R]
  const float* q_weight;     // [D] or null
  const float* k_weight;     // [D]
  int64_t q_stride, k_stride, v_stride, num_slots;
  uint32_t groups;  // of lanes, in all tokens
  Divider heads;    // by the groups of a token: its heads, Hq + Hk or, with a cache, Hq + 2 Hk, over the heads of a group
  int q_heads, kv_heads, dim, rotary;
  int lanes;     // of a head, a power of two
  int lanes_shift;
  int rotating;  // of these, how many have pairs
  float inverse, eps, offset, k_scale, v_scale;  // inverse: 1 / D
  bool interleaved, vec;
};

// A lane has sixteen elements of a head, as two runs of eight: eight pairs (i, i + R/2) or (2 i, 2 i + 1), or what is not rotated.
struct Runs {
  int start[2], count[2];
};

__device__ __forceinline__ Runs runs_of(const HeadParams& p, int lane) {
  Runs r;
  int end;
  if (lane < p.rotating && !p.interleaved) {
    r.start[0] = 8 * lane;
    r.start[1] = p.rotary / 2 + 8 * lane;
    r.count[0] = r.count[1] = min(8, p.rotary / 2 - 8 * lane);
    return r;
  }
  if (lane < p.rotating) {
    r.start[0] = 16 * lane;
    end = p.rotary;
  } else {
    r.start[0] = p.rotary + 16 * (lane - p.rotating);
    end = p.dim;
  }
  r.start[1] = r.start[0] + 8;
  r.count[0] = max(0, min(8, end - r.start[0]));
  r.count[1] = max(0, min(8, end - r.start[1]));
  return r;
}

// A group of lanes takes `count` neighbouring heads of a token, all of q, of k or of v: they share the table, the weights and the slot.
template <class T, class Cache, bool vec, int count>
__global__ void __launch_bounds__(block_threads) head_kernel(const HeadParams p) {
  dependents_start();
  const int lane = static_cast<int>(threadIdx.x) & (p.lanes - 1);
  const uint32_t group = (blockIdx.x * block_threads + threadIdx.x) >> p.lanes_shift;
  const bool there = group < p.groups;
  const uint32_t token = there ? p.heads(group) : 0;
  const int head = there ? static_cast<int>(group - token * p.heads.by) * count : 0;
  const bool is_q = head < p.q_heads, is_k = !is_q && head < p.q_heads + p.kv_heads;
  const int kv_head = head - p.q_heads - (is_k ? 0 : p.kv_heads);
  Runs r = runs_of(p, lane);
  if (!there) r.count[0] = r.count[1] = 0;

  const bool normed = p.q_weight && (is_q || is_k);
  float w[2][8];
  if (normed)  // weights never change: they are loaded before the wait
#pragma unroll
    for (int i = 0; i < 2; ++i) load_some<vec>(w[i], (is_q ? p.q_weight : p.k_weight) + r.start[i], r.count[i]);

  dependency_wait();

  // The position first: the table's row depends on it.
  const bool rotated = (is_q || is_k) && lane < p.rotating && r.count[0] > 0;
  const int64_t position = rotated ? p.positions[token] : 0;
  const int64_t slot = p.k_cache && !is_q ? p.slots[token] : -1;
  T* row = is_q   ? static_cast<T*>(p.q) + token * p.q_stride + static_cast<int64_t>(head) * p.dim
           : is_k ? static_cast<T*>(p.k) + token * p.k_stride + static_cast<int64_t>(kv_head) * p.dim
                  : const_cast<T*>(static_cast<const T*>(p.v)) + token * p.v_stride + static_cast<int64_t>(kv_head) * p.dim;
  Packed<T> x[count][2];
#pragma unroll
  for (int h = 0; h < count; ++h)
#pragma unroll
    for (int i = 0; i < 2; ++i) load_some<vec>(x[h][i], row + h * p.dim + r.start[i], r.count[i]);
  float c[8], s[8];
  if (rotated) {
    const int pairs = min(8, p.rotary / 2 - 8 * lane);
    const float* table = p.cos_sin + position * p.rotary + 8 * lane;
    load_some<vec>(c, table, pairs);
    load_some<vec>(s, table + p.rotary / 2, pairs);
  }
  if (normed && p.offset != 0.0f)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) w[i][e] += p.offset;
  const bool to_cache = static_cast<uint64_t>(slot) < static_cast<uint64_t>(p.num_slots);
  Cache* cache = static_cast<Cache*>(is_k ? p.k_cache : p.v_cache) + ((to_cache ? slot : 0) * p.kv_heads + kv_head) * p.dim;

#pragma unroll
  for (int h = 0; h < count; ++h) {
    float y[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) x[h][i].unpack(y[i]);

    if (p.q_weight) {  // all lanes take part; a head of v throws the sum away
      float low = 0.0f, high = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        low = __fmaf_rn(y[0][e], y[0][e], low);
        high = __fmaf_rn(y[1][e], y[1][e], high);
      }
      const float square = lanes_sum(__fadd_rn(low, high), p.lanes);
      if (normed) {
        const float factor = rsqrtf(__fmaf_rn(square, p.inverse, p.eps));
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 8; ++e) y[i][e] = __fmul_rn(__fmul_rn(y[i][e], factor), w[i][e]);
      }
    }

    if (rotated) {
      const auto turn = [](float& a, float& b, float cos, float sin) {
        const float turned = __fmaf_rn(a, cos, -__fmul_rn(b, sin));
        b = __fmaf_rn(b, cos, __fmul_rn(a, sin));
        a = turned;
      };
      if (p.interleaved) {
#pragma unroll
        for (int e = 0; e < 8; ++e) turn(y[e / 4][e % 4 * 2], y[e / 4][e % 4 * 2 + 1], c[e], s[e]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) turn(y[0][e], y[1][e], c[e], s[e]);
      }
    }

    if (is_q || (is_k && !p.k_cache)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) store_some<vec>(row + h * p.dim + r.start[i], y[i], r.count[i]);
    } else if (to_cache) {
      if constexpr (std::is_same_v<Cache, E4m3>) {
        const Quotient scaled(is_k ? p.k_scale : p.v_scale);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 8; ++e) y[i][e] = scaled(y[i][e]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) store_some<vec>(cache + h * p.dim + r.start[i], y[i], r.count[i]);
    }
  }
}

// Fills in what follows from the tensors that rope and rotate_and_cache share. c knows T, Q, H, D.
HeadParams head_params(const Contract& c, const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor* cos_sin, bool interleaved) {
  const int64_t dim = c['D'], rotary = cos_sin ? cos_sin->size[1] : 0;
  c.require(rotary % 2 == 0 && rotary <= dim, "rotary_dim must be even and at most head_dim %lld, got %lld", static_cast<long long>(dim),
            static_cast<long long>(rotary));
  const int64_t rotating = interleaved ? (rotary + 15) / 16 : (rotary / 2 + 7) / 8;
  const int64_t lanes = rotating + (dim - rotary + 15) / 16;
  c.require(lanes <= 32, "head_dim %lld is more than a warp takes (512)", static_cast<long long>(dim));
  HeadParams p = {};
  p.q = q.data;
  p.k = k.data;
  p.positions = positions.ptr<const int64_t>();
  p.cos_sin = cos_sin ? cos_sin->ptr<const float>() : nullptr;
  p.q_stride = q.stride[0];
  p.k_stride = k.stride[0];
  p.q_heads = static_cast<int>(c['Q']);
  p.kv_heads = static_cast<int>(c['H']);
  p.dim = static_cast<int>(dim);
  p.rotary = static_cast<int>(rotary);
  p.rotating = static_cast<int>(rotating);
  while ((1 << p.lanes_shift) < lanes) ++p.lanes_shift;
  p.lanes = 1 << p.lanes_shift;
  p.inverse = dim > 0 ? 1.0f / static_cast<float>(dim) : 0.0f;
  p.interleaved = interleaved;
  p.vec = dim % 16 == 0 && rotary % 16 == 0 && aligned(q, 16, p.q_stride) && aligned(k, 16, p.k_stride) && (!cos_sin || aligned(*cos_sin, 16, 0));
  p.k_scale = p.v_scale = 1;
  return p;
}

// Heads that a group of lanes takes one after another where there are many tokens.
constexpr int heads_at_once = 2;

void start_heads(const Contract& c, const char* op, HeadParams& p, int64_t tokens, int heads, DType act, DType cache) {
  const int64_t threads = tokens * heads * p.lanes;
  c.require(threads < index_limit, "%lld tokens of %d heads are more than one call takes", static_cast<long long>(tokens), heads);
  if (threads == 0 || p.dim == 0) return;
  with_cache(act, cache, [&](auto x, auto kv) {
    using T = typename decltype(x)::type;
    using Cache = typename decltype(kv)::type;
    const bool even = p.q_heads % heads_at_once == 0 && p.kv_heads % heads_at_once == 0;
    const bool several = p.vec && even && threads > 2048 * int64_t{device().num_sms};  // more than one wave
    const auto kernel = several ? head_kernel<T, Cache, true, heads_at_once>
                        : p.vec ? head_kernel<T, Cache, true, 1>
                                : head_kernel<T, Cache, false, 1>;
    const int count = several ? heads_at_once : 1;
    p.heads = Divider(heads / count);
    p.groups = static_cast<uint32_t>(tokens * (heads / count));
    const auto blocks = static_cast<unsigned>((threads / count + block_threads - 1) / block_threads);
    launch(op, kernel, dim3(blocks), dim3(block_threads), 0, current_stream(), p);
  });
}

void check_scales(const Contract& c, const Tensor& cache, double k_scale, double v_scale) {
  c.require(cache.dtype == e4m3 || (k_scale == 1 && v_scale == 1), "k_scale = %g and v_scale = %g, but a cache of this type has no scales", k_scale,
            v_scale);
  const auto sane = [](double scale) { return scale > 1e-18 && scale < 1e18; };
  c.require(sane(k_scale) && sane(v_scale), "k_scale = %g and v_scale = %g, but both must be positive numbers", k_scale, v_scale);
}

// --- rows by slot -------------------------------------------------------------------------------------------------------------------
struct SlotParams {
  void* key;             // [T, H * D]
  void* value;           // [T, H * D]
  void* k_cache;         // [slots, H * D]
  void* v_cache;         // [slots, H * D]
  const int64_t* slots;  // [T]
  int64_t key_stride, value_stride, num_slots;
  uint32_t chunks;       // of eight elements, in all rows
  Divider chunks_a_row;  // by ceil(H * D / 8)
  int width;             // H * D
  float k_scale, v_scale;
  bool vec;
};

template <class T, class Cache, bool write, bool vec>
__global__ void __launch_bounds__(block_threads) slot_kernel(const SlotParams p) {
  constexpr bool scaled = std::is_same_v<Cache, E4m3>;
  dependents_start();
  dependency_wait();
  const uint32_t chunk = blockIdx.x * block_threads + threadIdx.x;
  if (chunk >= p.chunks) return;
  const uint32_t row = p.chunks_a_row(chunk);
  const int column = static_cast<int>(chunk - row * p.chunks_a_row.by) * 8, count = p.width - column;
  const int64_t slot = p.slots[row];
  const bool there = static_cast<uint64_t>(slot) < static_cast<uint64_t>(p.num_slots);
  const int64_t at = (there ? slot : 0) * p.width + column;
  T* rows[2] = {static_cast<T*>(p.key) + row * p.key_stride + column, static_cast<T*>(p.value) + row * p.value_stride + column};
  Cache* caches[2] = {static_cast<Cache*>(p.k_cache) + at, static_cast<Cache*>(p.v_cache) + at};
  if constexpr (write) {
    Packed<T> packed[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_some<vec>(packed[i], rows[i], count);
    float x[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      packed[i].unpack(x[i]);
      if constexpr (scaled) {
        const Quotient by(i ? p.v_scale : p.k_scale);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[i][e] = by(x[i][e]);
      }
      store_some<vec>(caches[i], x[i], there ? count : 0);
    }
  } else {
    float x[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_some<vec>(x[i], caches[i], there ? count : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (scaled)
#pragma unroll
        for (int e = 0; e < 8; ++e) x[i][e] *= i ? p.v_scale : p.k_scale;
      store_some<vec>(rows[i], x[i], count);
    }
  }
}

template <bool write>
void run_slots(const char* op, const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
               double k_scale, double v_scale) {
  Contract c(op);
  c.tensor("key", key, "THD", storage_types, rows);
  c.tensor("value", value, "THD", key.dtype, rows);
  c.tensor("k_cache", k_cache, "BSHD", key.dtype | e4m3);
  c.tensor("v_cache", v_cache, "BSHD", k_cache.dtype);
  c.tensor("slots", slots, "T", i64);
  check_scales(c, k_cache, k_scale, v_scale);
  const int64_t width = c['H'] * c['D'], chunks = (width + 7) / 8;
  c.require(width < index_limit && c['T'] * chunks < index_limit, "%lld rows of %lld elements are more than one call takes",
            static_cast<long long>(c['T']), static_cast<long long>(width));
  if (c['T'] == 0 || width == 0) return;
  SlotParams p = {};
  p.key = key.data;
  p.value = value.data;
  p.k_cache = k_cache.data;
  p.v_cache = v_cache.data;
  p.slots = slots.ptr<const int64_t>();
  p.key_stride = key.stride[0];
  p.value_stride = value.stride[0];
  p.num_slots = c['B'] * c['S'];
  p.chunks = static_cast<uint32_t>(c['T'] * chunks);
  p.chunks_a_row = Divider(chunks);
  p.width = static_cast<int>(width);
  p.k_scale = static_cast<float>(k_scale);
  p.v_scale = static_cast<float>(v_scale);
  p.vec = width % 8 == 0 && aligned(key, 16, p.key_stride) && aligned(value, 16, p.value_stride) && aligned(k_cache, 16, 0) &&
          aligned(v_cache, 16, 0);
  const unsigned blocks = (p.chunks + block_threads - 1) / block_threads;
  with_cache(key.dtype, k_cache.dtype, [&](auto x, auto kv) {
    using T = typename decltype(x)::type;
    using Cache = typename decltype(kv)::type;
    const auto kernel = p.vec ? slot_kernel<T, Cache, write, true> : slot_kernel<T, Cache, write, false>;
    launch(op, kernel, dim3(blocks), dim3(block_threads), 0, current_stream(), p);
  });
}

// --- whole blocks -------------------------------------------------------------------------------------------------------------------
constexpr int pairs_a_launch = 448;  // a kernel's parameters are at most 4096 bytes on every toolkit
constexpr int copy_threads = 256, copy_unroll = 4;

struct CopyParams {
  const char* src;  // [planes, blocks of src, block_units] units
  char* dst;        // [planes, blocks of dst, block_units]
  int64_t src_plane, dst_plane, block_units;
  uint32_t tiles;       // of all blocks of all planes
  Divider tiles_a_block, pairs;
  int32_t pair[2 * pairs_a_launch];
};
static_assert(sizeof(CopyParams) <= 4096, "the list travels in the kernel's parameters");

// A tile is a piece of one block in one plane (a layer's keys or values); a thread block takes tiles a grid apart.
template <class Unit>
__global__ void __launch_bounds__(copy_threads) copy_kernel(const __grid_constant__ CopyParams p) {
  dependents_start();
  dependency_wait();
  for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const uint32_t block = p.tiles_a_block(tile), plane = p.pairs(block), pair = block - plane * p.pairs.by;
    const int64_t first = int64_t{tile - block * p.tiles_a_block.by} * (copy_threads * copy_unroll) + threadIdx.x;
    const Unit* from = reinterpret_cast<const Unit*>(p.src) + plane * p.src_plane + p.pair[2 * pair] * p.block_units;
    Unit* to = reinterpret_cast<Unit*>(p.dst) + plane * p.dst_plane + p.pair[2 * pair + 1] * p.block_units;
    Unit part[copy_unroll];
#pragma unroll
    for (int i = 0; i < copy_unroll; ++i)
      if (first + i * copy_threads < p.block_units) part[i] = from[first + i * copy_threads];
#pragma unroll
    for (int i = 0; i < copy_unroll; ++i)
      if (first + i * copy_threads < p.block_units) to[first + i * copy_threads] = part[i];
  }
}

// Copies blocks pairs[i] = (source, destination) in every plane. max_blocks: thread blocks, fewer where the bus is the limit.
void copy_pairs(const char* op, const void* src, void* dst, const Tensor& shape, int64_t src_blocks, int64_t dst_blocks, const int32_t* pairs,
                int64_t num_pairs, int64_t max_blocks) {
  const int64_t planes = 2 * shape.size[0], bytes = shape.size[3] * shape.size[4] * shape.size[5] * shape.item_size;
  if (planes == 0 || bytes == 0) return;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst) | static_cast<uintptr_t>(bytes);
  const int64_t unit = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
  const int64_t units = bytes / unit, tile = copy_threads * copy_unroll, tiles_a_block = (units + tile - 1) / tile;
  for (int64_t begin = 0; begin < num_pairs; begin += pairs_a_launch) {
    const int64_t count = std::min<int64_t>(pairs_a_launch, num_pairs - begin), tiles = planes * count * tiles_a_block;
    if (tiles >= index_limit) check(cudaErrorInvalidValue, op);  // blocks of terabytes
    CopyParams p;
    p.src = static_cast<const char*>(src);
    p.dst = static_cast<char*>(dst);
    p.src_plane = src_blocks * units;
    p.dst_plane = dst_blocks * units;
    p.block_units = units;
    p.tiles = static_cast<uint32_t>(tiles);
    p.tiles_a_block = Divider(tiles_a_block);
    p.pairs = Divider(count);
    std::copy_n(pairs + 2 * begin, 2 * count, p.pair);
    const dim3 grid(static_cast<unsigned>(std::min(tiles, max_blocks)));
    const auto kernel = unit == 16 ? copy_kernel<uint4> : unit == 4 ? copy_kernel<uint32_t> : copy_kernel<uint8_t>;
    launch(op, kernel, grid, dim3(copy_threads), 0, current_stream(), p);
  }
}

struct Reached {
  void* address;  // null: the tensor is empty
  bool on_device;
};

// The address under which the device reaches a tensor; host memory has to be pinned at its first and at its last byte.
Reached reachable(const Contract& c, const char* name, const Tensor& t, const char* op) {
  int64_t count = 1;
  for (int d = 0; d < t.ndim; ++d) count *= t.size[d];
  if (count == 0) return {nullptr, true};
  cudaPointerAttributes first, last;
  check(cudaPointerGetAttributes(&first, t.data), op);
  check(cudaPointerGetAttributes(&last, t.ptr<char>() + count * t.item_size - 1), op);
  c.require(first.type != cudaMemoryTypeUnregistered && last.type != cudaMemoryTypeUnregistered,
            "%s lies in host memory that is not pinned: the device cannot reach it", name);
  return {first.devicePointer, first.type == cudaMemoryTypeDevice};
}

void check_in_host_memory(const Contract& c, const Tensor& pairs, const char* op) {
  cudaPointerAttributes found;
  check(cudaPointerGetAttributes(&found, pairs.data), op);
  c.require(found.type != cudaMemoryTypeDevice, "pairs must lie in host memory");
}

void check_pairs(const Contract& c, const int32_t* pairs, int64_t num_pairs, int64_t src_blocks, int64_t dst_blocks) {
  for (int64_t i = 0; i < num_pairs; ++i)
    c.require(pairs[2 * i] >= 0 && pairs[2 * i] < src_blocks && pairs[2 * i + 1] >= 0 && pairs[2 * i + 1] < dst_blocks,
              "pairs[%lld] = (%d, %d), but there are %lld source and %lld destination blocks", static_cast<long long>(i), pairs[2 * i],
              pairs[2 * i + 1], static_cast<long long>(src_blocks), static_cast<long long>(dst_blocks));
}

// The destinations in order; two copies into one block would race.
std::vector<int32_t> destinations(const Contract& c, const int32_t* pairs, int64_t num_pairs) {
  std::vector<int32_t> sorted(static_cast<size_t>(num_pairs));
  for (int64_t i = 0; i < num_pairs; ++i) sorted[static_cast<size_t>(i)] = pairs[2 * i + 1];
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  c.require(twice == sorted.end(), "block %d is a destination twice", twice == sorted.end() ? 0 : *twice);
  return sorted;
}

}  // namespace

void rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin, bool interleaved) {
  Contract c("rope");
  c.tensor("q", q, "TQD", storage_types, rows);
  c.tensor("k", k, "THD", q.dtype, rows);
  c.tensor("positions", positions, "T", i64);
  c.tensor("cos_sin", cos_sin, "PR", f32);
  HeadParams p = head_params(c, q, k, positions, &cos_sin, interleaved);
  start_heads(c, "rope", p, c['T'], p.q_heads + p.kv_heads, q.dtype, q.dtype);
}

void rotate_and_cache(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                      const Tensor& positions, const Tensor* cos_sin, bool interleaved, const Tensor* q_weight, const Tensor* k_weight, double eps,
                      double offset, double k_scale, double v_scale) {
  Contract c("rotate_and_cache");
  c.tensor("q", q, "TQD", storage_types, rows);
  c.tensor("k", k, "THD", q.dtype, rows);
  c.tensor("v", v, "THD", q.dtype, rows);
  c.tensor("k_cache", k_cache, "BSHD", q.dtype | e4m3);
  c.tensor("v_cache", v_cache, "BSHD", k_cache.dtype);
  c.tensor("slots", slots, "T", i64);
  c.tensor("positions", positions, "T", i64);
  if (cos_sin) c.tensor("cos_sin", *cos_sin, "PR", f32);
  c.require(!q_weight == !k_weight, "q_weight and k_weight: both or neither");
  if (q_weight) c.tensor("q_weight", *q_weight, "D", f32);
  if (k_weight) c.tensor("k_weight", *k_weight, "D", f32);
  check_scales(c, k_cache, k_scale, v_scale);
  HeadParams p = head_params(c, q, k, positions, cos_sin, interleaved);
  p.v = v.data;
  p.v_stride = v.stride[0];
  p.k_cache = k_cache.data;
  p.v_cache = v_cache.data;
  p.slots = slots.ptr<const int64_t>();
  p.num_slots = c['B'] * c['S'];
  p.q_weight = q_weight ? q_weight->ptr<const float>() : nullptr;
  p.k_weight = k_weight ? k_weight->ptr<const float>() : nullptr;
  p.eps = static_cast<float>(eps);
  p.offset = static_cast<float>(offset);
  p.k_scale = static_cast<float>(k_scale);
  p.v_scale = static_cast<float>(v_scale);
  p.vec = p.vec && aligned(v, 16, p.v_stride) && aligned(k_cache, 16, 0) && aligned(v_cache, 16, 0) &&
          (!q_weight || (aligned(*q_weight, 16, 0) && aligned(*k_weight, 16, 0)));
  start_heads(c, "rotate_and_cache", p, c['T'], p.q_heads + 2 * p.kv_heads, q.dtype, k_cache.dtype);
}

void write_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, double k_scale,
              double v_scale) {
  run_slots<true>("write_kv", key, value, k_cache, v_cache, slots, k_scale, v_scale);
}

void gather_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, double k_scale,
               double v_scale) {
  run_slots<false>("gather_kv", key, value, k_cache, v_cache, slots, k_scale, v_scale);
}

void copy_blocks(const Tensor& kv, const Tensor& pairs) {
  Contract c("copy_blocks");
  c.tensor("kv", kv, "L2BSHD", any_type);
  c.tensor("pairs", pairs, "N2", i32);
  if (c['N'] == 0) return;
  check_in_host_memory(c, pairs, "copy_blocks");
  const int32_t* pair = pairs.ptr<int32_t>();
  check_pairs(c, pair, c['N'], c['B'], c['B']);
  // Destinations are written once and no source is a destination, so the order of the copies cannot matter.
  const std::vector<int32_t> written = destinations(c, pair, c['N']);
  for (int64_t i = 0; i < c['N']; ++i)
    c.require(!std::binary_search(written.begin(), written.end(), pair[2 * i]), "block %d is both a source and a destination", pair[2 * i]);
  copy_pairs("copy_blocks", kv.data, kv.data, kv, c['B'], c['B'], pair, c['N'], index_limit - 1);
}

void swap_blocks(const Tensor& src, const Tensor& dst, const Tensor& pairs) {
  Contract c("swap_blocks");
  c.tensor("src", src, "L2ASHD", any_type);
  c.tensor("dst", dst, "L2BSHD", src.dtype);
  c.tensor("pairs", pairs, "N2", i32);
  c.require(src.item_size == dst.item_size, "src and dst have items of %lld and %lld bytes", static_cast<long long>(src.item_size),
            static_cast<long long>(dst.item_size));
  if (c['N'] == 0) return;
  check_in_host_memory(c, pairs, "swap_blocks");
  check_pairs(c, pairs.ptr<int32_t>(), c['N'], c['A'], c['B']);
  destinations(c, pairs.ptr<int32_t>(), c['N']);
  const Reached from = reachable(c, "src", src, "swap_blocks"), to = reachable(c, "dst", dst, "swap_blocks");
  if (!from.address || !to.address) return;
  // A few thread blocks keep the bus busy and leave the multiprocessors to the step that runs beside. (The copy engines would leave
  // all of them, but refuse a rectangle of host memory that was pinned in several pieces.)
  constexpr int64_t bus_blocks = 16;
  const int64_t most = from.on_device && to.on_device ? index_limit - 1 : bus_blocks;
  copy_pairs("swap_blocks", from.address, to.address, src, c['A'], c['B'], pairs.ptr<int32_t>(), c['N'], most);
}

}  // namespace octavo::cuda
