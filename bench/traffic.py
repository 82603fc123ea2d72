"""How often a Triton kernel reads and writes every element of the large tensors, by construction.

Keys are raw ops; ``read`` and ``written`` say how often an element of a tensor passes, on average. What is small beside
them (rows of modulation, weights, rotary tables) is left out, and stays in the caches. tests/test_triton_traffic.py
counts the accesses of every element in the interpreter and holds this table against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Passes = float | Callable[[dict[str, Any]], float]


class Traffic(NamedTuple):
    """Per tensor a number, or what computes it from the arguments and results of the op by name."""

    read: dict[str, Passes]
    written: dict[str, Passes]


def _video(values: dict[str, Any]) -> int:
    """Once per block of columns."""
    from minisora_kernels.triton import patch_embed

    return -(-values["weight"].shape[0] // patch_embed.COLUMNS)


def _dy(values: dict[str, Any]) -> int:
    """Once per block of elements of a patch for dweight and dbias, and for dx; once for dpos."""
    from minisora_kernels.triton import patch_embed

    def blocks(most: int) -> int:
        return -(-values["weight"][0].numel() // patch_embed.elements_of(values["weight"], most))

    passes = blocks(patch_embed.WEIGHT_ELEMENTS) + (values["pos"] is not None)
    return passes + values["need_x"] * blocks(patch_embed.VIDEO_ELEMENTS)


def _blocks(values: dict[str, Any], rows: int) -> int:
    """Blocks of ``rows`` tokens that a long window is cut into; each passes over the whole window."""
    return -(-_length(values) // rows)


def _length(values: dict[str, Any]) -> int:
    return values["wt"] * values["wh"] * values["ww"]


def _long(values: dict[str, Any]) -> bool:
    from minisora_kernels.triton import window_attention

    return _length(values) > window_attention.SHORT


def _passes(values: dict[str, Any]) -> int:
    from minisora_kernels.triton import window_attention

    return _blocks(values, window_attention.block_of(values["qkv"].dtype, values["qkv"].shape[-1], _length(values)))


def _bias_passes(values: dict[str, Any]) -> int:
    """Over q, k, v and dout for dbias."""
    from minisora_kernels.triton import window_attention

    if not values["with_dbias"]:
        return 0
    return _blocks(values, window_attention.bias_block_of(values["qkv"].dtype, values["qkv"].shape[-1]))


def _windows(values: dict[str, Any]) -> int:
    """Of all samples; each reads the bias."""
    sides = ((values[n], values[f"w{n}"]) for n in "thw")
    return values["qkv"].shape[0] * math.prod(-(-n // size) for n, size in sides)


def _bias_backward(values: dict[str, Any]) -> int:
    """Long windows: for dq, for dk and dv, and once for every partial sum of dbias."""
    from minisora_kernels.triton import window_attention

    if not _long(values):
        return _windows(values)
    blocks = _bias_passes(values) ** 2 * values["qkv"].shape[3]
    chunks = max(1, min(_windows(values), window_attention.BIAS_PROGRAMS // blocks)) if blocks else 0
    return 2 * _windows(values) + chunks


TRAFFIC = {
    "adaln_fwd": Traffic({"x": 1}, {"y": 1, "mean": 1, "rstd": 1}),
    "adaln_bwd": Traffic({"dy": 1, "x": 1}, {"dx": 1}),
    "gate_residual_fwd": Traffic({"x": 1, "branch": 1}, {"y": 1}),
    "gate_residual_bwd": Traffic({"dy": 1, "branch": 1}, {"dbranch": 1}),
    "gate_residual_adaln_fwd": Traffic({"x": 1, "branch": 1}, {"residual": 1, "y": 1, "mean": 1, "rstd": 1}),
    "gate_residual_adaln_bwd": Traffic({"dresidual": 1, "dy": 1, "residual": 1, "branch": 1}, {"dx": 1, "dbranch": 1}),
    # Around torch's matrix products: h and a, and da, which becomes dh in place.
    "gelu_mlp_fwd": Traffic({"h": 1}, {}),
    "gelu_mlp_bwd": Traffic({"h": 1, "dh": 1}, {"a": 1, "dh": 1}),
    # A pass for the sums over the sites of a frame, and one that writes.
    "grn_fwd": Traffic({"x": 2}, {"y": 1}),
    "grn_bwd": Traffic({"dy": 2, "x": 2}, {"dx": 1}),
    "guided_step_fwd": Traffic({"x": 1, "cond": 1, "null": 1}, {"y": 1}),
    # What is read more than once comes mostly from the caches.
    "patch_embed_fwd": Traffic({"x": _video}, {"y": 1}),
    "patch_embed_bwd": Traffic({"x": _video, "dy": _dy}, {"dx": lambda values: int(values["need_x"])}),
    "unpatchify_fwd": Traffic({"tokens": 1}, {"video": 1}),
    "unpatchify_bwd": Traffic({"dvideo": 1}, {"dtokens": 1}),
    # The backward reads q and k once more for the gradient of their norm, if they have one. What of a long window is
    # read more than once comes from the caches: k and v of a window and head are 100 KB at 320 tokens; so does the
    # bias, which all windows share. Where q and k are prepared by a pass of their own (windows of more than 512 tokens;
    # not counted in the interpreter), reading what was prepared counts as reading qkv. Edge windows count as whole.
    "window_attention_fwd": Traffic(
        {
            "qkv": lambda values: (1 + 2 * _passes(values)) / 3 if _long(values) else 1,
            "bias": _windows,
        },
        {"out": 1, "softmax": 1},
    ),
    "window_attention_bwd": Traffic(
        {
            "dout": lambda values: 2 + _passes(values) + _bias_passes(values) if _long(values) else 1,
            "qkv": lambda values: 5 / 3 + (_passes(values) + _bias_passes(values) if _long(values) else 0),
            "softmax": lambda values: 1 + _passes(values) + _bias_passes(values) if _long(values) else 1,
            "out": lambda values: int(_long(values)),
            "bias": _bias_backward,
        },
        {"dqkv": 1},
    ),
}

# The names of results that have none in their schema.
RETURNS = {
    "gate_residual_fwd": "y",
    "guided_step_fwd": "y",
    "patch_embed_fwd": "y",
    "unpatchify_fwd": "video",
    "unpatchify_bwd": "dtokens",
}


def named(name: str, arguments: Sequence[Any], result: Any) -> dict[str, Any]:
    """What goes into and comes out of raw op ``name``, by the names of its schema."""
    schema = getattr(torch.ops.minisora_triton, name).default._schema
    results = result if isinstance(result, (tuple, list)) else (result,)
    names = [argument.name for argument in schema.arguments] + [r.name or RETURNS[name] for r in schema.returns]
    return dict(zip(names, [*arguments, *results], strict=True))


def passes(table: dict[str, Passes], values: dict[str, Any]) -> dict[str, float]:
    return {key: times(values) if callable(times) else times for key, times in table.items()}


def bytes_moved(name: str, values: dict[str, Any], scratch: int) -> dict[str, int]:
    """``must``: bytes if every tensor passed once. ``does``: as often as the table says, and ``scratch`` twice."""
    traffic = [passes(table, values) for table in TRAFFIC[name]]
    must, does = 0, 0.0
    for key, tensor in values.items():
        if isinstance(tensor, Tensor):
            times = [table[key] for table in traffic if key in table]
            must += tensor.nbytes
            does += tensor.nbytes * (sum(times) if times else 1)
    return {"must": must, "does": round(does) + 2 * scratch}
