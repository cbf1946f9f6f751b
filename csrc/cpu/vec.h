// Float vectors of the instruction set a file is compiled for: 16 lanes with AVX-512, 8 with AVX2, 4 anywhere else (GCC's
// vector extension: SSE2, NEON, ...). Kernels are written once against `Vec` and know only `lanes`. What holds everywhere:
//   * fma(a, b, c) is one rounding where the hardware has it (AVX2, AVX-512) and two in `plain`; never a mix within one set;
//   * reductions over lanes have one fixed tree;
//   * partial loads fill with zero and touch no byte beyond `count` elements;
//   * elementwise functions give a lane the same bits wherever it stands.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/convert.h"
#include "../common/tensor.h"
#ifdef OCTAVO_X86
#include <immintrin.h>
#endif

namespace octavo::OCTAVO_ISA {

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
constexpr int lanes = 16;
using Mask = __mmask16;

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }

// The first `count` lanes, 0 <= count.
inline Mask first(int64_t count) { return count >= lanes ? Mask(0xffff) : Mask((1u << count) - 1); }
// Lanes begin <= lane < end.
inline Mask between(int64_t begin, int64_t end) {
  if (end <= 0) return 0;
  return first(end) & static_cast<Mask>(begin <= 0 ? 0xffff : begin >= lanes ? 0 : 0xffffu << begin);
}
inline Vec load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
inline Vec load(const BFloat16* p, int64_t count) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const Float16* p, int64_t count) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p))}; }
inline void store(float* p, Vec a, int64_t count) { _mm512_mask_storeu_ps(p, first(count), a.v); }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // the second one where either is NaN
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // the second one where either is NaN
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v), _mm512_castps_si512(magnitude.v), 0xca))};
}
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
// x * 2^n for whole n within [-252, 254], rounded once or twice at the edge of the range
inline Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// Lanes that hold two bfloat16 each: the first of them, and the second, as floats.
inline Vec low_bfloat16(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))}; }
inline Vec high_bfloat16(Vec a) { return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(-65536)))}; }

inline float reduce_add(Vec a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline float reduce_max(Vec a) {
  __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

// rows[i] lane j  <->  rows[j] lane i
inline void transpose(Vec* r) {
  __m512 a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 4; ++i) {
    const auto lo = [&](int k) { return _mm512_castps_pd(a[4 * i + k]); };
    b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo(0), lo(2)));
    b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo(0), lo(2)));
    b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo(1), lo(3)));
    b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo(1), lo(3)));
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
    r[4 + i].v = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0x88);
    r[12 + i].v = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0xdd);
  }
}

#elif defined(__AVX2__)

struct Vec {
  __m256 v;
};
constexpr int lanes = 8;
struct Mask {
  __m256 v;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }

// The first `count` lanes, 0 <= count.
inline Mask first(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count >= lanes ? lanes : static_cast<int>(count)), lane))};
}
// Lanes begin <= lane < end.
inline Mask between(int64_t begin, int64_t end) { return {_mm256_andnot_ps(first(begin < 0 ? 0 : begin).v, first(end < 0 ? 0 : end).v)}; }
inline Vec load(const float* p, int64_t count) { return {_mm256_maskload_ps(p, _mm256_castps_si256(first(count).v))}; }
template <class T>
inline Vec load(const T* p, int64_t count) {
  if (count >= lanes) return load(p);
  T whole[lanes] = {};
  std::memcpy(whole, p, sizeof(T) * static_cast<size_t>(count));
  return load(whole);
}
inline void store(float* p, Vec a, int64_t count) { _mm256_maskstore_ps(p, _mm256_castps_si256(first(count).v), a.v); }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // the second one where either is NaN
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }  // the second one where either is NaN
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
inline Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
// x * 2^n for whole n within [-252, 254]: in two halves, so that each factor is a normal number
inline Vec scale_by_power(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// Lanes that hold two bfloat16 each: the first of them, and the second, as floats.
inline Vec low_bfloat16(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 16))}; }
inline Vec high_bfloat16(Vec a) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-65536)))}; }

