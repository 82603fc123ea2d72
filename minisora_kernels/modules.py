"""Modules over the ops, for code of one's own. Each has the state dict of what it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_flag
from .modulation import Norm
from .ops.adaln import adaln
from .ops.attention import attention
from .ops.gate_residual import gate_residual
from .ops.gelu_mlp import gelu_mlp
from .ops.glu_mlp import ACTIVATIONS, Activation, gated, glu_mlp
from .ops.patch_embed import patch_embed
from .ops.window_attention import Rope, window_attention


def is_plain(*modules: nn.Module) -> bool:
    """Whether the weights of these Linears and convolutions are all that they compute with.

    A Linear of another class, as peft puts one in its place, shows the ``weight`` of the layer beneath and adds more to
    it; a hook may change what goes in or comes out.
    """
    return all(
        type(module) in (nn.Linear, nn.Conv2d, nn.Conv3d)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        for module in modules
    )


def mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """Linear, tanh-GELU, Linear: by the op where both are plain, else each is called as it is."""
    if is_plain(fc1, fc2):
        return gelu_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return fc2(F.gelu(fc1(x), approximate="tanh"))


class PatchEmbed3d(nn.Conv3d):
    """Patches of a video as tokens: an ``nn.Conv3d`` with kernel = stride, whose state dict it has.

    Args:
        in_channels: Channels of the video.
        dim: Width of a token.
        patch: Size of a patch, ``(pt, ph, pw)``.
        bias: Whether there is a bias.

    Examples:
        >>> PatchEmbed3d(4, 64, (1, 2, 2))(torch.randn(2, 4, 3, 8, 8)).shape
        torch.Size([2, 48, 64])
    """

    def __init__(self, in_channels: int, dim: int, patch: Sequence[int], bias: bool = True) -> None:
        size = tuple(patch)
        if len(size) != 3:
            raise ValueError(f"PatchEmbed3d: patch is {size}; it must be three numbers (pt, ph, pw)")
        super().__init__(in_channels, dim, kernel_size=size, stride=size, bias=bias)

    def forward(self, video: Tensor, pos: Tensor | None = None) -> Tensor:
        """``[B, C, T, H, W]`` to tokens ``[B, N, D]``, plus positions ``[N, D]`` if there are."""
        return patch_embed(video, self.weight, self.bias, pos=pos)


class AdaLayerNorm(nn.Module):
    """``norm(x) * (1 + scale) + shift``, with the state dict of ``nn.LayerNorm`` or ``nn.RMSNorm``.

    Args:
        dim: Width of a token.
        norm: ``"layer"`` or ``"rms"``.
        eps: Constant of the norm.
        elementwise_affine: Whether the norm has a weight.
        bias: Whether it has a bias beside the weight; an RMS norm has none.

    Examples:
        >>> x, rows = torch.randn(2, 12, 64), torch.randn(2, 128)
        >>> AdaLayerNorm(64)(x, *rows.chunk(2, dim=-1)).shape
        torch.Size([2, 12, 64])
    """

    def __init__(
        self, dim: int, norm: Norm = "layer", eps: float = 1e-6, elementwise_affine: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        if norm not in ("layer", "rms"):
            raise ValueError(f"AdaLayerNorm: norm is {norm!r}; it may be 'layer' or 'rms'")
        if bias and (norm == "rms" or not elementwise_affine):
            raise ValueError("AdaLayerNorm: bias is True; it needs norm='layer' and elementwise_affine=True")
        self.norm, self.eps = norm, eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` and rows ``[B, D]`` or ``[B, R, D]``."""
        return adaln(x, shift, scale, weight=self.weight, bias=self.bias, norm=self.norm, eps=self.eps)


