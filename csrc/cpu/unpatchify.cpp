// unpatchify: equation in minisora_kernels/ops/unpatchify.py.
#include "patches.h"

namespace minisora {
namespace {

PatchOrder order_of(const PatchGrid& grid, bool channels_first) {
  return channels_first ? grid.channels_first(grid.elements()) : grid.channels_last();
}

Tensor unpatchify_fwd(
    const Tensor& tokens, int64_t frames, int64_t height, int64_t width, int64_t pt, int64_t ph, int64_t pw,
    int64_t channels, bool channels_first) {
  const PatchGrid grid{frames, height, width, pt, ph, pw, channels};
  grid.check();
  STD_TORCH_CHECK(tokens.dim() == 3, "tokens must be [B, N, pt*ph*pw*C]");
  const int64_t batch = tokens.size(0);
  check_dense(tokens, "tokens", {batch, grid.tokens(), grid.elements()});
  Tensor video =
      empty_like_shape(tokens, {batch, channels, frames * pt, height * ph, width * pw}, tokens.scalar_type());
  with_element(tokens.scalar_type(), [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(tokens.const_data_ptr());
    auto* out = static_cast<decltype(tag)*>(video.mutable_data_ptr());
    for_video(grid, order_of(grid, channels_first), VideoStrides(video), batch, [=](int64_t v, int64_t t) {
      out[v] = in[t];
    });
  });
  return video;
}

Tensor unpatchify_bwd(const Tensor& dvideo, int64_t pt, int64_t ph, int64_t pw, bool channels_first) {
  STD_TORCH_CHECK(dvideo.dim() == 5, "dvideo must be [B, C, T, H, W]");
  STD_TORCH_CHECK(pt > 0 && ph > 0 && pw > 0, "patch must be positive");
  const int64_t batch = dvideo.size(0), channels = dvideo.size(1);
  const PatchGrid grid{dvideo.size(2) / pt, dvideo.size(3) / ph, dvideo.size(4) / pw, pt, ph, pw, channels};
  grid.check();
  check_dtype(dvideo, "dvideo");
  check_shape(dvideo, "dvideo", {batch, channels, grid.frames * pt, grid.height * ph, grid.width * pw});
  Tensor dtokens = empty_like_shape(dvideo, {batch, grid.tokens(), grid.elements()}, dvideo.scalar_type());
  with_element(dvideo.scalar_type(), [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(dvideo.const_data_ptr());
    auto* out = static_cast<decltype(tag)*>(dtokens.mutable_data_ptr());
    for_video(grid, order_of(grid, channels_first), VideoStrides(dvideo), batch, [=](int64_t v, int64_t t) {
      out[t] = in[v];
    });
  });
  return dtokens;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CPU, m) {
  m.impl("unpatchify_fwd", TORCH_BOX(&unpatchify_fwd));
  m.impl("unpatchify_bwd", TORCH_BOX(&unpatchify_bwd));
}

} // namespace minisora
