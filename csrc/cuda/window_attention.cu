// window_attention for windows of at most 64 tokens, in bfloat16 and float16: equation and derivation in
// minisora_kernels/ops/window_attention.py.
//
// A block takes a tile of 16, 32 or 64 places of one head, a warp for each 16 of them. The tile holds one window, or
// 16 / L windows of L tokens where L is at most 8. Its rows of q, k, v, and dout in the backward, come to shared memory
// once, where two tiles fit while the block still works on the one before; from there ldmatrix reads them for the
// products. A warp keeps the scores of its 16 rows in registers, in the form that mma leaves them in: thread t of quad
// g has columns 8 j + 2 t and 8 j + 2 t + 1 of rows g and g + 8. Norm and rotation work on rows in the same form.
//
// The sizes chosen below are not measured. tests/packaging/test_cuda_build.py compiles this file, and runs it on a CPU
// with every CUDA thread emulated.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../check.h"
#include "tensors.h"
#include "warp.h"

namespace minisora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLongest = 64; // tokens of a window
constexpr int kMostShared = 99 << 10; // bytes of a block, on GPUs of sm_86, sm_89 and sm_120
constexpr int kPrefetched = 20 << 10; // bytes of a tile, at most, of which a block keeps two
constexpr int kPrograms = 32768; // runs of summed tiles, times the rows of a tile: more runs are more partial sums
template <int D>
constexpr int kWarps = D <= 72 ? 10 : 8; // of a multiprocessor, for which the registers must do
constexpr int kSumLanes = 32;
constexpr float kLog2E = 1.4426950408889634f;

// ---- what a call has

// An array of floats of a type that is looked at when it is read: of what is small beside the tokens.
struct Input {
  const void* data;
  ScalarType dtype;

  __device__ float operator[](int64_t at) const {
    if (dtype == ScalarType::Float) return static_cast<const float*>(data)[at];
    if (dtype == ScalarType::BFloat16) return static_cast<const BFloat16*>(data)[at];
    return static_cast<const Half*>(data)[at];
  }
};

struct Output {
  void* data;
  ScalarType dtype;

  __device__ void write(int64_t at, float value) const {
    if (dtype == ScalarType::Float) {
      static_cast<float*>(data)[at] = value;
    } else if (dtype == ScalarType::BFloat16) {
      static_cast<BFloat16*>(data)[at] = static_cast<BFloat16>(value);
    } else {
      static_cast<Half*>(data)[at] = static_cast<Half>(value);
    }
  }
};

// The weight of a norm, [head_dim] or, with a step from head to head, [heads, head_dim]; no data if it is not given.
struct Weight {
  Input values;
  int step;
};

// The windows of a grid [t, h, w], all of the same size but for empty places at the far edge; `each` of them make a
// tile.
struct Windows {
  int t, h, w, wt, wh, ww, length, each;
  int count, tiles; // of all samples

  // The row, in [B * N], of a token of a tile; -1 for an empty place.
  __device__ int row(int tile, int place) const {
    const int slot = place / length;
    const int window = tile * each + slot;
    if (slot >= each || window >= count) return -1;
    place -= slot * length;
    const int across = (w + ww - 1) / ww, down = (h + wh - 1) / wh, deep = (t + wt - 1) / wt;
    const int sample = window / (across * down * deep), index = window % (across * down * deep);
    const int x = index % across * ww + place % ww;
    const int y = index / across % down * wh + place / ww % wh;
    const int z = index / across / down * wt + place / ww / wh;
    return x < w && y < h && z < t ? ((sample * t + z) * h + y) * w + x : -1;
  }
};

struct Call {
  Windows windows;
  int heads;
  const void* qkv;
  int norm; // 0, 1: rms, 2: layer
  Weight q_weight, k_weight;
  const float *cos, *sin; // [N, head_dim / 2], or none
  bool interleaved;
  Input bias; // [heads, L, L], or none
  float scale, eps;

  __device__ int tokens() const { return windows.t * windows.h * windows.w; }
  __device__ bool prepares() const { return norm != 0 || cos != nullptr; }
};

// ---- tiles in shared memory

// Rows of W numbers. The chunks of 8 of a row change places with each other, so that those of the eight rows which an
// ldmatrix reads at once are in different banks.
template <int W>
struct Rows {
  Shared begin;

  static constexpr int kMask = W % 64 == 0 ? 7 : W % 32 == 0 ? 3 : W % 16 == 0 ? 1 : 0;
  static constexpr int kShift = W % 64 == 0 ? 0 : W % 32 == 0 ? 1 : 2;

  __device__ Shared at(int row, int column) const {
    return begin + 2 * (row * W + (column ^ ((row >> kShift & kMask) << 3)));
  }
};

// Bytes of shared memory of a block, in order: `stages` tiles of PARTS x TILE rows; their tokens; the weights of q and
// k in fp32, and in the backward the sums of their gradients; prepared q and k, where the rows as they were are needed
// after all products.
template <int D, int TILE, int PARTS>
struct Layout {
  static constexpr int kRows = 2 * TILE * D, kStage = PARTS * kRows, kStages = kStage <= kPrefetched ? 2 : 1;
  static constexpr int kTokens = kStages * kStage, kWeights = kTokens + 4 * kStages * TILE;
  static constexpr int kSums = kWeights + 8 * D, kPrepared = kSums + (PARTS == 4 ? 8 * D : 0);

  static constexpr int bytes(bool keeps_raw) { return kPrepared + (keeps_raw ? 2 * kRows : 0); }
  static_assert(bytes(PARTS == 4) <= kMostShared);

  __device__ static Rows<D> rows(int stage, int part) { return {shared_begin() + stage * kStage + part * kRows}; }
  __device__ static Rows<D> prepared(int part) { return {shared_begin() + kPrepared + part * kRows}; }
  __device__ static Shared token(int stage, int row) { return shared_begin() + kTokens + 4 * (stage * TILE + row); }
  __device__ static Shared weight(int part, int column) { return shared_begin() + kWeights + 4 * (part * D + column); }
  __device__ static Shared sum(int part, int column) { return shared_begin() + kSums + 4 * (part * D + column); }
};

