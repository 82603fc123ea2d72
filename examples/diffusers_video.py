"""A video transformer of diffusers, sampled for a few steps with and without the ops.

    pip install -e '.[pretrained]'
    python examples/diffusers_video.py

The weights are random and the model is small, so that nothing is downloaded. With a pipeline it is the same one line:
``mk.fuse(pipe.transformer)``.
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

import minisora_kernels as mk


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=32,
        ffn_dim=512,
        num_layers=2,
        rope_max_seq_len=64,
    ).eval()


@torch.no_grad()
def sample(model: WanTransformer3DModel, steps: int = 4) -> torch.Tensor:
    """Euler steps of a flow from noise to a clip."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(1, 4, 4, 16, 16, generator=generator)
    text = torch.randn(1, 12, 64, generator=generator)
    for i in range(steps):
        timestep = torch.tensor([1000 * (1 - i / steps)])
        velocity = model(clip, timestep, text, return_dict=False)[0]
        clip = clip - velocity / steps
    return clip


def main() -> None:
    torch.manual_seed(0)
    model = transformer()
    before = sample(model)
    with mk.fuse(model) as fused:
        after = sample(model)
    print(fused.report())
    print(f"largest difference: {(after - before).abs().max():.1e} of {before.abs().max():.1f}")
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
