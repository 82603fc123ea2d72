// Shared by the kernels of attention and window_attention: the problem, its windows, rows of q and k, the softmax,
// partial sums.
#pragma once

#include "gemm.h"
#include "rows.h"

#include <limits>
#include <memory>
#include <numeric>

namespace minisora {

constexpr int64_t kSide = 64;
// The most tasks of a backward that sums parameter gradients. It does not depend on the number of threads.
constexpr int64_t kTasks = 256;
// The most floats in partial sums of the bias' gradient, unless one copy alone is larger.
constexpr int64_t kPartialBias = int64_t{1} << 24;

// Bytes per gather: a part of the second cache.
constexpr int64_t kGathered = int64_t{512} << 10;

// Where the CPU multiplies bfloat16, q and k are rounded first, and a factor on q would cost digits.
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// e^x for x <= 88 to about one unit in the last place; 0 below the smallest normal number; NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec least(-87.33654f), magic(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec y = at::vec::clamp_min(x, least);
  const Vec shifted = at::vec::fmadd(y, Vec(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = at::vec::fnmadd(n, Vec(0.693145752f), y); // ln 2 in two parts
  r = at::vec::fnmadd(n, Vec(1.42860677e-6f), r);
  Vec p = at::vec::fmadd(r, Vec(0.00138144672f), Vec(0.00836878084f)); // minimax of (e^r - 1 - r) / r^2
  p = at::vec::fmadd(r, p, Vec(0.0416683927f));
  p = at::vec::fmadd(r, p, Vec(0.166665196f));
  p = at::vec::fmadd(r, p, Vec(0.49999994f));
  p = at::vec::fmadd(r * r, p, r) + Vec(1.0f);
#if defined(CPU_CAPABILITY_AVX512)
  const Vec power = _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23), _mm512_set1_epi32(0x3f800000)));
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), p, power);
#else
  const Vec power = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23), _mm256_set1_epi32(0x3f800000)));
  return Vec::blendv(p * power, Vec(0.0f), x < least);
#endif
}

// out = in * factor
template <class T>
inline void write_row(const float* in, float factor, T* out, int64_t width) {
  const Vec by(factor);
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE { store(out + i, load(in + i, count) * by, count); });
}

// out[h, j, i] = in[h, i, j], both [heads, length, length], tile by tile. read(from, count, buffer) fills a row of a
// tile with the `count` fp32 numbers that start at `from`.
template <class T, class Read>
void transpose_squares(int64_t heads, int64_t length, Read read, T* out) {
  constexpr int64_t side = 32;
  const int64_t tiles = (length + side - 1) / side;
  torch::stable::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    float tile[side * side] = {}, turned[side * side];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / tiles * length * length, i0 = task % tiles * side,
                    rows = std::min(side, length - i0);
      for (int64_t j0 = 0; j0 < length; j0 += side) {
        const int64_t columns = std::min(side, length - j0);
        for (int64_t i = 0; i < rows; ++i) read(first + (i0 + i) * length + j0, columns, tile + i * side);
        transpose(side, side, tile, side, turned, side);
        for (int64_t j = 0; j < columns; ++j)
          write_row(turned + j * side, 1.0f, out + first + (j0 + j) * length + i0, rows);
      }
    }
  });
}

// The shapes of a call, and how a row of q or k is read. `attention` is one window whose keys are tokens of their own.
struct Problem {
  int64_t batch, tokens, heads, width;
  int64_t grid[3], window[3], count[3];
  int64_t windows, length, keys; // of a window, at most: queries and keys
  const int64_t* lengths = nullptr; // attention: how many keys of each sample count,
  const int64_t* index = nullptr; // and an order of them in which those are the first, [batch, keys]
  bool apart = false; // q, k and v are three tensors
  int64_t norm = kNone;
  float eps = 0.0f, scale;
  float q_factor; // the factor of the rows of q; the scores have scale / q_factor
  bool rotary = false, interleaved = true;
  const float *cos = nullptr, *sin = nullptr;
  std::vector<float> gain[2]; // [heads, width] for q (q_factor included) and for k
  std::unique_ptr<float[]> bias; // [heads, key, query] in fp32

  int64_t row() const { return whole_vectors(width); }
  bool one_block() const { return keys <= kSide; }

