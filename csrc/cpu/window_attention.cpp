// window_attention: equation and derivation in minisora_kernels/ops/window_attention.py.
//
// One (window, head) is read from the packed projection into dense fp32 rows, with norm and rotary embedding applied on the
// way, and attended in blocks of kSide queries by kSide keys. A block of scores is kept transposed, a row a key and a lane
// a query, so that the softmax over the keys needs no sum across lanes.
#include "window_attention.h"

#if defined(__AMX_BF16__)
#include "window_attention_amx.h"
#endif

namespace minisora {
namespace {

template <class T>
void forward(const Problem& p, const T* qkv, T* out, float* softmax) {
  const int64_t row = p.row(), width = p.width, all = p.heads * width, items = p.batch * p.windows;
  const int64_t queries = whole_vectors(std::min(p.length, kSide));
  torch::stable::parallel_for(0, p.batch * p.windows * p.heads, 1, [&](int64_t begin, int64_t end) {
    Window w;
    Reader reader(p);
    std::vector<float> k(p.length * row), v(p.length * row), q(queries * row), q_t(row * queries), o(queries * row);
    std::vector<float> scores(queries * queries), greatest(queries), total(queries), shrink(queries);
    for (int64_t unit = begin; unit < end; ++unit) {
      // Neighbouring heads lie side by side in qkv; but a head's bias is the more to read again.
      const int64_t head = p.bias ? unit / items : unit % p.heads, item = p.bias ? unit % items : unit / p.heads;
      const int64_t b = item / p.windows;
      w.enter(p, item % p.windows);
      const auto source = [&](int64_t n, int part) { return qkv + ((b * p.tokens + w.token[n]) * 3 + part) * all + head * width; };
      for (int64_t n = 0; n < w.size(); ++n) {
        prefetch(p, w, source, head, n);
        reader.read(source(n, 1), w, n, p.gain[1].data() + head * width, k.data() + n * row);
        copy_row(source(n, 2), v.data() + n * row, width);
      }
      for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
        const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole_vectors(qn);
        for (int64_t i = 0; i < qn; ++i) reader.read(source(q0 + i, 0), w, q0 + i, p.gain[0].data() + head * width, q.data() + i * row);
        transpose(lanes, row, q.data(), row, q_t.data(), lanes);
        std::fill(greatest.begin(), greatest.end(), std::numeric_limits<float>::lowest());
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
          const int64_t kn = std::min(kSide, w.size() - k0);
          product(kn, lanes / V, width, {k.data() + k0 * row, row, 1}, q_t.data(), lanes, scores.data(), lanes, false);
          if (p.bias) add_bias(p, w, head, k0, kn, q0, qn, scores.data(), lanes);
          softmax_block(scores.data(), kn, lanes, lanes, greatest.data(), total.data(), shrink.data());
          for (int64_t i = 0; k0 > 0 && i < qn; ++i) write_row(o.data() + i * row, shrink[i], o.data() + i * row, width);
          product(qn, row / V, kn, {scores.data(), 1, lanes}, v.data() + k0 * row, row, o.data(), row, k0 > 0);
        }
        for (int64_t i = 0; i < qn; ++i) {
          const int64_t n = b * p.tokens + w.token[q0 + i];
          const float* from = o.data() + i * row;
          T* to = out + n * all + head * width;
          // A reciprocal would put one rounding error on the whole row.
          const Vec divisor(total[i]);
          for_columns(width, [&](int64_t c, auto count) MINISORA_INLINE { store(to + c, load(from + c, count) / divisor, count); });
          softmax[2 * (n * p.heads + head)] = greatest[i];
          softmax[2 * (n * p.heads + head) + 1] = total[i];
        }
      }
    }
  });
}

