// From torch's stable handles to the tensors of the kernels: what a binding file needs to turn a function over octavo::Tensor
// into an operator. Only binding files include this; it is the one header below csrc/ that knows torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string_view>

#include "tensor.h"

namespace octavo {

using Handle = torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return f32;
    case ScalarType::Half:
      return f16;
    case ScalarType::BFloat16:
      return bf16;
    case ScalarType::Long:
      return i64;
    case ScalarType::Int:
      return i32;
    case ScalarType::Bool:
      return b8;
    case ScalarType::Float8_e4m3fn:
      return e4m3;
    default:
      return other;
  }
}

inline Tensor view(const Handle& handle) {
  Tensor t;
  t.data = handle.data_ptr();
  t.dtype = dtype_of(handle.scalar_type());
  t.item_size = static_cast<int64_t>(handle.element_size());
  const auto sizes = handle.sizes();
  const auto strides = handle.strides();
  STD_TORCH_CHECK(sizes.size() <= max_dims, "octavo: a tensor of ", sizes.size(), " dimensions, at most ", max_dims, " are supported");
  t.ndim = static_cast<int>(sizes.size());
  for (int d = 0; d < t.ndim; ++d) {
    t.size[d] = sizes[d];
    t.stride[d] = strides[d];
  }
  return t;
}

// What the dispatcher hands over for a parameter of an operator, and how it becomes that parameter.
template <class Parameter>
struct Unboxed {  // numbers and bool
  using type = Parameter;
  const Parameter& value;
  Parameter get() const { return value; }
};
template <>
struct Unboxed<const Tensor&> {
  using type = Handle;
  Tensor value;
  explicit Unboxed(const Handle& handle) : value(view(handle)) {}
  const Tensor& get() const { return value; }
};
template <>
struct Unboxed<const Tensor*> {
  using type = std::optional<Handle>;
  std::optional<Tensor> value;
  explicit Unboxed(const std::optional<Handle>& handle) {
    if (handle) value = view(*handle);
  }
  const Tensor* get() const { return value ? &*value : nullptr; }
};
template <>
struct Unboxed<std::string_view> {  // owns the handle; torch's own way to a std::string (2.13) leaks one in every call
  using type = StringHandle;
  StringHandle handle;
  explicit Unboxed(StringHandle text) : handle(text) {}
  Unboxed(const Unboxed&) = delete;
  Unboxed& operator=(const Unboxed&) = delete;
  ~Unboxed() { torch_delete_string(handle); }
  std::string_view get() const {
    size_t length = 0;
    const char* data = nullptr;
    STD_TORCH_CHECK(torch_string_length(handle, &length) == 0 && torch_string_c_str(handle, &data) == 0, "octavo: a string cannot be read");
    return {data, length};
  }
};

}  // namespace octavo
