// patch_embed: equation in minisora_kernels/ops/patch_embed.py.
#include "gemm.h"
#include "patches.h"

#if defined(__AVX512BF16__)
#include "patch_embed_bf16.h"
#endif

namespace minisora {
namespace {

constexpr int64_t kPanel = 3 * V; // columns that are together in memory
constexpr int64_t kDepth = 128; // depth of a block of a sum: blocks stay in L1, and errors stay small
constexpr int64_t kTokens = 48; // tokens of a tile, forward and in dx
constexpr int64_t kSumTokens = 64; // tokens of a tile in the sums over tokens
constexpr int64_t kPanels = 16; // panels of dy per task of the sums
constexpr int64_t kParts = 16; // the most partial sums of dweight
constexpr int64_t kPartial = 1 << 23; // the most numbers in all partial sums together

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

bool are_bf16(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(
      tensors.begin(), tensors.end(), [](const Tensor* t) { return t->scalar_type() == ScalarType::BFloat16; });
}

PatchGrid grid_of(const Tensor& x, int64_t pt, int64_t ph, int64_t pw) {
  check_dtype(x, "x");
  STD_TORCH_CHECK(x.dim() == 5, "x must be [B, C, T, H, W]");
  STD_TORCH_CHECK(pt > 0 && ph > 0 && pw > 0, "patch must be positive");
  const PatchGrid grid{x.size(2) / pt, x.size(3) / ph, x.size(4) / pw, pt, ph, pw, x.size(1)};
  grid.check();
  check_shape(x, "x", {x.size(0), grid.channels, grid.frames * pt, grid.height * ph, grid.width * pw});
  return grid;
}

PatchGrid grid_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 5, "weight must be [D, C, pt, ph, pw]");
  const PatchGrid grid = grid_of(x, weight.size(2), weight.size(3), weight.size(4));
  check_dense(weight, "weight", {weight.size(0), grid.channels, grid.pt, grid.ph, grid.pw});
  return grid;
}

// Tokens [first, last) of sample b as fp32 rows [token, row].
void gather(const Tensor& x, const PatchGrid& grid, int64_t b, int64_t first, int64_t last, float* out, int64_t row) {
  with_type(x.scalar_type(), [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(x.const_data_ptr());
    for_elements(grid, grid.channels_first(row), VideoStrides(x), b, first, last, [=](int64_t v, int64_t t) {
      out[t] = static_cast<float>(in[v]);
    });
  });
}

// A block of a dense matrix in fp32, padded with zeros to whole vectors.
void widen(
    const Tensor& matrix, int64_t width, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
    float* out, int64_t out_row) {
  with_type(matrix.scalar_type(), [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(matrix.const_data_ptr()) + first_row * width + first_column;
    for (int64_t r = 0; r < rows; ++r) {
      for_columns(columns, [&](int64_t i, auto count, auto) {
        store(out + r * out_row + i, load(in + r * width + i, count), Full{});
      });
    }
  });
}

// Stores fp32 rows into a block of a dense matrix that starts at `offset`.
void narrow(
    const float* in, int64_t in_row, int64_t rows, int64_t columns, const Tensor& matrix, int64_t offset,
    int64_t width) {
  with_type(matrix.scalar_type(), [&](auto tag) {
    auto* out = static_cast<decltype(tag)*>(matrix.mutable_data_ptr()) + offset;
    for (int64_t r = 0; r < rows; ++r) {
      for_columns(columns, [&](int64_t i, auto count, auto) {
        store(out + r * width + i, load(in + r * in_row + i, count), count);
      });
    }
  });
}

// out += in, whole vectors
void add(float* out, const float* in, int64_t size) {
  for (int64_t i = 0; i < size; i += V) store(out + i, load(out + i, Full{}) + load(in + i, Full{}), Full{});
}

// c = a b or c += a b, with dense b and c [.., row]. Each block of a long sum has an accumulator of its own: one fp32
// accumulator for the whole sum would lose digits.
void add_product(
    int64_t rows, int64_t row, int64_t depth, Left a, const float* b, float* c, bool first, bool keep,
    std::vector<float>& scratch) {
  if (first) return product(rows, row / V, depth, a, b, row, c, row, keep);
  scratch.resize(rows * row);
  product(rows, row / V, depth, a, b, row, scratch.data(), row, false);
  add(c, scratch.data(), rows * row);
}

