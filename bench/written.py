"""A factorized video DiT as code bases write it: the column ``as written`` of the model benches.

The same function of the same parameters, by name, as ``models.dit.DiT`` with factorized attention: Conv3d whose strided
output nobody makes contiguous, rearranges to (B T) S D and (B S) T D and back for every block, the condition repeated
for every frame and every place, LayerNorm and modulation op by op, SDPA for sequences of any length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.denoisers.dit import DiT
from models.denoisers.layers import LabelEmbedder, TimestepEmbedder
from models.protocols import Denoiser


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads).unbind(0)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def norm(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return modulate(self.norm_final(x), shift, scale)


class Embedder(nn.Module):
    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d t h w -> b (t h w) d")


class WrittenDiT(Denoiser):
    """Takes the parameters of ``model``, a factorized, class-conditional DiT with a MLP of four times its width."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        config = model.config
        self.config, self.null_class, self.out_channels = config, model.null_class, model.out_channels
        self.x_embedder = Embedder(config.channels, config.width, config.patch)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width, config.class_dropout)
        self.pos_embed = nn.Parameter(torch.empty_like(model.pos_embed), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        patch_elements = model.final_layer.linear.out_features
        self.final_layer = FinalLayer(config.width, patch_elements)
        self.to(model.pos_embed.device, model.pos_embed.dtype)
        self.load_state_dict(model.state_dict())

    def trunk(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, N, D]`` after the blocks, and normalised for the last Linear."""
        frames, height, width = self.config.grid
        places = height * width
        for i, block in enumerate(self.blocks):
            if i % 2 == 0:
                x = rearrange(x, "b (t s) d -> (b t) s d", t=frames)
                x = block(x, repeat(c, "b d -> (b t) d", t=frames))
                x = rearrange(x, "(b t) s d -> b (t s) d", t=frames)
            else:
                x = rearrange(x, "b (t s) d -> (b s) t d", t=frames)
                x = block(x, repeat(c, "b d -> (b s) d", s=places))
                x = rearrange(x, "(b s) t d -> b (t s) d", s=places)
        return x, self.final_layer.norm(x, c)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t, self.pos_embed.dtype) + self.y_embedder(y)
        _, x = self.trunk(self.x_embedder(x) + self.pos_embed, c)
        (t1, h, w), (pt, ph, pw) = self.config.grid, self.config.patch
        x = self.final_layer.linear(x)
        return rearrange(
            x, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t1, h=h, w=w, pt=pt, ph=ph, pw=pw
        ).contiguous()
