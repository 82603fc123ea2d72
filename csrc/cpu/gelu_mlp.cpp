// gelu_mlp: equation in minisora_kernels/ops/gelu_mlp.py. Torch computes the matrix products, one chunk of tokens at a
// time. This file computes what lies between them.
//
// With s = sigmoid(2u), u = sqrt(2 / pi) * (h + 0.044715 h^3), the tanh form is gelu(h) = h * s, because
// (1 + tanh(u)) / 2 = s, and gelu'(h) = s + h * s * (1 - s) * 2u'.
#include "gelu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <functional>
#include <numeric>

namespace minisora {
namespace {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

// q = exp(-u) and s = 1 / (1 + q^2). exp_u20 may saturate below inf; q^2 does not, so gelu(-inf) is nan as in torch.
struct Sigmoid {
  Vec q, s;

  Sigmoid(Vec h, Vec squared)
      : q((h * at::vec::fmadd(squared, Vec(-kSqrt2OverPi * kCubic), Vec(-kSqrt2OverPi))).exp_u20()),
        s(Vec(1.0f) / at::vec::fmadd(q, q, Vec(1.0f))) {}
};

// The forms of GELU: the value, and with it the slope.
struct Tanh {
  static Vec value(Vec h) { return h * Sigmoid(h, h * h).s; }

  static std::pair<Vec, Vec> value_and_slope(Vec h) {
    const Vec squared = h * h;
    const auto [q, s] = Sigmoid(h, squared);
    const Vec hs = h * s;
    // 1 - s loses digits where s is near 1; q^2 s does not. In this order, with a finite q, it is 0 where s is 0.
    const Vec finite = at::vec::clamp_max(q, Vec(1e30f));
    const Vec complement = finite * s * finite;
    const Vec slope = at::vec::fmadd(squared, Vec(6.0f * kSqrt2OverPi * kCubic), Vec(2.0f * kSqrt2OverPi));
    return {hs, at::vec::fmadd(hs * complement, slope, s)};
  }
};

struct Exact {
  static Vec value(Vec h) { return h * distribution(h); }

  static std::pair<Vec, Vec> value_and_slope(Vec h) {
    const Vec phi = distribution(h);
    return {h * phi, at::vec::fmadd(h, density(h), phi)};
  }
};

// f(tag of the dtype, form)
template <class F>
void with_form(ScalarType dtype, bool exact, F f) {
  with_type(dtype, [&](auto tag) { exact ? f(tag, Exact{}) : f(tag, Tanh{}); });
}

// Tokens per chunk and thread. They bound the memory that lies between the two products. Torch lays a weight out anew
// in every product: with tiles, a bfloat16 product of 128 rows takes up to twice the time per row.
constexpr int64_t kRowsPerThread = 2048;
constexpr int64_t kRows = 32; // of one task; db1 is a sum over this many tokens, then over those sums in order

int64_t chunk_of(int64_t tokens) {
  return std::min(tokens, kRowsPerThread * static_cast<int64_t>(torch::stable::get_num_threads()));
}

// torch's matrix products, written into existing memory.
struct Matrix {
  Tensor tensor;

  Matrix(const Tensor& like, const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : tensor(
            torch::stable::from_blob(
                const_cast<void*>(data), {rows, columns}, {row_stride, column_stride}, like.device(),
                like.scalar_type())) {}
  // A tensor of this file's own, which no gradient is recorded for.
  explicit Matrix(Tensor own, std::nullptr_t) : tensor(own) {}
  // From a tensor, which may be transposed.
  explicit Matrix(const Tensor& of)
      : Matrix(of, of.const_data_ptr(), of.size(0), of.size(1), of.stride(0), of.stride(1)) {}

  static Matrix transposed(const Tensor& of) {
    return Matrix(of, of.const_data_ptr(), of.size(1), of.size(0), of.stride(1), of.stride(0));
  }
};

void product(const Matrix& out, const Matrix& left, const Matrix& right) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.tensor.get(), left.tensor.get(), right.tensor.get()));
}

void product(const Matrix& out, const Matrix& left, const Matrix& right, const std::optional<Tensor>& bias) {
  if (!bias) return product(out, left, right);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.tensor.get(), bias->get(), left.tensor.get(), right.tensor.get(), 1.0, 1.0));
}

// The rows of a dense matrix of this file's own from `row` on; the tensor itself if that is all of them.
template <class T>
Matrix rows_of_own(const Tensor& own, T* data, int64_t row, int64_t rows, int64_t columns) {
  if (rows == own.size(0)) return Matrix(own, nullptr);
  return Matrix(own, data + row * columns, rows, columns, columns, 1);
}

