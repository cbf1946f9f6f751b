// Products of few rows (1 to 64) with a plain weight [N, K]: the time is that of reading the weight once, so everything here serves to
// keep reads in flight. Owns skinny_linear, skinny_gated, norm_linear and norm_gated; it does not know what a layer is.
//
// Weights are the 16-row side of the tensor-core product and tokens its 8-column side. K is permuted alike in both operands: of every 32
// elements a thread gets 8 neighbours, so one 16-byte copy brings two fragments, and the thread that copied them to shared memory is
// the one that reads them back; a warp's stream of weights needs no barrier. Copies of the first stages are issued before the kernel
// waits for its predecessor (programmatic dependent launch), because weights never change.
//
// Invariant: chunks of 64 elements of K are dealt to 8 slices in turn, a slice is one chain of products in ascending order, and the
// slices are added as a tree. Whether the slices lie in 8 warps of a thread block or in 2, 4 or 8 blocks of a cluster changes no bit, and
// neither does the number of rows: a row's result depends on its inputs and the weight alone.
#include "gemm.cuh"

#include <algorithm>
#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "ops.h"

namespace octavo::cuda {
namespace {

constexpr int max_rows = 64;
constexpr int64_t max_norm_size = 16384;  // elements of a row that is normed
constexpr int step = 32;                  // elements of K that a warp multiplies at once
constexpr int step_bytes = step * 2;
static_assert(chunk % step == 0, "a step lies in one slice");

// How many thread blocks, and what a warp does. `slices` of K are in one block, the block's other warps take further rows of the weight.
struct Plan {
  int slices;  // of the 8 in one thread block; the cluster has the rest
  int tiles;   // of 16 rows of weight in a warp
  int tokens;  // in eights
  int stages;  // of weights in flight: 64 to 96 KiB in a block
};

constexpr bool operator==(Plan a, Plan b) {
  return a.slices == b.slices && a.tiles == b.tiles && a.tokens == b.tokens && a.stages == b.stages;
}

constexpr Plan choose(bool clusters, bool roomy, bool gated, int rows, int64_t n, int64_t k) {
  const int tokens = rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
  if (tokens <= 2) {
    const int tiles = gated || n >= (tokens == 1 ? 8192 : 4096) ? 2 : 1;
    if (tiles == 2) return {8, 2, tokens, 4};
    // With a block for each multiprocessor at most, the block alone keeps the memory busy.
    return {8, 1, tokens, tokens == 2 ? 3 : roomy && rows <= 2 && n <= 2048 && k > 2048 ? 6 : 4};
  }
  if (!clusters) return {8, 2, tokens, tokens == 4 ? 3 : 2};
  // 128 rows of weight in a block, so that activations are read from the L2 cache once for 128 rows; blocks enough for the device.
  if (!gated && n < 4096) return {1, 1, tokens, 8};
  return {2, 2, tokens, 4};
}

// Steps of 32 that are copied, awaited and multiplied together: two where a warp has little else to do meanwhile.
constexpr int steps_of(Plan p) { return p.slices == 8 && p.tiles == 1 ? 2 : 1; }

constexpr int blocks_per_sm(int tokens) { return tokens == 1 ? 4 : tokens <= 2 ? 3 : 2; }

constexpr int rows_of(Plan p) { return warps / p.slices * p.tiles * 16; }  // of weight, in a block

// Shared memory, in bytes: stages of weights and of activations (or the normed rows, the norm's weight and its sums), all of which make
// place for the partial sums in the end.
struct Shared {
  int64_t x, norm_weight;
  int64_t squares;  // [slots][warps], then a scale for each row
  int64_t size;
};

__host__ __device__ inline Shared layout(int slices, int tiles, int weight_steps, int x_steps, bool norm, int rows, int k) {
  Shared s = {};
  s.x = static_cast<int64_t>(weight_steps) * warps * tiles * 16 * step_bytes;
  if (norm) {
    s.norm_weight = (s.x + static_cast<int64_t>(rows) * (k + step) * 2 + 15) / 16 * 16;  // rows apart by an odd number of half banks
    s.squares = s.norm_weight + static_cast<int64_t>(k) * 4;
    s.size = s.squares + norm_slots * (warps + 1) * 4;
  } else {
    s.size = s.x + static_cast<int64_t>(x_steps) * slices * rows * step_bytes;
  }
  const int64_t partial = static_cast<int64_t>(slices) * rows * (warps / slices * tiles * 16 + 4) * 4;
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

#ifdef OCTAVO_TUNE
#define TRACE(i)                                                                                   \
  if (p.trace && threadIdx.x == 0 && (blockIdx.x == 0 || blockIdx.x == gridDim.x - 1)) {           \
    unsigned long long now;                                                                        \
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");                               \
    p.trace[(blockIdx.x ? 8 : 0) + i] = now;                                                       \
  }
#else
#define TRACE(i)
#endif

// Grid: (blocks of rows of the weight) * cluster. T: __half or __nv_bfloat16.
template <class T, int block_slices, int tiles, int tokens, int stages, bool norm>
__global__ void __launch_bounds__(32 * warps, blocks_per_sm(tokens)) skinny_kernel(const __grid_constant__ SkinnyParams p) {
#if __CUDA_ARCH__ >= 800
  constexpr int groups = warps / block_slices;  // of warps, each with rows of weight of its own; as many blocks are in a cluster
  constexpr int cluster = slices / block_slices;
  static_assert(groups == cluster, "8 warps, 8 slices");
  constexpr int stage_steps = steps_of({block_slices, tiles, tokens, stages});
  constexpr int weight_step = warps * tiles * 16 * step_bytes;  // bytes
  constexpr int block_rows = groups * tiles * 16;

  TRACE(0)
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared place = layout(block_slices, tiles, min(p.steps, stages * stage_steps), p.x_steps, norm, p.rows, p.k);
  const uint32_t base = shared_address(shared);
  const int num_stages = p.steps / stage_steps;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int local = warp % block_slices, group = warp / block_slices;
  const int rank = cluster > 1 ? blockIdx.x % cluster : 0;
  const int slice = rank * block_slices + local;
  const bool gated = p.kind != Activation::none;
  const int first = blockIdx.x / cluster * (gated ? block_rows / 2 : block_rows);  // output

  // --- weights: in the gated form tile 0 is of the gate and tile 1 of the values
  const T* source[tiles][2];
  bool there[tiles][2];
#pragma unroll
  for (int j = 0; j < tiles; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int output = first + (gated ? group : group * tiles + j) * 16 + h * 8 + g;
      there[j][h] = output < p.n;
      const int64_t row = there[j][h] ? output + static_cast<int64_t>(gated ? j : 0) * p.n : 0;
      source[j][h] = static_cast<const T*>(p.weight) + row * p.k;
    }
  const uint64_t policy = leave_first();
  const uint32_t weight_ring = base + warp * tiles * 1024 + lane * 16;
  // Steps 2 i and 2 i + 1 are the halves of the slice's chunk i.
  const int first_column = slice * chunk + t * 8;
  const auto column = [&](int i) { return first_column + i / 2 * (slices * chunk) + i % 2 * step; };
  const auto fetch_weights = [&](int stage, int slot) {
#pragma unroll
    for (int u = 0; u < stage_steps; ++u) {
      const int k = column(stage * stage_steps + u);
      const bool inside = k < p.k;
      const uint32_t from = inside ? k : 0, to = weight_ring + (slot * stage_steps + u) * weight_step;
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) copy16_once(to + j * 1024 + h * 512, source[j][h] + from, there[j][h] && inside, policy);
    }
  };
  if constexpr (norm) {
    for (int k = threadIdx.x * 4; k < p.k; k += norm_threads * 4)
      copy16(base + static_cast<uint32_t>(place.norm_weight) + k * 4, p.norm_weight + k, true);
    copies_commit();
  }
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    if (i < num_stages) fetch_weights(i, i);
    if (norm) copies_commit();
  }
  if (!norm) copies_commit();
  TRACE(1)
  dependents_start();
  dependency_wait();
  TRACE(2)

  // --- activations: a step's [M, 32] are laid out row after row, so a warp reads neighbouring 16 bytes, eight rows at a time. Where there
  // is room all steps are fetched at once, else as many as there are stages of weights.
  const uint32_t x_ring = base + static_cast<uint32_t>(place.x);
  const bool whole = p.x_steps == p.steps;
  constexpr int copies = (tokens + groups - 1) / groups;  // of a thread, for a step
  const int x_row = group * 8 + g;
  const T* x = static_cast<const T*>(p.x) + x_row * p.x_stride;
  const auto fetch_x = [&](int stage, int slot) {
#pragma unroll
    for (int u = 0; u < stage_steps; ++u) {
      const int k = column(stage * stage_steps + u);
      const bool inside = k < p.k;
      const uint32_t from = inside ? k : 0;
      const uint32_t to = x_ring + (((slot * stage_steps + u) * block_slices + local) * p.rows + x_row) * step_bytes + t * 16;
#pragma unroll
      for (int c = 0; c < copies; ++c)
        if (x_row + c * groups * 8 < p.rows) copy16(to + c * (groups * 8 * step_bytes), x + c * (groups * 8) * p.x_stride + from, inside);
    }
  };
  if constexpr (norm) {
    copies_wait<stages>();  // the norm's weight; each thread reads what it copied
    norm_rows<T>(p, reinterpret_cast<T*>(shared + place.x), reinterpret_cast<const float*>(shared + place.norm_weight),
                 reinterpret_cast<float*>(shared + place.squares));
  } else if (whole) {
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) fetch_x(i, i);
    copies_commit();
    copies_wait<0>();
  } else {
#pragma unroll 1
    for (int i = 0; i < stages - 1; ++i) {
      if (i < num_stages) fetch_x(i, i);
      copies_commit();
    }
  }
  TRACE(3)

