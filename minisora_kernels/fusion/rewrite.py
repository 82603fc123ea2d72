"""The pass: reads a captured graph, puts ops where they compute the same, and notes what it found."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

from ..checks import FLOATS
from . import calls
from .attention import match_attention
from .graph import Nodes, Reader, dtype, is_cast, kind, plain, storage, value
from .match import Match, Permuted, Replayed
from .products import match_glu, match_mlp, match_patches
from .report import Site
from .rows import join, match_adaln, match_gate, match_scaled
from .serve import Choice, Unserved

# What is larger comes first: a modulation holds a norm that is scaled alone, and is itself a sum of a product.
FAMILIES = (match_attention, match_patches, match_mlp, match_glu, match_adaln, match_scaled, match_gate)


def rewrite(module: fx.GraphModule, choice: Choice, root: str) -> list[Site]:
    """Rewrite a graph and those of its checkpoints in place.

    Args:
        module: What Dynamo captured.
        choice: What may be put in.
        root: What the report calls the model itself.
    """
    sites: list[Site] = []
    _rewrite_graph(module, choice, root, sites)
    return sites


def _rewrite_graph(module: fx.GraphModule, choice: Choice, root: str, sites: list[Site]) -> None:
    graph = module.graph
    for node in graph.nodes:
        body = node.op == "get_attr" and getattr(module, str(node.target), None)
        if isinstance(body, fx.GraphModule) and all(_is_checkpoint(user) for user in node.users):
            _rewrite_graph(body, choice, root, sites)
    _drop_casts_of_nothing(graph)
    served = _replace(Reader(graph), choice, root, sites)
    if not choice.compiling:
        served |= _keep_checkpoints(graph)
    if served:
        graph.lint()
        module.recompile()


def _drop_casts_of_nothing(graph: fx.Graph) -> None:
    """Casts to the dtype that is there return their very tensor, and stand between what could be joined."""
    for node in graph.nodes:
        same = is_cast(node) and kind(node) != "contiguous" and storage(node) == storage(node.args[0])
        if same and storage(node) is not None and dtype(node) == dtype(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_checkpoint(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "tag_activation_checkpoint"


def _keep_checkpoints(graph: fx.Graph) -> bool:
    """Have what the model checkpoints recomputed, which is a compiler's work where there is one."""
    found = [node for node in graph.nodes if _is_checkpoint(node)]
    for node in found:
        node.target = calls.checkpoint
    return bool(found)


def _replace(reader: Reader, choice: Choice, root: str, sites: list[Site]) -> bool:
    """Put in what the families find; whether anything was."""
    graph = reader.graph
    put: dict[fx.Node, Site] = {}
    for find in FAMILIES:
        for node in list(graph.nodes):
            match = None if node.op in ("placeholder", "get_attr", "output") else find(node)
            if match is None or match.op not in choice.ops:
                continue
            while match.less is not None and reader.obstacle(match.trail, _read(match), match.result):
                match = match.less
            name, reason = _judge(match, reader, choice)
            module, block = owner(node, root)
            site = Site(module, block, match.op, name, reason)
            if name is None:
                sites.append(site)
            else:
                put[_put(match, name, reader, choice)] = site
    _join(reader, put, choice)
    sites.extend(put.values())
    if put:
        _loosen_views(reader)
    return bool(put)


def _judge(match: Match, reader: Reader, choice: Choice) -> tuple[str | None, str]:
    """The backend that serves a match, or None and why it is left."""
    nodes = _read(match)
    match.left = match.left or _unusual(nodes, match.mask) or reader.obstacle(match.trail, nodes, match.result) or ""
    if match.left:
        return None, match.left
    call = {name: each if isinstance(each, Tensor) else value(each) for name, each in match.served.items()}
    result = value(match.result)
    return choice.serve(match.op, call, result is not None and result.requires_grad, match.detail, match.table)


def _read(match: Match) -> Nodes:
    """The tensors that the call of a match reads."""
    return [node for node in match.operands() if value(node) is not None]


def _unusual(nodes: Nodes, mask: fx.Node | None) -> str:
    """A reason, if an operand is not what the ops take on any backend."""
    for node in nodes:
        tensor = value(node)
        assert tensor is not None
        if not plain(node):
            return f"an operand is a {type(tensor).__name__}"
        fits = tensor.dtype in FLOATS or (node is mask and tensor.dtype is torch.bool)
        if not fits or tensor.layout is not torch.strided:
            return f"an operand is of {tensor.dtype} and layout {tensor.layout}"
    return ""


def _put(match: Match, name: str, reader: Reader, choice: Choice) -> fx.Node:
    """Put the call of a match in the place of its result."""
    graph, result = reader.graph, match.result
    options = dict(match.options)
    if choice.backend is not None or choice.mode == "on" or choice.compiling:
        options["backend"] = name
    with graph.inserting_before(result):
        start = result.prev
        arguments = [each.build(graph) if isinstance(each, (Replayed, Permuted)) else each for each in match.arguments]
        call = graph.call_function(match.call, tuple(arguments), {**match.keywords, "options": options})
        node = call
        while node is not start:
            reader.order.setdefault(node, reader.order[result])
            node = node.prev
    call.meta.update(result.meta)
    result.replace_all_uses_with(call)
    for node in sorted({result, *match.trail}, key=lambda each: -reader.order[each]):
        if not node.users and node.op not in ("placeholder", "get_attr"):
            reader.erase(node)
    return call


def _join(reader: Reader, put: dict[fx.Node, Site], choice: Choice) -> None:
    """One call for each gate whose sum a norm reads."""
    if "gate_residual_adaln" not in choice.ops:
        return
    for norm in list(put):
        gate = norm.args[0]
        if norm.target is not calls.adaln or not isinstance(gate, fx.Node) or gate.target is not calls.gate_residual:
            continue
        x, branch, rows = (value(each) for each in gate.args)
        shift, scale, weight, bias = (value(each) for each in norm.args[1:])
        call = dict(x=x, branch=branch, gate=rows, branch_bias=None, shift=shift, scale=scale, weight=weight, bias=bias)
        result = value(norm)
        try:
            name, _ = choice.serve("gate_residual_adaln", call, result is not None and result.requires_grad, "")
        except Unserved:
            continue  # the two calls stay
        site = put[norm]
        if name is not None and join(reader, gate, norm):
            put[gate] = Site(site.module, site.block, "gate_residual_adaln", name)
            del put[norm]


def _loosen_views(reader: Reader) -> None:
    """An op may lay its result out in another way than what it replaces, so a view of it may have to copy."""
    for node in reader.graph.nodes:
        shapes = kind(node) == "view" and not node.kwargs and not isinstance(node.args[1], torch.dtype)
        if shapes and not reader.writes_to(storage(node)):
            node.target = "reshape"


def owner(node: fx.Node, root: str) -> tuple[str, str]:
    """Path and class of the innermost module of a list that a node belongs to, but for layers of torch."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    found = "", root
    for path, cls in stack.values():
        path = re.sub(r"^L\['\w+'\]\.?", "", path)
        if re.search(r"\.\d+$", path) and not str(cls.__module__).startswith("torch."):
            found = path, getattr(cls, "__name__", str(cls))
    return found
