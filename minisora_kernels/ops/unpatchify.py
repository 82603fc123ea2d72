"""Tokens back to a video: the inverse of the gather of patch embedding, with channels last or first inside a patch.

    video[b, c, t*pt + i, h*ph + j, w*pw + k] = tokens[b, (t, h, w), ((i * ph + j) * pw + k) * C + c]
                                             or tokens[b, (t, h, w), ((c * pt + i) * ph + j) * pw + k]

Source: Peebles & Xie 2022 (arXiv 2212.09748). The backward is the inverse map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import check_flag, kernel_refusal, sizes, whole
from ..derivatives import once
from ..modulation import check_tokens
from ..shortcut import shortcut


def reference(
    tokens: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int, channels_first: bool = False
) -> Tensor:
    """The map in plain PyTorch. ``grid`` and ``patch`` are triples."""
    if channels_first:
        x = tokens.reshape(tokens.shape[0], *grid, channels, *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
    else:
        x = tokens.reshape(tokens.shape[0], *grid, *patch, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(tokens.shape[0], channels, *(n * p for n, p in zip(grid, patch, strict=True))).contiguous()


define(
    "unpatchify_fwd(Tensor tokens, SymInt frames, SymInt height, SymInt width, SymInt pt, SymInt ph, SymInt pw, "
    "SymInt channels, bool channels_first) -> Tensor"
)
define("unpatchify_bwd(Tensor dvideo, SymInt pt, SymInt ph, SymInt pw, bool channels_first) -> Tensor")


@register_fake("unpatchify_fwd")
def _(tokens, frames, height, width, pt, ph, pw, channels, channels_first):
    return tokens.new_empty(tokens.shape[0], channels, frames * pt, height * ph, width * pw)


@register_fake("unpatchify_bwd")
def _(dvideo, pt, ph, pw, channels_first):
    batch, channels, frames, height, width = dvideo.shape
    count = (frames // pt) * (height // ph) * (width // pw)
    return dvideo.new_empty(batch, count, pt * ph * pw * channels)


class _Unpatchify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, grid, patch, channels, channels_first, backend):
        ctx.patch, ctx.channels_first, ctx.backend = patch, channels_first, backend
        return kernels(ctx.backend).unpatchify_fwd(tokens, *grid, *patch, channels, channels_first)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        return kernels(ctx.backend).unpatchify_bwd(gradients[0], *ctx.patch, ctx.channels_first), *(None,) * 5


def _kernels(tokens):
    return kernel_refusal(tokens=tokens)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _kernels}


@shortcut
def unpatchify(
    tokens: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    channels: int,
    *,
    channels_first: bool = False,
    backend: backends.Name | None = None,
) -> Tensor:
    """Tokens back to a video: ``[B, N, pt*ph*pw*C]`` to ``[B, C, T, H, W]``. Differentiable.

    ``video[b, c, t*pt + i, h*ph + j, w*pw + k] = tokens[b, (t, h, w), ((i * ph + j) * pw + k) * C + c]``; with
    ``channels_first`` it is ``tokens[b, (t, h, w), ((c * pt + i) * ph + j) * pw + k]``.

    Source: Peebles & Xie 2022 (arXiv 2212.09748).

    Args:
        tokens: ``[B, N, pt*ph*pw*C]``; float16, bfloat16, float32, or float64 on the
            reference.
        grid: Tokens per axis, ``(T', H', W')``; ``(H', W')`` for images.
        patch: Pixels of a patch per axis, ``(pt, ph, pw)``; ``(ph, pw)`` for images.
        channels: Channels C of the video.
        channels_first: Whether a token has its numbers in the order (C, pt, ph, pw), as a Conv3d's weight has them;
            else in (pt, ph, pw, C).
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, C, T'*pt, H'*ph, W'*pw]``, contiguous, in the dtype of the tokens; ``[B, C, H, W]`` for images.

    Raises:
        ValueError: A shape or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> unpatchify(torch.randn(2, 3 * 4 * 4, 1 * 2 * 2 * 8), (3, 4, 4), (1, 2, 2), channels=8).shape
        torch.Size([2, 8, 3, 8, 8])
    """
    check_tokens("unpatchify", "tokens", tokens)
    grid, patch = sizes("unpatchify", "grid", grid), sizes("unpatchify", "patch", patch)
    channels = whole("unpatchify", "channels", channels)
    if len(grid) not in (2, 3) or len(grid) != len(patch) or any(n < 1 for n in (*grid, *patch)):
        raise ValueError(
            f"unpatchify: grid is {tuple(grid)} and patch is {tuple(patch)}; both must be (T, H, W) or both (H, W), "
            "positive"
        )
    if channels < 1:
        raise ValueError(f"unpatchify: channels is {channels}; it must be positive")
    grid3, patch3 = ((1,) * (3 - len(grid)) + tuple(value) for value in (grid, patch))
    count = grid3[0] * grid3[1] * grid3[2]
    width = patch3[0] * patch3[1] * patch3[2] * channels
    if tokens.shape[1] != count or tokens.shape[2] != width:
        raise ValueError(
            f"unpatchify: tokens have shape {tuple(tokens.shape)}; grid {tuple(grid)}, patch {tuple(patch)} and "
            f"{channels} channels need [B, {count}, {width}]"
        )
    check_flag("unpatchify", "channels_first", channels_first)
    chosen = backends.choose("unpatchify", BACKENDS, tokens.device, backend, tokens)
    if chosen == "reference":
        video = backends.plain(reference, tokens, grid3, patch3, channels, channels_first)
    else:
        video = backends.apply(_Unpatchify, tokens.contiguous(), grid3, patch3, channels, channels_first, chosen)
    return video.squeeze(2) if len(grid) == 2 else video
