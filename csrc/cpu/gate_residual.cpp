// gate_residual: equation and derivation in minisora_kernels/ops/gate_residual.py.
#include "rows.h"

namespace minisora {
namespace {

// y = x + gate * (branch + bias), for G tokens
template <int G, class TX, class TB, class How>
void add_gated(const TX* x, const TB* branch, const float* bias, const float* gates, TX* y, int64_t width, How how) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    const Vec gate = load(gates + i, count), offset = load(bias + i, count);
    for_group<G>([&](int r) MINISORA_INLINE {
      const Vec added = load_ahead<G>(branch, r, i, width, count) + offset;
      how.put(y + r * width + i, at::vec::fmadd(gate, added, load_ahead<G>(x, r, i, width, count)), count);
    });
  });
}

// dbranch = gate * dy, dgate += dy * (branch + bias), sum_dy += dy, for G tokens; what is null is not asked for
template <int G, class TY, class TB, class How>
void add_gated_backward(
    const TY* dy, const TB* branch, const float* bias, const float* gates, TB* dbranch, float* dgate, float* sum_dy,
    int64_t width, How how) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    const Vec gate = load(gates + i, count), offset = load(bias + i, count);
    Vec total(0.0f), total_dy(0.0f);
    for_group<G>([&](int r) MINISORA_INLINE {
      const int64_t j = r * width + i;
      const Vec g = load_ahead<G>(dy, r, i, width, count);
      if (dgate != nullptr) total = at::vec::fmadd(g, load_ahead<G>(branch, r, i, width, count) + offset, total);
      total_dy = total_dy + g;
      if (dbranch != nullptr) how.put(dbranch + j, g * gate, count);
    });
    if (dgate != nullptr) store(dgate + i, load(dgate + i, count) + total, count);
    if (sum_dy != nullptr) store(sum_dy + i, load(sum_dy + i, count) + total_dy, count);
  });
}

Tensor gate_residual_fwd(
    const Tensor& x, const Tensor& branch, std::optional<Tensor> gate, std::optional<Tensor> branch_bias,
    std::optional<Tensor> index) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_dense(x, "x", {batch, tokens, width});
  check_dense(branch, "branch", {batch, tokens, width});
  const Rows gate_rows(gate, "gate", 1.0f, batch, index ? 0 : tokens, width);
  const Division division(index, batch, tokens, gate_rows.count);
  const auto offset = affine(branch_bias, "branch_bias", kNoBias, width);
  Tensor y = empty_like_shape(x, {batch, tokens, width}, x.scalar_type());
  const auto read = [&](std::vector<float>& gain, int64_t b, int64_t row) {
    gate_rows.read(b, row, division, 0.0f, gain.data(), width);
  };

  with_types(x.scalar_type(), branch.scalar_type(), [&](auto x_tag, auto branch_tag) {
    using TX = decltype(x_tag);
    const auto* in = static_cast<const TX*>(x.const_data_ptr());
    const auto* add = static_cast<const decltype(branch_tag)*>(branch.const_data_ptr());
    auto* out = static_cast<TX*>(y.mutable_data_ptr());
    with_put(past_caches(out, y.numel(), width), [&](auto how) {
      for_tokens(
          batch, tokens, division, [&] { return std::vector<float>(width); }, read,
          [&](std::vector<float>& gain, int64_t token, auto group) {
            const int64_t at = token * width;
            add_gated<group>(in + at, add + at, offset.data(), gain.data(), out + at, width, how);
          });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gate_residual_bwd(
    const Tensor& dy, std::optional<Tensor> branch, std::optional<Tensor> gate, std::optional<Tensor> branch_bias,
    std::optional<Tensor> index, std::optional<ScalarType> branch_dtype, std::optional<ScalarType> gate_dtype,
    int64_t gate_rows, std::optional<ScalarType> bias_dtype) {
  STD_TORCH_CHECK(dy.dim() == 3, "dy must be [B, N, D]");
  const int64_t batch = dy.size(0), tokens = dy.size(1), width = dy.size(2);
  check_dense(dy, "dy", {batch, tokens, width});
  if (branch) check_dense(*branch, "branch", {batch, tokens, width});
  STD_TORCH_CHECK(
      branch.has_value() == gate_dtype.has_value(), "the gradient of gate needs branch, which no other does");
  const Rows gates(gate, "gate", 1.0f, batch, index ? 0 : tokens, width);
  const auto offset = affine(branch_bias, "branch_bias", kNoBias, width);
  const Division division(index, batch, tokens, common_rows({gates.count, gate_rows}));
  Tensor dbranch = empty_if_asked(dy, {batch, tokens, width}, branch_dtype);
  RowGradient dgate("gate", gate_dtype, gate_rows, division, dy);
  AffineGradient dbias(bias_dtype, dy);
  const int dy_sum = gate_dtype ? 1 : 0; // the place of the sum of dy, behind that of the gate
  const auto read = [&](std::vector<float>& gain, int64_t b, int64_t row) {
    gates.read(b, row, division, 0.0f, gain.data(), width);
  };

  with_types(
      dy.scalar_type(), branch ? branch->scalar_type() : branch_dtype.value_or(dy.scalar_type()),
      [&](auto y_tag, auto branch_tag) {
        using TB = decltype(branch_tag);
        const auto* grad = static_cast<const decltype(y_tag)*>(dy.const_data_ptr());
        const auto* added = branch ? static_cast<const TB*>(branch->const_data_ptr()) : nullptr;
        auto* out = data_if<TB>(branch_dtype.has_value(), dbranch);
        with_put(past_caches(out, dbranch.numel(), width), [&](auto how) {
          sum_over_rows(
              dy_sum + bias_dtype.has_value(), batch, tokens, division, width,
              [&] { return std::vector<float>(width); }, read,
              [&](std::vector<float>& gain, int64_t token, auto group, float** sums) {
                const int64_t at = token * width;
                add_gated_backward<group>(
                    grad + at, added ? added + at : added, offset.data(), gain.data(), out ? out + at : out,
                    gate_dtype ? sums[0] : nullptr, bias_dtype ? sums[dy_sum] : nullptr, width, how);
              },
              [&](std::vector<float>& gain, int64_t task, float** sums) { dbias.add(task, gain.data(), sums[dy_sum]); },
              [&](int64_t b, int64_t row, int64_t first, int64_t last, float** sums) {
                dgate.set(b, row, first, last, sums[0]);
              });
        });
      });
  return {dbranch, dgate.result(), dbias.result()};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("gate_residual_fwd", TORCH_BOX(&gate_residual_fwd));
  m.impl("gate_residual_bwd", TORCH_BOX(&gate_residual_bwd));
}

} // namespace minisora
