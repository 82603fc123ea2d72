"""How DTensor may shard what the token-local ops take, along a dimension of a mesh: by sample, or by token.

    by sample    tokens and rows are split alike; a parameter [D] is whole, and its gradient a sum over the devices
    by token     tokens are split; rows are whole, and their gradients sums, too. Only with one row a sample, or with an
                 index, which is split with the tokens: a device cannot tell else which rows its tokens read

``gelu_mlp`` and ``glu_mlp`` are split by sample, or by token where their tokens are a matrix. Their weights are whole.

A rule belongs to a raw op; an op's file asks for it. torch's table of them is filled when somebody imports
``torch.distributed.tensor``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .backends import LIBRARIES
from .on_import import when_imported

TOKENS = ("x", "branch", "residual", "y", "h", "a")  # split in dimension 0 or 1
STATISTICS = ("mean", "rstd")  # the same
ROWS = ("shift", "scale", "gate")
# All other tensors are parameters of every token.


def _kind(name: str) -> str:
    plain = name.removeprefix("d")
    if plain in ROWS:
        return "rows"
    return "tokens" if plain in (*TOKENS, *STATISTICS) else "parameter"


def _rule(overload: Any, matrix: bool) -> Callable[..., list[tuple[list, list]]]:
    """The placements of results and arguments that the op takes, from its arguments as DTensor has them."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    schema = overload._schema
    names = [argument.name for argument in schema.arguments]
    results = [result.name for result in schema.returns]

    def placements(arguments: dict[str, Any], dim: int) -> tuple[list, list]:
        split = {"tokens": Shard(dim), "rows": Shard(0) if dim == 0 else Replicate(), "parameter": Replicate()}
        sums = {"tokens": Shard(dim), "rows": Shard(0) if dim == 0 else Partial(), "parameter": Partial()}
        given = [split[_kind(name)] if hasattr(arguments[name], "placements") else None for name in names]
        if hasattr(arguments.get("index"), "placements"):  # [N], or [B, N]
            places = len(arguments["index"].shape)
            along = Shard(dim) if places == 2 else Shard(0) if dim == 1 else Replicate()
            given[names.index("index")] = along
        return [sums[_kind(name)] if asked(arguments, name) else Replicate() for name in results], given

    def asked(arguments: dict[str, Any], result: str) -> bool:
        return bool(arguments.get("need_" + result.removeprefix("d"), arguments.get(result, True) is not None))

    def rule(*values: Any) -> list[tuple[list, list]]:
        arguments = dict(zip(names, values, strict=True))
        whole = [Replicate() if hasattr(value, "placements") else None for value in values]
        found = [([Replicate()] * len(results), whole)]
        tokens = next(arguments[name] for name in ("x", "dy") if arguments.get(name) is not None)
        if not matrix:
            found.append(placements(arguments, 0))
            counts = [value.shape[1] for name, value in arguments.items() if name in ROWS and value is not None]
            counts += [value for name, value in arguments.items() if name.endswith("_rows")]
            if arguments.get("index") is not None or all(count <= 1 for count in counts):
                found.append(placements(arguments, 1))
        elif len(tokens.shape) == 2 or (len(tokens.shape) > 2 and tokens.shape[0] % tokens.mesh.size() == 0):
            found.append(placements(arguments, 0))  # h has the tokens of all samples in one dimension
        return found

    return rule


def token_local(op: str, *, matrix: bool = False) -> None:
    """Let DTensor shard the raw ops of ``op``, which are defined. ``matrix``: they take tokens as one."""

    def register() -> None:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
        from torch.distributed.tensor.experimental import register_sharding

        # What of a call tells it from another: torch leaves out arguments before the first integer, as need_x.
        infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        for library in LIBRARIES:
            for direction in ("fwd", "bwd"):
                overload = getattr(getattr(torch.ops, library.ns), f"{op}_{direction}").default
                register_sharding(overload)(_rule(overload, matrix))
                infos[overload] = RuntimeSchemaInfo(1, needs_pytree=True)

    when_imported("torch.distributed.tensor", register)
