// Gives the kernels of sampling.cu to torch: the CUDA implementations of schemas in ../bindings.cpp.
#include "bind.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(octavo, CUDA, m) {
  OCTAVO_CUDA(penalties);
  OCTAVO_CUDA(count_tokens);
  OCTAVO_CUDA(sample);
  OCTAVO_CUDA(token_logprobs);
}
