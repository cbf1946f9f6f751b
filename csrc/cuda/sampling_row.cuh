// One row of logits: each warp of a team has a run of consecutive tokens, copied to shared memory or, where that does not fit, read
// again from the device's. Owns the passes over them: the best token, sums of weights, the histogram of log2(weight), the list in
// which the first block ranks a few tokens, and the search for a border, the worst token that a cut keeps. It does not know what a
// token is drawn for. Invariant: that of sampling_team.cuh; every result is a function of the row alone.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "sampling_team.cuh"

namespace octavo::cuda {
namespace {

// --- The row -------------------------------------------------------------------------------------------------------------------------

// The tokens [first, first + count) of a row, one warp's share. Resident: copied to shared memory, filled up with -inf.
template <bool resident>
struct Slice {
  const float* data;  // [steps * row_step]
  int first, count, steps, lane;
  bool aligned;

  // `room`: [row_warps * segment]
  __device__ Slice(const Team& team, const float* row, int vocab, int segment, float* room) : lane(team.lane) {
    first = (team.rank * row_warps + team.warp) * segment;
    count = max(0, min(segment, vocab - first));
    steps = (count + row_step - 1) / row_step;
    data = row + first;
    aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    if (resident) fetch(team, room + team.warp * segment);
  }

  __device__ void fetch(const Team& team, float* to) {
    const float* from = data;
    data = to;
    int copied = 0;
#if OCTAVO_ROW_ASYNC
    if (aligned) copied = count & ~3;
    const uint32_t barrier = shared_address(&team.shared.arrived[team.warp]);
    if (copied > 0 && lane == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(4 * copied) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                   "l"(__cvta_generic_to_global(from)), "r"(4 * copied), "r"(barrier)
                   : "memory");
    }
#endif
#pragma unroll 8
    for (int i = copied + lane; i < steps * row_step; i += 32) to[i] = i < count ? from[i] : -infinity();
    __syncwarp();
#if OCTAVO_ROW_ASYNC
    if (copied > 0) wait_for(barrier, 0);
#endif
  }

  // Tokens first + step * row_step + 4 * lane and the three after it; -inf beyond the end.
  __device__ void four(int step, float (&x)[4]) const {
    const int i = step * row_step + 4 * lane;
    if (resident || (aligned && i + 3 < count)) {
      const float4 v = *reinterpret_cast<const float4*>(data + i);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = i + j < count ? data[i + j] : -infinity();
    }
  }

  // Calls body(logits of four tokens, id of the first).
  template <int unrolled = 1, class Body>
  __device__ void visit(const Body& body) const {
    const int id = first + 4 * lane;
#pragma unroll unrolled
    for (int step = 0; step < steps; ++step) {
      float x[4];
      four(step, x);
      body(x, id + step * row_step);
    }
  }

