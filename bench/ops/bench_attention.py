"""``attention``: video tokens to text, video and padded text together, and Wan's self-attention with its norm.

The reference is torch's scaled_dot_product_attention, with a mask where text is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

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


def _blocks(values: dict[str, Any], of: str, backward: bool) -> int:
    """Blocks of the tokens of q or k: each passes over the other side."""
    from minisora_kernels.triton import attention

    tile = attention.tiles_of(values["q"].dtype, values["q"].shape[-1])[backward]
    return -(-values[of].shape[1] // tile.block)


def _forward(values: dict[str, Any]) -> int:
    return _blocks(values, "q", False)


def _queries(values: dict[str, Any]) -> int:
    return 1 + _blocks(values, "k", True)


def _keys(values: dict[str, Any]) -> int:
    return 1 + _blocks(values, "q", True)


TRAFFIC = {
    # What is read more than once comes from the caches: the keys and values of a head. All keys count here, and all
    # gradients are asked for: one kernel keeps a block of queries, the other one of keys.
    "attention_fwd": Traffic({"q": 1, "k": _forward, "v": _forward}, {"out": 1, "softmax": 1}),
    "attention_bwd": Traffic(
        {"out": 1, "softmax": 1, "dout": _queries, "q": _queries, "k": _keys, "v": _keys}, {"dq": 1, "dk": 1, "dv": 1}
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
