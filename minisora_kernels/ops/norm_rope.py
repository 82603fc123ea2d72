"""Norm and rotary embedding of queries or keys in one pass. The norm is over each head or across all of them.

    h = norm(x)                     x [B, N, heads, head_dim]; norm over head_dim, or over heads x head_dim together
    z = h * weight + bias           [head_dim] or [heads, head_dim]
    y = rotate(z)                   pair i of a head turns by the angle of its token: (a c - b s, a s + b c)

Sources: QK-norm, Dehghani et al. 2023 (arXiv 2302.05442); rotary embedding, Su et al. 2021 (arXiv 2104.09864).

Backward. The rotation goes back by the opposite angle. With r = 1 / rms(x), or 1 / std(x), and means over what the norm
is over:

    dz = rotate^T(dy)        dweight = sum dz * h        dbias = sum dz        dh = dz * weight
    dx = r * (dh - mean(dh) - h * mean(dh * h))          (without mean(dh) for "rms")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import check_flag, check_tensor, compute_dtype, kernel_refusal, number, sizes, whole
from ..derivatives import once
from ..modulation import Norm, asked_for
from ..shortcut import shortcut

NORMS = {None: 0, "rms": 1, "layer": 2}


class Rope(NamedTuple):
    """Rotary tables with one row per token: ``cos`` and ``sin`` are ``[N, head_dim / 2]``; column i rotates pair i.

    Pair i is channels ``(2i, 2i + 1)`` if ``interleaved`` (diffusers' video models), else ``(i, i + head_dim / 2)``.
    ``norm_rope`` and ``attention`` also take a row per token and head, ``[N, heads, head_dim / 2]``, and per sample,
    ``[B or 1, N, heads or 1, head_dim / 2]``.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True

    @classmethod
    def from_pairs(cls, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Rope:
        """Tables as diffusers has them, ``[..., head_dim]``, where each angle stands at both channels of its pair.

        Raises:
            ValueError: another shape, or a pair with two angles.
            TypeError: no tensor.

        Examples:
            >>> angle = torch.randn(12, 8).repeat_interleave(2, dim=-1)
            >>> Rope.from_pairs(angle.cos(), angle.sin()).cos.shape
            torch.Size([12, 8])
        """
        check_flag("Rope.from_pairs", "interleaved", interleaved)
        halves = []
        for name, table in (("cos", cos), ("sin", sin)):
            check_tensor("Rope.from_pairs", name, table, cos, "cos")
            if table.dim() not in (2, 3, 4) or table.shape[-1] % 2 or not table.shape[-1]:
                raise ValueError(
                    f"Rope.from_pairs: {name} has shape {tuple(table.shape)}; it must be [N, head_dim], "
                    "[N, heads, head_dim] or [B, N, heads, head_dim], head_dim even"
                )
            if table.shape != cos.shape:
                raise ValueError(
                    f"Rope.from_pairs: sin has shape {tuple(sin.shape)}; it must be that of cos, {tuple(cos.shape)}"
                )
            pair = table.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else table.chunk(2, dim=-1)
            if not torch.equal(*pair):
                other = "half a head away" if interleaved else "its neighbour"
                raise ValueError(
                    f"Rope.from_pairs: {name} has two angles for a pair of channels; with "
                    f"interleaved={not interleaved} the partner of a channel is {other}"
                )
            halves.append(pair[0].contiguous())
        return cls(halves[0], halves[1], interleaved)

    def padded(self, before: int = 0, after: int = 0) -> Rope:
        """The tables with rows before and after them for tokens that do not turn, as text beside a video.

        Examples:
            >>> rope_3d((2, 2, 3), 16).padded(before=5).cos.shape
            torch.Size([17, 8])
        """
        for name, value in (("before", before), ("after", after)):
            if whole("Rope.padded", name, value) < 0:
                raise ValueError(f"Rope.padded: {name} is {value}; it must be at least 0")
        pads = ((0, 0) if self.cos.dim() == 2 else (0, 0, 0, 0)) + (before, after)
        cos, sin = (F.pad(table, pads, value=one) for table, one in ((self.cos, 1.0), (self.sin, 0.0)))
        return Rope(cos, sin, self.interleaved)


def rope_3d(
    grid: Sequence[int],
    head_dim: int,
    *,
    theta: float = 10_000.0,
    split: Sequence[int] | None = None,
    interleaved: bool = True,
    device: torch.device | str | None = None,
) -> Rope:
    """Rotary tables for a (T, H, W) grid: each axis rotates its own share of the channels.

    Axis a has ``split[a]`` channels. It rotates pair j of them by ``position * theta ** (-2 j / split[a])`` radians.

    Source: Su et al. 2021 (arXiv 2104.09864).

    Args:
        grid: Tokens per axis, ``(T, H, W)``.
        head_dim: Channels of a head, even.
        theta: Base of the frequencies.
        split: Channels of the axes t, h and w, each even, with sum head_dim. By default they are equal thirds, and t
            gets the rest.
        interleaved: Pairing of the channels, as in ``Rope``.
        device: Device of the tables.

    Returns:
        ``Rope`` with fp32 tables ``[T*H*W, head_dim / 2]``.

    Raises:
        ValueError: head_dim is odd, or split does not fit it.

    Examples:
        >>> rope_3d((4, 6, 10), 64).cos.shape
        torch.Size([240, 32])
    """
    grid, head_dim = sizes("rope_3d", "grid", grid), whole("rope_3d", "head_dim", head_dim)
    theta = number("rope_3d", "theta", theta)
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"rope_3d: grid is {grid}; it must be three positive numbers (T, H, W)")
    if theta <= 0:
        raise ValueError(f"rope_3d: theta is {theta}; it must be positive")
    check_flag("rope_3d", "interleaved", interleaved)
    if head_dim % 2 or head_dim <= 0:
        raise ValueError(f"rope_3d: head_dim is {head_dim}; it must be even and positive")
    if split is None:
        third = head_dim // 6 * 2
        split = (head_dim - 2 * third, third, third)
    split = sizes("rope_3d", "split", split)
    if len(split) != 3 or sum(split) != head_dim or any(s < 0 or s % 2 for s in split):
        raise ValueError(f"rope_3d: split is {tuple(split)}; it must be three even numbers with sum {head_dim}")
    places = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float64) for n in grid), indexing="ij")
    angles = []
    for place, share in zip(places, split, strict=True):
        frequency = theta ** (-torch.arange(0, share, 2, device=device, dtype=torch.float64) / max(share, 1))
        angles.append(place.reshape(-1, 1) * frequency)
    angle = torch.cat(angles, dim=1)
    return Rope(angle.cos().float(), angle.sin().float(), interleaved)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """``x [B, N, heads, head_dim]``, rotated by the tables, in plain PyTorch."""
    cos, sin = (table[:, None] if table.dim() == 2 else table for table in (rope.cos.to(x.dtype), rope.sin.to(x.dtype)))
    if rope.interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def normalise(
    x: Tensor,
    kind: str | None,
    weight: Tensor | None,
    eps: float,
    bias: Tensor | None = None,
    across_heads: bool = False,
) -> Tensor:
    """The norm of ``x [..., heads, head_dim]`` by its name, in plain PyTorch."""
    if kind is None:
        return x
    heads = x.shape[-2:]
    if across_heads:
        x = x.flatten(-2)
    shape = x.shape[-1:]
    x = F.layer_norm(x, shape, None, None, eps) if kind == "layer" else F.rms_norm(x, shape, None, eps)
    if across_heads:
        x = x.unflatten(-1, heads)
    if weight is not None:
        x = x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm | None,
    across_heads: bool,
    rope: Rope | None,
    eps: float,
) -> Tensor:
    """The equation in plain PyTorch."""
    y = normalise(x, norm, weight, eps, bias, across_heads)
    return y if rope is None else rotate(y, rope)


