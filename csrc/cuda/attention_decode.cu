// The plan of a decode step: who computes what, made on the device from the lengths, and the choice of the kernel's type. It does not know
// what attention computes.
//
// The items (row tiles of sequences, one after the other) are one line of partitions, each with a cost; the line is cut into ranges of
// about equal cost at borders of partitions. Thread blocks claim (range, KV head) pairs one by one, since SMs differ in how fast memory
// serves them. Only an item with a cut inside needs partial results, so short items are not cut.
// Invariant: the plan decides who computes a partition and never how.
#include "attention_decode.cuh"

#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace {

constexpr int plan_threads = 1024, plan_warps = plan_threads / 32;
constexpr int partition_cost = 16;  // of merging a partition, in tokens
constexpr int full_cost = partition + partition_cost;
constexpr int ranges_each = 8;  // about so many are claimed by a thread block where there is enough work

struct Cut {
  int place, tile, partition;  // the range that begins here begins with this partition
};

struct Lengths {  // of a sequence in the plan
  int low, start, end, tiles;
  int64_t cost;  // of one row tile

  __device__ Lengths(const Sequence& s, int group, int tile_rows, int window) {
    low = first_visible(s.context, s.queries, window) / granule * granule;
    start = low / partition;
    end = (s.context + partition - 1) / partition;
    tiles = (group * s.queries + tile_rows - 1) / tile_rows;
    cost = s.context - low + static_cast<int64_t>(end - start) * partition_cost;
  }
};

// Sum of the values of the threads before this one; total of all. sums: shared [plan_warps].
template <class T>
__device__ T scan(T value, T* sums, T& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T running = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T before = __shfl_up_sync(~0u, running, d);
    if (lane >= d) running += before;
  }
  if (lane == 31) sums[warp] = running;
  __syncthreads();
  T of_warp = sums[lane];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T before = __shfl_up_sync(~0u, of_warp, d);
    if (lane >= d) of_warp += before;
  }
  total = __shfl_sync(~0u, of_warp, 31);
  const T earlier = __shfl_sync(~0u, of_warp, warp ? warp - 1 : 0);
  return running - value + (warp ? earlier : 0);
}
static_assert(plan_warps == 32, "a warp scans the sums of all warps");

