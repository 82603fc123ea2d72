"""3-D patch embedding: a convolution whose kernel is its stride, as a gather and one matrix product.

    y[b, (t, h, w), :] = weight.flatten(1) @ x[b, :, t*pt:(t+1)*pt, h*ph:(h+1)*ph, w*pw:(w+1)*pw].flatten() + bias + pos[n]

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); 3-D: Arnab et al. 2021 (arXiv 2103.15691).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..modulation import FLOATS, compute_dtype


def patches(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``x [B, C, T, H, W]`` as contiguous ``[B, N, C*pt*ph*pw]``, in the order of a flattened Conv3d weight."""
    batch, channels, *size = x.shape
    grid = [n // p for n, p in zip(size, patch, strict=True)]
    x = x.reshape(batch, channels, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid[0] * grid[1] * grid[2], -1)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    """Gather, ``F.linear``, add: faster than Conv3d, and its output is contiguous. ``x`` and ``weight`` are 5-D."""
    y = F.linear(patches(x, (weight.shape[2], weight.shape[3], weight.shape[4])), weight.flatten(1), bias)
    return y if pos is None else y + pos.to(y.dtype)


BACKENDS: backends.Table = {"reference": lambda *_: None}


def _check(x, weight, bias, pos) -> tuple[Tensor, Tensor, Tensor | None]:
    op = "patch_embed"
    tensors = {"x": x, "weight": weight, "bias": bias, "pos": pos}
    for name, tensor in tensors.items():
        if tensor is None and name in ("bias", "pos"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it may be float16, bfloat16, float32 or float64")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x is on {x.device}; they must be on one device")
    if weight.dim() not in (4, 5):
        raise ValueError(
            f"{op}: weight must be Conv3d's [D, C, pt, ph, pw] or Conv2d's [D, C, ph, pw], got shape {tuple(weight.shape)}"
        )
    if x.dim() != 5 and not (x.dim() == 4 and weight.dim() == 4):
        raise ValueError(
            f"{op}: x must be [B, C, T, H, W] (or [B, C, H, W] with a Conv2d weight), got shape {tuple(x.shape)}"
        )
    x = x.unsqueeze(2) if x.dim() == 4 else x
    weight = weight.unsqueeze(2) if weight.dim() == 4 else weight
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} channels, weight takes {weight.shape[1]}")
    size, patch = tuple(x.shape[2:]), tuple(weight.shape[2:])
    if any(n == 0 or n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"{op}: the size of x {size} (T, H, W) is not a multiple of the patch {patch}")
    width = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (width,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; it must be [D] with D = {width}")
    if pos is not None:
        pos = pos.squeeze(0) if pos.dim() == 3 and pos.shape[0] == 1 else pos
        tokens = (size[0] // patch[0]) * (size[1] // patch[1]) * (size[2] // patch[2])
        if tuple(pos.shape) != (tokens, width):
            raise ValueError(
                f"{op}: pos has shape {tuple(pos.shape)}; it must be [N, D] or [1, N, D] with N = {tokens}, D = {width}"
            )
    return x, weight, pos


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Conv3d (or Conv2d) with kernel = stride, plus bias and position embedding. Differentiable in every tensor.

    Args:
        x: ``[B, C, T, H, W]``, or ``[B, C, H, W]`` with a Conv2d weight; float16, bfloat16, float32 (float64: reference
            only). A 5-D x with a Conv2d weight is embedded frame by frame.
        weight: ``[D, C, pt, ph, pw]`` or ``[D, C, ph, pw]``, as nn.Conv3d and nn.Conv2d keep it.
        bias: ``[D]``.
        pos: position embedding ``[N, D]`` or ``[1, N, D]``, added in the same pass.
        backend: ``None`` chooses; a name runs that backend or raises.

    Returns:
        tokens ``[B, N, D]``, contiguous, time-major, in x's dtype; inside autocast in autocast's dtype. Sums are fp32.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`minisora_kernels.adaln`; a size that the patch does not divide.
    """
    x, weight, pos = _check(x, weight, bias, pos)
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    backends.choose("patch_embed", BACKENDS, x.device, backend, x, weight, bias, pos)
    return reference(x, weight, bias, pos)
