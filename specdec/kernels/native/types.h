// Types of tensors as the variants number them.
#pragma once
#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace specdec {

inline Type type_of(const at::Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kDouble:
      return kFloat64;
    default:
      TORCH_CHECK(false, op, ": float32, bfloat16 and float64 are supported, got ", t.scalar_type());
  }
}

}  // namespace specdec
