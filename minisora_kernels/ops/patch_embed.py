"""3-D patch embedding: a convolution with kernel = stride, as a gather and one matrix product.

    y[b, n, :] = weight.flatten(1) @ x[b, :, t*pt:(t+1)*pt, h*ph:(h+1)*ph, w*pw:(w+1)*pw].flatten() + bias + pos[n]

with n = (t, h, w), time-major. Backward; patches do not overlap, so each element of dx belongs to one patch:

    dweight = sum over b, n of dy[b, n]^T patch[b, n]       dbias = sum over b, n of dy[b, n]
    dpos[n] = sum over b of dy[b, n]
    dx = the patches dy @ weight.flatten(1), each in its place

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); 3-D: Arnab et al. 2021 (arXiv 2103.15691).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import cast, check_tensor, kernel_refusal, linear_dtype
from ..derivatives import once
from ..flops import formula
from ..modulation import asked_for, gradient_dtype
from ..shortcut import shortcut


def patches(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``x [B, C, T, H, W]`` as contiguous ``[B, N, C*pt*ph*pw]``, in the order of a flattened Conv3d weight."""
    batch, channels, *size = x.shape
    grid = [n // p for n, p in zip(size, patch, strict=True)]
    x = x.reshape(batch, channels, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    elements = channels * patch[0] * patch[1] * patch[2]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid[0] * grid[1] * grid[2], elements)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    """Gather, ``F.linear``, add: faster than Conv3d, and its output is contiguous. ``x`` and ``weight`` are 5-D."""
    y = F.linear(patches(x, (weight.shape[2], weight.shape[3], weight.shape[4])), weight.flatten(1), bias)
    return y if pos is None else y + pos.to(y.dtype)


# The longest patch, in elements, that the kernel multiplies. Torch multiplies longer ones, after a gather: it blocks
# large products better. Up to this length the kernel keeps pace, stores no patches, and its bits do not depend on the
# number of threads (bench/ops/bench_patch_embed.py times both).
LONGEST_PATCH = 64
# Where the CPU multiplies bfloat16, the forward alone stays ahead for longer: it stores no patches and adds bias and
# positions to the product.
LONGEST_BF16_FORWARD = 128 if backends.cpu_capability() in ("AVX512_BF16", "AMX") else LONGEST_PATCH

# Without AVX-512 torch multiplies 16-bit matrices far more slowly than float32 ones. The kernel converts them and
# multiplies in float32, so it takes patches of any length there.
TORCH_IS_SLOW_IN_16_BIT = torch.backends.cpu.get_cpu_capability() == "AVX2"

define("patch_embed_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? pos) -> Tensor")
define(
    "patch_embed_bwd(Tensor dy, Tensor x, SymInt pt, SymInt ph, SymInt pw, ScalarType? dbias, ScalarType? dpos) "
    "-> (Tensor dweight, Tensor dbias, Tensor dpos)"
)
define("patch_embed_video(Tensor dy, Tensor weight, SymInt frames, SymInt height, SymInt width) -> Tensor dx")
define("patch_embed_gather(Tensor x, SymInt pt, SymInt ph, SymInt pw) -> Tensor")
define(
    "patch_embed_scatter(Tensor patches, SymInt frames, SymInt height, SymInt width, SymInt pt, SymInt ph, SymInt pw, "
    "SymInt channels) -> Tensor"
)


def _tokens(shape, pt, ph, pw):
    return (shape[2] // pt) * (shape[3] // ph) * (shape[4] // pw)


@register_fake("patch_embed_fwd")
def _(x, weight, bias, pos):
    return x.new_empty(x.shape[0], _tokens(x.shape, *weight.shape[2:]), weight.shape[0])


@register_fake("patch_embed_bwd")
def _(dy, x, pt, ph, pw, dbias, dpos):
    _, tokens, width = dy.shape
    return (
        dy.new_empty(width, x.shape[1], pt, ph, pw),
        dy.new_empty(0) if dbias is None else dy.new_empty(width, dtype=dbias),
        dy.new_empty(0) if dpos is None else dy.new_empty((tokens, width), dtype=dpos),
    )


@register_fake("patch_embed_video")
def _(dy, weight, frames, height, width):
    _, channels, pt, ph, pw = weight.shape
    return dy.new_empty(dy.shape[0], channels, frames * pt, height * ph, width * pw)


@register_fake("patch_embed_gather")
def _(x, pt, ph, pw):
    return x.new_empty(x.shape[0] * _tokens(x.shape, pt, ph, pw), x.shape[1] * pt * ph * pw)


@register_fake("patch_embed_scatter")
def _(patches, frames, height, width, pt, ph, pw, channels):
    batch = patches.shape[0] // (frames * height * width)
    return patches.new_empty(batch, channels, frames * pt, height * ph, width * pw)


@formula("patch_embed_fwd")
def _(x, weight, bias, pos, **out):
    return 2 * x[0] * _tokens(x, *weight[2:]) * prod(weight)


@formula("patch_embed_bwd")
def _(dy, x, pt, ph, pw, *asked, **out):
    return 2 * prod(dy) * x[1] * pt * ph * pw


@formula("patch_embed_video")
def _(dy, weight, *grid, **out):
    return 2 * prod(dy) * prod(weight[1:])


def _keep(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> None:
    """Notes what the gradients that are asked for take: x for that of the weight, the weight for that of x."""
    need_x, need_weight, need_bias, need_pos = ctx.needs_input_grad[:4]
    if not (need_x or need_weight or need_bias or need_pos):
        return
    ctx.patch = weight.shape[2:]
    ctx.grid = [n // p for n, p in zip(x.shape[2:], ctx.patch, strict=True)]
    ctx.dtypes = gradient_dtype(bias, need_bias), gradient_dtype(pos, need_pos)
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _sums(dy: Tensor, bias: torch.dtype | None, pos: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    """dbias and dpos by torch."""
    return (
        None if bias is None else dy.sum((0, 1)).to(bias),
        None if pos is None else dy.sum(0, dtype=torch.float32).to(pos),
    )


class _PatchEmbed(torch.autograd.Function):
    """Gather, product, bias and position in one pass, and one pass back."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, pos, backend):
        ctx.backend = backend
        _keep(ctx, x, weight, bias, pos)
        return kernels(backend).patch_embed_fwd(x, weight, bias, pos)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        x, weight = ctx.saved_tensors
        dy, dweight, ops = gradients[0].contiguous(), None, kernels(ctx.backend)
        if x is None:
            dbias, dpos = _sums(dy, *ctx.dtypes)
        else:
            dweight, dbias, dpos = ops.patch_embed_bwd(dy, x, *ctx.patch, *ctx.dtypes)
        dx = None if weight is None else ops.patch_embed_video(dy, weight, *ctx.grid)
        return *asked_for(ctx.needs_input_grad[:4], (dx, dweight, dbias, dpos)), None


class _LongPatchEmbed(torch.autograd.Function):
    """The same with torch's matrix products on gathered patches. The backward gathers the patches again."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, pos, backend):
        ctx.backend = backend
        _keep(ctx, x, weight, bias, pos)
        patch = weight.shape[2:]
        if x.dtype == torch.bfloat16 and weight[0].numel() <= LONGEST_BF16_FORWARD:
            return kernels(ctx.backend).patch_embed_fwd(x, weight, bias, pos)
        patches = kernels(ctx.backend).patch_embed_gather(x, *patch)
        # y is no view of another tensor: a caller may write to it in place, where autograd refuses that of a view.
        y = x.new_empty(x.shape[0], _tokens(x.shape, *patch), weight.shape[0])
        rows, columns = y.view(-1, y.shape[2]), weight.flatten(1).t()
        torch.mm(patches, columns, out=rows) if bias is None else torch.addmm(bias, patches, columns, out=rows)
        return y if pos is None else y.add_(pos)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        x, weight = ctx.saved_tensors
        dy, ops = gradients[0].reshape(-1, gradients[0].shape[-1]), kernels(ctx.backend)
        dx = dweight = None
        if weight is not None:
            dx = ops.patch_embed_scatter(dy @ weight.flatten(1), *ctx.grid, *ctx.patch, weight.shape[1])
        if x is not None:
            dweight = (dy.t() @ ops.patch_embed_gather(x, *ctx.patch)).view(-1, x.shape[1], *ctx.patch)
        return dx, dweight, *_sums(gradients[0], *ctx.dtypes), None


def _kernels(x, weight, bias, pos):
    return kernel_refusal(x=x, weight=weight, bias=bias, pos=pos)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _kernels}


def _check(x, weight, bias, pos) -> tuple[Tensor, Tensor, Tensor | None]:
    op = "patch_embed"
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight, x)
    for name, tensor in (("bias", bias), ("pos", pos)):
        if tensor is not None:
            check_tensor(op, name, tensor, x)
    if weight.dim() not in (4, 5):
        raise ValueError(
            f"{op}: weight must be Conv3d's [D, C, pt, ph, pw] or Conv2d's [D, C, ph, pw], got shape "
            f"{tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; no dimension may be 0")
    if x.dim() != 5 and not (x.dim() == 4 and weight.dim() == 4):
        raise ValueError(
            f"{op}: x must be [B, C, T, H, W] (or [B, C, H, W] with a Conv2d weight), got shape {tuple(x.shape)}"
        )
    x = x.unsqueeze(2) if x.dim() == 4 else x
    weight = weight.unsqueeze(2) if weight.dim() == 4 else weight
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} channels, weight takes {weight.shape[1]}")
    (*_, frames, height, across), (*_, pt, ph, pw) = x.shape, weight.shape
    if 0 in (frames, height, across) or frames % pt or height % ph or across % pw:
        raise ValueError(
            f"{op}: the size of x {tuple(x.shape[2:])} (T, H, W) is not a multiple of the patch "
            f"{tuple(weight.shape[2:])}"
        )
    width = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (width,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; it must be [D] with D = {width}")
    if pos is not None:
        pos = pos.squeeze(0) if pos.dim() == 3 and pos.shape[0] == 1 else pos
        tokens = (frames // pt) * (height // ph) * (across // pw)
        if tuple(pos.shape) != (tokens, width):
            raise ValueError(
                f"{op}: pos has shape {tuple(pos.shape)}; it must be [N, D] or [1, N, D] with N = {tokens}, D = {width}"
            )
    return x, weight, pos


@shortcut
def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos: Tensor | None = None,
    *,
    backend: backends.Name | None = None,
) -> Tensor:
    """Patch embedding: Conv3d or Conv2d with kernel = stride, plus bias and position embedding.

    ``y[b, n] = weight.flatten(1) @ patch[b, n].flatten() + bias + pos[n]``

    Every tensor is differentiable. On the kernels sums are fp32. Where the CPU multiplies bfloat16 (AVX512_BF16, AMX),
    they multiply bfloat16 inputs as they are, as torch does. The kernel gives the same bits for any number of threads.
    Torch multiplies some long patches (more than ``LONGEST_PATCH`` elements); its products repeat for the same number
    of threads.

    Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); 3-D: Arnab et al. 2021 (arXiv 2103.15691).

    Args:
        x: Video ``[B, C, T, H, W]``, or images ``[B, C, H, W]`` with a Conv2d weight; float16, bfloat16, float32, or
            float64 on the reference. A Conv2d weight embeds a video frame by frame.
        weight: ``[D, C, pt, ph, pw]`` or ``[D, C, ph, pw]``, as nn.Conv3d and nn.Conv2d store it.
        bias: ``[D]``, or None.
        pos: Position embedding ``[N, D]`` or ``[1, N, D]``, added in the same pass, or None.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        Tokens ``[B, N, D]``, contiguous, time-major, in x's dtype; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape or device does not fit, the patch does not divide the size of x, or the chosen backend
            refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or weight or bias is of another dtype than
            x outside autocast.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> conv = torch.nn.Conv3d(4, 64, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        >>> patch_embed(torch.randn(2, 4, 3, 8, 8), conv.weight, conv.bias).shape
        torch.Size([2, 48, 64])
    """
    x, weight, pos = _check(x, weight, bias, pos)
    dtype = linear_dtype("patch_embed", x, weight=weight, bias=bias)
    x, weight = cast(x, dtype), cast(weight, dtype)
    bias = None if bias is None else cast(bias, dtype)
    detail = "short" if weight[0].numel() <= LONGEST_PATCH else "long"
    chosen = backends.choose("patch_embed", BACKENDS, x.device, backend, x, weight, bias, pos, detail=detail)
    if chosen == "reference":
        return backends.plain(reference, x, weight, bias, pos)
    weight = weight.contiguous()
    bias, pos = (None if p is None else p.contiguous() for p in (bias, pos))
    if chosen == "triton":  # its kernels take patches of any length
        return backends.apply(_PatchEmbed, x, weight, bias, pos, chosen)
    width, length = weight.flatten(1).shape
    # Where widths are not whole vectors, torch's float32 products may change with the number of threads on any CPU.
    ragged = width % 16 != 0 or length % 16 != 0
    if length <= LONGEST_PATCH or ragged or (TORCH_IS_SLOW_IN_16_BIT and dtype != torch.float32):
        return backends.apply(_PatchEmbed, x, weight, bias, pos, chosen)
    return backends.apply(_LongPatchEmbed, x, weight, bias, pos, chosen)