  Problem(
      const Tensor& qkv, const int64_t (&grid_)[3], const int64_t (&window_)[3], const std::optional<Tensor>& q_weight,
      const std::optional<Tensor>& k_weight, int64_t norm, const std::optional<Tensor>& cos_,
      const std::optional<Tensor>& sin_, bool interleaved, const std::optional<Tensor>& bias_, double scale, double eps)
      : norm(norm),
        eps(static_cast<float>(eps)),
        scale(static_cast<float>(scale)),
        rotary(cos_.has_value()),
        interleaved(interleaved) {
    STD_TORCH_CHECK(qkv.dim() == 5, "qkv must be [B, N, 3, heads, head_dim]");
    batch = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), width = qkv.size(4);
    check_dense(qkv, "qkv", {batch, tokens, 3, heads, width});
    STD_TORCH_CHECK(heads > 0, "qkv must have at least one head");
    STD_TORCH_CHECK(width > 0 && width % 8 == 0, "head_dim must be a multiple of 8, got ", width);
    STD_TORCH_CHECK(norm == kNone || norm == kRms || norm == kLayer, "norm must be 0, 1 or 2, got ", norm);
    for (int axis = 0; axis < 3; ++axis) {
      grid[axis] = grid_[axis], window[axis] = window_[axis];
      STD_TORCH_CHECK(
          1 <= window[axis] && window[axis] <= grid[axis], "a window of ", window[axis],
          " tokens does not fit a grid of ", grid[axis]);
      count[axis] = (grid[axis] + window[axis] - 1) / window[axis];
    }
    STD_TORCH_CHECK(grid[0] * grid[1] * grid[2] == tokens, "the grid does not have ", tokens, " tokens");
    windows = count[0] * count[1] * count[2];
    length = keys = window[0] * window[1] * window[2];
    STD_TORCH_CHECK(cos_.has_value() == sin_.has_value(), "cos and sin must be given together");
    if (rotary) {
      check_statistic(*cos_, "cos", {tokens, width / 2});
      check_statistic(*sin_, "sin", {tokens, width / 2});
      cos = static_cast<const float*>(cos_->const_data_ptr());
      sin = static_cast<const float*>(sin_->const_data_ptr());
    }
    q_factor = factor_of(qkv);
    gain[0] = weights(q_weight, "q_weight", q_factor);
    gain[1] = weights(k_weight, "k_weight", 1.0f);
    if (bias_) read_bias(*bias_);
  }

  // Of q [B, N, heads, head_dim], k and v [B, M, heads, head_dim].
  Problem(
      const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lengths_,
      const std::optional<Tensor>& index_, double scale)
      : scale(static_cast<float>(scale)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be [B, N, heads, head_dim]");
    batch = q.size(0), tokens = q.size(1), heads = q.size(2), width = q.size(3), keys = k.size(1);
    check_part(q, "q", {batch, tokens, heads, width}, q);
    check_part(k, "k", {batch, keys, heads, width}, q);
    check_part(v, "v", {batch, keys, heads, width}, q);
    STD_TORCH_CHECK(heads > 0 && width > 0 && width % 8 == 0, "head_dim must be a multiple of 8, got ", width);
    lengths = numbers(lengths_, "lengths", {batch});
    index = numbers(index_, "index", {batch, keys});
    for (int64_t b = 0; index && b < batch; ++b) {
      std::vector<bool> seen(keys);
      for (int64_t i = b * keys; i < (b + 1) * keys; ++i) {
        STD_TORCH_CHECK(0 <= index[i] && index[i] < keys, "index has ", index[i], ", which is no key");
        STD_TORCH_CHECK(!seen[index[i]], "index has ", index[i], " twice in a sample");
        seen[index[i]] = true;
      }
    }
    windows = 1, length = tokens, apart = true;
    q_factor = factor_of(q);
    gain[0].assign(heads * width, q_factor);
    gain[1].assign(heads * width, 1.0f);
  }

 private:
  static void check_part(
      const Tensor& part, const char* name, std::initializer_list<int64_t> shape, const Tensor& like) {
    check_dtype(part, name);
    check_shape(part, name, shape);
    STD_TORCH_CHECK(part.scalar_type() == like.scalar_type(), name, " must have the dtype of q");
    STD_TORCH_CHECK(part.stride(3) == 1, name, " must have stride 1 over head_dim");
  }

  static const int64_t* numbers(
      const std::optional<Tensor>& given, const char* name, std::initializer_list<int64_t> shape) {
    if (!given) return nullptr;
    check_shape(*given, name, shape);
    STD_TORCH_CHECK(
        given->is_cpu() && given->is_contiguous() && given->scalar_type() == ScalarType::Long, name,
        " must be contiguous int64 on the CPU");
    return static_cast<const int64_t*>(given->const_data_ptr());
  }

  float factor_of(const Tensor& q) const { return kPairs && q.scalar_type() == ScalarType::BFloat16 ? 1.0f : scale; }

  std::vector<float> weights(const std::optional<Tensor>& weight, const char* name, float factor) const {
    std::vector<float> out(heads * width, factor);
    if (!weight) return out;
    STD_TORCH_CHECK(norm != kNone, name, " needs a norm");
    const bool shared = weight->dim() == 1;
    check_dtype(*weight, name);
    if (shared) {
      check_dense(*weight, name, {width});
    } else {
      check_dense(*weight, name, {heads, width});
    }
    with_type(weight->scalar_type(), [&](auto tag) {
      const auto* p = static_cast<const decltype(tag)*>(weight->const_data_ptr());
      for (int64_t i = 0; i < heads * width; ++i) out[i] *= static_cast<float>(p[shared ? i % width : i]);
    });
    return out;
  }

  void read_bias(const Tensor& given) {
    check_dense(given, "bias", {heads, length, length});
    bias.reset(new float[heads * length * length]);
    with_type(given.scalar_type(), [&](auto tag) {
      const auto* in = static_cast<const decltype(tag)*>(given.const_data_ptr());
      transpose_squares(
          heads, length, [&](int64_t from, int64_t count, float* row) { copy_row(in + from, row, count); }, bias.get());
    });
  }
};

