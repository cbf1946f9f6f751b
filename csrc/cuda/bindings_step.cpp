// Gives the kernels of step.cu to torch: the CUDA implementations of schemas in ../bindings.cpp.
#include "bind.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(octavo, CUDA, m) {
  OCTAVO_CUDA(begin_step);
  OCTAVO_CUDA(end_step);
}
