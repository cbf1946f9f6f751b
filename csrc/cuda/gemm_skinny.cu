// Products of few rows (1 to 64) with a plain weight [N, K]: the time is that of reading the weight once, so everything here serves to
// keep reads in flight. Owns skinny_linear, skinny_gated, norm_linear and norm_gated; it does not know what a layer is.
//
// Weights are the 16-row side of the tensor-core product and tokens its 8-column side. K is permuted alike in both operands: of every 32
// elements a thread gets 8 neighbours, so one 16-byte copy brings two fragments, and the thread that copied them to shared memory is
// the one that reads them back; a warp's stream of weights needs no barrier. Copies of the first stages are issued before the kernel
// waits for its predecessor (programmatic dependent launch), because weights never change.
//
// A block may work through several tiles of rows, one after the other: the ring of weights runs on from tile to tile, and activations
// that fit in shared memory are fetched, or normed, once.
//
// Invariant: chunks of 64 elements of K are dealt to 8 slices in turn, each slice is summed by one warp in ascending order, and the
// slices are added as a tree. Nothing of this depends on the number of rows: a row's result depends on its inputs and the weight alone.
#include "gemm.cuh"

#include <algorithm>
#include <string>

#include "common/check.h"
#include "ops.h"

namespace octavo::cuda {
namespace {

constexpr int max_rows = 64;
constexpr int64_t max_norm_size = 16384;  // elements of a row that is normed
constexpr int step = 32;                  // elements of K that a warp multiplies at once
constexpr int step_bytes = step * 2;
static_assert(chunk % step == 0, "a step lies in one slice");

struct Plan {
  int tiles;   // of 16 rows of weight in a block, every warp has its slice of all of them
  int tokens;  // in eights
  int stages;  // of weights in flight, 64 to 96 KiB in a block
};

constexpr bool operator==(Plan a, Plan b) { return a.tiles == b.tiles && a.tokens == b.tokens && a.stages == b.stages; }

// roomy: a block can have more than 128 KiB of shared memory; without it every plan stays within 99 KiB.
constexpr Plan choose(bool roomy, bool gated, int rows, int64_t n, int64_t k) {
  if (rows > 32) return {2, 8, 2};
  if (rows > 16) return {2, 4, 3};
  if (rows > 8) return gated || n >= 8192 ? Plan{2, 2, 4} : Plan{1, 2, 3};
  if (gated || n >= 8192 || !roomy) return {2, 1, 4};
  // With a block for each multiprocessor at most, the block alone keeps the memory busy.
  return {1, 1, n <= 2048 && k > 2048 ? 6 : 4};
}

// Steps of 32 that are copied, awaited and multiplied together: two where a warp has little else to do meanwhile.
constexpr int steps_of(Plan p) { return p.tiles == 1 ? 2 : 1; }

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

constexpr int most_rows_apart = 8;  // with more rows the sums take the place of the weights

// Shared memory, in bytes: stages of weights and of activations (or the normed rows, the norm's weight and its sums), the sums.
struct Shared {
  int64_t x, norm_weight;
  int64_t squares;  // [slots][warps], then a scale for each row
  int64_t zeros;    // 16 bytes for each warp
  int64_t partial;
  int64_t size;
};

__host__ __device__ inline Shared layout(int tiles, int weight_steps, int x_steps, bool norm, int rows, int k) {
  Shared s = {};
  s.x = static_cast<int64_t>(weight_steps) * warps * tiles * 16 * step_bytes;
  if (norm) {
    s.norm_weight = (s.x + static_cast<int64_t>(rows) * (k + step) * 2 + 15) / 16 * 16;  // rows apart by an odd number of half banks
    s.squares = s.norm_weight + static_cast<int64_t>(k) * 4;
    s.size = s.squares + norm_slots * (warps + 1) * 4;
  } else {
    s.size = s.x + static_cast<int64_t>(x_steps) * slices * rows * step_bytes;
  }
  s.zeros = (s.size + 15) / 16 * 16;
  s.size = s.zeros + warps * 16;
  const int64_t partial = static_cast<int64_t>(slices) * rows * (tiles * 16 + 4) * 4;
  if (rows <= most_rows_apart) {
    s.partial = s.size;
    s.size += partial;
  }
  s.size = s.size > partial ? s.size : partial;
  return s;
}

// The normed rows, rounded to T, into shared memory at x [M, K + 32]; block 0 also writes the sum. Every block does this for itself.
template <class T>
__device__ __forceinline__ void norm_rows(const SkinnyParams& p, T* x, const float* norm_weight, float* squares) {
  const int thread = threadIdx.x, vectors = (p.k / 4 + norm_threads - 1) / norm_threads;
  // Slot by slot: vector i of row `row`. The slots in use come first, and the first one that is not ends each walk.
  float4 v[norm_slots];
  const auto column = [&](int i) { return (i * norm_threads + thread) * 4; };
  int row = 0, i = 0;
#pragma unroll
  for (int slot = 0; slot < norm_slots; ++slot) {
    if (row >= p.rows) break;
    v[slot] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (column(i) < p.k) v[slot] = add_delta(p.residual, static_cast<const T*>(p.delta), static_cast<int64_t>(row) * p.k + column(i));
    if (++i == vectors) i = 0, ++row;
  }
  row = i = 0;
#pragma unroll
  for (int slot = 0; slot < norm_slots; ++slot) {
    if (row >= p.rows) break;
    const float sum = warp_squares(v[slot]);
    if (thread % 32 == 0) squares[slot * warps + thread / 32] = sum;
    if (blockIdx.x == 0 && column(i) < p.k) *reinterpret_cast<float4*>(p.total + static_cast<int64_t>(row) * p.k + column(i)) = v[slot];
    if (++i == vectors) i = 0, ++row;
  }
  __syncthreads();
  float* scales = squares + norm_slots * warps;
  if (thread < p.rows) scales[thread] = norm_scale(squares + thread * vectors * warps, vectors, p.k, p.eps);
  __syncthreads();
  row = i = 0;
#pragma unroll
  for (int slot = 0; slot < norm_slots; ++slot) {
    if (row >= p.rows) break;
    if (column(i) < p.k) {
      const float4 weight = *reinterpret_cast<const float4*>(norm_weight + column(i));
      *reinterpret_cast<uint2*>(x + row * (p.k + step) + column(i)) = normed<T>(v[slot], scales[row], weight, p.offset);
    }
    if (++i == vectors) i = 0, ++row;
  }
  __syncthreads();
}

// Grid: any number of blocks; block b has the tiles b, b + grid, ... T: __half or __nv_bfloat16.
template <class T, int tiles, int tokens, int stages, bool norm>
__global__ void __launch_bounds__(32 * warps, tokens == 1 ? 4 : tokens == 2 ? 3 : 2)
    skinny_kernel(const __grid_constant__ SkinnyParams p) {
#if __CUDA_ARCH__ >= 800
  constexpr int stage_steps = steps_of({tiles, tokens, stages});
  constexpr uint32_t weight_step = warps * tiles * 16 * step_bytes, weight_stage = stage_steps * weight_step;  // bytes
  constexpr int tile_rows = tiles * 16;

  extern __shared__ __align__(16) unsigned char shared[];
  const Shared place = layout(tiles, p.weight_steps, p.x_steps, norm, p.rows, p.k);
  const uint32_t base = shared_address(shared);
  const int num_stages = p.steps / stage_steps;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool gated = p.kind != Activation::none;
  const int tile_outputs = gated ? tile_rows / 2 : tile_rows, num_tiles = (p.n + tile_outputs - 1) / tile_outputs;

  // --- weights, ahead of the product: in the gated form the first 16 rows of a tile are of the gate and the others of the values
  int fetched_tile = blockIdx.x, fetched_stage = 0;  // next
  const T* source[tiles][2];
  bool there[tiles][2];
  const auto locate = [&] {
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int output = fetched_tile * tile_outputs + (gated ? 0 : j * 16) + h * 8 + g;
        there[j][h] = output < p.n;
        const int64_t row = there[j][h] ? output + static_cast<int64_t>(gated ? j : 0) * p.n : 0;
        source[j][h] = static_cast<const T*>(p.weight) + row * p.k;
      }
  };
  const uint64_t policy = leave_first();
  const uint32_t weight_ring = base + warp * tiles * 1024 + lane * 16;
  // Steps 2 i and 2 i + 1 are the halves of the slice's chunk i. Copies beyond K read nothing and write zeros.
  const int first_column = warp * chunk + t * 8;
  const auto column = [&](int i) { return first_column + i / 2 * (slices * chunk) + i % 2 * step; };
  const auto fetch_weights = [&](uint32_t to) {
    if (fetched_tile >= num_tiles) return;
    const int first_of_stage = column(fetched_stage * stage_steps);
#pragma unroll
    for (int u = 0; u < stage_steps; ++u) {
      const bool inside = first_of_stage + u * step < p.k;
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          copy16_once(to + u * weight_step + j * 1024 + h * 512, source[j][h] + first_of_stage + u * step, there[j][h] && inside, policy);
    }
    if (++fetched_stage == num_stages) {
      fetched_stage = 0;
      fetched_tile += gridDim.x;
      locate();
    }
  };
  if constexpr (norm) {
    for (int k = threadIdx.x * 4; k < p.k; k += norm_threads * 4)
      copy16(base + static_cast<uint32_t>(place.norm_weight) + k * 4, p.norm_weight + k, true);
    copies_commit();
  }
  locate();
  // The place in the ring is a thread's own address, not an offset from it: of a common offset beside a thread's address, with a cache
  // policy, ptxas 13.0 makes an instruction that is illegal (LDGSTS [R + UR] with a descriptor).
  uint32_t weight_at = weight_ring;
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    fetch_weights(weight_at);
    if (norm) copies_commit();
    weight_at += weight_stage;
  }
  weight_at = weight_ring;
  if (!norm) copies_commit();
  dependents_start();
  dependency_wait();

