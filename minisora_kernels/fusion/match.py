"""A match: nodes that compute what an op computes, and the call that takes their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..backends import Table
from .graph import Nodes


@dataclass(frozen=True)
class Replayed:
    """A node seen through views that are applied again, the outermost first."""

    node: fx.Node
    views: tuple[fx.Node, ...] = ()

    def build(self, graph: fx.Graph) -> fx.Node:
        node = self.node
        for view in reversed(self.views):
            replaced = {view.args[0]: node}
            node = graph.node_copy(view, lambda old, replaced=replaced: replaced.get(old, old))  # type: ignore[misc]
        return node


@dataclass(frozen=True)
class Permuted:
    """A node with its last axis split in two, if ``split`` says so, and then its axes in another order."""

    node: fx.Node
    order: tuple[int, ...]
    split: tuple[int, int] | None = None

    def build(self, graph: fx.Graph) -> fx.Node:
        node = self.node
        if self.split is not None:
            node = graph.call_method("unflatten", (node, -1, self.split))
        return graph.call_method("permute", (node, *self.order)) if self.moves() else node

    def moves(self) -> bool:
        return self.order != tuple(range(len(self.order)))


@dataclass
class Match:
    """
    Attributes:
        op: Name of the op.
        result: The node whose value the call gives.
        trail: The other nodes that the call makes superfluous, if nothing else reads them.
        call: The function of ``calls.py``.
        arguments: Its arguments: nodes, ``Replayed``, ``Permuted``, plain values, or None.
        keywords: Its keyword arguments; the pass adds a backend to ``options``.
        served: What the predicates of the op take, by name: nodes, of which the first has the dtype of the regime.
        detail: What tells regimes of the op apart.
        table: Which backends can serve such a call; None for the op's ``BACKENDS``.
        left: Why the site must be left as it is; empty if nothing speaks against it.
        options: Those of the op, by name.
        less: A match with less in it, for where something stands between the nodes of this one.
        mask: An argument that may be bool.
    """

    op: str
    result: fx.Node
    trail: Nodes
    call: Callable
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    served: dict[str, Any]
    detail: str = ""
    table: Table | None = None
    left: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    less: Match | None = None
    mask: fx.Node | None = None

    def operands(self) -> Nodes:
        """The nodes that the call reads."""
        found: Nodes = []
        for argument in self.arguments:
            if isinstance(argument, (Replayed, Permuted)):
                found.append(argument.node)
            elif isinstance(argument, fx.Node):
                found.append(argument)
        return found
