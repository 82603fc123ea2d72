// gelu_mlp: equation in minisora_kernels/ops/gelu_mlp.py.
#include "mlp.h"

namespace minisora {
namespace {

template <class Form>
struct Step {
  template <class T>
  static void forward(const T* h, T* a, int64_t hidden) {
    for_columns(
        hidden, [&](int64_t i, auto count) MINISORA_INLINE { store(a + i, Form::value(load(h + i, count)), count); });
  }

  template <class T>
  static void backward(const T* h, T* a, T* dh, float* sums, int64_t hidden) {
    for_columns(hidden, [&](int64_t i, auto count) MINISORA_INLINE {
      const auto [activated, slope] = Form::value_and_slope(load(h + i, count));
      if (a != nullptr) store(a + i, activated, count);
      if (dh == nullptr) return;
      const Vec slant = load(dh + i, count) * slope;
      store(dh + i, slant, count);
      if (sums != nullptr) store(sums + i, load(sums + i, count) + slant, count);
    });
  }
};

auto steps(bool exact) {
  return [exact](auto f) { exact ? f(Step<ExactGelu>{}) : f(Step<TanhGelu>{}); };
}

std::tuple<Tensor, Tensor> gelu_mlp_fwd(
    const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
    const std::optional<Tensor>& b2, bool exact, bool keep) {
  return mlp_fwd<1>(x, {w1, b1, std::nullopt, std::nullopt}, w2, b2, keep, steps(exact));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gelu_mlp_bwd(
    const Tensor& dy, const Tensor& h, std::optional<Tensor> w1, std::optional<Tensor> w2, bool exact, bool need_a,
    bool need_dh, bool need_b1) {
  return mlp_bwd<1>(dy, h, w1, std::nullopt, w2, need_a, need_dh, need_b1, steps(exact));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("gelu_mlp_fwd", TORCH_BOX(&gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd", TORCH_BOX(&gelu_mlp_bwd));
}

} // namespace minisora
