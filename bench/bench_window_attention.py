"""``window_attention``: temporal, spatial, joint, and W.A.L.T's windows with a relative position bias.

The reference takes two batched products and a softmax up to 64 tokens a window and with a bias, and SDPA above. SDPA on
temporal windows, which code bases write, is a column of its own: its flash backward is slow on short sequences, though
its forward can be faster than the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import WINDOW_ATTENTION, Windows
from minisora_kernels.ops.window_attention import rotate


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

    def call(tensors: dict[str, Tensor]) -> Tensor:
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


@cases(WINDOW_ATTENTION)
def test_window_attention(bench, shape: Windows, dtype: str, direction: str):
    bench("window_attention", problem, shape, dtype, direction)
