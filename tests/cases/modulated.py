"""More cases of modulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.modulated import by_index, modulated, with_bias


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(100 * draw)
    # name, B, N, D, rows of gate, rows of shift and scale, affine, norm, dtypes
    table: list[tuple] = [
        ("per-sample", 2, 17, 96, 1, 1, False, "layer", {}),
        ("one-token", 3, 1, 8, 1, 1, False, "layer", {}),
        ("per-frame", 2, 4 * 33, 40, 4, 4, False, "layer", {}),
        ("per-token", 2, 19, 24, 19, 19, False, "rms", {}),
        ("affine-per-token", 2, 19, 24, 19, 19, True, "layer", {}),
        ("mixed-rows", 2, 12, 16, 1, 4, False, "layer", {}),
        ("lcm-rows", 1, 12, 16, 6, 4, True, "layer", {}),
        ("odd-width", 3, 257, 7, 1, 1, True, "layer", {}),
        ("width-one", 2, 5, 1, 1, 1, False, "rms", {}),
        ("long", 1, 1590, 72, 1, 1, True, "layer", {}),
        ("a-clip", 1, 16384, 8, 1, 1, True, "layer", {}),
        ("a-clip-of-mixed-rows", 1, 8192, 8, 1, 8192, False, "layer", {}),
        ("rows-over-chunks", 2, 3 * 100, 33, 3, 3, True, "rms", {}),
        ("model-width", 2, 70, 1152, 1, 1, False, "layer", {}),
        ("fp32-modulation", 2, 65, 48, 1, 1, True, "layer", dict.fromkeys(("shift", "scale", "gate"), torch.float32)),
        ("fp32-stream", 2, 65, 48, 1, 1, False, "layer", {"x": torch.float32}),
        ("empty-batch", 0, 5, 16, 1, 1, True, "layer", {}),
        ("no-tokens", 2, 0, 16, 1, 1, True, "layer", {}),
    ]
    for row in table:
        yield from modulated(random, *row)
    # name, B, N, D, rows, what else
    named: list[tuple] = [
        ("index", 2, 70, 33, 3, dict(affine=True)),
        ("index-per-sample", 2, 37, 40, 5, dict(each=True, norm="rms")),
        ("index-of-rows-without-tokens", 1, 19, 16, 30, dict(each=True, affine=True)),
        ("index-of-a-row-a-token", 2, 19, 16, 19, {}),
        ("index-fp32-modulation", 1, 33, 24, 2, dict(dtypes=dict.fromkeys(("shift", "gate"), torch.float32))),
        ("index-a-clip", 1, 8192, 8, 4, dict(affine=True)),
        ("index-no-tokens", 2, 0, 16, 2, dict(affine=True)),
        ("index-empty-batch", 0, 5, 16, 2, dict(each=True)),
    ]
    apart = random_tensors(100 + draw)  # the numbers of the cases below do not depend on these
    for *row, more in named:
        yield from by_index(apart, *row, **more)
    biased: list[tuple] = [
        ("branch-bias", 2, 37, 40, 1, 1, True, "layer", {}),
        ("branch-bias-per-token", 2, 19, 24, 19, 19, False, "rms", {}),
        ("branch-bias-mixed-rows", 3, 12, 7, 6, 4, False, "layer", {"branch_bias": torch.float32}),
        ("branch-bias-a-clip", 1, 4096, 8, 1, 1, False, "layer", {}),
        ("branch-bias-no-tokens", 2, 0, 16, 1, 1, True, "layer", {}),
    ]
    for row in biased:
        yield from with_bias(random, *row)
    for case in with_bias(random, "branch-bias-without-gate", 2, 18, 40, 1, 1):
        yield replace(case, tensors={name: tensor for name, tensor in case.tensors.items() if name != "gate"})
    # Parameters that are not there, and rows that all samples share.
    for case in modulated(random, "without", 2, 18, 40, 3, 2, True):
        absent = [name for name in ("gate", "shift", "scale") if name in case.tensors]
        for names in (*([name] for name in absent), absent):
            tensors = {name: tensor for name, tensor in case.tensors.items() if name not in names}
            yield replace(case, name="-".join(["without", *names]), tensors=tensors)
        shared = {name: tensor[:1] for name, tensor in case.tensors.items() if name in absent}
        yield replace(case, name="shared", tensors=case.tensors | shared)
