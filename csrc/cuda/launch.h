// Launching: the current stream, errors of the runtime, facts about the device, and programmatic dependent launch. Torch-free;
// bindings_*.cpp sets the stream's source.
//
// Programmatic dependent launch (CUDA programming guide): a kernel that is launched with `launch` may begin while the kernel before it
// in the stream still runs. Invariant: every kernel that is launched this way calls `dependency_wait()` in every thread block before it
// touches anything that an earlier kernel writes or reads; before that it may load only what never changes while a model runs
// (weights, norm weights, tables). It calls `dependents_start()` as soon as the next kernel's preamble may take resources.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace octavo::cuda {

cudaStream_t current_stream(int device = -1);  // torch's stream of the current device

void check(cudaError_t error, const char* op);  // throws "<op>: <CUDA's words>"

struct Device {
  int num_sms;
  int capability;           // 90 is 9.0; at most 89 where the driver made the code from PTX of an earlier one, which lacks what 9.0 brought
  int shared_per_block;     // most bytes of shared memory that a block can have
  int shared_per_sm;
  int64_t l2_bytes;
};
const Device& device();  // of the current device, read once

bool code_knows_clusters();  // the code that runs on the current device was compiled for 9.0 or later
bool dependent_launch();     // the device and the code can (9.0 and later)

#ifdef __CUDACC__
__device__ __forceinline__ void dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void dependents_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launch with programmatic dependence on the kernel before. Raises the kernel's limit of dynamic shared memory where needed. cluster:
// thread blocks of a cluster, neighbours along x; 1 is none.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* op, void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                     Arguments&&... arguments) {
  if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), op);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (dependent_launch()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), op);
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments&&... arguments) {
  launch_clusters(op, kernel, 1, grid, block, shared, stream, static_cast<Parameters>(arguments)...);
}
#endif

}  // namespace octavo::cuda
