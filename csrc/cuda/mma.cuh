// Tensor-core tiles for the attention kernels: matrix products of 16 x 8 x 16, tiles between shared memory and registers, asynchronous
// copies, e4m3, and the order of 16-byte chunks in a tile. It knows no kernel. Layouts are those of the PTX manual; with lane = 4 r + q:
//   a[0] rows r, k 2q and 2q + 1;  a[1] rows r + 8;  a[2] k + 8;  a[3] both        (16 x 16, row-major)
//   b[0] k 2q and 2q + 1, column r;  b[1] k + 8                                     (16 x 8)
//   c[0], c[1] row r, columns 2q and 2q + 1;  c[2], c[3] row r + 8                  (16 x 8, float32)
// Invariant: on devices below 8.0 everything compiles and nothing works; the host never launches these kernels there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace octavo::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Where 16-byte chunk `chunk` of row `row` lies in a tile whose rows have row_bytes, a power of two: eight consecutive rows of one chunk
// fall into different banks, which is what ldmatrix reads at once.
template <int row_bytes>
__host__ __device__ constexpr int swizzled(int row, int chunk) {
  static_assert(row_bytes >= 16 && (row_bytes & (row_bytes - 1)) == 0, "a tile's rows are a power of two of bytes");
  constexpr int chunks = row_bytes / 16;
  constexpr int rows_per_line = row_bytes >= 128 ? 1 : 128 / row_bytes;
  constexpr int mask = chunks >= 8 ? 7 : chunks - 1;
  return row * row_bytes + ((chunk ^ ((row / rows_per_line) & mask)) << 4);
}

// --- matrix products -------------------------------------------------------------------------------------------------------------------
template <class T>
__device__ __forceinline__ void mma16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma16816<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void mma16816<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// --- tiles: four 8 x 8 matrices of 16-bit values; lane 8 i + j names row j of matrix i ---------------------------------------------------
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
#endif
}

// The transpose of an 8 x 8 matrix of 16-bit values that lies in the registers of a warp.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
#else
  return x;
#endif
}

// --- asynchronous copies ----------------------------------------------------------------------------------------------------------------
// 16 bytes from global to shared memory, past L1, or zeros.
__device__ __forceinline__ void cp_async16(uint32_t to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's latest groups are unfinished.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// --- numbers ----------------------------------------------------------------------------------------------------------------------------
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return 0;
#endif
}

template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  const __half2 h = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__low2half(h))) | static_cast<uint32_t>(__half_as_ushort(__high2half(h))) << 16;
#endif
}

// Two e4m3 values in the low 16 bits, as two float16: exact. Before 8.9 there is no instruction for it: the bits are moved to the place
// of a float16's, whose exponent is biased by 8 more. (A NaN, which a saturating cache has only where its source had one, becomes 480.)
__device__ __forceinline__ uint32_t e4m3x2_to_half2(uint32_t x) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 900 || (__CUDA_ARCH__ == 890 && __CUDACC_VER_MAJOR__ >= 12))
  uint32_t d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(static_cast<uint16_t>(x)));
  return d;
#else
  const uint32_t wide = (x & 0xffu) | (x & 0xff00u) << 8;
  const uint32_t bits = (wide & 0x00800080u) << 8 | (wide & 0x007f007fu) << 7;
  const __half2 h = __hmul2(__halves2half2(__ushort_as_half(static_cast<uint16_t>(bits)), __ushort_as_half(static_cast<uint16_t>(bits >> 16))),
                            __floats2half2_rn(256.0f, 256.0f));
  return static_cast<uint32_t>(__half_as_ushort(__low2half(h))) | static_cast<uint32_t>(__half_as_ushort(__high2half(h))) << 16;
#endif
}

}  // namespace octavo::cuda