template <class T>
void backward(
    const Problem& p, const T* dout, const T* qkv, const T* out, const float* softmax, T* dqkv, Partial& partial) {
  const int64_t row = p.row(), width = p.width, all = p.heads * width;
  const int64_t queries = whole_vectors(std::min(p.length, kSide));
  const bool one_block = p.length <= kSide;
  torch::stable::parallel_for(0, partial.tasks(), 1, [&](int64_t begin, int64_t end) {
    Window w;
    Reader reader(p);
    std::vector<float> k(p.length * row), v(p.length * row), dk(p.length * row), dv(p.length * row);
    std::vector<float> q(queries * row), q_t(row * queries), d(queries * row), d_t(row * queries), dq(queries * row);
    std::vector<float> weights(queries * queries), dscores(queries * queries);
    std::vector<float> greatest(queries), total(queries), delta(queries);

    const auto attend = [&](int64_t b, int64_t head, float* dgain_q, float* dgain_k, float* dbias) {
      const float *q_gain = p.gain[0].data() + head * width, *k_gain = p.gain[1].data() + head * width;
      const auto at = [&](int64_t n, int part) { return ((b * p.tokens + w.token[n]) * 3 + part) * all + head * width; };
      for (int64_t n = 0; n < w.size(); ++n) {
        prefetch(p, w, [&](int64_t m, int part) { return qkv + at(m, part); }, head, n);
        reader.read(qkv + at(n, 1), w, n, k_gain, k.data() + n * row);
        copy_row(qkv + at(n, 2), v.data() + n * row, width);
      }
      for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
        const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole_vectors(qn);
        for (int64_t i = 0; i < qn; ++i) {
          const int64_t n = b * p.tokens + w.token[q0 + i];
          reader.read(qkv + at(q0 + i, 0), w, q0 + i, q_gain, q.data() + i * row);
          const T* gradient = dout + n * all + head * width;
          copy_row(gradient, d.data() + i * row, width);
          greatest[i] = softmax[2 * (n * p.heads + head)];
          total[i] = softmax[2 * (n * p.heads + head) + 1];
          if (!one_block) delta[i] = dot(gradient, out + n * all + head * width, width);
        }
        transpose(lanes, row, q.data(), row, q_t.data(), lanes);
        transpose(lanes, row, d.data(), row, d_t.data(), lanes);
        for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
          const int64_t kn = std::min(kSide, w.size() - k0);
          product(kn, lanes / V, width, {k.data() + k0 * row, row, 1}, q_t.data(), lanes, weights.data(), lanes, false);
          product(kn, lanes / V, width, {v.data() + k0 * row, row, 1}, d_t.data(), lanes, dscores.data(), lanes, false);
          if (p.bias) add_bias(p, w, head, k0, kn, q0, qn, weights.data(), lanes);
          for (int64_t i = 0; i < lanes; i += V) {
            float* weight = weights.data() + i;
            float* dscore = dscores.data() + i;
            const Vec top = Vec::loadu(greatest.data() + i), inverse = Vec(1.0f) / Vec::loadu(total.data() + i);
            // delta = rowsum(P * dP) where all keys are in the block: it is at hand there, and not rounded as out is
            Vec sum(0.0f);
            for (int64_t j = 0; j < kn; ++j) {
              const Vec value = exp(Vec::loadu(weight + j * lanes) - top) * inverse;
              value.store(weight + j * lanes);
              sum = at::vec::fmadd(value, Vec::loadu(dscore + j * lanes), sum);
            }
            if (!one_block) sum = Vec::loadu(delta.data() + i);
            for (int64_t j = 0; j < kn; ++j) {
              (Vec::loadu(weight + j * lanes) * (Vec::loadu(dscore + j * lanes) - sum)).store(dscore + j * lanes);
            }
          }
          product(kn, row / V, qn, {weights.data(), lanes, 1}, d.data(), row, dv.data() + k0 * row, row, q0 > 0);
          product(kn, row / V, qn, {dscores.data(), lanes, 1}, q.data(), row, dk.data() + k0 * row, row, q0 > 0);
          product(qn, row / V, kn, {dscores.data(), 1, lanes}, k.data() + k0 * row, row, dq.data(), row, k0 > 0);
          if (dbias != nullptr) add_bias_gradient(p, w, k0, kn, q0, qn, dscores.data(), lanes, dbias);
        }
        for (int64_t i = 0; i < qn; ++i) {
          const int64_t place = at(q0 + i, 0);
          reader.read_backward(qkv + place, w, q0 + i, q_gain, dq.data() + i * row, dqkv + place, dgain_q);
        }
      }
      for (int64_t n = 0; n < w.size(); ++n) {
        reader.read_backward(qkv + at(n, 1), w, n, k_gain, dk.data() + n * row, dqkv + at(n, 1), dgain_k);
        write_row(dv.data() + n * row, 1.0f, dqkv + at(n, 2), width);
      }
    };

    for (int64_t task = begin; task < end; ++task) partial.run(p, task, w, attend);
  });
}