// All threads of the block have come here, and see what the others have written to shared memory.
template <int TILE>
__device__ void wait_for_block() {
  if constexpr (TILE == 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Where this thread is.
struct Lane {
  int warp, quad, thread, first; // first: the first row of the warp

  __device__ Lane()
      : warp(threadIdx.x / kWarp), quad(threadIdx.x % kWarp / 4), thread(threadIdx.x % 4), first(16 * warp) {}

  // Of the warp's 16, the row of values [.][2 i] and [.][2 i + 1].
  __device__ int row(int i) const { return first + quad + 8 * i; }
};

// Starts to copy a tile, whose tokens it finds first.
template <int D, int TILE, int PARTS>
__device__ void fill(const Call& call, const void* dout, int tile, int head, int stage) {
  using Tile = Layout<D, TILE, PARTS>;
  const int place = thread_now();
  if (place < TILE) store_word(Tile::token(stage, place), static_cast<uint32_t>(call.windows.row(tile, place)));
  wait_for_block<TILE>();
  const int64_t step = static_cast<int64_t>(call.heads) * D;
  for (int chunk = place; chunk < TILE * D / 8; chunk += 2 * TILE) {
    const int row = chunk / (D / 8), column = chunk % (D / 8) * 8;
    const int token = static_cast<int>(load_word(Tile::token(stage, row)));
    const int64_t from = token < 0 ? 0 : token;
    const uint32_t bytes = token < 0 ? 0 : 16;
    const auto* qkv = static_cast<const uint16_t*>(call.qkv) + from * 3 * step + head * D + column;
    for (int part = 0; part < 3; ++part) copy_later(Tile::rows(stage, part).at(row, column), qkv + part * step, bytes);
    if constexpr (PARTS == 4) {
      const auto* gradient = static_cast<const uint16_t*>(dout) + from * step + head * D + column;
      copy_later(Tile::rows(stage, 3).at(row, column), gradient, bytes);
    }
  }
}

// The warp's rows go from shared to global memory, `step` numbers apart.
template <int D, int TILE, int PARTS>
__device__ void copy_out(const Lane& lane, int stage, Rows<D> rows, void* out, int64_t step) {
  for (int chunk = thread_now() % kWarp; chunk < 2 * D; chunk += kWarp) {
    const int row = lane.first + chunk / (D / 8), column = chunk % (D / 8) * 8;
    const int token = static_cast<int>(load_word(Layout<D, TILE, PARTS>::token(stage, row)));
    if (token < 0) continue;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + token * step + column) = load_words(rows.at(row, column));
  }
  __syncwarp(); // the rows may be overwritten
}

// ---- 16 rows of a warp, in registers

template <int D>
using Values = float[D / 8][4];

// The same as they are in shared memory: a word has two numbers of a row.
template <int D>
using Words = uint32_t[D / 8][2];

template <int D>
__device__ void read_words(const Lane& lane, Rows<D> rows, Words<D>& words) {
  const int row = lane.first + threadIdx.x % 16, odd = threadIdx.x % kWarp / 16;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t four[4];
    load_matrices<false>(rows.at(row, 16 * i + 8 * odd), four);
    for (int j = 0; j < 4; ++j) words[2 * i + j / 2][j % 2] = four[j];
  }
  if constexpr (D % 16 != 0) load_matrices<false>(rows.at(row, D - 8), words[D / 8 - 1]);
}

template <class T, int D>
__device__ void read_rows(const Lane& lane, Rows<D> rows, Values<D>& x) {
  Words<D> words;
  read_words<D>(lane, rows, words);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    for (int i = 0; i < 2; ++i) unpack<T>(words[j][i], x[j][2 * i], x[j][2 * i + 1]);
  }
}

template <int D>
__device__ void write_words(const Lane& lane, Rows<D> rows, const Words<D>& words) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    for (int i = 0; i < 2; ++i) store_word(rows.at(lane.row(i), 8 * j + 2 * lane.thread), words[j][i]);
  }
}

template <class T, int D>
__device__ void round_rows(const Values<D>& x, Words<D>& words) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    for (int i = 0; i < 2; ++i) words[j][i] = pack<T>(x[j][2 * i], x[j][2 * i + 1]);
  }
}

template <class T, int D>
__device__ void write_rows(const Lane& lane, Rows<D> rows, const Values<D>& x) {
  Words<D> words;
  round_rows<T, D>(x, words);
  write_words<D>(lane, rows, words);
}

// A number of each of the two rows of this thread.
struct Pair {
  float of[2];
};

// The sum over the four threads of a row; every thread gets it.
__device__ Pair row_sum(Pair x) {
  for (int distance = 1; distance < 4; distance *= 2) {
    for (float& value : x.of) value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return x;
}

template <int N>
__device__ Pair row_sum(const float (&x)[N][4], const float (&y)[N][4]) {
  Pair sum = {};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    for (int e = 0; e < 4; ++e) sum.of[e / 2] += x[j][e] * y[j][e];
  }
  return row_sum(sum);
}

template <int D>
__device__ Pair row_mean(const Values<D>& x) {
  Pair sum = {};
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    for (int e = 0; e < 4; ++e) sum.of[e / 2] += x[j][e];
  }
  sum = row_sum(sum);
  return {sum.of[0] / D, sum.of[1] / D};
}

template <int D>
__device__ void subtract(Values<D>& x, const Pair& of_row) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    for (int e = 0; e < 4; ++e) x[j][e] -= of_row.of[e / 2];
  }
}

template <int D>
__device__ void scale(Values<D>& x, const Pair& of_row) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    for (int e = 0; e < 4; ++e) x[j][e] *= of_row.of[e / 2];
  }
}

// The rows less their means, for layer norm; and 1 / their root mean square.
template <int D>
__device__ Pair centre(const Call& call, Values<D>& x) {
  if (call.norm == 2) subtract<D>(x, row_mean<D>(x));
  Pair result = row_sum(x, x);
  for (float& value : result.of) value = 1.0f / sqrtf(value / D + call.eps);
  return result;
}

// Times the weight of a norm, in shared memory from `weight` on.
template <int D>
__device__ void times_weight(const Lane& lane, Shared weight, Values<D>& x) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    const float2 pair = load_float2(weight + 4 * (8 * j + 2 * lane.thread));
    for (int i = 0; i < 2; ++i) {
      x[j][2 * i] *= pair.x;
      x[j][2 * i + 1] *= pair.y;
    }
  }
}

