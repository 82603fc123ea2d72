// norm_rope: equation and derivation in minisora_kernels/ops/norm_rope.py.
//
// A token's heads go through a row of fp32 in the first cache: norm, weight and bias, then the rotation, head by head.
#include "rows.h"

namespace minisora {
namespace {

constexpr int64_t kGrain = 16; // tokens that a thread takes at a time
constexpr int64_t kTasks = 256; // the most partial sums of a parameter's gradient, whatever the number of threads

struct Problem {
  int64_t batch, tokens, heads, width, norm, span;
  int64_t batch_stride, token_stride, head_stride;
  float eps;
  bool rotary, interleaved;
  const float *cos = nullptr, *sin = nullptr;
  int64_t batch_table = 0, token_table = 0, head_table = 0; // strides of the tables
  std::vector<float> gain, bias; // [heads, width], or empty

  Problem(
      const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias_, int64_t norm,
      bool across, const std::optional<Tensor>& cos_, const std::optional<Tensor>& sin_, bool interleaved, double eps)
      : norm(norm), eps(static_cast<float>(eps)), rotary(cos_.has_value()), interleaved(interleaved) {
    check_dtype(x, "x");
    STD_TORCH_CHECK(x.dim() == 4, "x must be [B, N, heads, head_dim]");
    batch = x.size(0), tokens = x.size(1), heads = x.size(2), width = x.size(3);
    STD_TORCH_CHECK(heads > 0 && width > 0 && width % 2 == 0, "x must have heads of an even width");
    STD_TORCH_CHECK(x.stride(3) == 1, "x must have stride 1 over head_dim");
    STD_TORCH_CHECK(norm == kNone || norm == kRms || norm == kLayer, "norm must be 0, 1 or 2, got ", norm);
    batch_stride = x.stride(0), token_stride = x.stride(1), head_stride = x.stride(2);
    span = across ? heads * width : width;
    STD_TORCH_CHECK(cos_.has_value() == sin_.has_value(), "cos and sin must be given together");
    if (rotary) {
      STD_TORCH_CHECK(cos_->dim() == 4, "cos must be [B or 1, N, heads or 1, head_dim / 2]");
      const int64_t samples = cos_->size(0), each = cos_->size(2), half = width / 2;
      STD_TORCH_CHECK(samples == 1 || samples == batch, "cos must have 1 or B samples, got ", samples);
      STD_TORCH_CHECK(each == 1 || each == heads, "cos must have 1 or all heads, got ", each);
      check_statistic(*cos_, "cos", {samples, tokens, each, half});
      check_statistic(*sin_, "sin", {samples, tokens, each, half});
      cos = static_cast<const float*>(cos_->const_data_ptr());
      sin = static_cast<const float*>(sin_->const_data_ptr());
      batch_table = samples == 1 ? 0 : tokens * each * half;
      token_table = each * half;
      head_table = each == 1 ? 0 : half;
    }
    gain = parameter(weight, "weight");
    bias = parameter(bias_, "bias");
  }

  template <class T>
  const T* row(const T* x, int64_t token) const {
    return x + token / tokens * batch_stride + token % tokens * token_stride;
  }

 private:
  std::vector<float> parameter(const std::optional<Tensor>& given, const char* name) const {
    std::vector<float> out;
    if (!given) return out;
    STD_TORCH_CHECK(norm != kNone, name, " needs a norm");
    const bool shared = given->dim() == 1;
    if (shared) {
      check_dense(*given, name, {width});
    } else {
      check_dense(*given, name, {heads, width});
    }
    out.resize(heads * width);
    with_type(given->scalar_type(), [&](auto tag) {
      const auto* p = static_cast<const decltype(tag)*>(given->const_data_ptr());
      for (int64_t i = 0; i < heads * width; ++i) out[i] = static_cast<float>(p[shared ? i % width : i]);
    });
    return out;
  }
};

// The rows of a thread.
class Row {
 public:
  explicit Row(const Problem& p) : p_(p), x_(p.heads * p.width), g_(p.heads * p.width), cos_(p.width), sin_(p.width) {}

  template <class T>
  void forward(const T* x, int64_t token, T* out) {
    read(x, p_.head_stride, x_.data());
    if (p_.norm != kNone) {
      for_spans([&](float* row, int64_t first) {
        normalise(row);
        for_columns(p_.span, [&](int64_t i, auto count) MINISORA_INLINE {
          Vec value = load(row + i, count);
          if (!p_.gain.empty()) value = value * load(p_.gain.data() + first + i, count);
          if (!p_.bias.empty()) value = value + load(p_.bias.data() + first + i, count);
          store(row + i, value, count);
        });
      });
    }
    turn(x_.data(), token, 1.0f, out);
  }

