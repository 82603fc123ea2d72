"""Small configurations of diffusers' transformers, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

B, TEXT = 2, 6


class Case(NamedTuple):
    cls: str
    config: dict[str, Any]
    inputs: Callable[[torch.dtype], dict[str, Any]]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def steps(dtype: torch.dtype) -> Tensor:
    return torch.tensor([300.0, 800.0], dtype=dtype)


TIMES = torch.tensor([300, 800])
MASK = torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2])


def video(
    channels: int, text: int | None = None, size: tuple[int, int, int] = (2, 4, 8), **others: Any
) -> Callable[[torch.dtype], dict[str, Any]]:
    """A clip, times and text, and what else a model takes: constants, or functions of the dtype."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        found: dict[str, Any] = dict(hidden_states=noise(B, channels, *size, dtype=dtype), timestep=TIMES)
        if text is not None:
            found["encoder_hidden_states"] = noise(B, TEXT, text, dtype=dtype, seed=1)
        return found | {name: each(dtype) if callable(each) else each for name, each in others.items()}

    return inputs


def images(channels: int, **others: Any) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        found = dict(hidden_states=noise(B, channels, 8, 8, dtype=dtype), timestep=TIMES)
        return found | {name: each(dtype) if callable(each) else each for name, each in others.items()}

    return inputs


def rotary(tokens: int, width: int) -> Callable[[torch.dtype], tuple[Tensor, Tensor]]:
    def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = noise(tokens, width).detach()
        angles = angles[:, : width // 2].repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()

    return tables


WAN = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=64,
    num_layers=2,
    rope_max_seq_len=32,
)

