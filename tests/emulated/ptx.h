// What the PTX instructions of the kernels do, each under the name that translate.py gives it. Pointers and references point into
// registers (locals of a fiber), `at` is a shared address.
#pragma once

namespace emulated {

inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

// --- memory -----------------------------------------------------------------------------------------------------------------------------
template <class... T>
void load(const void* from, T&... words) {  // neighbours of four bytes each, at a multiple of them all
  static_assert(((sizeof(T) == 4) && ...));
  touch(from, 4 * sizeof...(T), Access::read, 4 * sizeof...(T));
  const char* p = static_cast<const char*>(from);
  ((memcpy(&words, p, 4), p += 4), ...);
}
template <class... T>
void load_global(size_t from, T&... words) {
  load(reinterpret_cast<const void*>(from), words...);
}
template <class... T>
void load_shared(uint32_t at, T&... words) {
  load(shared_at(at, 4 * sizeof...(T), 4 * sizeof...(T)), words...);
}
inline void store_shared(uint32_t at, uint32_t word) {
  unsigned char* const p = shared_at(at, 4, 4);
  touch(p, 4, Access::write, 4);
  memcpy(p, &word, 4);
}
inline int add_global(int* p, int value) {
  pause();
  return change(p, [&](int old) { return old + value; });
}

// --- matrices: ptx.cpp --------------------------------------------------------------------------------------------------------------------
struct Pair {  // two values of 16 bits as float32
  float low, high;
};
void multiply(float* const (&sums)[4], const Pair (&values)[6]);
void load_matrices(bool transpose, uint32_t* const (&results)[4], uint32_t at);
uint32_t transpose_matrix(uint32_t x);

template <class T>
Pair pair_of(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  } else {
    __half2_raw raw;
    raw.x = static_cast<unsigned short>(bits);
    raw.y = static_cast<unsigned short>(bits >> 16);
    const float2 both = __half22float2(__half2(raw));
    return {both.x, both.y};
  }
}

template <class T>
uint32_t pack(float high, float low) {  // cvt.rn.f16x2.f32: the first operand goes to the upper half
  uint16_t bits[2];
  const T values[2] = {static_cast<T>(low), static_cast<T>(high)};
  memcpy(bits, values, 4);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

template <class T>
void multiply(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply({&c0, &c1, &c2, &c3}, {pair_of<T>(a0), pair_of<T>(a1), pair_of<T>(a2), pair_of<T>(a3), pair_of<T>(b0), pair_of<T>(b1)});
}
template <bool transpose>
void load_matrices(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t at) {
  load_matrices(transpose, {&d0, &d1, &d2, &d3}, at);
}

}  // namespace emulated
