// From logits to tokens, without sorting a vocabulary. A row is read once for the maxima of its blocks of 64 logits; most later
// passes skip every block whose maximum says that it holds nothing of interest.
//   temperature only: one pass of exp for the sums of the blocks, a walk over the sums, then one over the block that was hit;
//   top-k: the k-th largest block maximum bounds the k-th largest logit from below, so only logits above it are candidates;
//   top-p: a small set of the best logits that holds the mass is looked for from the top; the border is found by halving.
// Weights are float32 exponentials with the best token at exactly 1, summed in float64 across blocks. Invariant: one thread
// does a row, in one order, from that row's inputs alone. Ranks go by the logits themselves, ties by the lower id.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../common/check.h"
#include "../ops.h"
#include "candidates.h"
#include "parallel.h"

namespace octavo::OCTAVO_ISA {
namespace {

// Calls body(row) for every row, on several threads where that is worth it.
template <class Body>
void for_rows(int64_t rows, int64_t vocab, const Body& body) {
  if (rows * vocab >= 1 << 16) return parallel_tasks(rows, body);
  for (int64_t s = 0; s < rows; ++s) body(s);
}

struct Choice {
  float temperature, top_p, min_p;
  int64_t top_k;  // 0 is off
  double u;       // in [0, 1)
};

int64_t draw(const Row& row, const Choice& choice) {
  const Weigher weigh(row.best, choice.temperature, choice.min_p);
  const int64_t vocab = row.vocab, blocks = num_blocks(vocab);
  const bool few = choice.top_k > 0 && choice.top_k < vocab, nucleus = choice.top_p < 1;
  double* sums = static_cast<double*>(scratch(sums_slot, blocks * static_cast<int64_t>(sizeof(double))));
  double total = few ? 0 : sum_blocks(sums, row, weigh);
  if (!few && !nucleus) {
    const double target = choice.u * total;
    double running = 0;
    int64_t b = 0;
    while (b + 1 < blocks && running + sums[b] <= target) running += sums[b++];
    while (sums[b] == 0) --b;  // rounding went past the last block that holds anything
    float weights[block];
    const int64_t count = block_end(b, vocab) - b * block;
    weigh(weights, row.logits + b * block, count);
    return b * block + walk(weights, count, running, target);
  }
  Candidates candidates(vocab);
  double target = double{choice.top_p} * total;
  if (few) {
    candidates.collect(row, bound_of_best(row, choice.top_k));
    weigh(candidates.weights, candidates.logits, candidates.size);
    candidates.keep_best(choice.top_k);
    target = double{choice.top_p} * candidates.total();
  } else {
    // Tokens below `floor` weigh less than 1 - top_p of the total, all together (the slack is for rounding); far fewer often do.
    const double floor = std::log((1 - double{choice.top_p}) * total / static_cast<double>(vocab)) - 1e-3;
    for (double depth = 4;; depth += 4) {
      const double least = row.best + std::max(-depth, floor) * double{choice.temperature};
      candidates.collect(row, std::nextafter(static_cast<float>(least), -infinity));
      weigh(candidates.weights, candidates.logits, candidates.size);
      if (-depth <= floor || candidates.total() > target + 1e-6 * total) break;
    }
  }
  if (nucleus) candidates.keep_mass(target);
  total = candidates.total();
  return candidates.ids[walk(candidates.weights, candidates.size, 0, choice.u * total)];
}

// The first word of Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), counter (c0, c1, 0, 0).
uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1) {
  uint32_t c2 = 0, c3 = 0, k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

}  // namespace

void penalties(const Tensor& logits, const Tensor& counts, const Tensor& prompt_mask, const Tensor& slots, const Tensor& repetition, const Tensor& frequency,
               const Tensor& presence) {
  Contract c("penalties");
  c.tensor("logits", logits, "SV", f32, rows);
  c.tensor("counts", counts, "PV", i32, rows);
  c.tensor("prompt_mask", prompt_mask, "PV", b8, rows);
  c.tensor("slots", slots, "S", i32);
  c.tensor("repetition", repetition, "S", f32);
  c.tensor("frequency", frequency, "S", f32);
  c.tensor("presence", presence, "S", f32);
  const int64_t num_rows = c['S'], vocab = c['V'];
  const int32_t* slot = slots.ptr<const int32_t>();  // [S]
  for (int64_t s = 0; s < num_rows; ++s)
    c.require(slot[s] >= -1 && slot[s] < c['P'], "slot %d of row %lld is outside the pool of %lld", slot[s], static_cast<long long>(s),
              static_cast<long long>(c['P']));

  for_rows(num_rows, vocab, [&](int64_t s) {
    if (slot[s] < 0) return;
    float* __restrict x = logits.ptr<float>() + s * logits.stride[0];                                       // [V]
    const int32_t* __restrict count = counts.ptr<const int32_t>() + slot[s] * counts.stride[0];             // [V]
    const uint8_t* __restrict prompt = prompt_mask.ptr<const uint8_t>() + slot[s] * prompt_mask.stride[0];  // [V]
    const float factor = repetition.ptr<const float>()[s], each = frequency.ptr<const float>()[s], once = presence.ptr<const float>()[s];
    for (int64_t i = 0; i < vocab; ++i) {
      const bool said = count[i] > 0;
      const float pushed = x[i] > 0 ? x[i] / factor : x[i] * factor;
      const float y = said || prompt[i] ? pushed : x[i];
      x[i] = y - each * static_cast<float>(count[i]) - (said ? once : 0.0f);
    }
  });
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
  const float* heat = temperature.ptr<const float>();  // [S]
  const float* mass = top_p.ptr<const float>();        // [S]
  const float* least = min_p.ptr<const float>();       // [S]
  for (int64_t s = 0; s < c['S']; ++s) {
    c.require(heat[s] >= 0 && heat[s] <= FLT_MAX, "temperature %g of row %lld is not a number from 0 on", static_cast<double>(heat[s]),
              static_cast<long long>(s));
    c.require(mass[s] >= 0 && least[s] >= 0 && least[s] <= 1, "top_p %g or min_p %g of row %lld is not a share", static_cast<double>(mass[s]),
              static_cast<double>(least[s]), static_cast<long long>(s));
  }

  for_rows(c['S'], c['V'], [&](int64_t s) {
    Row row = scan(logits.ptr<const float>() + s * logits.stride[0], c['V']);
    int64_t token = -1;
    if (!row.broken && heat[s] == 0) {
      token = row.argmax();
    } else if (!row.broken) {
      if (row.best == infinity) row = scan_limit(row);
      const uint32_t word = philox(static_cast<uint64_t>(seeds.ptr<const int64_t>()[s]), static_cast<uint32_t>(positions.ptr<const int32_t>()[s]),
                                   static_cast<uint32_t>(index.ptr<const int32_t>()[s]));
      token = draw(row, {heat[s], mass[s], least[s], top_k.ptr<const int32_t>()[s], (word >> 8) * 0x1p-24});
    }
    tokens.ptr<int32_t>()[s] = static_cast<int32_t>(token);
  });
}

void token_logprobs(const Tensor& logprobs, const Tensor& ranks, const Tensor& top_ids, const Tensor& top_logprobs, const Tensor& logits,
                    const Tensor& tokens) {
  Contract c("token_logprobs");
  c.tensor("logits", logits, "SV", f32, rows);
  c.tensor("tokens", tokens, "S", i32);
  c.tensor("logprobs", logprobs, "S", f32);
  c.tensor("ranks", ranks, "S", i32);
  c.tensor("top_ids", top_ids, "SK", i32);
  c.tensor("top_logprobs", top_logprobs, "SK", f32);
  const int64_t vocab = c['V'], k = c['K'];
  c.require(vocab > 0 || c['S'] == 0, "logits have no columns");
  c.require(k <= vocab, "top_ids has %lld columns, more than the vocabulary of %lld", static_cast<long long>(k), static_cast<long long>(vocab));
  const int32_t* token = tokens.ptr<const int32_t>();  // [S]
  for (int64_t s = 0; s < c['S']; ++s)
    c.require(token[s] >= -1 && token[s] < vocab, "token %d of row %lld is outside -1 .. %lld", token[s], static_cast<long long>(s),
              static_cast<long long>(vocab - 1));

  for_rows(c['S'], vocab, [&](int64_t s) {
    const Row row = scan(logits.ptr<const float>() + s * logits.stride[0], vocab);
    int32_t* best_ids = top_ids.ptr<int32_t>() + s * k;        // [K]
    float* best_logprobs = top_logprobs.ptr<float>() + s * k;  // [K]
    float& logprob = logprobs.ptr<float>()[s] = nan;
    int32_t& place = ranks.ptr<int32_t>()[s] = 0;
    if (row.broken) {
      std::fill(best_ids, best_ids + k, -1);
      std::fill(best_logprobs, best_logprobs + k, nan);
      return;
    }
    double* sums = static_cast<double*>(scratch(sums_slot, num_blocks(vocab) * static_cast<int64_t>(sizeof(double))));
    double total = 0;
    if (row.best < infinity) total = sum_blocks(sums, row, Weigher(row.best, 1, 0));
    if (row.best == infinity) total = static_cast<double>(std::count(row.logits, row.logits + vocab, infinity));
    const double log_total = std::log(total);
    const auto log_share = [&](float x) {
      const double shifted = x == row.best ? 0 : static_cast<double>(x) - static_cast<double>(row.best);
      return static_cast<float>(shifted - log_total);
    };
    if (token[s] >= 0) {
      const float own = row.logits[token[s]];
      int32_t ahead = 0;
      for (int64_t b = 0; b < num_blocks(vocab); ++b) {
        if (row.maxima[b] < own) continue;
        for (int64_t i = b * block; i < block_end(b, vocab); ++i) ahead += (row.logits[i] > own) | ((row.logits[i] == own) & (i < token[s]));
      }
      logprob = log_share(own);
      place = ahead + 1;
    }
    if (k == 0) return;
    Candidates candidates(vocab);
    candidates.collect(row, bound_of_best(row, k));
    std::fill(candidates.weights, candidates.weights + candidates.size, 0.0f);
    candidates.keep_best(k);
    candidates.rank();
    std::sort(candidates.ranked, candidates.ranked + k, [](const Candidate& a, const Candidate& b) { return better(a, b); });
    for (int64_t i = 0; i < k; ++i) {
      best_ids[i] = candidates.ranked[i].id;
      best_logprobs[i] = log_share(candidates.ranked[i].logit);
    }
  });
}

}  // namespace octavo::OCTAVO_ISA
