"""Attention: torch's SDPA, or matmul, softmax, matmul, with norm and rotation of q and k before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..ops.attention import DETAILS as APART_DETAILS
from ..ops.window_attention import CUDA_LONGEST, DETAILS, LONG_BACKENDS, SHORT
from . import calls
from .graph import VIEWS, Nodes, argument, beneath, dtype, equal, kind, order_of, pair, shape, storage, value
from .match import Match, Permuted
from .products import through_dropout
from .rotary import Rotated, find_rotary
from .rows import Norm, find_norm
from .tables import RESHAPES
from .windows import on_grid


def match_attention(node: fx.Node) -> Match | None:
    """SDPA, or the same written out."""
    if kind(node) == "scaled_dot_product_attention":
        return _sdpa(node)
    return _written_out(node) if kind(node) in ("matmul", "bmm") else None


def _sdpa(node: fx.Node) -> Match:
    names = (("query", None), ("key", None), ("value", None), ("attn_mask", None), ("dropout_p", 0.0))
    q, k, v, mask, dropout = (argument(node, i, *name) for i, name in enumerate(names))
    left = "" if mask is None else _unread(mask, q, k)
    if argument(node, 5, "is_causal", False) is not False:
        left = left or "attention is causal"
    elif dropout != 0:
        left = left or "attention has dropout"
    return _match(node, [q, k, v], argument(node, 6, "scale"), [], left, mask)


def _unread(mask: Any, q: Any, k: Any) -> str:
    """Why a mask is none that tells for each sample which keys count; empty if it may be one."""
    sizes, found = shape(mask), value(mask)
    keys = shape(k)
    if found is None or sizes is None or keys is None or len(sizes) != 4 or len(keys) != 4:
        return "attention has a mask"
    here = equal(sizes[3], keys[2]) and equal(sizes[2], 1) and (equal(sizes[0], 1) or equal(sizes[0], keys[0]))
    if not here or not (equal(sizes[1], 1) or equal(sizes[1], keys[1])) or found.requires_grad:
        return "attention has a mask of more than keys"
    if found.dtype is torch.bool and equal(sizes[1], 1):
        return ""
    return "" if found.device.type == "cpu" else "attention has a mask of numbers, which nobody may look at here"


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


def _match(
    node: fx.Node, qkv: list[Any], scale: Any, trail: Nodes, left: str, mask: Any = None, whole: bool = True
) -> Match:
    """The match of attention, and of norm and rotation of q and k before it if it is to be ``whole``."""
    q, k, v = qkv
    if not isinstance(scale, (int, float, type(None))):
        left = left or "the scale is no plain number"
    left = left or _misfit(q, k, v)
    if trail and any(_width(each) < _width(node) for each in trail):
        left = left or "the model rounds between"
    sides = [_plain(q), _plain(k)]
    if whole and not left:
        sides = _before(q, k, v)
    inputs = [*(side.input for side in sides), _as_it_is(v)]
    norm, turn = sides[0].norm, sides[0].rotated
    tables, rotation = ((), None) if turn is None else (tuple(turn.tables), turn.rotation)
    mine = [each for side in sides for each in side.trail]
    parameters = [getattr(side.norm, name, None) for name in ("weight", "bias") for side in sides]
    options: dict[str, Any] = dict(scale=scale)
    if norm is not None:
        options.update(qk_norm=norm.kind, eps=norm.eps)
    by_token = rotation is None or all(rows in ("", "n") for *_, rows in rotation[1])
    per_head = by_token and not sides[0].across and not sides[0].flat and parameters[2:] == [None, None]
    linear, passed = one_linear(inputs) if per_head and mask is None and not left else (None, [])
    sizes = shape(q) or (0, 0)
    if linear is not None:
        match = Match(
            "window_attention",
            node,
            [*trail, *mine, *passed],
            calls.split_attention,
            (linear, *parameters[:2], *tables),
            dict(rotation=rotation, sizes=(sizes[1], sizes[3])),
            dict(qkv=q, q_weight=parameters[0], k_weight=parameters[1], bias=None),
            detail=DETAILS[_hint(sizes[-2]) > SHORT][norm is not None or rotation is not None],
            table=LONG_BACKENDS if _hint(sizes[-2]) > CUDA_LONGEST else None,
        )
    else:
        shapes = [_by_heads(each) for each in qkv]
        names = ("q_weight", "k_weight", "q_bias", "k_bias")
        match = Match(
            "attention",
            node,
            [*trail, *mine],
            calls.attention,
            (*inputs, mask, *parameters, *tables),
            dict(rotation=rotation, flat=sides[0].flat),
            dict(zip(("q", "k", "v"), shapes, strict=True)) | dict(zip(names, parameters, strict=True)),
            detail=APART_DETAILS[2 if norm is not None or rotation is not None else mask is not None],
            mask=mask,
        )
        if norm is not None:
            options["across_heads"] = sides[0].across
    match.left, match.options = left, options
    if mine:
        match.less = _match(node, qkv, scale, trail, left, mask, whole=False)
    written = [] if turn is None else [each for side in sides for each in side.written]
    if written and _is_read(match, written):
        assert match.less is not None
        return match.less
    return (None if linear is None else on_grid(match, linear)) or match


def _misfit(q: Any, k: Any, v: Any) -> str:
    """Why the shapes or dtypes of q, k and v are none for the op."""
    sizes = [shape(each) for each in (q, k, v)]
    if any(size is None or len(size) < 3 for size in sizes):
        return "attention has no axis for samples"
    if any(dtype(each) != dtype(q) for each in (k, v)):
        return "q, k and v have different dtypes"
    mine, theirs, values = sizes
    assert mine is not None and theirs is not None
    if not equal(theirs, values) or not equal((*mine[:-2], mine[-1]), (*theirs[:-2], theirs[-1])):
        return "q, k and v have different heads"
    return "there are no tokens" if equal(mine[-2], 0) or equal(theirs[-2], 0) else ""


def _by_heads(node: Any) -> Tensor | None:
    """What stands for ``[..., heads, N, head_dim]`` as the op takes it, ``[B, N, heads, head_dim]``."""
    found = value(node)
    if found is None or found.dim() < 3:
        return found
    return (found if found.dim() > 3 else found.unsqueeze(-3)).transpose(-2, -3)


def _is_read(match: Match, written: Nodes) -> bool:
    """Whether anything but the match reads what some of its nodes wrote to, which goes with it."""
    inside = {*match.trail, match.result}
    return any(user not in inside for node in (*match.trail, *written) for user in node.users)


def _as_it_is(node: Any) -> Permuted:
    return Permuted(node, tuple(range(len(shape(node) or ()))))


class Side(NamedTuple):
    """q or k before its norm and rotation.

    Attributes:
        input: What the op reads, ``[..., heads, N, head_dim]``.
        norm: Its norm, if the op is to compute it.
        across: Whether that is over heads and head_dim.
        rotated: Its rotation, if the op is to compute it.
        flat: Whether that is of ``[B, N, heads * head_dim]``.
        trail: The nodes that norm and turn it.
    """

    input: Permuted
    norm: Norm | None = None
    across: bool = False
    rotated: Rotated | None = None
    flat: bool = False
    trail: tuple[fx.Node, ...] = ()

    @property
    def written(self) -> Nodes:
        """Tensors that nodes of the trail write to."""
        return [] if self.rotated is None else self.rotated.written


def _plain(node: Any) -> Side:
    return Side(_as_it_is(node))


def _before(q: fx.Node, k: fx.Node, v: fx.Node) -> list[Side]:
    """q and k before a norm and a rotation that are the same for both, or before one of them, or as they are."""
    turned = [_unrotated(each) for each in (q, k)]
    same = all(side.rotated is not None for side in turned) and equal(shape(q), shape(k))
    if not same or turned[0].flat != turned[1].flat or not _alike(turned[0].rotated, turned[1].rotated):
        turned = [_plain(q), _plain(k)]
    normed = [_unnormed(side, v) for side in turned]
    one, other = (side.norm for side in normed)
    if one is not None and other is not None and _form_of(normed[0], one) == _form_of(normed[1], other):
        return normed
    if any(dtype(side.input.node) != dtype(v) for side in turned):
        return [_plain(q), _plain(k)]  # a norm that stays ends in float32
    return turned


def _form_of(side: Side, norm: Norm) -> tuple[Any, ...]:
    """What the norms of q and k have in common if the op computes both."""
    return norm.kind, norm.eps, norm.bias is None, side.across


def _alike(one: Rotated | None, other: Rotated | None) -> bool:
    return one is not None and other is not None and one.keys == other.keys


def _unrotated(node: fx.Node) -> Side:
    """A side before a rotary embedding of its heads, or of all heads together."""
    found = find_rotary(node)
    if found is not None:
        return Side(Permuted(found.x, found.order), rotated=found, trail=tuple(found.trail))
    whole, passed = _joined(_as_it_is(node))
    found = None if whole.split is None else find_rotary(whole.node)
    if found is None or found.order != (0, 1, 2) or not found.rotation[0]:
        return _plain(node)  # halves of all heads together are no halves of a head
    side = Permuted(found.x, whole.order, whole.split)
    return Side(side, rotated=found, flat=True, trail=(*passed, *found.trail))


def _unmoved(side: Permuted) -> tuple[Permuted, Nodes]:
    """A side before its heads and tokens were swapped, and the nodes that do it."""
    node, order = side.node, side.order
    trail: Nodes = []
    while side.split is None and (swap := order_of(node)) == (0, 2, 1, 3):
        trail.append(node)
        node, order = node.args[0], tuple(swap[axis] for axis in order)  # type: ignore[assignment]
    return Permuted(node, order, side.split), trail


def _joined(side: Permuted) -> tuple[Permuted, Nodes]:
    """A side before its heads were split and moved, and the nodes that do it."""
    moved, trail = _unmoved(side)
    split = None if moved.split is not None else _split_of(moved.node)
    if split is None:
        return moved, trail
    return Permuted(moved.node.args[0], moved.order, split), [*trail, moved.node]  # type: ignore[arg-type]


def _split_of(node: fx.Node) -> tuple[int, int] | None:
    """The two sizes into which a node splits the last axis of another."""
    if kind(node) not in RESHAPES or not isinstance(node.args[0], fx.Node):
        return None
    before, after = shape(node.args[0]), shape(node)
    if before is None or after is None or len(after) != 4 or len(before) != 3 or not equal(before[:2], after[:2]):
        return None
    heads, width = after[2:]
    both = isinstance(heads, int) and isinstance(width, int) and dtype(node) == dtype(node.args[0])
    return (heads, width) if both else None


def _unnormed(side: Side, v: fx.Node) -> Side:
    """A side before a norm, over each head or across all of them; as it is where there is none."""
    moved, passed = _unmoved(side.input)
    found = find_norm(moved.node, []) if moved.split is None else None
    if found is None:
        moved, passed = _joined(side.input)
        found = None if moved.split is None else find_norm(moved.node, [])
    if found is None or dtype(found[0].x) != dtype(v):
        return side
    norm, trail = found
    if any(each is not None and len(shape(each) or ()) != 1 for each in (norm.weight, norm.bias)):
        return side
    moved = Permuted(norm.x, moved.order, moved.split)
    return side._replace(input=moved, norm=norm, across=moved.split is not None, trail=(*side.trail, *passed, *trail))


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
    if any(each.split is not None for each in qkv):
        return None, []
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
