// What gemm_skinny.cu is made of: the parameters of a call, asynchronous copies, the tensor-core product, and the norm that may come
// before it; gemm_tile_sm90.cu takes the activations from here. It does not know how a product is cut into thread blocks. Invariant: every sum here is written out term by term, so that
// two kernels that call the same function get the same bits.
//
// Instructions newer than a target are replaced by a trap: the host side never launches such a kernel on such a device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "common/check.h"
#include "launch.h"

namespace octavo::cuda {

enum class Activation : int { none, silu, gelu, gelu_tanh, relu };

inline Activation activation_of(const Contract& c, std::string_view kind) {
  if (kind == "silu") return Activation::silu;
  if (kind == "gelu") return Activation::gelu;
  if (kind == "gelu_tanh") return Activation::gelu_tanh;
  c.require(kind == "relu", "kind must be silu, gelu, gelu_tanh or relu, got '%s'", std::string(kind).c_str());
  return Activation::relu;
}

struct SkinnyParams {
  void* out;            // act or float32 [M, N], rows out_stride apart
  const void* x;        // act [M, K], rows x_stride apart; unused where the norm is part of the kernel
  const void* weight;   // act [N, K], or [2 N, K] for the gated form
  const float* bias;    // [N] or [2 N], or null
  int64_t out_stride, x_stride;
  int rows, n, k;       // M, N, K; n counts outputs, so it is half of the weight's rows in the gated form
  int steps;            // of 32 elements of K in every slice; even
  int weight_steps, x_steps;  // as many as are in shared memory at a time
  Activation kind;      // none: plain product; else out = activation(gate) * up
  bool float_out;
  // The norm before the product: x = rms_norm(residual + delta).
  const float* residual;     // [M, K]
  const void* delta;         // act [M, K]
  const float* norm_weight;  // [K]
  float* total;              // [M, K], written
  float eps, offset;
};

constexpr int warps = 8;    // of a thread block
constexpr int slices = 8;   // of K; a slice is summed by one warp
constexpr int chunk = 64;   // elements of K that go to one slice before the next slice gets its share
constexpr int norm_slots = 4;  // vectors of 4 that a thread can hold in a norm inside the product

#ifdef __CUDACC__

// --- types ---------------------------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float2 widen2(uint32_t pair);
template <>
__device__ __forceinline__ float2 widen2<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 widen2<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <class T>
__device__ __forceinline__ uint32_t narrow2(float a, float b);
template <>
__device__ __forceinline__ uint32_t narrow2<__half>(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t narrow2<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// --- copies --------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes to shared memory without waiting; zeros where `there` is false (the address must still be a valid one).
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
#else
  __trap();
#endif
}

// The same for weights: they are read once a step, so they leave the L2 cache first, and a line is fetched whole.
__device__ __forceinline__ void copy16_once(uint32_t to, const void* from, bool there, uint64_t policy) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(there ? 16 : 0), "l"(policy)
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ uint64_t leave_first() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 800
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

__device__ __forceinline__ void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int pending>
__device__ __forceinline__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

__device__ __forceinline__ uint4 load16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store4(uint32_t to, uint32_t value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory"); }

// --- product -------------------------------------------------------------------------------------------------------------------------

// d [16 x 8] += a [16 x 16] * b [16 x 8]; fragments as PTX lays them out (mma.m16n8k16).
__device__ __forceinline__ void multiply(__half, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

__device__ __forceinline__ void multiply(__nv_bfloat16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

__device__ __forceinline__ float activate(float x, Activation kind) {
  if (kind == Activation::silu) return x / (1.0f + expf(-x));
  if (kind == Activation::gelu) return 0.5f * x * erfcf(x * -0.70710678118654752f);
  if (kind == Activation::gelu_tanh) return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  return x < 0.0f ? 0.0f : x;  // relu; a NaN stays
}

// --- norm ----------------------------------------------------------------------------------------------------------------------------
// A row of K elements is cut into vectors of 4; vector i * threads + j belongs to thread j. Its sum of squares is: within a vector, then
// over a warp as a tree, then over i and the warps in order. `slots` vectors of one or more rows are summed at once.

constexpr int norm_threads = 32 * warps;

template <class T>
__device__ __forceinline__ float4 add_delta(const float* residual, const T* delta, int64_t at) {
  const float4 r = *reinterpret_cast<const float4*>(residual + at);
  const uint2 d = *reinterpret_cast<const uint2*>(delta + at);
  const float2 low = widen2<T>(d.x), high = widen2<T>(d.y);
  return make_float4(r.x + low.x, r.y + low.y, r.z + high.x, r.w + high.y);
}

__device__ __forceinline__ float warp_squares(float4 v) {
  float sum = __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmul_rn(v.x, v.x))));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, mask));
  return sum;
}

// squares: [vectors of a row][warps]
__device__ __forceinline__ float norm_scale(const float* squares, int vectors, int k, float eps) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < vectors; ++i) {
    const float4 a = *reinterpret_cast<const float4*>(squares + i * warps), b = *reinterpret_cast<const float4*>(squares + i * warps + 4);
    sum = __fadd_rn(sum, a.x), sum = __fadd_rn(sum, a.y), sum = __fadd_rn(sum, a.z), sum = __fadd_rn(sum, a.w);
    sum = __fadd_rn(sum, b.x), sum = __fadd_rn(sum, b.y), sum = __fadd_rn(sum, b.z), sum = __fadd_rn(sum, b.w);
  }
  return rsqrtf(__fadd_rn(__fdiv_rn(sum, static_cast<float>(k)), eps));
}

template <class T>
__device__ __forceinline__ uint2 normed(float4 v, float scale, float4 weight, float offset) {
  return make_uint2(narrow2<T>(__fmul_rn(__fmul_rn(v.x, scale), __fadd_rn(weight.x, offset)),
                               __fmul_rn(__fmul_rn(v.y, scale), __fadd_rn(weight.y, offset))),
                    narrow2<T>(__fmul_rn(__fmul_rn(v.z, scale), __fadd_rn(weight.z, offset)),
                               __fmul_rn(__fmul_rn(v.w, scale), __fadd_rn(weight.w, offset))));
}

#endif  // __CUDACC__

}  // namespace octavo::cuda