  // dx, unless it is null; dgain += and dbias += the gradients of the parameters, [heads, width], unless they are null.
  template <class T>
  void backward(const T* dy, const T* x, int64_t token, T* dx, float* dgain, float* dbias) {
    read(dy, p_.width, g_.data());
    if (p_.rotary) turn(g_.data(), token, -1.0f, g_.data());
    if (p_.norm == kNone) {
      if (dx != nullptr) copy_row(g_.data(), dx, p_.heads * p_.width);
      return;
    }
    read(x, p_.head_stride, x_.data());
    for_spans([&](float* row, int64_t first) {
      const float rstd = normalise(row);
      float* g = g_.data() + first;
      Sum sum, sum_h;
      for_columns(p_.span, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
        const Vec h = load(row + i, count);
        Vec d = load(g + i, count);
        if (dgain != nullptr) store(dgain + first + i, at::vec::fmadd(d, h, load(dgain + first + i, count)), count);
        if (dbias != nullptr) store(dbias + first + i, d + load(dbias + first + i, count), count);
        if (!p_.gain.empty()) d = d * load(p_.gain.data() + first + i, count);
        store(g + i, d, count);
        sum.part[u] = sum.part[u] + d;
        sum_h.part[u] = at::vec::fmadd(d, h, sum_h.part[u]);
      });
      if (dx == nullptr) return;
      const float inverse = 1.0f / static_cast<float>(p_.span);
      const Vec mean(p_.norm == kRms ? 0.0f : sum.total() * inverse), mean_h(sum_h.total() * inverse), by(rstd);
      for_columns(p_.span, [&](int64_t i, auto count) MINISORA_INLINE {
        store(dx + first + i, by * (load(g + i, count) - mean - load(row + i, count) * mean_h), count);
      });
    });
  }

 private:
  template <class T>
  void read(const T* from, int64_t step, float* to) const {
    for (int64_t head = 0; head < p_.heads; ++head) {
      copy_row(from + head * step, to + head * p_.width, p_.width);
    }
  }

  // f(row, first) for the channels that a norm goes over: those of each head, or all.
  template <class F>
  void for_spans(F f) {
    for (int64_t first = 0; first < p_.heads * p_.width; first += p_.span) f(x_.data() + first, first);
  }

  // row = (row - mean) * rstd; returns rstd
  float normalise(float* row) const {
    const float inverse = 1.0f / static_cast<float>(p_.span);
    Vec mean(0.0f);
    if (p_.norm == kLayer) {
      Sum sum;
      for_columns(p_.span, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
        sum.part[u] = sum.part[u] + load(row + i, count);
      });
      mean = Vec(sum.total() * inverse);
    }
    Sum squares;
    for_columns(p_.span, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
      const Vec d = first_lanes(load(row + i, count) - mean, count);
      squares.part[u] = at::vec::fmadd(d, d, squares.part[u]);
    });
    const float rstd = 1.0f / std::sqrt(squares.total() * inverse + p_.eps);
    const Vec by(rstd);
    for_columns(p_.span, [&](int64_t i, auto count) MINISORA_INLINE {
      store(row + i, (load(row + i, count) - mean) * by, count);
    });
    return rstd;
  }

  // out = the row, turned by the angles of the token times `direction`; may be in place
  template <class T>
  void turn(const float* row, int64_t token, float direction, T* out) {
    if (!p_.rotary) return copy_row(row, out, p_.heads * p_.width);
    const int64_t half = p_.width / 2;
    const int64_t first = token / p_.tokens * p_.batch_table + token % p_.tokens * p_.token_table;
    const Vec sign(direction);
    for (int64_t head = 0; head < p_.heads; ++head, row += p_.width, out += p_.width) {
      const float *cos = p_.cos + first + head * p_.head_table, *sin = p_.sin + first + head * p_.head_table;
      if (p_.interleaved) {
        if (head == 0 || p_.head_table != 0) spread(cos, sin);
        for_columns(p_.width, [&](int64_t i, auto count) MINISORA_INLINE {
          const Vec x = load(row + i, count), s = load(sin_.data() + i, count) * sign;
          store(out + i, at::vec::fmadd(x, load(cos_.data() + i, count), swap_pairs(x) * s), count);
        });
        continue;
      }
      for_columns(half, [&](int64_t i, auto count) MINISORA_INLINE {
        const Vec a = load(row + i, count), b = load(row + half + i, count);
        const Vec c = load(cos + i, count), s = load(sin + i, count) * sign;
        store(out + i, at::vec::fmsub(a, c, b * s), count);
        store(out + half + i, at::vec::fmadd(b, c, a * s), count);
      });
    }
  }

  // Tables with one entry per channel; the sines have the sign of the channel's rotation.
  void spread(const float* cos, const float* sin) {
    for (int64_t i = 0; i < p_.width / 2; ++i) {
      cos_[2 * i] = cos_[2 * i + 1] = cos[i];
      sin_[2 * i] = -sin[i];
      sin_[2 * i + 1] = sin[i];
    }
  }

  const Problem& p_;
  std::vector<float> x_, g_, cos_, sin_;
};

