"""Attention of queries to keys and values that are tensors of their own, of which some may not count.

    q, k = rotate(norm(q) * q_weight + q_bias), rotate(norm(k) * k_weight + k_bias)      as norm_rope does it
    P    = softmax(scale * q k^T)                                                        over the keys that count
    out  = P v

Cross-attention has other tokens behind k and v than behind q. Padding does not count: the first ``lengths[b]`` keys of
sample b do, or those of a mask, which the kernels read in the order of an index. A sample without keys gives zeros.

The forward saves two numbers per query: the greatest score m and the sum l of exp(score - m). It does not save the
normed and turned q and k: the backward makes them again, and computes P from them.

    dv = P^T dout        dP = dout v^T        dS = P * (dP - delta),  delta = rowsum(dout * out) = rowsum(P * dP)
    dq = scale * dS k        dk = scale * dS^T q        then back through rotation and norm

Source of the method: FlashAttention-2, Dao 2023 (arXiv 2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import check_flag, check_tensor, compute_dtype, kernel_refusal, number
from ..derivatives import once
from ..flops import formula
from ..modulation import Norm, asked_for
from ..shortcut import shortcut
from . import norm_rope as rows
from .norm_rope import NORMS, Rope, check_norm, check_rope, dense, in_rows, tables

INTEGERS = (torch.int64, torch.int32)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The equation in plain PyTorch, of q and k after norm and rotation; ``mask [B, M]`` says which keys count."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    none = ~mask.any(1, keepdim=True)  # a row of nothing but -inf has no softmax
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | none)[:, None, None], scale=scale)
    return out.masked_fill(none[:, None, None], 0.0).transpose(1, 2).flatten(2)


define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? index, float scale) "
    "-> (Tensor out, Tensor softmax)"
)
define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor? lengths, "
    "Tensor? index, float scale, bool need_q, bool need_k, bool need_v) -> (Tensor dq, Tensor dk, Tensor dv)"
)


@register_fake("attention_fwd")
def _(q, k, v, *call):
    batch, tokens, heads, head_dim = q.shape
    out = q.new_empty(batch, tokens, heads * head_dim)
    return out, q.new_empty(batch, tokens, heads, 2, dtype=torch.float32)


@register_fake("attention_bwd")
def _(dout, q, k, v, out, softmax, lengths, index, scale, *needs):
    asked = zip((q, k, v), needs, strict=True)
    return tuple(part.new_empty(part.shape) if need else q.new_empty(0) for part, need in asked)


def _product(q, k) -> int:  # of all queries and keys
    return 2 * q[0] * q[1] * k[1] * q[2] * q[3]


@formula("attention_fwd")
def _(q, k, *call, **out):
    return 2 * _product(q, k)


@formula("attention_bwd")
def _(dout, q, k, *call, **out):
    return 5 * _product(q, k)  # the scores again, dP, dv, dq and dk


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q, k, v, q_weight, k_weight, q_bias, k_bias, lengths, index, cos, sin, norm, across_heads,
        interleaved, eps, scale, backend,
    ):  # fmt: skip
        ctx.constants = norm, across_heads, interleaved, eps, scale, backend
        parameters = (q_weight, k_weight, q_bias, k_bias)
        turned = _turned((q, k), parameters, cos, sin, *ctx.constants)
        out, softmax = kernels(backend).attention_fwd(*turned, v, lengths, index, scale)
        ctx.save_for_backward(q, k, v, *parameters, lengths, index, cos, sin, out, softmax)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        q, k, v, *parameters, lengths, index, cos, sin, out, softmax = ctx.saved_tensors
        norm, across_heads, interleaved, eps, scale, backend = ctx.constants
        need_q, need_k, need_v, *need_parameters = ctx.needs_input_grad[:7]
        raw = kernels(backend)
        turned = _turned((q, k), parameters, cos, sin, *ctx.constants)
        needs = (need_q or any(need_parameters[::2]), need_k or any(need_parameters[1::2]), need_v)
        found = raw.attention_bwd(gradients[0].contiguous(), *turned, v, out, softmax, lengths, index, scale, *needs)
        *dqk, dv = asked_for(needs, found)
        dparameters: list[Tensor | None] = [None] * 4
        for i, (x, need) in enumerate(((q, need_q), (k, need_k))):
            if dqk[i] is None or not (norm or cos is not None):
                continue
            weight, bias, asked = parameters[i], parameters[2 + i], (need, need_parameters[i], need_parameters[2 + i])
            back = raw.norm_rope_bwd(dqk[i], x, weight, bias, norm, across_heads, cos, sin, interleaved, eps, *asked)
            dqk[i], dparameters[i], dparameters[2 + i] = asked_for(asked, back)
        return *dqk, dv, *dparameters, *(None,) * 10


def _turned(
    qk: tuple[Tensor, Tensor], parameters: Any, cos, sin, norm, across_heads, interleaved, eps, scale, backend
) -> tuple[Tensor, ...]:
    """q and k after norm and rotation."""
    if not norm and cos is None:
        return qk
    turn = kernels(backend).norm_rope_fwd
    return tuple(
        turn(x, weight, bias, norm, across_heads, cos, sin, interleaved, eps)
        for x, weight, bias in zip(qk, parameters[:2], parameters[2:], strict=True)
    )


def _kernels(q, k, v, q_weight, k_weight, q_bias, k_bias):
    if q.shape[-1] % 8:
        return f"head_dim is {q.shape[-1]}; the kernels take multiples of 8"
    return kernel_refusal(q=q, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)


# Blocks of wider heads do not fit the 99 KiB of shared memory that consumer GPUs have, or spill hundreds of registers.
TRITON_WIDEST = 128


def _triton(q, *others):
    if q.shape[-1] > TRITON_WIDEST:
        return f"head_dim is {q.shape[-1]}; Triton's kernels take heads of up to {TRITON_WIDEST} channels"
    return rows.BACKENDS["triton"](q, None, None) or _kernels(q, *others)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}

# What a record tells apart: all keys count and nothing else is asked for, some keys do not, or norm or rotation.
DETAILS = ("plain", "padded", "norm")

ROUTES = (
    "cpu: the kernel of window_attention, on one window per sample whose keys are other tokens. triton: blocks of "
    "queries and keys. norm and rotation have a pass of their own, norm_rope."
)


def _check_keys(op: str, name: str, given: object, q: Tensor, shape: tuple[int, ...], dtypes: tuple) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(given).__name__}")
    if given.dtype not in dtypes:
        raise TypeError(f"{op}: {name} has dtype {given.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if tuple(given.shape) != shape:
        wanted = "[B]" if len(shape) == 1 else "[B, M]"
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}; it must be {wanted} = {list(shape)}")
    if given.device != q.device:
        raise ValueError(f"{op}: {name} is on {given.device}, q is on {q.device}; they must be on one device")


def _check_lengths(op: str, lengths: Tensor, keys: int) -> None:
    """Raise unless all lengths are from 0 to M, where a look at them costs no wait."""
    if torch.compiler.is_compiling() or not lengths.is_cpu or type(lengths) is not Tensor or not lengths.numel():
        return
    if not 0 <= int(lengths.min()) <= int(lengths.max()) <= keys:
        raise ValueError(f"{op}: lengths is {lengths.tolist()}; each must be from 0 to the {keys} tokens of k")


@shortcut
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    qk_norm: Norm | None = None,
    across_heads: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: backends.Name | None = None,
) -> Tensor:
    """``softmax(scale * q k^T) v`` of queries, keys and values apart, with key lengths, QK-norm and rotary embedding.

    It reads q, k and v strided as they come. Keys and values that do not count are never read, and cost no time. It is
    differentiable in q, k, v and the parameters of the norm. Where one Linear makes q, k and v of the same tokens,
    ``window_attention`` reads its result in place.

    Source: the method, Dao 2023 (arXiv 2307.08691).

    Args:
        q: ``[B, N, heads, head_dim]``; float16, bfloat16, float32, or float64 on the reference. The kernels take a
            head_dim that is a multiple of 8.
        k: ``[B, M, heads, head_dim]``, in q's dtype.
        v: As k.
        lengths: ``[B]``, whole numbers: sample b attends to its first ``lengths[b]`` keys; None for all M. On a GPU and
            inside torch.compile nobody looks whether they are from 0 to M; what is beyond counts as the nearest.
        mask: ``[B, M]``, bool, True where a key counts, wherever it stands; or lengths, not both.
        qk_norm: Norm of q and k: None, ``"rms"`` or ``"layer"``.
        across_heads: Whether the norm is over heads and head_dim together, as in Wan and LTX, or over each head.
        q_weight, k_weight: Weights of the norm, ``[head_dim]`` or ``[heads, head_dim]``.
        q_bias, k_bias: Biases of a layer norm, ``[head_dim]`` or ``[heads, head_dim]``.
        rope: Rotary tables for q and k, which then have as many tokens: a row per token, or per head and sample too.
            Where q and k turn by other tables, or their tokens are of several kinds, take ``norm_rope`` before.
        scale: Factor of the scores; by default ``head_dim ** -0.5``.
        eps: Constant added to the variance, or the mean square, of the norm.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, N, heads * head_dim]``, contiguous, in q's dtype; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        Video tokens attend to captions of 5 and 3 tokens:

        >>> q, kv = torch.randn(2, 240, 8, 16), torch.randn(2, 5, 2, 8, 16)
        >>> attention(q, *kv.unbind(2), lengths=torch.tensor([5, 3])).shape
        torch.Size([2, 240, 128])
    """
    op = "attention"
    check_tensor(op, "q", q)
    if q.dim() != 4 or q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"{op}: q must be [B, N, heads, head_dim], got shape {tuple(q.shape)}")
    for name, part in (("k", k), ("v", v)):
        check_tensor(op, name, part, q, "q")
        fits = part.dim() == 4 and part.shape[0] == q.shape[0] and part.shape[2:] == q.shape[2:]
        if not fits or part.shape[1] < 1:
            batch, _, heads, head_dim = q.shape
            raise ValueError(
                f"{op}: {name} has shape {tuple(part.shape)}; it must be [B, M, heads, head_dim] = "
                f"[{batch}, M, {heads}, {head_dim}] with M at least 1"
            )
    if v.shape != k.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}; it must be that of k, {tuple(k.shape)}")
    check_norm(op, "qk_norm", qk_norm, (q, "q"), q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    check_flag(op, "across_heads", across_heads)
    scale = q.shape[-1] ** -0.5 if scale is None else number(op, "scale", scale)
    eps = number(op, "eps", eps, 0)
    batch, keys = k.shape[:2]
    if lengths is not None and mask is not None:
        raise ValueError(f"{op}: lengths and mask are both given; one of them says which keys count")
    if lengths is not None:
        _check_keys(op, "lengths", lengths, q, (batch,), INTEGERS)
        _check_lengths(op, lengths, keys)
    if mask is not None:
        _check_keys(op, "mask", mask, q, (batch, keys), (torch.bool,))
    if rope is not None:
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"{op}: rope turns q and k alike, but q has {q.shape[1]} tokens and k has {k.shape[1]}; norm_rope "
                "turns one of them"
            )
        rope = check_rope(op, rope, q, "q")
    dtype = compute_dtype(q)
    for name, part in (("k", k), ("v", v)):
        if part.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise TypeError(f"{op}: {name} has dtype {part.dtype}, q has {q.dtype}; they must be the same")
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    parameters = (q_weight, k_weight, q_bias, k_bias)
    padded = lengths is not None or mask is not None
    detail = DETAILS[2 if qk_norm is not None or rope is not None else padded]
    chosen = backends.choose(op, BACKENDS, q.device, backend, q, k, v, *parameters, detail=detail)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            q = rows.reference(q, q_weight, q_bias, qk_norm, across_heads, rope, eps)
            k = rows.reference(k, k_weight, k_bias, qk_norm, across_heads, rope, eps)
            if lengths is not None:
                mask = torch.arange(keys, device=k.device) < lengths[:, None]
            return backends.plain(reference, q, k, v, mask, scale)
    index = None
    if mask is not None:
        lengths, index = mask.sum(1), mask.byte().argsort(dim=1, descending=True, stable=True)
    elif lengths is not None:
        lengths = lengths.long().contiguous()
    cos, sin, interleaved = tables(rope)
    return backends.apply(
        _Attention,
        *map(in_rows, (q, k, v)),
        *map(dense, parameters),
        lengths,
        index,
        cos,
        sin,
        NORMS[qk_norm],
        across_heads,
        interleaved,
        eps,
        scale,
        chosen,
    )