// The rows of a dense matrix from `row` on. A tensor with more dimensions is the matrix of its last one.
template <class T>
Matrix rows_of(const Tensor& like, T* data, int64_t row, int64_t rows, int64_t columns) {
  return Matrix(like, data + row * columns, rows, columns, columns, 1);
}

// f(first row, last row, task) over rows [0, rows), in parallel.
template <class F>
void for_rows(int64_t rows, F f) {
  torch::stable::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task * kRows, std::min(rows, (task + 1) * kRows), task);
  });
}

void check_weight(const Tensor& w, const char* name, const Tensor& like, int64_t rows, int64_t columns) {
  check_dtype(w, name);
  check_shape(w, name, {rows, columns});
  STD_TORCH_CHECK(w.scalar_type() == like.scalar_type(), name, " must have the tokens' dtype");
}

void check_bias(const std::optional<Tensor>& b, const char* name, const Tensor& like, int64_t size) {
  if (!b) return;
  check_dtype(*b, name);
  check_shape(*b, name, {size});
  STD_TORCH_CHECK(b->scalar_type() == like.scalar_type(), name, " must have the tokens' dtype");
}

std::tuple<Tensor, Tensor> gelu_mlp_fwd(
    const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
    const std::optional<Tensor>& b2, bool exact, bool keep) {
  check_dtype(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1, "x must be [..., D]");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  STD_TORCH_CHECK(w1.dim() == 2 && w2.dim() == 2, "w1 and w2 must be matrices");
  std::vector<int64_t> shape(x.dim());
  for (int64_t dim = 0; dim < x.dim(); ++dim) shape[dim] = x.size(dim);
  const int64_t width = shape.back(), hidden = w1.size(0), out_width = w2.size(0);
  shape.back() = out_width;
  const int64_t tokens = std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies<>());
  check_weight(w1, "w1", x, hidden, width);
  check_weight(w2, "w2", x, out_width, hidden);
  check_bias(b1, "b1", x, hidden);
  check_bias(b2, "b2", x, out_width);
  const int64_t chunk = chunk_of(tokens);
  Tensor y = empty_like_shape(x, shape, x.scalar_type());
  Tensor h = empty_like_shape(x, {keep ? tokens : 0, keep ? hidden : 0}, x.scalar_type());
  const Tensor a = empty_like_shape(x, {chunk, hidden}, x.scalar_type());
  const Matrix up = Matrix::transposed(w1), down = Matrix::transposed(w2);
  with_form(x.scalar_type(), exact, [&](auto tag, auto form) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* out = static_cast<T*>(y.mutable_data_ptr());
    T* activation = static_cast<T*>(a.mutable_data_ptr());
    for (int64_t row = 0; row < tokens; row += chunk) {
      const int64_t rows = std::min(chunk, tokens - row);
      T* kept = keep ? static_cast<T*>(h.mutable_data_ptr()) + row * hidden : activation;
      const Matrix before = rows_of_own(keep ? h : a, kept, 0, rows, hidden);
      product(before, rows_of(x, in, row, rows, width), up, b1);
      for_rows(rows, [&](int64_t first, int64_t last, int64_t) {
        for_columns((last - first) * hidden, [&](int64_t i, auto count) MINISORA_INLINE {
          const Vec value = load(kept + first * hidden + i, count);
          store(activation + first * hidden + i, form.value(value), count);
        });
      });
      product(rows_of(y, out, row, rows, out_width), rows_of_own(a, activation, 0, rows, hidden), down, b2);
    }
  });
  return {y, h};
}

// db1: the sums of dh over the tokens, in fp32.
struct BiasSums {
  int64_t hidden;
  std::vector<float> partial, total; // one partial sum per task of a chunk

  BiasSums(int64_t chunk, int64_t hidden, bool asked)
      : hidden(hidden), partial(asked ? (chunk + kRows - 1) / kRows * hidden : 0), total(asked ? hidden : 0, 0.0f) {}

  // The sums of a task, at zero; null if they are not asked for.
  float* begin(int64_t task) {
    if (total.empty()) return nullptr;
    return std::fill_n(partial.data() + task * hidden, hidden, 0.0f) - hidden;
  }

  void end_chunk(int64_t rows) {
    for (int64_t task = 0; !total.empty() && task * kRows < rows; ++task) {
      for_columns(hidden, [&](int64_t column, auto count) MINISORA_INLINE {
        const Vec more = load(partial.data() + task * hidden + column, count);
        store(total.data() + column, load(total.data() + column, count) + more, count);
      });
    }
  }
};

