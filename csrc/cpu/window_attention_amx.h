// window_attention in bfloat16 with AMX tiles: the same blocks of transposed scores as in window_attention.cpp. Queries, keys,
// the weights P and dS are rounded to bfloat16 before they are multiplied, as in the reference; everything else is fp32.
#pragma once

#include "amx.h"
#include "window_attention.h"

namespace minisora {

// scores[key, query] *= scale, += bias
inline void finish_scores(
    const Problem& p, const Window& w, int64_t head, int64_t k0, int64_t kn, int64_t q0, int64_t qn, int64_t lanes, float* scores) {
  const Vec scale(p.scale);
  for (int64_t j = 0; j < kn; ++j) {
    float* row = scores + j * kSide;
    for (int64_t i = 0; i < lanes; i += V) (Vec::loadu(row + i) * scale).store(row + i);
  }
  if (p.bias) add_bias(p, w, head, k0, kn, q0, qn, scores, kSide);
}

// Rows [n, whole 32s) of a buffer that is read as terms of a sum.
inline void clear_rows(BFloat16* rows, int64_t n, int64_t row) {
  std::fill(rows + n * row, rows + amx::whole(n, amx::kTerms) * row, BFloat16(0.0f));
}

inline void forward(const Problem& p, const BFloat16* qkv, BFloat16* out, float* softmax) {
  using amx::whole;
  const int64_t width = p.width, depth = whole(width, 32), all = p.heads * width, items = p.batch * p.windows;
  const int64_t keys = whole(p.length, 32);
  torch::stable::parallel_for(0, p.batch * p.windows * p.heads, 1, [&](int64_t begin, int64_t end) {
    const amx::Session session;
    Window w;
    Reader reader(p);
    std::vector<BFloat16> k(keys * depth), v(keys * depth), v_pairs(keys * depth), q(kSide * depth), q_pairs(kSide * depth);
    std::vector<BFloat16> weight_pairs(kSide * kSide), weights(kSide * kSide);
    std::vector<float> scores(kSide * kSide), o(kSide * depth), greatest(kSide), total(kSide), shrink(kSide);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = p.bias ? unit / items : unit % p.heads, item = p.bias ? unit % items : unit / p.heads;
      const int64_t b = item / p.windows;
      w.enter(p, item % p.windows);
      const auto source = [&](int64_t n, int part) { return qkv + ((b * p.tokens + w.token[n]) * 3 + part) * all + head * width; };
      for (int64_t n = 0; n < w.size(); ++n) {
        prefetch(p, w, source, head, n);
        reader.read(source(n, 1), w, n, p.gain[1].data() + head * width, k.data() + n * depth);
        amx::copy_row(source(n, 2), v.data() + n * depth, width);
      }
      clear_rows(v.data(), w.size(), depth);
      amx::pair_rows(whole(w.size(), 32), depth, v.data(), depth, v_pairs.data(), 2 * depth);
      for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
        const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole(qn, 16);
        for (int64_t i = 0; i < qn; ++i) reader.read(source(q0 + i, 0), w, q0 + i, p.gain[0].data() + head * width, q.data() + i * depth);
        amx::transpose_pairs(lanes, depth / 2, q.data(), depth, q_pairs.data(), 2 * kSide);
        std::fill(greatest.begin(), greatest.end(), std::numeric_limits<float>::lowest());
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
          const int64_t kn = std::min(kSide, w.size() - k0), terms = whole(kn, 32);
          amx::product(whole(kn, 16), lanes, depth, k.data() + k0 * depth, depth, q_pairs.data(), 2 * kSide, scores.data(), kSide, false);
          finish_scores(p, w, head, k0, kn, q0, qn, lanes, scores.data());
          softmax_block(scores.data(), kn, lanes, kSide, greatest.data(), total.data(), shrink.data());
          for (int64_t i = 0; k0 > 0 && i < qn; ++i) write_row(o.data() + i * depth, shrink[i], o.data() + i * depth, width);
          amx::pair_rows(whole(kn, 16), lanes, scores.data(), kSide, weight_pairs.data(), 2 * kSide);
          amx::transpose_pairs(terms / 2, lanes, weight_pairs.data(), 2 * kSide, weights.data(), kSide);
          amx::product(lanes, whole(width, 16), terms, weights.data(), kSide, v_pairs.data() + k0 * depth, 2 * depth, o.data(), depth, k0 > 0);
        }
        for (int64_t i = 0; i < qn; ++i) {
          const int64_t n = b * p.tokens + w.token[q0 + i];
          write_row(o.data() + i * depth, 1.0f / total[i], out + n * all + head * width, width);
          softmax[2 * (n * p.heads + head)] = greatest[i];
          softmax[2 * (n * p.heads + head) + 1] = total[i];
        }
      }
    }
  });
}

