"""What the pass puts into a graph: calls of the ops, on tokens and rows in the shapes that models have.

Tokens are ``[B, ..., D]``; rows are what broadcasts against them. Autocast is off inside, for dtypes are those that the
captured graph had; ops that replace a Linear, a convolution or attention cast as these do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as run_checkpointed

from ..ops import adaln as _adaln
from ..ops import attention as _attention
from ..ops import gate_residual as _gate_residual
from ..ops import gate_residual_adaln as _gate_residual_adaln
from ..ops import gelu_mlp as _gelu_mlp
from ..ops import glu_mlp as _glu_mlp
from ..ops import norm_rope as _norm_rope
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


def glu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    return _glu_mlp.glu_mlp(x, w1, b1, w2, b2, w3=w3, b3=b3, **options)


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
    mask: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    *tables: Tensor,
    rotation: tuple[Any, ...] | None,
    flat: bool,
    options: dict[str, Any],
) -> Tensor:
    """Attention of ``[..., heads, N, head_dim]``; ``rotation`` as in rotary.py, of all heads together if ``flat``."""
    shape = q.shape
    heads = shape[-3] if q.dim() > 3 else 1
    q, k, v = (x.reshape(-1, heads, *x.shape[-2:]).transpose(1, 2) for x in (q, k, v))
    parameters = dict(q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    if options.get("across_heads"):
        split = {name: None if each is None else each.view(heads, -1) for name, each in parameters.items()}
        parameters = split
    angles = None if rotation is None else _angles(tables, rotation, q, flat)
    return _apart(q, k, v, mask, parameters, angles, options).reshape(shape)


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
    qkv = linear.unflatten(-1, (3, *sizes))
    tokens = qkv.shape[1]
    parameters = dict(q_weight=q_weight, k_weight=k_weight)
    angles = None if rotation is None else _angles(tables, rotation, qkv[:, :, 0], False)
    if angles is not None and angles.other is not None:
        q, k, v = qkv.unbind(2)
        return _apart(q, k, v, None, parameters, angles, options)
    y = _in_windows(qkv, (1, 1, tokens), (1, 1, tokens), parameters, angles, options)
    return y.unflatten(-1, sizes).transpose(1, 2)


def grid_attention(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *tables: Tensor,
    rotation: tuple[Any, ...] | None,
    sizes: tuple[int, int],
    options: dict[str, Any],
) -> Tensor:
    """Linear, attention over T, Linear of tokens ``[B, T, S, D]``; ``sizes`` is (heads, head_dim)."""
    frames, places = x.shape[1:3]
    qkv = F.linear(x.flatten(1, 2), w1, b1).unflatten(-1, (3, *sizes))
    parameters = dict(q_weight=q_weight, k_weight=k_weight)
    angles = None if rotation is None else _angles(tables, rotation, qkv[:, :frames, 0], False)
    if angles is not None and angles.other is not None:
        q, k, v = qkv.unflatten(1, (frames, places)).transpose(1, 2).flatten(0, 1).unbind(2)
        y = _apart(q, k, v, None, parameters, angles, options).transpose(1, 2)
        y = y.unflatten(0, (-1, places)).transpose(1, 2).flatten(3)
    else:
        if angles is not None:  # a row per frame: that of each token
            cos, sin = (table.repeat_interleave(places, dim=1) for table in (angles.cos, angles.sin))
            angles = angles._replace(cos=cos, sin=sin)
        y = _in_windows(qkv, (frames, 1, places), (frames, 1, 1), parameters, angles, options)
        y = y.unflatten(1, (frames, places))
    return F.linear(y, w2, b2)


def _in_windows(
    qkv: Tensor,
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    parameters: dict[str, Any],
    angles: _Angles | None,
    options: dict[str, Any],
) -> Tensor:
    rope = None
    if angles is not None:
        rope = _norm_rope.Rope(angles.cos[0, :, 0], angles.sin[0, :, 0], angles.interleaved)
    return _window_attention.window_attention(qkv, grid, window, rope=rope, **parameters, **options)


class _Angles(NamedTuple):
    """Tables ``[B or 1, N, heads or 1, head_dim / 2]``; those of the second channel of each pair, where they differ."""

    cos: Tensor
    sin: Tensor
    other: tuple[Tensor, Tensor] | None
    interleaved: bool


def _apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    parameters: dict[str, Any],
    angles: _Angles | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention of ``[B, N, heads, head_dim]``, as ``[B, heads, N, head_dim]``."""
    keys = None if mask is None else _keys(mask, k)
    rope = None
    if angles is not None and angles.other is None:
        rope = _norm_rope.Rope(angles.cos, angles.sin, angles.interleaved)
    if (angles is None or rope is not None) and (mask is None or keys is not None):
        y = _attention.attention(q, k, v, mask=keys, rope=rope, **parameters, **options)
        return y.unflatten(-1, q.shape[2:]).transpose(1, 2)
    options = dict(options)
    across = options.pop("across_heads", False)
    norm = dict(norm=options.pop("qk_norm", None), eps=options.pop("eps", 1e-6), across_heads=across)
    backend = options.get("backend")
    turned = []
    for x, name in ((q, "q"), (k, "k")):
        weight, bias = parameters[f"{name}_weight"], parameters.get(f"{name}_bias")
        x = _norm_rope.norm_rope(x, weight=weight, bias=bias, rope=rope, backend=backend, **norm)
        turned.append(x if rope is not None or angles is None else _turned(x, angles))
    q, k = turned
    if mask is None or keys is not None:
        y = _attention.attention(q, k, v, mask=keys, **options)
        return y.unflatten(-1, q.shape[2:]).transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options["scale"])


