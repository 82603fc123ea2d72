"""The models of ``bench.fuse``: two layers of diffusers' transformers, 512 to 576 wide, 8 x 8 x 8 tokens, batch 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BATCH, TEXT, LAYERS = 2, 64, 2
TIMES = torch.tensor([300, 800])
MASK = (torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT // 2]])).long()

Inputs = Callable[[torch.dtype], dict[str, Any]]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def clip(*shape: int, text: int, **others: Any) -> Inputs:
    """A clip of that shape, times, text, and what else a model takes: constants, or functions of the dtype."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        found: dict[str, Any] = dict(hidden_states=normal(BATCH, *shape, dtype=dtype), timestep=TIMES)
        found["encoder_hidden_states"] = normal(BATCH, TEXT, text, dtype=dtype, seed=1)
        return found | {name: each(dtype) if callable(each) else each for name, each in others.items()}

    return inputs


def rotary(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = normal(512, 32, dtype=torch.float32).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


HEADS = dict(num_attention_heads=8, attention_head_dim=64, num_layers=LAYERS)

# The class of diffusers, its configuration, and inputs for a dtype.
MODELS: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "DiT": (
        "DiTTransformer2DModel",
        dict(**HEADS, in_channels=4, sample_size=32),
        lambda dtype: dict(
            hidden_states=normal(BATCH, 4, 32, 32, dtype=dtype), timestep=TIMES, class_labels=torch.tensor([1, 5])
        ),
    ),
    "Latte": (
        "LatteTransformer3DModel",
        dict(
            **HEADS,
            in_channels=4,
            out_channels=8,
            sample_size=16,
            patch_size=2,
            video_length=8,
            caption_channels=256,
            cross_attention_dim=512,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            attention_bias=True,
            num_embeds_ada_norm=1000,
        ),
        clip(4, 8, 16, 16, text=256),
    ),
    "CogVideoX": (
        "CogVideoXTransformer3DModel",
        dict(
            **HEADS,
            in_channels=4,
            out_channels=4,
            time_embed_dim=256,
            text_embed_dim=256,
            sample_width=16,
            sample_height=16,
            sample_frames=29,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        ),
        clip(8, 4, 16, 16, text=256, image_rotary_emb=rotary),
    ),
    "Wan": (
        "WanTransformer3DModel",
        dict(**HEADS, in_channels=4, out_channels=4, text_dim=256, freq_dim=256, ffn_dim=2048, rope_max_seq_len=64),
        clip(4, 8, 16, 16, text=256),
    ),
    "LTX": (
        "LTXVideoTransformer3DModel",
        dict(**HEADS, in_channels=32, out_channels=32, cross_attention_dim=512, caption_channels=256),
        clip(512, 32, text=256, encoder_attention_mask=MASK, num_frames=8, height=8, width=8),
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel",
        dict(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_single_layers=LAYERS,
            num_refiner_layers=1,
            text_embed_dim=256,
            pooled_projection_dim=128,
            rope_axes_dim=(16, 24, 24),
        ),
        clip(
            *(4, 8, 16, 16),
            text=256,
            encoder_attention_mask=MASK,
            pooled_projections=lambda dtype: normal(BATCH, 128, dtype=dtype),
            guidance=lambda dtype: torch.tensor([6000.0, 5000.0], dtype=dtype),
        ),
    ),
    "Cosmos": (
        "CosmosTransformer3DModel",
        dict(
            **{**HEADS, "attention_head_dim": 72},
            in_channels=4,
            out_channels=4,
            text_embed_dim=256,
            adaln_lora_dim=64,
            max_size=(8, 16, 16),
            concat_padding_mask=False,
            extra_pos_embed_type=None,
        ),
        clip(4, 8, 16, 16, text=256, timestep=lambda dtype: TIMES.to(dtype)),
    ),
    "Kandinsky5": (
        "Kandinsky5Transformer3DModel",
        dict(
            in_text_dim=256,
            in_text_dim2=128,
            time_dim=256,
            model_dim=512,
            ff_dim=2048,
            num_text_blocks=1,
            num_visual_blocks=LAYERS,
        ),
        clip(
            *(8, 16, 16, 4),
            text=256,
            timestep=lambda dtype: TIMES.to(dtype),
            pooled_projections=lambda dtype: normal(BATCH, 128, dtype=dtype),
            visual_rope_pos=(torch.arange(8), torch.arange(8), torch.arange(8)),
            text_rope_pos=torch.arange(TEXT),
        ),
    ),
}