Tensor patch_embed_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> pos) {
  const PatchGrid grid = grid_of(x, weight);
  const int64_t batch = x.size(0), tokens = grid.tokens(), depth = grid.elements(), width = weight.size(0);
  if (bias) check_dense(*bias, "bias", {width});
  if (pos) check_dense(*pos, "pos", {tokens, width});
  Tensor y = empty_like_shape(x, {batch, tokens, width}, x.scalar_type());
  if (batch == 0) return y;

#if defined(__AVX512BF16__)
  if (are_bf16({&x, &weight}) && (!bias || are_bf16({&*bias})) && PatchPairs::serves(width)) {
    const auto run = [&](bool with_pos, auto pos_row) {
      PatchPairs(grid, batch, width)
          .forward(
              x, static_cast<const BFloat16*>(weight.const_data_ptr()),
              bias ? static_cast<const BFloat16*>(bias->const_data_ptr()) : nullptr, with_pos, pos_row,
              static_cast<BFloat16*>(y.mutable_data_ptr()));
    };
    if (!pos) {
      run(false, [](int64_t, int64_t) { return Vec(0.0f); });
    } else {
      with_type(pos->scalar_type(), [&](auto tag) {
        const auto* rows = static_cast<const decltype(tag)*>(pos->const_data_ptr());
        run(true, [=](int64_t token, int64_t column) MINISORA_INLINE {
          const auto* at = rows + token * width + column;
          __builtin_prefetch(at + PatchPairs::kTokens * width); // the next tile, which the hardware does not prefetch
          return load(at, Full{});
        });
      });
    }
    return y;
  }
#endif

  // The weight as panels [depth + 1, kPanel], so that the inner loop reads it from end to end. The bias is one more
  // weight; its patch element is 1.
  const int64_t panels = blocks(width, kPanel), panel_size = (depth + 1) * kPanel;
  std::vector<float> packed(panels * panel_size);
  with_type(weight.scalar_type(), [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(weight.const_data_ptr());
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin * kPanel; d < std::min(width, end * kPanel); ++d) {
        float* column = packed.data() + d / kPanel * panel_size + d % kPanel;
        for (int64_t k = 0; k < depth; ++k) column[k * kPanel] = static_cast<float>(in[d * depth + k]);
      }
    });
  });
  for (int64_t panel = 0; bias && panel < panels; ++panel) {
    const int64_t column = panel * kPanel;
    widen(
        *bias, width, 0, 1, column, std::min(width - column, kPanel),
        packed.data() + panel * panel_size + depth * kPanel, kPanel);
  }

  const int64_t tiles = blocks(tokens, kTokens);
  torch::stable::parallel_for(0, batch * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> patches(kTokens * (depth + 1), 1.0f), sums(kTokens * kPanel), scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, first = task % tiles * kTokens, count = std::min(tokens - first, kTokens);
      gather(x, grid, b, first, first + count, patches.data(), depth + 1);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanel, columns = std::min(width - column, kPanel);
        const float* right = packed.data() + panel * panel_size;
        if (pos) widen(*pos, width, first, count, column, columns, sums.data(), kPanel);
        for (int64_t k = 0; k <= depth; k += kDepth) {
          add_product(
              count, kPanel, std::min(depth + 1 - k, kDepth), {patches.data() + k, depth + 1, 1}, right + k * kPanel,
              sums.data(), k == 0, pos.has_value(), scratch);
        }
        narrow(sums.data(), kPanel, count, columns, y, (b * tokens + first) * width + column, width);
      }
    }
  });
  return y;
}