  // --- activations: a step's [M, 32] are laid out row after row, so a warp reads neighbouring 16 bytes, eight rows at a time. Where there
  // is room all steps are fetched at once, else as many as there are stages of weights. Rows that are not there are read from `zeros`.
  const bool whole = norm || p.x_steps == p.steps;
  const bool streaming = !whole || num_stages > stages || static_cast<int>(gridDim.x) < num_tiles;  // else all is fetched by now
  const uint32_t x_ring = base + static_cast<uint32_t>(place.x), zeros = base + static_cast<uint32_t>(place.zeros) + warp * 16;
  const uint32_t x_step = slices * p.rows * step_bytes, x_stage = stage_steps * x_step, x_end = p.x_steps * x_step;
  const T* x = static_cast<const T*>(p.x) + g * p.x_stride;
  const uint32_t x_at = x_ring + (warp * p.rows + g) * step_bytes + t * 16;
  const auto fetch_x = [&](int stage, uint32_t offset) {
    const int first_of_stage = column(stage * stage_steps);
#pragma unroll
    for (int token = 0; token < tokens; ++token)
      if (token * 8 + g < p.rows) {
#pragma unroll
        for (int u = 0; u < stage_steps; ++u)
          copy16(x_at + offset + u * x_step + token * (8 * step_bytes), x + token * 8 * p.x_stride + first_of_stage + u * step,
                 first_of_stage + u * step < p.k);
      }
  };
  if (lane < 4) store4(zeros + lane * 4, 0);
  __syncwarp();
  if constexpr (norm) {
    copies_wait<stages>();  // the norm's weight; each thread reads what it copied
    norm_rows<T>(p, reinterpret_cast<T*>(shared + place.x), reinterpret_cast<const float*>(shared + place.norm_weight),
                 reinterpret_cast<float*>(shared + place.squares));
    if (!streaming) copies_wait<0>();
  } else if (whole) {
#pragma unroll 2
    for (int i = 0; i < num_stages; ++i) fetch_x(i, i * x_stage);
    copies_commit();
    copies_wait<0>();
  } else {  // more stages in a tile than in the ring
#pragma unroll 1
    for (int i = 0; i < stages - 1; ++i) {
      fetch_x(i, i * x_stage);
      copies_commit();
    }
  }