class GeluMLP(nn.Module):
    """Linear, tanh-GELU, Linear, with the state dict of timm's ``Mlp``: ``fc1`` and ``fc2``.

    Where one of them is no plain ``nn.Linear`` any more (LoRA, a quantised weight, a hook), it is called as it is.

    Examples:
        >>> GeluMLP(64, 256)(torch.randn(2, 12, 64)).shape
        torch.Size([2, 12, 64])
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias), nn.Linear(hidden, dim if out is None else out, bias)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1, self.fc2)


class GluMLP(nn.Module):
    """Linear, a gated linear unit, Linear, with the state dict of timm's ``GluMlp``: ``fc1`` of both halves, ``fc2``.

    timm's ``SwiGLUPacked`` is the default here; GEGLU is ``activation="gelu", gate_first=False``. The sigmoid that is
    timm's default is not among the activations.

    Where one of them is no plain ``nn.Linear`` any more (LoRA, a quantised weight, a hook), it is called as it is.

    Args:
        dim: Width of a token.
        hidden: Width of a half, which timm's ``hidden_features`` is twice of.
        out: Width of the result, or None for ``dim``.
        bias: Whether the Linears have a bias.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        gate_first: Whether the first half is the gate.

    Examples:
        >>> GluMLP(64, 128)(torch.randn(2, 12, 64)).shape
        torch.Size([2, 12, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        out: int | None = None,
        bias: bool = True,
        activation: Activation = "silu",
        gate_first: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"GluMLP: activation is {activation!r}; it may be {', '.join(map(repr, ACTIVATIONS))}")
        check_flag("GluMLP", "gate_first", gate_first)
        self.activation: Activation = activation
        self.gate_first = gate_first
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden, bias), nn.Linear(hidden, dim if out is None else out, bias)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if is_plain(fc1, fc2):
            options: dict[str, Any] = dict(activation=self.activation, gate_first=self.gate_first)
            return glu_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, **options)
        first, second = fc1(x).chunk(2, dim=-1)
        return fc2(gated(first, second, self.activation, self.gate_first))


class GatedResidual(nn.Module):
    """``x + gate * branch``; it has no parameters.

    Examples:
        >>> x = torch.ones(1, 4, 8)
        >>> GatedResidual()(x, x, torch.full((1, 8), 0.5))[0, 0, 0]
        tensor(1.5000)
    """

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        """Tokens ``[B, N, D]``, the branch like them, and rows ``[B, D]`` or ``[B, R, D]``."""
        return gate_residual(x, branch, gate)


class WindowAttention(nn.Module):
    """Attention in windows of the grid, with the state dict of timm's ``Attention``.

    Args:
        dim: Width of a token.
        heads: Number of heads; it divides ``dim``.
        qkv_bias: Whether the projection to q, k and v has a bias.
        qk_norm: Norm of q and k over a head: None, ``"rms"`` or ``"layer"``, which has no bias.
        eps: Constant of that norm.

    Examples:
        >>> WindowAttention(64, 4)(torch.randn(2, 24, 64), grid=(2, 3, 4), window=(2, 1, 1)).shape
        torch.Size([2, 24, 64])
    """

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool = True, qk_norm: Norm | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"WindowAttention: heads is {heads}; it must divide dim = {dim}")
        if qk_norm not in (None, "rms", "layer"):
            raise ValueError(f"WindowAttention: qk_norm is {qk_norm!r}; it may be None, 'rms' or 'layer'")
        self.heads, self.qk_norm, self.eps = heads, qk_norm, eps
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = self._norm(dim // heads), self._norm(dim // heads)

    def _norm(self, width: int) -> nn.RMSNorm | nn.LayerNorm | None:
        if self.qk_norm is None:
            return None
        return nn.RMSNorm(width, self.eps) if self.qk_norm == "rms" else nn.LayerNorm(width, self.eps, bias=False)

    def forward(
        self, x: Tensor, grid: Sequence[int], window: Sequence[int] | None = None, rope: Rope | None = None
    ) -> Tensor:
        """Tokens ``[B, N, D]`` of a grid ``(T, H, W)``; without a window, each attends to all."""
        y = window_attention(
            self.qkv(x).unflatten(-1, (3, self.heads, -1)),
            grid,
            grid if window is None else window,
            q_weight=None if self.q_norm is None else self.q_norm.weight,
            k_weight=None if self.k_norm is None else self.k_norm.weight,
            qk_norm=self.qk_norm,
            rope=rope,
            eps=self.eps,
        )
        return self.proj(y)


class CrossAttention(nn.Module):
    """Attention of tokens to text, with the state dict of PixArt's ``MultiHeadCrossAttention``, which STDiT has too.

    Args:
        dim: Width of a token, and of the text.
        heads: Number of heads; it divides ``dim``.

    Examples:
        >>> x, text = torch.randn(2, 24, 64), torch.randn(2, 7, 64)
        >>> CrossAttention(64, 4)(x, text, lengths=torch.tensor([7, 3])).shape
        torch.Size([2, 24, 64])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"CrossAttention: heads is {heads}; it must divide dim = {dim}")
        self.heads = heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens ``[B, N, D]`` and text ``[B, M, D]``, of which ``lengths [B]`` or ``mask [B, M]`` say what counts."""
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.q_linear(x).unflatten(-1, (self.heads, -1))
        return self.proj(attention(q, k, v, lengths=lengths, mask=mask))
