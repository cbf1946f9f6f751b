// From logits to tokens: penalties, counting, and the choice of a token per row. Owns what a row's parameters mean; how a row is
// split, weighed and searched is sampling_row.cuh. The host knows no row's parameters: they lie on the device, nothing is read back,
// and every row takes only the passes over its logits that it asks for:
//   greedy: one, for the best place;
//   temperature and min_p: a second one for the sums of the weights, and a walk through the one warp's run that holds the token;
//   top_k, top_p: the second pass also fills a histogram of log2(weight), which says how far down the border can lie. If at most
//     2048 tokens are that good, the first block ranks them and finishes alone; else the border is searched for with exact sums over
//     the few bins that can hold it, and a last pass sums what is kept.
// A parameter that the CPU kernel would refuse gives token -1. The random numbers are Philox4x32-10 (Salmon, Moraes, Dror, Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", 2011). Invariant: a row's token comes from that row's inputs alone, by the bit.
#include <climits>

#include "common/check.h"
#include "ops.h"
#include "sampling_row.cuh"

namespace octavo::cuda {
namespace {

// --- Penalties and counts -----------------------------------------------------------------------------------------------------------

constexpr int flat_threads = 256, flat_tokens = 4;

// The order of roundings is the reference's, hence no contraction.
__device__ __forceinline__ float penalised(float x, int count, bool prompt, float repetition, float frequency, float presence) {
  const bool said = count > 0;
  if (said || prompt) x = x > 0 ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
  return __fsub_rn(__fsub_rn(x, __fmul_rn(frequency, static_cast<float>(count))), said ? presence : 0.0f);
}

// `flat_loads` vectors a thread: several where there is much to read, one where many blocks are worth more.
template <int flat_loads>
__global__ void __launch_bounds__(flat_threads)
    penalties_kernel(float* logits,              // [S, V], rows logits_stride apart
                     const int32_t* counts,      // [P, V], rows counts_stride apart
                     const uint8_t* prompt,      // [P, V], rows prompt_stride apart
                     const int32_t* slots,       // [S]
                     const float* repetition,    // [S]
                     const float* frequency,     // [S]
                     const float* presence,      // [S]
                     int64_t logits_stride, int64_t counts_stride, int64_t prompt_stride, int64_t vocab, int64_t pool, bool aligned) {
  dependency_wait();
  dependents_start();
  const int64_t s = blockIdx.y;
  const int64_t slot = slots[s];
  const float factor = repetition[s], each = frequency[s], once = presence[s];
  if (slot < 0 || slot >= pool || (factor == 1 && each == 0 && once == 0)) return;
  logits += s * logits_stride;
  counts += slot * counts_stride;
  prompt += slot * prompt_stride;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * flat_loads * flat_threads, stride = flat_threads * flat_tokens;
  const int64_t begin = (first + threadIdx.x) * flat_tokens;
  if (aligned && (first + flat_loads * flat_threads) * flat_tokens <= vocab) {
    int4 n[flat_loads];
    uchar4 p[flat_loads];
#pragma unroll
    for (int i = 0; i < flat_loads; ++i) {
      n[i] = *reinterpret_cast<const int4*>(counts + begin + i * stride);
      p[i] = *reinterpret_cast<const uchar4*>(prompt + begin + i * stride);
    }
#pragma unroll
    for (int i = 0; i < flat_loads; ++i) {
      // Most tokens were never seen: their logits are neither read nor written.
      if (!(n[i].x | n[i].y | n[i].z | n[i].w | p[i].x | p[i].y | p[i].z | p[i].w)) continue;
      float4 x = *reinterpret_cast<const float4*>(logits + begin + i * stride);
      x.x = penalised(x.x, n[i].x, p[i].x, factor, each, once);
      x.y = penalised(x.y, n[i].y, p[i].y, factor, each, once);
      x.z = penalised(x.z, n[i].z, p[i].z, factor, each, once);
      x.w = penalised(x.w, n[i].w, p[i].w, factor, each, once);
      *reinterpret_cast<float4*>(logits + begin + i * stride) = x;
    }
  } else {
    for (int64_t i = first * flat_tokens + threadIdx.x; i < vocab && i < (first + flat_loads * flat_threads) * flat_tokens; i += flat_threads)
      if (counts[i] != 0 || prompt[i]) logits[i] = penalised(logits[i], counts[i], prompt[i], factor, each, once);
  }
}

__global__ void __launch_bounds__(flat_threads)
    count_kernel(int32_t* counts,          // [P, V], rows `stride` apart
                 const int32_t* slots,     // [S]
                 const int32_t* tokens,    // [S]
                 int64_t stride, int64_t rows, int64_t vocab, int64_t pool) {
  dependency_wait();
  dependents_start();
  const int64_t s = static_cast<int64_t>(blockIdx.x) * flat_threads + threadIdx.x;
  if (s >= rows) return;
  const int64_t slot = slots[s], token = tokens[s];
  if (slot >= 0 && slot < pool && token >= 0 && token < vocab) atomicAdd(counts + slot * stride + token, 1);
}

// --- A token per row ----------------------------------------------------------------------------------------------------------------

// The first word of Philox4x32-10, counter (c0, c1, 0, 0).
__device__ __forceinline__ uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1) {
  uint32_t c2 = 0, c3 = 0, k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0, high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// floor(u * total) for u = fraction / 2^24: an integer exceeds u * total where it exceeds this.
__device__ __forceinline__ Word share_of(Word total, uint32_t fraction) {
  return (total >> 24) * fraction + ((total & 0xffffff) * fraction >> 24);
}

// The mass that the top_p best must reach; the best token alone has 2^38, so that it is always kept.
__device__ __forceinline__ double goal_of(float top_p, Word total) { return fmax(static_cast<double>(top_p) * static_cast<double>(total), 1.0); }

template <bool resident>
__device__ Word mass_of_step(const Slice<resident>& slice, const Weigher& weigh, const Border& border, int step) {
  float x[4];
  slice.four(step, x);
  const int id = slice.first + step * row_step + 4 * slice.lane;
  Fixed sum;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum.add(border.keeps(x[j], id + j) ? weigh(x[j]) : 0);
  return sum.value(4);
}

// The token whose weight, in order of ids, brings the running sum above floor(u * total). Every warp has told its mass as value 0;
// the one that holds the token walks through its run and writes it.
template <bool resident>
__device__ void draw(const Team& team, const Slice<resident>& slice, const Weigher& weigh, const Border& border, uint32_t fraction,
                     int32_t* token) {
  const Word total = team.sum(0), before = team.before(0), mine = team.shared.table[team.turn][0][team.rank * row_warps + team.warp];
  const Word target = share_of(total, fraction);
  if (target < before || target - before >= mine) return;
  // First the step, by sums of four steps at a time, whose reductions overlap; then the lane; then the token.
  constexpr int together = 4;
  Word left = target - before;
  for (int base = 0; base < slice.steps; base += together) {
    Word sums[together];
#pragma unroll
    for (int i = 0; i < together; ++i) sums[i] = base + i < slice.steps ? mass_of_step(slice, weigh, border, base + i) : 0;
#pragma unroll
    for (int i = 0; i < together; ++i) sums[i] = warp_sum(sums[i]);
    int step = -1;
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (step < 0 && left < sums[i]) step = base + i;
      if (step < 0) left -= sums[i];
    }
    if (step < 0) continue;
    float x[4];
    slice.four(step, x);
    const int id = slice.first + step * row_step + 4 * team.lane;
    const Word own = mass_of_step(slice, weigh, border, step);
    Word running = warp_running_sum(own, team.lane) - own;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Word w = border.keeps(x[j], id + j) ? fixed(weigh(x[j])) : 0;
      if (running <= left && left - running < w) *token = id + j;
      running += w;
    }
    return;
  }
}

