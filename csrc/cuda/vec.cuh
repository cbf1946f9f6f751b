// What kernels over rows share: vectors of four and eight elements between memory and float32 registers, sums over a warp in a fixed
// order, division by a number that stays the same, and the choice of a type at run time. Knows no operator.
//
// Invariant: widening is exact; narrowing rounds to nearest even, e4m3 saturates at 448 instead of becoming NaN; the arithmetic that
// decides a sum's bits is written with explicit roundings, so that no instance of a template may contract it differently from another.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/tensor.h"

namespace octavo::cuda {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;
using E4m3 = __nv_fp8_e4m3;

template <class T>
struct Type {
  using type = T;
};

// Calls f with the Type of an activation.
template <class F>
void with_act(DType dtype, const F& f) {
  if (dtype == f32) return f(Type<float>{});
  if (dtype == bf16) return f(Type<Bf16>{});
  f(Type<Fp16>{});
}

// Whether rows that begin at data and follow each other by the strides (in elements) all begin at a multiple of `bytes`.
inline bool aligned(const Tensor& t, int bytes, int64_t stride0, int64_t stride1 = 0) {
  const auto at = reinterpret_cast<uintptr_t>(t.data);
  return at % bytes == 0 && stride0 * t.item_size % bytes == 0 && stride1 * t.item_size % bytes == 0;
}

// n / by and n % by for n < 2^31, by one multiplication (Granlund and Montgomery, Division by Invariant Integers, 1994).
struct Divider {
  uint32_t by = 1, magic = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t divisor) : by(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift) < by) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
#endif
};

#ifdef __CUDACC__

// x / by, rounded as a division is (up to a tie in a hundred thousand): a product, its exact remainder, one correction (Markstein,
// IBM J. Res. Dev. 34, 1990). For divisors far from the ends of the range of float32.
struct Quotient {
  float by, inverse;

  __device__ explicit Quotient(float divisor) : by(divisor), inverse(1.0f / divisor) {}
  __device__ __forceinline__ float operator()(float x) const {
    const float q = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-q, by, x), inverse, q);
  }
};

constexpr float e4m3_max = 448.0f;

// What takes a row whose largest magnitude is `most` to the range of e4m3; finite, so that zeros stay zeros.
__device__ __forceinline__ float e4m3_factor(float most) { return most > 0.0f ? fminf(__fdiv_rn(e4m3_max, most), 3.4e38f) : 1.0f; }

// --- one element --------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(Fp16 x) { return __half2float(x); }
__device__ __forceinline__ float widen(E4m3 x) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3))); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, Fp16>) {
    return __float2half_rn(x);
  } else {
    E4m3 y;
    y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    return y;
  }
}

// --- four and eight elements --------------------------------------------------------------------------------------------------------
template <class T>
__device__ __forceinline__ void widen2(float* v, uint32_t bits) {  // two neighbours of a 16-bit type
  static_assert(sizeof(T) == 2, "two elements in a word");
  if constexpr (std::is_same_v<T, Bf16>) {
    v[0] = __uint_as_float(bits << 16);
    v[1] = __uint_as_float(bits & 0xffff0000u);
  } else {
    __half2_raw raw;
    raw.x = static_cast<unsigned short>(bits);
    raw.y = static_cast<unsigned short>(bits >> 16);
    const float2 pair = __half22float2(__half2(raw));
    v[0] = pair.x;
    v[1] = pair.y;
  }
}

template <class T>
__device__ __forceinline__ uint32_t narrow2(const float* v) {
  static_assert(sizeof(T) == 2, "two elements in a word");
  if constexpr (std::is_same_v<T, Bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(v[0], v[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ void widen_e4m3(float* v, uint32_t bits) {  // four elements
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bits >> (16 * i)), __NV_E4M3);
    const float2 pair = __half22float2(__half2(raw));
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ uint32_t narrow_e4m3(const float* v) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(v[0], v[1]), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(v[2], v[3]), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Loads stay where they are written: a compiler that sinks one below a reduction or a conversion would wait for memory twice.
template <int words>
__device__ __forceinline__ void load_words(uint32_t* w, const void* p) {
  const size_t at = __cvta_generic_to_global(p);
  if constexpr (words == 4)
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(at) : "memory");
  else if constexpr (words == 2)
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(at) : "memory");
  else
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(at) : "memory");
}

