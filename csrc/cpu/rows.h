// Tokens [B, N, D] and the rows [B, R, D] that modulate them: reads rows, normalises tokens, and sums over the tokens
// of a row. The order of a sum depends on the shape alone, so gradients have the same bits for any number of threads.
#pragma once

#include "common.h"

#include <cmath>
#include <memory>
#include <numeric>

namespace minisora {

inline void check_rows(int64_t count, const char* name, int64_t tokens) {
  STD_TORCH_CHECK(
      count > 0 && tokens % count == 0, name, " has ", count, " rows, which do not divide ", tokens, " tokens");
}

// Norms by their number in a schema.
enum Norm : int64_t { kNone = 0, kRms = 1, kLayer = 2 };

// Which tokens of a sample have which row: N / R neighbours, or those that an index [N] or [B, N] names. Places count
// the tokens of a sample in the order of their rows; the tokens of a row keep their order.
class Division {
 public:
  const int64_t rows;
  const bool by_index;

  explicit Division(int64_t tokens) : Division(std::nullopt, 0, tokens, 1) {}

  Division(const std::optional<Tensor>& index, int64_t batch, int64_t tokens, int64_t rows)
      : rows(rows), by_index(index.has_value()), tokens_(tokens), per_row_(tokens / rows) {
    if (!index) return;
    shared_ = index->dim() == 1;
    STD_TORCH_CHECK(
        (shared_ || (index->dim() == 2 && index->size(0) == batch)) && index->size(index->dim() - 1) == tokens,
        "index must be [N] or [B, N]");
    STD_TORCH_CHECK(
        index->scalar_type() == ScalarType::Long && index->is_contiguous(), "index must be contiguous int64");
    const int64_t samples = shared_ ? 1 : batch;
    index_ = static_cast<const int64_t*>(index->const_data_ptr());
    first_.resize(samples * (rows + 1));
    order_.resize(samples * tokens);
    std::vector<int64_t> next(rows);
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t* of_token = index_ + b * tokens;
      int64_t* first = first_.data() + b * (rows + 1);
      for (int64_t n = 0; n < tokens; ++n) {
        const int64_t row = of_token[n];
        STD_TORCH_CHECK(row >= 0 && row < rows, "index names row ", row, " of ", rows);
        ++first[row + 1];
      }
      std::partial_sum(first, first + rows + 1, first);
      std::copy_n(first, rows, next.begin());
      for (int64_t n = 0; n < tokens; ++n) order_[b * tokens + next[of_token[n]]++] = n;
    }
  }

  int64_t row(int64_t b, int64_t place) const {
    return by_index ? index_[sample(b) * tokens_ + order_[sample(b) * tokens_ + place]] : place / per_row_;
  }

  // The first place of a row; that of row R is N.
  int64_t begin(int64_t b, int64_t row) const {
    return by_index ? first_[sample(b) * (rows + 1) + row] : row * per_row_;
  }

  // The token of a place, counted over all samples.
  int64_t token(int64_t b, int64_t place) const {
    return b * tokens_ + (by_index ? order_[sample(b) * tokens_ + place] : place);
  }

 private:
  int64_t sample(int64_t b) const { return shared_ ? 0 : b; }

  int64_t tokens_, per_row_;
  bool shared_ = false;
  const int64_t* index_ = nullptr;
  std::vector<int64_t> first_, order_;
};

// A modulation parameter [B, R, D] with any strides over B and R. Without one its rows are `absent`.
struct Rows {
  float absent;
  const char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t count = 1, element = 4, batch_stride = 0, row_stride = 0;

  // `tokens` is what the rows divide: 0 with an index.
  Rows(const std::optional<Tensor>& given, const char* name, float absent, int64_t batch, int64_t tokens, int64_t width)
      : absent(absent) {
    if (!given) return;
    const Tensor& parameter = *given;
    check_dtype(parameter, name);
    STD_TORCH_CHECK(parameter.dim() == 3, name, " must be [B, R, D]");
    data = static_cast<const char*>(parameter.const_data_ptr());
    dtype = parameter.scalar_type();
    count = parameter.size(1);
    check_shape(parameter, name, {batch, count, width});
    check_rows(count, name, tokens);
    STD_TORCH_CHECK(width <= 1 || parameter.stride(2) == 1, name, " must have stride 1 over D");
    element = dtype == ScalarType::Float ? 4 : 2;
    batch_stride = parameter.stride(0);
    row_stride = parameter.stride(1);
  }