// The first block has `count` candidates in its list, all that can be kept: cut them to the best `limit`, to top_p, and draw.
// top_p is a share of the mass of the best `limit`, or of `row_mass` where there is no limit (0).
__device__ void draw_from_list(Team& team, int count, int limit, Word row_mass, const Weigher& weigh, float top_p, uint32_t fraction,
                               int32_t* token) {
  Word* list = team.shared.list;
  const auto weight = [&](uint32_t order) { return fixed(weigh(logit_of(order))); };
  const bool limited = limit > 0;
  limit = limited ? min(limit, count) : count;
  int each = max(1, rank_list(team, count) / row_threads), begin = team.thread * each;
  Word w[4], sum = 0, total;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum += w[j] = j < each && begin + j < limit ? weight(static_cast<uint32_t>(list[begin + j] >> 32)) : 0;
  Word running = team.block_before(sum, total);
  const double goal = goal_of(top_p, limited ? total : row_mass);
  Word kept = 0, kept_mass = 0, number;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= each || begin + j >= count) continue;
    const bool keep = begin + j < limit && (top_p >= 1 || static_cast<double>(running) < goal);
    kept += keep;
    kept_mass += keep ? w[j] : 0;
    running += w[j];
    // Halves exchanged, so that the second sort is by ids.
    list[begin + j] = keep ? list[begin + j] << 32 | list[begin + j] >> 32 : 0;
  }
  team.block_before(kept, number);
  team.block_before(kept_mass, total);
  const int size = padded_size(static_cast<int>(number));
  sort_list(list, size, team.thread);
  each = max(1, size / row_threads), begin = team.thread * each;
  sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum += w[j] = j < each && begin + j < static_cast<int>(number) ? weight(static_cast<uint32_t>(list[begin + j])) : 0;
  running = team.block_before(sum, total);
  const Word target = share_of(total, fraction);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (running <= target && target - running < w[j]) *token = id_of(static_cast<uint32_t>(list[begin + j] >> 32));
    running += w[j];
  }
}