  uint32_t x_offset = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    // --- product
    float sum[tiles][tokens][4] = {};
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
      if (streaming) copies_wait<norm ? stages - 1 : stages - 2>();
      if constexpr (!norm) {
        if (!whole) {
          const int ahead = i + stages - 1;
          if (ahead < num_stages || tile + gridDim.x < num_tiles)
            fetch_x(ahead < num_stages ? ahead : ahead - num_stages, (x_offset == 0 ? x_end : x_offset) - x_stage);
        }
      }
      uint4 weights[stage_steps][tiles][2];
#pragma unroll
      for (int u = 0; u < stage_steps; ++u)
#pragma unroll
        for (int j = 0; j < tiles; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) weights[u][j][h] = load16(weight_at + (u * weight_step + j * 1024 + h * 512));
#pragma unroll
      for (int u = 0; u < stage_steps; ++u)
#pragma unroll
        for (int token = 0; token < tokens; ++token) {
          const int m = token * 8 + g;
          uint32_t at;
          if constexpr (norm) {
            const int k = column(i * stage_steps) + u * step;
            at = m < p.rows && k < p.k ? x_ring + (m * (p.k + step) + k) * 2 : zeros;
          } else {
            at = m < p.rows ? x_at + x_offset + u * x_step + token * (8 * step_bytes) : zeros;
          }
          const uint4 b = load16(at);
#pragma unroll
          for (int j = 0; j < tiles; ++j) {
            const uint4 low = weights[u][j][0], high = weights[u][j][1];
            multiply(T(), sum[j][token], low.x, high.x, low.y, high.y, b.x, b.y);
            multiply(T(), sum[j][token], low.z, high.z, low.w, high.w, b.z, b.w);
          }
        }
      if (streaming) {
        fetch_weights(weight_at);
        copies_commit();
      }
      weight_at = weight_at == weight_ring + (stages - 1) * weight_stage ? weight_ring : weight_at + weight_stage;
      x_offset += x_stage;
      if (x_offset == x_end) x_offset = 0;
    }

    // --- sums of the slices: [slice][token][row of weight], padded so that a fragment's 32 numbers go to 32 banks
    constexpr int pitch = tile_rows + 4;
    float* partial = reinterpret_cast<float*>(shared + place.partial);
    // The tile before has been read, or, where the sums take the place of the weights, these have.
    if (place.partial == 0 || tile != static_cast<int>(blockIdx.x)) __syncthreads();
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int token = 0; token < tokens; ++token)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int m = token * 8 + t * 2 + c % 2;
          if (m < p.rows) partial[(warp * p.rows + m) * pitch + j * 16 + c / 2 * 8 + g] = sum[j][token][c];
        }
    __syncthreads();

    // --- outputs
    const int bits = gated ? log2_of(tile_rows / 2) : log2_of(tile_rows);
    const auto total = [&](int m, int row) {
      float s[slices];
#pragma unroll
      for (int i = 0; i < slices; ++i) s[i] = partial[(i * p.rows + m) * pitch + row];
      return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    };
