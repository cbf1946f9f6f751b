// A tensor as the kernels see it: a pointer, a dtype, sizes and strides in elements. This is the only tensor type in
// csrc/ below bindings.cpp: kernels include no torch header, so they compile in a second, can be compiled once per
// instruction set, and can be called from anything that has a pointer. Invariant: a Tensor owns nothing.
#pragma once

#include <cstdint>

namespace octavo {

// Bit flags, so that a contract can name a set of them.
enum DType : uint32_t {
  f32 = 1,
  f16 = 2,
  bf16 = 4,
  i64 = 8,
  i32 = 16,
  b8 = 32,                           // bool, one byte
  e4m3 = 64,                         // 8-bit float, 4 bits of exponent and 3 of fraction: KV cache and quantised activations
  other = 128,                       // any dtype that no kernel computes with
  storage_types = f32 | f16 | bf16,  // weights and the KV cache
  any_type = 255,
};

constexpr int max_dims = 6;

struct Tensor {
  void* data = nullptr;
  DType dtype = other;
  int ndim = 0;
  int64_t item_size = 0;  // bytes
  int64_t size[max_dims] = {};
  int64_t stride[max_dims] = {};  // in elements

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

// Storage types. They are widened to float when loaded and rounded to nearest even when stored (common/convert.h, cpu/vec.h).
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2, "the packed layouts count on two bytes an element");

}  // namespace octavo
