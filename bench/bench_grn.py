"""``grn``: response normalisation, with the GELU before it. ``as written`` is one equation after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import GRN, Responses


def problem(shape: Responses, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {
        "x": random(shape.batch, shape.frames * shape.side**2, shape.width),
        "weight": random(shape.width),
        "bias": random(shape.width),
    }

    def written(t: dict[str, Tensor]) -> Tensor:
        x = t["x"].unflatten(1, (shape.frames, -1))
        if shape.activation:
            x = F.gelu(x)
        norms = x.norm(p=2, dim=2, keepdim=True)
        s = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return (t["weight"] * (x * s) + t["bias"] + x).flatten(1, 2)

    return Problem(
        inputs,
        lambda t: mk.grn(**t, groups=shape.frames, activation=shape.activation),
        written=("as written", written),
        unread=["bias"],
    )


@cases(GRN)
def test_grn(bench, shape: Responses, dtype: str, direction: str):
    bench("grn", problem, shape, dtype, direction)
