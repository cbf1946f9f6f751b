// The prefill kernel for float16 queries and caches: instances of attention_prefill.cuh, in a file of their own to compile beside the others.
#include "attention_prefill.cuh"

namespace octavo::cuda {

void launch_prefill_f16(const AttentionParams& p, cudaStream_t stream) { launch_prefill_type<__half, false>(p, stream); }

}  // namespace octavo::cuda