  // out = offset + the row of the tokens in row `row` of a division, in fp32
  void read(int64_t b, int64_t row, const Division& division, float offset, float* out, int64_t width) const {
    if (data == nullptr) {
      std::fill_n(out, width, absent + offset);
      return;
    }
    const char* from = data + element * (b * batch_stride + row * count / division.rows * row_stride);
    with_type(dtype, [&](auto tag) {
      const auto* p = reinterpret_cast<const decltype(tag)*>(from);
      for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE {
        store(out + i, load(p + i, count) + Vec(offset), count);
      });
    });
  }
};

// What a branch has in place of a bias: it leaves every number as it is, -0 too.
constexpr float kNoBias = -0.0f;

// An affine parameter [D] in fp32, or `absent` without one.
inline std::vector<float> affine(
    const std::optional<Tensor>& parameter, const char* name, float absent, int64_t width) {
  std::vector<float> out(width, absent);
  if (parameter) {
    check_dense(*parameter, name, {width});
    with_type(parameter->scalar_type(), [&](auto tag) {
      const auto* p = static_cast<const decltype(tag)*>(parameter->const_data_ptr());
      for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(p[i]);
    });
  }
  return out;
}

// ---- a group of tokens of one row

// Kernels take G tokens at a time. Their sums over the columns do not wait for each other, and they read the rows of
// the modulation and of its gradients once for all G.
constexpr int kGroup = 4;

template <int G>
using Group = std::integral_constant<int, G>;

// Loads from token r of a group, and prefetches the same place of the next group: the hardware follows one stream, not
// G.
template <int G, class T, class N>
MINISORA_INLINE inline Vec load_ahead(const T* tokens, int r, int64_t i, int64_t width, N count) {
  __builtin_prefetch(tokens + (r + G) * width + i);
  return load(tokens + r * width + i, count);
}

// The part of a Sum to which step u of for_columns adds. G tokens have G sums, so each needs fewer parts.
template <int G>
constexpr int chain(int u) {
  return u % (4 / G);
}

// f(r) for r in 0..G
template <int G, class F>
MINISORA_INLINE inline void for_group(F&& f) {
#pragma GCC unroll 4
  for (int r = 0; r < G; ++r) f(r);
}

// Means and 1 / sqrt(var + eps) of G tokens. They are in L1, so two passes replace Welford's method.
template <int G, class T>
inline void statistics(
    const T* tokens, const Sum (&sums)[G], int64_t width, bool rms, float eps, float* mean, float* rstd) {
  Vec center[G];
  Sum squares[G];
  for_group<G>([&](int r) MINISORA_INLINE {
    mean[r] = rms ? 0.0f : sums[r].total() / static_cast<float>(width);
    center[r] = Vec(mean[r]);
  });
  for_columns(width, [&](int64_t i, auto count, auto u) MINISORA_INLINE {
    for_group<G>([&](int r) MINISORA_INLINE {
      const Vec d = first_lanes(load(tokens + r * width + i, count) - center[r], count);
      Vec& sum = squares[r].part[chain<G>(u)];
      sum = at::vec::fmadd(d, d, sum);
    });
  });
  for_group<G>(
      [&](int r) MINISORA_INLINE { rstd[r] = 1.0f / std::sqrt(squares[r].total() / static_cast<float>(width) + eps); });
}

// ---- all tokens

constexpr int64_t kChunk = 64; // tokens per task; more would leave threads idle, fewer would enlarge the partial sums

inline int64_t chunk_count(int64_t batch, int64_t tokens) { return batch * ((tokens + kChunk - 1) / kChunk); }

// The finest division of the tokens into rows: every parameter is constant within each. A gradient that is not asked
// for has no rows.
inline int64_t common_rows(std::initializer_list<int64_t> counts) {
  int64_t rows = 1;
  for (const int64_t count : counts) rows = std::lcm(rows, std::max<int64_t>(count, 1));
  return rows;
}

// f(token, group) for the places [n, stop) of one row, in groups of neighbours. Tokens count over all samples.
template <class F>
inline void for_groups(const Division& division, int64_t b, int64_t n, int64_t stop, F&& f) {
  while (n < stop) {
    const int64_t token = division.token(b, n);
    if (n + kGroup <= stop && division.token(b, n + kGroup - 1) == token + kGroup - 1) {
      f(token, Group<kGroup>{});
      n += kGroup;
    } else {
      f(token, Group<1>{});
      ++n;
    }
  }
}