  // The place of this thread's best token, 0 where all are -inf, broken_place where one is NaN.
  __device__ Word best() const {
    float top = -infinity();
    int at = 0;
    bool nan = false;
#pragma unroll(resident ? 2 : 8)
    for (int step = 0; step < steps; ++step) {
      float x[4];
      four(step, x);
      nan |= isnan(x[0]) || isnan(x[1]) || isnan(x[2]) || isnan(x[3]);
      const float m = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
      if (m > top) top = m, at = step;
    }
    if (nan) return broken_place;
    if (top == -infinity()) return 0;
    float x[4];
    four(at, x);
    const int j = x[0] == top ? 0 : x[1] == top ? 1 : x[2] == top ? 2 : 3;
    return place_of(top, first + at * row_step + 4 * lane + j);
  }
};

// The best place of the row, 0 where it is broken: a NaN, or no finite logit. The first exchange of a kernel, after `arrive`.
template <bool resident>
__device__ Word best_of_row(Team& team, const Slice<resident>& slice) {
  const Word mine[1] = {warp_max(slice.best())};
  team.wait();
  team.tell(mine);
  const Word best = team.max(0);
  if (best == broken_place) return 0;
  if (best == 0 || logit_of(static_cast<uint32_t>(best >> 32)) < infinity()) return best;
  bool finite = false;
  slice.visit([&](const float(&x)[4], int) {
#pragma unroll
    for (int j = 0; j < 4; ++j) finite |= fabsf(x[j]) <= FLT_MAX;
  });
  const Word any[1] = {__any_sync(~0u, finite) ? Word{1} : Word{0}};
  team.tell(any);
  return team.max(0) ? best : 0;
}

// The sum of this warp's weights from logit `least` on; `also(logits, id, exponents)` sees them.
template <bool resident, class Also>
__device__ Word mass_from(const Slice<resident>& slice, const Weigher& weigh, float least, const Also& also) {
  Word mass = 0;
  slice.template visit<2>([&](const float(&x)[4], int id) {
    Fixed sum;
    float e[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      e[j] = weigh.exponent(x[j]);
      const float w = Weigher::power(e[j]);
      sum.add(x[j] >= least ? w : 0);
    }
    mass += sum.value(4);
    also(x, id, e);
  });
  return warp_sum(mass);
}

template <bool resident>
__device__ Word mass_within(const Slice<resident>& slice, const Weigher& weigh, const Border& border) {
  Word mass = 0;
  slice.template visit<2>([&](const float(&x)[4], int id) {
    Fixed sum;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.add(border.keeps(x[j], id + j) ? weigh(x[j]) : 0);
    mass += sum.value(4);
  });
  return warp_sum(mass);
}

__device__ __forceinline__ void count_bins(Shared& shared, const float (&x)[4], float least, const float (&e)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (e[j] > least_exponent && x[j] >= least) atomicAdd(&shared.histogram[static_cast<int>(Weigher::bin_place(e[j]))], 1u);
}

// --- The list: tokens that the first block ranks ------------------------------------------------------------------------------------

// Sends the tokens for which `wanted(logit, id)` holds, at most list_size of them in the row, to the first block's list; `look` does
// the same for four, as a mask, and sees every token once.
template <bool resident, class Look, class Wanted>
__device__ void send_to_list(Team& team, const Slice<resident>& slice, const Look& look, const Wanted& wanted) {
  uint32_t mine = 0, hits = 0;  // bit 31: steps from 31 on
  slice.visit([&](const float(&x)[4], int id) {
    const uint32_t mask = look(x, id);
    mine += __popc(mask);
    if (mask) hits |= 1u << min((id - slice.first) / row_step, 31);
  });
  if (!__any_sync(~0u, mine > 0)) return;
  const uint32_t running = warp_running_sum(mine, team.lane);
  uint32_t base = 0;
  if (team.lane == 31) base = team.add(&team.shared.filled, 0, running);
  uint32_t at = __shfl_sync(~0u, base, 31) + running - mine;
  for (; hits; hits &= hits - 1) {
    int step = __ffs(hits) - 1;
    const int end = step < 31 ? step + 1 : slice.steps;
    for (; step < end; ++step) {
      float x[4];
      slice.four(step, x);
      const int id = slice.first + step * row_step + 4 * team.lane;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (wanted(x[j], id + j)) team.put(at++, place_of(x[j], id + j));
    }
  }
  __syncwarp();
}
template <bool resident, class Wanted>
__device__ void send_to_list(Team& team, const Slice<resident>& slice, const Wanted& wanted) {
  const auto look = [&](const float(&x)[4], int id) {
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) mask |= wanted(x[j], id + j) ? 1u << j : 0u;
    return mask;
  };
  send_to_list(team, slice, look, wanted);
}

__device__ __forceinline__ int padded_size(int count) {
  int n = 64;
  while (n < count) n *= 2;
  return n;
}

// Sorts [0, size), a power of two from 64 on, best first, in one block (Batcher's bitonic network). While partners are at most 32
// apart, a warp works on 64 entries of its own.
__device__ __noinline__ void sort_list(Word* list, int size, int thread) {
  __syncthreads();
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int gap = run / 2; gap > 0; gap /= 2) {
#pragma unroll 1
      for (int pair = thread; pair < size / 2; pair += row_threads) {
        const int i = 2 * pair - (pair & (gap - 1));
        const Word a = list[i], b = list[i + gap];
        if ((a < b) == ((i & run) == 0)) list[i] = b, list[i + gap] = a;
      }
      if (gap <= 32 && (gap > 1 || run <= 32)) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    }
  }
  __syncthreads();
}