  // --- product
  float sum[tiles][tokens][4] = {};
  int slot = 0;
#pragma unroll 1
  for (int i = 0; i < num_stages; ++i) {
    copies_wait<norm ? stages - 1 : stages - 2>();
    if constexpr (groups > 1) __syncthreads();  // the activations come from all warps of the slice; also, all have read the stage before
    if constexpr (!norm) {
      if (!whole && i + stages - 1 < num_stages) fetch_x(i + stages - 1, slot == 0 ? stages - 1 : slot - 1);
    }
#pragma unroll
    for (int u = 0; u < stage_steps; ++u) {
      uint4 a[tiles][2];
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) a[j][h] = load16(weight_ring + (slot * stage_steps + u) * weight_step + j * 1024 + h * 512);
#pragma unroll
      for (int token = 0; token < tokens; ++token) {
        uint4 b = make_uint4(0, 0, 0, 0);
        const int m = token * 8 + g;
        if constexpr (norm) {
          const int k = column(i * stage_steps + u);
          if (m < p.rows && k < p.k) b = load16(x_ring + (m * (p.k + step) + k) * 2);
        } else {
          const int at = (whole ? i : slot) * stage_steps + u;
          if (m < p.rows) b = load16(x_ring + ((at * block_slices + local) * p.rows + m) * step_bytes + t * 16);
        }
#pragma unroll
        for (int j = 0; j < tiles; ++j) {
          multiply(T(), sum[j][token], a[j][0].x, a[j][1].x, a[j][0].y, a[j][1].y, b.x, b.y);
          multiply(T(), sum[j][token], a[j][0].z, a[j][1].z, a[j][0].w, a[j][1].w, b.z, b.w);
        }
      }
    }
    if (i + stages < num_stages) fetch_weights(i + stages, slot);
    copies_commit();
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  TRACE(4)

