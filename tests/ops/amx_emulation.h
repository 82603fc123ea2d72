// AMX's tiles in C++, for tests/ops/test_amx.py: included before a source that uses the intrinsics, it replaces them. As Intel's manual
// describes them; where an instruction would fault, a std::runtime_error.
#pragma once

#include <immintrin.h>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace tiles {
struct Tile { int rows, bytes; unsigned char data[16][64]; };
inline thread_local Tile tile[8] = {};
inline thread_local bool live = false;
inline std::atomic<long> products{0};

inline void check(bool right, const char* message) { if (!right) throw std::runtime_error(message); }
inline void release() { live = false, std::memset(tile, 0, sizeof(tile)); }
inline void configure(const void* from) {
  unsigned char config[64];
  std::memcpy(config, from, 64);
  release();
  check(config[0] <= 1, "there is no such palette of tiles");
  for (int i = 1; i < 64; ++i) check(i / 16 == 1 || i / 8 == 6 || config[i] == 0, "a reserved byte is not zero");
  for (int i = 0; i < 8; ++i) {
    tile[i].rows = config[48 + i], tile[i].bytes = config[16 + 2 * i] + 256 * config[17 + 2 * i];
    check(tile[i].rows <= 16 && tile[i].bytes <= 64, "a tile cannot be of this size");
  }
  live = config[0] == 1;
}
inline Tile& at(int i) {
  check(live && tile[i].rows > 0 && tile[i].bytes > 0, "a tile was used without a configuration");
  return tile[i];
}
inline void zero(int i) { std::memset(at(i).data, 0, sizeof(Tile::data)); }
inline void load(int i, const void* from, int64_t stride) {
  zero(i);
  for (int r = 0; r < tile[i].rows; ++r) std::memcpy(tile[i].data[r], (const char*)from + r * stride, tile[i].bytes);
}
inline void store(int i, void* to, int64_t stride) {
  for (int r = 0; r < at(i).rows; ++r) std::memcpy((char*)to + r * stride, tile[i].data[r], tile[i].bytes);
}
// What is too small to be a normal number is zero, going in and coming out.
inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
inline float number(const Tile& from, int row, int i) {
  float x = 0;
  std::memcpy((char*)&x + 2, from.data[row] + 2 * i, 2);
  return flush(x);
}
__attribute__((optimize("O3"))) inline void product(int to, int left, int right) {
  Tile &c = at(to), &a = at(left), &b = at(right);
  check(to != left && to != right && left != right, "a product needs three tiles");
  check(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows && c.bytes % 4 == 0, "tiles do not fit");
  float numbers[2][16][32];
  for (int r = 0; r < 16; ++r) {
    for (int i = 0; i < 32; ++i) numbers[0][r][i] = number(a, r, i), numbers[1][r][i] = number(b, r, i);
  }
  for (int m = 0; m < c.rows; ++m) {
    float even[16] = {}, odd[16] = {}, old[16];
    for (int k = 0; k < b.rows; ++k) {
      const float first = numbers[0][m][2 * k], second = numbers[0][m][2 * k + 1], *row = numbers[1][k];
      for (int n = 0; n < 16; ++n) even[n] = flush(even[n] + first * row[2 * n]), odd[n] = flush(odd[n] + second * row[2 * n + 1]);
    }
    std::memcpy(old, c.data[m], 64);
    for (int n = 0; n < 16; ++n) old[n] = flush(flush(old[n]) + flush(even[n] + odd[n]));
    std::memcpy(c.data[m], old, c.bytes);
  }
  ++products;
}
} // namespace tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles::configure
#define _tile_release tiles::release
#define _tile_loadd tiles::load
#define _tile_stored tiles::store
#define _tile_zero tiles::zero
#define _tile_dpbf16ps tiles::product
#define __AMX_BF16__ 1
extern "C" __attribute__((weak, visibility("default"))) long tile_products() { return tiles::products; }
