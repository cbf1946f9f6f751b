// Prefill attention's plan and choice of kernel: which tiles of new tokens a step has, and which instance of attention_prefill.cuh takes
// them. It knows lengths and types, no keys. Invariant: the grid of either kernel is the same for all lengths, so that a graph of a step
// can be replayed with others; tiles beyond the list return at once.
#include "attention_prefill.cuh"

#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace {

constexpr int plan_threads = 1024;
constexpr int cost_classes = 256;

// Classes of cost, eight to an octave, the dearest first: the exponent and three bits of the fraction of a float.
__device__ __forceinline__ int cost_class(int keys) {
  const int order = (__float_as_int(static_cast<float>(keys)) >> 20) - (127 << 3);
  return cost_classes - 1 - min(order, cost_classes - 1);
}

// A counting sort of all tiles by class. Tiles of one class come in any order: nothing depends on it.
__global__ void __launch_bounds__(plan_threads) plan_kernel(int* list,  // prefill_work()
                                                            int64_t capacity,        // tiles that the list has room for
                                                            const int* query_start,  // [N + 1]
                                                            const int* context_len,  // [N]
                                                            int num_seqs, int group, int window) {
  __shared__ int place[cost_classes];  // tiles of a class; then where its next tile goes
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  dependency_wait();
  dependents_start();

  // Calls visit(class, sequence, first row, query_start, context) for every tile: a warp takes 32 sequences at a time, and its lanes share
  // the tiles of each.
  const auto for_each_tile = [&](auto visit) {
    for (int base = warp * 32; base < num_seqs; base += plan_threads) {
      const int own = base + lane;
      int own_start = 0, own_tokens = 0, own_context = 0;
      if (own < num_seqs) {
        own_start = query_start[own];
        own_tokens = query_start[own + 1] - own_start;
        own_context = context_len[own];
      }
      unsigned waiting = __ballot_sync(0xffffffffu, own_tokens > decode_queries && own_context > 0);
      for (; waiting; waiting &= waiting - 1) {
        const int from = __ffs(waiting) - 1;
        const int start = __shfl_sync(0xffffffffu, own_start, from);
        const int tokens = __shfl_sync(0xffffffffu, own_tokens, from);
        const int context = __shfl_sync(0xffffffffu, own_context, from);
        const int rows = tokens * group;
        for (int first = lane * prefill_tile_rows; first < rows; first += 32 * prefill_tile_rows) {
          const int last_row = min(first + prefill_tile_rows, rows) - 1;
          const int end = context - tokens + last_row / group + 1;  // keys before it are seen
          const int begin = window > 0 ? max(0, context - tokens + first / group - window + 1) : 0;
          visit(cost_class(max(end - begin, 1)), base + from, first, start, context);
        }
      }
    }
  };

  for (int i = threadIdx.x; i < cost_classes; i += plan_threads) place[i] = 0;
  __syncthreads();
  for_each_tile([&](int order, int, int, int, int) { atomicAdd(&place[order], 1); });
  __syncthreads();
  if (warp == 0) {
    constexpr int each = cost_classes / 32;
    int count[each], total = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      count[i] = place[lane * each + i];
      total += count[i];
    }
    int before = total;  // inclusive sum over lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += left;
    }
    if (lane == 31) list[0] = static_cast<int>(min(static_cast<int64_t>(before), capacity));
    before -= total;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      place[lane * each + i] = before;
      before += count[i];
    }
  }
  __syncthreads();
  for_each_tile([&](int order, int sequence, int first, int start, int context) {
    const int64_t at = atomicAdd(&place[order], 1);
    if (at >= capacity) return;
    int* const tile = list + prefill_header_ints + at * prefill_tile_ints;
    tile[0] = sequence;
    tile[1] = first;
    tile[2] = start;
    tile[3] = context;
  });
}

}  // namespace

// Enough for up to 256 query heads to a KV head.
int64_t prefill_work_ints(int num_seqs, int num_tokens) {
  return prefill_header_ints + prefill_tile_ints * (int64_t{2} * num_tokens + num_seqs);
}

void plan_prefill(const PlanParams& p, cudaStream_t stream) {
  if (p.max_query <= decode_queries) return;
  const int64_t capacity = (p.work_size - decode_work_ints(p.num_seqs) - prefill_header_ints) / prefill_tile_ints;
  if (capacity < 0) throw std::runtime_error("attention_plan: work has no room for the prefill list: " + std::to_string(p.work_size) + " ints");
  launch("attention_plan", plan_kernel, dim3(1), dim3(plan_threads), 0, stream, prefill_work(p.work, p.num_seqs), capacity, p.query_start,
         p.context_len, p.num_seqs, p.heads / p.kv_heads, p.window);
}

void launch_prefill(const AttentionParams& p, cudaStream_t stream) {
  if (p.max_query <= decode_queries || p.num_tokens <= decode_queries) return;
  const auto refuse = [](const char* what, int64_t value) {
    throw std::runtime_error(std::string("paged_attention: prefill on tensor cores ") + what + std::to_string(value));
  };
  const int64_t group = p.heads / p.kv_heads;
  if (device().capability < 80) refuse("needs compute capability 8.0, not 10 * ", device().capability);
  if (p.act == f32) refuse("takes float16 and bfloat16, not dtype ", p.act);
  if (p.head_dim % 16 || p.head_dim > 256) refuse("needs head_dim to be a multiple of 16 up to 256, not ", p.head_dim);
  if (p.q_stride % 8) refuse("needs rows of q that begin at 16 bytes, not a stride of ", p.q_stride);
  for (const void* pointer : {static_cast<const void*>(p.out), p.q, p.k_cache, p.v_cache})
    if (const int64_t rest = reinterpret_cast<uintptr_t>(pointer) % 16) refuse("needs tensors that begin at 16 bytes, not behind them by ", rest);
  if (p.block_size % prefill_block) refuse("needs blocks of a multiple of 8 tokens, not ", p.block_size);
  if (group > 256) refuse("takes up to 256 query heads a KV head, not ", group);
  const int64_t capacity = (p.work_size - decode_work_ints(p.num_seqs) - prefill_header_ints) / prefill_tile_ints;
  if (capacity < max_prefill_tiles(p.num_seqs, p.num_tokens, group)) refuse("needs a longer work list than this, in ints: ", p.work_size);
  if (p.kv == e4m3)
    p.act == bf16 ? launch_prefill_bf16_fp8(p, stream) : launch_prefill_f16_fp8(p, stream);
  else
    p.act == bf16 ? launch_prefill_bf16(p, stream) : launch_prefill_f16(p, stream);
}

}  // namespace octavo::cuda
