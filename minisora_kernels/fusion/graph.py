"""What a captured graph says: values and kinds of nodes, what lies beneath casts, what happens between two nodes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..checks import KERNEL_FLOATS

Nodes = list[fx.Node]

# Functions by the name that the patterns use. Methods of tensors have their own names.
FUNCTIONS: dict[Callable, str] = {
    operator.add: "add",
    operator.iadd: "iadd",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.pow: "pow",
    operator.matmul: "matmul",
    operator.getitem: "getitem",
    operator.setitem: "setitem",
    operator.neg: "neg",
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
}
for _name in (
    *("add", "sub", "mul", "div", "pow", "square", "sqrt", "rsqrt", "mean", "var", "addcmul", "matmul", "bmm"),
    *("layer_norm", "rms_norm", "linear", "gelu", "dropout", "conv2d", "conv3d", "softmax", "transpose", "permute"),
    *("unsqueeze", "squeeze", "reshape", "flatten", "unflatten", "unbind", "chunk", "split", "stack", "cat", "clone"),
    *("silu", "sigmoid", "narrow", "neg", "cos", "sin", "sum", "repeat_interleave"),
    *("empty", "empty_like", "zeros", "zeros_like"),
):
    for _module in (torch, F):
        if hasattr(_module, _name):
            FUNCTIONS[getattr(_module, _name)] = _name

# Whose patterns look for inputs by their names too; other functions are known with inputs by position only.
BY_KEYWORD = {"linear", "gelu", "silu", "dropout", "softmax", "scaled_dot_product_attention", "conv2d", "conv3d"}

# Nodes that show the same numbers, or a part of them, under another shape.
VIEWS = {"view", "reshape", "unflatten", "flatten", "transpose", "permute", "unbind", "chunk", "split", "getitem"}
VIEWS |= {"squeeze", "unsqueeze", "contiguous"}

CASTS = {"float", "half", "bfloat16", "to", "type", "type_as", "contiguous"}

# Functions of the operator module that write to their first argument.
IN_PLACE = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "pow", "matmul", "floordiv")}
IN_PLACE |= {operator.setitem, operator.iand, operator.ior, operator.ixor, operator.imod}
# Methods that write to their tensor: all that end with one underscore, and these.
METHODS_IN_PLACE = {f"__{function.__name__}__" for function in IN_PLACE}


def kind(node: Any) -> str:
    """The name of what a node computes; empty for anything else than a known function or a method."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        return str(node.target)
    name = FUNCTIONS.get(node.target, "") if node.op == "call_function" and callable(node.target) else ""
    return name if node.args or name in BY_KEYWORD else ""


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.kwargs[name] if name in node.kwargs else node.args[index] if len(node.args) > index else default


def value(node: Any) -> Tensor | None:
    """The fake tensor that stands for the result of a node."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def shape(node: Any) -> tuple[Any, ...] | None:
    found = value(node)
    return None if found is None else tuple(found.shape)


def dtype(node: Any) -> torch.dtype | None:
    found = value(node)
    return None if found is None else found.dtype


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes, or two shapes, are known to be equal; asking adds no guard."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return a is not None and b is not None and len(a) == len(b) and all(map(equal, a, b))
    return bool(statically_known_true(a == b))


def storage(node: Any) -> int | None:
    """What two nodes share if one is a view of the other."""
    found = value(node)
    if found is None or type(found) is not FakeTensor or found.layout is not torch.strided:
        return None
    return found.untyped_storage()._cdata


def plain(node: fx.Node) -> bool:
    """Whether the value is of torch's own class: a subclass may hold other numbers than it shows."""
    return type(value(node)) is FakeTensor


def is_cast(node: Any) -> bool:
    """Whether a node changes at most the dtype, from one that kernels take to another."""
    if kind(node) not in CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = value(node.args[0]), value(node)
    if before is None or after is None or before.device != after.device:
        return False
    return before.dtype in KERNEL_FLOATS and after.dtype in KERNEL_FLOATS and before.shape == after.shape


def beneath(node: Any, trail: Nodes) -> Any:
    """What lies beneath casts; those are appended to ``trail``."""
    while is_cast(node):
        trail.append(node)
        node = node.args[0]
    return node


def unrounded(node: Any, trail: Nodes) -> Any:
    """What lies beneath casts that round nothing."""
    while is_cast(node) and dtype(node) in (torch.float32, dtype(node.args[0])):
        trail.append(node)
        node = node.args[0]
    return node


def pair(node: Any, name: str) -> tuple[Any, Any] | None:
    """The two operands of ``add``, ``mul``, ... without options."""
    return (node.args[0], node.args[1]) if kind(node) == name and len(node.args) == 2 and not node.kwargs else None


