"""Rotary embedding: nodes that turn pairs of a head's channels by tables of angles.

Models write it in many ways: slices, stacks, halves that are swapped, writes into an empty tensor, products with small
matrices. All of them are linear in x and in the tables. So each channel of a node is kept as the sum that it is,
``coefficient * x[channel] * table[entry]``, and the sums at the end say what was computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from .graph import CASTS, VIEWS, Nodes, argument, dtype, equal, kind, order_of, pair, shape, storage, value
from .rows import find_norm
from .tables import RESHAPES, Key, Unknown, array_of, is_plain, mapped, numbers_of, per_axis, repeats

PARTS = ("unbind", "chunk", "split")
EMPTY = ("empty_like", "zeros_like", "new_empty", "new_zeros", "empty", "zeros")
# Nodes on the way from what is turned to the result, whose first operand leads on.
ON_THE_WAY = VIEWS | CASTS | {"neg", "sub", "sum", "clone", "repeat_interleave"}

# What a channel is: coefficients by channel of x and number of a table.
Sum = dict[tuple[int, Key], float]
# Where a number of a table is read: factor, place of the table in a list, entry. Place -1 is 1.
Read = tuple[float, int, int]
# A table, how many entries it has in a row, whether it repeats its rows for each sample, and what else it has rows for,
# in its order: some of "b", "n" and "h", for samples, tokens and heads.
Table = tuple[fx.Node, int, bool, str]


class Piece(NamedTuple):
    """Tokens ``[start, stop)``, or all of them, and their channels: an array of sums."""

    start: int
    stop: int | None
    cells: np.ndarray


class Form(NamedTuple):
    """What a node computes of ``x [..., head_dim]``.

    Attributes:
        lead: Its first axes, by their numbers in x; the others belong to the channels.
        pieces: In the order of the tokens.
        axis: The axis of x that is cut into pieces.
    """

    lead: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axis: int | None = None

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Form:
        return self._replace(pieces=tuple(piece._replace(cells=function(piece.cells)) for piece in self.pieces))

    def spans(self) -> tuple[Any, ...]:
        return self.lead, self.axis, [piece[:2] for piece in self.pieces]


class Rotated(NamedTuple):
    """A node that is a rotation.

    Attributes:
        x: What is turned.
        order: The axes of the node, by their numbers in x.
        trail: The nodes that turn it.
        written: Tensors that some of them write to. Nothing else may read those after the match.
        tables: Nodes with cosines and sines.
        rotation: ``(interleaved, layouts, pieces)``, of plain numbers. A table has ``(entries, repeats, rows)``.
            A piece has ``(start, stop, reads)``: where cosines and sines are read for the first channels of the pairs,
            and for the second where they may differ.
        keys: What two rotations have in common if they are the same.
    """

    x: fx.Node
    order: tuple[int, ...]
    trail: Nodes
    written: Nodes
    tables: Nodes
    rotation: tuple[Any, ...]
    keys: Any


def find_rotary(node: Any) -> Rotated | None:
    """How a node ``[..., N, head_dim]`` is the rotation of another; None if it is not, as far as is understood."""
    if value(node) is None or not isinstance(shape(node)[-1], int):  # type: ignore[index]
        return None
    for x in _candidates(node):
        try:
            return _Reading(x, node).rotated()
        except Unknown:
            continue
    return None


def _candidates(node: fx.Node) -> Nodes:
    """What may be turned, the deepest first: of the same dtype, or a norm, which is not looked into."""
    found: dict[fx.Node, None] = {}
    result, rank, width = dtype(node), len(shape(node) or ()), shape(node)[-1]  # type: ignore[index]
    todo: list[Any] = [node]
    seen = set()
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        size, name = shape(node), kind(node)
        norm = None if size is None else find_norm(node, [])
        fits = size is not None and len(size) == rank and equal(size[-1], width)
        if fits and (dtype(node) == result or (norm is not None and norm[0].bias is None)):
            found[node] = None
        if norm is not None and name not in CASTS:
            continue
        if name in ("add", "mul"):
            todo += sorted((each for each in node.args if value(each) is not None), key=_numel)
        elif name in ("cat", "stack"):
            parts = argument(node, 0, "tensors")
            todo += parts[-1:] if isinstance(parts, (tuple, list)) else []
        elif name in EMPTY:
            todo += [write.args[2] for write in _writes(node)[:1]]
        elif name in ON_THE_WAY:
            todo.append(node.args[0])
    return [*found][::-1]


def _numel(node: Any) -> int:
    sizes = shape(node) or ()
    return math.prod(size if isinstance(size, int) else size.node.hint or 1 for size in sizes)


def _writes(node: fx.Node) -> Nodes:
    """The nodes that write to a part of a node, in their order."""
    return sorted(user for user in node.users if kind(user) == "setitem" and user.args[0] is node)


class _Reading:
    """One reading of a node as what it computes of ``x``."""

    def __init__(self, x: fx.Node, result: fx.Node) -> None:
        self.x, self.result = x, result
        self.dtype = min((dtype(x) or torch.float32, dtype(result) or torch.float32), key=lambda each: each.itemsize)
        self.trail: dict[fx.Node, None] = {}
        self.forms: dict[tuple[fx.Node, bool], Form] = {}
        self.dependent: dict[fx.Node, bool] = {x: True}
        # Table, entry, factor; the table with the axes of x that it has rows for.
        self.reads: dict[Key, tuple[tuple[fx.Node, int, bool, tuple[int, ...]], int, float]] = {}
        self.written: Nodes = []

    def rotated(self) -> Rotated:
        form = self.form(self.result)
        width = shape(self.x)[-1]  # type: ignore[index]
        if not form.lead or any(piece.cells.shape != (width,) for piece in form.pieces):
            raise Unknown
        tokens = form.lead[-1]
        if not self._is_whole(form.pieces, form.axis, tokens):
            raise Unknown
        if not equal(tuple((shape(self.x) or ())[axis] for axis in (*form.lead, len(form.lead))), shape(self.result)):
            raise Unknown
        halves, pieces = None, []
        for piece in form.pieces:
            mine, pairs = _pairs(piece.cells, width)
            if mine is not None and halves not in (None, mine):
                raise Unknown
            halves = halves if mine is None else mine
            pieces.append((piece.start, piece.stop, pairs))
        if halves is None:
            raise Unknown
        tables: list[Table] = []
        roles = dict(zip(form.lead, {2: "bn", 3: "bhn"}.get(len(form.lead), ""), strict=False)) | {tokens: "n"}
        keys = [(start, stop, _sides(pairs, halves)) for start, stop, pairs in pieces]
        found = tuple((start, stop, self._reads_of(sides, tables, roles)) for start, stop, sides in keys)
        order = (*form.lead, len(form.lead))
        nodes = [node for node, *_ in tables]
        if not nodes or {storage(node) for node in nodes} & {storage(node) for node in self.written}:
            raise Unknown
        layouts = tuple(layout for _, *layout in tables)
        rotation = not halves, tuple(map(tuple, layouts)), found
        alike = halves, keys, tuple(rows for _, _, rows in layouts)
        return Rotated(self.x, order, [*self.trail], self.written, nodes, rotation, alike)

    def _is_whole(self, pieces: tuple[Piece, ...], axis: int | None, tokens: int) -> bool:
        """Whether pieces are all tokens, in their order."""
        if axis is None:
            return True
        ends = [0, *(piece.stop for piece in pieces)]
        return axis == tokens and [piece.start for piece in pieces] == ends[:-1] and ends[-1] == self._size(axis)

    def _reads_of(
        self, sides: tuple[Any, ...], tables: list[Table], roles: dict[int, str]
    ) -> tuple[tuple[Read, ...], ...]:
        sides = sides[:2] if sides[:2] == sides[2:] else sides
        return tuple(tuple(self._read(factor, key, tables, roles) for factor, key in side) for side in sides)

    def _read(self, factor: float, key: Key, tables: list[Table], roles: dict[int, str]) -> Read:
        if key is None:
            return factor, -1, 0
        (node, entries, repeated, axes), index, sign = self.reads[key]
        if any(axis not in roles for axis in axes):
            raise Unknown
        table = node, entries, repeated, "".join(roles[axis] for axis in axes)
        if table not in tables:
            tables.append(table)
        return factor * sign, tables.index(table), index

    def depends(self, node: fx.Node) -> bool:
        """Whether a node is computed from x."""
        found = self.dependent.get(node)
        if found is None:
            self.dependent[node] = False  # what writes to it is asked below, and may read it
            inputs = [each for each in node.all_input_nodes if self.x <= each]
            inputs += [each for write in _writes(node) for each in write.all_input_nodes if each is not node]
            found = self.dependent[node] = any(self.depends(each) for each in inputs)
        return found

    def form(self, node: Any, reader: fx.Node | None = None) -> Form:
        """What a node is when ``reader`` reads it."""
        if not isinstance(node, fx.Node) or not self.depends(node):
            raise Unknown
        writes = _writes(node)
        after = bool(writes) and (reader is None or writes[-1] < reader)
        if writes and not after and not (len(writes) == 1 and reader is not None and reader <= writes[0]):
            raise Unknown
        if (node, after) not in self.forms:
            found = self._after(node, writes) if after else self._form(node)
            self._check(node, found)
            self.forms[node, after] = found
        return self.forms[node, after]

    def _check(self, node: fx.Node, form: Form) -> None:
        """Raise Unknown if a node rounds, or has other sizes than its form says, as by broadcasting."""
        if value(node) is None:
            return
        mine = dtype(node)
        if mine not in (self.dtype, torch.float32, torch.float64) or mine.itemsize < self.dtype.itemsize:
            raise Unknown
        sizes, whole = shape(node) or (), shape(self.x) or ()
        lead = len(form.lead)
        kept = zip(form.lead, sizes, strict=False)
        if not all(label == form.axis or equal(size, whole[label]) for label, size in kept):
            raise Unknown
        if any(piece.cells.shape != sizes[lead:] for piece in form.pieces):
            raise Unknown

    def _after(self, node: fx.Node, writes: Nodes) -> Form:
        """A new tensor after writes to parts of it."""
        if storage(node) is None or storage(node) in {storage(each) for each in node.all_input_nodes}:
            raise Unknown
        before = [user for user in node.users if user < writes[-1] and user not in writes]
        if before and (len(writes) > 1 or not _settled(node, writes[0])):
            raise Unknown
        if node.op not in ("call_function", "call_method"):
            raise Unknown
        self.written.append(node)
        self.trail |= dict.fromkeys([node, *writes] if node is not self.x else writes)
        form = None if kind(node) in EMPTY else self._form(node)
        for write in writes:
            item = self.form(write.args[2], write)
            spans, inner = self._index(write.args[1], shape(node) or (), item.lead)
            if form is None:
                size = (shape(node) or ())[len(item.lead) :]
                if not all(isinstance(each, int) for each in size):
                    raise Unknown
                form = Form(item.lead, tuple(piece._replace(cells=np.full(size, None)) for piece in item.pieces))
                form = form._replace(axis=item.axis)
            form = self._overlay(form, item, spans, inner)
        if form is None or any(cell is None for piece in form.pieces for cell in piece.cells.flat):
            raise Unknown
        return form

    def _overlay(self, form: Form, item: Form, span: tuple[int, int, int] | None, inner: Any) -> Form:
        """A form with a part of it replaced."""
        if form.lead != item.lead or len(item.pieces) != 1:
            raise Unknown
        new = item.pieces[0]
        if span is None:
            if form.spans() != item.spans():
                raise Unknown
            cells = form.pieces[0].cells.copy()
            cells[inner] = new.cells
            return form.map(lambda _: cells)
        axis, start, stop = span
        size = self._size(axis)
        whole = form.pieces[0]
        if form.axis is not None or item.axis != axis or (new.start, new.stop) != (start, stop):
            raise Unknown
        cells = whole.cells.copy()
        cells[inner] = new.cells
        pieces = [Piece(0, start, whole.cells), Piece(start, stop, cells), Piece(stop, size, whole.cells)]
        return Form(form.lead, tuple(piece for piece in pieces if piece.start != piece.stop), axis)

    def _size(self, axis: int) -> int:
        size = shape(self.x)[axis]  # type: ignore[index]
        if not isinstance(size, int):
            raise Unknown
        return size

    def _form(self, node: fx.Node) -> Form:
        if node is self.x:
            size = shape(node) or ()
            cells = np.empty(size[-1], object)
            cells[:] = [{(i, None): 1.0} for i in range(size[-1])]
            return Form(tuple(range(len(size) - 1)), (Piece(0, None, cells),))
        name = kind(node)
        self.trail[node] = None
        once = name == "repeat_interleave" and argument(node, 1, "repeats") == 1
        if name in CASTS or name == "clone" or once:
            return self.form(node.args[0], node)
        if name in ("mul", "div"):
            return self._product(node)
        if name in ("add", "sub"):
            return self._sum(node)
        if name == "neg":
            return self.form(node.args[0], node).map(lambda cells: mapped(cells, lambda cell: _scaled(cell, -1.0)))
        if name in ("cat", "stack"):
            return self._joined(node, name)
        if name == "getitem":
            return self._item(node)
        form = self.form(node.args[0], node)
        lead, rank = len(form.lead), len(shape(node.args[0]) or ())
        if name in RESHAPES:
            before, after = shape(node.args[0]) or (), shape(node) or ()
            if dtype(node) != dtype(node.args[0]):
                raise Unknown  # a view of the bits
            if len(after) < lead or not equal(tuple(before[:lead]), tuple(after[:lead])):
                raise Unknown
            sizes = after[lead:]
            if not all(isinstance(size, int) for size in sizes):
                raise Unknown
            return form.map(lambda cells: cells.reshape(sizes))
        if name in ("transpose", "permute"):
            order = order_of(node)
            if order is None or any((place < lead) != (axis < lead) for place, axis in enumerate(order)):
                raise Unknown
            form = form._replace(lead=tuple(form.lead[axis] for axis in order[:lead]))
            return form.map(lambda cells: cells.transpose([axis - lead for axis in order[lead:]]))
        if name in ("unsqueeze", "squeeze"):
            axis = argument(node, 1, "dim")
            axis = axis % (rank + (name == "unsqueeze")) if isinstance(axis, int) else -1
            if axis < lead:
                raise Unknown
            change = np.expand_dims if name == "unsqueeze" else _squeezed
            return form.map(lambda cells: change(cells, axis - lead))
        if name == "sum":
            axis = argument(node, 1, "dim")
            axis = axis[0] if isinstance(axis, (tuple, list)) and len(axis) == 1 else axis
            if not isinstance(axis, int) or axis % rank < lead or argument(node, 2, "keepdim", False):
                raise Unknown
            return form.map(lambda cells: _total(np.moveaxis(cells, axis % rank - lead, 0)))
        raise Unknown

    def _product(self, node: fx.Node) -> Form:
        operands: tuple[Any, Any] = pair(node, kind(node)) or (None, None)
        if kind(node) == "div" or any(isinstance(each, (int, float)) for each in operands):
            one, factor = operands if isinstance(operands[0], fx.Node) else operands[::-1]
            if not isinstance(factor, (int, float)) or not factor or (kind(node) == "div" and one is not operands[0]):
                raise Unknown
            by = 1 / factor if kind(node) == "div" else float(factor)
            return self.form(one, node).map(lambda cells: mapped(cells, lambda cell: _scaled(cell, by)))
        if not all(isinstance(each, fx.Node) for each in operands):
            raise Unknown
        one, table = operands if self.depends(operands[0]) else operands[::-1]
        if self.depends(table):
            raise Unknown
        form, sizes = self.form(one, node), shape(table)
        inner = form.pieces[0].cells.ndim
        rank = len(shape(one) or ())
        tensor = value(table)
        if sizes is None or not sizes or len(sizes) > rank or tensor is None or tensor.requires_grad:
            raise Unknown
        repeated, axes, padded = False, [], (1,) * (rank - len(sizes)) + sizes
        for axis, (label, size, mine) in enumerate(zip(form.lead, padded, shape(one) or (), strict=False)):
            if equal(size, 1):
                continue
            if not equal(size, mine):
                raise Unknown
            if axis == 0 and repeats(table):
                repeated = True
            else:
                axes.append((label, str(size)))
        numbers = numbers_of(table, min(inner, len(sizes)))
        entries = np.empty(numbers.shape, object)
        for index, place in enumerate(np.ndindex(numbers.shape)):
            sign, key = numbers[place]
            key = (tuple(size for _, size in axes), key)
            self.reads.setdefault(
                key, ((table, numbers.size, repeated, tuple(label for label, _ in axes)), index, sign)
            )
            entries[place] = {key: sign}
        return form.map(lambda cells: _products(cells, entries))

    def _sum(self, node: fx.Node) -> Form:
        operands = pair(node, kind(node))
        if operands is None:
            raise Unknown
        one, other = self.form(operands[0], node), self.form(operands[1], node)
        if one.spans() != other.spans():
            raise Unknown
        sign = -1.0 if kind(node) == "sub" else 1.0
        pieces = []
        for mine, theirs in zip(one.pieces, other.pieces, strict=True):
            if mine.cells.shape != theirs.cells.shape:
                raise Unknown
            added = [_added(a, _scaled(b, sign)) for a, b in zip(mine.cells.flat, theirs.cells.flat, strict=True)]
            pieces.append(mine._replace(cells=array_of(added, mine.cells.shape)))
        return one._replace(pieces=tuple(pieces))

    def _joined(self, node: fx.Node, name: str) -> Form:
        parts = argument(node, 0, "tensors")
        axis = argument(node, 1, "dim", 0)
        if not isinstance(parts, (tuple, list)) or not parts or not isinstance(axis, int):
            raise Unknown
        forms = [self.form(part, node) for part in parts]
        first = forms[0]
        lead, axis = len(first.lead), axis % len(shape(node) or ())
        if axis < lead:
            if name == "stack" or any(form.lead != first.lead for form in forms):
                raise Unknown
            label = first.lead[axis]
            pieces = tuple(piece for form in forms for piece in form.pieces)
            if any(form.axis != label for form in forms) or not self._is_whole(pieces, label, label):
                raise Unknown
            return Form(first.lead, pieces, label)
        if any(form.spans() != first.spans() for form in forms):
            raise Unknown
        join = np.concatenate if name == "cat" else np.stack
        joined = []
        for same in zip(*(form.pieces for form in forms), strict=True):
            joined.append(same[0]._replace(cells=join([piece.cells for piece in same], axis - lead)))
        return first._replace(pieces=tuple(joined))

    def _item(self, node: fx.Node) -> Form:
        source: Any = node.args[0]
        index: Any = node.args[1]
        if kind(source) in PARTS:
            form = self.form(source.args[0], source)
            self.trail[source] = None
            return form.map(lambda cells: _part(source, index, cells, len(form.lead)))
        form = self.form(source, node)
        span, inner = self._index(index, shape(source) or (), form.lead)
        if span is not None:
            if form.axis is not None:
                raise Unknown
            form = form._replace(axis=span[0], pieces=(form.pieces[0]._replace(start=span[1], stop=span[2]),))
        return form.map(lambda cells: cells[inner])

    def _index(self, index: Any, sizes: tuple[Any, ...], labels: tuple[int, ...]) -> tuple[Any, tuple[Any, ...]]:
        """An index of a node: ``(axis, start, stop)`` if it takes a part of the tokens, and the index of channels."""
        items = per_axis(index, len(sizes))
        lead, span = len(labels), None
        for item, size, label in zip(items[:lead], sizes, labels, strict=False):
            if item == slice(None):
                continue
            if not isinstance(item, slice) or not isinstance(size, int) or span is not None or not is_plain(item):
                raise Unknown
            start, stop, step = item.indices(size)
            if step != 1 or stop <= start:
                raise Unknown
            span = (label, start, stop)
        return span, tuple(items[lead:])


def _settled(node: fx.Node, write: fx.Node) -> bool:
    """Whether nothing sees both what a node was before a write and what it is later."""
    for user in node.users:
        if user is write or write < user:
            continue
        views = kind(user) in VIEWS | CASTS
        if views and (any(write < each for each in user.users) or not _settled(user, write)):
            return False
    return True


def _part(source: fx.Node, index: int, cells: np.ndarray, lead: int) -> np.ndarray:
    """One of the tensors of ``unbind``, ``chunk`` or ``split``."""
    name = kind(source)
    axis = argument(source, *((1, "dim", 0) if name == "unbind" else (2, "dim", 0))) % (lead + cells.ndim) - lead
    if axis < 0 or not isinstance(index, int):
        raise Unknown
    if name == "unbind":
        return np.take(cells, index, axis)
    size, sizes = cells.shape[axis], argument(source, 1, "chunks" if name == "chunk" else "split_size")
    if name == "chunk" and isinstance(sizes, int):
        sizes = -(-size // sizes)
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(each, int) for each in sizes):
        raise Unknown
    ends = np.cumsum(sizes)[:-1]
    return np.split(cells, ends, axis)[index]


def _squeezed(cells: np.ndarray, axis: int) -> np.ndarray:
    if cells.shape[axis] != 1:
        return cells
    return np.squeeze(cells, axis)


def _scaled(cell: Sum, factor: float) -> Sum:
    return {term: factor * coefficient for term, coefficient in cell.items()}


def _added(one: Sum, other: Sum) -> Sum:
    found = dict(one)
    for term, coefficient in other.items():
        found[term] = found.get(term, 0.0) + coefficient
    return found


def _total(cells: np.ndarray) -> np.ndarray:
    """The sums over the first axis."""
    found = cells[0]
    for each in cells[1:]:
        added = [_added(a, b) for a, b in zip(found.flat, each.flat, strict=True)]
        found = array_of(added, found.shape)
    return found


def _products(cells: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Channels times numbers of a table."""
    sizes = np.broadcast_shapes(cells.shape, entries.shape)
    cells, entries = np.broadcast_to(cells, sizes), np.broadcast_to(entries, sizes)
    found = []
    for cell, entry in zip(cells.flat, entries.flat, strict=True):
        ((key, factor),) = entry.items()
        if any(old is not None for _, old in cell):
            raise Unknown  # a product of two tables
        found.append({(channel, key): factor * coefficient for (channel, _), coefficient in cell.items()})
    return array_of(found, sizes)


