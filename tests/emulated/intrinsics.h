// CUDA C++ for a host compiler: included before every translated file. The toolkit's own headers bring vectors and the small float types;
// here are the words of the language and the functions of the device that the kernels use. What is missing does not compile.
#pragma once

// As a host compiler sees them: their conversions and arithmetic are then plain C++.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"
#include "memory.h"

#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__
#define __CUDACC__ 1
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __CUDA_ARCH__ 800

// No macros: the runtime's structures have members of these names.
static constexpr emulated::Index& threadIdx = emulated::thread_index;
static constexpr emulated::Index& blockIdx = emulated::block_index;
static constexpr emulated::Index& blockDim = emulated::block_size;
static constexpr emulated::Index& gridDim = emulated::grid_size;
#define __syncthreads() emulated::barrier(0, 0)
#define __syncwarp() emulated::meet_warp()
#define __trap() emulated::fail("traps at %s:%d", __FILE__, __LINE__)

// --- lanes ------------------------------------------------------------------------------------------------------------------------------
namespace emulated {

constexpr unsigned all_lanes = 0xffffffffu;

template <class T>
T from_lane(const char* what, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  if (mask != all_lanes) fail("is in %s with the mask %#x; the emulation knows whole warps", what, mask);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  const uint64_t* const words = meet(what, &word, 1);
  T result;
  memcpy(&result, words + source, sizeof(T));
  return result;
}

inline unsigned ballot(const char* what, unsigned mask, bool mine) {
  if (mask != all_lanes) fail("is in %s with the mask %#x; the emulation knows whole warps", what, mask);
  const uint64_t word = mine;
  const uint64_t* const words = meet(what, &word, 1);
  unsigned bits = 0;
  for (int i = 0; i < warp_size; ++i) bits |= static_cast<unsigned>(words[i]) << i;
  return bits;
}

template <class T, class F>
__attribute__((no_sanitize("thread"))) T change(T* p, F f) {  // an atomic operation
  touch(p, sizeof(T), Access::atomic, sizeof(T));
  const T old = *p;
  *p = f(old);
  return old;
}

}  // namespace emulated

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulated::from_lane("__shfl_sync", mask, value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return emulated::from_lane("__shfl_xor_sync", mask, value, (emulated::lane() ^ other) & 31);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = emulated::lane();
  return emulated::from_lane("__shfl_up_sync", mask, value, lane >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int lane = emulated::lane();
  return emulated::from_lane("__shfl_down_sync", mask, value, lane + static_cast<int>(by) < 32 ? lane + static_cast<int>(by) : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool mine) { return emulated::ballot("__ballot_sync", mask, mine); }
inline int __any_sync(unsigned mask, bool mine) { return emulated::ballot("__any_sync", mask, mine) != 0; }
inline int __all_sync(unsigned mask, bool mine) { return emulated::ballot("__all_sync", mask, mine) == emulated::all_lanes; }

// --- memory -----------------------------------------------------------------------------------------------------------------------------
template <class T, class U>
T atomicAdd(T* p, U value) {
  return emulated::change(p, [&](T old) { return static_cast<T>(old + static_cast<T>(value)); });
}
template <class T, class U>
T atomicMin(T* p, U value) {
  return emulated::change(p, [&](T old) { return static_cast<T>(value) < old ? static_cast<T>(value) : old; });
}
template <class T, class U>
T atomicMax(T* p, U value) {
  return emulated::change(p, [&](T old) { return static_cast<T>(value) > old ? static_cast<T>(value) : old; });
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulated::pause(); }
inline size_t __cvta_generic_to_shared(const void* p) { return emulated::shared_offset(p); }
inline size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }

// --- numbers ----------------------------------------------------------------------------------------------------------------------------
// The approximate ones are exact here: what depends on their errors is for a GPU to show.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __double2float_ru(double x) {
  const float rounded = static_cast<float>(x);
  return rounded < x ? std::nextafter(rounded, INFINITY) : rounded;
}
inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
using std::isnan;
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned choice) {
  const uint64_t both = low | uint64_t{high} << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (8 * (choice >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

#include "ptx.h"
#include "runtime.h"
