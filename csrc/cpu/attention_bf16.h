// window_attention in bfloat16 on CPUs that multiply it, with the blocks of transposed scores of attention_kernels.h.
// Products round queries, keys, the weights P and dS to bfloat16, as the reference does; everything else is fp32.
#pragma once

#include "pairs.h"
#include "attention.h"

namespace minisora {

struct Pairs {
  using S = BFloat16;
  static constexpr int64_t kRow = 32, kTerms = pairs::kTerms, kRows = std::max<int64_t>(16, kTerms);

  const Problem& p;
  const pairs::Session session;
  const int64_t row, depth,
      columns; // of a token: its distance to the next, its terms of a sum, its columns of a result
  std::vector<BFloat16> q_t, d_t, q_pairs, d_pairs, k_pairs, v_pairs; // right factors
  std::vector<BFloat16> weights, dscores, weight_pairs,
      scratch; // blocks of P^T and dS^T; P or dS in pairs of keys; scratch
  std::vector<float> scores, dweights, edge_bias, o, dk, dv, greatest, total, shrink, delta;

  explicit Pairs(const Problem& p)
      : p(p),
        row(whole(p.width, kRow)),
        depth(whole(p.width, kTerms)),
        columns(whole(p.width, 16)),
        q_t(kSide * row),
        d_t(kSide * row),
        q_pairs(kSide * row),
        d_pairs(kSide * row),
        k_pairs(whole(p.keys, kRows) * row),
        v_pairs(whole(p.keys, kRows) * row),
        weights(kSide * kSide),
        dscores(kSide * kSide),
        weight_pairs(kSide * kSide),
        scratch(kSide * kSide),
        scores(kSide * kSide),
        dweights(kSide * kSide),
        edge_bias(p.bias ? kSide * kSide : 0),
        o(kSide * row),
        dk(whole(p.keys, kRows) * row),
        dv(whole(p.keys, kRows) * row),
        greatest(kSide),
        total(kSide),
        shrink(kSide),
        delta(kSide) {}