__global__ void __launch_bounds__(plan_threads)
    plan_kernel(int* work, const int* query_start, const int* context_len, int num_seqs, int group, int tile_rows, int window, int kv_heads,
                int blocks, int64_t slots) {
  extern __shared__ __align__(16) unsigned char shared[];
  Sequence* const active = reinterpret_cast<Sequence*>(shared);                          // [num_seqs]
  int64_t* const cost_before = reinterpret_cast<int64_t*>(active + num_seqs);            // [num_seqs]
  Cut* const cuts = reinterpret_cast<Cut*>(cost_before + num_seqs);                      // [max_ranges + 1]
  int* const first_slot = reinterpret_cast<int*>(cuts + max_ranges + 1);                 // [max_ranges]; below 0: the item is not split
  __shared__ unsigned long long long_sums[plan_warps];
  __shared__ int sums[plan_warps];
  const int thread = threadIdx.x;
  dependents_start();
  dependency_wait();

  // Two sequences a thread: the cost of those before, and how many of them are active, in one scan.
  Sequence mine[2];
  unsigned long long value[2] = {0, 0};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int s = 2 * thread + e;
    if (s >= num_seqs) continue;
    const int query = query_start[s];
    mine[e] = {s, query, query_start[s + 1] - query, context_len[s]};
    if (mine[e].queries < 1 || mine[e].queries > decode_queries || mine[e].context < 1) continue;
    const Lengths n(mine[e], group, tile_rows, window);
    value[e] = static_cast<unsigned long long>(n.tiles * n.cost) << 12 | 1;
  }
  for (int i = thread; i < max_counters / 4; i += plan_threads) reinterpret_cast<int4*>(work + counters_at)[i] = make_int4(0, 0, 0, 0);
  unsigned long long total;
  unsigned long long before = scan(value[0] + value[1], long_sums, total);
  Sequence* const active_out = reinterpret_cast<Sequence*>(work + active_at);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (value[e]) {
      const int place = static_cast<int>(before & 0xfff);
      active[place] = mine[e];
      active_out[place] = mine[e];
      cost_before[place] = static_cast<int64_t>(before >> 12);
    }
    before += value[e];
  }
  __syncthreads();
  const int count = static_cast<int>(total & 0xfff);
  const int64_t cost = static_cast<int64_t>(total >> 12);
  // How many partitions a range has. A whole item, if every thread block gets about two or more, else a quarter of its share: the fewer
  // cuts within items, the fewer partial results. With little work, one range for every thread block.
  const float partitions = static_cast<float>(cost) / full_cost;
  const int at_once = max(1, blocks / kv_heads), most = max(1, min(max_ranges, max_counters / kv_heads));
  const float share = partitions / at_once, average = partitions / max(1, count);
  const bool whole_items = share >= 2.5f && average * 1.9f < share;
  const float size = share < 2.5f ? fmaxf(1.0f, share) : whole_items ? fmaxf(average, share / ranges_each) : share / 4;
  const int used = static_cast<int>(fminf(ceilf(partitions / size - 0.01f), static_cast<float>(most)));
  const int64_t uncut_cost = whole_items ? 2 * cost / used : 0;  // most of an item that is not cut
  if (thread == 0) {
    work[used_at] = used;
    work[claims_at] = 0;
  }

  // Cut j: the first partition whose cost before it is at least j / used of all.
  const auto lengths = [&](int place) { return Lengths(active[place], group, tile_rows, window); };
  for (int j = thread; j <= used; j += plan_threads) {
    Cut cut = {count, 0, 0};
    if (j < used) {
      const int64_t wanted = (j * cost + used - 1) / used;
      int low = 0, high = count;  // the last place with cost_before <= wanted
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (cost_before[middle] <= wanted) low = middle;
        else high = middle;
      }
      const Lengths n = lengths(low);
      const int64_t rest = wanted - cost_before[low];
      cut = {low, static_cast<int>(rest / n.cost), n.start};
      const int64_t within = rest - cut.tile * n.cost;
      if (within > 0) {
        const int64_t next = (within + n.low + static_cast<int64_t>(partition_cost) * n.start + full_cost - 1) / full_cost;
        cut.partition = next > n.start ? static_cast<int>(next) : n.start + 1;
        if (cut.partition >= n.end || n.cost <= uncut_cost) {  // past the item, or it is too short to be cut
          if (++cut.tile == n.tiles) ++cut.place, cut.tile = 0;
          cut.partition = cut.place < count ? lengths(cut.place).start : 0;
        }
      }
    }
    cuts[j] = cut;
  }
  __syncthreads();

  // Range j owns an item that begins in it and goes on: its partial results are one for the part in j and one for each later partition.
  const auto inside = [&](const Cut& cut) { return cut.place < count && cut.partition > lengths(cut.place).start; };
  int wanted_slots = 0;
  if (thread < used) {
    const Cut cut = cuts[thread], next = cuts[thread + 1];
    if (inside(next) && !(inside(cut) && cut.place == next.place && cut.tile == next.tile))
      wanted_slots = 1 + lengths(next.place).end - next.partition;
  }
  int all_slots;
  const int slot = scan(wanted_slots, sums, all_slots);
  if (thread < used) first_slot[thread] = wanted_slots && static_cast<int64_t>(slot) + wanted_slots <= slots ? slot : -1;
  __syncthreads();
  // The range that the item of a cut begins in.
  const auto owner = [&](const Cut& cut) {
    return static_cast<int>((cost_before[cut.place] + cut.tile * lengths(cut.place).cost) * used / cost);
  };
  if (thread > 0 && thread < used && inside(cuts[thread]) && first_slot[owner(cuts[thread])] < 0) {  // no room: the item stays whole
    Cut cut = cuts[thread];
    if (++cut.tile == lengths(cut.place).tiles) ++cut.place, cut.tile = 0;
    cut.partition = cut.place < count ? lengths(cut.place).start : 0;
    cuts[thread] = cut;
  }
  __syncthreads();

  for (int j = thread; j < used; j += plan_threads) {
    int4* const out = reinterpret_cast<int4*>(work + ranges_at + j * range_ints);
    const Cut cut = cuts[j], next = cuts[j + 1];
    if (cut.place == next.place && cut.tile == next.tile && cut.partition == next.partition) {
      out[0] = make_int4(-1, 0, 0, 0);
      continue;
    }
    Range r = {};
    r.first = cut.place, r.first_tile = cut.tile, r.first_partition = cut.partition;
    if (inside(next)) {
      r.last = next.place, r.last_tile = next.tile, r.last_end = next.partition;
      r.last_slot = max(first_slot[j], 0);
    } else {
      r.last = next.tile > 0 ? next.place : next.place - 1;
      r.last_tile = next.tile > 0 ? next.tile - 1 : lengths(r.last).tiles - 1;
      r.last_end = lengths(r.last).end;
    }
    if (inside(cut)) {
      r.first_owner = owner(cut);
      r.first_slot = first_slot[r.first_owner];
      r.first_cut = cuts[r.first_owner + 1].partition;
    }
    const Sequence s = active[r.first];
    out[0] = make_int4(r.first, r.first_tile, r.first_partition, r.last);
    out[1] = make_int4(r.last_tile, r.last_end, r.first_slot, r.first_cut);
    out[2] = make_int4(r.first_owner, r.last_slot, 0, 0);
    out[3] = make_int4(s.index, s.query_start, s.queries, s.context);
  }
}

}  // namespace