  // --- sums of the slices: [slice][token][row of weight], padded so that a fragment's 32 numbers go to 32 banks
  constexpr int pitch = block_rows + 4;
  float* partial = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
    const int row = (gated ? j * groups + group : group * tiles + j) * 16 + g;
#pragma unroll
    for (int token = 0; token < tokens; ++token)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int m = token * 8 + t * 2 + c % 2;
        if (m < p.rows) partial[(local * p.rows + m) * pitch + row + c / 2 * 8] = sum[j][token][c];
      }
  }
  if constexpr (cluster > 1)
    cluster_sync();
  else
    __syncthreads();

  // --- outputs: each block of a cluster finishes its share, `width` neighbours a thread
  using Numbers = std::conditional_t<(cluster > 1), float4, float>;
  constexpr int width = sizeof(Numbers) / 4;
  const int share = (gated ? tiles * 8 : tiles * 16) / width;
  const auto total = [&](int m, int row) {
    Numbers s[slices];
#pragma unroll
    for (int i = 0; i < slices; ++i) {
      const int at = (i % block_slices * p.rows + m) * pitch + row;
      if constexpr (cluster > 1)
        s[i] = load_of_rank(base + at * 4, i / block_slices);
      else
        s[i] = partial[at];
    }
    return add(add(add(s[0], s[1]), add(s[2], s[3])), add(add(s[4], s[5]), add(s[6], s[7])));
  };
