"""Long windows without a bias by flash-attn, where it is installed; else _window_flash.py serves them.

flash-attn takes views, so windows must be runs of tokens that fill the grid, as spatial and joint ones do. It knows no
norm, no rotation and no packed gradient: `prepare_kernel` goes before it, `finish_kernel` after its backward. What its
forward saves has no place in the schema of the raw ops, so the backward runs it once more, and the saved softmax of
this route is zeros. `deterministic` is asked for: the op's gradients have the same bits on every run.

Not run with flash-attn yet: the tests put torch's attention in its place.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._window_rows import load_angles, load_rows, norm_backward, store_dweight, store_rows, turn

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@cache
def _function(module: str) -> Callable | None:
    parents = module.split(".")
    found = all(importlib.util.find_spec(".".join(parents[: i + 1])) for i in range(len(parents)))
    return importlib.import_module(module).flash_attn_func if found else None


def flash_attention(device: torch.device, head_dim: int) -> Attention | None:
    """flash-attn's attention of q, k and v ``[batch, length, heads, head_dim]``, by the version made for the device."""
    if device.type != "cuda" or head_dim > 256:
        return None
    major = torch.cuda.get_device_capability(device)[0]
    if major < 8:
        return None
    newest = {9: "flash_attn_interface", 10: "flash_attn.cute" if head_dim in (64, 96, 128) else None}.get(major)
    function = (newest and _function(newest)) or _function("flash_attn")
    if function is None:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        result = function(q, k, v, softmax_scale=scale, deterministic=True)
        return result[0] if isinstance(result, tuple) else result

    return attend


def gradients(attend: Attention, q: Tensor, k: Tensor, v: Tensor, scale: float, dout: Tensor) -> tuple[Tensor, ...]:
    """dq, dk and dv ``[batch, length, heads, head_dim]``, contiguous."""
    with torch.enable_grad():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        out = attend(q, k, v, scale)
        return tuple(grad.contiguous() for grad in torch.autograd.grad(out, (q, k, v), dout.view(out.shape)))


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
        grad, dweight = norm_backward(turn(grad, angles, FORM.interleaved, True), 1.0, x, weights[part], eps, FORM)
        store_rows(dqkv + part * step, packed, valid, grad, FORM.qk)
        store_dweight(partials[part], tl.program_id(0), dweight, FORM)
    store_rows(dqkv + 2 * step, packed, valid, load_rows(dv, at, valid, FORM.v), FORM.v)
