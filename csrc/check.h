// Checks at the boundary of a kernel, for CPUs and for CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace minisora {

inline void check_shape(const torch::stable::Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(
      tensor.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions, got ",
      tensor.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(
        tensor.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", tensor.size(dim));
    ++dim;
  }
}

} // namespace minisora
