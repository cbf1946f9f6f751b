// The table of contents of csrc/: every operator, declared once. bindings.cpp gives each of them its schema; a kernel file
// in cpu/ defines it. The shapes in the comments are checked by the operator itself (common/check.h), values too where a
// wrong one would read or write outside a tensor. A `const Tensor*` is optional: null when absent.
//
// There is no include guard, on purpose: the operators of the CPU exist once per instruction set, each set in a namespace of
// its name. Kernel files see one of them (OCTAVO_ISA comes from the build), bindings.cpp includes this file once for each.
#ifndef OCTAVO_ISA
#error "OCTAVO_ISA names the namespace of the instruction set: plain, avx2 or avx512"
#endif

#include <cstdint>
#include <string_view>

#include "common/tensor.h"

namespace octavo::OCTAVO_ISA {

// --- cpu/norm_act_rope.cpp: activations are float32, weights float32 | bfloat16 | float16 ---------------------------------------
void rms_norm(const Tensor& out,     // float32 [T, H] or [T, N, H]
              const Tensor& x,       // float32, shape of out; last dimension contiguous
              const Tensor& weight,  // storage [H]
              double eps, double offset);
void add_rms_norm(const Tensor& out,       // float32 [T, H]
                  const Tensor& residual,  // float32 [T, H], becomes residual + x
                  const Tensor& x,         // float32 [T, H]
                  const Tensor& weight,    // storage [H]
                  double eps, double offset);
void layer_norm(const Tensor& out,     // float32 [T, H] or [T, N, H]
                const Tensor& x,       // float32, shape of out; last dimension contiguous
                const Tensor& weight,  // storage [H]
                const Tensor* bias,    // storage [H]
                double eps);
void add_layer_norm(const Tensor& out,       // float32 [T, H]
                    const Tensor& residual,  // float32 [T, H], becomes residual + x
                    const Tensor& x,         // float32 [T, H]
                    const Tensor& weight,    // storage [H]
                    const Tensor* bias,      // storage [H]
                    double eps);
void rope(const Tensor& q,          // float32 [T, Hq, D], rotated in place; stride of dimension 0 free
          const Tensor& k,          // float32 [T, Hk, D], rotated in place; stride of dimension 0 free
          const Tensor& positions,  // int64 [T]
          const Tensor& cos_sin,    // float32 [max_pos, R]: cosines, then sines, R/2 each
          bool interleaved);
void gated_activation(const Tensor& out,  // float32 [T, d]
                      const Tensor& x,    // float32 [T, 2d]: gate, then value
                      std::string_view kind);
void activation(const Tensor& out,  // float32 [T, d]
                const Tensor& x,    // float32 [T, d]
                std::string_view kind);

// --- cpu/kv_cache.cpp ------------------------------------------------------------------------------------------------------------
void write_kv(const Tensor& key,        // float32 [T, H, D], stride of dimension 0 free
              const Tensor& value,      // float32 [T, H, D], stride of dimension 0 free
              const Tensor& k_cache,    // storage [B, S, H, D]
              const Tensor& v_cache,    // storage [B, S, H, D]
              const Tensor& slots,      // int64 [T]: block * S + offset, or -1
              double k_scale, double v_scale);  // 1: for caches of 8-bit types, which only CUDA has
void gather_kv(const Tensor& key,       // float32 [T, H, D]
               const Tensor& value,     // float32 [T, H, D]
               const Tensor& k_cache,   // storage [B, S, H, D]
               const Tensor& v_cache,   // storage [B, S, H, D]
               const Tensor& slots,     // int64 [T]; -1 gives zeros
               double k_scale, double v_scale);  // 1
void copy_blocks(const Tensor& kv,      // any [L, 2, B, S, H, D]
                 const Tensor& pairs);  // int32 [N, 2]: source, destination; destinations are disjoint from sources
void swap_blocks(const Tensor& src,     // any [L, 2, A, S, H, D]
                 const Tensor& dst,     // same dtype [L, 2, B, S, H, D]
                 const Tensor& pairs);  // int32 [N, 2]: block of src, block of dst

// --- cpu/attention.cpp -----------------------------------------------------------------------------------------------------------
void paged_attention(const Tensor& out,           // float32 [T, Q, D]
                     const Tensor& q,             // float32 [T, Q, D], stride of dimension 0 free
                     const Tensor& k_cache,       // storage [B, S, H, D]
                     const Tensor& v_cache,       // storage [B, S, H, D]
                     const Tensor& block_tables,  // int32 [R, M]
                     const Tensor& rows,          // int32 [N]
                     const Tensor& query_start,   // int32 [N + 1]
                     const Tensor& context_len,   // int32 [N]
                     double scale, int64_t window, double softcap,
                     const Tensor* alibi_slopes,  // float32 [Q]
                     double k_scale, double v_scale,  // 1
                     const Tensor* work, const Tensor* partials, int64_t max_query);  // for CUDA; not read here

// --- cpu/gemm.cpp ----------------------------------------------------------------------------------------------------------------
void pack_linear(const Tensor& packed,   // storage [P, K, 32], P = ceil(N / 32): bindings.cpp allocates it
                 const Tensor& weight);  // same dtype [N, K]
void linear(const Tensor& out,           // float32 [M, n], stride of dimension 0 free
            const Tensor& x,             // float32 [M, K], stride of dimension 0 free
            const Tensor& packed,        // storage [P, K, 32]
            const Tensor* bias,          // float32 [n]
            int64_t n);
void embedding(const Tensor& out,     // float32 [T, K]
               const Tensor& ids,     // int64 [T], in [0, n)
               const Tensor& packed,  // storage [P, K, 32]
               int64_t n);

// --- cpu/sampling.cpp ------------------------------------------------------------------------------------------------------------
void penalties(const Tensor& logits,             // float32 [S, V], changed in place
               const Tensor& counts,             // int32 [P, V]
               const Tensor& prompt_mask,        // bool [P, V]
               const Tensor& slots,              // int32 [S]: index into P, or -1
               const Tensor& repetition,         // float32 [S]
               const Tensor& frequency,          // float32 [S]
               const Tensor& presence);          // float32 [S]
void sample(const Tensor& tokens,                // int32 [S]
            const Tensor& logits,                // float32 [S, V]
            const Tensor& temperature,           // float32 [S]
            const Tensor& top_k,                 // int32 [S]
            const Tensor& top_p,                 // float32 [S]
            const Tensor& min_p,                 // float32 [S]
            const Tensor& seeds,                 // int64 [S]
            const Tensor& index,                 // int32 [S]
            const Tensor& positions);            // int32 [S]
void token_logprobs(const Tensor& logprobs,      // float32 [S]
                    const Tensor& ranks,         // int32 [S]
                    const Tensor& top_ids,       // int32 [S, k]
                    const Tensor& top_logprobs,  // float32 [S, k]
                    const Tensor& logits,        // float32 [S, V]
                    const Tensor& tokens);       // int32 [S]

}  // namespace octavo::OCTAVO_ISA
