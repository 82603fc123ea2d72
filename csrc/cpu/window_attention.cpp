// window_attention: equation and derivation in minisora_kernels/ops/window_attention.py.
//
#include "attention_kernels.h"

namespace minisora {

MINISORA_ATTENTION(, float)
MINISORA_ATTENTION(, BFloat16)
MINISORA_ATTENTION(, Half)

namespace {

// The gradient of a norm's weight, [head_dim] or [heads, head_dim], if there are sums of it: gain = factor * weight.
Tensor weight_gradient(
    const std::optional<Tensor>& weight, const Tensor& qkv, const float* partial, int64_t count, float factor) {
  if (partial == nullptr) return empty_like_shape(qkv, {0}, qkv.scalar_type());
  const int64_t size = weight->numel();
  Tensor gradient = torch::stable::new_empty(*weight, weight->sizes(), weight->scalar_type());
  with_type(weight->scalar_type(), [&](auto tag) {
    using TW = decltype(tag);
    auto* out = static_cast<TW*>(gradient.mutable_data_ptr());
    torch::stable::parallel_for(0, (size + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
      float total[kBlock];
      for (int64_t first = begin * kBlock; first < std::min(size, end * kBlock); first += kBlock) {
        const int64_t columns = std::min(kBlock, size - first);
        add_up(count / size, columns, total, [&](int64_t j) { return partial + j * size + first; });
        write_row(total, factor, out + first, columns);
      }
    });
  });
  return gradient;
}

Tensor bias_gradient(
    const Problem& p, const std::optional<Tensor>& bias, bool wanted, const Tensor& qkv, const Partial& partial) {
  if (!wanted) return empty_like_shape(qkv, {0}, qkv.scalar_type());
  Tensor gradient = empty_like_shape(*bias, {p.heads, p.length, p.length}, bias->scalar_type());
  with_type(bias->scalar_type(), [&](auto tag) {
    const auto sum = [&](int64_t from, int64_t count, float* row) {
      copy_row(partial.bias.get() + from, row, count);
      for (int64_t chunk = 1; chunk < partial.chunks; ++chunk) {
        const float* add = partial.bias.get() + chunk * p.heads * p.length * p.length + from;
        for_columns(
            count, [&](int64_t i, auto n) MINISORA_INLINE { store(row + i, load(row + i, n) + load(add + i, n), n); });
      }
    };
    transpose_squares(p.heads, p.length, sum, static_cast<decltype(tag)*>(gradient.mutable_data_ptr()));
  });
  return gradient;
}

std::tuple<Tensor, Tensor> window_attention_fwd(
    const Tensor& qkv, int64_t t, int64_t h, int64_t w, int64_t wt, int64_t wh, int64_t ww,
    std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, int64_t norm, std::optional<Tensor> cos,
    std::optional<Tensor> sin, bool interleaved, std::optional<Tensor> bias, double scale, double eps) {
  const Problem p(qkv, {t, h, w}, {wt, wh, ww}, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps);
  Tensor out = empty_like_shape(qkv, {p.batch, p.tokens, p.heads * p.width}, qkv.scalar_type());
  Tensor softmax = empty_like_shape(qkv, {p.batch, p.tokens, p.heads, 2}, ScalarType::Float);
  with_type(qkv.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    forward<KernelOf<T>>(
        p, Parts<const T>::packed(static_cast<const T*>(qkv.const_data_ptr()), p),
        static_cast<T*>(out.mutable_data_ptr()), static_cast<float*>(softmax.mutable_data_ptr()));
  });
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(
    const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& softmax, int64_t t, int64_t h, int64_t w,
    int64_t wt, int64_t wh, int64_t ww, std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, int64_t norm,
    std::optional<Tensor> cos, std::optional<Tensor> sin, bool interleaved, std::optional<Tensor> bias, double scale,
    double eps, bool need_qkv, bool need_q, bool need_k, bool need_bias) {
  const Problem p(qkv, {t, h, w}, {wt, wh, ww}, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps);
  check_dense(dout, "dout", {p.batch, p.tokens, p.heads * p.width});
  check_dense(out, "out", {p.batch, p.tokens, p.heads * p.width});
  STD_TORCH_CHECK(
      dout.scalar_type() == qkv.scalar_type() && out.scalar_type() == qkv.scalar_type(),
      "dout and out must have the dtype of qkv");
  check_statistic(softmax, "softmax", {p.batch, p.tokens, p.heads, 2});
  STD_TORCH_CHECK(bias.has_value() || !need_bias, "the gradient of a bias needs a bias");
  STD_TORCH_CHECK((q_weight || !need_q) && (k_weight || !need_k), "the gradient of a weight needs a weight");
  Tensor dqkv = need_qkv ? with_huge_pages(torch::stable::new_empty(qkv, qkv.sizes(), qkv.scalar_type()))
                         : empty_like_shape(qkv, {0}, qkv.scalar_type());
  Partial partial(p, need_q, need_k, need_bias);
  with_type(qkv.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    backward<KernelOf<T>>(
        p, static_cast<const T*>(dout.const_data_ptr()),
        Parts<const T>::packed(static_cast<const T*>(qkv.const_data_ptr()), p),
        static_cast<const T*>(out.const_data_ptr()), static_cast<const float*>(softmax.const_data_ptr()),
        Parts<T>::packed(data_if<T>(need_qkv, dqkv), p), partial);
  });
  return {
      dqkv, weight_gradient(q_weight, qkv, partial.gain[0].get(), partial.gains(), p.q_factor),
      weight_gradient(k_weight, qkv, partial.gain[1].get(), partial.gains(), 1.0f),
      bias_gradient(p, bias, need_bias, qkv, partial)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

} // namespace minisora