def order_of(node: Any) -> tuple[int, ...] | None:
    """The axes of what a node transposes or permutes, in the node's order; None for any other node."""
    rank = len(shape(node) or ())
    if kind(node) == "transpose":
        one, other = (argument(node, i, f"dim{i - 1}") for i in (1, 2))
        if not isinstance(one, int) or not isinstance(other, int):
            return None
        swapped = {one % rank: other % rank, other % rank: one % rank}
        return tuple(swapped.get(axis, axis) for axis in range(rank))
    if kind(node) != "permute":
        return None
    axes = argument(node, 1, "dims")
    axes = axes if isinstance(axes, (tuple, list)) else node.args[1:]
    return tuple(axis % rank for axis in axes) if all(isinstance(axis, int) for axis in axes) else None


def sums(node: Any, trail: Nodes) -> list[tuple[Any, Any, Any, Nodes]]:
    """Ways to read a node as ``addend + a * b``: addend, a, b, and the nodes that the reading passed."""
    if kind(node) == "addcmul" and len(node.args) == 3 and not node.kwargs:
        addend, a, b = node.args
        return [(addend, a, b, trail), (addend, b, a, trail)]
    found = []
    operands = pair(node, "add") or pair(node, "iadd")
    for addend, product in (operands, operands[::-1]) if operands else ():
        passed = [*trail]
        factors = pair(product := beneath(product, passed), "mul")
        if factors and not (kind(node) == "iadd" and addend is not node.args[0]):
            passed.append(product)
            found += [(addend, *factors, passed), (addend, *factors[::-1], passed)]
    return found


def written(node: fx.Node) -> Nodes | None:
    """The nodes that a node writes to; None if it may write to anything."""
    name, changes = "", False
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if node.op == "call_method":
        name = str(node.target)
        changes = name in METHODS_IN_PLACE
    elif node.op != "call_function":
        return None
    elif isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes) if node.target._schema.is_mutable else []
    else:
        module = getattr(node.target, "__module__", None) or type(node.target).__module__
        higher = isinstance(node.target, (torch._ops.HigherOrderOperator, torch._ops.OpOverloadPacket))
        if higher or module.split(".")[0] not in ("torch", "_operator", "math", "builtins", "minisora_kernels"):
            return None
        name = getattr(node.target, "__name__", "")
        changes = node.target in IN_PLACE or _inplace(node)
    changes = changes or (name.endswith("_") and not name.endswith("__"))
    changed = _nodes(node.args[0]) if changes and node.args else []
    return [*changed, *_nodes(node.kwargs.get("out"))]


def _nodes(argument: Any) -> Nodes:
    """The nodes of an argument that is one, or some."""
    items = argument if isinstance(argument, (list, tuple)) else [argument]
    return [item for item in items if isinstance(item, fx.Node)]


def _inplace(node: fx.Node) -> bool:
    """Whether the option ``inplace`` of a function is on."""
    if node.kwargs.get("inplace"):
        return True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin, which has no such option
        return False
    return bool(bound.arguments.get("inplace"))


def changes_state(node: fx.Node) -> bool:
    """Whether a node switches gradients, autocast or the like: it has no value, and writes to nothing."""
    return node.op == "call_function" and node.meta.get("example_value") is None and written(node) == []


class Reader:
    """The order of a graph's nodes, and what happens between two of them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
        self.events = [
            node
            for node in graph.nodes
            if changes_state(node) or written(node) != []  # None is an event
        ]

    def erase(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        self.order.pop(node)
        self.events = [event for event in self.events if event is not node]

    def obstacle(self, nodes: Nodes, operands: Nodes, last: fx.Node) -> str | None:
        """Why ``last`` cannot be computed where it stands from the operands as they are there; None if it can."""
        first = min(self.order[node] for node in (*nodes, last))
        storages = {storage(node) for node in (*operands, *nodes)} - {None}
        for event in self.events:
            if event in nodes or not first < self.order[event] < self.order[last]:
                continue
            targets = written(event)
            if targets is None or None in (found := {storage(target) for target in targets}):
                return f"{getattr(event.target, '__name__', event.target)} stands between and may write to anything"
            if not storages.isdisjoint(found):
                return "what is read is written in place between"
            if not targets:
                return "gradients or autocast are switched between"
        return self._shared(last) if kind(last) == "iadd" else None

    def _shared(self, sum_: fx.Node) -> str | None:
        """Why a sum in place cannot be one of a new tensor; None if nobody would see the difference."""
        mine, reason = storage(sum_), "x is written in place, and read elsewhere"
        if mine is None:
            return reason
        for node in self.graph.nodes:
            if storage(node) == mine and node is not sum_:
                if node.op in ("placeholder", "get_attr") or (node.op == "call_method" and node.target == "detach"):
                    return reason
                if any(self.order.get(user, -1) > self.order[sum_] for user in node.users):
                    return reason
        return None

    def writes_to(self, mine: int | None) -> bool:
        """Whether any node may write to that storage."""
        for event in self.events:
            targets = written(event)
            if targets is None or {mine, None} & {storage(target) for target in targets}:
                return True
        return False