// The same for a short list, without sorting.
__device__ void draw_from_short_list(Team& team, int count, int limit, Word row_mass, const Weigher& weigh, float top_p, uint32_t fraction,
                                     int32_t* token) {
  Shared& shared = team.shared;
  const bool limited = limit > 0;
  const uint32_t last = static_cast<uint32_t>((limited ? min(limit, count) : count) - 1);
  const Standing s = stand(team, count, weigh);
  const Word through = s.before + s.weight;
  if (limited && s.speaks && s.rank == last) shared.answer[1] = through;
  __syncthreads();
  const double goal = top_p >= 1 ? 0x1p63 : goal_of(top_p, limited ? shared.answer[1] : row_mass);
  const bool kept = s.rank <= last && static_cast<double>(s.before) < goal;
  if (s.speaks) shared.weights[team.thread / 4] = kept ? s.weight : 0;
  if (s.speaks && kept && (s.rank == last || static_cast<double>(through) >= goal)) shared.answer[0] = through;
  __syncthreads();
  const Word target = share_of(shared.answer[0], fraction);
  Word running = 0;  // of what is kept and has a lower id, which is a larger low half of the place
  for (int i = team.thread % 4; i < count; i += 4)
    running += static_cast<uint32_t>(shared.list[i]) > static_cast<uint32_t>(s.place) ? shared.weights[i] : 0;
  __syncwarp();
  running = sum_of_four(running);
  if (s.speaks && kept && running <= target && target - running < s.weight) *token = id_of(static_cast<uint32_t>(s.place));
}

struct SampleArguments {
  int32_t* tokens;           // [S]
  const float* logits;       // [S, V], rows `stride` apart
  const float* temperature;  // [S]
  const int32_t* top_k;      // [S]
  const float* top_p;        // [S]
  const float* min_p;        // [S]
  const int64_t* seeds;      // [S]
  const int32_t* index;      // [S]
  const int32_t* positions;  // [S]
  int64_t stride;
  int vocab, segment;  // segment: launch_rows
};

