// guided_step: equation in minisora_kernels/ops/guided_step.py.
#include "common.h"

namespace minisora {
namespace {

constexpr int64_t kGrain = 16384; // numbers per task of a thread

template <class F>
void with_flag(bool flag, F&& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// Some numbers of one sample; guidance applies to all of them or to none. null, z and variance may be null pointers.
template <class TX, class TP>
struct Piece {
  const TX* x;
  const TP* cond;
  const TP* null;
  const TP* variance;
  const TX* z;
  TX* out;

  Piece at(int64_t offset) const {
    const auto from = [=](auto* p) { return p == nullptr ? p : p + offset; };
    return {x + offset, cond + offset, from(null), from(variance), from(z), out + offset};
  }

  template <bool guided, bool stepped, bool learned>
  void update(const float* coefficients, int64_t size) const {
    const Vec w_minus_1(coefficients[0] - 1.0f), a(coefficients[1]), b(coefficients[2]), c(coefficients[3]), s(coefficients[4]);
    for_columns(size, [&](int64_t i, auto count) MINISORA_INLINE {
      Vec g = load(cond + i, count);
      // starts at cond, not at null, so that it is exact for w = 1
      if constexpr (guided) g = at::vec::fmadd(w_minus_1, g - load(null + i, count), g);
      Vec y = at::vec::fmadd(b, g, a * load(x + i, count));
      if constexpr (stepped) {
        Vec factor = c;
        if constexpr (learned) factor = c * (s * (load(variance + i, count) - Vec(1.0f))).exp();
        y = at::vec::fmadd(factor, load(z + i, count), y);
      }
      store(out + i, y, count);
    });
  }

  void update(const float* coefficients, int64_t size, bool guided) const {
    with_flag(guided, [&](auto guide) {
      with_flag(z != nullptr, [&](auto step) {
        if constexpr (step) {
          with_flag(variance != nullptr, [&](auto learn) { this->template update<guide, true, learn>(coefficients, size); });
        } else {
          this->template update<guide, false, false>(coefficients, size);
        }
      });
    });
  }
};

void check(const Tensor& tensor, const char* name, int64_t batch, int64_t channels, int64_t cells) {
  check_dtype(tensor, name);
  STD_TORCH_CHECK(
      tensor.dim() >= 2 && tensor.size(0) == batch && tensor.size(1) == channels && tensor.numel() == batch * channels * cells,
      name, " must be [", batch, ", ", channels, ", ...] with ", cells, " cells a channel");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Like `check`, for an optional tensor that must have the dtype of another. Returns its data, or null without a tensor.
template <class T>
const T* data(const std::optional<Tensor>& tensor, const char* name, const Tensor& like, int64_t cells) {
  if (!tensor) return nullptr;
  check(*tensor, name, like.size(0), like.size(1), cells);
  STD_TORCH_CHECK(tensor->scalar_type() == like.scalar_type(), name, " has another dtype");
  return static_cast<const T*>(tensor->const_data_ptr());
}

Tensor guided_step_fwd(
    const Tensor& x, const Tensor& cond, std::optional<Tensor> null, std::optional<Tensor> z, const Tensor& coefficients,
    int64_t guided_channels) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be [B, C, ...]");
  const int64_t batch = x.size(0), channels = x.size(1);
  const int64_t cells = batch * channels == 0 ? 0 : x.numel() / (batch * channels);
  check(x, "x", batch, channels, cells);
  const bool learned = cond.dim() >= 2 && cond.size(1) == 2 * channels;
  check(cond, "cond", batch, learned ? 2 * channels : channels, cells);
  check_dtype(coefficients, "coefficients");
  check_shape(coefficients, "coefficients", {batch, 5});
  STD_TORCH_CHECK(
      coefficients.scalar_type() == ScalarType::Float && coefficients.stride(1) == 1, "coefficients must be rows of float32");
  STD_TORCH_CHECK(guided_channels >= 0 && guided_channels <= channels, "channels must be in 0..", channels);
  const int64_t size = channels * cells, chunks = (size + kGrain - 1) / kGrain;
  const int64_t guided = null ? guided_channels * cells : 0, stride = coefficients.stride(0);
  const auto* rows = static_cast<const float*>(coefficients.const_data_ptr());
  Tensor out = with_huge_pages(torch::stable::empty_like(x));

  with_type(x.scalar_type(), [&](auto x_tag) {
    with_type(cond.scalar_type(), [&](auto cond_tag) {
      using TX = decltype(x_tag);
      using TP = decltype(cond_tag);
      const auto* states = static_cast<const TX*>(x.const_data_ptr());
      const auto* predictions = static_cast<const TP*>(cond.const_data_ptr());
      const auto* unconditional = data<TP>(null, "null", cond, cells);
      const auto* others = data<TX>(z, "z", x, cells);
      auto* results = static_cast<TX*>(out.mutable_data_ptr());
      torch::stable::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t sample = task / chunks, first = task % chunks * kGrain, last = std::min(first + kGrain, size);
          const int64_t at = sample * size, of = at * (learned ? 2 : 1);
          const Piece<TX, TP> all{
              states + at, predictions + of, null ? unconditional + of : nullptr, learned ? predictions + of + size : nullptr,
              z ? others + at : nullptr, results + at};
          const int64_t middle = std::clamp(guided, first, last);
          all.at(first).update(rows + sample * stride, middle - first, true);
          all.at(middle).update(rows + sample * stride, last - middle, false);
        }
      });
    });
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) { m.impl("guided_step_fwd", TORCH_BOX(&guided_step_fwd)); }

} // namespace minisora
