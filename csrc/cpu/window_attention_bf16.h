// window_attention in bfloat16 on CPUs that multiply it: the same blocks of transposed scores as in window_attention.cpp. Queries,
// keys, the weights P and dS are rounded to bfloat16 before they are multiplied, as in the reference; everything else is fp32.
#pragma once

#include "pairs.h"
#include "window_attention.h"

namespace minisora {

struct Pairs {
  using S = BFloat16;
  static constexpr int64_t kRow = 32, kTerms = pairs::kTerms, kRows = std::max<int64_t>(16, kTerms);

  const Problem& p;
  const pairs::Session session;
  const int64_t row, depth, columns; // of a token: from one to the next, as terms of a sum, as columns of a result
  std::vector<BFloat16> q_t, d_t, q_pairs, d_pairs, k_pairs, v_pairs; // right factors
  std::vector<BFloat16> weights, dscores, weight_pairs, scratch; // blocks of P and dS
  std::vector<float> scores, dweights, o, dk, dv, greatest, total, shrink, delta;

  explicit Pairs(const Problem& p)
      : p(p), row(whole(p.width, kRow)), depth(whole(p.width, kTerms)), columns(whole(p.width, 16)), q_t(kSide * row),
        d_t(kSide * row), q_pairs(kSide * row), d_pairs(kSide * row), k_pairs(whole(p.length, kRows) * row),
        v_pairs(whole(p.length, kRows) * row), weights(kSide * kSide), dscores(kSide * kSide), weight_pairs(kSide * kSide),
        scratch(kSide * kSide), scores(kSide * kSide), dweights(kSide * kSide), o(kSide * row), dk(whole(p.length, kRows) * row),
        dv(whole(p.length, kRows) * row), greatest(kSide), total(kSide), shrink(kSide), delta(kSide) {}

