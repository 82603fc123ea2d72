// attention: equation and derivation in minisora_kernels/ops/attention.py.
//
// A sample is one window of attention_kernels.h, whose keys and values are tokens of their own. Keys that do not count
// are never read.
#include "attention_kernels.h"

namespace minisora {
namespace {

template <class T, class Tensors>
Parts<T> parts(const Tensors& tensors, int64_t size) {
  Parts<T> found{{}, size};
  for (int i = 0; i < 3; ++i) {
    auto* const tensor = tensors[i];
    if (tensor == nullptr) continue;
    T* data;
    if constexpr (std::is_const_v<T>) {
      data = static_cast<T*>(tensor->const_data_ptr());
    } else {
      data = static_cast<T*>(tensor->mutable_data_ptr());
    }
    found.part[i] = {data, tensor->stride(0), tensor->stride(1), tensor->stride(2)};
  }
  return found;
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> lengths, std::optional<Tensor> index,
    double scale) {
  const Problem p(q, k, v, lengths, index, scale);
  Tensor out = empty_like_shape(q, {p.batch, p.tokens, p.heads * p.width}, q.scalar_type());
  Tensor softmax = empty_like_shape(q, {p.batch, p.tokens, p.heads, 2}, ScalarType::Float);
  if (p.tokens == 0) return {out, softmax};
  with_type(q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Tensor* tensors[] = {&q, &k, &v};
    forward<KernelOf<T>>(
        p, parts<const T>(tensors, 0), static_cast<T*>(out.mutable_data_ptr()),
        static_cast<float*>(softmax.mutable_data_ptr()));
  });
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& softmax,
    std::optional<Tensor> lengths, std::optional<Tensor> index, double scale, bool need_q, bool need_k, bool need_v) {
  const Problem p(q, k, v, lengths, index, scale);
  check_dense(dout, "dout", {p.batch, p.tokens, p.heads * p.width});
  check_dense(out, "out", {p.batch, p.tokens, p.heads * p.width});
  STD_TORCH_CHECK(
      dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type(),
      "dout and out must have the dtype of q");
  check_statistic(softmax, "softmax", {p.batch, p.tokens, p.heads, 2});
  const bool needs[] = {need_q, need_k, need_v};
  const int64_t counts[] = {p.tokens, p.keys, p.keys};
  Tensor gradients[3];
  Tensor* wanted[3];
  for (int i = 0; i < 3; ++i) {
    gradients[i] = needs[i] ? empty_like_shape(q, {p.batch, counts[i], p.heads, p.width}, q.scalar_type())
                            : empty_like_shape(q, {0}, q.scalar_type());
    wanted[i] = needs[i] ? &gradients[i] : nullptr;
    if (p.tokens == 0 && needs[i]) torch::stable::zero_(gradients[i]);
  }
  if (p.tokens == 0) return {gradients[0], gradients[1], gradients[2]};
  Partial partial(p, false, false, false);
  with_type(q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Tensor* tensors[] = {&q, &k, &v};
    backward<KernelOf<T>>(
        p, static_cast<const T*>(dout.const_data_ptr()), parts<const T>(tensors, 0),
        static_cast<const T*>(out.const_data_ptr()), static_cast<const float*>(softmax.const_data_ptr()),
        parts<T>(wanted, p.batch * std::min(p.tokens, p.keys) * p.heads * p.width), partial);
  });
  return {gradients[0], gradients[1], gradients[2]};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

} // namespace minisora