// The rotation of pairs of channels, by the angles of each row's token; backward by the opposite ones.
template <int D>
__device__ void turn(const Lane& lane, const Call& call, const int (&tokens)[2], bool back, Values<D>& x) {
  if (call.cos == nullptr) return;
  const float sign = back ? -1.0f : 1.0f;
  int64_t from[2]; // the angles of a row; those of an empty place are not seen
  for (int i = 0; i < 2; ++i) from[i] = static_cast<int64_t>(tokens[i] < 0 ? 0 : tokens[i] % call.tokens()) * (D / 2);
  const auto rotate = [&](int64_t at, float& a, float& b) {
    const float c = call.cos[at], s = sign * call.sin[at], first = a;
    a = first * c - b * s;
    b = first * s + b * c;
  };
  if (call.interleaved) { // neighbours
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      for (int i = 0; i < 2; ++i) rotate(from[i] + 4 * j + lane.thread, x[j][2 * i], x[j][2 * i + 1]);
    }
  } else if constexpr (D % 16 == 0) { // channels i and i + D / 2, both of this thread
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      for (int e = 0; e < 4; ++e) rotate(from[e / 2] + 8 * j + 2 * lane.thread + e % 2, x[j][e], x[j + D / 16][e]);
    }
  } else { // D / 2 is 4 more than a multiple of 8: the other of a pair is with the thread that differs in bit 1
    constexpr int half = D / 16;
    const bool low = lane.thread < 2;
    Values<D> others;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      for (int e = 0; e < 4; ++e) others[j][e] = __shfl_xor_sync(kAllLanes, x[j][e], 2);
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const bool first = j < half || (j == half && low);
      const int column = 8 * j + 2 * lane.thread - (first ? 0 : D / 2);
      for (int e = 0; e < 4; ++e) {
        const float of_low = others[j <= half ? j + half : j - half - 1][e];
        const float of_high = others[j < half ? j + half + 1 : j - half][e];
        const float other = low ? of_low : of_high;
        const int64_t at = from[e / 2] + column + e % 2;
        x[j][e] = x[j][e] * call.cos[at] + sign * (first ? -other : other) * call.sin[at];
      }
    }
  }
}

// rotate(norm(x) * weight) of the warp's rows, rounded once.
template <class T, int D>
__device__ void prepare(
    const Lane& lane, const Call& call, const int (&tokens)[2], bool weighted, Shared weight, Rows<D> from,
    Rows<D> to) {
  Values<D> x;
  read_rows<T, D>(lane, from, x);
  if (call.norm != 0) {
    scale<D>(x, centre<D>(call, x));
    if (weighted) times_weight<D>(lane, weight, x);
  }
  turn<D>(lane, call, tokens, false, x);
  __syncwarp(); // all have read
  write_rows<T, D>(lane, to, x);
}

// The weights of a head, if they are not those that shared memory has. A norm's gradient needs them too.
template <class Tile, int D>
__device__ void load_weights(const Call& call, int head, int& held) {
  const bool stays = call.q_weight.step == 0 && call.k_weight.step == 0;
  if (held == head || (stays && held >= 0)) return;
  held = head;
  for (int part = 0; part < 2; ++part) {
    const Weight& weight = part == 0 ? call.q_weight : call.k_weight;
    if (weight.values.data == nullptr) continue;
    for (int column = threadIdx.x; column < D; column += blockDim.x) {
      store_float(Tile::weight(part, column), weight.values[static_cast<int64_t>(head) * weight.step + column]);
    }
  }
}

// ---- products

// total = a b^T of the warp's rows of a and N rows of b.
template <class T, int D, int N>
__device__ void inner(const Lane& lane, Rows<D> a, Rows<D> b, float (&total)[N / 8][4]) {
  const int row = threadIdx.x % 16, odd = threadIdx.x % kWarp / 16;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    for (int e = 0; e < 4; ++e) total[n][e] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k + 16 <= D; k += 16) {
    uint32_t left[4], right[4];
    load_matrices<false>(a.at(lane.first + row, k + 8 * odd), left);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      load_matrices<false>(b.at(n + row, k + 8 * odd), right);
      multiply<T>(total[n / 8], left, right[0], right[2]);
      multiply<T>(total[n / 8 + 1], left, right[1], right[3]);
    }
  }
  if constexpr (D % 16 != 0) {
    uint32_t left[2], right[2];
    load_matrices<false>(a.at(lane.first + row, D - 8), left);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      load_matrices<false>(b.at(n + row, D - 8), right);
      multiply<T>(total[n / 8], left, right[0]);
      multiply<T>(total[n / 8 + 1], left, right[1]);
    }
  }
}

// total = a b, where fragment(k, a) gives columns k to k + 15 of the warp's rows of a, and b has K rows.
template <class T, int D, int K, class F>
__device__ void product(F fragment, Rows<D> b, Values<D>& total) {
  const int row = threadIdx.x % 16, odd = threadIdx.x % kWarp / 16;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    for (int e = 0; e < 4; ++e) total[j][e] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t left[4];
    fragment(k, left);
#pragma unroll
    for (int n = 0; n + 16 <= D; n += 16) {
      uint32_t right[4];
      load_matrices<true>(b.at(k + row, n + 8 * odd), right);
      multiply<T>(total[n / 8], left, right[0], right[1]);
      multiply<T>(total[n / 8 + 1], left, right[2], right[3]);
    }
    if constexpr (D % 16 != 0) {
      uint32_t right[2];
      load_matrices<true>(b.at(k + row, D - 8), right);
      multiply<T>(total[D / 8 - 1], left, right[0], right[1]);
    }
  }
}

// ---- scores

// Which columns a row sees: those of its window.
template <int TILE>
struct Seen {
  int begin[2], end[2]; // of this thread's two rows

  __device__ Seen(const Lane& lane, const Windows& windows) {
    for (int i = 0; i < 2; ++i) {
      const int slot = TILE == 16 ? lane.row(i) / windows.length : 0; // larger tiles hold one window
      begin[i] = slot * windows.length;
      const bool inside = TILE == 16 ? slot < windows.each : lane.row(i) < windows.length;
      end[i] = inside ? begin[i] + windows.length : begin[i]; // places that no window has see nothing
    }
  }

  __device__ bool operator()(int i, int column) const { return column >= begin[i] && column < end[i]; }
};

