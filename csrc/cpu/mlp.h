// An MLP: a Linear, an activation, a Linear. Torch computes the matrix products, one chunk of tokens at a time; an op
// adds what lies between them.
#pragma once

#include "gelu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <functional>
#include <numeric>

namespace minisora {

// ---- activations: the value, and with it the slope

// From -u: q = exp(-u), and s = sigmoid(2u) = 1 / (1 + q^2). exp_u20 may saturate below inf; q^2 does not, so h * s is
// nan for h = -inf, as in torch.
struct Sigmoid {
  Vec q, s;

  explicit Sigmoid(Vec minus_u) : q(minus_u.exp_u20()), s(Vec(1.0f) / at::vec::fmadd(q, q, Vec(1.0f))) {}

  // 1 - s, which loses digits where s is near 1; q^2 s does not. In this order, with a finite q, it is 0 where s is 0.
  Vec complement() const {
    const Vec finite = at::vec::clamp_max(q, Vec(1e30f));
    return finite * s * finite;
  }
};

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

// gelu(h) = h * s with u = sqrt(2 / pi) * (h + 0.044715 h^3), because (1 + tanh(u)) / 2 = s; and
// gelu'(h) = s + h * s * (1 - s) * 2u'.
struct TanhGelu {
  static Vec value(Vec h) { return h * sigmoid(h, h * h).s; }

  static std::pair<Vec, Vec> value_and_slope(Vec h) {
    const Vec squared = h * h;
    const Sigmoid at = sigmoid(h, squared);
    const Vec hs = h * at.s;
    const Vec slope = at::vec::fmadd(squared, Vec(6.0f * kSqrt2OverPi * kCubic), Vec(2.0f * kSqrt2OverPi));
    return {hs, at::vec::fmadd(hs * at.complement(), slope, at.s)};
  }

  static Sigmoid sigmoid(Vec h, Vec squared) {
    return Sigmoid(h * at::vec::fmadd(squared, Vec(-kSqrt2OverPi * kCubic), Vec(-kSqrt2OverPi)));
  }
};

struct ExactGelu {
  static Vec value(Vec h) { return h * distribution(h); }

  static std::pair<Vec, Vec> value_and_slope(Vec h) {
    const Vec phi = distribution(h);
    return {h * phi, at::vec::fmadd(h, density(h), phi)};
  }
};

// silu(h) = h * s with u = h / 2
struct Silu {
  static Vec value(Vec h) { return h * Sigmoid(h * Vec(-0.5f)).s; }

  static std::pair<Vec, Vec> value_and_slope(Vec h) {
    const Sigmoid at(h * Vec(-0.5f));
    const Vec hs = h * at.s;
    return {hs, at::vec::fmadd(hs, at.complement(), at.s)};
  }
};

// ---- matrices

// Tokens per chunk and thread. They bound the memory that lies between the two products. Torch lays a weight out anew
// in every product: with tiles, a bfloat16 product of 128 rows takes up to twice the time per row.
constexpr int64_t kRowsPerThread = 2048;
constexpr int64_t kRows = 32; // of one task; db1 is a sum over this many tokens, then over those sums in order

inline int64_t chunk_of(int64_t tokens) {
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
  // A tensor of these files' own, which no gradient is recorded for.
  explicit Matrix(Tensor own, std::nullptr_t) : tensor(own) {}
  // From a tensor, which may be transposed.
  explicit Matrix(const Tensor& of)
      : Matrix(of, of.const_data_ptr(), of.size(0), of.size(1), of.stride(0), of.stride(1)) {}

  static Matrix transposed(const Tensor& of) {
    return Matrix(of, of.const_data_ptr(), of.size(1), of.size(0), of.stride(1), of.stride(0));
  }
};

inline void product(const Matrix& out, const Matrix& left, const Matrix& right) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.tensor.get(), left.tensor.get(), right.tensor.get()));
}

// out = added + left @ right; `added` may be `out`.
inline void product(const Matrix& out, const Tensor& added, const Matrix& left, const Matrix& right) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.tensor.get(), added.get(), left.tensor.get(), right.tensor.get(), 1.0, 1.0));
}