// A thread's window of a sample: its tokens, their places inside a full window, and their rotary tables with one entry
// per channel. The sines have the sign of the channel's rotation.
struct Window {
  std::vector<int64_t> token, place;
  const int64_t* key = nullptr; // the tokens of k and v
  std::vector<float> cos, sin;
  bool full = false;
  int64_t index = -1;

  int64_t size() const { return size_; } // queries
  int64_t keys() const { return keys_; } // keys that count
  int64_t all_keys() const { return all_keys_; } // with those that do not

  void enter(const Problem& p, int64_t b, int64_t window) {
    if (p.apart) return enter_sample(p, b);
    if (window == index) return;
    index = window;
    int64_t first[3], last[3];
    int64_t rest = window;
    for (int axis = 2; axis >= 0; --axis) {
      first[axis] = rest % p.count[axis] * p.window[axis];
      last[axis] = std::min(first[axis] + p.window[axis], p.grid[axis]);
      rest /= p.count[axis];
    }
    token.clear();
    place.clear();
    for (int64_t t = first[0]; t < last[0]; ++t) {
      for (int64_t h = first[1]; h < last[1]; ++h) {
        for (int64_t w = first[2]; w < last[2]; ++w) {
          token.push_back((t * p.grid[1] + h) * p.grid[2] + w);
          place.push_back(((t - first[0]) * p.window[1] + h - first[1]) * p.window[2] + w - first[2]);
        }
      }
    }
    size_ = keys_ = all_keys_ = static_cast<int64_t>(token.size());
    key = token.data();
    full = size() == p.length;
    if (p.rotary) spread(p);
  }

 private:
  void enter_sample(const Problem& p, int64_t b) {
    token.resize(std::max(p.length, p.keys));
    std::iota(token.begin(), token.end(), 0);
    size_ = p.length, all_keys_ = p.keys;
    key = p.index ? p.index + b * p.keys : token.data();
    keys_ = p.lengths ? std::clamp<int64_t>(p.lengths[b], 0, p.keys) : p.keys;
  }

  void spread(const Problem& p) {
    const int64_t half = p.width / 2;
    cos.resize(size() * p.width);
    sin.resize(size() * p.width);
    const int64_t pair = p.interleaved ? 2 : 1, partner = p.interleaved ? 1 : half;
    for (int64_t n = 0; n < size(); ++n) {
      for (int64_t i = 0; i < half; ++i) {
        const int64_t at = n * p.width + pair * i;
        const float c = p.cos[token[n] * half + i], s = p.sin[token[n] * half + i];
        cos[at] = cos[at + partner] = c;
        sin[at] = -s;
        sin[at + partner] = s;
      }
    }
  }

  int64_t size_ = 0, keys_ = 0, all_keys_ = 0;
};

// f(width). Usual widths are constants, so that a row stays in registers.
template <class F>
inline void with_width(int64_t width, F&& f) {
  switch (width) {
    case 64:
      return f(std::integral_constant<int64_t, 64>{});
    case 72:
      return f(std::integral_constant<int64_t, 72>{});
    case 80:
      return f(std::integral_constant<int64_t, 80>{});
    case 96:
      return f(std::integral_constant<int64_t, 96>{});
    case 128:
      return f(std::integral_constant<int64_t, 128>{});
    default:
      return f(width);
  }
}

// The vectors of a row: on the stack if their number is a constant, else in a thread's scratch.
template <class W>
struct Vectors {
  Vec local[(W::value + V - 1) / V];
  explicit Vectors(std::vector<Vec>&) {}
  MINISORA_INLINE Vec& operator[](int64_t u) { return local[u]; }
};