CASES = {
    "DiT": Case(
        "DiTTransformer2DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8),
        images(4, class_labels=torch.tensor([1, 5])),
    ),
    "PixArt": Case(
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=32,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        images(
            4,
            encoder_hidden_states=lambda dtype: noise(B, TEXT, 16, dtype=dtype),
            added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
            encoder_attention_mask=MASK,
        ),
    ),
    "Latte": Case(
        "LatteTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            video_length=3,
            caption_channels=16,
            cross_attention_dim=32,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            attention_bias=True,
            num_embeds_ada_norm=1000,
        ),
        video(4, 16, (3, 8, 8)),
    ),
    "CogVideoX": Case(
        "CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        ),
        lambda dtype: dict(
            hidden_states=noise(B, 3, 4, 8, 8, dtype=dtype),
            encoder_hidden_states=noise(B, TEXT, 16, dtype=dtype, seed=1),
            timestep=TIMES,
            image_rotary_emb=rotary(3 * 16, 16)(dtype),
        ),
    ),
    "Wan": Case("WanTransformer3DModel", WAN, video(4, 16)),
    "Wan per token": Case(
        "WanTransformer3DModel", WAN, video(4, 16, timestep=lambda _: TIMES[:, None] - torch.arange(16))
    ),
    "SkyReels": Case("SkyReelsV2Transformer3DModel", WAN, video(4, 16)),
    "WanVACE": Case(
        "WanVACETransformer3DModel",
        WAN | dict(vace_layers=[0, 1], vace_in_channels=6),
        video(4, 16, control_hidden_states=lambda dtype: noise(B, 6, 2, 4, 8, dtype=dtype)),
    ),
    "HunyuanVideo": Case(
        "HunyuanVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        video(
            4,
            16,
            encoder_attention_mask=MASK,
            pooled_projections=lambda dtype: noise(B, 8, dtype=dtype),
            guidance=lambda dtype: torch.tensor([6000.0, 5000.0], dtype=dtype),
        ),
    ),
    "HunyuanVideo15": Case(
        "HunyuanVideo15Transformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            text_embed_dim=16,
            text_embed_2_dim=12,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        video(
            4,
            16,
            timestep=steps,
            encoder_attention_mask=MASK.bool(),
            encoder_hidden_states_2=lambda dtype: noise(B, 4, 12, dtype=dtype),
            encoder_attention_mask_2=torch.ones(B, 4, dtype=torch.bool),
            image_embeds=lambda dtype: noise(B, 3, 8, dtype=dtype),
        ),
    ),
    "LTX": Case(
        "LTXVideoTransformer3DModel",
        dict(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=16,
        ),
        lambda dtype: dict(
            hidden_states=noise(B, 16, 8, dtype=dtype),
            encoder_hidden_states=noise(B, TEXT, 16, dtype=dtype, seed=1),
            timestep=TIMES,
            encoder_attention_mask=MASK,
            num_frames=2,
            height=2,
            width=4,
        ),
    ),
    "Allegro": Case(
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=48,
            caption_channels=16,
            sample_height=4,
            sample_width=8,
            sample_frames=2,
        ),
        video(4, 16, encoder_attention_mask=MASK),
    ),
    "SanaVideo": Case(
        "SanaVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=24,
            cross_attention_dim=48,
            caption_channels=16,
            sample_size=8,
            rope_max_seq_len=32,
        ),
        video(4, 16, encoder_attention_mask=MASK),
    ),
    "Cosmos": Case(
        "CosmosTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=8,
            max_size=(4, 8, 8),
            concat_padding_mask=False,
            extra_pos_embed_type=None,
        ),
        video(4, 16, timestep=steps),
    ),
    "Kandinsky5": Case(
        "Kandinsky5Transformer3DModel",
        dict(
            in_text_dim=16,
            in_text_dim2=12,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        lambda dtype: dict(
            hidden_states=noise(B, 2, 4, 8, 4, dtype=dtype),
            encoder_hidden_states=noise(B, TEXT, 16, dtype=dtype, seed=1),
            timestep=steps(dtype),
            pooled_projections=noise(B, 12, dtype=dtype),
            visual_rope_pos=(torch.arange(2), torch.arange(2), torch.arange(4)),
            text_rope_pos=torch.arange(TEXT),
        ),
    ),
    "Mochi": Case(
        "MochiTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=TEXT,
        ),
        video(4, 16, encoder_attention_mask=MASK.bool()),
    ),
    "Flux": Case(
        "FluxTransformer2DModel",
        dict(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda dtype: dict(
            hidden_states=noise(B, 16, 8, dtype=dtype),
            encoder_hidden_states=noise(B, TEXT, 16, dtype=dtype, seed=1),
            pooled_projections=noise(B, 8, dtype=dtype),
            timestep=steps(dtype) / 1000,
            img_ids=torch.arange(48.0).reshape(16, 3) % 5,
            txt_ids=torch.zeros(TEXT, 3),
        ),
    ),
    "Flux2": Case(
        "Flux2Transformer2DModel",
        dict(
            in_channels=8,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        lambda dtype: dict(
            hidden_states=noise(B, 16, 8, dtype=dtype),
            encoder_hidden_states=noise(B, TEXT, 16, dtype=dtype, seed=1),
            timestep=steps(dtype) / 1000,
            img_ids=torch.arange(64.0).reshape(16, 4) % 5,
            txt_ids=torch.zeros(TEXT, 4),
        ),
    ),
    "Lumina2": Case(
        "Lumina2Transformer2DModel",
        dict(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=32,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(32, 32, 32),
            cap_feat_dim=16,
        ),
        images(
            4,
            encoder_hidden_states=lambda dtype: noise(B, TEXT, 16, dtype=dtype, seed=1),
            encoder_attention_mask=torch.ones(B, TEXT, dtype=torch.bool),
        ),
    ),
    "SD3": Case(
        "SD3Transformer2DModel",
        dict(
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        images(
            4,
            encoder_hidden_states=lambda dtype: noise(B, TEXT, 16, dtype=dtype, seed=1),
            pooled_projections=lambda dtype: noise(B, 8, dtype=dtype),
        ),
    ),
    "QwenImage": Case(
        "QwenImageTransformer2DModel",
        dict(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda dtype: dict(
            hidden_states=noise(B, 16, 16, dtype=dtype),
            encoder_hidden_states=noise(B, TEXT, 16, dtype=dtype, seed=1),
            encoder_hidden_states_mask=torch.ones(B, TEXT, dtype=torch.bool),
            timestep=steps(dtype) / 1000,
            img_shapes=[[(1, 4, 4)]] * B,
        ),
    ),
}
