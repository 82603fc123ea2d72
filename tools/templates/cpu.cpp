// new_op: equation in minisora_kernels/ops/new_op.py.
#include "common.h"

namespace minisora {
namespace {

constexpr int64_t kGrain = 16384; // numbers that a thread takes at a time

// out = scale * in, which is the forward and the backward.
Tensor scaled(const Tensor& in, const char* name, double scale) {
  check_dtype(in, name);
  STD_TORCH_CHECK(in.is_contiguous(), name, " must be contiguous");
  Tensor out = with_huge_pages(torch::stable::empty_like(in));
  with_type(in.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto* from = static_cast<const T*>(in.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const Vec factor(static_cast<float>(scale));
    torch::stable::parallel_for(0, in.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for_columns(end - begin, [&](int64_t i, auto count) MINISORA_INLINE {
        store(to + begin + i, load(from + begin + i, count) * factor, count);
      });
    });
  });
  return out;
}

Tensor new_op_fwd(const Tensor& x, double scale) { return scaled(x, "x", scale); }
Tensor new_op_bwd(const Tensor& dy, double scale) { return scaled(dy, "dy", scale); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("new_op_fwd", TORCH_BOX(&new_op_fwd));
  m.impl("new_op_bwd", TORCH_BOX(&new_op_bwd));
}

} // namespace minisora
