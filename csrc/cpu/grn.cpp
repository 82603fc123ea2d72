// grn: equation and derivation in minisora_kernels/ops/grn.py. Two passes over the tokens: the first sums over the
// sites of each frame, the second writes. Both passes per frame, so that the second finds it in the caches, were no
// faster on one thread. On two threads they were slower, because the threads wait for each other after each frame.
#include "gelu.h"
#include "rows.h"

namespace minisora {
namespace {

template <bool GELU>
MINISORA_INLINE inline Vec activate(Vec x) {
  if constexpr (GELU) x = x * distribution(x);
  return x;
}

// sums += a^2, for G tokens
template <bool GELU, int G, class T>
void add_squares(const T* x, float* sums, int64_t width) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    Vec total(0.0f);
    for_group<G>([&](int r) MINISORA_INLINE {
      const Vec a = activate<GELU>(load_ahead<G>(x, r, i, width, count));
      total = at::vec::fmadd(a, a, total);
    });
    store(sums + i, load(sums + i, count) + total, count);
  });
}

// y = a * gain + bias, for G tokens
template <bool GELU, int G, class TX, class TY, class How>
void apply(const TX* x, const float* gains, const float* biases, TY* y, int64_t width, How how) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    const Vec gain = load(gains + i, count), bias = load(biases + i, count);
    for_group<G>([&](int r) MINISORA_INLINE {
      const Vec a = activate<GELU>(load_ahead<G>(x, r, i, width, count));
      how.put(y + r * width + i, at::vec::fmadd(a, gain, bias), count);
    });
  });
}

// products += dy * a, sums += dy if it is asked for (not null), for G tokens
template <bool GELU, int G, class TX, class TY>
void add_products(const TX* x, const TY* dy, float* products, float* sums, int64_t width) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    Vec total(0.0f), product(0.0f);
    for_group<G>([&](int r) MINISORA_INLINE {
      const Vec g = load_ahead<G>(dy, r, i, width, count);
      const Vec a = activate<GELU>(load_ahead<G>(x, r, i, width, count));
      total = total + g;
      product = at::vec::fmadd(g, a, product);
    });
    store(products + i, load(products + i, count) + product, count);
    if (sums != nullptr) store(sums + i, load(sums + i, count) + total, count);
  });
}

// dx = (dy * gain + a * pull) * a', with pull = dG / G, for G tokens
template <bool GELU, int G, class TX, class TY, class How>
void apply_backward(const TX* x, const TY* dy, const float* gains, const float* pulls, TX* dx, int64_t width, How how) {
  for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
    const Vec gain = load(gains + i, count), pull = load(pulls + i, count);
    for_group<G>([&](int r) MINISORA_INLINE {
      Vec a = load_ahead<G>(x, r, i, width, count), slope(1.0f);
      if constexpr (GELU) {
        const Vec phi = distribution(a);
        slope = at::vec::fmadd(a, density(a), phi);
        a = a * phi;
      }
      const Vec da = at::vec::fmadd(load_ahead<G>(dy, r, i, width, count), gain, a * pull);
      how.put(dx + r * width + i, da * slope, count);
    });
  });
}

template <class F>
float mean(int64_t width, F f) {
  Sum sum;
  for_columns(width, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
    Vec& part = sum.part[u];
    part = part + f(i, count);
  });
  return sum.total() / static_cast<float>(width);
}

// 1 / (mean(G) + eps) of a frame
float inverse_mean(const float* norms, int64_t width, double eps) {
  const float m = mean(width, [&](int64_t i, auto count) MINISORA_INLINE { return load(norms + i, count); });
  return 1.0f / (m + static_cast<float>(eps));
}

std::tuple<Tensor, Tensor> grn_fwd(
    const Tensor& x, const Tensor& weight, const Tensor& bias, bool gelu, double eps, ScalarType out_dtype) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [F, N, C]");
  const int64_t frames = x.size(0), sites = x.size(1), width = x.size(2);
  check_dense(x, "x", {frames, sites, width});
  const auto w = affine(weight, "weight", 0.0f, width), c = affine(bias, "bias", 0.0f, width);
  Tensor y = empty_like_shape(x, {frames, sites, width}, out_dtype);
  Tensor norms = empty_like_shape(x, {frames, width}, ScalarType::Float);
  if (sites == 0) torch::stable::zero_(norms);
  float* g = static_cast<float*>(norms.mutable_data_ptr());

  const auto run = [&](auto x_tag, auto y_tag, auto activated) {
    using TX = decltype(x_tag);
    constexpr bool GELU = activated;
    const auto* in = static_cast<const TX*>(x.const_data_ptr());
    auto* out = static_cast<decltype(y_tag)*>(y.mutable_data_ptr());
    sum_over_rows(
        1, frames, sites, Division(sites), width, [] { return 0; }, [](int, int64_t, int64_t) {},
        [&](int, int64_t token, auto group, float** sums) {
          add_squares<GELU, group>(in + token * width, sums[0], width);
        },
        [](int, int64_t, float**) {},
        [&](int64_t frame, int64_t, int64_t first, int64_t last, float** sums) {
          for (int64_t i = first; i < last; ++i) g[frame * width + i] = std::sqrt(sums[0][i]);
        });
    const auto read = [&](std::vector<float>& gain, int64_t frame, int64_t) {
      const float* norm = g + frame * width;
      const float r = inverse_mean(norm, width, eps);
      for (int64_t i = 0; i < width; ++i) gain[i] = 1.0f + w[i] * norm[i] * r;
    };
    with_put(past_caches(out, y.numel(), width), [&](auto how) {
      for_tokens(
          frames, sites, Division(sites), [&] { return std::vector<float>(width); }, read,
          [&](std::vector<float>& gain, int64_t token, auto group) {
            apply<GELU, group>(in + token * width, gain.data(), c.data(), out + token * width, width, how);
          });
    });
  };
  with_result(x.scalar_type(), out_dtype, [&](auto x_tag, auto y_tag) {
    gelu ? run(x_tag, y_tag, std::true_type{}) : run(x_tag, y_tag, std::false_type{});
  });
  return {y, norms};
}

