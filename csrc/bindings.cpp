// The one place where torch and the kernels meet: TORCH_LIBRARY(octavo) with one schema line per operator, and for each its CPU
// implementation under the same name. Only torch's stable C++ interface is used and no Python, so one binary serves every
// torch from 2.11 on and every Python. Operators write into tensors they are given and return nothing; the exceptions are
// pack_linear (its caller cannot know the padding) and isa/set_isa.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/isa.h"
#include "common/unbox.h"
#include "cpu/parallel.h"

// With an instruction set other than x86 there is only `plain`, and the other names stand for it.
#define OCTAVO_ISA plain
#include "ops.h"
#undef OCTAVO_ISA
#ifdef OCTAVO_X86
#define OCTAVO_ISA avx2
#include "ops.h"
#undef OCTAVO_ISA
#define OCTAVO_ISA avx512
#include "ops.h"
#undef OCTAVO_ISA
#else
namespace octavo {
namespace avx2 = plain;
namespace avx512 = plain;
}  // namespace octavo
#endif

namespace octavo {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

namespace {

// One operator in all its instruction sets, callable by the dispatcher.
template <auto plain, auto avx2, auto avx512, class Signature = decltype(plain)>
struct Operator;

template <auto plain, auto avx2, auto avx512, class... Parameters>
struct Operator<plain, avx2, avx512, void (*)(Parameters...)> {
  static void call(typename Unboxed<Parameters>::type... arguments) {
    const auto kernel = isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : plain;
    kernel(Unboxed<Parameters>{arguments}.get()...);
  }
};

Handle pack_linear(Handle weight) {
  const Tensor t = view(weight);
  Contract c("pack_linear");
  c.tensor("weight", t, "NK", storage_types, rows);
  const int64_t shape[] = {(c['N'] + 31) / 32, c['K'], 32};
  Handle packed = torch::stable::new_empty(weight, {shape, 3});
  Operator<&plain::pack_linear, &avx2::pack_linear, &avx512::pack_linear>::call(packed, weight);
  return packed;
}

std::string get_isa() { return isa_name(); }

std::string force_isa(std::string name) {
  set_isa(name);
  return isa_name();
}

}  // namespace
}  // namespace octavo

