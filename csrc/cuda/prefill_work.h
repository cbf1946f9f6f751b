// The list of tiles that the prefill kernels work through. plan_prefill (attention_prefill.cu) writes it from the lengths, once a
// step; every prefill kernel reads it. It knows no element type and no head_dim.
//
// A tile is up to 128 packed rows of one sequence: packed row r is new token r / group and query head r % group of a KV head, so that
// all heads that share keys are in one tile and a short sequence fills it. The same list serves every KV head. Invariant: which
// sequences are in a batch decides the order of the list and nothing else.
//
//     prefill_work(work)[0]          number of tiles
//     prefill_work(work)[4 + 4 i ..] tile i: sequence, first packed row (a multiple of 128), query_start and context_len of the sequence
//
// Tiles with more keys come first, so that the last ones to finish are short.
#pragma once

#include <cstdint>

#include "attention.h"

namespace octavo::cuda {

constexpr int prefill_tile_rows = 128;
constexpr int prefill_header_ints = 4;
constexpr int prefill_tile_ints = 4;

// Most tiles that a step can have: its sequences have more than decode_queries new tokens each, and each ends in at most one tile that
// is not full. The grids of the prefill kernels are made from this, so they are the same for all lengths.
inline int64_t max_prefill_tiles(int64_t num_seqs, int64_t num_tokens, int64_t group) {
  const int64_t sequences = num_seqs < num_tokens / (decode_queries + 1) ? num_seqs : num_tokens / (decode_queries + 1);
  return num_tokens * group / prefill_tile_rows + sequences;
}

// The ints of the list within `work`, behind those of the decode list.
inline int* prefill_work(int* work, int num_seqs) { return work + decode_work_ints(num_seqs); }

}  // namespace octavo::cuda