#pragma unroll 1
    for (int e = threadIdx.x; e < p.rows << bits; e += 32 * warps) {
      const int m = e >> bits, row = e & (tile_outputs - 1), output = tile * tile_outputs + row;
      if (output >= p.n) continue;
      float v = total(m, row);
      if (p.bias) v += p.bias[output];
      if (gated) {
        float up = total(m, tile_rows / 2 + row);
        if (p.bias) up += p.bias[p.n + output];
        v = activate(v, p.kind) * up;
      }
      const int64_t at = m * p.out_stride + output;
      if (p.float_out)
        static_cast<float*>(p.out)[at] = v;
      else
        static_cast<T*>(p.out)[at] = T(v);
    }
  }
#else
  __trap();
#endif
}

// The norm alone, for more rows than it pays to norm again in every block: one block a row, the same sums. x: act [M, K]
template <class T>
__global__ void __launch_bounds__(norm_threads) norm_kernel(const __grid_constant__ SkinnyParams p, T* x) {
  constexpr int most = max_norm_size / 4 / norm_threads;
  __shared__ __align__(16) float squares[most * warps];
  dependents_start();
  dependency_wait();
  const int vectors = (p.k / 4 + norm_threads - 1) / norm_threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.k;
  const auto column = [](int i) { return (i * norm_threads + static_cast<int>(threadIdx.x)) * 4; };
  float4 v[most];
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (i >= vectors) break;
    v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (column(i) < p.k) v[i] = add_delta(p.residual, static_cast<const T*>(p.delta), row + column(i));
  }
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (i >= vectors) break;
    const float sum = warp_squares(v[i]);
    if (threadIdx.x % 32 == 0) squares[i * warps + threadIdx.x / 32] = sum;
    if (column(i) < p.k) *reinterpret_cast<float4*>(p.total + row + column(i)) = v[i];
  }
  __syncthreads();
  const float scale = norm_scale(squares, vectors, p.k, p.eps);
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (column(i) >= p.k) break;
    const float4 weight = *reinterpret_cast<const float4*>(p.norm_weight + column(i));
    *reinterpret_cast<uint2*>(x + row + column(i)) = normed<T>(v[i], scale, weight, p.offset);
  }
}