Tensor norm_rope_fwd(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t norm, bool across,
    std::optional<Tensor> cos, std::optional<Tensor> sin, bool interleaved, double eps) {
  const Problem p(x, weight, bias, norm, across, cos, sin, interleaved, eps);
  Tensor y = empty_like_shape(x, {p.batch, p.tokens, p.heads, p.width}, x.scalar_type());
  with_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, p.batch * p.tokens, kGrain, [&](int64_t begin, int64_t end) {
      Row row(p);
      for (int64_t token = begin; token < end; ++token)
        row.forward(p.row(from, token), token, to + token * p.heads * p.width);
    });
  });
  return y;
}

// The gradient of a parameter, [head_dim] or [heads, head_dim], from partial sums [parts, 2, heads, head_dim].
Tensor parameter_gradient(
    const Problem& p, const std::optional<Tensor>& parameter, bool asked, const Tensor& x, const float* sums,
    int64_t parts) {
  if (!asked) return empty_like_shape(x, {0}, x.scalar_type());
  const int64_t all = p.heads * p.width, size = parameter->numel(), heads = all / size;
  Tensor gradient = torch::stable::new_empty(*parameter, parameter->sizes(), parameter->scalar_type());
  with_type(parameter->scalar_type(), [&](auto tag) {
    auto* out = static_cast<decltype(tag)*>(gradient.mutable_data_ptr());
    float total[kBlock];
    for (int64_t first = 0; first < size; first += kBlock) {
      const int64_t columns = std::min(kBlock, size - first);
      add_up(parts * heads, columns, total, [&](int64_t j) {
        return sums + j / heads * 2 * all + j % heads * size + first;
      });
      for_columns(columns, [&](int64_t i, auto count) MINISORA_INLINE {
        store(out + first + i, load(total + i, count), count);
      });
    }
  });
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> norm_rope_bwd(
    const Tensor& dy, const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t norm,
    bool across, std::optional<Tensor> cos, std::optional<Tensor> sin, bool interleaved, double eps, bool need_x,
    bool need_weight, bool need_bias) {
  const Problem p(x, weight, bias, norm, across, cos, sin, interleaved, eps);
  check_dense(dy, "dy", {p.batch, p.tokens, p.heads, p.width});
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy must have the dtype of x");
  STD_TORCH_CHECK((weight || !need_weight) && (bias || !need_bias), "a gradient of what is not given");
  const int64_t all = p.heads * p.width, tokens = p.batch * p.tokens;
  Tensor dx = need_x ? empty_like_shape(x, {p.batch, p.tokens, p.heads, p.width}, x.scalar_type())
                     : empty_like_shape(x, {0}, x.scalar_type());
  const int64_t per_task = std::max<int64_t>(kGrain, (tokens + kTasks - 1) / kTasks);
  const int64_t tasks = (tokens + per_task - 1) / per_task;
  std::vector<float> sums(need_weight || need_bias ? tasks * 2 * all : 0);
  with_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* grad = static_cast<const T*>(dy.const_data_ptr());
    T* to = data_if<T>(need_x, dx);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Row row(p);
      for (int64_t task = begin; task < end; ++task) {
        float* dgain = need_weight ? sums.data() + task * 2 * all : nullptr;
        float* dbias = need_bias ? sums.data() + (task * 2 + 1) * all : nullptr;
        for (int64_t token = task * per_task; token < std::min(tokens, (task + 1) * per_task); ++token)
          row.backward(
              grad + token * all, p.row(from, token), token, need_x ? to + token * all : nullptr, dgain, dbias);
      }
    });
  });
  return {
      dx, parameter_gradient(p, weight, need_weight, x, sums.data(), tasks),
      parameter_gradient(p, bias, need_bias, x, sums.data() + all, tasks)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("norm_rope_fwd", TORCH_BOX(&norm_rope_fwd));
  m.impl("norm_rope_bwd", TORCH_BOX(&norm_rope_bwd));
}

} // namespace minisora