template <>
struct Vectors<int64_t> {
  Vec* scratch;
  explicit Vectors(std::vector<Vec>& scratch) : scratch(scratch.data()) {}
  MINISORA_INLINE Vec& operator[](int64_t u) { return scratch[u]; }
};

// f(u, count) for the vectors u of a row.
template <class W, class F>
MINISORA_INLINE inline void for_vectors(W width, F&& f) {
  if constexpr (std::is_same_v<W, int64_t>) {
    for (int64_t u = 0; u < width / V; ++u) f(u, Full{});
    if (width % V != 0) f(width / V, width % V);
  } else {
#pragma GCC unroll 16
    for (int64_t u = 0; u < width / V; ++u) f(u, Full{});
    if constexpr (W::value % V != 0) f(W::value / V, std::integral_constant<int64_t, W::value % V>{});
  }
}

// Reads rows of q and k; the scratch of a thread.
class Reader {
 public:
  explicit Reader(const Problem& p) : p_(p), x_(p.row() / V), grad_(p.row() / V), twice_(2 * p.row()) {}

  // out = rotate(norm(in) * gain)
  template <class T, class TO>
  void read(const T* in, const Window& window, int64_t token, const float* gain, TO* out) {
    with_width(p_.width, [&](auto width) MINISORA_INLINE {
      Vectors<decltype(width)> x(x_);
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE { x[u] = load(in + u * V, count); });
      if (p_.norm != kNone) normalise(x, width);
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE { x[u] = x[u] * load(gain + u * V, count); });
      if (p_.rotary) rotate(x, window, token, 1.0f, width);
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE { store(out + u * V, x[u], count); });
    });
  }

  // The gradient of the row from that of its result; dgain += the gradient of gain.
  template <class T>
  void read_backward(
      const T* in, const Window& window, int64_t token, const float* gain, const float* grad, T* out, float* dgain) {
    with_width(p_.width, [&](auto width) MINISORA_INLINE {
      Vectors<decltype(width)> h(x_), g(grad_);
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE { g[u] = load(grad + u * V, count); });
      if (p_.rotary) rotate(g, window, token, -1.0f, width);
      if (p_.norm == kNone) {
        for_vectors(width, [&](auto u, auto count) MINISORA_INLINE {
          store(out + u * V, g[u] * load(gain + u * V, count), count);
        });
        return;
      }
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE { h[u] = load(in + u * V, count); });
      const float rstd = normalise(h, width);
      Vec sum_dh(0.0f), sum_dh_h(0.0f);
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE {
        if (dgain != nullptr) store(dgain + u * V, at::vec::fmadd(g[u], h[u], load(dgain + u * V, count)), count);
        g[u] = g[u] * load(gain + u * V, count);
        sum_dh = sum_dh + g[u];
        sum_dh_h = at::vec::fmadd(g[u], h[u], sum_dh_h);
      });
      const float inverse = 1.0f / static_cast<float>(p_.width);
      const Vec mean_dh(p_.norm == kRms ? 0.0f : sum_lanes(sum_dh) * inverse), mean_dh_h(sum_lanes(sum_dh_h) * inverse),
          by(rstd);
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE {
        store(out + u * V, by * (g[u] - mean_dh - h[u] * mean_dh_h), count);
      });
    });
  }

 private:
  // x = (x - mean) * rstd; returns rstd
  template <class X, class W>
  MINISORA_INLINE float normalise(X& x, W width) const {
    const float inverse = 1.0f / static_cast<float>(p_.width);
    Vec squares(0.0f);
    if (p_.norm != kRms) {
      Vec sum(0.0f);
      for_vectors(width, [&](auto u, auto) MINISORA_INLINE { sum = sum + x[u]; });
      const Vec mean(sum_lanes(sum) * inverse);
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE { x[u] = first_lanes(x[u] - mean, count); });
    }
    for_vectors(width, [&](auto u, auto) MINISORA_INLINE { squares = at::vec::fmadd(x[u], x[u], squares); });
    const float rstd = 1.0f / std::sqrt(sum_lanes(squares) * inverse + p_.eps);
    for_vectors(width, [&](auto u, auto) MINISORA_INLINE { x[u] = x[u] * Vec(rstd); });
    return rstd;
  }

  template <class X, class W>
  MINISORA_INLINE void rotate(X& x, const Window& window, int64_t token, float direction, W width) {
    const float *cos = window.cos.data() + token * p_.width, *sin = window.sin.data() + token * p_.width;
    const Vec sign(direction);
    if (p_.interleaved) {
      for_vectors(width, [&](auto u, auto count) MINISORA_INLINE {
        x[u] = at::vec::fmadd(x[u], load(cos + u * V, count), swap_pairs(x[u]) * (load(sin + u * V, count) * sign));
      });
      return;
    }
    // Two copies side by side: for both halves, the partner of channel i is half a row further on.
    float *twice = twice_.data(), *partner = twice + width / 2;
    for_vectors(width, [&](auto u, auto count) MINISORA_INLINE {
      store(twice + u * V, x[u], count);
      store(twice + width + u * V, x[u], count);
    });
    for_vectors(width, [&](auto u, auto count) MINISORA_INLINE {
      x[u] = at::vec::fmadd(
          x[u], load(cos + u * V, count), load(partner + u * V, count) * (load(sin + u * V, count) * sign));
    });
  }

  const Problem& p_;
  std::vector<Vec> x_, grad_;
  std::vector<float> twice_;
};

