// The part of launch.h that needs the device compiler: what the code that runs on a device was compiled for.
#include "launch.h"

namespace octavo::cuda {
namespace {

constexpr int mark = 1024;  // bytes

// Never launched: it has static shared memory where it is compiled for 9.0 or later, and else none.
__global__ void marked_kernel(int* words) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ int shared[mark / sizeof(int)];
  shared[threadIdx.x] = words[threadIdx.x];
  __syncthreads();
  words[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
#else
  (void)words;
#endif
}

}  // namespace

bool code_knows_clusters() {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, marked_kernel), "octavo");
  return attributes.sharedSizeBytes >= mark;
}

}  // namespace octavo::cuda