// --- host ----------------------------------------------------------------------------------------------------------------------------

template <class T, int tiles, int tokens, int stages, bool norm>
void launch_plan(const char* op, SkinnyParams p, cudaStream_t stream) {
  constexpr int ring_steps = stages * steps_of({tiles, tokens, stages});
  const auto kernel = skinny_kernel<T, tiles, tokens, stages, norm>;
  const auto size = [&] { return layout(tiles, p.weight_steps, p.x_steps, norm, p.rows, p.k).size; };
  p.weight_steps = ring_steps;
  p.x_steps = p.steps;
  // All activations at once where two blocks of such a size still fit a multiprocessor.
  if (!norm && size() > std::min(device().shared_per_block, device().shared_per_sm / 2 - 1024)) p.x_steps = std::min(p.steps, ring_steps);
  // A block that norms does it once for several tiles, in as many blocks as there is room for at a time. Without a norm a block for every
  // tile is faster: blocks that end one after the other make room for the first weights of the next kernel.
  const int outputs = tiles * (p.kind == Activation::none ? 16 : 8), num_tiles = (p.n + outputs - 1) / outputs;
  int tiles_each = 1;
  if (norm) {
    const int together = device().num_sms * static_cast<int>(std::clamp<int64_t>(device().shared_per_sm / (size() + 1024), 1, 3));
    tiles_each = (num_tiles + together - 1) / together;
  }
  if (tiles_each == 1) p.weight_steps = std::min(p.steps, ring_steps);
  const dim3 grid(static_cast<unsigned>((num_tiles + tiles_each - 1) / tiles_each));
  // All products ask for the same division of the L1 cache: two kernels share a multiprocessor only if they agree on it.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), op);
  launch(op, kernel, grid, 32 * warps, static_cast<size_t>(size()), stream, p);
}

Plan plan_for(const SkinnyParams& p) {
  return choose(device().shared_per_block > 128 * 1024, p.kind != Activation::none, p.rows, p.n, p.k);
}

template <class T>
void run(const char* op, const SkinnyParams& p, cudaStream_t stream) {
  const Plan plan = plan_for(p);
  if (p.residual) {
    if (plan == Plan{1, 1, 4}) return launch_plan<T, 1, 1, 4, true>(op, p, stream);
    if (plan == Plan{1, 1, 6}) return launch_plan<T, 1, 1, 6, true>(op, p, stream);
    return launch_plan<T, 2, 1, 4, true>(op, p, stream);
  }
  if (plan == Plan{1, 1, 4}) return launch_plan<T, 1, 1, 4, false>(op, p, stream);
  if (plan == Plan{1, 1, 6}) return launch_plan<T, 1, 1, 6, false>(op, p, stream);
  if (plan == Plan{2, 1, 4}) return launch_plan<T, 2, 1, 4, false>(op, p, stream);
  if (plan == Plan{1, 2, 3}) return launch_plan<T, 1, 2, 3, false>(op, p, stream);
  if (plan == Plan{2, 2, 4}) return launch_plan<T, 2, 2, 4, false>(op, p, stream);
  if (plan == Plan{2, 4, 3}) return launch_plan<T, 2, 4, 3, false>(op, p, stream);
  return launch_plan<T, 2, 8, 2, false>(op, p, stream);
}

