"""Cases of adaln, gate_residual and gate_residual_adaln, which take the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import minisora_kernels as mk

from . import Case, Random, random_tensors, width_of

MODULATED = {
    "adaln": ("x", "shift", "scale", "weight", "bias"),
    "gate_residual": ("x", "branch", "gate", "branch_bias"),
    "gate_residual_adaln": ("x", "branch", "gate", "branch_bias", "shift", "scale", "weight", "bias"),
}


def modulated(
    random: Random,
    name: str,
    batch: int,
    tokens: int,
    width: int,
    gate_rows: int,
    rows: int,
    affine: bool = False,
    norm: str = "layer",
    dtypes: dict[str, torch.dtype] | None = None,
    index: Tensor | None = None,
) -> Iterator[Case]:  # one argument a column of the tables
    """The same tokens ``[batch, tokens, width]`` through adaln, gate_residual and gate_residual_adaln."""
    tensors = {
        "x": random(batch, tokens, width) * 2 + 0.5,
        "branch": random(batch, tokens, width),
        "gate": random(batch, gate_rows, width),
        "shift": random(batch, rows, width),
        "scale": random(batch, rows, width),
    }
    if affine:
        tensors["weight"] = random(width) + 1
        if norm == "layer":
            tensors["bias"] = random(width)
    for op, names in MODULATED.items():
        options = {} if op == "gate_residual" else {"norm": norm}
        yield Case(
            op,
            name,
            {key: value for key, value in tensors.items() if key in names},
            partial(_call, op, options, index),
            {key: value for key, value in (dtypes or {}).items() if key in names},
        )


def _call(op: str, options: dict[str, str], index: Tensor | None, tensors: dict[str, Tensor], **more: Any) -> Any:
    if index is not None:
        more["index"] = index.to(tensors["x"].device)
    return getattr(mk, op)(**tensors, **options, **more)


def by_index(
    random: Random,
    name: str,
    batch: int,
    tokens: int,
    width: int,
    rows: int,
    *,
    each: bool = False,
    affine: bool = False,
    norm: str = "layer",
    dtypes: dict[str, torch.dtype] | None = None,
) -> Iterator[Case]:
    """The same with an index of the rows: of ``each`` sample its own, in which every token draws its row."""
    numbers = random(batch, tokens) if each else random(tokens)
    index = ((numbers * 997).long() % rows).contiguous()
    yield from modulated(random, name, batch, tokens, width, rows, rows, affine, norm, dtypes, index)


def with_bias(random: Random, *row: Any) -> Iterator[Case]:
    """The same through the two ops that take the bias of the branch."""
    for case in modulated(random, *row):
        if "branch" in case.tensors:
            yield replace(case, tensors=case.tensors | {"branch_bias": random(case.tensors["x"].shape[2])})


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(100 * draw)
    return [
        *modulated(random, "per-sample", 2, 17, 96, 1, 1),
        *modulated(random, "mixed-rows", 1, 12, 16, 6, 4, True),
        *modulated(random, "odd-width", 3, 257, 7, 1, 1, True),
        *modulated(random, "model-width", 2, 70, 1152, 1, 1),
        *modulated(random, "float32-stream", 2, 65, 48, 1, 1, False, "layer", {"x": torch.float32}),
        *(case for case in modulated(random, "a-clip", 1, 16384, 8, 1, 1, True) if case.op != "gate_residual"),
        next(modulated(random, "per-token", 2, 19, 24, 19, 19, False, "rms")),
        *(replace(case, layout="chunked") for case in modulated(random, "chunked", 2, 18, 96, 1, 1)),
        *(replace(case, layout="chunked") for case in modulated(random, "chunked-frames", 2, 18, 24, 3, 3, True)),
        *with_bias(random, "branch-bias", 2, 37, 40, 1, 1, True),
        *by_index(random, "index", 2, 70, 40, 3, affine=True),
        *by_index(random, "index-per-sample", 2, 37, 1152, 40, each=True),
        *(replace(case, layout="offset") for case in modulated(random, "offset", 2, 17, 96, 1, 1, True)),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""

    def of_tokens(op: str) -> Case:
        return next(case for case in modulated(random, "", 2, tokens // 2, width_of(tokens), 1, 1) if case.op == op)

    for op in MODULATED:
        yield op, partial(of_tokens, op)
