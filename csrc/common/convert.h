// Scalar conversions between float and the storage types, exact in one direction and round-to-nearest-even in the other.
// The vector forms in cpu/vec.h give the same bits.
#pragma once

#include <bit>
#include <cstdint>

#include "tensor.h"

namespace octavo {

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f;
  const uint32_t fraction = x.bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24 is exact in float
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide = exponent == 31 ? 0xff : exponent + 112;
  const uint32_t quiet = exponent == 31 && fraction ? 0x400000 : 0;  // a signalling NaN becomes quiet, as in hardware
  return std::bit_cast<float>(sign | (wide << 23) | (fraction << 13) | quiet);
}

template <class T>
T narrow(float x);

template <>
inline float narrow<float>(float x) {
  return x;
}

template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};  // NaN stays NaN
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                                // below 2^-14: adding 0.5 makes the hardware round at the subnormal's last bit
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000))};
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13))};
}

}  // namespace octavo