# What models add to the scores of a key that does not count is at most this.
_NEVER = -9000.0


def _keys(mask: Tensor, k: Tensor) -> Tensor | None:
    """Which keys of ``k [B, M, heads, head_dim]`` count, ``[B, M]``, by a mask ``[B or 1, heads or 1, 1, M]``.

    None for a mask that says more, or one of numbers that nobody can look at yet.
    """
    batch, count = k.shape[:2]
    if mask.dtype is torch.bool and mask.shape[1] == 1:
        return mask[:, 0, 0].expand(batch, count)
    if torch.compiler.is_compiling() or type(mask) is not Tensor:
        return None
    here = mask if mask.dtype is torch.bool else mask == 0
    known = mask.dtype is torch.bool or bool((here | (mask <= _NEVER)).all())
    alike = bool((here == here[:, :1]).all())
    if not known or not alike or not bool(here.any(-1).all()):
        return None  # without any key, numbers let all count
    return here[:, 0, 0].expand(batch, count)


def _angles(tables: tuple[Tensor, ...], rotation: tuple[Any, ...], q: Tensor, flat: bool) -> _Angles:
    """Cosines and sines for ``q [B, N, heads, head_dim]``."""
    interleaved, layouts, pieces = rotation
    batch, tokens, heads, _ = q.shape
    dtype = torch.promote_types(torch.float32, q.dtype)
    sizes = {"b": batch, "n": -1, "h": heads}
    found = []
    for table, (entries, repeats, rows) in zip(tables, layouts, strict=True):
        table = (table[:1] if repeats else table).reshape(*(sizes[axis] for axis in rows), entries).to(dtype)
        table = table.permute(*(rows.index(axis) for axis in "bnh" if axis in rows), len(rows))
        for place, axis in enumerate("bnh"):
            table = table if axis in rows else table.unsqueeze(place)
        found.append(table)
    sides: list[list[Tensor]] = [[], [], [], []]
    differ = any(len(reads) == 4 for _, _, reads in pieces)
    for start, stop, reads in pieces:
        count = (tokens if stop is None else stop) - start
        every = reads if len(reads) == 4 else (*reads, *(reads if differ else (None, None)))
        for side, each in zip(sides, every, strict=True):
            if each is not None:
                side.append(_columns(found, each, count))
    whole = []
    for side in sides:
        rows = [max(piece.shape[axis] for piece in side) if side else 1 for axis in (0, 2)]
        side = [piece.expand(rows[0], -1, rows[1], -1) for piece in side]
        joined = torch.cat(side, 1) if len(side) > 1 else side[0] if side else None
        whole.append(joined[:, :, 0].unflatten(-1, (heads, -1)) if flat and joined is not None else joined)
    cos, sin, *other = torch.broadcast_tensors(*(side for side in whole if side is not None))
    apart = bool(other) and not _same((cos, sin), (other[0], other[1]))
    return _Angles(cos, sin, (other[0], other[1]) if apart else None, interleaved)


def _columns(tables: list[Tensor], reads: tuple[tuple[float, int, int], ...], rows: int) -> Tensor:
    """The numbers that ``reads`` says, ``[B or 1, rows, heads or 1, len(reads)]``."""
    places = {place for _, place, _ in reads}
    if len(places) == 1 and -1 not in places:
        table = tables[places.pop()]
        index = torch.tensor([entry for _, _, entry in reads], device=table.device)
        found, factors = table[..., index], [factor for factor, _, _ in reads]
        if any(factor != 1.0 for factor in factors):
            found = found * torch.tensor(factors, dtype=table.dtype, device=table.device)
        return found.expand(-1, rows, -1, -1)
    like = tables[0]
    columns = [
        like.new_full((1, 1, 1), factor) if place < 0 else tables[place][..., entry] * factor
        for factor, place, entry in reads
    ]
    return torch.stack(torch.broadcast_tensors(*columns), dim=-1).expand(-1, rows, -1, -1)


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether tables hold the same numbers. Where nobody can look yet, or a GPU would have to wait, they may not."""
    if torch.compiler.is_compiling() or one[0].device.type != "cpu" or type(one[0]) is not Tensor:
        return False
    return all(map(torch.equal, one, other))


def _turned(x: Tensor, angles: _Angles) -> Tensor:
    """``x [B, N, heads, head_dim]`` turned in plain PyTorch, where the channels of a pair have tables of their own."""
    assert angles.other is not None
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if angles.interleaved else x.chunk(2, dim=-1)
    pair = (a * angles.cos - b * angles.sin, a * angles.other[1] + b * angles.other[0])
    return (torch.stack(pair, -1).flatten(-2) if angles.interleaved else torch.cat(pair, -1)).to(x.dtype)


def checkpoint(body: torch.fx.GraphModule, *arguments: Any, **options: Any) -> Any:
    """Activation checkpointing of a part of the graph: without Inductor nothing else would drop and recompute it."""
    context: Any = body.meta.get("_checkpoint_context_fn")
    if context is not None:
        options["context_fn"] = context
    return run_checkpointed(body, *arguments, **{**options, "use_reentrant": False})
