// Log-probabilities: of the chosen token of each row, its rank, and the best k of the row. Owns token_logprobs; how a row is split,
// weighed and ranked is sampling_row.cuh. Two passes over a row give the sum of its weights at temperature 1 and the rank; the
// second also fills the histogram that says down to where the best k reach. If at most 2048 tokens are that good, the first block
// sorts them; for a larger k the row is handed to it in portions of 1024 to 2048 tokens, whose borders are found by halving, which
// is slow and right. A token outside the vocabulary counts as none. Invariant: a row's answers come from that row alone, by the bit.
#include "common/check.h"
#include "ops.h"
#include "sampling_row.cuh"

namespace octavo::cuda {
namespace {

struct LogprobArguments {
  float* logprobs;        // [S]
  int32_t* ranks;         // [S]
  int32_t* top_ids;       // [S, K]
  float* top_logprobs;    // [S, K]
  const float* logits;    // [S, V], rows `stride` apart
  const int32_t* tokens;  // [S]
  int64_t stride;
  int vocab, k, segment;  // segment: launch_rows
};

// log_total: natural logarithm of the sum of the weights.
__device__ __forceinline__ float log_share(float x, float best, double log_total) {
  const double shifted = x == best ? 0 : static_cast<double>(x) - static_cast<double>(best);  // inf - inf is no number
  return static_cast<float>(shifted - log_total);
}

// The first block sorts the `count` tokens of its list and writes the first `wanted` of them.
__device__ void write_best(Team& team, int count, int wanted, float best, int32_t* ids, float* logprobs) {
  rank_list(team, count);
  for (int i = team.thread; i < wanted; i += row_threads) {
    const Word place = team.shared.list[i];
    ids[i] = id_of(static_cast<uint32_t>(place));
    logprobs[i] = log_share(logit_of(static_cast<uint32_t>(place >> 32)), best, team.shared.log_total);
  }
}

template <bool resident>
__global__ void __launch_bounds__(row_threads, resident ? resident_blocks : 1) logprobs_kernel(const LogprobArguments a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Team team(shared);
  team.begin();
  dependency_wait();
  dependents_start();

  const int64_t s = blockIdx.x / team.size;
  const float* row = a.logits + s * a.stride;
  const int token = a.tokens[s];
  const bool chosen = token >= 0 && token < a.vocab;
  const float own = chosen ? row[token] : infinity();
  const Slice<resident> slice(team, row, a.vocab, a.segment, reinterpret_cast<float*>(memory + shared_bytes));
  const Word top = best_of_row(team, slice);
  int32_t* ids = a.top_ids + s * a.k;
  float* logprobs = a.top_logprobs + s * a.k;
  if (top == 0) {
    if (team.rank > 0) return;
    if (team.thread == 0) a.logprobs[s] = not_a_number(), a.ranks[s] = 0;
    for (int i = team.thread; i < a.k; i += row_threads) ids[i] = -1, logprobs[i] = not_a_number();
    return;
  }

  const float best = logit_of(static_cast<uint32_t>(top >> 32));
  const Weigher weigh(best, 1.0f);
  const bool listed = a.k > 0;
  uint32_t ahead = 0;
  const Word mass = mass_from(slice, weigh, -infinity(), [&](const float(&x)[4], int id, const float(&e)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) ahead += x[j] > own || (x[j] == own && id + j < token);
    if (listed) count_bins(shared, x, -infinity(), e);
  });
  const Word mine[2] = {mass, warp_sum(ahead)};
  if (listed) {
    team.tell<true>(mine);
  } else {
    team.tell(mine);
  }
  const Word total = team.sum(0), rank = team.sum(1) + 1;
  if (team.rank == 0 && team.thread == 0) {
    const double log_total = log(static_cast<double>(total) * 0x1p-38);
    shared.log_total = log_total;
    a.logprobs[s] = chosen ? log_share(own, best, log_total) : not_a_number();
    a.ranks[s] = chosen ? static_cast<int32_t>(rank) : 0;
  }
  if (!listed) return;

