// gate_residual: equation and derivation in minisora_kernels/ops/gate_residual.py.
#include "rows.h"

namespace minisora {
namespace {

Tensor gate_residual_fwd(const Tensor& x, const Tensor& branch, const Tensor& gate) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_dense(x, "x", {batch, tokens, width});
  check_dense(branch, "branch", {batch, tokens, width});
  const Rows gate_rows(gate, "gate", batch, tokens, width);
  Tensor y = empty_like_shape(x, {batch, tokens, width}, x.scalar_type());

  with_type(x.scalar_type(), [&](auto x_tag) {
    with_type(branch.scalar_type(), [&](auto branch_tag) {
      using TX = decltype(x_tag);
      const auto* in = static_cast<const TX*>(x.const_data_ptr());
      const auto* add = static_cast<const decltype(branch_tag)*>(branch.const_data_ptr());
      auto* out = static_cast<TX*>(y.mutable_data_ptr());
      const auto read = [&](std::vector<float>& gain, int64_t b, int64_t n) { gate_rows.read(b, n, 0.0f, gain.data(), width); };
      for_tokens(batch, tokens, gate_rows.count, [&] { return std::vector<float>(width); }, read,
        [&](std::vector<float>& gain, int64_t token, auto group) {
          for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
            const Vec by = load(gain.data() + i, count);
            for_group<group>([&](int r) MINISORA_INLINE {
              const int64_t j = (token + r) * width + i;
              store(out + j, at::vec::fmadd(by, load(add + j, count), load(in + j, count)), count);
            });
          });
        });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> gate_residual_bwd(const Tensor& dy, const Tensor& branch, const Tensor& gate) {
  STD_TORCH_CHECK(dy.dim() == 3, "dy must be [B, N, D]");
  const int64_t batch = dy.size(0), tokens = dy.size(1), width = dy.size(2);
  check_dense(dy, "dy", {batch, tokens, width});
  check_dense(branch, "branch", {batch, tokens, width});
  const Rows gate_rows(gate, "gate", batch, tokens, width);
  Tensor dbranch = empty_like_shape(branch, {batch, tokens, width}, branch.scalar_type());
  RowGradient dgate(gate, gate_rows.count, tokens, width);

  with_type(dy.scalar_type(), [&](auto y_tag) {
    with_type(branch.scalar_type(), [&](auto branch_tag) {
      using TB = decltype(branch_tag);
      const auto* grad = static_cast<const decltype(y_tag)*>(dy.const_data_ptr());
      const auto* added = static_cast<const TB*>(branch.const_data_ptr());
      auto* out = static_cast<TB*>(dbranch.mutable_data_ptr());
      const auto read = [&](std::vector<float>& gain, int64_t b, int64_t n) { gate_rows.read(b, n, 0.0f, gain.data(), width); };
      sum_over_rows<1>(batch, tokens, gate_rows.count, width, [&] { return std::vector<float>(width); }, read,
        [&](std::vector<float>& gain, int64_t token, auto group, float** sums) {
          for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
            const Vec by = load(gain.data() + i, count);
            Vec total(0.0f);
            for_group<group>([&](int r) MINISORA_INLINE {
              const int64_t j = (token + r) * width + i;
              const Vec g = load(grad + j, count);
              store(out + j, g * by, count);
              total = at::vec::fmadd(g, load(added + j, count), total);
            });
            store(sums[0] + i, load(sums[0] + i, count) + total, count);
          });
        },
        [](std::vector<float>&, int64_t, float**) {},
        [&](int64_t b, int64_t row, int64_t first, int64_t last, float** sums) { dgate.set(b, row, first, last, sums[0]); });
    });
  });
  return {dbranch, dgate.result()};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("gate_residual_fwd", TORCH_BOX(&gate_residual_fwd));
  m.impl("gate_residual_bwd", TORCH_BOX(&gate_residual_bwd));
}

} // namespace minisora
