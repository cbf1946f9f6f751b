// The few functions of the CUDA runtime that host code of the kernels calls, in front of the machine. Where the toolkit has a template
// over a kernel's type for nvcc alone, it is here.
#pragma once

#include <tuple>
#include <utility>

#include "machine.h"

namespace emulated {

void allow_shared(const void* kernel, int bytes);              // cudaFuncAttributeMaxDynamicSharedMemorySize
void check_shared(const void* kernel, size_t bytes);           // more than 48 KiB must have been allowed

}  // namespace emulated

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) emulated::allow_shared(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t*) {
  *clusters = 0;  // 8.0 has none
  return cudaSuccess;
}

#define cudaLaunchKernelEx emulated::launch_kernel
namespace emulated {

template <class... P>
struct Call {  // a kernel with its parameters; each thread gets its own copy, and is not asked where it had it from
  void (*kernel)(P...);
  std::tuple<P...> parameters;

  template <size_t... i>
  __attribute__((no_sanitize("thread"))) void run(std::index_sequence<i...>) {
    kernel(std::get<i>(parameters)...);
  }
  __attribute__((no_sanitize("thread"))) static void thread(void* call) { static_cast<Call*>(call)->run(std::index_sequence_for<P...>()); }
};

template <class... P, class... A>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  if (config->numAttrs) fail("8.0 has no launch attributes");
  check_shared(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes);
  Call<P...> call = {kernel, {static_cast<P>(arguments)...}};
  const dim3 g = config->gridDim, b = config->blockDim;
  run({{g.x, g.y, g.z}, {b.x, b.y, b.z}, config->dynamicSmemBytes}, &Call<P...>::thread, &call);
  return cudaSuccess;
}

}  // namespace emulated