inline float reduce_add(Vec a) {
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline float reduce_max(Vec a) {
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

// rows[i] lane j  <->  rows[j] lane i
inline void transpose(Vec* r) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}

#else

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
struct Vec {
  Float4 v;
};
constexpr int lanes = 4;
struct Mask {
  Int4 v;
};

inline Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
template <class T>
inline Vec load(const T* p) {
  return {Float4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }

// The first `count` lanes, 0 <= count.
inline Mask first(int64_t count) {
  const int n = count >= lanes ? lanes : static_cast<int>(count);
  return {Int4{0, 1, 2, 3} < Int4{n, n, n, n}};
}
// Lanes begin <= lane < end.
inline Mask between(int64_t begin, int64_t end) { return {~first(begin < 0 ? 0 : begin).v & first(end < 0 ? 0 : end).v}; }
template <class T>
inline Vec load(const T* p, int64_t count) {
  if (count >= lanes) return load(p);
  T whole[lanes] = {};
  std::memcpy(whole, p, sizeof(T) * static_cast<size_t>(count));
  return load(whole);
}
inline void store(float* p, Vec a, int64_t count) { std::memcpy(p, &a, sizeof(float) * static_cast<size_t>(count >= lanes ? lanes : count)); }

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }  // the second one where either is NaN
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }  // the second one where either is NaN
inline Vec sqrt(Vec a) { return {Float4{std::sqrt(a.v[0]), std::sqrt(a.v[1]), std::sqrt(a.v[2]), std::sqrt(a.v[3])}}; }
inline Vec abs(Vec a) { return {(Float4)((Int4)a.v & 0x7fffffff)}; }
inline Vec copysign(Vec magnitude, Vec sign) { return {(Float4)(((Int4)magnitude.v & 0x7fffffff) | ((Int4)sign.v & INT32_MIN))}; }
inline Mask less(Vec a, Vec b) { return {a.v < b.v}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {(Float4)(((Int4)yes.v & m.v) | ((Int4)no.v & ~m.v))}; }
// x * 2^n for whole n within [-252, 254]: in two halves, so that each factor is a normal number
inline Vec scale_by_power(Vec x, Vec n) {
  const Int4 whole = __builtin_convertvector(n.v, Int4);
  const Int4 half = whole >> 1;
  return {x.v * (Float4)((half + 127) << 23) * (Float4)((whole - half + 127) << 23)};
}
// To the nearest whole number for |a| < 2^22: the sum has no bits left for a fraction.
inline Vec round(Vec a) {
  const Float4 shift = Float4{} + 12582912.0f;
  return {(a.v + shift) - shift};
}
// Lanes that hold two bfloat16 each: the first of them, and the second, as floats.
inline Vec low_bfloat16(Vec a) { return {(Float4)((Int4)a.v << 16)}; }
inline Vec high_bfloat16(Vec a) { return {(Float4)((Int4)a.v & -65536)}; }

inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

// rows[i] lane j  <->  rows[j] lane i
inline void transpose(Vec* r) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i].v = Float4{a.v[i], b.v[i], c.v[i], d.v[i]};
}

#endif

inline Vec operator-(Vec a) { return a * broadcast(-1.0f); }

// Rounds to the storage type, nearest even; lanes at and beyond `count` are not written.
template <class T>
inline void store_as(T* p, Vec a, int64_t count = lanes) {
  if constexpr (sizeof(T) == sizeof(float)) {
    store(p, a, count);
  } else {
    float wide[lanes];
    store(wide, a);
    for (int64_t i = 0; i < (count < lanes ? count : lanes); ++i) p[i] = narrow<T>(wide[i]);
  }
}

// e^x within 2 units in the last place; 0 below -104 and for -inf, inf above 88.73, NaN stays NaN.
inline Vec exp(Vec x) {
  // e^x = 2^n e^r with n whole and |r| <= ln(2)/2. The bounds keep n within what scale_by_power takes; NaN passes them.
  const Vec bounded = max(broadcast(-105.0f), min(broadcast(89.0f), x));
  const Vec n = round(bounded * broadcast(1.44269504088896341f));
  Vec r = fma(n, broadcast(-0.693359375f), bounded);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + broadcast(1.0f));
  return scale_by_power(p, n);
}

// tanh within 4 units in the last place.
inline Vec tanh(Vec x) {
  const Vec a = abs(x);
  // small: x + x^3 p(x^2); large: 1 - 2 / (e^2|x| + 1)
  const Vec z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  const Vec one = broadcast(1.0f);
  const Vec large = copysign(one - broadcast(2.0f) / (exp(a + a) + one), x);
  return select(less(a, broadcast(0.625f)), small, large);
}

}  // namespace octavo::OCTAVO_ISA