define(
    "norm_rope_fwd(Tensor x, Tensor? weight, Tensor? bias, int norm, bool across_heads, Tensor? cos, Tensor? sin, "
    "bool interleaved, float eps) -> Tensor y"
)
define(
    "norm_rope_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, int norm, bool across_heads, Tensor? cos, "
    "Tensor? sin, bool interleaved, float eps, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)"
)


@register_fake("norm_rope_fwd")
def _(x, *call):
    return x.new_empty(x.shape)


@register_fake("norm_rope_bwd")
def _(dy, x, weight, bias, *call):
    asked = zip((x, weight, bias), call[-3:], strict=True)
    return tuple(tensor.new_empty(tensor.shape) if need else x.new_empty(0) for tensor, need in asked)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, cos, sin, norm, across_heads, interleaved, eps, backend):
        ctx.constants = norm, across_heads, interleaved, eps, backend
        ctx.save_for_backward(x, weight, bias, cos, sin)
        return kernels(backend).norm_rope_fwd(x, weight, bias, norm, across_heads, cos, sin, interleaved, eps)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        x, weight, bias, cos, sin = ctx.saved_tensors
        norm, across_heads, interleaved, eps, backend = ctx.constants
        needs = ctx.needs_input_grad[:3]
        found = kernels(backend).norm_rope_bwd(
            gradients[0].contiguous(), x, weight, bias, norm, across_heads, cos, sin, interleaved, eps, *needs
        )
        return *asked_for(needs, found), *(None,) * 7


