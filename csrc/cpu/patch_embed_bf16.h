// patch_embed in bfloat16 on CPUs that multiply it: bfloat16 products with fp32 sums, as torch has them. The bias is one more
// weight; its patch element is 1.
#pragma once

#include "pairs.h"
#include "patches.h"

namespace minisora {

struct PatchPairs {
  static constexpr int64_t kTokens = 16, kSumTokens = 64, kSumColumns = 384;

  const PatchGrid& grid;
  const int64_t batch, width, elements, depth; // depth: the elements and the 1 of the bias, as terms of a sum

  PatchPairs(const PatchGrid& grid, int64_t batch, int64_t width)
      : grid(grid), batch(batch), width(width), elements(grid.elements()), depth(whole(grid.elements() + 1, pairs::kTerms)) {}

  static bool serves(int64_t width) { return width % 32 == 0; }

  // y = the patches weight^T + bias + pos; pos_row(token, column) loads 16 numbers of it.
  template <class PosRow>
  void forward(const Tensor& x, const BFloat16* weight, const BFloat16* bias, bool with_pos, PosRow pos_row, BFloat16* y) const {
    std::vector<BFloat16> packed(depth * width, BFloat16(0.0f));
    torch::stable::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) {
        for (int64_t k = 0; k < elements; ++k) packed[k / 2 * 2 * width + 2 * d + k % 2] = weight[d * elements + k];
        if (bias) packed[elements / 2 * 2 * width + 2 * d + elements % 2] = bias[d];
      }
    });
    const auto* in = static_cast<const BFloat16*>(x.const_data_ptr());
    const int64_t tokens = grid.tokens(), tiles = whole(tokens, kTokens) / kTokens;
    with_put(past_caches(y, batch * tokens * width, width), [&](auto how) {
      torch::stable::parallel_for(0, batch * tiles, 4, [&](int64_t begin, int64_t end) {
        const pairs::Session session;
        std::vector<BFloat16> patches(kTokens * depth, BFloat16(0.0f));
        for (int64_t i = 0; i < kTokens; ++i) patches[i * depth + elements] = BFloat16(1.0f);
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t b = tile / tiles, first = tile % tiles * kTokens, count = std::min(tokens - first, kTokens);
          for_elements(grid, grid.channels_first(depth), VideoStrides(x), b, first, first + count, [&](int64_t v, int64_t t) {
            patches[t] = in[v];
          });
          BFloat16* out = y + (b * tokens + first) * width;
          for (int64_t column = 0; column < width; column += 32) {
            pairs::product_block(
                depth, {patches.data(), depth, 2}, packed.data() + 2 * column, 2 * width,
                [&](int64_t i, int64_t u) MINISORA_INLINE -> __m512 {
                  return with_pos && i < count ? pos_row(first + i, column + 16 * u) : Vec(0.0f);
                },
                [&](int64_t i, const __m512(&sums)[2]) MINISORA_INLINE {
                  if (i < count) how.put(out + i * width + column, Vec(sums[0]), Vec(sums[1]));
                });
          }
        }
        _mm_sfence();
      });
    });
  }

  // sums[part] = the patches^T dy of a part of the tokens, [elements + 1, width]; the last row is dbias. The shapes alone
  // determine the parts. A task adds the products of 64 tokens to a part, which starts at zero.
  std::vector<float> backward(const Tensor& x, const BFloat16* dy, int64_t per_part, int64_t parts) const {
    const auto* in = static_cast<const BFloat16*>(x.const_data_ptr());
    const int64_t tokens = grid.tokens(), height = whole(elements + 1, 16), blocks = whole(width, kSumColumns) / kSumColumns;
    std::vector<float> sums(parts * height * width);
    torch::stable::parallel_for(0, parts * blocks, 1, [&](int64_t begin, int64_t end) {
      const pairs::Session session;
      std::vector<BFloat16> patches(height * kSumTokens), tail(kSumTokens * kSumColumns), dy_pairs(kSumTokens * kSumColumns);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / blocks, column = task % blocks * kSumColumns, columns = std::min(width - column, kSumColumns);
        float* sum = sums.data() + part * height * width + column;
        for (int64_t first = part * per_part; first < std::min(tokens, (part + 1) * per_part); first += kSumTokens) {
          const int64_t count = std::min(tokens - first, kSumTokens), each = grid.pt * grid.ph * grid.pw;
          const PatchOrder order{1, each * kSumTokens, grid.ph * grid.pw * kSumTokens, grid.pw * kSumTokens, kSumTokens};
          std::fill(patches.begin(), patches.end(), BFloat16(0.0f));
          std::fill_n(patches.begin() + elements * kSumTokens, count, BFloat16(1.0f));
          for (int64_t b = 0; b < batch; ++b) {
            for_elements(grid, order, VideoStrides(x), b, first, first + count, [&](int64_t v, int64_t t) { patches[t] = in[v]; });
            const BFloat16* from = dy + (b * tokens + first) * width + column;
            int64_t from_row = width;
            if (count < kSumTokens) { // the numbers that meet the zeros must be finite
              std::fill(tail.begin(), tail.end(), BFloat16(0.0f));
              for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * width, columns, tail.data() + i * kSumColumns);
              from = tail.data(), from_row = kSumColumns;
            }
            pairs::pair_rows(kSumTokens, columns, from, from_row, dy_pairs.data(), 2 * kSumColumns);
            pairs::product(
                height, columns, kSumTokens, {patches.data(), kSumTokens, 2}, dy_pairs.data(), 2 * kSumColumns, sum, width, true);
          }
        }
      }
    });
    return sums;
  }
};

} // namespace minisora
