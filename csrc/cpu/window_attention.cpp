// window_attention: equation and derivation in minisora_kernels/ops/window_attention.py.
//
// One (window, head) is read from the packed projection into dense fp32 rows, with norm and rotary embedding applied on the
// way, and attended in blocks of kSide queries by kSide keys. A block of scores is kept transposed, a row a key and a lane
// a query, so that the softmax over the keys needs no sum across lanes.
#include "gemm.h"
#include "rows.h"

#include <limits>
#include <memory>
#include <numeric>

namespace minisora {
namespace {

constexpr int64_t kSide = 64;
// Tasks of a backward that sums parameter gradients, where the shapes have so many; independent of the number of threads.
constexpr int64_t kTasks = 256;
// At most this many floats are spent on partial sums of the bias' gradient, unless one copy alone is larger.
constexpr int64_t kPartialBias = int64_t{1} << 24;

enum Norm : int64_t { kNone = 0, kRms = 1, kLayer = 2 };

inline int64_t whole_vectors(int64_t n) { return (n + V - 1) / V * V; }

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
#else
  const Vec power = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23), _mm256_set1_epi32(0x3f800000)));
#endif
  return Vec::blendv(p * power, Vec(0.0f), x < least);
}

// Lanes 2i and 2i + 1 exchanged.
inline Vec swap_pairs(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_permute_ps(x, 0xb1);
#else
  return _mm256_permute_ps(x, 0xb1);
#endif
}

template <class T>
inline void copy_row(const T* in, float* out, int64_t width) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE { store(out + i, load(in + i, count), count); });
}

// out = in * factor
template <class T>
inline void write_row(const float* in, float factor, T* out, int64_t width) {
  const Vec by(factor);
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE { store(out + i, load(in + i, count) * by, count); });
}

// out[h, j, i] = in[h, i, j], both [heads, length, length], by tiles: read(from, count, buffer) fills a row of a tile with
// `count` numbers in fp32 that belong at `from`.
template <class T, class Read>
void transpose_squares(int64_t heads, int64_t length, Read read, T* out) {
  constexpr int64_t side = 32;
  const int64_t tiles = (length + side - 1) / side;
  torch::stable::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    float tile[side * side] = {}, turned[side * side];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / tiles * length * length, i0 = task % tiles * side, rows = std::min(side, length - i0);
      for (int64_t j0 = 0; j0 < length; j0 += side) {
        const int64_t columns = std::min(side, length - j0);
        for (int64_t i = 0; i < rows; ++i) read(first + (i0 + i) * length + j0, columns, tile + i * side);
        transpose(side, side, tile, side, turned, side);
        for (int64_t j = 0; j < columns; ++j) write_row(turned + j * side, 1.0f, out + first + (j0 + j) * length + i0, rows);
      }
    }
  });
}

// The shapes of a call, and how a row of q or k is read.
struct Problem {
  int64_t batch, tokens, heads, width;
  int64_t grid[3], window[3], count[3];
  int64_t windows, length;
  int64_t norm;
  float eps, scale;
  bool rotary, interleaved;
  const float *cos = nullptr, *sin = nullptr;
  std::vector<float> gain[2]; // [heads, width] for q (scale included) and for k
  std::unique_ptr<float[]> bias; // [heads, key, query] in fp32

  int64_t row() const { return whole_vectors(width); }