#pragma unroll (cluster > 1 ? 2 : 1)
  for (int e = threadIdx.x; e < share * p.rows; e += 32 * warps) {
    const int m = e / share, row = (rank * share + e % share) * width;
    const Numbers sums = total(m, row), ups = gated ? total(m, block_rows / 2 + row) : sums;
    const int64_t at = m * p.out_stride + first + row;
#pragma unroll
    for (int c = 0; c < width; ++c) {
      const int output = first + row + c;
      if (output >= p.n) break;
      float v = element(sums, c);
      if (p.bias) v += p.bias[output];
      if (gated) v = activate(v, p.kind) * (p.bias ? element(ups, c) + p.bias[p.n + output] : element(ups, c));
      if (p.float_out)
        static_cast<float*>(p.out)[at + c] = v;
      else
        static_cast<T*>(p.out)[at + c] = T(v);
    }
  }
  TRACE(5)
  if constexpr (cluster > 1) cluster_sync();  // a block's shared memory stays until all have read it
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

template <class T, int block_slices, int tiles, int tokens, int stages, bool norm>
void launch_plan(const char* op, SkinnyParams p, cudaStream_t stream) {
  constexpr Plan plan = {block_slices, tiles, tokens, stages};
  constexpr unsigned cluster = slices / block_slices;
  const auto kernel = skinny_kernel<T, block_slices, tiles, tokens, stages, norm>;
  const int weight_steps = std::min(p.steps, stages * steps_of(plan));
  // All activations at once where two blocks of such a size still fit a multiprocessor.
  p.x_steps = p.steps;
  if (layout(block_slices, tiles, weight_steps, p.x_steps, norm, p.rows, p.k).size > std::min(device().shared_per_block, device().shared_per_sm / 2 - 1024))
    p.x_steps = std::min(p.steps, stages * steps_of(plan));
  const int64_t size = layout(block_slices, tiles, weight_steps, p.x_steps, norm, p.rows, p.k).size;
  const int outputs = p.kind == Activation::none ? rows_of(plan) : rows_of(plan) / 2;
  // All products ask for the same division of the L1 cache: two kernels share a multiprocessor only if they agree on it.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), op);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(size)), op);
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>((p.n + outputs - 1) / outputs) * cluster;
  config.blockDim = 32 * warps;
  config.dynamicSmemBytes = static_cast<size_t>(size);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
#ifdef OCTAVO_TUNE
  if (const char* trace = getenv("SKINNY_TRACE")) {
    static int count = 0;
    if (getenv("SKINNY_TRACE_RESET")) count = 0, unsetenv("SKINNY_TRACE_RESET");
    p.trace = reinterpret_cast<unsigned long long*>(strtoull(trace, nullptr, 10)) + 16 * count++;
  }
  if (dependent_launch() && !getenv("SKINNY_NO_PDL")) {
#else
  if (dependent_launch()) {
#endif
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  config.attrs = attributes;
  check(cudaLaunchKernelEx(&config, kernel, p), op);
}

Plan plan_for(const SkinnyParams& p) {
  Plan plan = choose(device().capability >= 90, device().shared_per_block >= 128 * 1024, p.kind != Activation::none, p.rows, p.n, p.k);
#ifdef OCTAVO_TUNE
  if (const char* forced = getenv("SKINNY_PLAN")) {
    int a = 0, b = 0, c = 0;
    if (sscanf(forced, "%d,%d,%d", &a, &b, &c) == 3) {
      plan.slices = a, plan.tiles = p.kind != Activation::none ? 2 : b, plan.stages = c;
    }
  }
#endif
  return plan;
}

template <class T>
void run(const char* op, const SkinnyParams& p, cudaStream_t stream) {
  const Plan plan = plan_for(p);
  const bool norm = p.residual != nullptr;
#define TRY(s, i, m, d) \
  if (plan == Plan{s, i, m, d} && !norm) return launch_plan<T, s, i, m, d, false>(op, p, stream);
#define TRY_NORM(s, i, m, d) \
  if (plan == Plan{s, i, m, d} && norm) return launch_plan<T, s, i, m, d, true>(op, p, stream);
  TRY(8, 1, 1, 4) TRY(8, 1, 1, 6) TRY(8, 2, 1, 4) TRY_NORM(8, 1, 1, 4) TRY_NORM(8, 1, 1, 6) TRY_NORM(8, 2, 1, 4)
  TRY(8, 1, 2, 3) TRY(8, 2, 2, 4) TRY(8, 2, 4, 3) TRY(8, 2, 8, 2)
  TRY(2, 2, 4, 4) TRY(2, 2, 8, 4) TRY(1, 1, 4, 8) TRY(1, 1, 8, 8)
#ifdef OCTAVO_TUNE
  TRY(4, 2, 1, 4) TRY(4, 2, 2, 4) TRY(4, 2, 4, 4) TRY(4, 2, 8, 3) TRY(2, 2, 2, 4) TRY(1, 1, 2, 8) TRY(8, 2, 1, 6) TRY(8, 2, 1, 3) TRY(8,2,4,2) TRY(2,2,8,2) TRY(1,1,8,4) TRY(8,2,2,2)
#endif
  throw std::runtime_error(std::string(op) + ": no kernel for a plan");
}

Activation activation_of(const Contract& c, std::string_view kind) {
  if (kind == "silu") return Activation::silu;
  if (kind == "gelu") return Activation::gelu;
  if (kind == "gelu_tanh") return Activation::gelu_tanh;
  c.require(kind == "relu", "kind must be silu, gelu, gelu_tanh or relu, got '%s'", std::string(kind).c_str());
  return Activation::relu;
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
#ifdef OCTAVO_TUNE
  if (getenv("SKINNY_APART")) return false;
#endif
  const Plan plan = plan_for(p);
  const int steps = std::min(p.steps, plan.stages * steps_of(plan));
  return p.rows <= 2 && p.rows * ((p.k / 4 + norm_threads - 1) / norm_threads) <= norm_slots &&
         layout(plan.slices, plan.tiles, steps, steps, true, p.rows, p.k).size <= device().shared_per_block;
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