// Uninitialised numbers: each is written before it is read.
std::unique_ptr<float[]> unwritten(int64_t size) { return std::unique_ptr<float[]>(new float[size]); }

// A frame's fp32 rows in the backward.
struct FrameRows {
  std::vector<float> gain, pull;

  explicit FrameRows(int64_t width) : gain(width), pull(width) {}

  void read(const float* norms, const float* products, const float* weight, int64_t width, double eps) {
    const float r = inverse_mean(norms, width, eps);
    const float shared = r * mean(width, [&](int64_t i, auto count) MINISORA_INLINE {
                           return load(weight + i, count) * load(products + i, count) * load(norms + i, count);
                         });
    for (int64_t i = 0; i < width; ++i) {
      gain[i] = 1.0f + weight[i] * norms[i] * r;
      pull[i] = norms[i] > 0.0f ? r * (weight[i] * products[i] - shared) / norms[i] : 0.0f;
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> grn_bwd(
    const Tensor& dy, const Tensor& x, std::optional<Tensor> weight, const Tensor& norms, bool gelu, double eps,
    bool need_x, std::optional<ScalarType> weight_dtype, std::optional<ScalarType> bias_dtype) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [F, N, C]");
  const int64_t frames = x.size(0), sites = x.size(1), width = x.size(2);
  check_dense(x, "x", {frames, sites, width});
  check_dense(dy, "dy", {frames, sites, width});
  check_statistic(norms, "norms", {frames, width});
  STD_TORCH_CHECK(weight.has_value() || !need_x, "the gradient of x needs weight");
  const auto w = affine(weight, "weight", 0.0f, width);
  Tensor dx = empty_if_asked(x, {frames, sites, width}, need_x ? std::optional(x.scalar_type()) : std::nullopt);
  Tensor dweight = empty_if_asked(x, {width}, weight_dtype), dbias = empty_if_asked(x, {width}, bias_dtype);
  const int kinds = bias_dtype ? 2 : 1; // sums of dy * a; of dy, for the bias alone
  const float* g = static_cast<const float*>(norms.const_data_ptr());
  const auto products = unwritten(frames * width), sums_dy = unwritten(bias_dtype ? frames * width : 0);

  const auto run = [&](auto x_tag, auto y_tag, auto activated) {
    using TX = decltype(x_tag);
    using TY = decltype(y_tag);
    constexpr bool GELU = activated;
    const auto* in = static_cast<const TX*>(x.const_data_ptr());
    const auto* grad = static_cast<const TY*>(dy.const_data_ptr());
    auto* out = data_if<TX>(need_x, dx);
    sum_over_rows(
        kinds, frames, sites, Division(sites), width, [] { return 0; }, [](int, int64_t, int64_t) {},
        [&](int, int64_t token, auto group, float** sums) {
          add_products<GELU, group>(in + token * width, grad + token * width, sums[0], sums[1], width);
        },
        [](int, int64_t, float**) {},
        [&](int64_t frame, int64_t, int64_t first, int64_t last, float** sums) {
          std::copy(sums[0] + first, sums[0] + last, products.get() + frame * width + first);
          if (bias_dtype) std::copy(sums[1] + first, sums[1] + last, sums_dy.get() + frame * width + first);
        });
    if (!need_x) return;
    const auto read = [&](FrameRows& rows, int64_t frame, int64_t) {
      rows.read(g + frame * width, products.get() + frame * width, w.data(), width, eps);
    };
    with_put(past_caches(out, dx.numel(), width), [&](auto how) {
      for_tokens(
          frames, sites, Division(sites), [&] { return FrameRows(width); }, read,
          [&](FrameRows& rows, int64_t token, auto group) {
            const int64_t at = token * width;
            apply_backward<GELU, group>(in + at, grad + at, rows.gain.data(), rows.pull.data(), out + at, width, how);
          });
    });
  };
  with_result(x.scalar_type(), dy.scalar_type(), [&](auto x_tag, auto y_tag) {
    gelu ? run(x_tag, y_tag, std::true_type{}) : run(x_tag, y_tag, std::false_type{});
  });

  // Adds up over the frames, in their order.
  const auto write = [&](Tensor& gradient, const float* terms) {
    std::vector<float> total(width, 0.0f);
    for (int64_t first = 0; sites > 0 && first < width; first += kBlock) {
      add_up(frames, std::min(kBlock, width - first), total.data() + first, [&](int64_t frame) {
        return terms + frame * width + first;
      });
    }
    with_type(gradient.scalar_type(), [&](auto tag) {
      auto* to = static_cast<decltype(tag)*>(gradient.mutable_data_ptr());
      for_columns(
          width, [&](int64_t i, auto count) MINISORA_INLINE { store(to + i, load(total.data() + i, count), count); });
    });
  };
  if (weight_dtype) {
    for (int64_t frame = 0; sites > 0 && frame < frames; ++frame) {
      const float r = inverse_mean(g + frame * width, width, eps);
      for (int64_t i = 0; i < width; ++i) products[frame * width + i] *= g[frame * width + i] * r;
    }
    write(dweight, products.get());
  }
  if (bias_dtype) write(dbias, sums_dy.get());
  return {dx, dweight, dbias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("grn_fwd", TORCH_BOX(&grn_fwd));
  m.impl("grn_bwd", TORCH_BOX(&grn_bwd));
}

} // namespace minisora