def _kernels(x, weight, bias):
    if x.shape[-1] % 2:
        return f"head_dim is {x.shape[-1]}; the kernels take even ones"
    return kernel_refusal(x=x, weight=weight, bias=bias)


# Triton keeps a token's heads in the registers of a program, both sides rounded up to powers of two: 64 heads of 128.
TRITON_WIDEST = 8192


def _triton(x, weight, bias):
    heads, head_dim = x.shape[-2:]
    held = 1 << ((heads - 1).bit_length() + (head_dim - 1).bit_length())
    if held > TRITON_WIDEST:
        return (
            f"heads x head_dim is {heads} x {head_dim}; Triton's kernels take up to {TRITON_WIDEST}, both rounded up "
            "to powers of two"
        )
    return _kernels(x, weight, bias)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}

# What a record tells apart: a norm over each head, or rotation alone; or one across heads.
DETAILS = ("per head", "across")


def check_pairs(op: str, rope: object, head_dim: int) -> Rope:
    """``rope``, which must be one, for heads whose channels are pairs."""
    if not isinstance(rope, Rope):
        raise TypeError(f"{op}: rope must be a Rope(cos, sin, interleaved), got {type(rope).__name__}")
    check_flag(op, "rope.interleaved", rope.interleaved)
    if head_dim % 2:
        raise ValueError(f"{op}: rope needs an even head_dim, got {head_dim}")
    return rope


def check_rope(op: str, rope: object, x: Tensor, name: str) -> Rope:
    """``rope`` with tables of four axes, for ``x [B, N, heads, head_dim]``."""
    batch, tokens, heads, head_dim = x.shape
    rope = check_pairs(op, rope, head_dim)
    tables = []
    for table_name, table in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
        check_tensor(op, table_name, table, x, name)
        full = table
        if table.dim() in (2, 3):
            full = table[None, :, None] if table.dim() == 2 else table[None]
        half = head_dim // 2
        fits = full.dim() == 4 and full.shape[0] in (1, batch) and full.shape[2] in (1, heads)
        if not fits or full.shape[1] != tokens or full.shape[3] != half:
            hint = "; Rope.from_pairs takes such tables" if table.shape[-1:] == (head_dim,) else ""
            raise ValueError(
                f"{op}: {table_name} has shape {tuple(table.shape)}; it may be [N, head_dim / 2], [N, heads, "
                f"head_dim / 2] or [B, N, heads, head_dim / 2] with B = {batch} or 1, N = {tokens}, heads = {heads} or "
                f"1 and head_dim / 2 = {half}{hint}"
            )
        if table.requires_grad:
            raise ValueError(f"{op}: {table_name} requires a gradient; the rotary tables are constants")
        tables.append(full)
    if tables[0].shape != tables[1].shape:
        raise ValueError(
            f"{op}: rope.sin has shape {tuple(rope.sin.shape)}; it must be that of rope.cos, {tuple(rope.cos.shape)}"
        )
    return Rope(tables[0], tables[1], rope.interleaved)


