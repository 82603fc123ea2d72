"""The kernels have a first derivative and no other: any further one is an error, by whatever route it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NoFurther(torch.autograd.Function):
    """``results`` as they are, in a graph that leads to ``inputs`` and raises on the way."""

    @staticmethod
    def forward(ctx: Any, op: str, results: tuple[Tensor | None, ...], *inputs: Tensor) -> Any:
        ctx.op = op
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: a second derivative was asked for; the kernels are differentiable once (once_differentiable): "
            "use backend='reference'"
        )


def once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an ``autograd.Function`` over kernels.

    torch's ``once_differentiable`` cuts the graph at the gradients, so that ``torch.autograd.grad`` with unused inputs,
    and with it a Hessian, sees zeros. Here the gradients stay connected with all that they depend on: the incoming
    gradients and the saved inputs. For that a Function must save its inputs themselves, not copies made inside.
    """
    op = backward.__module__.rpartition(".")[2]

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(f"{op}: the kernels take no batches of gradients (vmap); use backend='reference'")
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        inputs = [t for t in (*gradients, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return _NoFurther.apply(op, results, *inputs) if inputs else results

    return run
