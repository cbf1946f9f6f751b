// The prefill kernel for e4m3 caches: instances of attention_prefill.cuh, in a file of their own to compile beside the others.
#include "attention_prefill.cuh"

namespace octavo::cuda {

void launch_prefill_bf16_fp8(const AttentionParams& p, cudaStream_t stream) { launch_prefill_type<__nv_bfloat16, true>(p, stream); }
void launch_prefill_f16_fp8(const AttentionParams& p, cudaStream_t stream) { launch_prefill_type<__half, true>(p, stream); }

}  // namespace octavo::cuda