bool aligned(const Tensor& t, int64_t bytes) { return reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(bytes) == 0; }

// What all four share. x: the activations, or the addend of the norm.
SkinnyParams common(const Contract& c, const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias, Activation kind,
                    const Tensor& scratch) {
  c.require(device().capability >= 80, "needs a device of compute capability 8.0 or newer, this one has %d.%d", device().capability / 10,
            device().capability % 10);
  c.require(x.dtype != f32, "float32 has no kernel here: use a float32 product of the library (cuBLAS)");
  c.require(weight.dtype == x.dtype && (out.dtype == x.dtype || out.dtype == f32),
            "activations and weight have one type, and out has it too or is float32");
  c.require(c['M'] <= max_rows, "at most %d rows, got %lld", max_rows, static_cast<long long>(c['M']));
  c.require(c['K'] > 0 && c['K'] % 8 == 0, "the size of a row must be a multiple of 8, got %lld", static_cast<long long>(c['K']));
  c.require(c['K'] < (1 << 30) && c['N'] < (1 << 30), "a weight of %lld x %lld is too large", static_cast<long long>(c['N']),
            static_cast<long long>(c['K']));
  c.require(aligned(x, 16) && aligned(weight, 16) && (c['M'] <= 1 || x.stride[0] % 8 == 0),
            "the rows of activations and weight must start at multiples of 16 bytes");
  (void)scratch;
  SkinnyParams p = {};
  p.out = out.data;
  p.x = x.data;
  p.weight = weight.data;
  p.bias = bias ? bias->ptr<const float>() : nullptr;
  p.out_stride = out.stride[0];
  p.x_stride = x.stride[0];
  p.rows = static_cast<int>(c['M']);
  p.n = static_cast<int>(out.size[1]);
  p.k = static_cast<int>(c['K']);
  p.steps = static_cast<int>((c['K'] + slices * chunk - 1) / (slices * chunk)) * (chunk / step);
  p.kind = kind;
  p.float_out = out.dtype == f32;
  return p;
}

void dispatch(const char* op, const SkinnyParams& p, DType act) {
  if (p.rows == 0 || p.n == 0) return;
  if (act == bf16)
    run<__nv_bfloat16>(op, p, current_stream());
  else
    run<__half>(op, p, current_stream());
}

// The most rows that every thread block norms for itself: what its threads can hold, which is also where it stops to pay.
bool norm_inside(const SkinnyParams& p) {
  const Plan plan = plan_for(p);
  return p.rows <= 2 && p.rows * ((p.k / 4 + norm_threads - 1) / norm_threads) <= norm_slots &&
         layout(plan.tiles, plan.stages * steps_of(plan), 0, true, p.rows, p.k).size <= device().shared_per_block;
}

void norm_then(const Contract& c, const char* op, SkinnyParams p, const Tensor& total, const Tensor& residual, const Tensor& delta,
               const Tensor& norm_weight, double eps, double offset, const Tensor& scratch) {
  c.require(total.data != residual.data || p.rows == 0, "total must be another tensor than residual");
  c.require(p.k <= max_norm_size, "the norm takes rows of at most %lld elements, got %d", static_cast<long long>(max_norm_size), p.k);
  c.require(aligned(total, 16) && aligned(residual, 16) && aligned(norm_weight, 16) && aligned(scratch, 16),
            "total, residual, norm_weight and scratch must start at multiples of 16 bytes");
  c.require(scratch.size[0] >= skinny_scratch_floats(), "scratch needs %lld elements, has %lld",
            static_cast<long long>(skinny_scratch_floats()), static_cast<long long>(scratch.size[0]));
  if (p.rows == 0) return;
  p.residual = residual.ptr<const float>();
  p.delta = delta.data;
  p.norm_weight = norm_weight.ptr<const float>();
  p.total = total.ptr<float>();
  p.eps = static_cast<float>(eps);
  p.offset = static_cast<float>(offset);
  if (!norm_inside(p) || p.n == 0) {
    const dim3 grid(static_cast<unsigned>(p.rows));
    if (delta.dtype == bf16)
      launch(op, norm_kernel<__nv_bfloat16>, grid, norm_threads, 0, current_stream(), p, scratch.ptr<__nv_bfloat16>());
    else
      launch(op, norm_kernel<__half>, grid, norm_threads, 0, current_stream(), p, scratch.ptr<__half>());
    p.residual = nullptr;
    p.x = scratch.data;
    p.x_stride = p.k;
  }
  dispatch(op, p, delta.dtype);
}

