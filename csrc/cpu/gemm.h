// fp32 products of small matrices in L1 and L2: c = a b or c += a b.
//
// b and c have dense rows of whole vectors. The product reads a one number at a time, with any strides, so a transposed a costs
// nothing. The order of the sums depends on the sizes alone.
#pragma once

#include "common.h"

namespace minisora {

struct Left {
  const float* data;
  int64_t row, step;  // distances between rows of a, and along the sum
};

// The most terms of one running sum. A longer sum adds up such parts, which halves the error of scores over 64 to 128 channels
// and costs a few loads.
constexpr int64_t kTerms = 36;

// R rows by C vectors of c stay in registers during each part of the sum.
template <int R, int C>
inline void product_tile(int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  for (int64_t parts = (depth + kTerms - 1) / kTerms; parts > 0; --parts) {
    const int64_t terms = (depth + parts - 1) / parts;
    Vec sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < C; ++u) sum[r][u] = Vec(0.0f);
    }
    for (int64_t k = 0; k < terms; ++k) {
      Vec right[C];
#pragma GCC unroll 4
      for (int u = 0; u < C; ++u) right[u] = Vec::loadu(b + k * b_row + u * V);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec left(a.data[r * a.row + k * a.step]);
#pragma GCC unroll 4
        for (int u = 0; u < C; ++u) sum[r][u] = at::vec::fmadd(left, right[u], sum[r][u]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < C; ++u) {
        float* to = c + r * c_row + u * V;
        (add ? Vec::loadu(to) + sum[r][u] : sum[r][u]).store(to);
      }
    }
    add = true;
    depth -= terms;
    a.data += terms * a.step;
    b += terms * b_row;
  }
}

// The number of rows that leaves registers for C vectors of b and one number of a.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows[4] = {0, 12, 12, 8};
#else
constexpr int kTileRows[4] = {0, 10, 6, 4};
#endif

template <int R, int C>
inline void product_rows(int64_t rows, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  if constexpr (R > 0) {
    if (rows == R) {
      product_tile<R, C>(depth, a, b, b_row, c, c_row, add);
    } else {
      product_rows<R - 1, C>(rows, depth, a, b, b_row, c, c_row, add);
    }
  }
}

template <int C>
inline void product_panel(int64_t rows, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  constexpr int R = kTileRows[C];
  // Tiles of nearly equal height: a last tile of one row would wait for each of its sums.
  for (int64_t tiles = (rows + R - 1) / R; tiles > 0; --tiles) {
    const int64_t height = (rows + tiles - 1) / tiles;
    product_rows<R, C>(height, depth, a, b, b_row, c, c_row, add);
    rows -= height;
    a.data += height * a.row;
    c += height * c_row;
  }
}

// c [rows, vectors * V] = or += a [rows, depth] b [depth, vectors * V]. Not inlined: a file needs one copy of the tiles.
[[gnu::noinline]] inline void product(
    int64_t rows, int64_t vectors, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  while (vectors > 0) {
    int64_t taken;
    if (vectors >= 3 && vectors != 4) {
      product_panel<3>(rows, depth, a, b, b_row, c, c_row, add);
      taken = 3;
    } else if (vectors >= 2) {
      product_panel<2>(rows, depth, a, b, b_row, c, c_row, add);
      taken = 2;
    } else {
      product_panel<1>(rows, depth, a, b, b_row, c, c_row, add);
      taken = 1;
    }
    vectors -= taken;
    b += taken * V;
    c += taken * V;
  }
}

// out [columns, rows] = in [rows, columns], both sizes multiples of V
inline void transpose(int64_t rows, int64_t columns, const float* in, int64_t in_row, float* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; r += V) {
    for (int64_t c = 0; c < columns; c += V) {
      at::vec::transpose_mxn<float, V, V>(in + r * in_row + c, in_row, out + c * out_row + r, out_row);
    }
  }
}

} // namespace minisora
