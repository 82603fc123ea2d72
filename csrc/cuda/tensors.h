// Tensors of a call, as the kernels need them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>

namespace minisora {

inline torch::stable::Tensor empty(
    const torch::stable::Tensor& like, std::initializer_list<int64_t> shape, torch::headeronly::ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// A tensor whose first number lies at a multiple of 16 bytes, as copies of 16 bytes need it.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0) return tensor;
  return torch::stable::clone(tensor);
}

} // namespace minisora
