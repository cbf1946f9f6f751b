// The slow half of check.h: comparing and wording. Compiled once, for the plain instruction set.
#include "check.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace octavo {
namespace {

std::string dtype_names(uint32_t dtypes) {
  static constexpr struct {
    DType dtype;
    const char* name;
  } names[] = {{f32, "float32"}, {f16, "float16"}, {bf16, "bfloat16"}, {i64, "int64"}, {i32, "int32"}, {b8, "bool"}, {e4m3, "float8_e4m3fn"}};
  if (dtypes == any_type) return "any dtype";
  std::string text;
  for (const auto& entry : names)
    if (dtypes & entry.dtype) text += (text.empty() ? "" : " or ") + std::string(entry.name);
  return text.empty() ? "another dtype" : text;
}

std::string numbers(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string letters(const char* shape) {
  std::string text = "[";
  for (const char* s = shape; *s; ++s) text += (s == shape ? "" : ", ") + std::string(1, *s);
  return text + "]";
}

// Whether the dimensions from `first` on follow each other without a gap; a dimension of one element may have any stride.
bool is_dense(const Tensor& t, int first) {
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= first; --d) {
    if (t.size[d] != 1 && t.stride[d] != expected) return false;
    expected *= t.size[d];
  }
  return true;
}

}  // namespace

void Contract::tensor(const char* name, const Tensor& t, const char* shape, uint32_t dtypes, Layout layout) {
  // Words are put together only for an error: this runs for every tensor of every call.
  const auto fail = [&](const std::string& why) { throw std::runtime_error(std::string(op_) + ": " + name + " " + letters(shape) + " " + why); };
  const auto found = [&] { return numbers(t.size, t.ndim); };
  if (!(t.dtype & dtypes)) fail("must be " + dtype_names(dtypes) + ", not " + dtype_names(t.dtype));
  int ndim = 0;
  while (shape[ndim]) ++ndim;
  if (t.ndim != ndim) fail("must have " + std::to_string(ndim) + " dimensions, found shape " + found());
  bool empty = false;
  for (int d = 0; d < ndim; ++d) {
    const char letter = shape[d];
    empty |= t.size[d] == 0;
    if (letter >= '0' && letter <= '9') {
      if (t.size[d] != letter - '0') fail("has shape " + found());
      continue;
    }
    int64_t& value = value_[letter - 'A'];
    const char*& owner = owner_[letter - 'A'];
    if (!owner) {
      owner = name;
      value = t.size[d];
    } else if (value != t.size[d]) {
      fail("has shape " + found() + ", but " + letter + " = " + std::to_string(value) + " in " + owner);
    }
  }
  if (empty || is_dense(t, layout == packed ? 0 : layout == rows ? 1 : ndim - 1)) return;
  const char* wanted = layout == packed ? "contiguous" : layout == rows ? "contiguous but for dimension 0" : "contiguous in its last dimension";
  fail(std::string("must be ") + wanted + ", found shape " + found() + " with strides " + numbers(t.stride, t.ndim));
}

void Contract::require(bool holds, const char* message, ...) const {
  if (holds) return;
  char text[512];
  va_list values;
  va_start(values, message);
  std::vsnprintf(text, sizeof text, message, values);
  va_end(values);
  throw std::runtime_error(std::string(op_) + ": " + text);
}

}  // namespace octavo