// scores[key, query] += bias for keys [k0, k0 + kn) and queries [q0, q0 + qn) of the window
inline void add_bias(
    const Problem& p, const Window& w, int64_t head, int64_t k0, int64_t kn, int64_t q0, int64_t qn, float* scores,
    int64_t lanes) {
  const float* bias = p.bias.get() + head * p.length * p.length;
  for (int64_t j = 0; j < kn; ++j) {
    const float* from = bias + w.place[k0 + j] * p.length;
    float* to = scores + j * lanes;
    if (w.full) {
      for_columns(qn, [&](int64_t i, auto count) MINISORA_INLINE {
        store(to + i, load(to + i, count) + load(from + q0 + i, count), count);
      });
    } else {
      for (int64_t i = 0; i < qn; ++i) to[i] += from[w.place[q0 + i]];
    }
  }
}

// The backward: gradient[key, query] of the bias += dscores
inline void add_bias_gradient(
    const Problem& p, const Window& w, int64_t k0, int64_t kn, int64_t q0, int64_t qn, const float* dscores,
    int64_t lanes, float* gradient) {
  for (int64_t j = 0; j < kn; ++j) {
    float* to = gradient + w.place[k0 + j] * p.length;
    const float* from = dscores + j * lanes;
    if (w.full) {
      for_columns(qn, [&](int64_t i, auto count) MINISORA_INLINE {
        store(to + q0 + i, load(to + q0 + i, count) + load(from + i, count), count);
      });
    } else {
      for (int64_t i = 0; i < qn; ++i) to[w.place[q0 + i]] += from[i];
    }
  }
}

// One step of the online softmax: scores become exp(scores - greatest so far); `shrink` is the new factor of earlier
// sums.
inline void softmax_block(
    float* scores, int64_t keys, int64_t lanes, int64_t row, float* greatest, float* total, float* shrink) {
  for (int64_t i = 0; i < lanes; i += V) {
    const Vec before = Vec::loadu(greatest + i);
    Vec top = before;
    for (int64_t j = 0; j < keys; ++j) top = at::vec::clamp_min(Vec::loadu(scores + j * row + i), top);
    Vec even(0.0f), odd(0.0f); // two sums lose fewer digits than one
    const auto weigh = [&](int64_t j) {
      const Vec weight = exp(Vec::loadu(scores + j * row + i) - top);
      weight.store(scores + j * row + i);
      return weight;
    };
    for (int64_t j = 0; j + 1 < keys; j += 2) {
      even = even + weigh(j);
      odd = odd + weigh(j + 1);
    }
    if (keys % 2 != 0) even = even + weigh(keys - 1);
    const Vec factor = exp(before - top);
    factor.store(shrink + i);
    top.store(greatest + i);
    at::vec::fmadd(Vec::loadu(total + i), factor, even + odd).store(total + i);
  }
}

template <class T>
inline float dot(const T* a, const T* b, int64_t width) {
  Sum sum;
  for_columns(width, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
    sum.part[u] = at::vec::fmadd(load(a + i, count), load(b + i, count), sum.part[u]);
  });
  return sum.total();
}

// Where q, k and v lie, or their gradients, or one result. What is null is not written.
template <class T>
struct Parts {
  struct Part {
    T* data;
    int64_t sample, token, head; // distances
  };
  Part part[3];
  int64_t size; // numbers in a tensor

  static Parts packed(T* qkv, const Problem& p) {
    const int64_t all = p.heads * p.width, token = 3 * all;
    Parts parts{{}, p.batch * p.tokens * token};
    for (int i = 0; i < 3; ++i)
      parts.part[i] = {qkv == nullptr ? nullptr : qkv + i * all, p.tokens * token, token, p.width};
    return parts;
  }

  static Parts one(T* out, const Problem& p) {
    const int64_t all = p.heads * p.width;
    return {{{out, p.tokens * all, all, p.width}, {}, {}}, p.batch * p.tokens * all};
  }
};