  void forward(Gathered<BFloat16, BFloat16>& g, const Window& w, int64_t head) {
    const BFloat16 *q = g.q(head), *k = g.k(head);
    pairs::pair_rows(whole(w.size(), kTerms), row, g.v(head), row, v_pairs.data(), 2 * row);
    for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
      const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole(qn, 16);
      pairs::transpose_pairs(lanes, row / 2, q + q0 * row, row, q_t.data(), 2 * kSide);
      std::fill_n(greatest.begin(), lanes, std::numeric_limits<float>::lowest());
      std::fill_n(total.begin(), lanes, 0.0f);
      for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.size() - k0), height = whole(kn, 16), terms = whole(kn, kTerms);
        pairs::product(height, lanes, depth, {k + k0 * row, row, 2}, q_t.data(), 2 * kSide, scores.data(), kSide, false);
        finish_scores(w, head, k0, kn, q0, qn, lanes);
        softmax_block(scores.data(), kn, lanes, kSide, greatest.data(), total.data(), shrink.data());
        for (int64_t i = 0; k0 > 0 && i < qn; ++i) write_row(o.data() + i * row, shrink[i], o.data() + i * row, p.width);
        pairs::pair_rows(height, lanes, scores.data(), kSide, weight_pairs.data(), 2 * kSide);
        const pairs::Left left = pairs::left_of_pairs(terms, lanes, weight_pairs.data(), 2 * kSide, scratch.data(), kSide);
        pairs::product(lanes, columns, terms, left, v_pairs.data() + k0 * row, 2 * row, o.data(), row, k0 > 0);
      }
      for (int64_t i = 0; i < qn; ++i) {
        write_row(o.data() + i * row, 1.0f / total[i], g.result(head, q0 + i), p.width);
        g.softmax(head, q0 + i)[0] = greatest[i];
        g.softmax(head, q0 + i)[1] = total[i];
      }
    }
  }

  void backward(
      Gathered<BFloat16, BFloat16>& g, const Window& w, Reader& reader, int64_t head, float* dgain_q, float* dgain_k, float* dbias) {
    const BFloat16 *q = g.q(head), *k = g.k(head), *v = g.v(head), *d = g.d(head);
    float* dq = o.data();
    pairs::pair_rows(whole(w.size(), kTerms), row, k, row, k_pairs.data(), 2 * row);
    for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
      const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole(qn, 16), queries = whole(qn, kTerms);
      for (int64_t i = 0; i < qn; ++i) {
        greatest[i] = g.softmax(head, q0 + i)[0];
        total[i] = g.softmax(head, q0 + i)[1];
        delta[i] = g.delta(head, q0 + i);
      }
      std::fill(greatest.begin() + qn, greatest.begin() + lanes, 0.0f); // what stands beyond the last query stays finite
      std::fill(total.begin() + qn, total.begin() + lanes, 1.0f);
      pairs::transpose_pairs(lanes, row / 2, q + q0 * row, row, q_t.data(), 2 * kSide);
      pairs::transpose_pairs(lanes, row / 2, d + q0 * row, row, d_t.data(), 2 * kSide);
      pairs::pair_rows(queries, row, q + q0 * row, row, q_pairs.data(), 2 * row);
      pairs::pair_rows(queries, row, d + q0 * row, row, d_pairs.data(), 2 * row);
      for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.size() - k0), height = whole(kn, 16), terms = whole(kn, kTerms);
        pairs::product(height, lanes, depth, {k + k0 * row, row, 2}, q_t.data(), 2 * kSide, scores.data(), kSide, false);
        pairs::product(height, lanes, depth, {v + k0 * row, row, 2}, d_t.data(), 2 * kSide, dweights.data(), kSide, false);
        finish_scores(w, head, k0, kn, q0, qn, lanes);
        softmax_backward(kn, lanes, dbias != nullptr);
        if (dbias != nullptr) add_bias_gradient(p, w, k0, kn, q0, qn, dweights.data(), kSide, dbias);
        pairs::product(height, columns, queries, {weights.data(), kSide, 2}, d_pairs.data(), 2 * row, dv.data() + k0 * row, row, q0 > 0);
        pairs::product(height, columns, queries, {dscores.data(), kSide, 2}, q_pairs.data(), 2 * row, dk.data() + k0 * row, row, q0 > 0);
        pairs::pair_rows(height, whole(lanes, 32), dscores.data(), kSide, weight_pairs.data(), 2 * kSide);
        const pairs::Left left = pairs::left_of_pairs(terms, lanes, weight_pairs.data(), 2 * kSide, scratch.data(), kSide);
        pairs::product(lanes, columns, terms, left, k_pairs.data() + k0 * row, 2 * row, dq, row, k0 > 0);
      }
      for (int64_t i = 0; i < qn; ++i) {
        reader.read_backward(g.raw(0, head, q0 + i), w, q0 + i, p.gain[0].data() + head * p.width, dq + i * row, g.result(head, q0 + i, 0), dgain_q);
      }
    }
    for (int64_t n = 0; n < w.size(); ++n) {
      reader.read_backward(g.raw(1, head, n), w, n, p.gain[1].data() + head * p.width, dk.data() + n * row, g.result(head, n, 1), dgain_k);
      write_row(dv.data() + n * row, 1.0f, g.result(head, n, 2), p.width);
    }
  }

 private:
  // scores[key, query] *= scale, += bias
  void finish_scores(const Window& w, int64_t head, int64_t k0, int64_t kn, int64_t q0, int64_t qn, int64_t lanes) {
    const Vec scale(p.scale);
    for (int64_t j = 0; j < kn; ++j) {
      float* to = scores.data() + j * kSide;
      for (int64_t i = 0; i < lanes; i += V) (Vec::loadu(to + i) * scale).store(to + i);
    }
    if (p.bias) add_bias(p, w, head, k0, kn, q0, qn, scores.data(), kSide);
  }

  // P^T and dS^T of a block, from scores and dP^T: rounded, a row a key, as left factors; and dS in fp32, in place of dP^T.
  // delta = rowsum(P * dP) is taken here where all keys are in the block, else it is given.
  void softmax_backward(int64_t kn, int64_t lanes, bool keep) {
    for (int64_t i = 0; i < lanes; i += V) {
      const Vec top = Vec::loadu(greatest.data() + i), inverse = Vec(1.0f) / Vec::loadu(total.data() + i), by(p.scale);
      Vec sum(0.0f);
      for (int64_t j = 0; j < kn; ++j) {
        float* score = scores.data() + j * kSide + i;
        const Vec weight = exp(Vec::loadu(score) - top) * inverse;
        weight.store(score);
        store(weights.data() + j * kSide + i, weight, Full{});
        sum = at::vec::fmadd(weight, Vec::loadu(dweights.data() + j * kSide + i), sum);
      }
      if (!p.one_block()) sum = Vec::loadu(delta.data() + i);
      for (int64_t j = 0; j < kn; ++j) {
        float* dweight = dweights.data() + j * kSide + i;
        const Vec dscore = Vec::loadu(scores.data() + j * kSide + i) * (Vec::loadu(dweight) - sum);
        if (keep) dscore.store(dweight);
        store(dscores.data() + j * kSide + i, dscore * by, Full{});
      }
    }
  }
};

} // namespace minisora
