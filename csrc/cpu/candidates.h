// What a sampler needs to find the few logits of a row that matter, without sorting a vocabulary: the maxima of blocks of 64
// logits, weights, and sets of candidates that are cut to the best k or to the best that hold a mass. It does not know
// parameters, seeds or requests. Invariant: everything is computed by one thread, in one order, from one row; ranks go by the
// logits themselves, ties by the lower id. Results live in the thread's scratch buffers until the next row.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "vec.h"

namespace octavo::OCTAVO_ISA {
namespace {

constexpr int64_t block = 64;
static_assert(block % lanes == 0, "a whole block is a whole number of vectors");
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

enum Slot { maxima_slot, sums_slot, candidates_slot, row_slot };  // buffers of a thread, see scratch()

int64_t num_blocks(int64_t vocab) { return (vocab + block - 1) / block; }
int64_t block_end(int64_t b, int64_t vocab) { return std::min((b + 1) * block, vocab); }

// A row of logits with the largest one of each block.
struct Row {
  const float* logits;  // [vocab]
  int64_t vocab;
  float* maxima;  // [num_blocks(vocab)]
  float best;
  bool broken;  // a NaN, or no finite logit

  // The first token with the largest logit.
  int64_t argmax() const {
    int64_t b = 0;
    while (maxima[b] != best) ++b;
    int64_t i = b * block;
    while (logits[i] != best) ++i;
    return i;
  }
};

Row scan(const float* logits, int64_t vocab) {
  const int64_t blocks = num_blocks(vocab), whole = vocab / block;
  Row row{logits, vocab, static_cast<float*>(scratch(maxima_slot, 2 * blocks * static_cast<int64_t>(sizeof(float)))), -infinity, false};
  const Vec low = broadcast(-FLT_MAX), high = broadcast(FLT_MAX), zero = broadcast(0);
  Vec poison = zero;  // stays 0 until a NaN comes by, which multiplication by 0 keeps; infinities are clipped before
  for (int64_t b = 0; b < whole; ++b) {
    const float* x = logits + b * block;
    Vec top = broadcast(-infinity);
    for (int i = 0; i < block; i += lanes) {
      const Vec v = load(x + i);
      poison = fma(max(low, min(high, v)), zero, poison);
      top = max(v, top);
    }
    row.maxima[b] = reduce_max(top);
    row.best = std::max(row.best, row.maxima[b]);
  }
  row.broken = reduce_add(poison) != 0;  // NaN differs from everything
  if (whole < blocks) {
    float top = -infinity;
    for (int64_t i = whole * block; i < vocab; ++i) {
      row.broken |= logits[i] != logits[i];
      top = std::max(top, logits[i]);
    }
    row.maxima[whole] = top;
    row.best = std::max(row.best, top);
  }
  if (row.best == -infinity) row.broken = true;
  if (row.best == infinity && !row.broken) {
    bool finite = false;
    for (int64_t i = 0; i < vocab; ++i) finite |= std::abs(logits[i]) <= FLT_MAX;
    row.broken = !finite;
  }
  return row;
}

// A row whose best logit is +inf, as the limit of a large one: 0 where it is reached, -inf elsewhere.
Row scan_limit(const Row& row) {
  float* limit = static_cast<float*>(scratch(row_slot, row.vocab * static_cast<int64_t>(sizeof(float))));
  for (int64_t i = 0; i < row.vocab; ++i) limit[i] = row.logits[i] == infinity ? 0.0f : -infinity;
  return scan(limit, row.vocab);
}

// weights[i] = exp((logits[i] - best) / temperature), 0 where below min_p; exactly 1 for the best logit.
struct Weigher {
  Vec best, inverse, least;