// Fills the list up and sorts it, empties its counter; returns its size with the filling.
__device__ __forceinline__ int rank_list(Team& team, int count) {
  const int size = padded_size(count);
  for (int i = count + team.thread; i < size; i += row_threads) team.shared.list[i] = 0;
  if (team.thread == 0) team.shared.filled = 0;
  sort_list(team.shared.list, size, team.thread);
  return size;
}

// For a list of at most short_list entries: four threads per entry count the better ones and add up their weights.
struct Standing {
  bool speaks;  // the first of the four, and there is such an entry
  Word place;
  uint32_t rank;
  Word weight, before;
};
__device__ __forceinline__ Word sum_of_four(Word x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ Standing stand(Team& team, int count, const Weigher& weigh) {
  Shared& shared = team.shared;
  const int entry = team.thread / 4, part = team.thread % 4;
  Standing s = {part == 0 && entry < count, entry < count ? shared.list[entry] : 0, 0, 0, 0};
  s.weight = entry < count ? fixed(weigh(logit_of(static_cast<uint32_t>(s.place >> 32)))) : 0;
  if (part == 0) shared.weights[entry] = s.weight;
  __syncthreads();
  for (int i = part; i < count; i += 4) {
    const bool better = shared.list[i] > s.place;
    s.rank += better;
    s.before += better ? shared.weights[i] : 0;
  }
  __syncwarp();
  s.rank += __shfl_xor_sync(~0u, s.rank, 1);
  s.rank += __shfl_xor_sync(~0u, s.rank, 2);
  s.before = sum_of_four(s.before);
  return s;
}

// --- Borders: the worst of the best `need` tokens, or of the fewest best ones that hold a mass `goal` ------------------------------

struct Range {
  int low, high;    // bins
  uint32_t inside;  // tokens in them, or more than list_size
};
// Where the borders are, as far as the histogram tells: names for the numbers in `found`, which every block has after find_bins.
struct Found {
  const uint32_t* numbers;
  __device__ explicit Found(const Team& team) : numbers(team.shared.found) {}
  __device__ int at(int i) const { return static_cast<int>(numbers[i]); }
  __device__ int count_bin() const { return at(0); }             // has the last of the best `need`
  __device__ uint32_t through() const { return numbers[1]; }      // tokens in bins up to it, 0 if there are fewer than `need`
  __device__ uint32_t before() const { return numbers[2]; }       // tokens in the bins before it
  __device__ Range sure() const { return {at(3), at(4), numbers[7] - numbers[8]}; }     // the token that completes the mass is in it
  __device__ Range likely() const { return {at(5), at(6), numbers[9] - numbers[10]}; }  // and likely in this one
  __device__ uint32_t sure_through() const { return numbers[7]; }  // tokens in bins up to the end of `sure`
};

// The first block's part of find_bins. `counts`: this thread's two bins, over the team.
__device__ __forceinline__ void search_histogram(Team& team, uint2 counts, uint32_t need, double goal, double total) {
  Shared& shared = team.shared;
  const int bin = 2 * team.thread;
  // Weights of bin b lie within a factor of 2^(1 / bins_per_octave) below 2^(-b / bins_per_octave); slack for rounding is added.
  constexpr float width = 0.97265494f, slack = 1e-4f;
  const float most0 = static_cast<float>(counts.x) * exp2f(bin * (-1 / bins_per_octave));
  const float most1 = static_cast<float>(counts.y) * exp2f((bin + 1) * (-1 / bins_per_octave));
  const uint32_t count = warp_running_sum(counts.x + counts.y, team.lane);
  const float mass = warp_running_sum(most0 + most1, team.lane);
  __syncthreads();
  if (team.lane == 31) shared.scan_count[team.warp] = count, shared.scan_mass[team.warp] = mass;
  if (team.thread < 7) shared.found[team.thread] = team.thread < 3 ? 0 : bins - 1;
  __syncthreads();
  uint32_t through1 = count;
  float upper1 = mass, all = 0;
#pragma unroll 4
  for (int w = 0; w < row_warps; ++w) {
    if (w < team.warp) through1 += shared.scan_count[w], upper1 += shared.scan_mass[w];
    all += shared.scan_mass[w];
  }
  const uint32_t through0 = through1 - counts.y;
  const uint32_t before0 = through0 - counts.x;
  if (need > 0 && through0 >= need && before0 < need) shared.found[0] = bin, shared.found[1] = through0, shared.found[2] = before0;
  if (need > 0 && through1 >= need && through0 < need) shared.found[0] = bin + 1, shared.found[1] = through1, shared.found[2] = through0;
  if (goal >= 0) {
    const float wanted = static_cast<float>(goal * 0x1p-38), rest = static_cast<float>((total - goal) * 0x1p-38);
    // The bounds are too high by nearly the same factor everywhere: what is left when it is taken out is a good guess.
    const float usual = static_cast<float>(total * 0x1p-38) / all, doubt = 3e-3f * fminf(wanted, rest);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float upper = j ? upper1 : upper1 - most1;
      if (upper * (1 + slack) >= wanted) atomicMin(&shared.found[3], bin + j);
      if (upper * width * (1 - slack) >= wanted || all - upper + 1e-5f * all <= rest * (1 - slack)) atomicMin(&shared.found[4], bin + j);
      if (upper * usual >= wanted - doubt) atomicMin(&shared.found[5], bin + j);
      if (upper * usual >= wanted + doubt) atomicMin(&shared.found[6], bin + j);
    }
  }
  __syncthreads();
  const int high = shared.found[4], low = min(static_cast<int>(shared.found[3]), high);
  const int likely_high = max(low, min(static_cast<int>(shared.found[6]), high));
  const int likely_low = max(low, min(static_cast<int>(shared.found[5]), likely_high));
  __syncthreads();
  if (team.thread == 0) shared.found[3] = low, shared.found[5] = likely_low, shared.found[6] = likely_high;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t through = j ? through1 : through0, before = j ? through0 : before0;
    if (bin + j == high) shared.found[7] = through;
    if (bin + j == low) shared.found[8] = before;
    if (bin + j == likely_high) shared.found[9] = through;
    if (bin + j == likely_low) shared.found[10] = before;
  }
}

