// Products of bfloat16 matrices with fp32 sums. The library is built for AMX tiles or for AVX-512's dot products of pairs.
//
// The left factor is row-major. The right factor has the terms of the sum in pairs, [k / 2, 2 n + k % 2]. Numbers of rows and
// columns are multiples of 16, numbers of terms multiples of kTerms. The code that fills a buffer pads the terms of the right
// factor with zeros, and keeps the matching terms of the left factor finite.
#pragma once

#include "common.h"

#include <array>
#include <cstring>

namespace minisora::pairs {

// Pair k / 2 of row r is at data + r * row + k / 2 * step.
struct Left {
  const BFloat16* data;
  int64_t row, step;
};

#if defined(__AMX_BF16__)

constexpr int64_t kTerms = 32;

// A thread can multiply while it has one of these. A tile is 16 rows of 64 bytes.
struct Session {
  Session() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64; // bytes per row
      config[48 + tile] = 16;     // rows
    }
    asm volatile("" ::"r"(config) : "memory"); // gcc 12's intrinsic says that it reads 8 of the 64 bytes
    _tile_loadconfig(config);
  }
  ~Session() { _tile_release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// R by C tiles of c.
template <int R, int C>
inline void product_tiles(
    int64_t depth, const BFloat16* a, int64_t a_row, const BFloat16* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  const int64_t a_bytes = 2 * a_row, b_bytes = 2 * b_row, c_bytes = 4 * c_row;
  float* below = c + 16 * c_row;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (C == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (R == 2) _tile_loadd(2, below, c_bytes);
    if constexpr (R == 2 && C == 2) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTerms) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k / 2 * b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, b + k / 2 * b_row + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + 16 * a_row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (C == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (R == 2) _tile_stored(2, below, c_bytes);
  if constexpr (R == 2 && C == 2) _tile_stored(3, below + 16, c_bytes);
}

// c [rows, columns] = or += a [rows, depth] b [depth, columns], with rows and columns in whole 16s, depth in whole kTerms.
inline void product(
    int64_t rows, int64_t columns, int64_t depth, Left a, const BFloat16* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  asm volatile("" ::: "memory"); // gcc's tile loads do not say that they read memory
  for (int64_t r = 0; r < rows; r += 32) {
    const bool two_rows = r + 16 < rows;
    for (int64_t n = 0; n < columns; n += 32) {
      const bool two_columns = n + 16 < columns;
      const BFloat16 *left = a.data + r * a.row, *right = b + 2 * n;
      float* to = c + r * c_row + n;
      if (two_rows && two_columns) {
        product_tiles<2, 2>(depth, left, a.row, right, b_row, to, c_row, add);
      } else if (two_rows) {
        product_tiles<2, 1>(depth, left, a.row, right, b_row, to, c_row, add);
      } else if (two_columns) {
        product_tiles<1, 2>(depth, left, a.row, right, b_row, to, c_row, add);
      } else {
        product_tiles<1, 1>(depth, left, a.row, right, b_row, to, c_row, add);
      }
    }
  }
}

#else

constexpr int64_t kTerms = 2;

struct Session {
  Session() {}
};

// R rows by C vectors of a product stay in registers. The sums start as begin(r, u); end(r, sums) gets those of a row.
template <int R, int C, class Begin, class End>
inline void product_tile(int64_t depth, Left a, const BFloat16* b, int64_t b_row, Begin begin, End end) {
  __m512 sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int u = 0; u < C; ++u) sum[r][u] = begin(r, u);
  }
  for (int64_t k = 0; k < depth; k += 2, a.data += a.step, b += b_row) {
    __m512bh right[C];
#pragma GCC unroll 3
    for (int u = 0; u < C; ++u) right[u] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 32 * u));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, a.data + r * a.row, sizeof(pair));
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
      for (int u = 0; u < C; ++u) sum[r][u] = _mm512_dpbf16_ps(sum[r][u], left, right[u]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) end(r, sum[r]);
}

template <int R, int C>
inline void product_tile(int64_t depth, Left a, const BFloat16* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  product_tile<R, C>(
      depth, a, b, b_row,
      [&](int r, int u) MINISORA_INLINE { return add ? _mm512_loadu_ps(c + r * c_row + 16 * u) : _mm512_setzero_ps(); },
      [&](int r, const __m512(&sums)[C]) MINISORA_INLINE {
        for (int u = 0; u < C; ++u) _mm512_storeu_ps(c + r * c_row + 16 * u, sums[u]);
      });
}