constexpr uint32_t act_types = f32 | f16 | bf16;

}  // namespace

int64_t skinny_scratch_floats() { return max_rows * max_norm_size / 2; }  // the normed rows

void skinny_linear(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& scratch) {
  Contract c("skinny_linear");
  c.tensor("out", out, "MN", act_types, rows);
  c.tensor("x", x, "MK", act_types, rows);
  c.tensor("weight", weight, "NK", act_types);
  if (bias) c.tensor("bias", *bias, "N", f32);
  c.tensor("scratch", scratch, "S", f32);
  dispatch("skinny_linear", common(c, out, x, weight, bias, Activation::none, scratch), x.dtype);
}

void skinny_gated(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias, std::string_view kind, const Tensor& scratch) {
  Contract c("skinny_gated");
  c.tensor("out", out, "MI", act_types, rows);
  c.tensor("x", x, "MK", act_types, rows);
  c.tensor("weight", weight, "NK", act_types);
  if (bias) c.tensor("bias", *bias, "N", f32);
  c.tensor("scratch", scratch, "S", f32);
  c.require(c['N'] == 2 * c['I'], "weight has %lld rows, twice the %lld columns of out are wanted", static_cast<long long>(c['N']),
            static_cast<long long>(c['I']));
  dispatch("skinny_gated", common(c, out, x, weight, bias, activation_of(c, kind), scratch), x.dtype);
}

void norm_linear(const Tensor& out, const Tensor& total, const Tensor& residual, const Tensor& delta, const Tensor& norm_weight, double eps,
                 double offset, const Tensor& weight, const Tensor* bias, const Tensor& scratch) {
  Contract c("norm_linear");
  c.tensor("out", out, "MN", act_types, rows);
  c.tensor("total", total, "MK", f32);
  c.tensor("residual", residual, "MK", f32);
  c.tensor("delta", delta, "MK", act_types);
  c.tensor("norm_weight", norm_weight, "K", f32);
  c.tensor("weight", weight, "NK", act_types);
  if (bias) c.tensor("bias", *bias, "N", f32);
  c.tensor("scratch", scratch, "S", f32);
  norm_then(c, "norm_linear", common(c, out, delta, weight, bias, Activation::none, scratch), total, residual, delta, norm_weight, eps, offset,
            scratch);
}

void norm_gated(const Tensor& out, const Tensor& total, const Tensor& residual, const Tensor& delta, const Tensor& norm_weight, double eps,
                double offset, const Tensor& weight, const Tensor* bias, std::string_view kind, const Tensor& scratch) {
  Contract c("norm_gated");
  c.tensor("out", out, "MI", act_types, rows);
  c.tensor("total", total, "MK", f32);
  c.tensor("residual", residual, "MK", f32);
  c.tensor("delta", delta, "MK", act_types);
  c.tensor("norm_weight", norm_weight, "K", f32);
  c.tensor("weight", weight, "NK", act_types);
  if (bias) c.tensor("bias", *bias, "N", f32);
  c.tensor("scratch", scratch, "S", f32);
  c.require(c['N'] == 2 * c['I'], "weight has %lld rows, twice the %lld columns of out are wanted", static_cast<long long>(c['N']),
            static_cast<long long>(c['I']));
  norm_then(c, "norm_gated", common(c, out, delta, weight, bias, activation_of(c, kind), scratch), total, residual, delta, norm_weight, eps,
            offset, scratch);
}

}  // namespace octavo::cuda
