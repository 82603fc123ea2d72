// glu_mlp: equation in minisora_kernels/ops/glu_mlp.py.
#include "mlp.h"

namespace minisora {
namespace {

// A row of h has two halves: the gate, which is activated, and the value.
template <class Form>
struct Step {
  bool gate_first;

  template <class T>
  void forward(const T* h, T* a, int64_t hidden) const {
    const int64_t gate = gate_first ? 0 : hidden, value = hidden - gate;
    for_columns(hidden, [&](int64_t i, auto count) MINISORA_INLINE {
      store(a + i, Form::value(load(h + gate + i, count)) * load(h + value + i, count), count);
    });
  }

  template <class T>
  void backward(const T* h, T* a, T* dh, float* sums, int64_t hidden) const {
    const int64_t gate = gate_first ? 0 : hidden, value = hidden - gate;
    for_columns(hidden, [&](int64_t i, auto count) MINISORA_INLINE {
      const auto [activated, slope] = Form::value_and_slope(load(h + gate + i, count));
      const Vec u = load(h + value + i, count);
      if (a != nullptr) store(a + i, activated * u, count);
      if (dh == nullptr) return;
      const Vec da = load(dh + i, count);
      const auto put = [&](int64_t at, Vec slant) MINISORA_INLINE {
        store(dh + at, slant, count);
        if (sums != nullptr) store(sums + at, load(sums + at, count) + slant, count);
      };
      put(gate + i, da * u * slope);
      put(value + i, da * activated);
    });
  }
};

auto steps(int64_t activation, bool gate_first) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
  return [=](auto f) {
    if (activation == 0) return f(Step<Silu>{gate_first});
    activation == 1 ? f(Step<ExactGelu>{gate_first}) : f(Step<TanhGelu>{gate_first});
  };
}

std::tuple<Tensor, Tensor> glu_mlp_fwd(
    const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const std::optional<Tensor>& w3,
    const std::optional<Tensor>& b3, const Tensor& w2, const std::optional<Tensor>& b2, int64_t activation,
    bool gate_first, bool keep) {
  return mlp_fwd<2>(x, {w1, b1, w3, b3}, w2, b2, keep, steps(activation, gate_first));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> glu_mlp_bwd(
    const Tensor& dy, const Tensor& h, std::optional<Tensor> w1, std::optional<Tensor> w3, std::optional<Tensor> w2,
    int64_t activation, bool gate_first, bool need_a, bool need_dh, bool need_b1) {
  return mlp_bwd<2>(dy, h, w1, w3, w2, need_a, need_dh, need_b1, steps(activation, gate_first));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("glu_mlp_fwd", TORCH_BOX(&glu_mlp_fwd));
  m.impl("glu_mlp_bwd", TORCH_BOX(&glu_mlp_bwd));
}

} // namespace minisora
