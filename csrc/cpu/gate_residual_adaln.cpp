// gate_residual_adaln: equation and derivation in minisora_kernels/ops/gate_residual_adaln.py.
#include "adaln.h"

namespace minisora {
namespace {

struct Scratch : AdaLNScratch {
  std::vector<float> gate, group; // group: of tokens, the residual in x's dtype, or dy in fp32
  explicit Scratch(int64_t width) : AdaLNScratch(width), gate(width), group(kGroup * width) {}
};

template <class T>
void widen(const T* in, float* out, int64_t size) {
  for_columns(size, [&](int64_t i, auto count) MINISORA_INLINE { store(out + i, load(in + i, count), count); });
}

// residual = x + gate * (branch + bias) and its statistics, for G tokens. The residual is rounded to x's dtype before
// the norm reads it, as the two separate ops do. It goes to memory and to `copy`, from which the norm reads it.
template <int G, class TX, class TB, class How>
void add_gated(
    const TX* x, const TB* branch, const float* bias, const float* gates, TX* residual, TX* copy, int64_t width,
    bool rms, float eps, float* mean, float* rstd, How how) {
  Sum sums[G];
  for_columns(width, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
    const Vec gate = load(gates + i, count), offset = load(bias + i, count);
    for_group<G>([&](int r) MINISORA_INLINE {
      const int64_t j = r * width + i;
      const Vec added = load_ahead<G>(branch, r, i, width, count) + offset;
      const Vec rounded = round_to<TX>(at::vec::fmadd(gate, added, load_ahead<G>(x, r, i, width, count)));
      how.put(residual + j, rounded, count);
      store(copy + j, rounded, count);
      Vec& sum = sums[r].part[chain<G>(u)];
      sum = sum + first_lanes(rounded, count);
    });
  });
  statistics(copy, sums, width, rms, eps, mean, rstd);
}

// dx = g = dresidual + dx of adaln, dbranch = gate * g, dgate += g * (branch + bias), sum_g += g, for G tokens; what is
// null is not asked for
template <int G, class TX, class TY, class TB, class How>
void add_gated_backward(
    const AdaLNBackward<G>& backward, const TX* dresidual, const TX* residual, const TY* dy, const TB* branch,
    const float* bias, const float* gains, const float* gates, TX* dx, TB* dbranch, float* dgate, float* sum_g,
    int64_t width, How how) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    const Vec gain = load(gains + i, count), gate = load(gates + i, count), offset = load(bias + i, count);
    Vec total(0.0f), total_g(0.0f);
    for_group<G>([&](int r) MINISORA_INLINE {
      const int64_t j = r * width + i;
      const Vec g = load_ahead<G>(dresidual, r, i, width, count) +
                    backward.dx(r, load(residual + j, count), load(dy + j, count), gain);
      if (dgate != nullptr) total = at::vec::fmadd(g, load_ahead<G>(branch, r, i, width, count) + offset, total);
      total_g = total_g + g;
      if (dx != nullptr) how.put(dx + j, g, count);
      if (dbranch != nullptr) how.put(dbranch + j, g * gate, count);
    });
    if (dgate != nullptr) store(dgate + i, load(dgate + i, count) + total, count);
    if (sum_g != nullptr) store(sum_g + i, load(sum_g + i, count) + total_g, count);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_fwd(
    const Tensor& x, const Tensor& branch, std::optional<Tensor> gate, std::optional<Tensor> branch_bias,
    std::optional<Tensor> shift, std::optional<Tensor> scale, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> index, bool rms, double eps, ScalarType out_dtype) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_dense(x, "x", {batch, tokens, width});
  check_dense(branch, "branch", {batch, tokens, width});
  const int64_t divided = index ? 0 : tokens;
  const Rows gate_rows(gate, "gate", 1.0f, batch, divided, width),
      shift_rows(shift, "shift", 0.0f, batch, divided, width), scale_rows(scale, "scale", 0.0f, batch, divided, width);
  const Division division(index, batch, tokens, common_rows({gate_rows.count, shift_rows.count, scale_rows.count}));
  const auto w = affine(weight, "weight", 1.0f, width), c = affine(bias, "bias", 0.0f, width),
             offset = affine(branch_bias, "branch_bias", kNoBias, width);
  Tensor residual = empty_like_shape(x, {batch, tokens, width}, x.scalar_type());
  Tensor y = empty_like_shape(x, {batch, tokens, width}, out_dtype);
  Tensor mean = empty_like_shape(x, {batch, tokens}, ScalarType::Float),
         rstd = empty_like_shape(x, {batch, tokens}, ScalarType::Float);
  float* means = static_cast<float*>(mean.mutable_data_ptr());
  float* rstds = static_cast<float*>(rstd.mutable_data_ptr());
  const void* x_data = x.const_data_ptr();
  const void* branch_data = branch.const_data_ptr();
  void* residual_data = residual.mutable_data_ptr();
  void* y_data = y.mutable_data_ptr();
  const ScalarType x_dtype = x.scalar_type(), branch_dtype = branch.scalar_type();