  Problem(
      const Tensor& qkv, const int64_t (&grid_)[3], const int64_t (&window_)[3], const std::optional<Tensor>& q_weight,
      const std::optional<Tensor>& k_weight, int64_t norm, const std::optional<Tensor>& cos_, const std::optional<Tensor>& sin_,
      bool interleaved, const std::optional<Tensor>& bias_, double scale, double eps)
      : norm(norm), eps(static_cast<float>(eps)), scale(static_cast<float>(scale)), rotary(cos_.has_value()), interleaved(interleaved) {
    STD_TORCH_CHECK(qkv.dim() == 5, "qkv must be [B, N, 3, heads, head_dim]");
    batch = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), width = qkv.size(4);
    check_dense(qkv, "qkv", {batch, tokens, 3, heads, width});
    STD_TORCH_CHECK(heads > 0, "qkv must have at least one head");
    STD_TORCH_CHECK(width > 0 && width % 8 == 0, "head_dim must be a multiple of 8, got ", width);
    STD_TORCH_CHECK(norm == kNone || norm == kRms || norm == kLayer, "norm must be 0, 1 or 2, got ", norm);
    for (int axis = 0; axis < 3; ++axis) {
      grid[axis] = grid_[axis], window[axis] = window_[axis];
      STD_TORCH_CHECK(
          1 <= window[axis] && window[axis] <= grid[axis], "a window of ", window[axis], " tokens does not fit a grid of ", grid[axis]);
      count[axis] = (grid[axis] + window[axis] - 1) / window[axis];
    }
    STD_TORCH_CHECK(grid[0] * grid[1] * grid[2] == tokens, "the grid does not have ", tokens, " tokens");
    windows = count[0] * count[1] * count[2];
    length = window[0] * window[1] * window[2];
    STD_TORCH_CHECK(cos_.has_value() == sin_.has_value(), "cos and sin must be given together");
    if (rotary) {
      check_statistic(*cos_, "cos", {tokens, width / 2});
      check_statistic(*sin_, "sin", {tokens, width / 2});
      cos = static_cast<const float*>(cos_->const_data_ptr());
      sin = static_cast<const float*>(sin_->const_data_ptr());
    }
    gain[0] = weights(q_weight, "q_weight", this->scale);
    gain[1] = weights(k_weight, "k_weight", 1.0f);
    if (bias_) read_bias(*bias_);
  }

 private:
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
      transpose_squares(heads, length, [&](int64_t from, int64_t count, float* row) { copy_row(in + from, row, count); }, bias.get());
    });
  }
};

// A thread's window: its tokens, their places inside a full window, and their rotary tables spread to all channels, the
// sines with the sign of the channel's own turn.
struct Window {
  std::vector<int64_t> token, place;
  std::vector<float> cos, sin;
  bool full = false;
  int64_t index = -1;

  int64_t size() const { return static_cast<int64_t>(token.size()); }

  void enter(const Problem& p, int64_t window) {
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
    full = size() == p.length;
    if (p.rotary) spread(p);
  }

 private:
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
};

// Reads rows of q and k; the scratch of a thread.
class Reader {
 public:
  explicit Reader(const Problem& p) : p_(p), twice_(2 * p.row()), h_(p.row()), unused_(p.row()) {}

  // out = rotate(norm(in) * gain)
  template <class T>
  void read(const T* in, const Window& window, int64_t n, const float* gain, float* out) {
    if (p_.norm == kNone) {
      for_columns(p_.width, [&](int64_t i, auto count) MINISORA_INLINE { store(out + i, load(in + i, count) * load(gain + i, count), count); });
    } else {
      float mean, rstd;
      normalise(in, out, &mean, &rstd);
      const Vec center(mean), inverse(rstd);
      for_columns(p_.width, [&](int64_t i, auto count) MINISORA_INLINE {
        store(out + i, (load(out + i, count) - center) * inverse * load(gain + i, count), count);
      });
    }
    if (p_.rotary) rotate(out, window, n, 1.0f);
  }

  // The gradient of the row read above, given that of its result, which is overwritten; dgain += the gradient of gain.
  template <class T>
  void read_backward(const T* in, const Window& window, int64_t n, const float* gain, float* grad, T* out, float* dgain) {
    if (p_.rotary) rotate(grad, window, n, -1.0f);
    if (p_.norm == kNone) {
      for_columns(p_.width, [&](int64_t i, auto count) MINISORA_INLINE { store(out + i, load(grad + i, count) * load(gain + i, count), count); });
      return;
    }
    float mean, rstd;
    normalise(in, h_.data(), &mean, &rstd);
    const TokenSums sums =
        adaln_backward_sums(h_.data(), grad, mean, rstd, gain, h_.data(), grad, unused_.data(), dgain, p_.width);
    const TokenGradient gradient(sums, rstd, p_.width, p_.norm == kRms);
    for_columns(p_.width, [&](int64_t i, auto count) MINISORA_INLINE {
      store(out + i, gradient(load(h_.data() + i, count), load(grad + i, count)), count);
    });
  }