  Weigher(float best_logit, float temperature, float min_p)
      : best(broadcast(best_logit)), inverse(broadcast(std::min(1.0f / temperature, FLT_MAX))), least(broadcast(min_p)) {}
  Vec operator()(Vec x) const {
    const Vec w = exp((x - best) * inverse);
    return select(less(w, least), broadcast(0), w);
  }
  // Returns the sum, in one order for one length.
  float operator()(float* weights, const float* logits, int64_t count) const {  // [count], [count]
    Vec sum = broadcast(0);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const Vec w = (*this)(load(logits + i));
      store(weights + i, w);
      sum = sum + w;
    }
    if (i < count) {
      const Vec w = select(first(count - i), (*this)(load(logits + i, count - i)), broadcast(0));
      store(weights + i, w, count - i);
      sum = sum + w;
    }
    return reduce_add(sum);
  }
};

// Sums of the weights of each block; returns their total.
double sum_blocks(double* sums, const Row& row, const Weigher& weigh) {  // [num_blocks]
  float weights[block];
  double total = 0;
  for (int64_t b = 0; b < num_blocks(row.vocab); ++b) {
    sums[b] = weigh(weights, row.logits + b * block, block_end(b, row.vocab) - b * block);
    total += sums[b];
  }
  return total;
}

// The first of `count` weights whose running sum, begun at `running`, exceeds `target`; else the last one above zero.
int64_t walk(const float* weights, int64_t count, double running, double target) {
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] == 0) continue;
    running += weights[i];
    last = i;
    if (running > target) break;
  }
  return last;
}

struct Candidate {
  float logit, weight;
  int32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// Tokens in ascending order of ids; `ranked` is room to reorder them in.
struct Candidates {
  float* logits;      // [size]
  float* weights;     // [size]
  int32_t* ids;       // [size]
  Candidate* ranked;  // [size]
  int64_t size = 0;

  explicit Candidates(int64_t capacity) {
    char* room = static_cast<char*>(scratch(candidates_slot, capacity * static_cast<int64_t>(3 * sizeof(float) + sizeof(Candidate))));
    logits = reinterpret_cast<float*>(room);
    weights = logits + capacity;
    ids = reinterpret_cast<int32_t*>(weights + capacity);
    ranked = reinterpret_cast<Candidate*>(ids + capacity);
  }

  // All tokens with a logit of at least `least`.
  void collect(const Row& row, float least) {
    size = 0;
    for (int64_t b = 0; b < num_blocks(row.vocab); ++b) {
      if (row.maxima[b] < least) continue;
      for (int64_t i = b * block; i < block_end(b, row.vocab); ++i) {
        logits[size] = row.logits[i];
        ids[size] = static_cast<int32_t>(i);
        size += row.logits[i] >= least;
      }
    }
  }

  void rank() {
    for (int64_t i = 0; i < size; ++i) ranked[i] = {logits[i], weights[i], ids[i]};
  }

  // Keeps what is not worse than `border`; ids stay in ascending order.
  void cut(const Candidate& border) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Candidate c{logits[i], weights[i], ids[i]};
      logits[kept] = c.logit;
      weights[kept] = c.weight;
      ids[kept] = c.id;
      kept += !better(border, c);
    }
    size = kept;
  }

  void keep_best(int64_t k) {
    if (size <= k) return;
    rank();
    std::nth_element(ranked, ranked + k - 1, ranked + size, [](const Candidate& a, const Candidate& b) { return better(a, b); });
    cut(ranked[k - 1]);
  }

  // Keeps the fewest best ones whose weights reach `target`: halves the range in which the last of them lies.
  void keep_mass(double target) {
    rank();
    int64_t low = 0, high = size;
    double before = 0;  // of [0, low), which does not reach the target
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      std::nth_element(ranked + low, ranked + middle, ranked + high, [](const Candidate& a, const Candidate& b) { return better(a, b); });
      double mass = 0;
      for (int64_t i = low; i < middle; ++i) mass += ranked[i].weight;
      if (before + mass >= target) {
        high = middle;
      } else {
        before += mass;
        low = middle;
      }
    }
    cut(ranked[low]);
  }

  double total() const {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += weights[i];
    return sum;
  }
};

// A logit that at least k tokens reach, not far below the k-th best one; -inf where k is too large to tell cheaply.
float bound_of_best(const Row& row, int64_t k) {
  const int64_t blocks = num_blocks(row.vocab);
  if (k > blocks) return -infinity;
  float* copy = row.maxima + blocks;
  std::copy(row.maxima, row.maxima + blocks, copy);
  std::nth_element(copy, copy + k - 1, copy + blocks, [](float a, float b) { return a > b; });
  return copy[k - 1];
}

}  // namespace
}  // namespace octavo::OCTAVO_ISA