// dx = the patches dy weight, each in its place.
Tensor patch_embed_video(const Tensor& dy, const Tensor& weight, int64_t frames, int64_t height, int64_t across) {
  STD_TORCH_CHECK(weight.dim() == 5, "weight must be [D, C, pt, ph, pw]");
  const PatchGrid grid{frames, height, across, weight.size(2), weight.size(3), weight.size(4), weight.size(1)};
  grid.check();
  STD_TORCH_CHECK(dy.dim() == 3, "dy must be [B, N, D]");
  const int64_t batch = dy.size(0), tokens = grid.tokens(), depth = grid.elements(), width = weight.size(0);
  check_dense(weight, "weight", {width, grid.channels, grid.pt, grid.ph, grid.pw});
  check_dense(dy, "dy", {batch, tokens, width});
  const int64_t row = whole_vectors(depth), tiles = blocks(tokens, kTokens);
  Tensor dx = empty_like_shape(
      dy, {batch, grid.channels, frames * grid.pt, height * grid.ph, across * grid.pw}, dy.scalar_type());
  std::vector<float> wide(width * row);
  widen(weight, depth, 0, width, 0, depth, wide.data(), row);
  torch::stable::parallel_for(0, batch * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> dy_tile(kTokens * kDepth), patches(kTokens * row), scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, first = task % tiles * kTokens, count = std::min(tokens - first, kTokens);
      for (int64_t d = 0; d < width; d += kDepth) {
        const int64_t columns = std::min(width - d, kDepth);
        widen(dy, width, b * tokens + first, count, d, columns, dy_tile.data(), kDepth);
        add_product(
            count, row, columns, {dy_tile.data(), kDepth, 1}, wide.data() + d * row, patches.data(), d == 0, false,
            scratch);
      }
      with_type(dx.scalar_type(), [&](auto tag) {
        using T = decltype(tag);
        T* out = static_cast<T*>(dx.mutable_data_ptr());
        for_elements(
            grid, grid.channels_first(row), VideoStrides(dx), b, first, first + count,
            [&](int64_t v, int64_t t) { out[v] = static_cast<T>(patches[t]); });
      });
    }
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> patch_embed_bwd(
    const Tensor& dy, const Tensor& x, int64_t pt, int64_t ph, int64_t pw, std::optional<ScalarType> bias,
    std::optional<ScalarType> pos) {
  const PatchGrid grid = grid_of(x, pt, ph, pw);
  STD_TORCH_CHECK(dy.dim() == 3, "dy must be [B, N, D]");
  const int64_t batch = x.size(0), tokens = grid.tokens(), depth = grid.elements(), width = dy.size(2);
  check_dense(dy, "dy", {batch, tokens, width});
  Tensor dbias = empty_if_asked(dy, {width}, bias), dpos = empty_if_asked(dy, {tokens, width}, pos);
  Tensor dweight = empty_like_shape(dy, {width, grid.channels, pt, ph, pw}, dy.scalar_type());

#if defined(__AVX512BF16__)
  if (are_bf16({&x, &dy}) && !pos && PatchPairs::serves(width)) {
    const int64_t size = whole(depth + 1, 16) * width, most = std::clamp<int64_t>(kPartial / size, 1, kParts);
    const int64_t per_part = blocks(blocks(tokens, kSumTokens), most) * kSumTokens, parts = blocks(tokens, per_part);
    std::vector<float> sums =
        PatchPairs(grid, batch, width).backward(x, static_cast<const BFloat16*>(dy.const_data_ptr()), per_part, parts);
    for (int64_t part = 1; part < parts; ++part) add(sums.data(), sums.data() + part * size, size);
    if (bias) narrow(sums.data() + depth * width, width, 1, width, dbias, 0, width);
    auto* out = static_cast<BFloat16*>(dweight.mutable_data_ptr());
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t k = 0; k < depth; ++k) out[d * depth + k] = BFloat16(sums[k * width + d]);
    }
    return {dweight, dbias, dpos};
  }