 private:
  template <class T>
  void normalise(const T* in, float* copy, float* mean, float* rstd) const {
    Sum sum;
    for_columns(p_.width, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
      const Vec value = load(in + i, count);
      store(copy + i, value, count);
      sum.part[u] = sum.part[u] + value;
    });
    statistics(copy, sum.total(), p_.width, p_.norm == kRms, p_.eps, mean, rstd);
  }

  void rotate(float* row, const Window& window, int64_t n, float direction) {
    const float *cos = window.cos.data() + n * p_.width, *sin = window.sin.data() + n * p_.width;
    const Vec sign(direction);
    if (p_.interleaved) {
      for_columns(p_.width, [&](int64_t i, auto count) MINISORA_INLINE {
        const Vec x = load(row + i, count);
        store(row + i, at::vec::fmadd(x, load(cos + i, count), swap_pairs(x) * load(sin + i, count) * sign), count);
      });
      return;
    }
    // Two copies side by side: the partner of channel i is half a row further on, for both halves.
    std::copy(row, row + p_.width, twice_.data());
    std::copy(row, row + p_.width, twice_.data() + p_.width);
    const float* partner = twice_.data() + p_.width / 2;
    for_columns(p_.width, [&](int64_t i, auto count) MINISORA_INLINE {
      const Vec turned = load(partner + i, count) * load(sin + i, count) * sign;
      store(row + i, at::vec::fmadd(load(row + i, count), load(cos + i, count), turned), count);
    });
  }

  const Problem& p_;
  std::vector<float> twice_, h_, unused_;
};

// scores[key, query] += bias for keys [k0, k0 + kn) and queries [q0, q0 + qn) of the window
inline void add_bias(const Problem& p, const Window& w, int64_t head, int64_t k0, int64_t kn, int64_t q0, int64_t qn, float* scores, int64_t lanes) {
  const float* bias = p.bias.get() + head * p.length * p.length;
  for (int64_t j = 0; j < kn; ++j) {
    const float* from = bias + w.place[k0 + j] * p.length;
    float* to = scores + j * lanes;
    if (w.full) {
      for_columns(qn, [&](int64_t i, auto count) MINISORA_INLINE { store(to + i, load(to + i, count) + load(from + q0 + i, count), count); });
    } else {
      for (int64_t i = 0; i < qn; ++i) to[i] += from[w.place[q0 + i]];
    }
  }
}

// The other way: gradient[key, query] of the bias += dscores
inline void add_bias_gradient(const Problem& p, const Window& w, int64_t k0, int64_t kn, int64_t q0, int64_t qn, const float* dscores, int64_t lanes, float* gradient) {
  for (int64_t j = 0; j < kn; ++j) {
    float* to = gradient + w.place[k0 + j] * p.length;
    const float* from = dscores + j * lanes;
    if (w.full) {
      for_columns(qn, [&](int64_t i, auto count) MINISORA_INLINE { store(to + q0 + i, load(to + q0 + i, count) + load(from + i, count), count); });
    } else {
      for (int64_t i = 0; i < qn; ++i) to[w.place[q0 + i]] += from[i];
    }
  }
}

// One step of the online softmax: scores become exp(scores - greatest so far), `shrink` is what earlier sums are worth now.
inline void softmax_block(float* scores, int64_t keys, int64_t lanes, float* greatest, float* total, float* shrink) {
  for (int64_t i = 0; i < lanes; i += V) {
    const Vec before = Vec::loadu(greatest + i);
    Vec top = before;
    for (int64_t j = 0; j < keys; ++j) top = at::vec::clamp_min(Vec::loadu(scores + j * lanes + i), top);
    Vec sum[2] = {Vec(0.0f), Vec(0.0f)};
    for (int64_t j = 0; j < keys; ++j) {
      const Vec weight = exp(Vec::loadu(scores + j * lanes + i) - top);
      weight.store(scores + j * lanes + i);
      sum[j % 2] = sum[j % 2] + weight;
    }
    const Vec factor = exp(before - top);
    factor.store(shrink + i);
    top.store(greatest + i);
    at::vec::fmadd(Vec::loadu(total + i), factor, sum[0] + sum[1]).store(total + i);
  }
}

