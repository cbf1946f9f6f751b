// paged_attention and attention_plan: checks, parameters, and which kernels take a step. It knows no kernel's inside.
//
// Sequences with 1 to decode_queries new tokens go to the decode kernel, longer ones to a prefill kernel; each skips what is the other's,
// so a mixed step launches both. Devices, types and sizes without the tensor-core instructions go to attention_simt.cu as a whole.
#include "attention.h"

#include <stdexcept>

#include "common/check.h"
#include "launch.h"
#include "ops.h"

namespace octavo::cuda {
namespace {

constexpr int64_t int_max = 0x7fffffff;

bool on_tensor_cores(const AttentionParams& p) {
  bool aligned = p.q_stride % 8 == 0;
  for (const void* pointer : {static_cast<const void*>(p.out), p.q, p.k_cache, p.v_cache}) aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return device().capability >= 80 && p.act != f32 && p.head_dim % 16 == 0 && p.head_dim <= 256 && p.block_size % 8 == 0 && aligned;
}

}  // namespace

void attention_plan(const Tensor& work, const Tensor& query_start, const Tensor& context_len, int64_t heads, int64_t kv_heads, int64_t head_dim,
                    int64_t window, int64_t max_query, int64_t max_partials) {
  Contract c("attention_plan");
  c.tensor("work", work, "W", i32);
  c.tensor("context_len", context_len, "N", i32);
  c.tensor("query_start", query_start, "P", i32);
  c.require(c['P'] == c['N'] + 1, "query_start has %lld elements for %lld sequences", static_cast<long long>(c['P']), static_cast<long long>(c['N']));
  c.require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads <= 65536, "heads = %lld is not a multiple of kv_heads = %lld",
            static_cast<long long>(heads), static_cast<long long>(kv_heads));
  c.require(head_dim > 0 && head_dim <= 65536, "head_dim = %lld", static_cast<long long>(head_dim));
  c.require(window >= 0 && window <= int_max, "window = %lld must not be negative", static_cast<long long>(window));
  c.require(max_query >= 1 && max_query <= int_max, "max_query = %lld must be at least 1", static_cast<long long>(max_query));
  c.require(max_partials >= 0, "max_partials = %lld must not be negative", static_cast<long long>(max_partials));
  if (c['N'] == 0 || device().capability < 80 || head_dim > 256) return;  // the kernel for these needs no plan
  PlanParams p = {};
  p.work = work.ptr<int>();
  p.work_size = c['W'];
  p.query_start = query_start.ptr<int>();
  p.context_len = context_len.ptr<int>();
  p.num_seqs = static_cast<int>(c['N']);
  p.heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(head_dim);
  p.window = static_cast<int>(window);
  p.max_query = static_cast<int>(max_query);
  p.max_partials = max_partials < int_max ? max_partials : int_max;
  const cudaStream_t stream = current_stream();
  plan_decode(p, stream);
  if (max_query > decode_queries) plan_prefill(p, stream);
}

void paged_attention(const Tensor& out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                     const Tensor& rows_of, const Tensor& query_start, const Tensor& context_len, double scale, int64_t window, double softcap,
                     const Tensor* alibi_slopes, double k_scale, double v_scale, const Tensor* work, const Tensor* partials, int64_t max_query) {
  Contract c("paged_attention");
  c.tensor("q", q, "TQD", f32 | f16 | bf16, rows);
  c.tensor("out", out, "TQD", q.dtype);
  c.tensor("k_cache", k_cache, "BSHD", q.dtype | e4m3);
  c.tensor("v_cache", v_cache, "BSHD", k_cache.dtype);
  c.tensor("block_tables", block_tables, "RM", i32, rows);
  c.tensor("rows", rows_of, "N", i32);
  c.tensor("context_len", context_len, "N", i32);
  c.tensor("query_start", query_start, "P", i32);
  if (alibi_slopes) c.tensor("alibi_slopes", *alibi_slopes, "Q", f32);
  if (work) c.tensor("work", *work, "W", i32);
  if (partials) c.tensor("partials", *partials, "F", f32);
  c.require(c['P'] == c['N'] + 1, "query_start has %lld elements for %lld sequences", static_cast<long long>(c['P']), static_cast<long long>(c['N']));
  c.require(c['H'] > 0 && c['Q'] % c['H'] == 0, "heads = %lld is not a multiple of kv_heads = %lld", static_cast<long long>(c['Q']),
            static_cast<long long>(c['H']));
  c.require(window >= 0 && window <= int_max, "window = %lld must not be negative", static_cast<long long>(window));
  c.require(softcap >= 0, "softcap = %g must not be negative", softcap);
  c.require(scale > 0, "scale = %g must be positive", scale);
  c.require(k_cache.dtype == e4m3 || (k_scale == 1 && v_scale == 1), "k_scale = %g and v_scale = %g, but a cache of this type has no scales", k_scale,
            v_scale);
  c.require(k_scale > 0 && v_scale > 0, "k_scale = %g and v_scale = %g, but both must be positive numbers", k_scale, v_scale);
  c.require(max_query >= 0, "max_query = %lld must not be negative", static_cast<long long>(max_query));
  c.require(c['T'] <= int_max && c['S'] <= int_max && c['D'] <= 65536 && c['Q'] <= 65536, "a dimension is too large");
  if (c['T'] == 0 || c['N'] == 0) return;

  AttentionParams p = {};
  p.out = out.data;
  p.q = q.data;
  p.k_cache = k_cache.data;
  p.v_cache = v_cache.data;
  p.block_tables = block_tables.ptr<int>();
  p.rows = rows_of.ptr<int>();
  p.query_start = query_start.ptr<int>();
  p.context_len = context_len.ptr<int>();
  p.alibi = alibi_slopes ? alibi_slopes->ptr<float>() : nullptr;
  p.work = work ? work->ptr<int>() : nullptr;
  p.work_size = work ? c['W'] : 0;
  p.partials = partials ? partials->ptr<float>() : nullptr;
  p.partials_size = partials ? c['F'] : 0;
  p.q_stride = q.stride[0];
  p.table_stride = block_tables.stride[0];
  p.num_seqs = static_cast<int>(c['N']);
  p.num_tokens = static_cast<int>(c['T']);
  p.heads = static_cast<int>(c['Q']);
  p.kv_heads = static_cast<int>(c['H']);
  p.head_dim = static_cast<int>(c['D']);
  p.block_size = static_cast<int>(c['S']);
  p.window = static_cast<int>(window);
  p.max_query = static_cast<int>(max_query > 0 && max_query < c['T'] ? max_query : c['T']);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.k_scale = static_cast<float>(k_scale);
  p.v_scale = static_cast<float>(v_scale);
  p.act = q.dtype;
  p.kv = k_cache.dtype;
  const cudaStream_t stream = current_stream();
  if (!on_tensor_cores(p)) {
    launch_simt(p, stream);
    return;
  }
  launch_decode(p, stream);
  if (p.max_query <= decode_queries) return;
  c.require(work != nullptr, "needs a work list of attention_plan when max_query = %d is above %d", p.max_query, decode_queries);
  prefill_sm90_takes(p) ? launch_prefill_sm90(p, stream) : launch_prefill(p, stream);
}

}  // namespace octavo::cuda