// scale * s + bias where a row sees a token, else -infinity.
template <int TILE, class Tile>
__device__ void finish_scores(
    const Lane& lane, const Call& call, int head, int stage, const Seen<TILE>& seen, float (&s)[TILE / 8][4]) {
  const int length = call.windows.length;
#pragma unroll
  for (int j = 0; j < TILE / 8; ++j) {
    for (int e = 0; e < 4; ++e) {
      const int i = e / 2, column = 8 * j + 2 * lane.thread + e % 2;
      if (seen(i, column) && static_cast<int>(load_word(Tile::token(stage, column))) >= 0) {
        s[j][e] *= call.scale;
        if (call.bias.data != nullptr) {
          const int64_t row = static_cast<int64_t>(head) * length + lane.row(i) - seen.begin[i];
          s[j][e] += call.bias[row * length + column - seen.begin[i]];
        }
      } else {
        s[j][e] = -INFINITY;
      }
    }
  }
}

// ---- windows that share a tile must not see each other's numbers
//
// 0 * NaN is NaN, and so is 0 * infinity: in a product over all places of a tile, one such number would reach every
// window of it. The rows of its window are multiplied as zeros instead, and this thread's rows get NaN where they are
// of that window.

template <class T, int D>
__device__ unsigned rows_not_finite(Rows<D> rows) {
  bool found[2] = {};
  for (int column = 0; column < D; column += 8) {
    uint32_t words[2];
    load_matrices<false>(rows.at(threadIdx.x % 16, column), words);
    for (int i = 0; i < 2; ++i) found[i] = found[i] || not_finite<T>(words[i]);
  }
  unsigned result = 0;
  for (int i = 0; i < 2; ++i) {
    const unsigned lanes = __ballot_sync(kAllLanes, found[i]);
    for (int row = 0; row < 8; ++row) result |= (lanes >> 4 * row & 15) != 0 ? 1u << (8 * i + row) : 0;
  }
  return result;
}

// rows: those of the tile that are not finite.
struct Poison {
  bool of[2] = {}; // this thread's rows

  template <int D, class... Tiles>
  __device__ void clear(const Lane& lane, const Seen<16>& seen, unsigned rows, Tiles... tiles) {
    if (rows == 0) return;
    for (int i = 0; i < 2; ++i) {
      for (int row = seen.begin[i]; row < seen.end[i]; ++row) of[i] = of[i] || (rows >> row & 1);
    }
    __syncwarp(); // all have read
    for (int column = 2 * lane.thread; column < D; column += 8) {
      for (int i = 0; i < 2; ++i) {
        if (of[i]) (store_word(tiles.at(lane.row(i), column), 0), ...);
      }
    }
    __syncwarp();
  }

  template <int N>
  __device__ void spoil(float (&x)[N][4]) const {
    for (int j = 0; j < N; ++j) {
      for (int e = 0; e < 4; ++e) {
        if (of[e / 2]) x[j][e] = NAN;
      }
    }
  }
};

// ---- forward

template <class T, int D, int TILE>
__global__ void __launch_bounds__(2 * TILE, kWarps<D> * 16 / TILE)
    window_attention_forward(Call call, void* out, float* softmax, int tasks) {
  using Tile = Layout<D, TILE, 3>;
  const Lane lane;
  const Seen<TILE> seen(lane, call.windows);
  int held = -1, stage = 0;
  const auto begin = [&](int task, int to) {
    if (task < tasks) fill<D, TILE, 3>(call, nullptr, task / call.heads, task % call.heads, to);
    commit_copies();
  };
  begin(blockIdx.x, stage);
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int head = task % call.heads;
    if constexpr (Tile::kStages == 2) begin(task + gridDim.x, stage ^ 1);
    if (call.norm != 0) load_weights<Tile, D>(call, head, held);
    wait_for_copies<Tile::kStages - 1>();
    wait_for_block<TILE>();

    const Rows<D> q = Tile::rows(stage, 0), k = Tile::rows(stage, 1), v = Tile::rows(stage, 2);
    int tokens[2];
    for (int i = 0; i < 2; ++i) tokens[i] = static_cast<int>(load_word(Tile::token(stage, lane.row(i))));
    if (call.prepares()) {
      prepare<T, D>(lane, call, tokens, call.q_weight.values.data != nullptr, Tile::weight(0, 0), q, q);
      prepare<T, D>(lane, call, tokens, call.k_weight.values.data != nullptr, Tile::weight(1, 0), k, k);
      wait_for_block<TILE>();
    }
    Poison poison;
    if constexpr (TILE == 16) {
      if (call.windows.each > 1) poison.clear<D>(lane, seen, rows_not_finite<T, D>(v), v);
    }

    float p[TILE / 8][4];
    inner<T, D, TILE>(lane, q, k, p);
    finish_scores<TILE, Tile>(lane, call, head, stage, seen, p);
    Pair greatest = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
      for (int e = 0; e < 4; ++e) greatest.of[e / 2] = fmaxf(greatest.of[e / 2], p[j][e]);
    }
    for (int distance = 1; distance < 4; distance *= 2) {
      for (float& value : greatest.of) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    Pair total = {};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
      for (int e = 0; e < 4; ++e) {
        const float most = greatest.of[e / 2] == -INFINITY ? 0.0f : greatest.of[e / 2]; // an empty place sees nothing
        p[j][e] = exp2f((p[j][e] - most) * kLog2E);
        total.of[e / 2] += p[j][e];
      }
    }
    total = row_sum(total);

    Values<D> o;
    product<T, D, TILE>(
        [&](int column, uint32_t (&fragment)[4]) {
          for (int j = 0; j < 2; ++j) {
            const float (&x)[4] = p[column / 8 + j];
            fragment[2 * j] = pack<T>(x[0], x[1]);
            fragment[2 * j + 1] = pack<T>(x[2], x[3]);
          }
        },
        v, o);
    scale<D>(o, {1.0f / total.of[0], 1.0f / total.of[1]});
    poison.spoil(o);
    __syncwarp(); // the products have read q
    write_rows<T, D>(lane, q, o);
    __syncwarp();
    copy_out<D, TILE, 3>(lane, stage, q, static_cast<uint16_t*>(out) + head * D, static_cast<int64_t>(call.heads) * D);
    for (int i = 0; i < 2; ++i) {
      if (tokens[i] < 0 || lane.thread > 1) continue;
      const int64_t at = static_cast<int64_t>(tokens[i]) * call.heads + head;
      softmax[2 * at + lane.thread] = lane.thread == 0 ? greatest.of[i] : total.of[i];
    }
    wait_for_block<TILE>(); // all have read the tile
    if constexpr (Tile::kStages == 2) {
      stage ^= 1;
    } else {
      begin(task + gridDim.x, stage);
    }
  }
  wait_for_copies<0>();
}

// ---- backward

