// Gives the kernels of gemm_skinny.cu and gemm_tile_sm90.cu to torch: the CUDA implementations of schemas in ../bindings.cpp.
#include "bind.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(octavo, CUDA, m) {
  OCTAVO_CUDA(skinny_linear);
  OCTAVO_CUDA(skinny_gated);
  OCTAVO_CUDA(norm_linear);
  OCTAVO_CUDA(norm_gated);
  OCTAVO_CUDA(tile_linear);
  OCTAVO_CUDA(tile_gated);
}
