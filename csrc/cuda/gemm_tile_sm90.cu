// Products of 17 to 128 rows with a plain weight [N, K] on Hopper: wgmma, bulk copies, warps with different tasks. The time is that of
// reading the weight once, so everything here serves to keep reads in flight. Owns tile_linear and tile_gated; it does not know what a
// layer is, and no other architecture.
//
// Weights are the 64-row side of the tensor-core product and tokens its other side. A tile is 64 or 128 rows of weight and all tokens.
// Per thread block:
//
//   warpgroups 0 ..     64 rows of the tile each
//   the last warp       brings chunks of 64 columns: of weights into one ring of buffers, of activations into another, one bulk copy each
//
// Weights never change, so their ring is filled before the kernel waits for its predecessor (programmatic dependent launch). Where tiles
// are few, K is split over the thread blocks of a cluster; each sends its sums to the block that adds up those tokens.
//
// Invariant: an output is the sum over 1, 2, 4 or 8 slices of K, in order, and each slice is summed in ascending order by one warpgroup.
// The slices depend on the weight's shape alone, so a row's result depends on its inputs and the weight, not on the number of rows.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "gemm.cuh"
#include "hopper.cuh"
#include "ops.h"
#include "tensor_map.h"

namespace octavo::cuda {
namespace {

constexpr int most_rows = 128;

#ifdef OCTAVO_TENSOR_MAPS

constexpr int group_rows = 64;     // of weight, that a warpgroup multiplies
constexpr int columns = 64;        // of a chunk: 128 bytes, the width of a swizzled panel
constexpr int most_stages = 16;
constexpr uint32_t panel_row = columns * 2;  // bytes

struct TileParams {
  void* out;             // act or float32 [M, N], rows out_stride apart
  const float* bias;     // [N] or [2 N], or null
  int64_t out_stride;
  int rows, n;           // M, N; n counts outputs, so it is half of the weight's rows in the gated form
  int tiles, chunks;     // of the weight's rows; of K
  int log_splits;        // of K
  Activation kind;
  int stages, x_stages;  // chunks of weights, and of activations, in shared memory; x_stages <= stages
  bool float_out;
};

#ifdef OCTAVO_HOPPER
__device__ __forceinline__ float2 load8(uint32_t from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
#endif

// Grid: tiles << log_splits thread blocks, in clusters of 1 << log_splits; without a split any number, block b has tiles b, b + grid, ...
// Where it is not compiled for Hopper the kernel is empty, and has no static shared memory: built_for_device() looks at that.
template <class T, int tokens, int groups, bool gated>
__global__ void __launch_bounds__(128 * groups + 32, tokens * groups > 128 ? 1 : 2)
    tile_kernel(const __grid_constant__ TileParams p, const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map) {
#ifdef OCTAVO_HOPPER
  using namespace hopper;
  using hopper::shared_address;
  constexpr int tile_rows = groups * group_rows, tile_outputs = gated ? tile_rows / 2 : tile_rows;
  constexpr uint32_t weight_bytes = tile_rows * panel_row, x_bytes = tokens * panel_row;  // of a chunk
  constexpr int producer = 4 * groups;                                                    // warp
  constexpr int units = tokens / 4;  // a unit: one token of each eight for a thread, its upper and its lower row

  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[most_stages], free[most_stages], summed;
  const uint32_t weights = (shared_address(dynamic) + 1023) / 1024 * 1024;
  const uint32_t xs = weights + p.stages * weight_bytes, partials = xs + p.x_stages * x_bytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int splits = 1 << p.log_splits, rank = blockIdx.x & (splits - 1);  // rank: in the cluster
  const int first_tile = blockIdx.x >> p.log_splits, tile_step = gridDim.x >> p.log_splits;
  const int first_chunk = p.chunks * rank >> p.log_splits, chunks = (p.chunks * (rank + 1) >> p.log_splits) - first_chunk;

  if (threadIdx.x == producer * 32) {
    prefetch_map(&weight_map);
    prefetch_map(&x_map);
    for (int i = 0; i < p.stages; ++i) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&free[i]), producer);
    }
    barrier_init(shared_address(&summed), 1);
    barrier_init_done();
    if (splits > 1) barrier_expect(shared_address(&summed), tile_rows * tokens * 4);
  }
  __syncthreads();
  if (splits > 1) cluster_arrive();

