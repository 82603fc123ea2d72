"""Long windows without a bias by torch's flash attention; _window_flash.py serves the others.

torch takes views, so windows must be runs of tokens that fill the grid, as spatial and joint ones do. It knows no norm,
no rotation and no packed gradient: `prepare_kernel` goes before it, `finish_kernel` after its backward. Its logarithm
of the sum of a query's exp(score) is kept as the pair (logarithm, 1) of maximum and sum, for the backward.

The tests put torch's flash attention for CPUs in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._window_rows import load_angles, load_rows, moments, norm_backward, store_dweight, store_rows, turn

MOST_WINDOWS = 65535  # of a launch: they are an axis of the grid on which CUDA has no more

_mode = threading.Lock()


@cache
def serves(device: torch.device) -> bool:
    """Whether torch has flash attention for the device."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of q, k and v ``[windows, length, heads, head_dim]``: the same of out, and pairs ``[windows, length, heads, 2]``
    of a maximum and a sum that give the same probabilities.
    """
    out, logarithm = _forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
    return out.transpose(1, 2).contiguous(), F.pad(logarithm.transpose(1, 2)[..., None], (0, 1), value=1.0)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """dq, dk and dv ``[windows, length, heads, head_dim]``, contiguous; the same bits on every run."""
    logarithm = softmax[..., 0].transpose(1, 2).contiguous()
    dout, q, k, v, out = (part.transpose(1, 2) for part in (dout, q, k, v, out))
    with _deterministic():
        grads = _backward(dout, q, k, v, out, logarithm, scale)
    return tuple(grad.transpose(1, 2).contiguous() for grad in grads)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logarithm: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unread = q.new_empty(2, dtype=torch.uint64)  # the state of a random generator, for a dropout
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, logarithm, None, None, q.shape[2], k.shape[2], 0.0, False, unread, unread, scale=scale
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Within the block torch adds gradients up in one order. Its mode is that of all threads, so one at a time."""
    options: Any = torch.utils.deterministic
    with _mode:
        before, fill = torch.get_deterministic_debug_mode(), options.fill_uninitialized_memory
        if before == 2:  # "error": the user asks for the same
            yield
            return
        torch.set_deterministic_debug_mode(2)
        options.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
            options.fill_uninitialized_memory = fill


@triton.jit(do_not_specialize=["rows", "tokens"])
def finish_kernel(
    qkv, dq, dk, dv, dqkv, dq_partial, dk_partial, q_weight, k_weight, cos, sin, rows, tokens, heads, eps,
    FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dqkv from the gradients of the prepared q and k, and of v. A program takes BLOCK tokens of a head."""
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    step = heads * FORM.head_dim
    at = row.to(tl.int64) * step + head * FORM.head_dim
    packed = row.to(tl.int64) * (3 * step) + head * FORM.head_dim
    angles = load_angles(cos, sin, row % tokens, valid, FORM)
    grads = (dq, dk)
    partials = (dq_partial, dk_partial)
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step
    weights = (q_weight, k_weight)
    for part in tl.static_range(2):
        grad = [piece.to(tl.float32) for piece in load_rows(grads[part], at, valid, FORM.qk)]
        x = load_rows(qkv + part * step, packed, valid, FORM.qk)
        grad = turn(grad, angles, FORM.interleaved, True)
        grad, dweight = norm_backward(grad, 1.0, x, moments(x, eps, FORM), weights[part], FORM)
        store_rows(dqkv + part * step, packed, valid, grad, FORM.qk)
        store_dweight(partials[part], tl.program_id(0), dweight, FORM)
    store_rows(dqkv + 2 * step, packed, valid, load_rows(dv, at, valid, FORM.v), FORM.v)