// While row n of a head is read: the rows lie too far apart for the hardware to see what is next. In a short window that is
// the next head, which there is time to fetch until then; in a long one the rows to come. Always inlined: gcc takes a function
// that only prefetches for one without effects, and drops the calls.
template <class Source>
MINISORA_INLINE inline void prefetch(const Problem& p, const Window& w, Source source, int64_t head, int64_t n) {
  const bool one_block = p.length <= kSide;
  const int64_t ahead = one_block ? n : n + 8;
  if (one_block ? head + 1 == p.heads : ahead >= w.size()) return;
  for (int part = 0; part < 3; ++part) {
    const auto* row = source(ahead, part) + (one_block ? p.width : 0);
    for (int64_t i = 0; i < p.width; i += 64 / sizeof(*row)) __builtin_prefetch(row + i, 0, 2);
  }
}

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
          softmax_block(scores.data(), kn, lanes, greatest.data(), total.data(), shrink.data());
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

// Sums over windows and samples: one partial sum for each chunk of windows and each head, added in order at the end.
struct Partial {
  int64_t chunks, parts;
  std::vector<float> gain[2]; // [chunks, heads, width]
  std::unique_ptr<float[]> bias; // [chunks, heads, key, query]

  Partial(const Problem& p, bool with_bias) {
    const int64_t items = p.batch * p.windows;
    const int64_t square = p.heads * p.length * p.length;
    chunks = with_bias ? std::min((kTasks / 8 + p.heads - 1) / p.heads, kPartialBias / square) : kTasks;
    chunks = std::max<int64_t>(std::min(chunks, items), 1);
    parts = std::min(p.heads, (kTasks + chunks - 1) / chunks);
    for (auto& sums : gain) sums.resize(p.norm == kNone ? p.width : chunks * p.heads * p.width);
    if (with_bias) bias.reset(new float[chunks * square]);
  }
};

template <class T>
void backward(
    const Problem& p, const T* dout, const T* qkv, const T* out, const float* softmax, T* dqkv, Partial& partial) {
  const int64_t row = p.row(), width = p.width, all = p.heads * width, items = p.batch * p.windows;
  const int64_t queries = whole_vectors(std::min(p.length, kSide)), square = p.length * p.length;
  const bool one_block = p.length <= kSide;
  torch::stable::parallel_for(0, partial.chunks * partial.parts, 1, [&](int64_t begin, int64_t end) {
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
          if (one_block) continue;
          const T* result = out + n * all + head * width;
          Sum sum;
          for_columns(width, [&](int64_t c, auto count, auto u) MINISORA_INLINE { sum.part[u] = at::vec::fmadd(load(gradient + c, count), load(result + c, count), sum.part[u]); });
          delta[i] = sum.total();
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

    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / partial.parts, part = task % partial.parts;
      const int64_t first_head = part * p.heads / partial.parts, last_head = (part + 1) * p.heads / partial.parts;
      if (partial.bias) {
        std::fill(partial.bias.get() + (chunk * p.heads + first_head) * square, partial.bias.get() + (chunk * p.heads + last_head) * square, 0.0f);
      }
      for (int64_t item = chunk * items / partial.chunks; item < (chunk + 1) * items / partial.chunks; ++item) {
        w.enter(p, item % p.windows);
        for (int64_t head = first_head; head < last_head; ++head) {
          const int64_t slot = p.norm == kNone ? 0 : chunk * p.heads + head;
          attend(item / p.windows, head, partial.gain[0].data() + slot * width, partial.gain[1].data() + slot * width,
                 partial.bias ? partial.bias.get() + (chunk * p.heads + head) * square : nullptr);
        }
      }
    }
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
    forward<T>(p, static_cast<const T*>(qkv.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), static_cast<float*>(softmax.mutable_data_ptr()));
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
    backward<T>(
        p, static_cast<const T*>(dout.const_data_ptr()), static_cast<const T*>(qkv.const_data_ptr()),
        static_cast<const T*>(out.const_data_ptr()), static_cast<const float*>(softmax.const_data_ptr()),
        static_cast<T*>(dqkv.mutable_data_ptr()), partial);
  });
  return {
      dqkv, weight_gradient(q_weight, qkv, partial.gain[0], p.scale), weight_gradient(k_weight, qkv, partial.gain[1], 1.0f),
      bias_gradient(p, bias, with_dbias, qkv, partial)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

} // namespace minisora