STABLE_TORCH_LIBRARY(octavo, m) {
  m.def("rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps, float offset) -> ()");
  m.def("add_rms_norm(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, float eps, float offset) -> ()");
  m.def("layer_norm(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, float eps) -> ()");
  m.def("add_layer_norm(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, Tensor? bias, float eps) -> ()");
  m.def("rope(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin, bool interleaved) -> ()");
  m.def("gated_activation(Tensor(a!) out, Tensor x, str kind) -> ()");
  m.def("activation(Tensor(a!) out, Tensor x, str kind) -> ()");

  m.def("write_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
      "float k_scale=1.0, float v_scale=1.0) -> ()");
  m.def("gather_kv(Tensor(a!) key, Tensor(b!) value, Tensor k_cache, Tensor v_cache, Tensor slots, "
      "float k_scale=1.0, float v_scale=1.0) -> ()");
  m.def("copy_blocks(Tensor(a!) kv, Tensor pairs) -> ()");
  m.def("swap_blocks(Tensor src, Tensor(a!) dst, Tensor pairs) -> ()");

  m.def(
      "paged_attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor rows, "
      "Tensor query_start, Tensor context_len, float scale, int window, float softcap, Tensor? alibi_slopes, "
      "float k_scale=1.0, float v_scale=1.0, Tensor(b!)? work=None, Tensor(c!)? partials=None, int max_query=0) -> ()");

  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("linear(Tensor(a!) out, Tensor x, Tensor packed, Tensor? bias, int n) -> ()");
  m.def("embedding(Tensor(a!) out, Tensor ids, Tensor packed, int n) -> ()");

  m.def(
      "penalties(Tensor(a!) logits, Tensor counts, Tensor prompt_mask, Tensor slots, Tensor repetition, Tensor frequency, "
      "Tensor presence) -> ()");
  m.def(
      "sample(Tensor(a!) tokens, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
      "Tensor index, Tensor positions) -> ()");
  m.def(
      "token_logprobs(Tensor(a!) logprobs, Tensor(b!) ranks, Tensor(c!) top_ids, Tensor(d!) top_logprobs, Tensor logits, "
      "Tensor tokens) -> ()");

  // Operators of the GPU alone: cuda/bindings_*.cpp has their kernels.
  m.def("rms_norm_fp8(Tensor(a!) out, Tensor(b!) scale, Tensor x, Tensor weight, float eps, float offset) -> ()");
  m.def(
      "add_rms_norm_fp8(Tensor(a!) out, Tensor(b!) scale, Tensor(c!) residual, Tensor x, Tensor weight, float eps, float offset) -> ()");
  m.def("layer_norm_fp8(Tensor(a!) out, Tensor(b!) scale, Tensor x, Tensor weight, Tensor? bias, float eps) -> ()");
  m.def("gated_activation_fp8(Tensor(a!) out, Tensor(b!) scale, Tensor x, str kind) -> ()");
  m.def("activation_fp8(Tensor(a!) out, Tensor(b!) scale, Tensor x, str kind) -> ()");
  m.def("lookup(Tensor(a!) out, Tensor ids, Tensor table) -> ()");
  m.def(
      "rotate_and_cache(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor slots, Tensor positions, "
      "Tensor? cos_sin, bool interleaved, Tensor? q_weight, Tensor? k_weight, float eps, float offset, float k_scale=1.0, "
      "float v_scale=1.0) -> ()");
  m.def(
      "attention_plan(Tensor(a!) work, Tensor query_start, Tensor context_len, int heads, int kv_heads, int head_dim, int window, "
      "int max_query, int max_partials) -> ()");
  m.def("skinny_linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor(b!) scratch) -> ()");
  m.def("skinny_gated(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, str kind, Tensor(b!) scratch) -> ()");
  m.def(
      "norm_linear(Tensor(a!) out, Tensor(b!) total, Tensor residual, Tensor delta, Tensor norm_weight, float eps, float offset, "
      "Tensor weight, Tensor? bias, Tensor(c!) scratch) -> ()");
  m.def(
      "norm_gated(Tensor(a!) out, Tensor(b!) total, Tensor residual, Tensor delta, Tensor norm_weight, float eps, float offset, "
      "Tensor weight, Tensor? bias, str kind, Tensor(c!) scratch) -> ()");
  m.def("tile_linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias) -> ()");
  m.def("tile_gated(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, str kind) -> ()");
  m.def("count_tokens(Tensor(a!) counts, Tensor slots, Tensor tokens) -> ()");
  m.def(
      "begin_step(Tensor staging, Tensor(a!) block_tables, Tensor(b!) last_token, Tensor(c!) parameters, Tensor(d!) ids, "
      "Tensor(e!) positions, Tensor(f!) slots, Tensor(g!) rows, Tensor(h!) query_start, Tensor(i!) context_len, Tensor(j!) sample_ints, "
      "Tensor(k!) sample_floats, Tensor(l!) sample_seeds, Tensor(m!) result_slot, int block_size) -> ()");
  m.def("end_step(Tensor tokens, Tensor samples, Tensor(a!) last_token, Tensor(b!) results, Tensor result_slot) -> ()");

  m.def("isa() -> str");
  m.def("set_isa(str name) -> str");
}

#define OCTAVO_CPU(name) m.impl(#name, TORCH_BOX((&octavo::Operator<&octavo::plain::name, &octavo::avx2::name, &octavo::avx512::name>::call)))

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  OCTAVO_CPU(rms_norm);
  OCTAVO_CPU(add_rms_norm);
  OCTAVO_CPU(layer_norm);
  OCTAVO_CPU(add_layer_norm);
  OCTAVO_CPU(rope);
  OCTAVO_CPU(gated_activation);
  OCTAVO_CPU(activation);
  OCTAVO_CPU(write_kv);
  OCTAVO_CPU(gather_kv);
  OCTAVO_CPU(copy_blocks);
  OCTAVO_CPU(swap_blocks);
  OCTAVO_CPU(paged_attention);
  OCTAVO_CPU(linear);
  OCTAVO_CPU(embedding);
  OCTAVO_CPU(penalties);
  OCTAVO_CPU(sample);
  OCTAVO_CPU(token_logprobs);
  m.impl("pack_linear", TORCH_BOX(&octavo::pack_linear));
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CompositeExplicitAutograd, m) {  // no tensor argument names a device
  m.impl("isa", TORCH_BOX(&octavo::get_isa));
  m.impl("set_isa", TORCH_BOX(&octavo::force_isa));
}
