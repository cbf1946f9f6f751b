// What the attention kernels share: their parameters and the layout of the work list. attention.cu checks an operator's tensors,
// fills the parameters and chooses kernels; attention_decode.cu takes the sequences with 1 to decode_queries new tokens,
// attention_prefill.cu (attention_prefill_sm90.cu on Hopper) those with more, attention_simt.cu everything on devices or types
// without the tensor-core instructions the others need.
//
// A context is cut into partitions of `partition` tokens, counted from its start. Invariant of the decode kernel: a partition's result
// depends on the query and its keys alone, and partitions are merged left to right, whether one thread block walks them in
// sequence or many do; so a sequence's output does not depend, by one bit, on what else is in the batch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/tensor.h"

namespace octavo::cuda {

constexpr int partition = 256;     // tokens
constexpr int decode_queries = 8;  // most new tokens of a sequence that the decode kernel takes

struct AttentionParams {
  void* out;                // act [T, Q, D], contiguous
  const void* q;            // act [T, Q, D], rows q_stride elements apart
  const void* k_cache;      // kv [B, S, H, D], contiguous
  const void* v_cache;      // kv [B, S, H, D], contiguous
  const int* block_tables;  // [R, M], rows table_stride apart
  const int* rows;          // [N]
  const int* query_start;   // [N + 1]
  const int* context_len;   // [N]
  const float* alibi;       // [Q] or null
  int* work;                // of attention_plan
  int64_t work_size;        // ints
  float* partials;
  int64_t partials_size;  // floats
  int64_t q_stride, table_stride;
  int num_seqs, num_tokens, heads, kv_heads, head_dim, block_size, window, max_query;
  float scale, softcap, k_scale, v_scale;
  DType act, kv;
};

struct PlanParams {
  int* work;
  int64_t work_size;
  const int* query_start;
  const int* context_len;
  int num_seqs, num_tokens, heads, kv_heads, head_dim, window, max_query;
  int64_t max_partials;  // partial results that `partials` has room for
};

// Each returns after launching; the caller checks for errors. num_sms and the compute capability come from launch.cuh.
void plan_decode(const PlanParams& p, cudaStream_t stream);
void plan_prefill(const PlanParams& p, cudaStream_t stream);
void launch_decode(const AttentionParams& p, cudaStream_t stream);
void launch_prefill(const AttentionParams& p, cudaStream_t stream);
bool prefill_sm90_takes(const AttentionParams& p);  // compiled for the device and for these types, sizes and features
void launch_prefill_sm90(const AttentionParams& p, cudaStream_t stream);
void launch_simt(const AttentionParams& p, cudaStream_t stream);

// work[0 .. decode_ints) belongs to the decode list, the rest to the prefill list. ops/attention.py computes the same sizes.
int64_t decode_work_ints(int num_seqs);
int64_t prefill_work_ints(int num_seqs, int num_tokens);

}  // namespace octavo::cuda