  if (warp == producer) {
    const int total = first_tile < p.tiles ? ((p.tiles - 1 - first_tile) / tile_step + 1) * chunks : 0;
    const uint64_t policy = leave_first();
    int tile = first_tile, chunk = 0;  // of the next weights
    const auto copy_weights = [&](int stage) {
      const uint32_t ready = shared_address(&full[stage]);
      barrier_expect(ready, weight_bytes + x_bytes);
      copy_box(weights + stage * weight_bytes, &weight_map, (first_chunk + chunk) * columns, gated ? 0 : tile * tile_rows, 0,
               gated ? tile * (tile_rows / 16) : 0, ready, policy);
      if (++chunk == chunks) chunk = 0, tile += tile_step;
    };
    int x_chunk = 0, x_stage = 0, x_at = 0;
    const auto copy_x = [&] {
      const uint32_t target = xs + x_at * x_bytes, ready = shared_address(&full[x_stage]);
      copy_box(target, &x_map, (first_chunk + x_chunk) * columns, 0, 0, 0, ready);
      if (++x_chunk == chunks) x_chunk = 0;
      if (++x_stage == p.stages) x_stage = 0;
      if (++x_at == p.x_stages) x_at = 0;
    };
    if (lane == 0) {
      for (int i = 0; i < min(p.stages, total); ++i) copy_weights(i);
      dependents_start();
    }
    __syncwarp();
    if (splits > 1) cluster_wait();  // the others are there, and their barriers are
    if (lane == 0) {
      dependency_wait();
      for (int i = 0; i < min(p.x_stages, total); ++i) copy_x();
      int stage = 0, parity = 0;
      for (int i = 0; i < total - p.x_stages; ++i) {  // when chunk i has been multiplied
        barrier_wait(shared_address(&free[stage]), parity);
        if (i + p.stages < total) copy_weights(stage);
        copy_x();
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();  // the warp leaves together
    return;
  }

  const int group = warp / 4, thread = threadIdx.x % 128;
  const int upper_row = group * group_rows + warp % 4 * 16 + lane / 4;  // of the tile; the lower row is 8 rows below
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(shared_address(&free[stage]));
  };
  dependency_wait();
  if (splits > 1) cluster_wait();

  int stage = 0, parity = 0, x_at = 0;
  for (int tile = first_tile; tile < p.tiles; tile += tile_step) {
    // In the gated form the tile's rows alternate by eights between gate and value, so that a thread has both of an output.
    const int upper = gated ? tile * tile_outputs + upper_row / 16 * 8 + lane / 4 : tile * tile_outputs + upper_row;
    const int lower = gated ? upper : upper + 8;
    float upper_bias = 0.0f, lower_bias = 0.0f;
    if (p.bias) {
      if (upper < p.n) upper_bias = p.bias[upper];
      if (lower < p.n) lower_bias = p.bias[gated ? p.n + lower : lower];
    }
    const auto store = [&](int64_t at, float v) {
      if (p.float_out)
        static_cast<float*>(p.out)[at] = v;
      else
        static_cast<T*>(p.out)[at] = T(v);
    };
    const auto finish = [&](int token, float a, float b) {
      if (token >= p.rows) return;
      const int64_t row = token * p.out_stride;
      a += upper_bias;
      b += lower_bias;
      if constexpr (gated) {
        if (upper < p.n) store(row + upper, activate(a, p.kind) * b);
      } else {
        if (upper < p.n) store(row + upper, a);
        if (lower < p.n) store(row + lower, b);
      }
    };

    float d[tokens / 2];
#pragma unroll
    for (float& x : d) x = 0.0f;
    int before = -1;
    for (int i = 0; i < chunks; ++i) {
      barrier_wait(shared_address(&full[stage]), parity);
      const uint64_t a = operand(weights + stage * weight_bytes + group * (group_rows * panel_row), 0), b = operand(xs + x_at * x_bytes, 0);
      settle(d);
      products_begin();
#pragma unroll
      for (int j = 0; j < columns / 16; ++j)
        hopper::multiply<std::is_same<T, __nv_bfloat16>::value, tokens>(d, a + 2 * j, b + 2 * j, 1);  // 16 elements are 32 bytes
      products_issued();
      products_wait<1>();
      if (before >= 0) release(before);
      before = stage;
      if (++stage == p.stages) stage = 0, parity ^= 1;
      if (++x_at == p.x_stages) x_at = 0;
    }
    products_wait<0>();
    settle(d);
    if (before >= 0) release(before);

    const int first_token = lane % 4 * 2;
    if (splits == 1) {
#pragma unroll
      for (int j = 0; j < tokens / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) finish(j * 8 + first_token + e, d[4 * j + e], d[4 * j + 2 + e]);
      continue;
    }
    // Thread block r adds up units r * units / splits and on. Everyone's thread t keeps its rows: it finds its own numbers from all slices.
    const int log_each = (units == 8 ? 3 : units == 16 ? 4 : 5) - p.log_splits, pairs = (1 << log_each) / 2;
    const uint32_t own = partials + thread * (pairs ? 16 : 8), part = 128 * (pairs ? 16 : 8), barrier = shared_address(&summed);
    const uint32_t slice = (pairs ? pairs : 1) * part;  // what a warpgroup of a thread block sends to another block
#pragma unroll
    for (int j = 0; j < tokens / 8; ++j) {
      if (pairs) {
        const int owner = 2 * j >> log_each;
        const uint32_t target = own + (rank * groups + group) * slice + (j - owner * pairs) * part;
        send(at_rank(target, owner), d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3], at_rank(barrier, owner));
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          send(at_rank(own + (rank * groups + group) * slice, 2 * j + e), d[4 * j + e], d[4 * j + 2 + e], at_rank(barrier, 2 * j + e));
      }
    }
    barrier_wait_cluster(barrier, 0);
    if (pairs) {
      for (int l = 0; l < pairs; ++l) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int s = 0; s < splits; ++s) {
          const uint4 v = load16(own + (s * groups + group) * slice + l * part);
          sum.x += __uint_as_float(v.x), sum.y += __uint_as_float(v.y), sum.z += __uint_as_float(v.z), sum.w += __uint_as_float(v.w);
        }
        const int token = (rank * pairs + l) * 8 + first_token;
        finish(token, sum.x, sum.z);
        finish(token + 1, sum.y, sum.w);
      }
    } else {
      float2 sum = make_float2(0.0f, 0.0f);
      for (int s = 0; s < splits; ++s) {
        const float2 v = load8(own + (s * groups + group) * slice);
        sum.x += v.x, sum.y += v.y;
      }
      finish(rank / 2 * 8 + first_token + rank % 2, sum.x, sum.y);
    }
  }