template <bool resident>
__global__ void __launch_bounds__(row_threads, resident ? resident_blocks : 1) sample_kernel(const SampleArguments a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Team team(shared);
  team.begin();
  dependency_wait();
  dependents_start();

  const int64_t s = blockIdx.x / team.size;
  const float temperature = a.temperature[s], top_p = a.top_p[s], min_p = a.min_p[s];
  const int top_k = a.top_k[s];
  const Slice<resident> slice(team, a.logits + s * a.stride, a.vocab, a.segment, reinterpret_cast<float*>(memory + shared_bytes));
  const Word top = best_of_row(team, slice);
  const bool allowed = temperature >= 0 && temperature <= FLT_MAX && top_p >= 0 && min_p >= 0 && min_p <= 1;
  if (top == 0 || !allowed || temperature == 0) {
    if (team.rank == 0 && team.thread == 0) a.tokens[s] = top == 0 || !allowed ? -1 : id_of(static_cast<uint32_t>(top));
    return;
  }

  const Weigher weigh(logit_of(static_cast<uint32_t>(top >> 32)), temperature);
  // min_p as the least logit that is kept, rounded up to the next float. The product is of float64: one that is infinite would leave
  // nothing of a row whose best logit is.
  const double below = static_cast<double>(temperature) * static_cast<double>(logf(min_p));
  const float least = min_p > 0 ? __double2float_ru(__dadd_rn(static_cast<double>(weigh.best), below)) : -infinity();
  Border border = {least, INT_MAX};
  const uint32_t fraction = philox(static_cast<uint64_t>(a.seeds[s]), static_cast<uint32_t>(a.positions[s]), static_cast<uint32_t>(a.index[s])) >> 8;
  int32_t* token = a.tokens + s;
  if ((top_k <= 0 || top_k >= a.vocab) && top_p >= 1) {
    const Word mine[1] = {mass_from(slice, weigh, least, [](const float(&)[4], int, const float(&)[4]) {})};
    team.tell(mine);
    return draw(team, slice, weigh, border, fraction, token);
  }

  const Word mine[1] = {mass_from(slice, weigh, least, [&](const float(&x)[4], int, const float(&e)[4]) { count_bins(shared, x, least, e); })};
  team.tell<true>(mine);
  Word total = team.sum(0);
  const uint32_t need = top_k > 0 ? top_k : 0;
  const bool nucleus = top_p < 1;
  find_bins(team, true, need, nucleus ? goal_of(top_p, total) : -1, static_cast<double>(total));
  const Found found(team);
  const bool few = need > 0 && found.through() > 0;  // else there are fewer than top_k weights

  const int last = few ? found.count_bin() : found.sure().high;
  const uint32_t candidates = few ? found.through() : found.sure_through();
  if ((few || nucleus) && candidates <= list_size) {
    send_to_list(team, slice, [&](float x, int) {
      const float e = weigh.exponent(x);
      return Weigher::bin_place(e) < last + 1 && e > least_exponent && x >= least;
    });
    team.await_list(static_cast<int>(candidates));
    if (team.rank == 0) {
      if (candidates <= short_list) {
        draw_from_short_list(team, static_cast<int>(candidates), few ? top_k : 0, total, weigh, top_p, fraction, token);
      } else {
        draw_from_list(team, static_cast<int>(candidates), few ? top_k : 0, total, weigh, top_p, fraction, token);
      }
    }
    return;
  }
  if (few) {
    const Range bin = {last, last, found.through() - found.before()};
    border = find_border(team, slice, weigh, border, bin, bin, need, found.before(), 0, total);
  }
  if (nucleus) {
    Range likely = found.likely(), sure = found.sure();
    if (few) {
      find_bins(team, false, 0, goal_of(top_p, total), static_cast<double>(total));
      sure = found.sure();
      // The last bin now has fewer tokens than were counted.
      if (sure.high >= last) sure = {min(sure.low, last), last, list_size + 1};
      likely = sure;
    }
    border = find_border(team, slice, weigh, border, likely, sure, 0, 0, goal_of(top_p, total), total);
  }
  const Word kept[1] = {mass_within(slice, weigh, border)};
  team.tell(kept);
  draw(team, slice, weigh, border, fraction, token);
}

}  // namespace