// Some heads of one window: gathers them from tokens that may be far apart, and writes the results back. It reads all
// heads of a token together. In a window over frames the rows of one head are often a multiple of 4 KiB apart, so they
// share a few lines of every cache and evict each other.
template <class S, class T>
struct Gathered {
  const Problem& p;
  const int64_t row, terms; // of a matrix [rows, row] of S; the number of used rows is a multiple of `terms`
  const int64_t queries, keys; // rows of q and of the gradient of out; of k and v
  const int64_t results; // a token's results: out, or dq, dk and dv
  int64_t heads; // the most heads at a time
  int64_t first = 0, last = 0; // the gathered heads

  // For a kernel that needs multiples of kRow numbers in a row, reads multiples of kRows rows, and sums over multiples
  // of kTerms of them. The padding of the terms is zero; all other padding is finite.
  template <class Kernel>
  Gathered(const Problem& p, std::type_identity<Kernel>, bool backward)
      : p(p),
        row(whole(p.width, Kernel::kRow)),
        terms(Kernel::kTerms),
        queries(whole(p.length, Kernel::kRows)),
        keys(whole(p.keys, Kernel::kRows)),
        results(backward ? 3 : 1) {
    const int64_t matrices = backward ? 4 : 3, raws = backward && p.norm != kNone ? 2 : 0;
    const int64_t longer = std::max(p.length, p.keys);
    const int64_t bytes = (2 * keys + (matrices - 2) * queries) * row * sizeof(S) +
                          std::max(queries, keys) * (raws + results) * p.width * sizeof(T);
    const int64_t most = std::clamp<int64_t>(kGathered / bytes, 1, p.heads);
    const int64_t chunks = (p.heads + most - 1) / most; // of nearly equal size
    heads = (p.heads + chunks - 1) / chunks;
    for (int64_t i = 0; i < matrices; ++i) matrix_[i].resize(heads * rows_of(i) * row);
    for (int64_t i = 0; i < raws; ++i) raw_[i].resize(heads * p.length * p.width);
    result_.resize(heads * results * (backward ? longer : p.length) * p.width);
    softmax_.resize(2 * heads * p.length);
    delta_.resize(backward ? heads * p.length : 0);
  }

  S* q(int64_t head) { return matrix(0, head - first); }
  S* k(int64_t head) { return matrix(1, head - first); }
  S* v(int64_t head) { return matrix(2, head - first); }
  S* d(int64_t head) { return matrix(3, head - first); } // the gradient of out
  // Row n of q or k before its norm; only in a backward through a norm.
  const T* raw(int part, int64_t head, int64_t n) const {
    return raw_[part].data() + ((head - first) * p.length + n) * p.width;
  }
  T* result(int64_t head, int64_t n, int part = 0) {
    return result_.data() + ((n * results + part) * (last - first) + head - first) * p.width;
  }
  float* softmax(int64_t head, int64_t n) { return softmax_.data() + 2 * (n * (last - first) + head - first); }
  float delta(int64_t head, int64_t n) const { return delta_[n * (last - first) + head - first]; }

  // Heads [first, last) of sample b.
  void read(
      Reader& reader, const Window& w, const Parts<const T>& from, int64_t b, int64_t first_head, int64_t last_head) {
    first = first_head, last = last_head;
    const int64_t size = (last - first) * p.width;
    const bool as_is = p.norm == kNone && !p.rotary;
    const int64_t ahead = tokens_ahead();
    const auto read_token = [&](int part, int64_t n, int64_t rows) MINISORA_INLINE {
      const auto& [data, sample, step, head_step] = from.part[part];
      const int64_t* token = part == 0 ? w.token.data() : w.key;
      const T* in = data + b * sample + token[n] * step + first * head_step;
      if (head_step == p.width && n + ahead < rows) prefetch(in + (token[n + ahead] - token[n]) * step, size);
      for (int64_t head = first; head < last; ++head, in += head_step) {
        S* to = matrix(part, head - first) + n * row;
        if (part == 2 || (as_is && (part == 1 || p.q_factor == 1.0f))) {
          copy_row(in, to, p.width);
        } else {
          reader.read(in, w, n, p.gain[part].data() + head * p.width, to);
        }
        if (part < 2 && !raw_[part].empty())
          copy_row(in, raw_[part].data() + ((head - first) * p.length + n) * p.width, p.width);
      }
    };
    for (int64_t n = 0; n < std::max(w.size(), w.keys()); ++n) {
      if (n < w.size()) read_token(0, n, w.size());
      for (int part = 1; part < 3 && n < w.keys(); ++part) read_token(part, n, w.keys());
    }
    clear(0, w.size());
    clear(1, w.keys());
    clear(2, w.keys());
  }

