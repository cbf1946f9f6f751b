// Gives the kernels of attention*.cu to torch: the CUDA implementations of schemas in ../bindings.cpp.
#include "bind.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(octavo, CUDA, m) {
  OCTAVO_CUDA(attention_plan);
  OCTAVO_CUDA(paged_attention);
}