void penalties(const Tensor& logits, const Tensor& counts, const Tensor& prompt_mask, const Tensor& slots, const Tensor& repetition,
               const Tensor& frequency, const Tensor& presence) {
  Contract c("penalties");
  c.tensor("logits", logits, "SV", f32, rows);
  c.tensor("counts", counts, "PV", i32, rows);
  c.tensor("prompt_mask", prompt_mask, "PV", b8, rows);
  c.tensor("slots", slots, "S", i32);
  c.tensor("repetition", repetition, "S", f32);
  c.tensor("frequency", frequency, "S", f32);
  c.tensor("presence", presence, "S", f32);
  const int64_t num_rows = c['S'], vocab = c['V'];
  c.require(num_rows <= 65535, "%lld rows are more than 65535", static_cast<long long>(num_rows));
  if (num_rows == 0 || vocab == 0 || c['P'] == 0) return;
  const auto even = [](const Tensor& t, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(t.data) % bytes == 0 && (t.size[0] == 1 || t.stride[0] % flat_tokens == 0);
  };
  const bool aligned = even(logits, 16) && even(counts, 16) && even(prompt_mask, 4);
  const bool large = num_rows * vocab >= 1 << 23;
  const int64_t per_block = flat_threads * flat_tokens * (large ? 4 : 1);
  const dim3 grid(static_cast<unsigned>((vocab + per_block - 1) / per_block), static_cast<unsigned>(num_rows));
  launch("penalties", large ? penalties_kernel<4> : penalties_kernel<1>, grid, dim3(flat_threads), 0, current_stream(),
         logits.ptr<float>(), counts.ptr<const int32_t>(), prompt_mask.ptr<const uint8_t>(), slots.ptr<const int32_t>(),
         repetition.ptr<const float>(), frequency.ptr<const float>(), presence.ptr<const float>(), logits.stride[0], counts.stride[0],
         prompt_mask.stride[0], vocab, c['P'], aligned);
}

void count_tokens(const Tensor& counts, const Tensor& slots, const Tensor& tokens) {
  Contract c("count_tokens");
  c.tensor("counts", counts, "PV", i32, rows);
  c.tensor("slots", slots, "S", i32);
  c.tensor("tokens", tokens, "S", i32);
  if (c['S'] == 0) return;
  launch("count_tokens", count_kernel, dim3(static_cast<unsigned>((c['S'] + flat_threads - 1) / flat_threads)), dim3(flat_threads), 0,
         current_stream(), counts.ptr<int32_t>(), slots.ptr<const int32_t>(), tokens.ptr<const int32_t>(), counts.stride[0], c['S'], c['V'], c['P']);
}

void sample(const Tensor& tokens, const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
            const Tensor& seeds, const Tensor& index, const Tensor& positions) {
  Contract c("sample");
  c.tensor("logits", logits, "SV", f32, rows);
  c.tensor("tokens", tokens, "S", i32);
  c.tensor("temperature", temperature, "S", f32);
  c.tensor("top_k", top_k, "S", i32);
  c.tensor("top_p", top_p, "S", f32);
  c.tensor("min_p", min_p, "S", f32);
  c.tensor("seeds", seeds, "S", i64);
  c.tensor("index", index, "S", i32);
  c.tensor("positions", positions, "S", i32);
  c.require(c['V'] > 0 || c['S'] == 0, "logits have no columns");
  c.require(c['V'] <= largest_vocab, "a vocabulary of %lld is larger than %d", static_cast<long long>(c['V']), largest_vocab);
  c.require(c['S'] <= 1 << 24, "%lld rows are more than 2^24", static_cast<long long>(c['S']));
  if (c['S'] == 0) return;
  const SampleArguments arguments = {tokens.ptr<int32_t>(),      logits.ptr<const float>(),  temperature.ptr<const float>(),
                                     top_k.ptr<const int32_t>(), top_p.ptr<const float>(),   min_p.ptr<const float>(),
                                     seeds.ptr<const int64_t>(), index.ptr<const int32_t>(), positions.ptr<const int32_t>(),
                                     logits.stride[0],           static_cast<int>(c['V']),   0};
  launch_rows("sample", sample_kernel<true>, sample_kernel<false>, c['S'], c['V'], arguments);
}

}  // namespace octavo::cuda