def _pairs(cells: np.ndarray, width: int) -> tuple[bool | None, list[tuple[int, int, Any]]]:
    """Whether the partners are half a head apart, None if nothing is turned; and each channel's own and other term."""
    halves, found = None, []
    for channel, cell in enumerate(cells):
        if cell is None:
            raise Unknown
        terms = {of: (coefficient, key) for (of, key), coefficient in cell.items() if coefficient != 0.0}
        if len(terms) != sum(coefficient != 0.0 for coefficient in cell.values()):
            raise Unknown
        own = terms.pop(channel, (0.0, None))
        if terms:
            ((partner, other),) = terms.items() if len(terms) == 1 else ((None, None),)
            mine = {channel ^ 1: False, (channel + width // 2) % width: True}.get(partner)  # type: ignore[arg-type]
            if mine is None or width % 2 or halves not in (None, mine):
                raise Unknown
            halves = mine
            found.append((channel, own, other))
        else:
            found.append((channel, own, (0.0, None)))
    return halves, found  # type: ignore[return-value]


def _sides(pairs: list[Any], halves: bool) -> tuple[Any, ...]:
    """Cosines and sines of the first channels of all pairs, then those of the second."""
    width = len(pairs)
    first = [*range(width // 2)] if halves else [*range(0, width, 2)]
    second = [channel + (width // 2 if halves else 1) for channel in first]

    def negated(term: tuple[float, Key]) -> tuple[float, Key]:
        return (-term[0] if term[0] else 0.0), term[1]

    return (
        tuple(pairs[channel][1] for channel in first),
        tuple(negated(pairs[channel][2]) for channel in first),
        tuple(pairs[channel][1] for channel in second),
        tuple(pairs[channel][2] for channel in second),
    )