// Where the borders are. need 0 or goal < 0: not asked for. The first call also adds the histograms up, in the first block's.
__device__ __forceinline__ void find_bins(Team& team, bool first, uint32_t need, double goal, double total) {
  if (team.rank == 0) {
    uint2* counts = reinterpret_cast<uint2*>(&team.shared.histogram[2 * team.thread]);
    if (first) *counts = team.histogram_of_team();
    search_histogram(team, *counts, need, goal, total);
  }
  team.share_decision();
}

// Halves the range [worst, best] of places, which has `inside` tokens, until these fit into the list. `before` tokens of mass `better`
// are better.
template <bool resident, class Counts>
__device__ void halve(Team& team, const Slice<resident>& slice, const Weigher& weigh, const Counts& counts, Word& worst, Word& best, Word& inside,
                      Word need, Word& before, double goal, Word& better) {
  while (inside > list_size) {
    const Word middle = worst + (best - worst) / 2 + 1;
    Word number = 0, weight = 0;
    slice.visit([&](const float(&x)[4], int id) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Word place = place_of(x[j], id + j);
        if (place < middle || place > best || !counts(x[j], id + j)) continue;
        ++number;
        weight += fixed(weigh(x[j]));
      }
    });
    const Word half[2] = {warp_sum(number), warp_sum(weight)};
    team.tell(half);
    number = team.sum(0), weight = team.sum(1);
    if (need > 0 ? before + number >= need : static_cast<double>(better + weight) >= goal) {
      worst = middle;
      inside = number;
    } else {
      best = middle - 1;
      inside -= number;
      before += number;
      better += weight;
    }
  }
}

