// The kernels of attention and window_attention.
//
// They gather the heads of a window into dense rows, and apply norm and rotary embedding on the way. They attend in
// blocks of kSide queries by kSide keys. A block of scores is transposed: a row per key, a lane per query. So the
// softmax over the keys needs no sum across lanes.
#pragma once

#include "attention.h"

#if defined(__AVX512BF16__)
#include "attention_bf16.h"
#endif

namespace minisora {

// In fp32, for every dtype.
struct Float32 {
  using S = float;
  static constexpr int64_t kRow = V, kRows = V, kTerms = 1;

  const Problem& p;
  const int64_t row, lanes_, side; // of queries, of keys
  std::vector<float> q_t, d_t, o, weights, dscores, greatest, total, shrink, delta, dk, dv;

  explicit Float32(const Problem& p)
      : p(p),
        row(p.row()),
        lanes_(whole_vectors(std::min(p.length, kSide))),
        side(std::min(p.keys, kSide)),
        q_t(row * lanes_),
        d_t(row * lanes_),
        o(lanes_ * row),
        weights(side * lanes_),
        dscores(side * lanes_),
        greatest(lanes_),
        total(lanes_),
        shrink(lanes_),
        delta(lanes_),
        dk(p.keys * row),
        dv(p.keys * row) {}

  template <class T>
  void forward(Gathered<float, T>& g, const Window& w, int64_t head) {
    const float *q = g.q(head), *k = g.k(head), *v = g.v(head);
    for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
      const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole_vectors(qn);
      transpose(lanes, row, q + q0 * row, row, q_t.data(), lanes);
      std::fill(greatest.begin(), greatest.end(), std::numeric_limits<float>::lowest());
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t k0 = 0; k0 < w.keys(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.keys() - k0);
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
      for (int64_t k0 = 0; k0 < w.keys(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.keys() - k0);
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
    for (int64_t n = 0; n < w.keys(); ++n) {
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

// Compiled once, with window_attention.cpp.
#define MINISORA_ATTENTION(extern_or_nothing, T)                                                              \
  extern_or_nothing template void forward<KernelOf<T>, T>(const Problem&, const Parts<const T>&, T*, float*); \
  extern_or_nothing template void backward<KernelOf<T>, T>(                                                   \
      const Problem&, const T*, const Parts<const T>&, const T*, const float*, const Parts<T>&, Partial&);

MINISORA_ATTENTION(extern, float)
MINISORA_ATTENTION(extern, BFloat16)
MINISORA_ATTENTION(extern, Half)

} // namespace minisora
