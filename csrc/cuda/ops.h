// The table of contents of csrc/cuda: every operator that has a CUDA kernel, declared once. A bindings_*.cpp file gives each of
// them to torch under the schema in bindings.cpp; a .cu file defines it as check, choose, launch, in this order, on the stream that
// torch has made current. Invariants: an operator allocates nothing and never waits for the device, so that it can be captured into
// a graph; offsets are 64-bit; shapes in the comments are checked by the operator itself, values that lie on the device are not.
//
// act: float32 | float16 | bfloat16, one of them in a call. kv: the type of the cache, act or e4m3. A `const Tensor*` is optional.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/tensor.h"

namespace octavo::cuda {

// --- norm.cu: one row, one fixed tree -----------------------------------------------------------------------------------------------
void rms_norm(const Tensor& out,     // act [T, H] or [T, N, H]
              const Tensor& x,       // act, shape of out; last dimension contiguous; out may be x
              const Tensor& weight,  // storage [H]
              double eps, double offset);
void add_rms_norm(const Tensor& out,       // act [T, H]
                  const Tensor& residual,  // float32 or act [T, H], becomes residual + x
                  const Tensor& x,         // act [T, H]
                  const Tensor& weight,    // storage [H]
                  double eps, double offset);
void layer_norm(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps);
void add_layer_norm(const Tensor& out, const Tensor& residual, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps);
// The same, rounded to e4m3 with one scale a row: scale = max |row| / 448 (1 for a row of zeros), out = row / scale.
void rms_norm_fp8(const Tensor& out,    // e4m3 [T, H]
                  const Tensor& scale,  // float32 [T], written
                  const Tensor& x, const Tensor& weight, double eps, double offset);
void add_rms_norm_fp8(const Tensor& out, const Tensor& scale, const Tensor& residual, const Tensor& x, const Tensor& weight, double eps,
                      double offset);
void layer_norm_fp8(const Tensor& out, const Tensor& scale, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps);

// --- activation.cu ------------------------------------------------------------------------------------------------------------------
void gated_activation(const Tensor& out,  // act [T, d]
                      const Tensor& x,    // act [T, 2d]: gate, then value
                      std::string_view kind);
void activation(const Tensor& out, const Tensor& x, std::string_view kind);
void gated_activation_fp8(const Tensor& out,    // e4m3 [T, d]
                          const Tensor& scale,  // float32 [T], written
                          const Tensor& x, std::string_view kind);
void activation_fp8(const Tensor& out, const Tensor& scale, const Tensor& x, std::string_view kind);
void lookup(const Tensor& out,     // act or float32 [T, K]
            const Tensor& ids,     // int64 [T]; an id outside [0, n) gives zeros
            const Tensor& table);  // storage [n, K]

// --- kv_cache.cu --------------------------------------------------------------------------------------------------------------------
void rope(const Tensor& q,          // act [T, Hq, D], rotated in place; stride of dimension 0 free
          const Tensor& k,          // act [T, Hk, D]
          const Tensor& positions,  // int64 [T]
          const Tensor& cos_sin,    // float32 [max_pos, R]: cosines, then sines, R/2 each
          bool interleaved);
// [qk-norm,] [rotation,] write to the cache, in one launch. q is changed in place; what k holds afterwards is not defined.
void rotate_and_cache(const Tensor& q,          // act [T, Hq, D]; stride of dimension 0 free in q, k, v
                      const Tensor& k,          // act [T, Hk, D]
                      const Tensor& v,          // act [T, Hk, D]
                      const Tensor& k_cache,    // kv [B, S, Hk, D]
                      const Tensor& v_cache,    // kv [B, S, Hk, D]
                      const Tensor& slots,      // int64 [T]: block * S + offset, or -1
                      const Tensor& positions,  // int64 [T]
                      const Tensor* cos_sin,    // float32 [max_pos, R]; absent: no rotation
                      bool interleaved,
                      const Tensor* q_weight,  // float32 [D]: RMS norm of every head before the rotation; both or neither
                      const Tensor* k_weight,  // float32 [D]
                      double eps, double offset,
                      double k_scale, double v_scale);  // e4m3 caches hold key / k_scale and value / v_scale; else 1
void write_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, double k_scale,
              double v_scale);
void gather_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, double k_scale,
               double v_scale);
void copy_blocks(const Tensor& kv,      // any [L, 2, B, S, H, D]
                 const Tensor& pairs);  // int32 [N, 2] in host memory: source, destination; destinations are disjoint from sources
void swap_blocks(const Tensor& src,     // any [L, 2, A, S, H, D]; src and dst: the device, or pinned host memory
                 const Tensor& dst,     // same dtype [L, 2, B, S, H, D]
                 const Tensor& pairs);  // int32 [N, 2] in host memory: block of src, block of dst

// --- attention.cu (entry), attention_decode.cu, attention_prefill.cu, attention_prefill_sm90.cu, attention_simt.cu -------------------
// Lists of work for one step and one window, made on the device from the lengths; every layer with that window uses them.
void attention_plan(const Tensor& work,         // int32 [W], written; W >= the size that ops/attention.py computes
                    const Tensor& query_start,  // int32 [N + 1]
                    const Tensor& context_len,  // int32 [N]; 0: the entry is padding and gets no work
                    int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window, int64_t max_query, int64_t max_partials);