#endif
}

// --- host ----------------------------------------------------------------------------------------------------------------------------

// The image that the runtime chose for this device has the kernel's body (a build for 9.0 without "a" has not).
bool built_for_device() {
  static const bool built = [] {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, tile_kernel<__nv_bfloat16, 32, 1, false>), "octavo");
    return attributes.sharedSizeBytes > 0;
  }();
  return built;
}

struct Call {
  TileParams p;
  const void* x;       // act [M, K], rows x_stride apart
  const void* weight;  // act [N, K], or [2 N, K] for the gated form
  int64_t x_stride;
  int k;
};

struct Plan {
  int groups, stages, x_stages;
  int blocks;  // for each multiprocessor, where K is not split
};

// Slices of K: as many as give every multiprocessor work.
constexpr int log_splits_of(int64_t weight_rows, int chunks) {
  const int64_t tiles = (weight_rows + group_rows - 1) / group_rows;
  int log = tiles <= 16 ? 3 : tiles <= 32 ? 2 : tiles <= 66 ? 1 : 0;
  while (log > 0 && chunks >> log < 2) --log;
  return log;
}

template <class T, int tokens, int groups, bool gated>
void launch_plan(const char* op, const Call& call, Plan plan) {
  constexpr int tile_rows = groups * group_rows;
  // A chunk is given back only when the next one is there: with room for one the kernel would wait for ever.
  if (std::min(plan.stages, plan.x_stages) < 2)
    throw std::runtime_error(std::string(op) + ": shared memory must have room for 2 chunks of the weight and of the activations, found " +
                             std::to_string(plan.stages) + " and " + std::to_string(plan.x_stages));
  TileParams p = call.p;
  const int splits = 1 << p.log_splits;
  const int64_t weight_rows = gated ? int64_t{2} * p.n : p.n;
  p.tiles = static_cast<int>((weight_rows + tile_rows - 1) / tile_rows);
  const int blocks = p.log_splits ? p.tiles << p.log_splits : std::min(p.tiles, plan.blocks * device().num_sms);
  const int most_chunks = (p.chunks + splits - 1) / splits * ((p.tiles * splits + blocks - 1) / blocks);
  p.stages = std::min(plan.stages, most_chunks);
  p.x_stages = std::min(plan.x_stages, p.stages);
  const size_t shared = 1024 + static_cast<size_t>(p.stages) * tile_rows * panel_row + static_cast<size_t>(p.x_stages) * tokens * panel_row +
                        (splits > 1 ? tile_rows * tokens * 4 : 0);
  const cuuint64_t k = static_cast<cuuint64_t>(call.k), row = k * 2, x_row = p.rows > 1 ? static_cast<cuuint64_t>(call.x_stride) * 2 : row;
  const cuuint64_t x_size[] = {k, static_cast<cuuint64_t>(p.rows), 1, 1}, x_stride[] = {x_row, x_row, x_row};
  const cuuint32_t x_box[] = {columns, tokens, 1, 1};
  const cuuint64_t outputs = static_cast<cuuint64_t>(p.n);
  const cuuint64_t plain_size[] = {k, outputs, 1, 1}, plain_stride[] = {row, row, row};
  const cuuint32_t plain_box[] = {columns, tile_rows, 1, 1};
  // Eight rows of the gate, the eight of the values that belong to them, and so on.
  const cuuint64_t gated_size[] = {k, 8, 2, outputs / 8}, gated_stride[] = {row, row * outputs, row * 8};
  const cuuint32_t gated_box[] = {columns, 8, 2, tile_rows / 16};
  constexpr bool is_bf16 = std::is_same<T, __nv_bfloat16>::value;
  const CUtensorMap weight_map = gated ? tensor_map(op, is_bf16, call.weight, gated_size, gated_stride, gated_box)
                                       : tensor_map(op, is_bf16, call.weight, plain_size, plain_stride, plain_box);
  const auto kernel = tile_kernel<T, tokens, groups, gated>;
  // As in gemm_skinny.cu: kernels share a multiprocessor only if they agree on the division of its L1 cache.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), op);
  launch_clusters(op, kernel, static_cast<unsigned>(splits), dim3(static_cast<unsigned>(blocks)), dim3(128 * groups + 32), shared, current_stream(),
                  p, weight_map, tensor_map(op, is_bf16, call.x, x_size, x_stride, x_box));
}

