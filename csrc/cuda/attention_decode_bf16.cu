// The decode kernel for bfloat16: instances of attention_decode.cuh, in a file of their own to compile beside the others.
#include "attention_decode_launch.cuh"

namespace octavo::cuda {

void launch_decode_bf16(const AttentionParams& p, const DecodeLaunch& d, cudaStream_t stream) {
  launch_decode_instance<__nv_bfloat16, false>(p, d, stream);
}

}  // namespace octavo::cuda
