"""Attention inside non-overlapping windows of a (T, H, W) grid of tokens. It reads the packed projection in place.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]                    each [B, N, heads, head_dim]
    q, k    = norm(q) * q_weight, norm(k) * k_weight                      only with qk_norm; over head_dim
    q, k    = rotate(q), rotate(k)                                        only with rope; by the token's place
    P       = softmax(scale * q k^T + bias)                               inside each window
    out     = P v

Windows are boxes of ``(wt, wh, ww)`` tokens that start at the origin; boxes at the far edge are smaller. Temporal
attention is ``(T, 1, 1)``, spatial ``(1, H, W)``, joint ``(T, H, W)``. W.A.L.T's (arXiv 2312.06662) are ``(1, h, w)``
and ``(T, h, w)``. ``(1, 1, 1)`` passes v through. Rotary embedding: Su et al. 2021 (arXiv 2104.09864); QK-norm:
Dehghani et al. 2023 (arXiv 2302.05442); relative position bias: Liu et al. 2021 (arXiv 2103.14030).

Backward, per window and head. The forward saves two numbers per query: the greatest score m and the sum l of
exp(score - m). The backward computes P again from them. (The usual m + log l is one number, but its rounding puts one
error on the whole row of P.)

    dv = P^T dout        dP = dout v^T        dS = P * (dP - delta),  delta = rowsum(dout * out) = rowsum(P * dP)
    dbias = sum of dS over windows and samples        dq = scale * dS k        dk = scale * dS^T q
    then back through the rotation (by the opposite angle) and through the norm. With h = norm(x) and dz the gradient of
    its result: dweight = sum dz * h        dh = dz * weight        dx = rstd * (dh - mean(dh) - h * mean(dh * h))
    (without mean(dh) for "rms")

Source of the method: FlashAttention-2, Dao 2023 (arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import architecture_refusal, check_tensor, compute_dtype, kernel_refusal, number, sizes
from ..derivatives import once
from ..flops import formula
from ..modulation import Norm, asked_for
from ..shortcut import shortcut
from .norm_rope import NORMS, Rope, check_norm, check_pairs, normalise, rotate

Grid = tuple[int, int, int]


def boxes(grid: Sequence[int], window: Sequence[int]) -> list[tuple[tuple[int, int, int], ...]]:
    """At most eight regions of equal windows that make up the grid: per axis ``(start, windows, size)``."""
    axes = []
    for n, w in zip(grid, window, strict=True):
        whole = n // w
        regions = [(0, whole, w)]
        if n % w:
            regions.append((whole * w, 1, n % w))
        axes.append(regions)
    return list(product(*axes))


def reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    bias: Tensor | None,
    grid: Grid,
    window: Grid,
    qk_norm: Norm | None,
    rope: Rope | None,
    scale: float,
    eps: float,
) -> Tensor:
    """The equation in plain PyTorch: norm, rotate, permute to windows, attend, permute back."""
    batch, tokens, _, heads, head_dim = qkv.shape
    q, k, v = qkv.unbind(2)
    q, k = normalise(q, qk_norm, q_weight, eps), normalise(k, qk_norm, k_weight, eps)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    q, k, v = (part.unflatten(1, grid) for part in (q, k, v))
    out = torch.empty_like(v) if not torch.is_grad_enabled() else torch.zeros_like(v)
    pieces = []
    for region in boxes(grid, window):
        place = (slice(None), *(slice(start, start + count * size) for start, count, size in region))
        counts, sizes = [count for _, count, _ in region], [size for _, _, size in region]
        length = sizes[0] * sizes[1] * sizes[2]
        parts = []
        for part in (q, k, v):
            part = part[place].unflatten(3, (counts[2], sizes[2])).unflatten(2, (counts[1], sizes[1]))
            part = part.unflatten(1, (counts[0], sizes[0]))  # [B, nt, wt, nh, wh, nw, ww, heads, head_dim]
            parts.append(part.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(-1, heads, length, head_dim))
        pair = None
        if bias is not None:
            pair = bias.unflatten(2, window).unflatten(1, window)
            a, b, c = (slice(size) for size in sizes)
            pair = pair[:, a, b, c, a, b, c].reshape(heads, length, length).to(v.dtype)
        piece = _attend(parts[0], parts[1], parts[2], pair, scale)
        piece = piece.unflatten(2, sizes).unflatten(0, (batch, *counts)).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
        pieces.append((place, piece.flatten(5, 6).flatten(3, 4).flatten(1, 2)))
    if len(pieces) == 1:
        return pieces[0][1].reshape(batch, tokens, heads * head_dim)
    for place, piece in pieces:
        out[place] = piece
    return out.reshape(batch, tokens, heads * head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    # Up to 64 tokens two batched matmuls beat SDPA, whose flash backward is slow on short sequences.
    if bias is None and q.shape[2] > 64:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


define(
    "window_attention_fwd(Tensor qkv, SymInt t, SymInt h, SymInt w, SymInt wt, SymInt wh, SymInt ww, Tensor? q_weight, "
    "Tensor? k_weight, int norm, Tensor? cos, Tensor? sin, bool interleaved, Tensor? bias, float scale, float eps) "
    "-> (Tensor out, Tensor softmax)"
)
define(
    "window_attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor softmax, SymInt t, SymInt h, SymInt w, SymInt wt,"
    " SymInt wh, SymInt ww, Tensor? q_weight, Tensor? k_weight, int norm, Tensor? cos, Tensor? sin, bool interleaved, "
    "Tensor? bias, float scale, float eps, bool need_qkv, bool need_q, bool need_k, bool need_bias) "
    "-> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight, Tensor dbias)"
)


@register_fake("window_attention_fwd")
def _(qkv, t, h, w, wt, wh, ww, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps):
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    return out, qkv.new_empty(batch, tokens, heads, 2, dtype=torch.float32)


@register_fake("window_attention_bwd")
def _(dout, qkv, out, softmax, *call):
    asked = zip((qkv, call[6], call[7], call[12]), call[-4:], strict=True)
    return tuple(tensor.new_empty(tensor.shape) if need else qkv.new_empty(0) for tensor, need in asked)


def _product(qkv, sizes) -> int:  # of all queries and keys of the windows
    pairs = prod(n // w * w**2 + (n % w) ** 2 for n, w in zip(sizes[:3], sizes[3:], strict=True))
    return 2 * qkv[0] * qkv[3] * qkv[4] * pairs


@formula("window_attention_fwd")
def _(qkv, *call, **out):
    return 2 * _product(qkv, call[:6])


@formula("window_attention_bwd")
def _(dout, qkv, saved, softmax, *call, **out):
    return 5 * _product(qkv, call[:6])  # the scores again, dP, dv, dq and dk


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, q_weight, k_weight, bias, cos, sin, sizes, norm, interleaved, scale, eps, backend):
        ctx.backend = backend
        options = (q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps)
        out, softmax = kernels(ctx.backend).window_attention_fwd(qkv, *sizes, *options)
        ctx.save_for_backward(qkv, out, softmax, q_weight, k_weight, cos, sin, bias)
        ctx.constants = sizes, norm, interleaved, scale, eps
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        qkv, out, softmax, q_weight, k_weight, cos, sin, bias = ctx.saved_tensors
        sizes, norm, interleaved, scale, eps = ctx.constants
        options = (q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps)
        needs = ctx.needs_input_grad[:4]
        found = kernels(ctx.backend).window_attention_bwd(
            gradients[0].contiguous(), qkv, out, softmax, *sizes, *options, *needs
        )
        return *asked_for(needs, found), *(None,) * 8


def _kernels(qkv, q_weight, k_weight, bias):
    if qkv.shape[-1] % 8:
        return f"head_dim is {qkv.shape[-1]}; the kernels take multiples of 8"
    return kernel_refusal(qkv=qkv, q_weight=q_weight, k_weight=k_weight, bias=bias)


# Blocks of wider heads do not fit the 99 KiB of shared memory that consumer GPUs have, or spill hundreds of registers.
TRITON_WIDEST = 128


def _triton(qkv, q_weight, k_weight, bias):
    if qkv.shape[-1] > TRITON_WIDEST:
        return f"head_dim is {qkv.shape[-1]}; Triton's kernels take heads of up to {TRITON_WIDEST} channels"
    return _kernels(qkv, q_weight, k_weight, bias)


# What csrc/cuda/window_attention.cu is compiled for.
CUDA_HEAD_DIMS = (64, 72, 96, 128)
CUDA_LONGEST = 64


def _cuda(qkv, q_weight, k_weight, bias):
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"qkv has dtype {qkv.dtype}; the CUDA kernels take bfloat16 and float16"
    if qkv.shape[-1] not in CUDA_HEAD_DIMS:
        return f"head_dim is {qkv.shape[-1]}; the CUDA kernels take {', '.join(map(str, CUDA_HEAD_DIMS))}"
    return _kernels(qkv, q_weight, k_weight, bias) or architecture_refusal(qkv.device.index)


def _cuda_long(*_):
    return f"the CUDA kernels take windows of up to {CUDA_LONGEST} tokens"


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "cuda": _cuda, "triton": _triton}
LONG_BACKENDS: backends.Table = {**BACKENDS, "cuda": _cuda_long}

# Triton takes windows of at most this many tokens in one tile of scores, which a program keeps in registers. With 64 a
# backward with a bias, a norm or rotation spilled hundreds of bytes per thread.
SHORT = 32

# What a record tells apart: windows of up to SHORT tokens or longer ones, and the bias, else the norm or rotation.
DETAILS = (("short plain", "short norm", "short bias"), ("long plain", "long norm", "long bias"))

# Torch's attention is a route on GPUs alone, for windows that it takes as views: of others it would need a copy, and
# separate passes for norms and rotations. bench/ops/bench_window_attention.py times it on long windows.
ROUTES = (
    "cpu: one kernel for all windows. On CPUs with AVX-512 bfloat16 or AMX it multiplies bfloat16 as it is, elsewhere "
    "in float32. triton: windows of up to 32 tokens take one pass each way, and short ones share a program. Longer "
    "windows take blocks of tokens; beyond 512 tokens norm and rotation have a pass of their own. Torch's flash "
    "attention takes those of more than 64 tokens that are runs of tokens and have no bias, and of more than 512 with "
    "a norm or rotation, in float16 and bfloat16. cuda: windows of up to 64 tokens of 16-bit numbers, with heads of "
    "64, 72, 96 or 128 channels, on tensor cores."
)


def _check(qkv, grid, window, q_weight, k_weight, qk_norm, rope, bias) -> tuple[Grid, Grid]:
    op = "window_attention"
    check_tensor(op, "qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[3] < 1 or qkv.shape[4] < 1:
        raise ValueError(f"{op}: qkv must be [B, N, 3, heads, head_dim], got shape {tuple(qkv.shape)}")
    _, tokens, _, heads, head_dim = qkv.shape
    grid, window = sizes(op, "grid", grid), sizes(op, "window", window)
    for name, value in (("grid", grid), ("window", window)):
        if len(value) != 3 or any(n < 1 for n in value):
            raise ValueError(f"{op}: {name} is {tuple(value)}; it must be three positive numbers (T, H, W)")
    t, h, w = grid
    if t * h * w != tokens:
        raise ValueError(f"{op}: grid {t} x {h} x {w} has {t * h * w} tokens, qkv has {tokens}")
    wt, wh, ww = window
    if wt > t or wh > h or ww > w:
        raise ValueError(f"{op}: window {wt} x {wh} x {ww} is larger than the grid {t} x {h} x {w}")
    check_norm(op, "qk_norm", qk_norm, (qkv, "qkv"), q_weight=q_weight, k_weight=k_weight)
    if bias is not None:
        check_tensor(op, "bias", bias, qkv, "qkv")
    if rope is not None:
        check_pairs(op, rope, head_dim)
        for name, angles in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
            check_tensor(op, name, angles, qkv, "qkv")
            if tuple(angles.shape) != (tokens, head_dim // 2):
                hint = "; Rope.from_pairs takes such tables" if tuple(angles.shape) == (tokens, head_dim) else ""
                raise ValueError(
                    f"{op}: {name} has shape {tuple(angles.shape)}; it must be [N, head_dim / 2] = "
                    f"[{tokens}, {head_dim // 2}]{hint}"
                )
            if angles.requires_grad:
                raise ValueError(f"{op}: {name} requires a gradient; the rotary tables are constants")
    length = wt * wh * ww
    # Inside torch.compile only the kernel checks the bias. An equality here would tie a symbolic wt to the length of
    # the bias, and the Dynamo of torch 2.13 then cannot hand wt to the backward ("does not belong to this Graph").
    if bias is not None and not torch.compiler.is_compiling() and tuple(bias.shape) != (heads, length, length):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}; it must be [heads, L, L] = [{heads}, {length}, {length}]"
        )
    return (t, h, w), (wt, wh, ww)


@shortcut
def window_attention(
    qkv: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    qk_norm: Norm | None = None,
    rope: Rope | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: backends.Name | None = None,
) -> Tensor:
    """Attention inside windows of the grid: ``softmax(scale * q k^T + bias) v``, with QK-norm and rotary embedding.

    It reads ``qkv`` as one Linear wrote it, and is differentiable in every tensor but the rotary tables. On the kernels
    norm, scores, softmax and sums are fp32. Where the CPU multiplies bfloat16 (AVX512_BF16, AMX) and qkv is bfloat16,
    products round q, k, P and dS to bfloat16, as the reference does.

    Source: windows of W.A.L.T, Gupta et al. 2023 (arXiv 2312.06662); the method, Dao 2023 (arXiv 2307.08691).

    Args:
        qkv: ``[B, N, 3, heads, head_dim]`` with ``N = T*H*W``, time-major; float16, bfloat16, float32, or float64 on
            the reference. The kernels take a head_dim that is a multiple of 8.
        grid: Tokens per axis, ``(T, H, W)``.
        window: Tokens of a window per axis, ``(wt, wh, ww)``, no larger than the grid. Windows at the far edge are
            smaller.
        q_weight: Weight of the norm of q, ``[head_dim]`` or ``[heads, head_dim]``.
        k_weight: Weight of the norm of k, ``[head_dim]`` or ``[heads, head_dim]``.
        qk_norm: Norm of q and k over head_dim: None, ``"rms"`` or ``"layer"``.
        rope: Rotary tables, applied after the norm: from ``rope_3d``, or ``Rope.from_pairs`` of a model of diffusers;
            ``Rope.padded`` leaves text tokens as they are.
        bias: Relative position bias ``[heads, L, L]`` with ``L = wt*wh*ww``; a smaller window at the edge reads the
            corner of it that it covers.
        scale: Factor of the scores; by default ``head_dim ** -0.5``.
        eps: Constant added to the variance, or the mean square, of the norm.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, N, heads * head_dim]``, contiguous, in qkv's dtype; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        Attention over the 4 frames of each place:

        >>> qkv = torch.randn(2, 4 * 6 * 10, 3, 8, 16)
        >>> window_attention(qkv, grid=(4, 6, 10), window=(4, 1, 1)).shape
        torch.Size([2, 240, 128])
    """
    grid, window = _check(qkv, grid, window, q_weight, k_weight, qk_norm, rope, bias)
    scale = qkv.shape[-1] ** -0.5 if scale is None else number("window_attention", "scale", scale)
    eps = number("window_attention", "eps", eps, 0)
    qkv = qkv.to(compute_dtype(qkv))
    kind = 2 if bias is not None else 1 if qk_norm is not None or rope is not None else 0
    length = window[0] * window[1] * window[2]
    detail = (DETAILS[1] if length > SHORT else DETAILS[0])[kind]
    table = LONG_BACKENDS if length > CUDA_LONGEST else BACKENDS
    call = (qkv, q_weight, k_weight, bias)
    chosen = backends.choose("window_attention", table, qkv.device, backend, *call, detail=detail)
    if chosen == "reference":
        with torch.autocast(qkv.device.type, enabled=False):
            return backends.plain(reference, qkv, q_weight, k_weight, bias, grid, window, qk_norm, rope, scale, eps)
    cos, sin, interleaved = None, None, True
    if rope is not None:
        cos, sin, interleaved = rope.cos.float(), rope.sin.float(), rope.interleaved
    tensors = [None if tensor is None else tensor.contiguous() for tensor in (qkv, q_weight, k_weight, bias, cos, sin)]
    return backends.apply(
        _WindowAttention,
        *tensors,
        (*grid, *window),
        NORMS[qk_norm],
        interleaved,
        float(scale),
        float(eps),
        chosen,
    )