def in_rows(x: Tensor) -> Tensor:
    """``x``, or a copy if the channels of a head are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def tables(rope: Rope | None) -> tuple[Tensor | None, Tensor | None, bool]:
    """What a raw op takes of rotary tables: cos and sin in fp32, and whether pairs are interleaved."""
    if rope is None:
        return None, None, True
    return rope.cos.float().contiguous(), rope.sin.float().contiguous(), rope.interleaved


def check_norm(op: str, norm_name: str, norm: object, like: tuple[Tensor, str], **parameters: Tensor | None) -> None:
    """Raise unless the norm is one, and its parameters are ``[head_dim]`` or ``[heads, head_dim]``.

    ``like`` is a tensor ``[..., heads, head_dim]`` and its name.
    """
    if norm not in (None, "rms", "layer"):
        raise ValueError(f"{op}: {norm_name} is {norm!r}; it may be None, 'rms' or 'layer'")
    heads, head_dim = like[0].shape[-2:]
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        check_tensor(op, name, parameter, *like)
        if norm is None:
            raise ValueError(f"{op}: {name} needs {norm_name}, which is None; it may be 'rms' or 'layer'")
        if norm == "rms" and name.endswith("bias"):
            raise ValueError(f"{op}: {name} must be None with {norm_name}='rms', because an RMS norm has no bias")
        if tuple(parameter.shape) not in ((head_dim,), (heads, head_dim)):
            raise ValueError(
                f"{op}: {name} has shape {tuple(parameter.shape)}; it may be [head_dim] or [heads, head_dim] with "
                f"heads = {heads}, head_dim = {head_dim}"
            )


@shortcut
def norm_rope(
    x: Tensor,
    *,
    norm: Norm | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    across_heads: bool = False,
    rope: Rope | None = None,
    eps: float = 1e-6,
    backend: backends.Name | None = None,
) -> Tensor:
    """``rotate(norm(x) * weight + bias)`` of queries or keys. Differentiable in all but the rotary tables.

    ``attention`` and ``window_attention`` do this to q and k themselves. Alone it serves tokens of several kinds, such
    as text and video with weights of their own, and attention of another library. All is computed in fp32 and rounded
    once.

    Source: QK-norm, Dehghani et al. 2023 (arXiv 2302.05442); the rotation, Su et al. 2021 (arXiv 2104.09864).

    Args:
        x: ``[B, N, heads, head_dim]``, strided as it comes; float16, bfloat16, float32, or float64 on the reference.
        norm: None, ``"rms"`` or ``"layer"``.
        weight: Weight of the norm, ``[head_dim]`` or ``[heads, head_dim]``.
        bias: Bias of a layer norm, ``[head_dim]`` or ``[heads, head_dim]``.
        across_heads: Whether the norm is over heads and head_dim together, as in Wan and LTX, or over each head.
        rope: Rotary tables, applied after the norm: a row per token, or per head and per sample too.
        eps: Constant added to the variance, or the mean square, of the norm.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        As x, contiguous; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        Queries of Wan, which one RMS norm takes across all heads:

        >>> q, weight = torch.randn(2, 60, 8, 16), torch.ones(8, 16)
        >>> norm_rope(q, norm="rms", weight=weight, across_heads=True, rope=rope_3d((3, 4, 5), 16)).shape
        torch.Size([2, 60, 8, 16])
    """
    op = "norm_rope"
    check_tensor(op, "x", x)
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{op}: x must be [B, N, heads, head_dim], got shape {tuple(x.shape)}")
    check_norm(op, "norm", norm, (x, "x"), weight=weight, bias=bias)
    check_flag(op, "across_heads", across_heads)
    eps = number(op, "eps", eps, 0)
    rope = None if rope is None else check_rope(op, rope, x, "x")
    x = x.to(compute_dtype(x))
    detail = DETAILS[across_heads and norm is not None]
    chosen = backends.choose(op, BACKENDS, x.device, backend, x, weight, bias, detail=detail)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            y = backends.plain(reference, x, weight, bias, norm, across_heads, rope, eps).contiguous()
            return y.clone() if y is x else y
    cos, sin, interleaved = tables(rope)
    return backends.apply(
        _NormRope, in_rows(x), dense(weight), dense(bias), cos, sin, NORMS[norm], across_heads, interleaved, eps, chosen
    )