  const auto read = [&](Scratch& s, int64_t b, int64_t row) {
    gate_rows.read(b, row, division, 0.0f, s.gate.data(), width);
    s.read(shift_rows, scale_rows, w, c, b, row, division);
  };
  for_tokens(
      batch, tokens, division, [&] { return Scratch(width); }, read,
      [&](Scratch& s, int64_t token, auto group) {
        constexpr int G = group;
        const int64_t at = token * width;
        with_types(x_dtype, branch_dtype, [&](auto x_tag, auto branch_tag) {
          using TX = decltype(x_tag);
          const auto* in = static_cast<const TX*>(x_data);
          const auto* added = static_cast<const decltype(branch_tag)*>(branch_data);
          auto *out = static_cast<TX*>(residual_data), *copy = reinterpret_cast<TX*>(s.group.data());
          with_put(past_caches(out, residual.numel(), width), [&](auto how) {
            add_gated<G>(
                in + at, added + at, offset.data(), s.gate.data(), out + at, copy, width, rms, static_cast<float>(eps),
                means + token, rstds + token, how);
          });
        });
        with_type(x_dtype, [&](auto x_tag) {
          const auto* copy = reinterpret_cast<const decltype(x_tag)*>(s.group.data());
          with_type(out_dtype, [&](auto y_tag) {
            auto* out = static_cast<decltype(y_tag)*>(y_data);
            with_put(past_caches(out, y.numel(), width), [&](auto how) {
              modulate<G>(copy, means + token, rstds + token, s, out + at, how);
            });
          });
        });
      });
  return {residual, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_bwd(
    const Tensor& dresidual, const Tensor& dy, const Tensor& residual, std::optional<Tensor> branch,
    std::optional<Tensor> gate, std::optional<Tensor> branch_bias, std::optional<Tensor> scale,
    std::optional<Tensor> weight, std::optional<Tensor> bias, const Tensor& mean, const Tensor& rstd,
    std::optional<Tensor> index, bool rms, bool need_x, std::optional<ScalarType> dbranch_dtype,
    std::optional<ScalarType> gate_dtype, int64_t gate_rows, std::optional<ScalarType> branch_bias_dtype,
    std::optional<ScalarType> shift_dtype, int64_t shift_rows, std::optional<ScalarType> scale_dtype,
    int64_t scale_rows, std::optional<ScalarType> weight_dtype, std::optional<ScalarType> bias_dtype) {
  STD_TORCH_CHECK(residual.dim() == 3, "residual must be [B, N, D]");
  const int64_t batch = residual.size(0), tokens = residual.size(1), width = residual.size(2);
  check_dense(residual, "residual", {batch, tokens, width});
  check_dense(dresidual, "dresidual", {batch, tokens, width});
  STD_TORCH_CHECK(dresidual.scalar_type() == residual.scalar_type(), "dresidual must have the dtype of residual");
  check_dense(dy, "dy", {batch, tokens, width});
  if (branch) check_dense(*branch, "branch", {batch, tokens, width});
  STD_TORCH_CHECK(
      branch.has_value() == gate_dtype.has_value(), "the gradient of gate needs branch, which no other does");
  check_statistic(mean, "mean", {batch, tokens});
  check_statistic(rstd, "rstd", {batch, tokens});
  const int64_t divided = index ? 0 : tokens;
  const Rows gates(gate, "gate", 1.0f, batch, divided, width),
      shift(std::nullopt, "shift", 0.0f, batch, divided, width), scales(scale, "scale", 0.0f, batch, divided, width);
  const auto w = affine(weight, "weight", 1.0f, width), c = affine(bias, "bias", 0.0f, width),
             offset = affine(branch_bias, "branch_bias", kNoBias, width);
  const Division division(
      index, batch, tokens, common_rows({gates.count, scales.count, gate_rows, shift_rows, scale_rows}));
  const ScalarType x_dtype = residual.scalar_type(), y_dtype = dy.scalar_type(),
                   branch_dtype = branch ? branch->scalar_type() : dbranch_dtype.value_or(x_dtype);
  Tensor dx = empty_if_asked(residual, {batch, tokens, width}, need_x ? std::optional(x_dtype) : std::nullopt);
  Tensor dbranch = empty_if_asked(residual, {batch, tokens, width}, dbranch_dtype);
  RowGradient dgate("gate", gate_dtype, gate_rows, division, residual),
      dshift("shift", shift_dtype, shift_rows, division, residual),
      dscale("scale", scale_dtype, scale_rows, division, residual);
  AffineGradient dweight(weight_dtype, residual), dbias(bias_dtype, residual),
      dbranch_bias(branch_bias_dtype, residual);
  const float* means = static_cast<const float*>(mean.const_data_ptr());
  const float* rstds = static_cast<const float*>(rstd.const_data_ptr());
  const void* residual_data = residual.const_data_ptr();
  const void* dresidual_data = dresidual.const_data_ptr();
  const void* dy_data = dy.const_data_ptr();
  const void* branch_data = branch ? branch->const_data_ptr() : nullptr;
  // Which gradients are asked for: those before the norm, and sums. The sums of the gate, and of what goes to x, stand
  // behind the others.
  const bool through = need_x || dbranch_dtype || gate_dtype || branch_bias_dtype,
             modulation = shift_dtype || scale_dtype || weight_dtype || bias_dtype;
  const int gate_sum = modulation ? 2 : 0, x_sum = gate_sum + gate_dtype.has_value();

  const auto read = [&](Scratch& s, int64_t b, int64_t row) {
    gates.read(b, row, division, 0.0f, s.gate.data(), width);
    s.read(shift, scales, w, c, b, row, division);
  };
  sum_over_rows(
      x_sum + branch_bias_dtype.has_value(), batch, tokens, division, width, [&] { return Scratch(width); }, read,
      [&](Scratch& s, int64_t token, auto group, float** sums) {
        constexpr int G = group;
        const int64_t at = token * width;
        float *sum_dy = modulation ? sums[0] : nullptr, *sum_dy_h = modulation ? sums[1] : nullptr,
              *sum_gate = gate_dtype ? sums[gate_sum] : nullptr, *sum_x = branch_bias_dtype ? sums[x_sum] : nullptr;
        const auto run = [&](auto x_tag, auto branch_tag, const auto* grad_y) {
          using TX = decltype(x_tag);
          using TB = decltype(branch_tag);
          const auto *in = static_cast<const TX*>(residual_data) + at,
                     *grad = static_cast<const TX*>(dresidual_data) + at;
          const AdaLNBackward<G> backward(in, grad_y, means + token, rstds + token, s, rms, sum_dy, sum_dy_h);
          if (!through) return;
          auto* out = data_if<TX>(need_x, dx);
          auto* out_branch = data_if<TB>(dbranch_dtype.has_value(), dbranch);
          const bool streamed = (!out || past_caches(out, dx.numel(), width)) &&
                                (!out_branch || past_caches(out_branch, dbranch.numel(), width));
          with_put(streamed, [&](auto how) {
            add_gated_backward<G>(
                backward, grad, in, grad_y, branch_data ? static_cast<const TB*>(branch_data) + at : nullptr,
                offset.data(), s.gain.data(), s.gate.data(), out ? out + at : out,
                out_branch ? out_branch + at : out_branch, sum_gate, sum_x, width, how);
          });
        };
        with_types(x_dtype, branch_dtype, [&](auto x_tag, auto branch_tag) {
          using TB = decltype(branch_tag);
          if (y_dtype == branch_dtype) return run(x_tag, branch_tag, static_cast<const TB*>(dy_data) + at);
          with_type(y_dtype, [&](auto y_tag) { // few calls have another: they read it in fp32
            widen(static_cast<const decltype(y_tag)*>(dy_data) + at, s.group.data(), G * width);
          });
          run(x_tag, branch_tag, static_cast<const float*>(s.group.data()));
        });
      },
      [&](Scratch& s, int64_t task, float** sums) {
        dweight.add(task, s.one_plus_scale.data(), sums[1]);
        dbias.add(task, s.one_plus_scale.data(), sums[0]);
        dbranch_bias.add(task, s.gate.data(), sums[x_sum]);
      },
      [&](int64_t b, int64_t row, int64_t first, int64_t last, float** sums) {
        dgate.set(b, row, first, last, sums[gate_sum]);
        if (!modulation) return;
        dshift.set(b, row, first, last, sums[0]);
        for (int64_t i = first; i < last; ++i) sums[1][i] = w[i] * sums[1][i] + c[i] * sums[0][i];
        dscale.set(b, row, first, last, sums[1]);
      });
  return {dx,
          dbranch,
          dgate.result(),
          dbranch_bias.result(),
          dshift.result(),
          dscale.result(),
          dweight.result(),
          dbias.result()};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("gate_residual_adaln_fwd", TORCH_BOX(&gate_residual_adaln_fwd));
  m.impl("gate_residual_adaln_bwd", TORCH_BOX(&gate_residual_adaln_bwd));
}

} // namespace minisora
