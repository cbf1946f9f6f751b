// In place of csrc/cuda/bind.h: before a function of cuda/ops.h runs, the machine is told where its tensors lie, and afterwards that they
// are no longer its own. bindings_*.cpp are compiled as they are, under the name of a library of their own and for the CPU.
#pragma once

#include <tuple>

#include "common/unbox.h"
#include "memory.h"

namespace octavo::cuda {

// Rows are what lies without a hole; a tensor with holes of two kinds counts as one row up to its last element.
inline emulated::Given extent(const Tensor& t, const char* op, int position) {
  const char* const data = static_cast<const char*>(t.data);
  const bool writable = emulated::may_write(op, position);
  int64_t row = 1, pitch = 0, rows_in = 1, last = 0;
  bool plain = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.size[d] == 0) return {data, 0, 1, 1, op, position, writable};
    last += (t.size[d] - 1) * t.stride[d];
    if (t.size[d] == 1 || t.stride[d] == 0) continue;
    if (pitch == 0 && t.stride[d] == row) {
      row *= t.size[d];
    } else if (pitch == 0) {
      pitch = t.stride[d], rows_in = t.size[d];
    } else {
      plain &= t.stride[d] == pitch * rows_in;
      rows_in *= t.size[d];
    }
  }
  const int64_t bytes = (last + 1) * t.item_size;
  if (!plain || pitch < row) return {data, bytes, bytes, bytes, op, position, writable};
  return {data, bytes, row * t.item_size, pitch * t.item_size, op, position, writable};
}

inline void announce(const Tensor& t, const char* op, int position) { emulated::give(extent(t, op, position)); }
inline void announce(const Tensor* t, const char* op, int position) {
  if (t) announce(*t, op, position);
}
template <class T>
void announce(const T&, const char*, int) {}

struct Borrowed {
  ~Borrowed() { emulated::take_back(); }
};

template <auto function, class Name, class Signature = decltype(function)>
struct Operator;

template <auto function, class Name, class... Parameters>
struct Operator<function, Name, void (*)(Parameters...)> {
  static void call(typename Unboxed<Parameters>::type... arguments) {
    std::tuple<Unboxed<Parameters>...> held{arguments...};
    const Borrowed until_the_end;
    std::apply([](auto&... each) {
      int position = 0;
      (announce(each.get(), Name::name(), position++), ...);
      function(each.get()...);
    }, held);
  }
};

}  // namespace octavo::cuda

#define OCTAVO_CUDA(op)                             \
  struct Name_##op {                                \
    static constexpr const char* name() { return #op; } \
  };                                                \
  m.impl(#op, TORCH_BOX((&octavo::cuda::Operator<&octavo::cuda::op, Name_##op>::call)))
