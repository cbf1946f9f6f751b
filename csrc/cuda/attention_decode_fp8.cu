// The decode kernel for e4m3 caches: instances of attention_decode.cuh, in a file of their own to compile beside the others.
#include "attention_decode_launch.cuh"

namespace octavo::cuda {

void launch_decode_fp8(const AttentionParams& p, const DecodeLaunch& d, cudaStream_t stream) {
  launch_decode_instance<__half, true>(p, d, stream);
}

}  // namespace octavo::cuda