void launch_decode_bf16(const AttentionParams& p, const DecodeLaunch& d, cudaStream_t stream);
void launch_decode_f16(const AttentionParams& p, const DecodeLaunch& d, cudaStream_t stream);
void launch_decode_fp8(const AttentionParams& p, const DecodeLaunch& d, cudaStream_t stream);

int64_t decode_work_ints(int num_seqs) { return active_at + int64_t{4} * num_seqs; }

void plan_decode(const PlanParams& p, cudaStream_t stream) {
  if (p.num_seqs > max_decode_seqs)
    throw std::runtime_error("attention_plan: takes up to " + std::to_string(max_decode_seqs) + " sequences, not " + std::to_string(p.num_seqs));
  if (p.work_size < decode_work_ints(p.num_seqs))
    throw std::runtime_error("attention_plan: work needs " + std::to_string(decode_work_ints(p.num_seqs)) + " ints, not " +
                             std::to_string(p.work_size));
  const int group = p.heads / p.kv_heads, queries = p.max_query < decode_queries ? p.max_query : decode_queries;
  const int tile_rows = 8 * decode_row_groups(group * queries, decode_dim(p.head_dim));
  const size_t shared = size_t(p.num_seqs) * (sizeof(Sequence) + 8) + (max_ranges + 1) * sizeof(Cut) + max_ranges * 4;
  launch("attention_plan", plan_kernel, dim3(1), dim3(plan_threads), shared, stream, p.work, p.query_start, p.context_len, p.num_seqs, group,
         tile_rows, p.window, p.kv_heads, device().num_sms, p.max_partials / p.kv_heads);
}

void launch_decode(const AttentionParams& p, cudaStream_t stream) {
  if (p.work && p.work_size < decode_work_ints(p.num_seqs))
    throw std::runtime_error("paged_attention: work needs " + std::to_string(decode_work_ints(p.num_seqs)) + " ints, not " +
                             std::to_string(p.work_size));
  DecodeLaunch d = {};
  d.block_shift = -1;
  for (int shift = 3; shift < 31; ++shift)
    if (p.block_size == 1 << shift) d.block_shift = shift;
  const bool fp8 = p.kv == e4m3;
  const float scale = fp8 ? p.scale * p.k_scale : p.scale;
  d.scale_log2 = scale * 1.44269504088896340736f;
  d.cap = p.softcap > 0 ? scale / p.softcap : 0;
  d.cap_log2 = p.softcap * 1.44269504088896340736f;
  d.out_scale = fp8 ? p.v_scale : 1.0f;
  if (fp8) launch_decode_fp8(p, d, stream);
  else if (p.act == bf16) launch_decode_bf16(p, d, stream);
  else launch_decode_f16(p, d, stream);
}

}  // namespace octavo::cuda