  // The gradient of out and what the forward saved; out too, if delta follows from it.
  void read_gradient(const Window& w, const T* dout, const T* out, const float* softmax, int64_t b) {
    const int64_t count = last - first, ahead = tokens_ahead();
    for (int64_t n = 0; n < w.size(); ++n) {
      const int64_t at = (b * p.tokens + w.token[n]) * p.heads + first;
      if (n + ahead < w.size())
        prefetch(dout + (at + (w.token[n + ahead] - w.token[n]) * p.heads) * p.width, count * p.width);
      for (int64_t head = 0; head < count; ++head) {
        const T* from = dout + (at + head) * p.width;
        copy_row(from, matrix(3, head) + n * row, p.width);
        if (out) delta_[n * count + head] = dot(from, out + (at + head) * p.width, p.width);
      }
      std::copy_n(softmax + 2 * at, 2 * count, softmax_.data() + 2 * n * count);
    }
    clear(3, w.size());
  }

  void write(const Window& w, const Parts<T>& to, int64_t b) const {
    const int64_t size = (last - first) * p.width;
    const bool streamed =
        p.heads * p.width % size == 0 && std::all_of(to.part, to.part + results, [&](const auto& part) {
          return past_caches(part.data, to.size, size);
        });
    with_put(streamed, [&](auto how) {
      for (int64_t n = 0; n < (results == 1 ? w.size() : std::max(w.size(), w.all_keys())); ++n) {
        for (int64_t part = 0; part < results; ++part) {
          const auto& [data, sample, step, head_step] = to.part[part];
          if (data == nullptr || n >= (part == 0 ? w.size() : w.all_keys())) continue;
          const int64_t token = part == 0 ? w.token[n] : w.key[n];
          how.copy(
              result_.data() + (n * results + part) * size, data + b * sample + token * step + first * head_step, size);
        }
      }
    });
    _mm_sfence();
  }

  // Zeros: the results of a window without keys, and the gradients of keys that do not count.
  void clear_results(const Window& w) {
    for (int64_t head = first; head < last; ++head) {
      for (int64_t n = 0; w.keys() == 0 && n < w.size(); ++n) {
        std::fill_n(result(head, n), p.width, T(0.0f));
        softmax(head, n)[0] = 0.0f, softmax(head, n)[1] = 1.0f;
      }
      for (int64_t n = w.keys(); results == 3 && n < w.all_keys(); ++n)
        for (int part = 1; part < 3; ++part) std::fill_n(result(head, n, part), p.width, T(0.0f));
    }
  }

  void write_softmax(const Window& w, float* to, int64_t b) const {
    const int64_t count = 2 * (last - first);
    for (int64_t n = 0; n < w.size(); ++n) {
      std::copy_n(softmax_.data() + n * count, count, to + 2 * ((b * p.tokens + w.token[n]) * p.heads + first));
    }
  }

 private:
  // How many tokens ahead to prefetch: some KiB.
  int64_t tokens_ahead() const { return std::clamp<int64_t>(2048 / ((last - first) * p.width * sizeof(T)), 1, 16); }

  // Always inlined: gcc thinks that a function that only prefetches has no effects, and drops the calls.
  MINISORA_INLINE static void prefetch(const T* from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
  }

  int64_t rows_of(int64_t i) const { return i == 1 || i == 2 ? keys : queries; }

  S* matrix(int i, int64_t head) { return matrix_[i].data() + head * rows_of(i) * row; }

  void clear(int i, int64_t size) {
    const int64_t empty = whole(size, terms) - size;
    for (int64_t head = 0; empty > 0 && head < last - first; ++head) {
      std::fill_n(matrix(i, head) + size * row, empty * row, S(0.0f));
    }
  }

  std::vector<S> matrix_[4];
  std::vector<T> raw_[2], result_;
  std::vector<float> softmax_, delta_;
};

// Sums over windows and samples, of the gradients that are asked for: one partial sum per chunk of windows and head.
// The last step adds them in order.
struct Partial {
  int64_t chunks, parts;
  std::unique_ptr<float[]> gain[2]; // [chunks, heads, width]
  std::unique_ptr<float[]> bias; // [chunks, heads, key, query]

  Partial(const Problem& p, bool with_q, bool with_k, bool with_bias) : p_(p) {
    const int64_t items = p.batch * p.windows;
    const int64_t square = p.heads * p.length * p.length;
    chunks = with_bias ? std::min((kTasks / 8 + p.heads - 1) / p.heads, kPartialBias / square) : kTasks;
    chunks = std::max<int64_t>(std::min(chunks, items), 1);
    parts = std::min(p.heads, (kTasks + chunks - 1) / chunks);
    if (with_q) gain[0].reset(new float[gains()]);
    if (with_k) gain[1].reset(new float[gains()]);
    if (with_bias) bias.reset(new float[chunks * square]);
  }