// What a backward is asked for. A block takes runs of tiles of one head and leaves, in fp32, the sums over a run:
// weights [heads, runs, head_dim], bias [heads, runs, windows of a tile, L, L].
struct Gradients {
  const void* dout;
  const float* softmax;
  void* dqkv; // none if it is not asked for, as the sums
  float *q_weight, *k_weight, *bias;
  int runs, run_tiles;
};

// Given `gradient`, that of scale * (prepared rows of q or k): the rotation and the norm are taken back, the result
// goes through `staged` to dqkv. `raw` holds the rows as they were, and where the gradient of a weight is asked for in
// the end the sums over the warp's rows.
template <class T, int D, int TILE>
__device__ void finish_rows(
    const Lane& lane, const Call& call, const Gradients& asked, const int (&tokens)[2], int head, int stage, int part,
    Rows<D> staged, Values<D>& gradient) {
  using Tile = Layout<D, TILE, 4>;
  const Weight& weight = part == 0 ? call.q_weight : call.k_weight;
  turn<D>(lane, call, tokens, true, gradient);
  if (call.norm == 0) {
    scale<D>(gradient, {call.scale, call.scale});
  } else {
    // The rows are unpacked again at each use: numbers of fp32 would take twice the registers.
    const Rows<D> raw = Tile::rows(stage, part);
    Words<D> words;
    read_words<D>(lane, raw, words);
    Pair mean = {}, rstd = {}, along = {}, offset = {};
    const auto unpacked = [&](int j, float (&x)[4]) {
      for (int i = 0; i < 2; ++i) unpack<T>(words[j][i], x[2 * i], x[2 * i + 1]);
      for (int e = 0; e < 4; ++e) x[e] -= mean.of[e / 2];
    };
    const auto add_rows = [&](Pair& sum, auto value) { // value(j, e, x) over all channels
      float x[4];
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        unpacked(j, x);
        for (int e = 0; e < 4; ++e) sum.of[e / 2] += value(j, e, x[e]);
      }
      sum = row_sum(sum);
      for (float& each : sum.of) each /= D;
    };
    if (call.norm == 2) {
      Pair sum = {};
      add_rows(sum, [](int, int, float x) { return x; });
      mean = sum;
    }
    add_rows(rstd, [](int, int, float x) { return x * x; });
    for (float& value : rstd.of) value = 1.0f / sqrtf(value + call.eps);
    scale<D>(gradient, {rstd.of[0] * call.scale, rstd.of[1] * call.scale});
    if ((part == 0 ? asked.q_weight : asked.k_weight) != nullptr) {
      __syncwarp(); // all have read
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        float x[4];
        unpacked(j, x);
        for (int e = 0; e < 2; ++e) {
          float sum = gradient[j][e] * x[e] + gradient[j][e + 2] * x[e + 2];
          for (int distance = 4; distance < kWarp; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
          if (lane.quad == 0) store_float(raw.begin + 2 * lane.first * D + 4 * (8 * j + 2 * lane.thread + e), sum);
        }
      }
    }
    if (weight.values.data != nullptr) times_weight<D>(lane, Tile::weight(part, 0), gradient);
    add_rows(along, [&](int j, int e, float x) { return gradient[j][e] * x; });
    if (call.norm == 2) add_rows(offset, [&](int j, int e, float) { return gradient[j][e]; });
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float x[4];
      unpacked(j, x);
      for (int e = 0; e < 4; ++e) {
        gradient[j][e] -= x[e] * (along.of[e / 2] * rstd.of[e / 2] * rstd.of[e / 2]) + offset.of[e / 2];
      }
    }
  }
  if (asked.dqkv == nullptr) return;
  const int64_t step = static_cast<int64_t>(call.heads) * D;
  write_rows<T, D>(lane, staged, gradient);
  __syncwarp();
  copy_out<D, TILE, 4>(lane, stage, staged, static_cast<uint16_t*>(asked.dqkv) + part * step + head * D, 3 * step);
}