Plan plan_for(Call& call, int tokens, bool gated) {
  const int64_t weight_rows = gated ? int64_t{2} * call.p.n : call.p.n;
  Plan plan = {};
  call.p.log_splits = log_splits_of(weight_rows, call.p.chunks);
  plan.groups = call.p.log_splits == 0 && (tokens > 32 || weight_rows >= 192 * group_rows) ? 2 : 1;
  plan.blocks = 1;
  plan.x_stages = tokens == 32 ? 6 : tokens == 64 ? 4 : 3;
  const int tile_rows = plan.groups * group_rows;
  int room = device().shared_per_sm / 2 - 1024 - 1024 - 512;  // two thread blocks a multiprocessor: this kernel's and the next one's
  if (call.p.log_splits) room -= tile_rows * tokens * 4;
  plan.stages = std::min<int>(most_stages, (room - plan.x_stages * tokens * static_cast<int>(panel_row)) / (tile_rows * static_cast<int>(panel_row)));
  return plan;
}

template <class T, int tokens, bool gated>
void run_tokens(const char* op, Call& call) {
  const Plan plan = plan_for(call, tokens, gated);
  if (plan.groups == 1)
    launch_plan<T, tokens, 1, gated>(op, call, plan);
  else
    launch_plan<T, tokens, 2, gated>(op, call, plan);
}