// c [rows, columns] = or += a [rows, depth] b [depth, columns], with rows and columns in whole 16s, depth in whole kTerms.
inline void product(
    int64_t rows, int64_t columns, int64_t depth, Left a, const BFloat16* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  const auto panel = [&](auto height, auto vectors, int64_t n) {
    for (int64_t r = 0; r < rows; r += height) {
      product_tile<height, vectors>(depth, {a.data + r * a.row, a.row, a.step}, b + 2 * n, b_row, c + r * c_row + n, c_row, add);
    }
  };
  for (int64_t n = 0; n < columns;) {
    const int64_t vectors = (columns - n) / 16;
    if (vectors >= 3 && vectors != 4) {
      panel(std::integral_constant<int, 8>{}, std::integral_constant<int, 3>{}, n);
      n += 48;
    } else if (vectors >= 2) {
      panel(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{}, n);
      n += 32;
    } else {
      panel(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{}, n);
      n += 16;
    }
  }
}

#endif

// A product of 16 rows by 32 columns. The sums start as begin(r, u), 16 columns at a time; end(r, sums) gets those of a row.
template <class Begin, class End>
inline void product_block(int64_t depth, Left a, const BFloat16* b, int64_t b_row, Begin begin, End end) {
#if defined(__AMX_BF16__)
  alignas(64) float c[16 * 32];
  for (int r = 0; r < 16; ++r) {
    for (int u = 0; u < 2; ++u) _mm512_store_ps(c + 32 * r + 16 * u, begin(r, u));
  }
  product(16, 32, depth, a, b, b_row, c, 32, true);
  for (int r = 0; r < 16; ++r) {
    const __m512 sums[2] = {_mm512_load_ps(c + 32 * r), _mm512_load_ps(c + 32 * r + 16)};
    end(r, sums);
  }
#else
  for (int first = 0; first < 16; first += 8) {
    product_tile<8, 2>(
        depth, {a.data + first * a.row, a.row, a.step}, b, b_row,
        [&](int r, int u) MINISORA_INLINE { return begin(first + r, u); },
        [&](int r, const __m512(&sums)[2]) MINISORA_INLINE { end(first + r, sums); });
  }
#endif
}

// A right factor whose terms are rows: out [rows / 2, 2 * columns] from in [rows, columns]; rows even, columns whole 32s.
inline void pair_rows(int64_t rows, int64_t columns, const BFloat16* in, int64_t in_row, BFloat16* out, int64_t out_row) {
  alignas(64) static constexpr auto index = [] {
    std::array<uint16_t, 64> lanes{};
    for (int i = 0; i < 64; ++i) lanes[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
    return lanes;
  }();
  const __m512i first = _mm512_load_si512(index.data()), second = _mm512_load_si512(index.data() + 32);
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < columns; c += 32) {
      const __m512i even = _mm512_loadu_si512(in + r * in_row + c), odd = _mm512_loadu_si512(in + (r + 1) * in_row + c);
      BFloat16* to = out + r / 2 * out_row + 2 * c;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(even, second, odd));
    }
  }
}

// out [columns, 2 * rows] = the transpose of in [rows, 2 * columns]; pairs stay together; rows and columns are multiples of 16.
// It makes a right factor from a row-major matrix whose columns are the terms, and a left factor from pairs of rows.
inline void transpose_pairs(int64_t rows, int64_t columns, const BFloat16* in, int64_t in_row, BFloat16* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      at::vec::transpose_mxn<float, 16, 16>(
          reinterpret_cast<const float*>(in + r * in_row + 2 * c), in_row / 2, reinterpret_cast<float*>(out + c * out_row + 2 * r), out_row / 2);
    }
  }
}

// The left factor [rows, terms] from its terms in pairs of rows, [terms / 2, 2 * rows]. The caller provides `out`.
inline Left left_of_pairs(int64_t terms, int64_t rows, const BFloat16* in, int64_t in_row, BFloat16* out, int64_t out_row) {
#if defined(__AMX_BF16__)
  transpose_pairs(terms / 2, rows, in, in_row, out, out_row);
  return {out, out_row, 2};
#else
  return {in, 2, in_row};
#endif
}

} // namespace minisora::pairs