// `words` words as elements of T.
template <class T, int words>
__device__ __forceinline__ void widen_words(float* v, const uint32_t* w) {
#pragma unroll
  for (int i = 0; i < words; ++i) {
    if constexpr (sizeof(T) == 4)
      v[i] = __uint_as_float(w[i]);
    else if constexpr (sizeof(T) == 2)
      widen2<T>(v + 2 * i, w[i]);
    else
      widen_e4m3(v + 4 * i, w[i]);
  }
}

template <class T>
__device__ __forceinline__ void load4(float* v, const T* p) {  // p at a multiple of four elements
  uint32_t w[sizeof(T)];
  load_words<sizeof(T)>(w, p);
  widen_words<T, sizeof(T)>(v, w);
}

template <class T>
__device__ __forceinline__ void store4(T* p, const float* v) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
  } else if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(p) = make_uint2(narrow2<T>(v), narrow2<T>(v + 2));
  } else {
    *reinterpret_cast<uint32_t*>(p) = narrow_e4m3(v);
  }
}

template <class T>
__device__ __forceinline__ void load8(uint32_t* w, const T* p) {  // p at a multiple of eight elements, or of 16 bytes where that is less
  if constexpr (sizeof(T) == 4)
    load_words<4>(w, p), load_words<4>(w + 4, p + 4);
  else
    load_words<2 * sizeof(T)>(w, p);
}

template <class T>
__device__ __forceinline__ void store8(T* p, const float* v) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint4*>(p) = make_uint4(narrow2<T>(v), narrow2<T>(v + 2), narrow2<T>(v + 4), narrow2<T>(v + 6));
  } else if constexpr (sizeof(T) == 1) {
    *reinterpret_cast<uint2*>(p) = make_uint2(narrow_e4m3(v), narrow_e4m3(v + 4));
  } else {
    store4(p, v), store4(p + 4, v + 4);
  }
}

// Eight elements as they lie in memory: half the registers of their float32 values while they wait.
template <class T>
struct Packed {
  static_assert(sizeof(T) >= 2, "for what is computed with");
  uint32_t w[2 * sizeof(T)];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < static_cast<int>(2 * sizeof(T)); ++i) w[i] = 0;
  }
  __device__ __forceinline__ void set(int i, T x) {  // of an element that is zero
    if constexpr (sizeof(T) == 4)
      w[i] = __float_as_uint(x);
    else
      w[i / 2] |= static_cast<uint32_t>(*reinterpret_cast<const unsigned short*>(&x)) << (16 * (i % 2));
  }
  __device__ __forceinline__ void pack(const float* v) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(2 * sizeof(T)); ++i) {
      if constexpr (sizeof(T) == 4)
        w[i] = __float_as_uint(v[i]);
      else
        w[i] = narrow2<T>(v + 2 * i);
    }
  }
  __device__ __forceinline__ void unpack(float* v) const { widen_words<T, 2 * sizeof(T)>(v, w); }
  // From here on the compiler must unpack again: it may not keep the float32 values from before.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < static_cast<int>(2 * sizeof(T)); ++i) asm volatile("" : "+r"(w[i]));
  }
};

// The first `count` of eight elements; the others become zero. With `vec` there are all eight (or none), suitably aligned.
template <bool vec, class T>
__device__ __forceinline__ void load_some(Packed<T>& x, const T* p, int count) {
  x.clear();
  if constexpr (vec) {
    if (count > 0) load8(x.w, p);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) x.set(i, p[i]);
  }
}

template <bool vec, class T>
__device__ __forceinline__ void load_some(float* v, const T* p, int count) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = 0.0f;
  if constexpr (vec) {
    uint32_t w[2 * sizeof(T)];
    if (count > 0) load8(w, p), widen_words<T, 2 * sizeof(T)>(v, w);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) v[i] = widen(p[i]);
  }
}

template <bool vec, class T>
__device__ __forceinline__ void store_some(T* p, const float* v, int count) {
  if constexpr (vec) {
    if (count > 0) store8(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) p[i] = narrow<T>(v[i]);
  }
}

// --- over a warp --------------------------------------------------------------------------------------------------------------------
// Every group of `lanes` neighbours (a power of two) gets the sum of its values by a butterfly: all of them the same bits.
__device__ __forceinline__ float lanes_sum(float v, int lanes) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = offset < lanes ? __fadd_rn(v, other) : v;
  }
  return v;
}

__device__ __forceinline__ float lanes_max(float v, int lanes) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = offset < lanes ? fmaxf(v, other) : v;
  }
  return v;
}

#endif

}  // namespace octavo::cuda
