// The map between a video [B, C, T, H, W] and its patches: which elements of the video belong to each token of a grid.
#pragma once

#include "common.h"

namespace minisora {

// Distances between neighbouring tokens, and between neighbouring elements of a patch inside a token.
struct PatchOrder {
  int64_t token, channel, frame, row, column;
};

struct PatchGrid {
  int64_t frames, height, width; // tokens per axis
  int64_t pt, ph, pw, channels;

  int64_t tokens() const { return frames * height * width; }
  int64_t elements() const { return pt * ph * pw * channels; }
  PatchOrder channels_first(int64_t token) const { return {token, pt * ph * pw, ph * pw, pw, 1}; }
  PatchOrder channels_last() const { return {elements(), 1, ph * pw * channels, pw * channels, channels}; }

  void check() const {
    for (const int64_t size : {frames, height, width, pt, ph, pw, channels}) {
      STD_TORCH_CHECK(size > 0, "grid, patch and channels must be positive, got ", size);
    }
  }
};

// Distances between neighbouring elements of a video along B, C, T, H, W.
struct VideoStrides {
  int64_t batch, channel, frame, row, column;

  explicit VideoStrides(const Tensor& video)
      : batch(video.stride(0)), channel(video.stride(1)), frame(video.stride(2)), row(video.stride(3)), column(video.stride(4)) {}
};

// f(video offset, token offset) for the elements of tokens [first, last) of sample b, in the order of the video's lines.
// The token offset counts from the first token.
template <class Width, class Step, class F>
inline void for_elements(
    Width pw, Step column, const PatchGrid& grid, const PatchOrder& order, const VideoStrides& strides, int64_t b, int64_t first,
    int64_t last, F f) {
  for (int64_t n = first; n < last;) {
    const int64_t line = n / grid.width, w = n % grid.width;
    const int64_t count = std::min(last - n, grid.width - w);
    const int64_t t = line / grid.height, h = line % grid.height;
    for (int64_t c = 0; c < grid.channels; ++c) {
      for (int64_t i = 0; i < grid.pt; ++i) {
        for (int64_t j = 0; j < grid.ph; ++j) {
          int64_t video = b * strides.batch + c * strides.channel + (t * grid.pt + i) * strides.frame +
              (h * grid.ph + j) * strides.row + w * pw * column;
          int64_t token = (n - first) * order.token + c * order.channel + i * order.frame + j * order.row;
          for (int64_t m = 0; m < count; ++m) {
            for (int64_t k = 0; k < pw; ++k) f(video + k * column, token + k * order.column);
            video += pw * column;
            token += order.token;
          }
        }
      }
    }
    n += count;
  }
}

template <class F>
inline void for_elements(
    const PatchGrid& grid, const PatchOrder& order, const VideoStrides& strides, int64_t b, int64_t first, int64_t last, F f) {
  const auto with_width = [&](auto pw) {
    if (strides.column == 1) {
      for_elements(pw, std::integral_constant<int64_t, 1>{}, grid, order, strides, b, first, last, f);
    } else {
      for_elements(pw, strides.column, grid, order, strides, b, first, last, f);
    }
  };
  switch (grid.pw) {
    case 1:
      return with_width(std::integral_constant<int64_t, 1>{});
    case 2:
      return with_width(std::integral_constant<int64_t, 2>{});
    default:
      return with_width(grid.pw);
  }
}

// for_elements over a whole video, a line of tokens at a time; f(video index, token index).
template <class F>
inline void for_video(const PatchGrid& grid, const PatchOrder& order, const VideoStrides& strides, int64_t batch, F f) {
  const int64_t lines = grid.frames * grid.height, per_line = grid.width * order.token;
  const int64_t grain = std::max<int64_t>(1, 16384 / per_line);
  torch::stable::parallel_for(0, batch * lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line % lines * grid.width, base = line * per_line;
      for_elements(grid, order, strides, line / lines, n, n + grid.width, [&](int64_t video, int64_t token) { f(video, base + token); });
    }
  });
}

// A copy of 2- and 4-byte elements does not depend on their type.
template <class F>
inline void with_element(ScalarType dtype, F&& f) {
  dtype == ScalarType::Float ? f(uint32_t{}) : f(uint16_t{});
}

} // namespace minisora
