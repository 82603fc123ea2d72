"""``window_attention``: temporal, spatial, joint, and W.A.L.T's windows with a relative position bias.

The reference takes two batched products and a softmax up to 64 tokens a window and with a bias, and SDPA above. SDPA on
temporal windows, which code bases write, is a column of its own: its flash backward is slow on short sequences, though
its forward can be faster than the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import DTYPES, LONG, Triple, Windows
from minisora_kernels.ops.window_attention import rotate
from models.denoisers.dit import SIZES


def _windows(kind: str, size: str, grid: Triple, window: Triple, **options) -> Windows:
    heads = SIZES[size]["heads"]
    head_dim = SIZES[size]["width"] // heads
    suffix = " norm+rope" if options.get("norm_and_rope") else " bias" if options.get("bias") else ""
    return Windows(f"{kind} {heads}x{head_dim}{suffix}", grid, window, heads, head_dim, **options)


SHAPES = (
    *(
        _windows(
            f"temporal T{frames} S{side * side}",
            size,
            (frames, side, side),
            (frames, 1, 1),
            norm_and_rope=norm_and_rope,
            quick=(frames, side, size) == (16, 16, "XL"),
            dtypes=DTYPES if side == 16 or (frames, size) == (16, "XL") else LONG,
        )
        for frames in (16, 32)
        for side in (16, 32)
        for size in ("XL", "L")
        for norm_and_rope in (False, True)
    ),
    _windows("spatial 16x(16x16)", "XL", (16, 16, 16), (1, 16, 16)),
    _windows("spatial 4x(32x32)", "L", (4, 32, 32), (1, 32, 32)),
    _windows("joint 4x16x16", "XL", (4, 16, 16), (4, 16, 16)),
    _windows("joint 4x16x16", "XL", (4, 16, 16), (4, 16, 16), norm_and_rope=True, dtypes=LONG),
    *(
        _windows(
            f"W.A.L.T {'x'.join(map(str, window))} b2",
            size,
            (5, 16, 16),
            window,
            batch=2,
            bias=True,
            quick=(window, size) == ((5, 8, 8), "XL"),
        )
        for window in ((1, 16, 16), (5, 8, 8))
        for size in ("L", "XL")
    ),
)


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


def _count(values: dict[str, Any]) -> int:
    """Of all samples; each reads the bias."""
    sides = ((values[n], values[f"w{n}"]) for n in "thw")
    return values["qkv"].shape[0] * math.prod(-(-n // size) for n, size in sides)


def _bias_backward(values: dict[str, Any]) -> int:
    """Long windows: for dq, for dk and dv, and once for every partial sum of dbias."""
    from minisora_kernels.triton import window_attention

    if not _long(values):
        return _count(values)
    blocks = _bias_passes(values) ** 2 * values["qkv"].shape[3]
    chunks = max(1, min(_count(values), window_attention.BIAS_PROGRAMS // blocks)) if blocks else 0
    return 2 * _count(values) + chunks


TRAFFIC = {
    # The backward reads q and k once more for the gradient of their norm, if they have one. What of a long window is
    # read more than once comes from the caches: k and v of a window and head are 100 KB at 320 tokens; so does the
    # bias, which all windows share. Where q and k are prepared by a pass of their own (windows of more than 512 tokens;
    # not counted in the interpreter), reading what was prepared counts as reading qkv. Edge windows count as whole.
    "window_attention_fwd": Traffic(
        {
            "qkv": lambda values: (1 + 2 * _passes(values)) / 3 if _long(values) else 1,
            "bias": _count,
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


def problem(shape: Windows, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    t, h, w = shape.grid
    inputs = {"qkv": random(shape.batch, t * h * w, 3, shape.heads, shape.head_dim)}
    norm, rope = None, None
    if shape.norm_and_rope:
        inputs |= {name: random(shape.head_dim, scale=0.1, shift=1.0) for name in ("q_weight", "k_weight")}
        norm, rope = "rms", mk.rope_3d(shape.grid, shape.head_dim, device=device)
    if shape.bias:
        length = shape.window[0] * shape.window[1] * shape.window[2]
        inputs["bias"] = random(shape.heads, length, length)

    def call(tensors: dict[str, Any]) -> Tensor:
        return mk.window_attention(grid=shape.grid, window=shape.window, qk_norm=norm, rope=rope, **tensors)

    def sdpa(tensors: dict[str, Tensor]) -> Tensor:
        q, k, v = tensors["qkv"].unbind(2)
        if rope is not None:
            q, k = F.rms_norm(q, q.shape[-1:], eps=1e-6), F.rms_norm(k, k.shape[-1:], eps=1e-6)
            q, k = rotate(q * tensors["q_weight"], rope), rotate(k * tensors["k_weight"], rope)
        # (b t s) heads d -> (b s) heads t d
        q, k, v = (part.unflatten(1, (t, h * w)).transpose(1, 2).flatten(0, 1).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).unflatten(0, (-1, h * w)).transpose(1, 2).reshape(shape.batch, t * h * w, -1)

    written = ("SDPA", sdpa) if shape.temporal else None
    return Problem(inputs, call, written=written, slow_backward=h * w > 256)


@cases(SHAPES)
def test_window_attention(bench, shape: Windows, dtype: str, direction: str):
    bench("window_attention", problem, shape, dtype, direction)
