// adaln: equation and derivation in minisora_kernels/ops/adaln.py.
#include "adaln.h"

namespace minisora {
namespace {

std::tuple<Tensor, Tensor, Tensor> adaln_fwd(
    const Tensor& x, std::optional<Tensor> shift, std::optional<Tensor> scale, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> index, bool rms, double eps, ScalarType out_dtype) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_dense(x, "x", {batch, tokens, width});
  const int64_t divided = index ? 0 : tokens;
  const Rows shift_rows(shift, "shift", 0.0f, batch, divided, width),
      scale_rows(scale, "scale", 0.0f, batch, divided, width);
  const Division division(index, batch, tokens, common_rows({shift_rows.count, scale_rows.count}));
  const auto w = affine(weight, "weight", 1.0f, width), c = affine(bias, "bias", 0.0f, width);
  Tensor y = empty_like_shape(x, {batch, tokens, width}, out_dtype);
  Tensor mean = empty_like_shape(x, {batch, tokens}, ScalarType::Float),
         rstd = empty_like_shape(x, {batch, tokens}, ScalarType::Float);
  float* means = static_cast<float*>(mean.mutable_data_ptr());
  float* rstds = static_cast<float*>(rstd.mutable_data_ptr());

  with_result(x.scalar_type(), out_dtype, [&](auto x_tag, auto y_tag) {
    const auto* in = static_cast<const decltype(x_tag)*>(x.const_data_ptr());
    auto* out = static_cast<decltype(y_tag)*>(y.mutable_data_ptr());
    const bool streamed = past_caches(out, y.numel(), width);
    const auto read = [&](AdaLNScratch& s, int64_t b, int64_t row) {
      s.read(shift_rows, scale_rows, w, c, b, row, division);
    };
    for_tokens(
        batch, tokens, division, [&] { return AdaLNScratch(width); }, read,
        [&](AdaLNScratch& s, int64_t token, auto group) {
          constexpr int G = group;
          const auto* from = in + token * width;
          Sum sums[G];
          for_columns(width, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
            for_group<G>([&](int r) MINISORA_INLINE {
              Vec& sum = sums[r].part[chain<G>(u)];
              sum = sum + load_ahead<G>(from, r, i, width, count);
            });
          });
          statistics(from, sums, width, rms, static_cast<float>(eps), means + token, rstds + token);
          with_put(streamed, [&](auto how) {
            modulate<G>(from, means + token, rstds + token, s, out + token * width, how);
          });
        });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_bwd(
    const Tensor& dy, const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> weight,
    std::optional<Tensor> bias, const Tensor& mean, const Tensor& rstd, std::optional<Tensor> index, bool rms,
    bool need_x, std::optional<ScalarType> shift_dtype, int64_t shift_rows, std::optional<ScalarType> scale_dtype,
    int64_t scale_rows, std::optional<ScalarType> weight_dtype, std::optional<ScalarType> bias_dtype) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_dense(x, "x", {batch, tokens, width});
  check_dense(dy, "dy", {batch, tokens, width});
  check_statistic(mean, "mean", {batch, tokens});
  check_statistic(rstd, "rstd", {batch, tokens});
  const Rows shift(std::nullopt, "shift", 0.0f, batch, tokens, width),
      scales(scale, "scale", 0.0f, batch, index ? 0 : tokens, width);
  const auto w = affine(weight, "weight", 1.0f, width), c = affine(bias, "bias", 0.0f, width);
  const Division division(index, batch, tokens, common_rows({scales.count, shift_rows, scale_rows}));
  Tensor dx = empty_if_asked(x, {batch, tokens, width}, need_x ? std::optional(x.scalar_type()) : std::nullopt);
  RowGradient dshift("shift", shift_dtype, shift_rows, division, x),
      dscale("scale", scale_dtype, scale_rows, division, x);
  AffineGradient dweight(weight_dtype, x), dbias(bias_dtype, x);
  const bool summed = shift_dtype || scale_dtype || weight_dtype || bias_dtype;
  const float* means = static_cast<const float*>(mean.const_data_ptr());
  const float* rstds = static_cast<const float*>(rstd.const_data_ptr());

  with_result(x.scalar_type(), dy.scalar_type(), [&](auto x_tag, auto y_tag) {
    using TX = decltype(x_tag);
    const auto* in = static_cast<const TX*>(x.const_data_ptr());
    const auto* grad = static_cast<const decltype(y_tag)*>(dy.const_data_ptr());
    auto* out = data_if<TX>(need_x, dx);
    const bool streamed = past_caches(out, dx.numel(), width);
    const auto read = [&](AdaLNScratch& s, int64_t b, int64_t row) { s.read(shift, scales, w, c, b, row, division); };
    sum_over_rows(
        summed ? 2 : 0, batch, tokens, division, width, [&] { return AdaLNScratch(width); }, read,
        [&](AdaLNScratch& s, int64_t token, auto group, float** sums) {
          constexpr int G = group;
          const int64_t at = token * width;
          const AdaLNBackward<G> backward(in + at, grad + at, means + token, rstds + token, s, rms, sums[0], sums[1]);
          if (!need_x) return;
          with_put(streamed, [&](auto how) { backward.write(in + at, grad + at, s, out + at, how); });
        },
        [&](AdaLNScratch& s, int64_t task, float** sums) {
          dweight.add(task, s.one_plus_scale.data(), sums[1]);
          dbias.add(task, s.one_plus_scale.data(), sums[0]);
        },
        [&](int64_t b, int64_t row, int64_t first, int64_t last, float** sums) {
          dshift.set(b, row, first, last, sums[0]);
          for (int64_t i = first; i < last; ++i) sums[1][i] = w[i] * sums[1][i] + c[i] * sums[0][i];
          dscale.set(b, row, first, last, sums[1]);
        });
  });
  return {dx, dshift.result(), dscale.result(), dweight.result(), dbias.result()};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("adaln_fwd", TORCH_BOX(&adaln_fwd));
  m.impl("adaln_bwd", TORCH_BOX(&adaln_bwd));
}

} // namespace minisora