// The gradient of a norm's weight, [head_dim] or [heads, head_dim]: gain = factor * weight.
Tensor weight_gradient(const std::optional<Tensor>& weight, const Tensor& qkv, const std::vector<float>& partial, float factor) {
  if (!weight) return empty_like_shape(qkv, {0}, qkv.scalar_type());
  const int64_t size = weight->numel();
  std::vector<double> total(size);
  for (size_t i = 0; i < partial.size(); ++i) total[i % size] += partial[i];
  Tensor gradient = torch::stable::new_empty(*weight, weight->sizes(), weight->scalar_type());
  with_type(weight->scalar_type(), [&](auto tag) {
    using TW = decltype(tag);
    auto* out = static_cast<TW*>(gradient.mutable_data_ptr());
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<TW>(static_cast<float>(total[i] * factor));
  });
  return gradient;
}

Tensor bias_gradient(const Problem& p, const std::optional<Tensor>& bias, bool wanted, const Tensor& qkv, const Partial& partial) {
  if (!wanted) return empty_like_shape(qkv, {0}, qkv.scalar_type());
  Tensor gradient = empty_like_shape(*bias, {p.heads, p.length, p.length}, bias->scalar_type());
  with_type(bias->scalar_type(), [&](auto tag) {
    const auto sum = [&](int64_t from, int64_t count, float* row) {
      copy_row(partial.bias.get() + from, row, count);
      for (int64_t chunk = 1; chunk < partial.chunks; ++chunk) {
        const float* add = partial.bias.get() + chunk * p.heads * p.length * p.length + from;
        for_columns(count, [&](int64_t i, auto n) MINISORA_INLINE { store(row + i, load(row + i, n) + load(add + i, n), n); });
      }
    };
    transpose_squares(p.heads, p.length, sum, static_cast<decltype(tag)*>(gradient.mutable_data_ptr()));
  });
  return gradient;
}

std::tuple<Tensor, Tensor> window_attention_fwd(
    const Tensor& qkv, int64_t t, int64_t h, int64_t w, int64_t wt, int64_t wh, int64_t ww, std::optional<Tensor> q_weight,
    std::optional<Tensor> k_weight, int64_t norm, std::optional<Tensor> cos, std::optional<Tensor> sin, bool interleaved,
    std::optional<Tensor> bias, double scale, double eps) {
  const Problem p(qkv, {t, h, w}, {wt, wh, ww}, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps);
  Tensor out = empty_like_shape(qkv, {p.batch, p.tokens, p.heads * p.width}, qkv.scalar_type());
  Tensor softmax = empty_like_shape(qkv, {p.batch, p.tokens, p.heads, 2}, ScalarType::Float);
  with_type(qkv.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    forward(p, static_cast<const T*>(qkv.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), static_cast<float*>(softmax.mutable_data_ptr()));
  });
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(
    const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& softmax, int64_t t, int64_t h, int64_t w, int64_t wt,
    int64_t wh, int64_t ww, std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, int64_t norm, std::optional<Tensor> cos,
    std::optional<Tensor> sin, bool interleaved, std::optional<Tensor> bias, double scale, double eps, bool with_dbias) {
  const Problem p(qkv, {t, h, w}, {wt, wh, ww}, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps);
  check_dense(dout, "dout", {p.batch, p.tokens, p.heads * p.width});
  check_dense(out, "out", {p.batch, p.tokens, p.heads * p.width});
  STD_TORCH_CHECK(
      dout.scalar_type() == qkv.scalar_type() && out.scalar_type() == qkv.scalar_type(), "dout and out must have the dtype of qkv");
  check_statistic(softmax, "softmax", {p.batch, p.tokens, p.heads, 2});
  STD_TORCH_CHECK(bias.has_value() || !with_dbias, "the gradient of a bias needs a bias");
  Tensor dqkv = torch::stable::new_empty(qkv, qkv.sizes(), qkv.scalar_type());
  Partial partial(p, with_dbias);
  with_type(qkv.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    backward(
        p, static_cast<const T*>(dout.const_data_ptr()), static_cast<const T*>(qkv.const_data_ptr()),
        static_cast<const T*>(out.const_data_ptr()), static_cast<const float*>(softmax.const_data_ptr()),
        static_cast<T*>(dqkv.mutable_data_ptr()), partial);
  });
  return {
      dqkv, weight_gradient(q_weight, qkv, partial.gain[0], p.q_factor), weight_gradient(k_weight, qkv, partial.gain[1], 1.0f),
      bias_gradient(p, bias, with_dbias, qkv, partial)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

} // namespace minisora