template <class T, bool gated>
void run(const char* op, Call& call) {
  if (call.p.rows <= 32) return run_tokens<T, 32, gated>(op, call);
  if (call.p.rows <= 64) return run_tokens<T, 64, gated>(op, call);
  run_tokens<T, 128, gated>(op, call);
}

void run_type(const char* op, Call& call, bool is_bf16, bool gated) {
  if (is_bf16)
    gated ? run<__nv_bfloat16, true>(op, call) : run<__nv_bfloat16, false>(op, call);
  else
    gated ? run<__half, true>(op, call) : run<__half, false>(op, call);
}

bool available() { return device().capability == 90 && built_for_device() && tensor_map_encoder(); }

#else  // a toolkit without tensor maps

bool available() { return false; }

#endif

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

void multiply_tiles(const Contract& c, const char* op, const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias,
                    Activation kind) {
  c.require(available(), "needs a device of compute capability 9.0, and a build with CUDA 12 or newer for 9.0a");
  c.require(weight.dtype == x.dtype && (out.dtype == x.dtype || out.dtype == f32),
            "activations and weight have one type, and out has it too or is float32");
  c.require(c['M'] <= most_rows, "at most %d rows, got %lld", most_rows, static_cast<long long>(c['M']));
  c.require(c['K'] > 0 && c['K'] % 8 == 0, "the size of a row must be a multiple of 8, got %lld", static_cast<long long>(c['K']));
  c.require(c['K'] < (1 << 30) && c['N'] < (1 << 30), "a weight of %lld x %lld is too large", static_cast<long long>(c['N']),
            static_cast<long long>(c['K']));
  c.require(aligned(x) && aligned(weight) && (c['M'] <= 1 || x.stride[0] % 8 == 0),
            "the rows of activations and weight must start at multiples of 16 bytes");
  c.require(c['M'] <= 1 || x.stride[0] >= c['K'], "the rows of activations must not overlap, they have %lld elements and start %lld apart",
            static_cast<long long>(c['K']), static_cast<long long>(x.stride[0]));
#ifdef OCTAVO_TENSOR_MAPS
  Call call = {};
  call.p.out = out.data;
  call.p.bias = bias ? bias->ptr<const float>() : nullptr;
  call.p.out_stride = out.stride[0];
  call.p.rows = static_cast<int>(c['M']);
  call.p.n = static_cast<int>(out.size[1]);
  call.p.kind = kind;
  call.p.float_out = out.dtype == f32;
  call.p.chunks = static_cast<int>((c['K'] + columns - 1) / columns);
  call.x = x.data;
  call.weight = weight.data;
  call.x_stride = x.stride[0];
  call.k = static_cast<int>(c['K']);
  if (call.p.rows > 0 && call.p.n > 0) run_type(op, call, x.dtype == bf16, kind != Activation::none);
#else
  (void)op, (void)bias, (void)kind;
#endif
}

constexpr uint32_t half_types = f16 | bf16;

}  // namespace

void tile_linear(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias) {
  Contract c("tile_linear");
  c.tensor("out", out, "MN", half_types | f32, rows);
  c.tensor("x", x, "MK", half_types, rows);
  c.tensor("weight", weight, "NK", half_types);
  if (bias) c.tensor("bias", *bias, "N", f32);
  multiply_tiles(c, "tile_linear", out, x, weight, bias, Activation::none);
}

void tile_gated(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias, std::string_view kind) {
  Contract c("tile_gated");
  c.tensor("out", out, "MI", half_types | f32, rows);
  c.tensor("x", x, "MK", half_types, rows);
  c.tensor("weight", weight, "NK", half_types);
  if (bias) c.tensor("bias", *bias, "N", f32);
  c.require(c['N'] == 2 * c['I'] && c['I'] % 8 == 0, "weight has %lld rows, twice the %lld columns of out are wanted, and these a multiple of 8",
            static_cast<long long>(c['N']), static_cast<long long>(c['I']));
  multiply_tiles(c, "tile_gated", out, x, weight, bias, activation_of(c, kind));
}

}  // namespace octavo::cuda