template <class T, int D, int TILE>
__global__ void __launch_bounds__(2 * TILE, kWarps<D> * 16 / TILE)
    window_attention_backward(Call call, Gradients asked) {
  using Tile = Layout<D, TILE, 4>;
  const Lane lane;
  const Seen<TILE> seen(lane, call.windows);
  const Windows& windows = call.windows;
  const bool sums_weights = asked.q_weight != nullptr || asked.k_weight != nullptr;
  const int tasks = asked.runs * call.heads;
  int held = -1, stage = 0;

  // The tiles of a block, one after the other.
  struct Place {
    int task, tile;
  };
  const auto first_of = [&](int task) { return Place{task, task / call.heads * asked.run_tiles}; };
  const auto last_of_run = [&](const Place& at) {
    return at.tile + 1 == windows.tiles || (at.tile + 1) % asked.run_tiles == 0;
  };
  const auto next_of = [&](const Place& at) {
    return last_of_run(at) ? first_of(at.task + gridDim.x) : Place{at.task, at.tile + 1};
  };
  const auto begin = [&](const Place& at, int to) {
    if (at.task < tasks) fill<D, TILE, 4>(call, asked.dout, at.tile, at.task % call.heads, to);
    commit_copies();
  };

  float dbias[TILE / 8][4] = {};
  Place at = first_of(blockIdx.x);
  begin(at, stage);
  while (at.task < tasks) {
    const int head = at.task % call.heads;
    if constexpr (Tile::kStages == 2) begin(next_of(at), stage ^ 1);
    if (call.norm != 0) load_weights<Tile, D>(call, head, held);
    if (sums_weights && at.tile % asked.run_tiles == 0) {
      for (int column = thread_now(); column < 2 * D; column += 2 * TILE) store_float(Tile::sum(0, column), 0.0f);
    }
    wait_for_copies<Tile::kStages - 1>();
    wait_for_block<TILE>();

    Rows<D> q = Tile::rows(stage, 0), k = Tile::rows(stage, 1);
    const Rows<D> v = Tile::rows(stage, 2), dout = Tile::rows(stage, 3);
    int tokens[2];
    for (int i = 0; i < 2; ++i) tokens[i] = static_cast<int>(load_word(Tile::token(stage, lane.row(i))));
    if (call.prepares()) {
      if (call.norm != 0) { // the rows as they were are needed again
        q = Tile::prepared(0);
        k = Tile::prepared(1);
      }
      prepare<T, D>(
          lane, call, tokens, call.q_weight.values.data != nullptr, Tile::weight(0, 0), Tile::rows(stage, 0), q);
      prepare<T, D>(
          lane, call, tokens, call.k_weight.values.data != nullptr, Tile::weight(1, 0), Tile::rows(stage, 1), k);
      wait_for_block<TILE>();
    }
    Poison poison;
    if constexpr (TILE == 16) {
      if (windows.each > 1) {
        const unsigned rows = rows_not_finite<T, D>(q) | rows_not_finite<T, D>(k) | rows_not_finite<T, D>(v) |
                              rows_not_finite<T, D>(dout);
        poison.clear<D>(lane, seen, rows, q, k, v, dout);
      }
    }

    float p[TILE / 8][4], ds[TILE / 8][4];
    inner<T, D, TILE>(lane, q, k, p);
    inner<T, D, TILE>(lane, dout, v, ds); // dP
    finish_scores<TILE, Tile>(lane, call, head, stage, seen, p);
    Pair greatest = {}, inverse = {};
    for (int i = 0; i < 2; ++i) {
      if (tokens[i] < 0) continue;
      const float* saved = asked.softmax + 2 * (static_cast<int64_t>(tokens[i]) * call.heads + head);
      greatest.of[i] = saved[0];
      inverse.of[i] = 1.0f / saved[1];
    }
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int i = e / 2;
        const bool none = tokens[i] < 0 || p[j][e] == -INFINITY || poison.of[i];
        p[j][e] = none ? 0.0f : exp2f((p[j][e] - greatest.of[i]) * kLog2E) * inverse.of[i];
      }
    }
    const Pair delta = row_sum(p, ds);
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
      for (int e = 0; e < 4; ++e) {
        ds[j][e] = p[j][e] == 0.0f ? 0.0f : p[j][e] * (ds[j][e] - delta.of[e / 2]);
        dbias[j][e] += poison.of[e / 2] ? NAN : ds[j][e];
      }
    }

    Words<TILE> rounded_p, rounded_ds;
    round_rows<T, TILE>(p, rounded_p);
    round_rows<T, TILE>(ds, rounded_ds);

    // P, and after it dS, take the place of v.
    const Rows<TILE> pairs = {v.begin};
    const int row = threadIdx.x % 16, odd = threadIdx.x % kWarp / 16;
    const auto transposed = [&](int column, uint32_t (&fragment)[4]) {
      uint32_t words[4];
      load_matrices<true>(pairs.at(column + row, lane.first + 8 * odd), words);
      fragment[0] = words[0];
      fragment[1] = words[2];
      fragment[2] = words[1];
      fragment[3] = words[3];
    };
    Values<D> gradient;
    wait_for_block<TILE>(); // all have read v
    if (asked.dqkv != nullptr) {
      write_words<TILE>(lane, pairs, rounded_p);
      wait_for_block<TILE>();
      product<T, D, TILE>(transposed, dout, gradient); // dv
      poison.spoil(gradient);
      wait_for_block<TILE>(); // all have read P and dout
      write_rows<T, D>(lane, dout, gradient);
      __syncwarp();
      const int64_t step = static_cast<int64_t>(call.heads) * D;
      copy_out<D, TILE, 4>(lane, stage, dout, static_cast<uint16_t*>(asked.dqkv) + 2 * step + head * D, 3 * step);
    }
    write_words<TILE>(lane, pairs, rounded_ds);
    wait_for_block<TILE>();
    if (asked.dqkv != nullptr || asked.q_weight != nullptr) {
      const auto straight = [&](int column, uint32_t (&fragment)[4]) {
        load_matrices<false>(pairs.at(lane.first + row, column + 8 * odd), fragment);
      };
      product<T, D, TILE>(straight, k, gradient); // dq
      poison.spoil(gradient);
      finish_rows<T, D, TILE>(lane, call, asked, tokens, head, stage, 0, dout, gradient);
    }
    if (asked.dqkv != nullptr || asked.k_weight != nullptr) {
      product<T, D, TILE>(transposed, q, gradient); // dk
      poison.spoil(gradient);
      finish_rows<T, D, TILE>(lane, call, asked, tokens, head, stage, 1, dout, gradient);
    }
    wait_for_block<TILE>(); // all are done with the tile, and have left their sums in the rows of q and k
    const int64_t run = static_cast<int64_t>(head) * asked.runs + at.task / call.heads;
    for (int part = 0; part < 2; ++part) {
      float* to = part == 0 ? asked.q_weight : asked.k_weight;
      if (to == nullptr) continue;
      for (int column = thread_now(); column < D; column += 2 * TILE) {
        float sum = load_float(Tile::sum(part, column));
        for (int warp = 0; warp < TILE / 16; ++warp) {
          sum += load_float(Tile::rows(stage, part).begin + 32 * warp * D + 4 * column);
        }
        if (last_of_run(at)) {
          to[run * D + column] = sum;
        } else {
          store_float(Tile::sum(part, column), sum);
        }
      }
    }
    if (asked.bias != nullptr && last_of_run(at)) {
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j) {
        for (int e = 0; e < 4; ++e) {
          const int i = e / 2, column = 8 * j + 2 * lane.thread + e % 2, length = windows.length;
          if (seen(i, column)) {
            const int64_t window = run * windows.each + seen.begin[i] / length;
            const int64_t place = window * length + lane.row(i) - seen.begin[i];
            asked.bias[place * length + column - seen.begin[i]] = dbias[j][e];
          }
          dbias[j][e] = 0.0f;
        }
      }
    }
    wait_for_block<TILE>(); // the sums have been read
    at = next_of(at);
    if constexpr (Tile::kStages == 2) {
      stage ^= 1;
    } else {
      begin(at, stage);
    }
  }
  wait_for_copies<0>();
}

// out [rows, width] = the sum over count of in [rows, count, width]
struct Sum {
  const float* in;
  Output out;
  int64_t rows, count;
  int width;

  __host__ __device__ int64_t tiles() const { return rows * ((width + kWarp - 1) / kWarp); }
};

struct Sums {
  Sum of[3];
};

