// Gives the kernels of norm.cu, activation.cu and kv_cache.cu to torch: the CUDA implementations of schemas in ../bindings.cpp.
#include "bind.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(octavo, CUDA, m) {
  OCTAVO_CUDA(rms_norm);
  OCTAVO_CUDA(add_rms_norm);
  OCTAVO_CUDA(layer_norm);
  OCTAVO_CUDA(add_layer_norm);
  OCTAVO_CUDA(rms_norm_fp8);
  OCTAVO_CUDA(add_rms_norm_fp8);
  OCTAVO_CUDA(layer_norm_fp8);
  OCTAVO_CUDA(gated_activation);
  OCTAVO_CUDA(activation);
  OCTAVO_CUDA(gated_activation_fp8);
  OCTAVO_CUDA(activation_fp8);
  OCTAVO_CUDA(lookup);
  OCTAVO_CUDA(rope);
  OCTAVO_CUDA(rotate_and_cache);
  OCTAVO_CUDA(write_kv);
  OCTAVO_CUDA(gather_kv);
  OCTAVO_CUDA(copy_blocks);
  OCTAVO_CUDA(swap_blocks);
}
