// gelu_mlp: equation in minisora_kernels/ops/gelu_mlp.py. The matrix products are torch's; here is the activation.
//
// With s = sigmoid(2u), u = sqrt(2 / pi) * (h + 0.044715 h^3), the tanh form is gelu(h) = h * s, because
// (1 + tanh(u)) / 2 = s, and gelu'(h) = s + h * s * (1 - s) * 2u'.
#include "common.h"

namespace minisora {
namespace {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;
constexpr int64_t kGrain = 4096; // elements; a few microseconds

// q = exp(-u) and s = 1 / (1 + q^2). exp_u20 may saturate below inf; q^2 does not, so gelu(-inf) is nan as in torch.
struct Sigmoid {
  Vec q, s;

  Sigmoid(Vec h, Vec squared)
      : q((h * at::vec::fmadd(squared, Vec(-kSqrt2OverPi * kCubic), Vec(-kSqrt2OverPi))).exp_u20()),
        s(Vec(1.0f) / at::vec::fmadd(q, q, Vec(1.0f))) {}
};

// f(offset, count) over all elements, in parallel.
template <class F>
void for_all(int64_t size, F f) {
  torch::stable::parallel_for(0, (size + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kGrain, last = std::min(size, end * kGrain);
    for_columns(last - first, [&](int64_t i, auto count, auto) { f(first + i, count); });
  });
}

Tensor gelu_mlp_fwd(const Tensor& h) {
  check_dtype(h, "h");
  STD_TORCH_CHECK(h.is_contiguous(), "h must be contiguous");
  Tensor a = with_huge_pages(torch::stable::empty_like(h));
  with_type(h.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(h.const_data_ptr());
    T* out = static_cast<T*>(a.mutable_data_ptr());
    for_all(h.numel(), [=](int64_t i, auto count) {
      const Vec value = load(in + i, count);
      store(out + i, value * Sigmoid(value, value * value).s, count);
    });
  });
  return a;
}

std::tuple<Tensor, Tensor> gelu_mlp_bwd(const Tensor& h, const Tensor& da) {
  check_dtype(h, "h");
  STD_TORCH_CHECK(h.is_contiguous(), "h must be contiguous");
  STD_TORCH_CHECK(h.dim() == 2, "h must be [tokens, hidden]");
  check_dense(da, "da", {h.size(0), h.size(1)});
  STD_TORCH_CHECK(da.scalar_type() == h.scalar_type(), "da must have h's dtype");
  Tensor a = with_huge_pages(torch::stable::empty_like(h)), dh = with_huge_pages(torch::stable::empty_like(h));
  with_type(h.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(h.const_data_ptr());
    const T* grad = static_cast<const T*>(da.const_data_ptr());
    T* activation = static_cast<T*>(a.mutable_data_ptr());
    T* out = static_cast<T*>(dh.mutable_data_ptr());
    for_all(h.numel(), [=](int64_t i, auto count) {
      const Vec value = load(in + i, count);
      const Vec squared = value * value;
      const auto [q, s] = Sigmoid(value, squared);
      // 1 - s loses digits where s is near 1; q^2 s does not. In this order, with a finite q, it is 0 where s is 0.
      const Vec finite = at::vec::clamp_max(q, Vec(1e30f));
      const Vec complement = finite * s * finite;
      const Vec hs = value * s;
      const Vec slope = at::vec::fmadd(squared, Vec(6.0f * kSqrt2OverPi * kCubic), Vec(2.0f * kSqrt2OverPi));
      store(activation + i, hs, count);
      store(out + i, load(grad + i, count) * at::vec::fmadd(hs * complement, slope, s), count);
    });
  });
  return {a, dh};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("gelu_mlp_fwd", TORCH_BOX(&gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd", TORCH_BOX(&gelu_mlp_bwd));
}

} // namespace minisora