  void forward(Gathered<BFloat16, BFloat16>& g, const Window& w, int64_t head) {
    const BFloat16 *q = g.q(head), *k = g.k(head);
    pairs::pair_rows(whole(w.keys(), kTerms), row, g.v(head), row, v_pairs.data(), 2 * row);
    for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
      const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole(qn, 16);
      pairs::transpose_pairs(lanes, row / 2, q + q0 * row, row, q_t.data(), 2 * kSide);
      std::fill_n(greatest.begin(), lanes, std::numeric_limits<float>::lowest());
      std::fill_n(total.begin(), lanes, 0.0f);
      for (int64_t k0 = 0; k0 < w.keys(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.keys() - k0), height = whole(kn, 16), terms = whole(kn, kTerms);
        pairs::product(
            height, lanes, depth, {k + k0 * row, row, 2}, q_t.data(), 2 * kSide, scores.data(), kSide, false);
        softmax(kn, lanes, bias_of(w, head, k0, kn, q0, qn, nullptr));
        clear_pairs(kn, terms, lanes);
        for (int64_t i = 0; k0 > 0 && i < qn; ++i)
          write_row(o.data() + i * row, shrink[i], o.data() + i * row, p.width);
        const pairs::Left left =
            pairs::left_of_pairs(terms, lanes, weight_pairs.data(), 2 * kSide, scratch.data(), kSide);
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
      Gathered<BFloat16, BFloat16>& g, const Window& w, Reader& reader, int64_t head, float* dgain_q, float* dgain_k,
      float* dbias) {
    const BFloat16 *q = g.q(head), *k = g.k(head), *v = g.v(head), *d = g.d(head);
    float* dq = o.data();
    pairs::pair_rows(whole(w.keys(), kTerms), row, k, row, k_pairs.data(), 2 * row);
    for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
      const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole(qn, 16), queries = whole(qn, kTerms);
      for (int64_t i = 0; i < qn; ++i) {
        greatest[i] = g.softmax(head, q0 + i)[0];
        total[i] = g.softmax(head, q0 + i)[1];
        delta[i] = g.delta(head, q0 + i);
      }
      std::fill(greatest.begin() + qn, greatest.begin() + lanes, 0.0f); // lanes past the last query stay finite
      std::fill(total.begin() + qn, total.begin() + lanes, 1.0f);
      std::fill(delta.begin() + qn, delta.begin() + lanes, 0.0f);
      pairs::transpose_pairs(lanes, row / 2, q + q0 * row, row, q_t.data(), 2 * kSide);
      pairs::transpose_pairs(lanes, row / 2, d + q0 * row, row, d_t.data(), 2 * kSide);
      pairs::pair_rows(queries, row, q + q0 * row, row, q_pairs.data(), 2 * row);
      pairs::pair_rows(queries, row, d + q0 * row, row, d_pairs.data(), 2 * row);
      for (int64_t k0 = 0; k0 < w.keys(); k0 += kSide) {
        const int64_t kn = std::min(kSide, w.keys() - k0), height = whole(kn, 16), terms = whole(kn, kTerms);
        pairs::product(
            height, lanes, depth, {k + k0 * row, row, 2}, q_t.data(), 2 * kSide, scores.data(), kSide, false);
        pairs::product(
            height, lanes, depth, {v + k0 * row, row, 2}, d_t.data(), 2 * kSide, dweights.data(), kSide, false);
        const Bias bias = bias_of(w, head, k0, kn, q0, qn, dbias);
        softmax_backward(kn, lanes, bias, dbias != nullptr && bias.gradient == nullptr);
        clear_pairs(kn, terms, lanes);
        for (int64_t j = 0; queries > lanes && j < kn; ++j) {
          std::fill_n(weights.data() + j * kSide + lanes, queries - lanes, S(0.0f));
          std::fill_n(dscores.data() + j * kSide + lanes, queries - lanes, S(0.0f));
        }
        if (dbias != nullptr && bias.gradient == nullptr)
          add_bias_gradient(p, w, k0, kn, q0, qn, dweights.data(), kSide, dbias);
        pairs::product(
            height, columns, queries, {weights.data(), kSide, 2}, d_pairs.data(), 2 * row, dv.data() + k0 * row, row,
            q0 > 0);
        pairs::product(
            height, columns, queries, {dscores.data(), kSide, 2}, q_pairs.data(), 2 * row, dk.data() + k0 * row, row,
            q0 > 0);
        const pairs::Left left =
            pairs::left_of_pairs(terms, lanes, weight_pairs.data(), 2 * kSide, scratch.data(), kSide);
        pairs::product(lanes, columns, terms, left, k_pairs.data() + k0 * row, 2 * row, dq, row, k0 > 0);
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

 private:
  // The numbers that meet the zeros of a right factor must not be a NaN of an earlier window.
  void clear_pairs(int64_t kn, int64_t terms, int64_t lanes) {
    for (int64_t j = whole(kn, 2); j < terms; j += 2) std::fill_n(weight_pairs.data() + j * kSide, 2 * lanes, S(0.0f));
  }

  // The bias of a block, [key, query] with rows `row` apart, and the place of its gradient. Either may be null.
  struct Bias {
    const float* values;
    int64_t row;
    float* gradient;
  };

  // Whole windows read it, and add to its gradient, in place. A window at an edge needs a copy.
  Bias bias_of(const Window& w, int64_t head, int64_t k0, int64_t kn, int64_t q0, int64_t qn, float* dbias) {
    if (!p.bias) return {nullptr, 0, nullptr};
    const int64_t at = k0 * p.length + q0;
    if (w.full && qn % V == 0)
      return {p.bias.get() + head * p.length * p.length + at, p.length, dbias ? dbias + at : nullptr};
    std::fill_n(edge_bias.begin(), kn * kSide, 0.0f);
    add_bias(p, w, head, k0, kn, q0, qn, edge_bias.data(), kSide);
    return {edge_bias.data(), kSide, nullptr};
  }

  Vec score(int64_t key, int64_t query, const Bias& bias) const {
    const Vec product = Vec::loadu(scores.data() + key * kSide + query), scale(p.scale);
    return bias.values ? at::vec::fmadd(product, scale, Vec::loadu(bias.values + key * bias.row + query))
                       : product * scale;
  }

  // The rounded numbers of two keys and 16 queries, as pairs of terms.
  static void put_pairs(BFloat16* to, Vec even, Vec odd) {
    alignas(64) static constexpr auto index = [] {
      std::array<uint16_t, 32> lanes{};
      for (int i = 0; i < 32; ++i) lanes[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
      return lanes;
    }();
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(index.data()), narrow(even, odd)));
  }

  // One step of the online softmax. The weights exp(score - greatest so far) go to weight_pairs; `shrink` is the new
  // factor of earlier sums.
  void softmax(int64_t kn, int64_t lanes, const Bias& bias) {
    for (int64_t i = 0; i < lanes; i += V) {
      const Vec before = Vec::loadu(greatest.data() + i);
      Vec top = before;
      for (int64_t j = 0; j < kn; ++j) {
        const Vec value = score(j, i, bias);
        value.store(scores.data() + j * kSide + i);
        top = at::vec::clamp_min(value, top);
      }
      const auto weigh = [&](int64_t j) { return exp(Vec::loadu(scores.data() + j * kSide + i) - top); };
      Vec sum_even(0.0f), sum_odd(0.0f); // two sums lose fewer digits than one
      for (int64_t j = 0; j < kn; j += 2) {
        const Vec even = weigh(j), odd = j + 1 < kn ? weigh(j + 1) : Vec(0.0f);
        put_pairs(weight_pairs.data() + j * kSide + 2 * i, even, odd);
        sum_even = sum_even + even;
        sum_odd = sum_odd + odd;
      }
      const Vec factor = exp(before - top);
      factor.store(shrink.data() + i);
      top.store(greatest.data() + i);
      at::vec::fmadd(Vec::loadu(total.data() + i), factor, sum_even + sum_odd).store(total.data() + i);
    }
  }

  // P^T and dS^T of a block, from scores and dP^T: rounded, with a row per key, as left factors, and dS^T as pairs. If
  // the caller asks for it, dS^T in fp32 replaces dP^T. Where all keys are in the block, delta = rowsum(P * dP) is
  // computed here.
  void softmax_backward(int64_t kn, int64_t lanes, const Bias& bias, bool keep) {
    for (int64_t i = 0; i < lanes; i += V) {
      const Vec top = Vec::loadu(greatest.data() + i), inverse = Vec(1.0f) / Vec::loadu(total.data() + i), by(p.scale);
      Vec sum(0.0f);
      for (int64_t j = 0; j < kn; ++j) {
        const Vec weight = exp(score(j, i, bias) - top) * inverse;
        weight.store(scores.data() + j * kSide + i);
        store(weights.data() + j * kSide + i, weight, Full{});
        sum = at::vec::fmadd(weight, Vec::loadu(dweights.data() + j * kSide + i), sum);
      }
      if (!p.one_block()) sum = Vec::loadu(delta.data() + i);
      const auto dscore = [&](int64_t j) {
        float* dweight = dweights.data() + j * kSide + i;
        const Vec value = Vec::loadu(scores.data() + j * kSide + i) * (Vec::loadu(dweight) - sum);
        if (keep) value.store(dweight);
        if (bias.gradient) {
          float* to = bias.gradient + j * bias.row + i;
          (Vec::loadu(to) + value).store(to);
        }
        store(dscores.data() + j * kSide + i, value * by, Full{});
        return value * by;
      };
      for (int64_t j = 0; j < kn; j += 2) {
        const Vec even = dscore(j), odd = j + 1 < kn ? dscore(j + 1) : Vec(0.0f);
        put_pairs(weight_pairs.data() + j * kSide + 2 * i, even, odd);
      }
    }
  }
};

} // namespace minisora