#endif

  // A task sums over a part of the tokens of every sample, for a block of panels. The shapes alone determine parts and
  // blocks.
  const int64_t panels = blocks(width, kPanel), panel_blocks = blocks(panels, kPanels),
                panel_size = (depth + 1) * kPanel;
  const int64_t most = std::clamp<int64_t>(kPartial / (panels * panel_size), 1, kParts);
  const int64_t per_part = blocks(blocks(tokens, kSumTokens), most) * kSumTokens, parts = blocks(tokens, per_part);
  std::vector<float> partial(parts * panels * panel_size);
  torch::stable::parallel_for(0, parts * panel_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> patches(kSumTokens * (depth + 1), 1.0f), dy_panel(kSumTokens * kPanel), scratch;
    std::vector<float> over_batch(pos ? kPanels * kSumTokens * kPanel : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / panel_blocks, first_panel = task % panel_blocks * kPanels;
      const int64_t last_panel = std::min(panels, first_panel + kPanels);
      for (int64_t first = part * per_part; first < std::min(tokens, (part + 1) * per_part); first += kSumTokens) {
        const int64_t count = std::min(tokens - first, kSumTokens);
        for (int64_t b = 0; b < batch; ++b) {
          gather(x, grid, b, first, first + count, patches.data(), depth + 1);
          for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            float* sum = pos ? over_batch.data() + (panel - first_panel) * kSumTokens * kPanel : nullptr;
            float* right = pos && b == 0 ? sum : dy_panel.data();
            widen(
                dy, width, b * tokens + first, count, panel * kPanel, std::min(width - panel * kPanel, kPanel), right,
                kPanel);
            add_product(
                depth + 1, kPanel, count, {patches.data(), 1, depth + 1}, right,
                partial.data() + (part * panels + panel) * panel_size, false, true, scratch);
            if (right != sum && pos) add(sum, right, count * kPanel);
          }
        }
        for (int64_t panel = first_panel; pos && panel < last_panel; ++panel) {
          const float* sum = over_batch.data() + (panel - first_panel) * kSumTokens * kPanel;
          const int64_t column = panel * kPanel, columns = std::min(width - column, kPanel);
          narrow(sum, kPanel, count, columns, dpos, first * width + column, width);
        }
      }
    }
  });

  // Adds the parts in order.
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      float* total = partial.data() + panel * panel_size;
      for (int64_t part = 1; part < parts; ++part)
        add(total, partial.data() + (part * panels + panel) * panel_size, panel_size);
      const int64_t column = panel * kPanel, columns = std::min(width - column, kPanel);
      if (bias) narrow(total + depth * kPanel, kPanel, 1, columns, dbias, column, width);
      with_type(dweight.scalar_type(), [&](auto tag) {
        using T = decltype(tag);
        T* out = static_cast<T*>(dweight.mutable_data_ptr()) + column * depth;
        for (int64_t i = 0; i < columns; ++i) {
          for (int64_t k = 0; k < depth; ++k) out[i * depth + k] = static_cast<T>(total[k * kPanel + i]);
        }
      });
    }
  });
  return {dweight, dbias, dpos};
}

// ---- for a long patch, which torch multiplies

Tensor patch_embed_gather(const Tensor& x, int64_t pt, int64_t ph, int64_t pw) {
  const PatchGrid grid = grid_of(x, pt, ph, pw);
  const int64_t batch = x.size(0);
  Tensor patches = empty_like_shape(x, {batch * grid.tokens(), grid.elements()}, x.scalar_type());
  with_element(x.scalar_type(), [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(x.const_data_ptr());
    auto* out = static_cast<decltype(tag)*>(patches.mutable_data_ptr());
    for_video(grid, grid.channels_first(grid.elements()), VideoStrides(x), batch, [=](int64_t v, int64_t t) {
      out[t] = in[v];
    });
  });
  return patches;
}

Tensor patch_embed_scatter(
    const Tensor& patches, int64_t frames, int64_t height, int64_t width, int64_t pt, int64_t ph, int64_t pw,
    int64_t channels) {
  const PatchGrid grid{frames, height, width, pt, ph, pw, channels};
  grid.check();
  STD_TORCH_CHECK(patches.dim() == 2, "patches must be [B*N, C*pt*ph*pw]");
  const int64_t batch = patches.size(0) / grid.tokens();
  check_dense(patches, "patches", {batch * grid.tokens(), grid.elements()});
  Tensor x = empty_like_shape(patches, {batch, channels, frames * pt, height * ph, width * pw}, patches.scalar_type());
  with_element(patches.scalar_type(), [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(patches.const_data_ptr());
    auto* out = static_cast<decltype(tag)*>(x.mutable_data_ptr());
    for_video(grid, grid.channels_first(grid.elements()), VideoStrides(x), batch, [=](int64_t v, int64_t t) {
      out[v] = in[t];
    });
  });
  return x;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&patch_embed_fwd));
  m.impl("patch_embed_bwd", TORCH_BOX(&patch_embed_bwd));
  m.impl("patch_embed_video", TORCH_BOX(&patch_embed_video));
  m.impl("patch_embed_gather", TORCH_BOX(&patch_embed_gather));
  m.impl("patch_embed_scatter", TORCH_BOX(&patch_embed_scatter));
}

} // namespace minisora
