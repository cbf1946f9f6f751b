// How a binding file turns a function of cuda/ops.h into torch's CUDA kernel of the same name.
#pragma once

#include "common/unbox.h"

namespace octavo::cuda {

template <auto function, class Signature = decltype(function)>
struct Operator;

template <auto function, class... Parameters>
struct Operator<function, void (*)(Parameters...)> {
  static void call(typename Unboxed<Parameters>::type... arguments) { function(Unboxed<Parameters>{arguments}.get()...); }
};

}  // namespace octavo::cuda

#define OCTAVO_CUDA(name) m.impl(#name, TORCH_BOX((&octavo::cuda::Operator<&octavo::cuda::name>::call)))
