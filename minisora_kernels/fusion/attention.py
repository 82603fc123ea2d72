"""Attention: torch's SDPA, or matmul, softmax, matmul, of queries, keys and values of the same number."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..ops.window_attention import DETAILS, SHORT
from . import calls
from .graph import VIEWS, Nodes, argument, beneath, dtype, equal, kind, order_of, pair, shape, storage, value
from .match import Match, Permuted
from .products import same_heads, through_dropout
from .rotary import find_rotary
from .rows import Norm, find_norm


def match_attention(node: fx.Node) -> Match | None:
    """SDPA, or the same written out."""
    if kind(node) == "scaled_dot_product_attention":
        return _sdpa(node)
    return _written_out(node) if kind(node) in ("matmul", "bmm") else None


def _sdpa(node: fx.Node) -> Match:
    names = (("query", None), ("key", None), ("value", None), ("attn_mask", None), ("dropout_p", 0.0))
    q, k, v, mask, dropout = (argument(node, i, *name) for i, name in enumerate(names))
    left = ""
    if mask is not None:
        left = "attention has a mask"
    elif argument(node, 5, "is_causal", False) is not False:
        left = "attention is causal"
    elif dropout != 0:
        left = "attention has dropout"
    elif not same_heads(q, k, v):
        left = "q, k and v have different shapes: cross-attention, or grouped heads"
    elif len(shape(q) or ()) < 3:
        left = "attention has no axis for samples"
    return _match(node, [q, k, v], argument(node, 6, "scale"), [], left)


def _written_out(node: fx.Node) -> Match | None:
    """``softmax(scale * q @ k^T) @ v``."""
    if len(node.args) != 2:
        return None
    weights, v = node.args
    trail: Nodes = []
    passed = beneath(weights, trail)
    inner = passed
    while kind(inner) == "dropout":
        inner = beneath(argument(inner, 0, "input"), trail)
    if kind(inner) != "softmax" or not _over_last(inner):
        return None
    _, left = through_dropout(passed, trail)
    trail.append(inner)
    scores, scale = _scaled(argument(inner, 0, "input"), trail)
    if kind(scores) not in ("matmul", "bmm") or len(scores.args) != 2:
        return None
    trail.append(scores)
    (q, q_scale), (transposed, k_scale) = _scaled(scores.args[0], trail), _scaled(scores.args[1], trail)
    k = _untransposed(transposed, trail)
    if k is None:
        return None
    k, late = _scaled(k, trail)
    if not same_heads(q, k, v):
        left = left or "q, k and v have different shapes: cross-attention, or grouped heads"
    return _match(node, [q, k, v], scale * q_scale * k_scale * late, trail, left)


def _over_last(softmax: fx.Node) -> bool:
    axis = argument(softmax, 1, "dim")
    return axis in (-1, len(shape(softmax) or ()) - 1)


def _scaled(node: Any, trail: Nodes) -> tuple[Any, float]:
    """What a number multiplies or divides, and the factor."""
    mine: Nodes = []
    bare = beneath(node, mine)
    for name in ("mul", "div"):
        operands = pair(bare, name)
        if operands and isinstance(operands[1], (int, float)) and value(operands[0]) is not None and operands[1]:
            trail.extend([*mine, bare])
            inner, factor = _scaled(operands[0], trail)
            return inner, factor * (operands[1] if name == "mul" else 1 / operands[1])
    if dtype(bare) == dtype(node) or kind(bare) in ("matmul", "bmm"):
        trail.extend(mine)
        return bare, 1.0
    return node, 1.0


def _untransposed(node: Any, trail: Nodes) -> fx.Node | None:
    """What a node is the transpose of, in its last two axes."""
    rank = len(shape(node) or ())
    if rank < 2 or order_of(node) != (*range(rank - 2), rank - 1, rank - 2):
        return None
    trail.append(node)
    return node.args[0]


def _match(node: fx.Node, qkv: list[Any], scale: Any, trail: Nodes, left: str, whole: bool = True) -> Match:
    """The match of attention, and of norm and rotation of q and k before it if it is to be ``whole``."""
    if not isinstance(scale, (int, float, type(None))):
        left = left or "the scale is no plain number"
    if any(dtype(each) != dtype(qkv[0]) for each in qkv):
        left = left or "q, k and v have different dtypes"
    if equal((shape(qkv[0]) or (0, 0))[-2], 0):
        left = left or "there are no tokens"
    if trail and any(_width(each) < _width(node) for each in trail):
        left = left or "the model rounds between"
    turned = _unrotated(qkv) if whole and not left else None
    inputs = [*map(_as_it_is, qkv)] if turned is None else [*turned.inputs, _as_it_is(qkv[2])]
    norms, passed = _qk_norm(inputs, qkv[2]) if whole and not left else (None, [])
    if norms is None and any(dtype(each.node) != dtype(qkv[2]) for each in inputs):
        inputs, turned = [*map(_as_it_is, qkv)], None  # the norm ends in float32
    mine = [] if turned is None else [*turned.trail]
    tables, rotation = ((), None) if turned is None else (turned.tables, turned.rotation)
    weights: list[Any] = [None, None]
    options: dict[str, Any] = dict(scale=scale)
    if norms is not None:
        inputs[:2] = [permuted for permuted, _ in norms]
        weights = [norm.weight for _, norm in norms]
        options.update(qk_norm=norms[0][1].kind, eps=norms[0][1].eps)
        mine += passed
    sizes = shape(qkv[0]) or (0, 0)
    match = Match(
        "window_attention",
        node,
        [*trail, *mine],
        calls.attention,
        (*inputs, *weights, *tables),
        dict(rotation=rotation),
        dict(qkv=qkv[0], q_weight=weights[0], k_weight=weights[1], bias=None),
        detail=DETAILS[_hint(sizes[-2]) > SHORT][norms is not None or rotation is not None],
        left=left,
        options=options,
    )
    linear, passed = (None, []) if left else one_linear(inputs)
    if linear is not None:
        match.call, match.arguments = calls.split_attention, (linear, *weights, *tables)
        match.trail += passed
        match.keywords.update(sizes=(sizes[1], sizes[3]))
    if mine:
        match.less = _match(node, qkv, scale, trail, left, whole=False)
    if turned is not None and turned.written and _is_read(match, turned.written):
        assert match.less is not None
        return match.less
    return match


def _is_read(match: Match, written: Nodes) -> bool:
    """Whether anything but the match reads what some of its nodes wrote to, which goes with it."""
    inside = {*match.trail, match.result}
    return any(user not in inside for node in (*match.trail, *written) for user in node.users)


def _as_it_is(node: Any) -> Permuted:
    return Permuted(node, tuple(range(len(shape(node) or ()))))


class Unrotated(NamedTuple):
    """q and k before a rotary embedding.

    Attributes:
        inputs: Both.
        trail: The nodes that turn them.
        tables: Nodes with cosines and sines.
        rotation: How those are read, as in ``rotary.Rotated``.
        written: Tensors that nodes of the trail write to.
    """

    inputs: list[Permuted]
    trail: Nodes
    tables: tuple[fx.Node, ...]
    rotation: tuple[Any, ...]
    written: Nodes


def _unrotated(qkv: list[Any]) -> Unrotated | None:
    """q and k before a rotary embedding, if both turn alike."""
    q, k = (find_rotary(node) for node in qkv[:2])
    if q is None or k is None or q.keys != k.keys:
        return None
    inputs = [Permuted(each.x, each.order) for each in (q, k)]
    return Unrotated(inputs, [*q.trail, *k.trail], tuple(q.tables), q.rotation, [*q.written, *k.written])


def _qk_norm(inputs: list[Permuted], v: fx.Node) -> tuple[list[tuple[Permuted, Norm]] | None, Nodes]:
    """What the norms over head_dim of q and k read, and the norms, where both have the same one without a bias."""
    trail: Nodes = []
    found = []
    for each in inputs[:2]:
        node, order = each.node, each.order
        while (swap := order_of(node)) == (0, 2, 1, 3):  # heads and tokens
            trail.append(node)
            node, order = node.args[0], tuple(swap[axis] for axis in order)  # type: ignore[assignment]
        normed = find_norm(node, [])
        if normed is None or normed[0].bias is not None or dtype(normed[0].x) != dtype(v):
            return None, []
        norm, passed = normed
        if norm.weight is not None and len(shape(norm.weight) or ()) != 1:
            return None, []
        trail += passed
        found.append((Permuted(norm.x, order), norm))
    if found[0][1].kind != found[1][1].kind or found[0][1].eps != found[1][1].eps:
        return None, []
    return found, trail


def _width(node: fx.Node) -> int:
    found = dtype(node)
    return 0 if found is None else found.itemsize


def _hint(size: Any) -> int:
    """A size, or what it was when the graph was captured."""
    return size if isinstance(size, int) else size.node.hint if isinstance(size, torch.SymInt) else 0


def one_linear(qkv: list[Permuted]) -> tuple[fx.Node | None, Nodes]:
    """The tensor ``[B, N, 3 * heads * head_dim]`` that q, k, v are views of, if they are, and the views.

    Shape, strides and offset say which numbers a view shows, however the model made it.
    """
    trail: Nodes = []
    bases = set()
    for node in (each.node for each in qkv):
        while kind(node) in VIEWS and isinstance(node.args[0], fx.Node):
            trail.append(node)
            node = node.args[0]
        bases.add(node)
    if len(bases) != 1 or len({storage(each) for each in (*bases, *(each.node for each in qkv))}) != 1:
        return None, []
    (base,) = bases
    whole, parts = value(base), [value(each.node) for each in qkv]
    packed = whole is not None and storage(base) is not None and whole.dim() == 3 and whole.is_contiguous()
    if whole is None or not packed or any(part is None or part.dtype != whole.dtype for part in parts):
        return None, []
    seen = [part.permute(each.order) for part, each in zip(parts, qkv, strict=True) if part is not None]
    return (base, trail) if _are_packed(whole, seen) else (None, [])


def _are_packed(whole: Tensor, parts: list[Any]) -> bool:
    """Whether ``parts [B, heads, N, head_dim]`` are thirds of the last axis of ``whole``, as their strides say."""
    if parts[0].dim() != 4:
        return False
    batch, heads, tokens, width = parts[0].shape
    row = 3 * heads * width
    if type(row) is not int or not equal(tuple(whole.shape), (batch, tokens, row)):
        return False
    for i, part in enumerate(parts):
        strides = part.stride()
        if not equal(part.storage_offset(), whole.storage_offset() + i * heads * width):
            return False
        if not equal(strides[1:], (width, row, 1)) or not (equal(strides[0], tokens * row) or equal(batch, 1)):
            return False
    return True