  int64_t tasks() const { return chunks * parts; }
  int64_t gains() const { return chunks * p_.heads * p_.width; }

  // A task's sums for a head, or null.
  float* gain_of(int part, int64_t task, int64_t head) {
    return gain[part] ? gain[part].get() + (task / parts * p_.heads + head) * p_.width : nullptr;
  }
  float* bias_of(int64_t task, int64_t head) {
    return bias ? bias.get() + (task / parts * p_.heads + head) * p_.length * p_.length : nullptr;
  }

  // f(item, first_head, last_head) for every window of every sample of a task. The sums of a task start at zero.
  template <class F>
  void run(int64_t task, F f) {
    const int64_t items = p_.batch * p_.windows, chunk = task / parts, share = task % parts;
    const int64_t first_head = share * p_.heads / parts, last_head = (share + 1) * p_.heads / parts;
    const int64_t count = last_head - first_head;
    if (bias) std::fill_n(bias_of(task, first_head), count * p_.length * p_.length, 0.0f);
    for (int part = 0; part < 2; ++part)
      if (gain[part]) std::fill_n(gain_of(part, task, first_head), count * p_.width, 0.0f);
    for (int64_t item = chunk * items / chunks; item < (chunk + 1) * items / chunks; ++item)
      f(item, first_head, last_head);
  }

 private:
  const Problem& p_;
};

// The interface of a kernel, which attends in one head of a gathered window:
//   Kernel(p); Kernel::S, kRow, kRows, kTerms                  see Gathered
//   forward(gathered, window, head)                            writes the results and the statistics of the softmax
//   backward(gathered, window, reader, head, dgain_q, dgain_k, dbias)   writes the results, and adds to the sums
template <class Kernel, class T>
void forward(const Problem& p, const Parts<const T>& qkv, T* out, float* softmax) {
  const int64_t items = p.batch * p.windows,
                most = Gathered<typename Kernel::S, T>(p, std::type_identity<Kernel>{}, false).heads;
  const int64_t chunks = (p.heads + most - 1) / most;
  torch::stable::parallel_for(0, items * chunks, 1, [&](int64_t begin, int64_t end) {
    Window w;
    Reader reader(p);
    Kernel kernel(p);
    Gathered<typename Kernel::S, T> g(p, std::type_identity<Kernel>{}, false);
    for (int64_t unit = begin; unit < end; ++unit) {
      // Neighbouring heads are side by side in qkv, but each head has a bias of its own to read again.
      const int64_t chunk = p.bias ? unit / items : unit % chunks, item = p.bias ? unit % items : unit / chunks;
      const int64_t b = item / p.windows;
      w.enter(p, b, item % p.windows);
      g.read(reader, w, qkv, b, chunk * p.heads / chunks, (chunk + 1) * p.heads / chunks);
      for (int64_t head = g.first; w.keys() > 0 && head < g.last; ++head) kernel.forward(g, w, head);
      g.clear_results(w);
      g.write(w, Parts<T>::one(out, p), b);
      g.write_softmax(w, softmax, b);
    }
  });
}

template <class Kernel, class T>
void backward(
    const Problem& p, const T* dout, const Parts<const T>& qkv, const T* out, const float* softmax,
    const Parts<T>& dqkv, Partial& partial) {
  torch::stable::parallel_for(0, partial.tasks(), 1, [&](int64_t begin, int64_t end) {
    Window w;
    Reader reader(p);
    Kernel kernel(p);
    Gathered<typename Kernel::S, T> g(p, std::type_identity<Kernel>{}, true);
    for (int64_t task = begin; task < end; ++task) {
      partial.run(task, [&](int64_t item, int64_t first_head, int64_t last_head) {
        const int64_t b = item / p.windows;
        w.enter(p, b, item % p.windows);
        for (int64_t first = first_head; first < last_head; first += g.heads) {
          g.read(reader, w, qkv, b, first, std::min(first + g.heads, last_head));
          g.read_gradient(w, dout, p.one_block() ? nullptr : out, softmax, b);
          for (int64_t head = g.first; w.keys() > 0 && head < g.last; ++head) {
            kernel.backward(
                g, w, reader, head, partial.gain_of(0, task, head), partial.gain_of(1, task, head),
                partial.bias_of(task, head));
          }
          g.clear_results(w);
          g.write(w, dqkv, b);
        }
      });
    }
  });
}

} // namespace minisora
