// Tensor maps for bulk tensor copies: the driver's function that makes them, found at run time so that nothing is linked. It knows no
// layout. Invariant: where OCTAVO_TENSOR_MAPS is not defined (toolkits before 12) there are no maps, and no kernel that needs one.
#pragma once

#include <cuda_runtime.h>

#if CUDART_VERSION >= 12000
#define OCTAVO_TENSOR_MAPS 1
#include <cuda.h>  // types only

#include "launch.h"

namespace octavo::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// Null where the driver has no such function.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
  }();
  return found;
}

// A map of four dimensions of 16-bit numbers, the innermost first, its boxes laid out with the 128-byte swizzle. stride: bytes, of the
// outer three.
inline CUtensorMap tensor_map(const char* op, bool is_bf16, const void* data, const cuuint64_t (&size)[4], const cuuint64_t (&stride)[3],
                              const cuuint32_t (&box)[4]) {
  const cuuint32_t step[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(data), size, stride, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, op);
  return map;
}

}  // namespace octavo::cuda
#endif
