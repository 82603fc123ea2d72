// The norm of adaln and gate_residual_adaln, forward and backward, for a group of tokens of one row.
#pragma once

#include "rows.h"

namespace minisora {

// A thread's fp32 rows for adaln: the product of the modulation and the affine weights.
struct AdaLNScratch {
  int64_t width;
  std::vector<float> gain, offset, one_plus_scale;

  explicit AdaLNScratch(int64_t width) : width(width), gain(width), offset(width), one_plus_scale(width) {}

  // gain = weight * (1 + scale), offset = bias * (1 + scale) + shift
  void read(
      const Rows& shift, const Rows& scale, const std::vector<float>& weight, const std::vector<float>& bias, int64_t b,
      int64_t row, const Division& division) {
    scale.read(b, row, division, 1.0f, one_plus_scale.data(), width);
    shift.read(b, row, division, 0.0f, offset.data(), width);
    for (int64_t i = 0; i < width; ++i) {
      gain[i] = weight[i] * one_plus_scale[i];
      offset[i] += bias[i] * one_plus_scale[i];
    }
  }
};

// y = (x - mean) * rstd * gain + offset, for G tokens
template <int G, class TX, class TY, class How>
inline void modulate(const TX* x, const float* mean, const float* rstd, const AdaLNScratch& s, TY* y, How how) {
  const int64_t width = s.width;
  const float *gains = s.gain.data(), *offsets = s.offset.data();
  Vec center[G], inverse[G];
  for_group<G>([&](int r) MINISORA_INLINE { center[r] = Vec(mean[r]), inverse[r] = Vec(rstd[r]); });
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    const Vec gain = load(gains + i, count), offset = load(offsets + i, count);
    for_group<G>([&](int r) MINISORA_INLINE {
      const Vec h = (load(x + r * width + i, count) - center[r]) * inverse[r];
      how.put(y + r * width + i, at::vec::fmadd(h, gain, offset), count);
    });
  });
}

// The backward of G tokens, with h = (x - mean) * rstd and dh = dy * gain. The first half adds dy and dy * h to the
// sums of the row, if there are any (not null). Every parameter's gradient follows from them:
//   dshift = sum dy, dscale = weight * sum dy h + bias * sum dy, dweight = sum (1 + scale) dy h, dbias = sum (1 +
//   scale) dy.
// The second half is dx = rstd * (dh - mean(dh) - h * mean(dh * h)), without mean(dh) for an RMS norm. It computes h
// and dh again, which is cheaper than to store them.
template <int G>
struct AdaLNBackward {
  Vec center[G], inverse[G], shrink[G], constant[G];

  template <class TX, class TY>
  AdaLNBackward(
      const TX* x, const TY* dy, const float* mean, const float* rstd, const AdaLNScratch& s, bool rms, float* sum_dy,
      float* sum_dy_h) {
    const int64_t width = s.width;
    Sum first[G], second[G];
    for_group<G>([&](int r) MINISORA_INLINE { center[r] = Vec(mean[r]), inverse[r] = Vec(rstd[r]); });
    for_columns(width, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
      const Vec gain = load(s.gain.data() + i, count);
      Vec total(0.0f), total_h(0.0f);
      for_group<G>([&](int r) MINISORA_INLINE {
        const Vec g = load_ahead<G>(dy, r, i, width, count);
        const Vec h = (load_ahead<G>(x, r, i, width, count) - center[r]) * inverse[r];
        const Vec dh = g * gain;
        total = total + g;
        total_h = at::vec::fmadd(g, h, total_h);
        Vec &sum = first[r].part[chain<G>(u)], &sum_h = second[r].part[chain<G>(u)];
        sum = sum + dh;
        sum_h = at::vec::fmadd(dh, h, sum_h);
      });
      if (sum_dy == nullptr) return;
      store(sum_dy + i, load(sum_dy + i, count) + total, count);
      store(sum_dy_h + i, load(sum_dy_h + i, count) + total_h, count);
    });
    const float n = static_cast<float>(width);
    for_group<G>([&](int r) MINISORA_INLINE {
      shrink[r] = Vec(rstd[r] * rstd[r] * second[r].total() / n);
      constant[r] = Vec(rms ? 0.0f : rstd[r] * first[r].total() / n);
    });
  }

  // dx of token r, in the columns of x, dy and gain
  MINISORA_INLINE Vec dx(int r, Vec x, Vec dy, Vec gain) const {
    return at::vec::fnmadd(x - center[r], shrink[r], at::vec::fmsub(dy * gain, inverse[r], constant[r]));
  }

  template <class TX, class TY, class How>
  void write(const TX* x, const TY* dy, const AdaLNScratch& s, TX* out, How how) const {
    const int64_t width = s.width;
    const float* gains = s.gain.data();
    for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
      const Vec gain = load(gains + i, count);
      for_group<G>([&](int r) MINISORA_INLINE {
        const int64_t j = r * width + i;
        how.put(out + j, dx(r, load(x + j, count), load(dy + j, count), gain), count);
      });
    });
  }
};

} // namespace minisora
