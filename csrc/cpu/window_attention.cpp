// window_attention: equation and derivation in minisora_kernels/ops/window_attention.py.
//
// The kernel gathers the heads of a window from the packed projection into dense rows, and applies norm and rotary
// embedding on the way. It attends in blocks of kSide queries by kSide keys. A block of scores is transposed: a row per
// key, a lane per query. So the softmax over the keys needs no sum across lanes.
#include "window_attention.h"

#if defined(__AVX512BF16__)
#include "window_attention_bf16.h"
#endif

namespace minisora {
namespace {

// In fp32, for every dtype.
struct Float32 {
  using S = float;
  static constexpr int64_t kRow = V, kRows = V, kTerms = 1;

  const Problem& p;
  const int64_t row, lanes_;
  std::vector<float> q_t, d_t, o, weights, dscores, greatest, total, shrink, delta, dk, dv;

  explicit Float32(const Problem& p)
      : p(p),
        row(p.row()),
        lanes_(whole_vectors(std::min(p.length, kSide))),
        q_t(row * lanes_),
        d_t(row * lanes_),
        o(lanes_ * row),
        weights(lanes_ * lanes_),
        dscores(lanes_ * lanes_),
        greatest(lanes_),
        total(lanes_),
        shrink(lanes_),
        delta(lanes_),
        dk(p.length * row),
        dv(p.length * row) {}

  template <class T>
  void forward(Gathered<float, T>& g, const Window& w, int64_t head) {
    const float *q = g.q(head), *k = g.k(head), *v = g.v(head);
    for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
      const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole_vectors(qn);
      transpose(lanes, row, q + q0 * row, row, q_t.data(), lanes);
      std::fill(greatest.begin(), greatest.end(), std::numeric_limits<float>::lowest());
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.size() - k0);
        product(kn, lanes / V, p.width, {k + k0 * row, row, 1}, q_t.data(), lanes, weights.data(), lanes, false);
        if (p.bias) add_bias(p, w, head, k0, kn, q0, qn, weights.data(), lanes);
        softmax_block(weights.data(), kn, lanes, lanes, greatest.data(), total.data(), shrink.data());
        for (int64_t i = 0; k0 > 0 && i < qn; ++i)
          write_row(o.data() + i * row, shrink[i], o.data() + i * row, p.width);
        product(qn, row / V, kn, {weights.data(), 1, lanes}, v + k0 * row, row, o.data(), row, k0 > 0);
      }
      for (int64_t i = 0; i < qn; ++i) {
        const float* from = o.data() + i * row;
        T* to = g.result(head, q0 + i);
        // Division: a reciprocal would put one rounding error on the whole row.
        const Vec divisor(total[i]);
        for_columns(p.width, [&](int64_t c, auto count) MINISORA_INLINE {
          store(to + c, load(from + c, count) / divisor, count);
        });
        g.softmax(head, q0 + i)[0] = greatest[i];
        g.softmax(head, q0 + i)[1] = total[i];
      }
    }
  }

  template <class T>
  void backward(
      Gathered<float, T>& g, const Window& w, Reader& reader, int64_t head, float* dgain_q, float* dgain_k,
      float* dbias) {
    const float *q = g.q(head), *k = g.k(head), *v = g.v(head), *d = g.d(head);
    float* dq = o.data();
    for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
      const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole_vectors(qn);
      for (int64_t i = 0; i < qn; ++i) {
        greatest[i] = g.softmax(head, q0 + i)[0];
        total[i] = g.softmax(head, q0 + i)[1];
        delta[i] = g.delta(head, q0 + i);
      }
      transpose(lanes, row, q + q0 * row, row, q_t.data(), lanes);
      transpose(lanes, row, d + q0 * row, row, d_t.data(), lanes);
      for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.size() - k0);
        product(kn, lanes / V, p.width, {k + k0 * row, row, 1}, q_t.data(), lanes, weights.data(), lanes, false);
        product(kn, lanes / V, p.width, {v + k0 * row, row, 1}, d_t.data(), lanes, dscores.data(), lanes, false);
        if (p.bias) add_bias(p, w, head, k0, kn, q0, qn, weights.data(), lanes);
        for (int64_t i = 0; i < lanes; i += V) {
          float* weight = weights.data() + i;
          float* dscore = dscores.data() + i;
          const Vec top = Vec::loadu(greatest.data() + i), inverse = Vec(1.0f) / Vec::loadu(total.data() + i);
          // delta = rowsum(P * dP) where all keys are in the block: dP is at hand, and not rounded as out is
          Vec sum(0.0f);
          for (int64_t j = 0; j < kn; ++j) {
            const Vec value = exp(Vec::loadu(weight + j * lanes) - top) * inverse;
            value.store(weight + j * lanes);
            sum = at::vec::fmadd(value, Vec::loadu(dscore + j * lanes), sum);
          }
          if (!p.one_block()) sum = Vec::loadu(delta.data() + i);
          for (int64_t j = 0; j < kn; ++j) {
            (Vec::loadu(weight + j * lanes) * (Vec::loadu(dscore + j * lanes) - sum)).store(dscore + j * lanes);
          }
        }
        product(kn, row / V, qn, {weights.data(), lanes, 1}, d + q0 * row, row, dv.data() + k0 * row, row, q0 > 0);
        product(kn, row / V, qn, {dscores.data(), lanes, 1}, q + q0 * row, row, dk.data() + k0 * row, row, q0 > 0);
        product(qn, row / V, kn, {dscores.data(), 1, lanes}, k + k0 * row, row, dq, row, k0 > 0);
        if (dbias != nullptr) add_bias_gradient(p, w, k0, kn, q0, qn, dscores.data(), lanes, dbias);
      }
      for (int64_t i = 0; i < qn; ++i) {
        reader.read_backward(
            g.raw(0, head, q0 + i), w, q0 + i, p.gain[0].data() + head * p.width, dq + i * row,
            g.result(head, q0 + i, 0), dgain_q);
      }
    }
    for (int64_t n = 0; n < w.size(); ++n) {
      reader.read_backward(
          g.raw(1, head, n), w, n, p.gain[1].data() + head * p.width, dk.data() + n * row, g.result(head, n, 1),
          dgain_k);
      write_row(dv.data() + n * row, 1.0f, g.result(head, n, 2), p.width);
    }
  }
};

// The kernel for qkv of type T.
#if defined(__AVX512BF16__)
template <class T>
using KernelOf = std::conditional_t<std::is_same_v<T, BFloat16>, Pairs, Float32>;
#else
template <class T>
using KernelOf = Float32;
#endif

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
        p, static_cast<const T*>(qkv.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
        static_cast<float*>(softmax.mutable_data_ptr()));
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
        p, static_cast<const T*>(dout.const_data_ptr()), static_cast<const T*>(qkv.const_data_ptr()),
        static_cast<const T*>(out.const_data_ptr()), static_cast<const float*>(softmax.const_data_ptr()),
        data_if<T>(need_qkv, dqkv), partial);
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
