"""What the pass puts into a graph: calls of the ops, on tokens and rows in the shapes that models have.

Tokens are ``[B, ..., D]``; rows are what broadcasts against them. Autocast is off inside, for dtypes are those that the
captured graph had; ops that replace a Linear, a convolution or attention cast as these do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as run_checkpointed

from ..ops import adaln as _adaln
from ..ops import gate_residual as _gate_residual
from ..ops import gate_residual_adaln as _gate_residual_adaln
from ..ops import gelu_mlp as _gelu_mlp
from ..ops import patch_embed as _patch_embed
from ..ops import window_attention as _window_attention


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _tokens(x: Tensor) -> Tensor:
    """``x [B, ..., D]`` as ``[B, N, D]``."""
    return x if x.dim() == 3 else x.flatten(1, -2)


def _rows(parameter: Tensor, x: Tensor) -> Tensor:
    """What broadcasts against ``x [B, ..., D]`` as ``[B, R, D]``."""
    parameter = parameter[(None,) * (x.dim() - parameter.dim())]
    return _tokens(parameter).expand(x.shape[0], -1, -1)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` where that rounds nothing: a result that is wider than x is computed from a wider x."""
    return x.to(dtype) if dtype.itemsize > x.dtype.itemsize else x


def adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` in ``dtype``; ``options`` are those of the op by name."""
    with _no_autocast(x):
        x = _wide(x, dtype)
        rows = None if shift is None else _rows(shift, x), _rows(scale, x)
        return _adaln.adaln(_tokens(x), *rows, weight=weight, bias=bias, **options).reshape(x.shape).to(dtype)


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor, options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """``x + gate * branch`` in ``dtype``."""
    with _no_autocast(x):
        x = _wide(x, dtype)
        y = _gate_residual.gate_residual(_tokens(x), _tokens(branch), _rows(gate, x), **options)
        return y.reshape(x.shape).to(dtype)


def gate_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Both in one pass. The first result has x's dtype, the second the branch's."""
    with _no_autocast(x):
        rows = _rows(gate, x), None if shift is None else _rows(shift, x), _rows(scale, x)
        residual, y = _gate_residual_adaln.gate_residual_adaln(
            _tokens(x), _tokens(branch), *rows, weight=affine[0], bias=affine[1], **options
        )
        return residual.reshape(x.shape), y.reshape(x.shape)


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, options: dict[str, Any]
) -> Tensor:
    return _gelu_mlp.gelu_mlp(x, w1, b1, w2, b2, **options)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The convolution, whose result is ``[B, D, ...]``. It drops what its patches do not cover."""
    patch = weight.shape[2:]
    for axis, size in enumerate(patch, 2):
        if x.shape[axis] % size:
            x = x.narrow(axis, 0, x.shape[axis] // size * size)
    grid = [x.shape[axis] // size for axis, size in enumerate(patch, 2)]
    return _patch_embed.patch_embed(x, weight, bias, **options).transpose(1, 2).unflatten(2, grid)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *tables: Tensor,
    rotation: tuple[Any, ...] | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention of ``[..., N, head_dim]`` to tokens of the same number, stacked as the op reads them."""
    shape = q.shape
    heads = shape[-3] if q.dim() > 3 else 1
    q, k, v = (x.reshape(-1, heads, *shape[-2:]).transpose(1, 2) for x in (q, k, v))
    qkv = torch.stack([q, k, v], dim=2)
    return packed_attention(qkv, q_weight, k_weight, tables, rotation, options).reshape(shape)


def split_attention(
    linear: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *tables: Tensor,
    rotation: tuple[Any, ...] | None,
    sizes: tuple[int, int],
    options: dict[str, Any],
) -> Tensor:
    """Attention of what one Linear wrote, ``[B, N, 3 * heads * head_dim]``; ``sizes`` is (heads, head_dim)."""
    return packed_attention(linear.unflatten(-1, (3, *sizes)), q_weight, k_weight, tables, rotation, options)


def packed_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: tuple[Tensor, ...],
    rotation: tuple[Any, ...] | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention of ``[B, N, 3, heads, head_dim]`` as ``[B, heads, N, head_dim]``; ``rotation`` as in rotary.py."""
    window = (1, 1, qkv.shape[1])
    options = dict(options, q_weight=q_weight, k_weight=k_weight)
    if rotation is not None:
        cos, sin, other_cos, other_sin = _angles(tables, rotation, qkv)
        interleaved = rotation[0]
        if other_cos is None or _same((cos, sin), (other_cos, other_sin)):
            options["rope"] = _window_attention.Rope(cos, sin, interleaved)
        else:
            sides = (cos, sin, other_cos, other_sin)
            qkv = _turned(qkv, sides, interleaved, options)
    y = _window_attention.window_attention(qkv, window, window, **options)
    return y.unflatten(-1, qkv.shape[3:]).transpose(1, 2)


def _angles(tables: tuple[Tensor, ...], rotation: tuple[Any, ...], qkv: Tensor) -> list[Any]:
    """Cosines and sines ``[N, head_dim / 2]`` of the first channels of all pairs, and of the second or None."""
    _, layouts, pieces = rotation
    dtype = torch.promote_types(torch.float32, qkv.dtype)
    flat = [
        (table[:1] if repeats else table).reshape(-1, entries).to(dtype)
        for table, (entries, repeats) in zip(tables, layouts, strict=True)
    ]
    sides: list[list[Tensor]] = [[], [], [], []]
    differ = any(len(reads) == 4 for _, _, reads in pieces)
    for start, stop, reads in pieces:
        rows = (qkv.shape[1] if stop is None else stop) - start
        every = reads if len(reads) == 4 else (*reads, *(reads if differ else (None, None)))
        for side, each in zip(sides, every, strict=True):
            if each is not None:
                side.append(_columns(flat, each, rows))
    return [torch.cat(side) if len(side) > 1 else side[0] if side else None for side in sides]


def _columns(flat: list[Tensor], reads: tuple[tuple[float, int, int], ...], rows: int) -> Tensor:
    """The numbers that ``reads`` says, ``[rows, len(reads)]``."""
    places = {place for _, place, _ in reads}
    if len(places) == 1 and -1 not in places:
        table = flat[places.pop()]
        index = torch.tensor([entry for _, _, entry in reads], device=table.device)
        found, factors = table[:, index], [factor for factor, _, _ in reads]
        if any(factor != 1.0 for factor in factors):
            found = found * torch.tensor(factors, dtype=table.dtype, device=table.device)
        return found.expand(rows, -1)
    like = flat[0]
    columns = [
        like.new_full((1,), factor) if place < 0 else flat[place][:, entry] * factor for factor, place, entry in reads
    ]
    return torch.stack([column.expand(rows) for column in columns], dim=1)


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether tables hold the same numbers. Where nobody can look yet, or a GPU would have to wait, they may not."""
    if torch.compiler.is_compiling() or one[0].device.type != "cpu" or type(one[0]) is not Tensor:
        return False
    return all(map(torch.equal, one, other))


def _turned(qkv: Tensor, sides: tuple[Tensor, ...], interleaved: bool, options: dict[str, Any]) -> Tensor:
    """``qkv`` after norm and rotation in plain PyTorch, where the channels of a pair turn by tables of their own.

    Takes the norm out of ``options``.
    """
    q, k, v = qkv.unbind(2)
    norm, eps = options.pop("qk_norm", None), options.pop("eps", 0.0)
    turned = []
    for x, weight in ((q, options.pop("q_weight")), (k, options.pop("k_weight"))):
        x = _window_attention.normalise(x, norm, weight, eps)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
        cos, sin, other_cos, other_sin = (side[:, None] for side in sides)
        pair = (a * cos - b * sin, a * other_sin + b * other_cos)
        turned.append((torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype))
    return torch.stack([*turned, v], dim=2)


def checkpoint(body: torch.fx.GraphModule, *arguments: Any, **options: Any) -> Any:
    """Activation checkpointing of a part of the graph: without Inductor nothing else would drop and recompute it."""
    context: Any = body.meta.get("_checkpoint_context_fn")
    if context is not None:
        options["context_fn"] = context
    return run_checkpointed(body, *arguments, **{**options, "use_reentrant": False})