// a = gelu(h), and where there is da (not null), dh over it, of which `sums` adds up the rows; a may be null.
template <class Form, class T>
void activate_backward(const T* h, T* a, T* da, float* sums, int64_t hidden) {
  for_columns(hidden, [&](int64_t i, auto count) MINISORA_INLINE {
    const Vec value = load(h + i, count);
    const auto [activated, slope] = Form::value_and_slope(value);
    if (a != nullptr) store(a + i, activated, count);
    if (da == nullptr) return;
    const Vec slant = load(da + i, count) * slope;
    store(da + i, slant, count);
    if (sums != nullptr) store(sums + i, load(sums + i, count) + slant, count);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gelu_mlp_bwd(
    const Tensor& dy, const Tensor& h, std::optional<Tensor> w1, std::optional<Tensor> w2, bool exact, bool need_a,
    bool need_dh, bool need_b1) {
  check_dtype(h, "h");
  STD_TORCH_CHECK(h.dim() == 2, "h must be [tokens, hidden]");
  STD_TORCH_CHECK(h.is_contiguous(), "h must be contiguous");
  STD_TORCH_CHECK(dy.dim() == 2, "dy must be [tokens, D_out]");
  STD_TORCH_CHECK((!w1 || w1->dim() == 2) && (!w2 || w2->dim() == 2), "w1 and w2 must be matrices");
  STD_TORCH_CHECK(w2 || (!w1 && !need_dh && !need_b1), "dx, dh and db1 need w2");
  const int64_t tokens = h.size(0), hidden = h.size(1), width = w1 ? w1->size(1) : 0, out_width = dy.size(1);
  check_dense(dy, "dy", {tokens, out_width});
  STD_TORCH_CHECK(dy.scalar_type() == h.scalar_type(), "dy must have h's dtype");
  if (w1) check_weight(*w1, "w1", h, hidden, width);
  if (w2) check_weight(*w2, "w2", h, out_width, hidden);
  const ScalarType dtype = h.scalar_type();
  const int64_t chunk = chunk_of(tokens);
  const auto asked = [&](bool need) { return need ? std::optional(dtype) : std::nullopt; };
  Tensor dx = empty_if_asked(h, {tokens, width}, asked(w1.has_value()));
  Tensor a = empty_if_asked(h, {tokens, hidden}, asked(need_a));
  Tensor dh = empty_if_asked(h, {tokens, hidden}, asked(need_dh));
  Tensor db1 = empty_if_asked(h, {hidden}, asked(need_b1));
  // da, then dh: of all tokens if dh is asked for, else of a chunk.
  Tensor scratch = need_dh || !w2 ? dh : empty_like_shape(h, {chunk, hidden}, dtype);
  BiasSums sums(chunk, hidden, need_b1);
  with_form(dtype, exact, [&](auto tag, auto form) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(h.const_data_ptr());
    for (int64_t row = 0; row < tokens; row += chunk) {
      const int64_t rows = std::min(chunk, tokens - row);
      T* activation = need_a ? static_cast<T*>(a.mutable_data_ptr()) + row * hidden : nullptr;
      T* out = w2 ? static_cast<T*>(scratch.mutable_data_ptr()) + (need_dh ? row * hidden : 0) : nullptr;
      if (w2) {
        const T* grad = static_cast<const T*>(dy.const_data_ptr());
        product(rows_of(h, out, 0, rows, hidden), rows_of(h, grad, row, rows, out_width), Matrix(*w2));
      }
      for_rows(rows, [&](int64_t first, int64_t last, int64_t task) {
        float* total = sums.begin(task);
        for (int64_t r = first * hidden; r < last * hidden; r += hidden) {
          activate_backward<decltype(form)>(
              in + row * hidden + r, activation ? activation + r : nullptr, out ? out + r : nullptr, total, hidden);
        }
      });
      sums.end_chunk(rows);
      if (w1) {
        T* back = static_cast<T*>(dx.mutable_data_ptr());
        product(rows_of(h, back, row, rows, width), rows_of(h, out, 0, rows, hidden), Matrix(*w1));
      }
    }
    T* bias = static_cast<T*>(db1.mutable_data_ptr());
    if (!need_b1) return;
    for_columns(hidden, [&](int64_t i, auto count) { store(bias + i, load(sums.total.data() + i, count), count); });
  });
  return {dx, a, dh, db1};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("gelu_mlp_fwd", TORCH_BOX(&gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd", TORCH_BOX(&gelu_mlp_bwd));
}

} // namespace minisora