// Looks for the last token to keep among those that `keep` keeps: by number (need > 0; `before` tokens are in better bins), else by
// mass; first in the likely range, if that has few enough tokens, then in the sure one. Returns the token's place; `mass` is what it
// and the better ones weigh.
template <bool resident>
__device__ Border find_border(Team& team, const Slice<resident>& slice, const Weigher& weigh, const Border keep, Range range, const Range sure,
                              Word need, Word before, double goal, Word& mass) {
  Shared& shared = team.shared;
  const auto counts = [&](float x, int id) { return weigh.exponent(x) > least_exponent && keep.keeps(x, id); };
  const auto in_range = [&](float bin) { return bin >= range.low && bin < range.high + 1; };
  Word better = 0, inside = 0, weight = 0;
  // Adds up what is in better bins and in the range, and tells which of four tokens are in the range.
  const auto look = [&](const float(&x)[4], int id) {
    Fixed sum;
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float e = weigh.exponent(x[j]), bin = Weigher::bin_place(e), w = Weigher::power(e);
      const bool kept = e > least_exponent && keep.keeps(x[j], id + j);
      sum.add(kept && bin < range.low ? w : 0);
      if (kept && in_range(bin)) mask |= 1u << j, weight += fixed(w);
    }
    better += sum.value(4);
    return mask;
  };
  for (;; range = sure) {
    if (range.inside == 0) range = sure;
    if (range.inside > list_size && sure.inside <= list_size) range = sure;
    better = weight = 0;
    inside = range.inside;
    if (inside == 0 || inside > list_size) break;
    send_to_list(team, slice, look, [&](float x, int id) { return in_range(Weigher::bin_place(weigh.exponent(x))) && counts(x, id); });
    const Word told[2] = {warp_sum(better), warp_sum(weight)};
    team.tell(told);
    better = team.sum(0), weight = team.sum(1);
    if (need > 0 || (range.low == sure.low && range.high == sure.high)) break;
    if (static_cast<double>(better) < goal && static_cast<double>(better + weight) >= goal) break;
    team.await_list(static_cast<int>(inside));  // a wrong guess: forget the list
    if (team.rank == 0 && team.thread == 0) shared.filled = 0;
    team.sync();
  }
  if (inside == 0 || inside > list_size) {
    range = sure;
    better = inside = 0;
    Word worst = ~Word{0}, best = 0;
    slice.visit([&](const float(&x)[4], int id) {
      const uint32_t mask = look(x, id);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(mask >> j & 1)) continue;
        const Word place = place_of(x[j], id + j);
        ++inside;
        worst = place < worst ? place : worst;
        best = place > best ? place : best;
      }
    });
    const Word sums[2] = {warp_sum(better), warp_sum(inside)}, ends[2] = {warp_max(~worst), warp_max(best)};
    team.tell(sums);
    better = team.sum(0), inside = team.sum(1);
    team.tell(ends);
    worst = ~team.max(0), best = team.max(1);
    mass = better;
    if (inside == 0) return keep;  // cannot be: the bins hold the token
    halve(team, slice, weigh, counts, worst, best, inside, need, before, goal, better);
    send_to_list(team, slice, [&](float x, int id) {
      const Word place = place_of(x, id);
      return place >= worst && place <= best && counts(x, id);
    });
  }
  team.await_list(static_cast<int>(inside));
  if (team.rank == 0) {
    const int count = static_cast<int>(inside), each = max(1, rank_list(team, count) / row_threads), begin = team.thread * each;
    Word w[4], sum = 0, all;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[j] = j < each && begin + j < count ? fixed(weigh(logit_of(static_cast<uint32_t>(shared.list[begin + j] >> 32)))) : 0;
      sum += w[j];
    }
    Word running = better + team.block_before(sum, all);
    // Token i is kept while the number or the mass before it is short of what is wanted; the first one always.
    const auto keeps = [&](int i, Word heavier) { return i == 0 || (need > 0 ? before + i < need : static_cast<double>(heavier) < goal); };
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = begin + j;
      if (j < each && i < count && keeps(i, running) && (i + 1 == count || !keeps(i + 1, running + w[j]))) {
        shared.answer[0] = shared.list[i];
        shared.answer[1] = running + w[j];
      }
      running += w[j];
    }
    __syncthreads();
    const Word place = shared.answer[0], through = shared.answer[1];
    if (team.thread > 0 && team.thread < team.size) {
      team.store(&shared.answer[0], team.thread, place);
      team.store(&shared.answer[1], team.thread, through);
    }
  }
  team.sync();
  mass = shared.answer[1];
  return border_of(shared.answer[0]);
}

}  // namespace