void paged_attention(const Tensor& out,           // act [T, Q, D]; rows of no sequence are left alone
                     const Tensor& q,             // act [T, Q, D], stride of dimension 0 free
                     const Tensor& k_cache,       // kv [B, S, H, D]
                     const Tensor& v_cache,       // kv [B, S, H, D]
                     const Tensor& block_tables,  // int32 [R, M]
                     const Tensor& rows,          // int32 [N]
                     const Tensor& query_start,   // int32 [N + 1]
                     const Tensor& context_len,   // int32 [N]
                     double scale, int64_t window, double softcap,
                     const Tensor* alibi_slopes,  // float32 [Q]
                     double k_scale, double v_scale,
                     const Tensor* work,      // int32 [W] of attention_plan for this window
                     const Tensor* partials,  // float32 [P]: results of partitions that wait to be merged
                     int64_t max_query);      // no sequence has more new tokens; decides which kernels are launched

// --- gemm_skinny.cu: 1 to 64 rows; K is split at places that depend on the weight's shape alone ------------------------------------
int64_t skinny_scratch_floats();  // elements of `scratch` that are enough for every shape; norm_linear and norm_gated ask for them
void skinny_linear(const Tensor& out,     // act or float32 [M, N]; stride of dimension 0 free
                   const Tensor& x,       // act [M, K]; stride of dimension 0 free
                   const Tensor& weight,  // act [N, K]
                   const Tensor* bias,    // float32 [N]
                   const Tensor& scratch);  // float32 [S]: zeros in its counters, left as found
void skinny_gated(const Tensor& out,     // act [M, I] = activation(x @ weight[:I].T) * (x @ weight[I:].T)
                  const Tensor& x,       // act [M, K]
                  const Tensor& weight,  // act [2 I, K]
                  const Tensor* bias,    // float32 [2 I]
                  std::string_view kind, const Tensor& scratch);
// With the addition and the norm before it: x = rms_norm(residual + delta), and total = residual + delta is written once.
void norm_linear(const Tensor& out,       // act [M, N]
                 const Tensor& total,     // float32 [M, K], written; another tensor than residual
                 const Tensor& residual,  // float32 [M, K]
                 const Tensor& delta,     // act [M, K]
                 const Tensor& norm_weight,  // float32 [K]
                 double eps, double offset, const Tensor& weight, const Tensor* bias, const Tensor& scratch);
void norm_gated(const Tensor& out, const Tensor& total, const Tensor& residual, const Tensor& delta, const Tensor& norm_weight, double eps,
                double offset, const Tensor& weight, const Tensor* bias, std::string_view kind, const Tensor& scratch);

// --- gemm_tile_sm90.cu: 1 to 128 rows, on compute capability 9.0 alone (it refuses others); K is split by the weight's shape alone -----
void tile_linear(const Tensor& out,     // act or float32 [M, N]; stride of dimension 0 free
                 const Tensor& x,       // act [M, K], float16 or bfloat16; stride of dimension 0 free
                 const Tensor& weight,  // act [N, K]
                 const Tensor* bias);   // float32 [N]
void tile_gated(const Tensor& out,     // act [M, I] = activation(x @ weight[:I].T) * (x @ weight[I:].T); I a multiple of 8
                const Tensor& x,       // act [M, K]
                const Tensor& weight,  // act [2 I, K]
                const Tensor* bias,    // float32 [2 I]
                std::string_view kind);

// --- sampling.cu: contracts as in ops/reference.py -----------------------------------------------------------------------------------
void penalties(const Tensor& logits, const Tensor& counts, const Tensor& prompt_mask, const Tensor& slots, const Tensor& repetition,
               const Tensor& frequency, const Tensor& presence);
void count_tokens(const Tensor& counts,   // int32 [P, V]
                  const Tensor& slots,    // int32 [S]; -1: the row is not counted
                  const Tensor& tokens);  // int32 [S]; below 0: not counted
void sample(const Tensor& tokens,       // int32 [S]
            const Tensor& logits,       // float32 [S, V]
            const Tensor& temperature,  // float32 [S]
            const Tensor& top_k,        // int32 [S]
            const Tensor& top_p,        // float32 [S]
            const Tensor& min_p,        // float32 [S]
            const Tensor& seeds,        // int64 [S]
            const Tensor& index,        // int32 [S]
            const Tensor& positions);   // int32 [S]
void token_logprobs(const Tensor& logprobs, const Tensor& ranks, const Tensor& top_ids, const Tensor& top_logprobs, const Tensor& logits,
                    const Tensor& tokens);

// --- step.cu: the layout of staging is written there --------------------------------------------------------------------------------
void begin_step(const Tensor& staging,        // int32 [X]: what the host sends for a step
                const Tensor& block_tables,   // int32 [R, M], changed
                const Tensor& last_token,     // int32 [R], changed
                const Tensor& parameters,     // int32 [R, 8], changed: bits of temperature, top_k, top_p, min_p, seed, index
                const Tensor& ids,            // int64 [T], written; so are all that follow
                const Tensor& positions,      // int64 [T]
                const Tensor& slots,          // int64 [T]
                const Tensor& rows,           // int32 [N]
                const Tensor& query_start,    // int32 [N + 1]
                const Tensor& context_len,    // int32 [N]
                const Tensor& sample_ints,    // int32 [5, R]: row, source, place, top_k, index
                const Tensor& sample_floats,  // float32 [3, R]: temperature, top_p, min_p
                const Tensor& sample_seeds,   // int64 [R]
                const Tensor& result_slot,    // int32 [1]
                int64_t block_size);
void end_step(const Tensor& tokens,        // int32 [S]: what sampling chose
              const Tensor& samples,       // int32 [S]: its row; -1: nobody's
              const Tensor& last_token,    // int32 [R], written
              const Tensor& results,       // int32 [slots, R] in pinned host memory, written
              const Tensor& result_slot);  // int32 [1]

}  // namespace octavo::cuda