// Calls read(scratch, b, row) when a row starts that is new to the thread, then f(scratch, token, group) for its
// tokens. The shape and the index alone determine the groups, because a group's sums have an order of their own.
template <class Scratch, class Read, class F>
void for_tokens(int64_t batch, int64_t tokens, const Division& division, Scratch make_scratch, Read read, F f) {
  if (batch == 0 || tokens == 0) return;
  constexpr int64_t task_size = 4 * kGroup;
  const int64_t all = batch * tokens;
  torch::stable::parallel_for(0, (all + task_size - 1) / task_size, 1, [&](int64_t begin, int64_t end) {
    auto scratch = make_scratch();
    int64_t row = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t last = std::min(all, (task + 1) * task_size);
      for (int64_t i = task * task_size; i < last;) {
        const int64_t b = i / tokens, n = i % tokens, here = division.row(b, n);
        if (b * division.rows + here != row) {
          row = b * division.rows + here;
          read(scratch, b, here);
        }
        const int64_t count = std::min(last - i, division.begin(b, here + 1) - n);
        for_groups(division, b, n, n + count, [&](int64_t token, auto group) { f(scratch, token, group); });
        i += count;
      }
    }
    _mm_sfence();
  });
}

constexpr int64_t kBlock = 256; // columns per task of a second stage

// out[0..columns) = the sum of terms(0), terms(1), ... in that order, in double. A clip of 100 000 tokens has thousands
// of terms; one fp32 accumulator would lose more digits than the sums within the chunks do.
template <class Terms>
void add_up(int64_t count, int64_t columns, float* out, Terms terms) {
  double total[kBlock] = {};
  for (int64_t j = 0; j < count; ++j) {
    const float* term = terms(j);
    for (int64_t i = 0; i < columns; ++i) total[i] += term[i];
  }
  for (int64_t i = 0; i < columns; ++i) out[i] = static_cast<float>(total[i]);
}

constexpr int kSums = 4; // the most vectors that a kernel sums

// Sums `kinds` vectors of width D over the tokens of every row. A task takes one chunk of places and splits it into
// runs of one row. It calls
//   read(scratch, b, row)                    before the first token of a run
//   add(scratch, token, group, sums)         for its tokens, counted over all samples; adds to sums[0..kinds)
//   end_run(scratch, chunk, sums)            after the last
// Then finish(b, row, first, last, sums) gets the complete sums of a row for columns [first, last). A row within one
// chunk is finished there. The others leave partial sums, at most two per chunk, which a second stage adds in order.
template <class Scratch, class Read, class Add, class EndRun, class Finish>
void sum_over_rows(
    int kinds, int64_t batch, int64_t tokens, const Division& division, int64_t width, Scratch make_scratch, Read read,
    Add add, EndRun end_run, Finish finish) {
  if (batch == 0 || tokens == 0) return;
  const int64_t rows = division.rows;
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  const bool spanning = kinds > 0 && (division.by_index || kChunk % (tokens / rows) != 0);
  // Not a std::vector: each number is written before it is read, and zeros would cost as much as the sums.
  const std::unique_ptr<float[]> partial(spanning ? new float[batch * chunks * 2 * kinds * width] : nullptr);
  const auto slot = [&](int64_t b, int64_t chunk, bool began_here) {
    return partial.get() + ((b * chunks + chunk) * 2 + began_here) * kinds * width;
  };
  const auto parts = [&](float* base, float** sums) {
    for (int k = 0; k < kinds; ++k) sums[k] = base + k * width;
  };

  torch::stable::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
    auto scratch = make_scratch();
    std::vector<float> accumulator(kinds * width);
    float* sums[kSums] = {};
    parts(accumulator.data(), sums);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, chunk = task % chunks;
      const int64_t last = std::min(tokens, (chunk + 1) * kChunk);
      for (int64_t n = chunk * kChunk; n < last;) {
        const int64_t row = division.row(b, n), end = division.begin(b, row + 1), stop = std::min(last, end);
        std::fill(accumulator.begin(), accumulator.end(), 0.0f);
        read(scratch, b, row);
        for_groups(division, b, n, stop, [&](int64_t token, auto group) { add(scratch, token, group, sums); });
        const int64_t start = n;
        n = stop;
        if (kinds == 0) continue;
        end_run(scratch, task, sums);
        const bool began_here = start == division.begin(b, row);
        if (began_here && stop == end) {
          finish(b, row, 0, width, sums);
        } else {
          std::copy(accumulator.begin(), accumulator.end(), slot(b, chunk, began_here));
        }
      }
    }
    _mm_sfence();
  });
  if (!spanning) return;

  const int64_t blocks = (width + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, batch * rows * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> accumulator(kinds * width);
    float* sums[kSums] = {};
    parts(accumulator.data(), sums);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (rows * blocks), row = task / blocks % rows, block = task % blocks;
      const int64_t begin = division.begin(b, row), end = division.begin(b, row + 1);
      const int64_t first_chunk = begin / kChunk, last_chunk = (end - 1) / kChunk;
      if (begin == end || first_chunk == last_chunk) continue;
      const int64_t first = block * kBlock, last = std::min(width, first + kBlock);
      for (int k = 0; k < kinds; ++k) {
        add_up(last_chunk - first_chunk + 1, last - first, sums[k] + first, [&](int64_t i) {
          const int64_t chunk = first_chunk + i;
          return slot(b, chunk, begin >= chunk * kChunk) + k * width + first;
        });
      }
      finish(b, row, first, last, sums);
    }
  });
}