// --- Host: how a row is split. Speed only; the answer is the same for every split. --------------------------------------------------

constexpr int few_rows = 4;

struct RowPlan {
  int team, segment;
  bool resident;
  size_t shared;
};

inline RowPlan plan_rows(int64_t vocab, int team) {
  const Device& gpu = device();
  RowPlan plan = {};
  plan.team = team;
  const int64_t warps = plan.team * row_warps;
  plan.segment = static_cast<int>((vocab + warps * row_step - 1) / (warps * row_step) * row_step);
  plan.shared = shared_bytes + sizeof(float) * row_warps * static_cast<size_t>(plan.segment);
  plan.resident = plan.shared <= static_cast<size_t>(gpu.shared_per_block);
  if (!plan.resident) plan.shared = shared_bytes;
  return plan;
}

// A launch like launch() of launch.h, with one team a row.
struct RowLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  RowLaunch(int64_t rows, const RowPlan& plan) {
    config.gridDim = dim3(static_cast<unsigned>(rows * plan.team));
    config.blockDim = dim3(row_threads);
    config.dynamicSmemBytes = plan.shared;
    config.attrs = attributes;
    if (plan.team > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(plan.team);
      attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
      ++config.numAttrs;
    }
    if (dependent_launch()) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  RowLaunch(const RowLaunch&) = delete;
};

// Whether the device can run a few teams of 16 blocks, which is more than every device must: few rows are done sooner then. Asked once
// for each device and size of shared memory; `fits` is the caller's memory of it.
using LargeTeams = std::map<std::pair<int, size_t>, bool>;  // by device and shared memory
template <class... Parameters>
bool large_team_fits(const char* op, void (*kernel)(Parameters...), const RowPlan& plan, LargeTeams& fits) {
  static std::mutex guard;
  const std::lock_guard<std::mutex> lock(guard);
  int index = 0;
  check(cudaGetDevice(&index), op);
  const auto known = fits.find({index, plan.shared});
  if (known != fits.end()) return known->second;
  const auto ask = [&] {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) return cudaGetLastError(), false;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared)), op);
    RowLaunch attempt(1, plan);
    int teams = 0;
    if (cudaOccupancyMaxActiveClusters(&teams, kernel, &attempt.config) != cudaSuccess) return cudaGetLastError(), false;
    return teams >= few_rows;
  };
  return fits[{index, plan.shared}] = ask();
}

// `resident` and `reading`: the two instances of a kernel. The arguments are made from the plan.
template <class Arguments>
void launch_rows(const char* op, void (*resident)(Arguments), void (*reading)(Arguments), int64_t rows, int64_t vocab, Arguments arguments) {
  const int capability = device().capability;
  RowPlan plan = plan_rows(vocab, capability < 90 ? 1 : vocab > 65536 ? 8 : vocab > 32768 ? 4 : vocab > 16384 ? 2 : 1);
  if (capability >= 90 && rows <= few_rows && vocab > 65536) {
    static LargeTeams fits;
    const RowPlan large = plan_rows(vocab, largest_team);
    if (large.resident && large_team_fits(op, resident, large, fits)) plan = large;
  }
  const auto kernel = plan.resident ? resident : reading;
  arguments.segment = plan.segment;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared)), op);
  RowLaunch launch(rows, plan);
  launch.config.stream = current_stream();
  check(cudaLaunchKernelEx(&launch.config, kernel, arguments), op);
}

}  // namespace octavo::cuda