// Sum blockIdx.y; lane k of a column adds k, k + kSumLanes, ...
__global__ void __launch_bounds__(kWarp* kSumLanes) window_attention_sums(Sums sums) {
  const Sum& sum = sums.of[blockIdx.y];
  const int64_t width_tiles = (sum.width + kWarp - 1) / kWarp;
  const Shared lanes = shared_begin();
  for (int64_t task = blockIdx.x; task < sum.tiles(); task += gridDim.x) {
    const int64_t row = task / width_tiles;
    const int column = static_cast<int>(task % width_tiles) * kWarp + threadIdx.x;
    float part = 0.0f;
    if (column < sum.width) {
      for (int64_t i = threadIdx.y; i < sum.count; i += kSumLanes) {
        part += sum.in[(row * sum.count + i) * sum.width + column];
      }
    }
    store_float(lanes + 4 * (threadIdx.y * kWarp + threadIdx.x), part);
    __syncthreads();
    if (threadIdx.y == 0 && column < sum.width) {
      float total = 0.0f;
      for (int lane = 0; lane < kSumLanes; ++lane) total += load_float(lanes + 4 * (lane * kWarp + threadIdx.x));
      sum.out.write(row * sum.width + column, total);
    }
    __syncthreads(); // the lanes have been read
  }
}

// ---- checks

void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, const Tensor& qkv) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(tensor.get_device_index() == qkv.get_device_index(), name, " must be on the device of qkv");
  check_shape(tensor, name, shape);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has a dtype that the kernel does not take");
}

struct Shape {
  int64_t batch, tokens, heads;
  int head_dim;

  explicit Shape(const Tensor& qkv) {
    STD_TORCH_CHECK(qkv.dim() == 5, "qkv must be [B, N, 3, heads, head_dim], got ", qkv.dim(), " dimensions");
    batch = qkv.size(0);
    tokens = qkv.size(1);
    heads = qkv.size(3);
    head_dim = static_cast<int>(qkv.size(4));
    check(qkv, "qkv", {batch, tokens, 3, heads, head_dim}, qkv);
    STD_TORCH_CHECK(
        batch * tokens * heads < int64_t{1} << 30, "qkv may have up to 2^30 rows of a head, got ",
        batch * tokens * heads);
  }
};

Input input_of(
    const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape, const Tensor& qkv) {
  if (!tensor) return {nullptr, ScalarType::Float};
  check(*tensor, name, shape, qkv);
  const ScalarType dtype = tensor->scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
      " must be float32, bfloat16 or float16");
  return {tensor->const_data_ptr(), dtype};
}

Weight weight_of(const std::optional<Tensor>& weight, const char* name, const Shape& shape, const Tensor& qkv) {
  if (weight && weight->dim() == 2) return {input_of(weight, name, {shape.heads, shape.head_dim}, qkv), shape.head_dim};
  return {input_of(weight, name, {shape.head_dim}, qkv), 0};
}

const float* angles_of(const std::optional<Tensor>& angles, const char* name, const Shape& shape, const Tensor& qkv) {
  if (!angles) return nullptr;
  check(*angles, name, {shape.tokens, shape.head_dim / 2}, qkv);
  check_dtype(*angles, name, ScalarType::Float);
  return static_cast<const float*>(angles->const_data_ptr());
}

int tile_of(int64_t length) { return length <= 16 ? 16 : length <= 32 ? 32 : 64; }

Windows windows_of(std::initializer_list<int64_t> sizes, const Shape& shape) {
  const int64_t* of = sizes.begin();
  int64_t length = 1, count = shape.batch, tokens = 1;
  for (int axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(
        of[axis + 3] >= 1 && of[axis + 3] <= of[axis], "a window has ", of[axis + 3], " places on an axis of ",
        of[axis]);
    length *= of[axis + 3];
    tokens *= of[axis];
    count *= (of[axis] + of[axis + 3] - 1) / of[axis + 3];
    STD_TORCH_CHECK(
        length <= kLongest && tokens <= shape.tokens, "the grid or the window is too large: a window may have ",
        kLongest, " tokens");
  }
  STD_TORCH_CHECK(tokens == shape.tokens, "the grid has ", tokens, " tokens, qkv has ", shape.tokens);
  const int64_t each = tile_of(length) / length;
  const auto whole = [&](int axis) { return static_cast<int>(of[axis]); };
  return {
      whole(0),
      whole(1),
      whole(2),
      whole(3),
      whole(4),
      whole(5),
      static_cast<int>(length),
      static_cast<int>(each),
      static_cast<int>(count),
      static_cast<int>((count + each - 1) / each)};
}

// ---- launches

// f(a T, integral_constant D, integral_constant TILE)
template <class F>
void with_kernel(ScalarType dtype, int head_dim, int tile, F&& f) {
  const auto with_tile = [&](auto t, auto d) {
    if (tile == 16) return f(t, d, std::integral_constant<int, 16>{});
    if (tile == 32) return f(t, d, std::integral_constant<int, 32>{});
    f(t, d, std::integral_constant<int, 64>{});
  };
  const auto with_width = [&](auto t) {
    if (head_dim == 64) return with_tile(t, std::integral_constant<int, 64>{});
    if (head_dim == 72) return with_tile(t, std::integral_constant<int, 72>{});
    if (head_dim == 96) return with_tile(t, std::integral_constant<int, 96>{});
    if (head_dim == 128) return with_tile(t, std::integral_constant<int, 128>{});
    STD_TORCH_CHECK(false, "the kernels take a head_dim of 64, 72, 96 or 128, got ", head_dim);
  };
  if (dtype == ScalarType::BFloat16) return with_width(BFloat16());
  if (dtype == ScalarType::Half) return with_width(Half());
  STD_TORCH_CHECK(false, "the kernels take qkv in bfloat16 and float16");
}

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "window_attention: a call of CUDA failed: ", cudaGetErrorString(error));
}

// As many blocks as the GPU holds at once, each of which goes on to further tasks: any number gives the same bits.
template <class... Parameters, class... Arguments>
void launch(
    const Tensor& on, void (*kernel)(Parameters...), dim3 threads, int bytes, int64_t tasks, unsigned kinds,
    const Arguments&... arguments) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  int processors = 0, blocks = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, on.get_device_index()));
  if (bytes > 48 << 10) check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads.x * threads.y, bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(tasks, std::max(blocks * processors, 1))), kinds, 1);
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  check_cuda(cudaGetLastError());
}

Tensor empty_like_if(bool asked, const std::optional<Tensor>& tensor, const Tensor& qkv) {
  return asked ? torch::stable::empty_like(*tensor) : empty(qkv, {0}, qkv.scalar_type());
}

// The tensors of a call, aligned and checked; the call has their addresses.
struct Inputs {
  Tensor qkv;
  Shape shape;
  Call call;

