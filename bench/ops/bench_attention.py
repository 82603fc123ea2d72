"""``attention``: video tokens to text, video and padded text together, and Wan's self-attention with its norm.

``SDPA`` is the same call of torch's attention without a mask: what code bases pay that attend to padding too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.gpu.launches import BOTH, HALF, TF32, Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import LONG, Keys

SHAPES = (
    Keys("cross 512 text 16x72 b2", 2, 1024, 512, 16, 72, quick=True),
    Keys("cross 512 text 12x128, padded b2", 2, 1024, 512, 12, 128, padded=True),
    Keys("cross 120 text 16x72, padded b2", 2, 4096, 120, 16, 72, padded=True),
    Keys("joint 1024 + 256 text 24x64, padded b2", 2, 1280, 1280, 24, 64, padded=True, dtypes=LONG),
    Keys("self 1560 12x128 norm across heads+rope", 1, 1560, 1560, 12, 128, turned=True, dtypes=LONG),
)


def _passes(name: str, values: dict[str, Any], backward: bool) -> int:
    """How often the other side is read: once by each block of ``name``'s rows."""
    from minisora_kernels.triton import attention

    tile = attention.tiles_of(values["q"].dtype, values["q"].shape[-1])[backward]
    return -(-values[name].shape[1] // tile.block)


_KEYS = partial(_passes, "q", backward=False)


def _backward(values: dict[str, Any], once: str, looped: str, rows: str) -> int:
    """Reads of a tensor: once by the kernel that keeps its rows, and by each block of the other kernel."""
    keys = values["need_k"] or values["need_v"]
    kept = {"q": values["need_q"], "k": keys, "v": values["need_k"], "": True}[once]
    return kept + _passes(rows, values, True) * (values["need_q"] if looped == "k" else keys)


TRAFFIC = {
    # Keys and values are read again by each block of queries; a head's come from the caches. All keys count.
    "attention_fwd": Traffic({"q": 1, "k": _KEYS, "v": _KEYS}, {"out": 1, "softmax": 1}),
    "attention_bwd": Traffic(
        {
            "out": 1,
            "dout": partial(_backward, once="", looped="q", rows="k"),
            "q": partial(_backward, once="q", looped="q", rows="k"),
            "softmax": 1,
            "k": partial(_backward, once="k", looped="k", rows="q"),
            "v": partial(_backward, once="v", looped="k", rows="q"),
        },
        {"dq": 1, "dk": 1, "dv": 1},
    ),
}


def problem(shape: Keys, dtype: torch.dtype, device: torch.device) -> Problem:
    random, sides = Random(dtype, device), (shape.heads, shape.head_dim)
    counts = {"q": shape.count, "k": shape.keys, "v": shape.keys}
    inputs = {name: random(shape.batch, count, *sides) for name, count in counts.items()}
    options: dict[str, Any] = {}
    if shape.padded:
        options["lengths"] = torch.tensor(shape.lengths, device=device)
    if shape.turned:
        inputs |= {name: random(*sides, scale=0.1, shift=1.0) for name in ("q_weight", "k_weight")}
        options |= {"qk_norm": "rms", "across_heads": True}
        options["rope"] = mk.rope_3d((1, 1, shape.count), shape.head_dim, device=device)

    def sdpa(t: dict[str, Tensor]) -> Tensor:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return Problem(inputs, lambda t: mk.attention(**t, **options))


def _attention(
    head_dim: int,
    dtype: torch.dtype,
    counting: str = "",
    frozen: Sequence[str] = (),
    turned: bool = False,
) -> Problem:
    tensors = {"q": meta(dtype, 2, 300, 4, head_dim)}
    tensors |= {name: meta(dtype, 2, 77, 4, head_dim) for name in "kv"}
    constants: dict[str, Any] = {name: tensors.pop(name) for name in frozen}
    options: dict[str, Any] = {"qk_norm": "rms"} if turned else {}
    if counting:
        shape = (2,) if counting == "lengths" else (2, 77)
        options[counting] = meta(torch.int64 if counting == "lengths" else torch.bool, *shape)
    return Problem(tensors, lambda t: mk.attention(**t, **constants, **options))


def launches() -> Iterator[Launch]:
    for head_dim in (8, 64, 72, 80, 96, 128):
        for counting in ("", "lengths", "mask"):
            dtypes = BOTH if head_dim in (72, 128) and counting != "lengths" else HALF
            name = f"head_dim {head_dim} {counting or 'plain'}"
            yield Launch(name, partial(_attention, head_dim, counting=counting), dtypes, head_dim in (72, 128))
    for head_dim in (64, 128):
        yield Launch(f"head_dim {head_dim} tf32", partial(_attention, head_dim), TF32, False)
    for asked in "qkv":
        frozen = tuple(name for name in "qkv" if name != asked)
        yield Launch(f"gradient of {asked} alone", partial(_attention, 64, frozen=frozen), HALF)
    yield Launch("norm", partial(_attention, 64, turned=True), HALF, False)


# Small and odd: what the sanitizer runs.
ODD = (
    Keys("cross", 2, 21, 37, 3, 24),
    Keys("padded", 3, 9, 70, 2, 72, padded=True),
    Keys("norm and rope", 1, 41, 41, 2, 24, turned=True),
)
# Small: what a call of them costs the host.
HOST = (
    Keys("cross", 1, 64, 16, 4, 16),
    Keys("padded", 1, 64, 16, 4, 16, padded=True),
    Keys("norm+rope", 1, 64, 64, 4, 16, turned=True),
)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_attention(bench, shape: Keys, dtype: str, direction: str):
    bench("attention", problem, shape, dtype, direction)