// P^T and dS^T of a block, from scores and dP^T: rounded, a row a key, as left factors; and dS in fp32, in place of dP^T.
// delta = rowsum(P * dP) is taken here where all keys are in the block, else it is given.
inline void softmax_backward(
    int64_t kn, int64_t lanes, float scale, const float* greatest, const float* total, const float* delta, const float* scores,
    float* dscores, BFloat16* weights_t, BFloat16* dscores_t, bool keep) {
  for (int64_t i = 0; i < lanes; i += V) {
    const Vec top = Vec::loadu(greatest + i), inverse = Vec(1.0f) / Vec::loadu(total + i), by(scale);
    Vec sum(0.0f), p[kSide];
    for (int64_t j = 0; j < kn; ++j) {
      p[j] = exp(Vec::loadu(scores + j * kSide + i) - top) * inverse;
      store(weights_t + j * kSide + i, p[j], Full{});
      sum = at::vec::fmadd(p[j], Vec::loadu(dscores + j * kSide + i), sum);
    }
    if (delta != nullptr) sum = Vec::loadu(delta + i);
    for (int64_t j = 0; j < kn; ++j) {
      const Vec dscore = p[j] * (Vec::loadu(dscores + j * kSide + i) - sum);
      if (keep) dscore.store(dscores + j * kSide + i);
      store(dscores_t + j * kSide + i, dscore * by, Full{});
    }
  }
}