// The gradient of a parameter with R rows, from sums over a finer (or equal) division; nothing if it is not asked for.
class RowGradient {
 public:
  RowGradient(
      const char* name, const std::optional<ScalarType>& dtype, int64_t rows, const Division& division,
      const Tensor& tokens)
      : asked_(dtype.has_value()),
        batch_(tokens.size(0)),
        rows_(asked_ ? rows : division.rows),
        fine_(division.rows),
        width_(tokens.size(2)),
        gradient_(empty_if_asked(tokens, {batch_, rows_, width_}, dtype)),
        sums_(rows_ == fine_ ? 0 : batch_ * fine_ * width_) {
    if (asked_) check_rows(rows, name, division.by_index ? 0 : tokens.size(1));
    if (tokens.size(1) == 0 || division.by_index) torch::stable::zero_(gradient_); // of rows that have no token
  }

  // The complete sum of fine row `row`, columns [first, last).
  void set(int64_t b, int64_t row, int64_t first, int64_t last, const float* sum) {
    if (!asked_) return;
    if (rows_ == fine_) {
      write(b, row, first, last, sum);
    } else {
      std::copy(sum + first, sum + last, sums_.data() + (b * fine_ + row) * width_ + first);
    }
  }

  Tensor result() {
    if (rows_ != fine_) {
      const int64_t ratio = fine_ / rows_, blocks = (width_ + kBlock - 1) / kBlock;
      torch::stable::parallel_for(0, batch_ * rows_ * blocks, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> total(width_);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / blocks, first = task % blocks * kBlock, last = std::min(width_, first + kBlock);
          const float* in = sums_.data() + row * ratio * width_ + first;
          add_up(ratio, last - first, total.data() + first, [&](int64_t j) { return in + j * width_; });
          write(row / rows_, row % rows_, first, last, total.data());
        }
      });
    }
    return gradient_;
  }

 private:
  void write(int64_t b, int64_t row, int64_t first, int64_t last, const float* sum) {
    with_type(gradient_.scalar_type(), [&](auto tag) {
      auto* out = static_cast<decltype(tag)*>(gradient_.mutable_data_ptr()) + (b * rows_ + row) * width_;
      for_columns(last - first, [&](int64_t i, auto count) MINISORA_INLINE {
        store(out + first + i, load(sum + first + i, count), count);
      });
    });
  }

  bool asked_;
  int64_t batch_, rows_, fine_, width_;
  Tensor gradient_;
  std::vector<float> sums_;
};

// The gradient of a parameter [D] of all tokens: one partial sum per chunk, added in the order of the chunks; nothing
// if it is not asked for.
class AffineGradient {
 public:
  AffineGradient(const std::optional<ScalarType>& dtype, const Tensor& x)
      : asked_(dtype.has_value()),
        width_(x.size(2)),
        partial_(asked_ ? chunk_count(x.size(0), x.size(1)) * width_ : 0),
        gradient_(empty_if_asked(x, {width_}, dtype)) {}

  // partial sum of the chunk += factor * sum of the run
  void add(int64_t task, const float* factor, const float* sum) {
    if (!asked_) return;
    float* out = partial_.data() + task * width_;
    for_columns(width_, [&](int64_t i, auto count) MINISORA_INLINE {
      store(out + i, at::vec::fmadd(load(factor + i, count), load(sum + i, count), load(out + i, count)), count);
    });
  }

  Tensor result() {
    if (asked_) {
      std::vector<float> total(width_);
      const int64_t tasks = static_cast<int64_t>(partial_.size()) / std::max<int64_t>(width_, 1);
      for (int64_t first = 0; first < width_; first += kBlock) {
        const float* in = partial_.data() + first;
        add_up(
            tasks, std::min(kBlock, width_ - first), total.data() + first, [&](int64_t j) { return in + j * width_; });
      }
      with_type(gradient_.scalar_type(), [&](auto tag) {
        auto* out = static_cast<decltype(tag)*>(gradient_.mutable_data_ptr());
        for_columns(width_, [&](int64_t i, auto count) MINISORA_INLINE {
          store(out + i, load(total.data() + i, count), count);
        });
      });
    }
    return gradient_;
  }

 private:
  bool asked_;
  int64_t width_;
  std::vector<float> partial_;
  Tensor gradient_;
};

} // namespace minisora