inline void product(const Matrix& out, const std::optional<Tensor>& bias, const Matrix& left, const Matrix& right) {
  bias ? product(out, *bias, left, right) : product(out, left, right);
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

inline void check_weight(const Tensor& w, const char* name, const Tensor& like, int64_t rows, int64_t columns) {
  check_dtype(w, name);
  check_shape(w, name, {rows, columns});
  STD_TORCH_CHECK(w.scalar_type() == like.scalar_type(), name, " must have the tokens' dtype");
}

inline void check_bias(const std::optional<Tensor>& b, const char* name, const Tensor& like, int64_t size) {
  if (!b) return;
  check_dtype(*b, name);
  check_shape(*b, name, {size});
  STD_TORCH_CHECK(b->scalar_type() == like.scalar_type(), name, " must have the tokens' dtype");
}

// db1: the sums of dh over the tokens, in fp32.
struct BiasSums {
  int64_t columns;
  std::vector<float> partial, total; // one partial sum per task of a chunk

  BiasSums(int64_t chunk, int64_t columns, bool asked)
      : columns(columns),
        partial(asked ? (chunk + kRows - 1) / kRows * columns : 0),
        total(asked ? columns : 0, 0.0f) {}

  // The sums of a task, at zero; null if they are not asked for.
  float* begin(int64_t task) {
    if (total.empty()) return nullptr;
    return std::fill_n(partial.data() + task * columns, columns, 0.0f) - columns;
  }

  void end_chunk(int64_t rows) {
    for (int64_t task = 0; !total.empty() && task * kRows < rows; ++task) {
      for_columns(columns, [&](int64_t column, auto count) MINISORA_INLINE {
        const Vec more = load(partial.data() + task * columns + column, count);
        store(total.data() + column, load(total.data() + column, count) + more, count);
      });
    }
  }
};

// ---- the two passes

// What lies before the activation: h = x w1^T + b1. With w3 a row of h has two halves, and w3 makes the second.
struct Before {
  Tensor w1;
  std::optional<Tensor> b1, w3, b3;
};

// A row of h is kParts times as wide as one of a. Between the products an op's step computes a row:
//   forward(h, a, hidden)
//   backward(h, a, dh, sums, hidden)
// The backward makes a again, and dh, over da, which lies where the row of dh begins; it adds dh to the sums. What is
// not asked for is null. with_step(f) calls f(step).

// y, and h if it is kept.
template <int64_t kParts, class F>
std::tuple<Tensor, Tensor> mlp_fwd(
    const Tensor& x, const Before& before, const Tensor& w2, const std::optional<Tensor>& b2, bool keep, F with_step) {
  check_dtype(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1, "x must be [..., D]");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const Tensor& w1 = before.w1;
  STD_TORCH_CHECK(w1.dim() == 2 && w2.dim() == 2, "w1 and w2 must be matrices");
  std::vector<int64_t> shape(x.dim());
  for (int64_t dim = 0; dim < x.dim(); ++dim) shape[dim] = x.size(dim);
  const int64_t width = shape.back(), hidden = w1.size(0) / (before.w3 ? 1 : kParts), out_width = w2.size(0);
  const int64_t columns = kParts * hidden, made = before.w3 ? hidden : columns; // what w1 makes
  shape.back() = out_width;
  const int64_t tokens = std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies<>());
  check_weight(w1, "w1", x, made, width);
  check_bias(before.b1, "b1", x, made);
  if (before.w3) check_weight(*before.w3, "w3", x, columns - made, width);
  check_bias(before.b3, "b3", x, columns - made);
  check_weight(w2, "w2", x, out_width, hidden);
  check_bias(b2, "b2", x, out_width);
  const int64_t chunk = chunk_of(tokens);
  Tensor y = empty_like_shape(x, shape, x.scalar_type());
  Tensor h = empty_like_shape(x, {keep ? tokens : 0, keep ? columns : 0}, x.scalar_type());
  Tensor a = empty_like_shape(x, {chunk, hidden}, x.scalar_type());
  // h of a chunk, where it is not kept: a is made in its place if it has the same shape.
  Tensor own = keep ? h : kParts == 1 ? a : empty_like_shape(x, {chunk, columns}, x.scalar_type());
  const Matrix up = Matrix::transposed(w1), down = Matrix::transposed(w2);
  with_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* out = static_cast<T*>(y.mutable_data_ptr());
    T* activation = static_cast<T*>(a.mutable_data_ptr());
    for (int64_t row = 0; row < tokens; row += chunk) {
      const int64_t rows = std::min(chunk, tokens - row);
      const Matrix chunk_of_x = rows_of(x, in, row, rows, width);
      T* kept = static_cast<T*>(own.mutable_data_ptr()) + (keep ? row * columns : 0);
      if (before.w3) {
        product(Matrix(x, kept, rows, hidden, columns, 1), before.b1, chunk_of_x, up);
        product(
            Matrix(x, kept + hidden, rows, hidden, columns, 1), before.b3, chunk_of_x, Matrix::transposed(*before.w3));
      } else {
        product(rows_of_own(own, kept, 0, rows, columns), before.b1, chunk_of_x, up);
      }
      with_step([&](auto step) {
        for_rows(rows, [&](int64_t begin, int64_t end, int64_t) {
          for (int64_t r = begin; r < end; ++r) step.forward(kept + r * columns, activation + r * hidden, hidden);
        });
      });
      product(rows_of(y, out, row, rows, out_width), b2, rows_of_own(a, activation, 0, rows, hidden), down);
    }
  });
  return {y, h};
}