inline void backward(
    const Problem& p, const BFloat16* dout, const BFloat16* qkv, const BFloat16* out, const float* softmax, BFloat16* dqkv,
    Partial& partial) {
  using amx::whole;
  const int64_t width = p.width, depth = whole(width, 32), columns = whole(width, 16), all = p.heads * width;
  const int64_t keys = whole(p.length, 32);
  const bool one_block = p.length <= kSide;
  torch::stable::parallel_for(0, partial.tasks(), 1, [&](int64_t begin, int64_t end) {
    const amx::Session session;
    Window w;
    Reader reader(p);
    std::vector<BFloat16> k(keys * depth), k_pairs(keys * depth), v(keys * depth);
    std::vector<BFloat16> q(kSide * depth), q_t(kSide * depth), q_pairs(kSide * depth);
    std::vector<BFloat16> d(kSide * depth), d_t(kSide * depth), d_pairs(kSide * depth);
    std::vector<BFloat16> weights_t(kSide * kSide), dscores_t(kSide * kSide), dscore_pairs(kSide * kSide), dscores(kSide * kSide);
    std::vector<float> scores(kSide * kSide), dweights(kSide * kSide), dk(keys * depth), dv(keys * depth), dq(kSide * depth);
    std::vector<float> greatest(kSide), total(kSide), delta(kSide);

    const auto attend = [&](int64_t b, int64_t head, float* dgain_q, float* dgain_k, float* dbias) {
      const float *q_gain = p.gain[0].data() + head * width, *k_gain = p.gain[1].data() + head * width;
      const auto at = [&](int64_t n, int part) { return ((b * p.tokens + w.token[n]) * 3 + part) * all + head * width; };
      for (int64_t n = 0; n < w.size(); ++n) {
        prefetch(p, w, [&](int64_t m, int part) { return qkv + at(m, part); }, head, n);
        reader.read(qkv + at(n, 1), w, n, k_gain, k.data() + n * depth);
        amx::copy_row(qkv + at(n, 2), v.data() + n * depth, width);
      }
      clear_rows(k.data(), w.size(), depth);
      amx::pair_rows(whole(w.size(), 32), depth, k.data(), depth, k_pairs.data(), 2 * depth);
      for (int64_t q0 = 0; q0 < w.size(); q0 += kSide) {
        const int64_t qn = std::min(kSide, w.size() - q0), lanes = whole(qn, 16), queries = whole(qn, 32);
        for (int64_t i = 0; i < qn; ++i) {
          const int64_t n = b * p.tokens + w.token[q0 + i];
          reader.read(qkv + at(q0 + i, 0), w, q0 + i, q_gain, q.data() + i * depth);
          const BFloat16* gradient = dout + n * all + head * width;
          amx::copy_row(gradient, d.data() + i * depth, width);
          greatest[i] = softmax[2 * (n * p.heads + head)];
          total[i] = softmax[2 * (n * p.heads + head) + 1];
          if (!one_block) delta[i] = dot(gradient, out + n * all + head * width, width);
        }
        std::fill(greatest.begin() + qn, greatest.begin() + lanes, 0.0f); // what stands beyond the last query stays finite
        std::fill(total.begin() + qn, total.begin() + lanes, 1.0f);
        clear_rows(q.data(), qn, depth);
        clear_rows(d.data(), qn, depth);
        amx::transpose_pairs(lanes, depth / 2, q.data(), depth, q_t.data(), 2 * kSide);
        amx::transpose_pairs(lanes, depth / 2, d.data(), depth, d_t.data(), 2 * kSide);
        amx::pair_rows(queries, depth, q.data(), depth, q_pairs.data(), 2 * depth);
        amx::pair_rows(queries, depth, d.data(), depth, d_pairs.data(), 2 * depth);
        for (int64_t k0 = 0; k0 < w.size(); k0 += kSide) {
          const int64_t kn = std::min(kSide, w.size() - k0), height = whole(kn, 16), terms = whole(kn, 32);
          amx::product(height, lanes, depth, k.data() + k0 * depth, depth, q_t.data(), 2 * kSide, scores.data(), kSide, false);
          amx::product(height, lanes, depth, v.data() + k0 * depth, depth, d_t.data(), 2 * kSide, dweights.data(), kSide, false);
          finish_scores(p, w, head, k0, kn, q0, qn, lanes, scores.data());
          softmax_backward(
              kn, lanes, p.scale, greatest.data(), total.data(), one_block ? nullptr : delta.data(), scores.data(), dweights.data(),
              weights_t.data(), dscores_t.data(), dbias != nullptr);
          if (dbias != nullptr) add_bias_gradient(p, w, k0, kn, q0, qn, dweights.data(), kSide, dbias);
          amx::product(height, columns, queries, weights_t.data(), kSide, d_pairs.data(), 2 * depth, dv.data() + k0 * depth, depth, q0 > 0);
          amx::product(height, columns, queries, dscores_t.data(), kSide, q_pairs.data(), 2 * depth, dk.data() + k0 * depth, depth, q0 > 0);
          amx::pair_rows(height, lanes, dscores_t.data(), kSide, dscore_pairs.data(), 2 * kSide);
          amx::transpose_pairs(terms / 2, lanes, dscore_pairs.data(), 2 * kSide, dscores.data(), kSide);
          amx::product(lanes, columns, terms, dscores.data(), kSide, k_pairs.data() + k0 * depth, 2 * depth, dq.data(), depth, k0 > 0);
        }
        for (int64_t i = 0; i < qn; ++i) {
          const int64_t place = at(q0 + i, 0);
          reader.read_backward(qkv + place, w, q0 + i, q_gain, dq.data() + i * depth, dqkv + place, dgain_q);
        }
      }
      for (int64_t n = 0; n < w.size(); ++n) {
        reader.read_backward(qkv + at(n, 1), w, n, k_gain, dk.data() + n * depth, dqkv + at(n, 1), dgain_k);
        write_row(dv.data() + n * depth, 1.0f, dqkv + at(n, 2), width);
      }
    };
    for (int64_t task = begin; task < end; ++task) partial.run(p, task, w, attend);
  });
}

} // namespace minisora