  Inputs(
      const Tensor& given, std::initializer_list<int64_t> sizes, const std::optional<Tensor>& q_weight,
      const std::optional<Tensor>& k_weight, int64_t norm, const std::optional<Tensor>& cos,
      const std::optional<Tensor>& sin, bool interleaved, const std::optional<Tensor>& bias, double scale, double eps)
      : qkv(aligned(given)), shape(qkv) {
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
    call.windows = windows_of(sizes, shape);
    const int64_t length = call.windows.length;
    call.heads = static_cast<int>(shape.heads);
    call.qkv = qkv.const_data_ptr();
    call.norm = static_cast<int>(norm);
    call.q_weight = weight_of(q_weight, "q_weight", shape, qkv);
    call.k_weight = weight_of(k_weight, "k_weight", shape, qkv);
    call.cos = angles_of(cos, "cos", shape, qkv);
    call.sin = angles_of(sin, "sin", shape, qkv);
    call.interleaved = interleaved;
    call.bias = input_of(bias, "bias", {shape.heads, length, length}, qkv);
    call.scale = static_cast<float>(scale);
    call.eps = static_cast<float>(eps);
  }
};

// ---- ops

std::tuple<Tensor, Tensor> window_attention_fwd(
    const Tensor& qkv, int64_t t, int64_t h, int64_t w, int64_t wt, int64_t wh, int64_t ww,
    std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, int64_t norm, std::optional<Tensor> cos,
    std::optional<Tensor> sin, bool interleaved, std::optional<Tensor> bias, double scale, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const Inputs in(qkv, {t, h, w, wt, wh, ww}, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps);
  const auto& [batch, tokens, heads, head_dim] = in.shape;
  Tensor out = empty(qkv, {batch, tokens, heads * head_dim}, qkv.scalar_type());
  Tensor softmax = empty(qkv, {batch, tokens, heads, 2}, ScalarType::Float);
  const int tasks = static_cast<int>(in.call.windows.tiles * heads);
  if (tasks == 0) return {out, softmax};
  with_kernel(
      qkv.scalar_type(), head_dim, tile_of(in.call.windows.length), [&]<class T, class D, class TILE>(T, D, TILE) {
        launch(
            qkv, window_attention_forward<T, D::value, TILE::value>, dim3(2 * TILE::value),
            Layout<D::value, TILE::value, 3>::bytes(false), tasks, 1, in.call, out.mutable_data_ptr(),
            static_cast<float*>(softmax.mutable_data_ptr()), tasks);
      });
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(
    const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& softmax, int64_t t, int64_t h, int64_t w,
    int64_t wt, int64_t wh, int64_t ww, std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, int64_t norm,
    std::optional<Tensor> cos, std::optional<Tensor> sin, bool interleaved, std::optional<Tensor> bias, double scale,
    double eps, bool need_qkv, bool need_q, bool need_k, bool need_bias) {
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const Inputs in(qkv, {t, h, w, wt, wh, ww}, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps);
  const auto& [batch, tokens, heads, head_dim] = in.shape;
  const Windows& windows = in.call.windows;
  check(dout, "dout", {batch, tokens, heads * head_dim}, qkv);
  check_dtype(dout, "dout", qkv.scalar_type());
  check(softmax, "softmax", {batch, tokens, heads, 2}, qkv);
  check_dtype(softmax, "softmax", ScalarType::Float);
  const Tensor aligned_dout = aligned(dout);

  Tensor dqkv = empty_like_if(need_qkv, in.qkv, qkv), dq_weight = empty_like_if(need_q, q_weight, qkv);
  Tensor dk_weight = empty_like_if(need_k, k_weight, qkv), dbias = empty_like_if(need_bias, bias, qkv);
  if (windows.tiles == 0) {
    for (Tensor* gradient : {&dq_weight, &dk_weight, &dbias}) torch::stable::zero_(*gradient);
    return {dqkv, dq_weight, dk_weight, dbias};
  }

  // Without sums over tiles a run is one tile. What is summed, hence every bit, follows from the shape.
  const int most = static_cast<int>(std::max<int64_t>(kPrograms / tile_of(windows.length) / heads, 1));
  const bool sums = need_q || need_k || need_bias;
  const int run_tiles = sums ? (windows.tiles + most - 1) / most : 1;
  const int runs = (windows.tiles + run_tiles - 1) / run_tiles;
  Gradients asked = {
      aligned_dout.const_data_ptr(),
      static_cast<const float*>(softmax.const_data_ptr()),
      need_qkv ? dqkv.mutable_data_ptr() : nullptr,
      nullptr,
      nullptr,
      nullptr,
      runs,
      run_tiles};

  Sums wanted = {};
  unsigned kinds = 0;
  int64_t sum_tiles = 0;
  std::optional<Tensor> parts[3];
  const auto sum_of = [&](bool needed, Tensor& gradient, int64_t rows, int64_t count, int width) -> float* {
    if (!needed) return nullptr;
    Tensor& part = parts[kinds].emplace(empty(qkv, {rows, count, width}, ScalarType::Float));
    float* data = static_cast<float*>(part.mutable_data_ptr());
    wanted.of[kinds] = {data, {gradient.mutable_data_ptr(), gradient.scalar_type()}, rows, count, width};
    sum_tiles = std::max(sum_tiles, wanted.of[kinds++].tiles());
    return data;
  };
  const auto weight_sum = [&](bool needed, Tensor& gradient, const Weight& weight) {
    return weight.step == 0 ? sum_of(needed, gradient, 1, heads * runs, head_dim)
                            : sum_of(needed, gradient, heads, runs, head_dim);
  };
  asked.q_weight = weight_sum(need_q, dq_weight, in.call.q_weight);
  asked.k_weight = weight_sum(need_k, dk_weight, in.call.k_weight);
  asked.bias = sum_of(need_bias, dbias, heads, runs * windows.each, windows.length * windows.length);

  with_kernel(qkv.scalar_type(), head_dim, tile_of(windows.length), [&]<class T, class D, class TILE>(T, D, TILE) {
    launch(
        qkv, window_attention_backward<T, D::value, TILE::value>, dim3(2 * TILE::value),
        Layout<D::value, TILE::value, 4>::bytes(norm != 0), runs * heads, 1, in.call, asked);
  });
  if (kinds > 0) {
    launch(qkv, window_attention_sums, dim3(kWarp, kSumLanes), 4 * kWarp * kSumLanes, sum_tiles, kinds, wanted);
  }
  return {dqkv, dq_weight, dk_weight, dbias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CUDA, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

} // namespace minisora