// dx, a, dh and db1, each if it is asked for.
template <int64_t kParts, class F>
std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_bwd(
    const Tensor& dy, const Tensor& h, const std::optional<Tensor>& w1, const std::optional<Tensor>& w3,
    const std::optional<Tensor>& w2, bool need_a, bool need_dh, bool need_b1, F with_step) {
  check_dtype(h, "h");
  STD_TORCH_CHECK(h.dim() == 2 && h.size(1) % kParts == 0, "h must be [tokens, ", kParts, " * hidden]");
  STD_TORCH_CHECK(h.is_contiguous(), "h must be contiguous");
  STD_TORCH_CHECK(dy.dim() == 2, "dy must be [tokens, D_out]");
  STD_TORCH_CHECK((!w1 || w1->dim() == 2) && (!w2 || w2->dim() == 2), "w1 and w2 must be matrices");
  STD_TORCH_CHECK(w2 || (!w1 && !need_dh && !need_b1), "dx, dh and db1 need w2");
  STD_TORCH_CHECK(w1 || !w3, "w3 needs w1");
  const int64_t tokens = h.size(0), columns = h.size(1), hidden = columns / kParts, width = w1 ? w1->size(1) : 0;
  const int64_t out_width = dy.size(1), made = w3 ? hidden : columns; // what w1 makes
  check_dense(dy, "dy", {tokens, out_width});
  STD_TORCH_CHECK(dy.scalar_type() == h.scalar_type(), "dy must have h's dtype");
  if (w1) check_weight(*w1, "w1", h, made, width);
  if (w3) check_weight(*w3, "w3", h, columns - made, width);
  if (w2) check_weight(*w2, "w2", h, out_width, hidden);
  const ScalarType dtype = h.scalar_type();
  const int64_t chunk = chunk_of(tokens);
  const auto asked = [&](bool need) { return need ? std::optional(dtype) : std::nullopt; };
  Tensor dx = empty_if_asked(h, {tokens, width}, asked(w1.has_value()));
  Tensor a = empty_if_asked(h, {tokens, hidden}, asked(need_a));
  Tensor dh = empty_if_asked(h, {tokens, columns}, asked(need_dh));
  Tensor db1 = empty_if_asked(h, {columns}, asked(need_b1));
  // da, then dh: of all tokens if dh is asked for, else of a chunk.
  Tensor scratch = need_dh || !w2 ? dh : empty_like_shape(h, {chunk, columns}, dtype);
  BiasSums sums(chunk, columns, need_b1);
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(h.const_data_ptr());
    for (int64_t row = 0; row < tokens; row += chunk) {
      const int64_t rows = std::min(chunk, tokens - row);
      T* activation = need_a ? static_cast<T*>(a.mutable_data_ptr()) + row * hidden : nullptr;
      T* out = w2 ? static_cast<T*>(scratch.mutable_data_ptr()) + (need_dh ? row * columns : 0) : nullptr;
      if (w2) {
        const T* grad = static_cast<const T*>(dy.const_data_ptr());
        product(Matrix(h, out, rows, hidden, columns, 1), rows_of(h, grad, row, rows, out_width), Matrix(*w2));
      }
      with_step([&](auto step) {
        for_rows(rows, [&](int64_t first, int64_t last, int64_t task) {
          float* total = sums.begin(task);
          for (int64_t r = first; r < last; ++r) {
            step.backward(
                in + (row + r) * columns, activation ? activation + r * hidden : nullptr,
                out ? out + r * columns : nullptr, total, hidden);
          }
        });
      });
      sums.end_chunk(rows);
      if (w1) {
        const Matrix back = rows_of(h, static_cast<T*>(dx.mutable_data_ptr()), row, rows, width);
        product(back, Matrix(h, out, rows, made, columns, 1), Matrix(*w1));
        if (w3) product(back, back.tensor, Matrix(h, out + hidden, rows, hidden, columns, 1), Matrix(*w3));
      }
    }
    T* bias = static_cast<T*>(db1.mutable_data_ptr());
    if (!need_b1) return;
    for_columns(columns, [&](int64_t i, auto count) { store(bias + i, load(sums.total.data() + i, count), count); });
  });
  return {dx, a, dh, db1};
}

} // namespace minisora