  find_bins(team, true, a.k, -1, 0);
  const Found found(team);
  if (found.through() > 0 && found.through() <= list_size) {
    send_to_list(team, slice, [&](float x, int) {
      const float e = weigh.exponent(x);
      return Weigher::bin_place(e) < found.count_bin() + 1 && e > least_exponent;
    });
    const int count = static_cast<int>(found.through());
    team.await_list(count);
    if (team.rank == 0 && count <= short_list) {
      const Standing standing = stand(team, count, weigh);
      if (standing.speaks && standing.rank < static_cast<uint32_t>(a.k)) {
        ids[standing.rank] = id_of(static_cast<uint32_t>(standing.place));
        logprobs[standing.rank] = log_share(logit_of(static_cast<uint32_t>(standing.place >> 32)), best, shared.log_total);
      }
    } else if (team.rank == 0) {
      write_best(team, count, a.k, best, ids, logprobs);
    }
    return;
  }

  // Portions: the tokens of [middle, above), which are between half a list and a list, or the rest.
  Word above = top + 1;
  for (int written = 0; written < a.k;) {
    const Word enough = min(a.k - written, list_size / 2);
    Word high = above, low = 0, middle = 0, inside;
    for (;;) {
      uint32_t number = 0;
      slice.visit([&](const float(&x)[4], int id) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Word place = place_of(x[j], id + j);
          number += id + j < a.vocab && place >= middle && place < above;
        }
      });
      const Word told[1] = {warp_sum(number)};
      team.tell(told);
      inside = team.sum(0);
      if (inside < enough) {
        high = middle;
      } else if (inside > list_size) {
        low = middle;
      } else {
        break;
      }
      middle = low + (high - low) / 2;
    }
    send_to_list(team, slice, [&](float x, int id) {
      const Word place = place_of(x, id);
      return id < a.vocab && place >= middle && place < above;
    });
    team.await_list(static_cast<int>(inside));
    const int wanted = min(a.k - written, static_cast<int>(inside));
    if (team.rank == 0) write_best(team, static_cast<int>(inside), wanted, best, ids + written, logprobs + written);
    written += wanted;
    above = middle;
    team.sync();  // the list is free again
  }
}

}  // namespace

void token_logprobs(const Tensor& logprobs, const Tensor& ranks, const Tensor& top_ids, const Tensor& top_logprobs, const Tensor& logits,
                    const Tensor& tokens) {
  Contract c("token_logprobs");
  c.tensor("logits", logits, "SV", f32, rows);
  c.tensor("tokens", tokens, "S", i32);
  c.tensor("logprobs", logprobs, "S", f32);
  c.tensor("ranks", ranks, "S", i32);
  c.tensor("top_ids", top_ids, "SK", i32);
  c.tensor("top_logprobs", top_logprobs, "SK", f32);
  c.require(c['V'] > 0 || c['S'] == 0, "logits have no columns");
  c.require(c['V'] <= largest_vocab, "a vocabulary of %lld is larger than %d", static_cast<long long>(c['V']), largest_vocab);
  c.require(c['S'] <= 1 << 24, "%lld rows are more than 2^24", static_cast<long long>(c['S']));
  c.require(c['K'] <= c['V'], "top_ids has %lld columns, more than the vocabulary of %lld", static_cast<long long>(c['K']),
            static_cast<long long>(c['V']));
  if (c['S'] == 0) return;
  const LogprobArguments arguments = {logprobs.ptr<float>(),      ranks.ptr<int32_t>(),     top_ids.ptr<int32_t>(),
                                      top_logprobs.ptr<float>(),  logits.ptr<const float>(), tokens.ptr<const int32_t>(),
                                      logits.stride[0],           static_cast<int>(c['V']),  static_cast<int>(c['K']),  0};
  launch_rows("token_logprobs", logprobs_kernel<true>, logprobs_kernel<false>, c['S'], c['V'], arguments);
}

}  // namespace octavo::cuda
