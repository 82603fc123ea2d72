"""Less memory between forward and backward: the backward computes the output of adaln again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from . import backends
from .checks import number
from .modulation import Norm, identity, origin, row_index, rows
from .ops import adaln

_NAMES = ("x", "shift", "scale", "weight", "bias", "index", "norm", "eps")


def _check_origin(y: Tensor, given: tuple[Any, ...]) -> None:
    made_of = origin(y)
    if made_of is None:
        raise ValueError("recompute_adaln: y is not what adaln or gate_residual_adaln returned with gradients enabled")
    if made_of == given:
        return
    for name, one, other in zip(_NAMES, made_of, given, strict=True):
        if one != other:
            said = f" {other!r}, not {one!r}" if name in ("norm", "eps") else " another"
            raise ValueError(f"recompute_adaln: y was made of other arguments than these: {name} is{said}")


@contextmanager
def recompute_adaln(
    y: Tensor,
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> Iterator[None]:
    """Inside the block, ops save a recipe for ``y`` instead of ``y``.

    ``y`` is what ``adaln`` or ``gate_residual_adaln`` returned for the other arguments, where ``x`` is the new residual
    stream. The block is the Linear or MLP that reads ``y`` and would save it for the gradient of its weight. The op
    that computed ``y`` saves ``x`` in any case. Each reader's backward reads ``x`` and writes ``y`` once more.

    The block has no effect where the reference serves ``adaln``, where ``y`` is wider than ``x``, without gradients,
    and inside ``torch.compile``, which decides itself what it recomputes. It does not nest with
    ``torch.utils.checkpoint``: its hooks would hide those.

    Source: selective recomputation, Korthikanti et al. 2022 (arXiv 2205.05198).

    Args:
        y: Result of the op, ``[B, N, D]``.
        x: Tokens that the norm read, ``[B, N, D]``.
        shift: The op's argument.
        scale: The op's argument.
        weight: The op's argument.
        bias: The op's argument.
        index: The op's argument.
        norm: The op's argument.
        eps: The op's argument.

    Raises:
        ValueError: y has another shape than x, is a part of another tensor, or was made of other arguments.
        RuntimeError: The backward finds that an argument has changed in place since the forward.

    Examples:
        >>> from minisora_kernels import adaln
        >>> x, shift, scale = torch.randn(2, 12, 64), torch.randn(2, 64), torch.randn(2, 64)
        >>> mlp = torch.nn.Linear(64, 256)
        >>> y = adaln(x, shift, scale)
        >>> with recompute_adaln(y, x, shift, scale):
        ...     branch = mlp(y)
    """
    if y.shape != x.shape:
        raise ValueError(f"recompute_adaln: y has shape {tuple(y.shape)}, x {tuple(x.shape)}; y must be adaln of x")
    eps = number("recompute_adaln", "eps", eps, 0)
    named = x, shift, scale, weight, bias, index
    shift, scale = (
        rows("recompute_adaln", name, parameter, x, index is not None)
        for name, parameter in (("shift", shift), ("scale", scale))
    )
    index = row_index("recompute_adaln", index, x, shift=shift, scale=scale)
    backend: Any = backends.choose("adaln", adaln.BACKENDS, x.device, None, x, shift, scale, weight, bias, index)
    wider = y.element_size() > x.element_size()
    if backend == "reference" or wider or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    if y.untyped_storage().nbytes() != y.numel() * y.element_size():
        raise ValueError(
            "recompute_adaln: y is a part of another tensor; it must be what adaln or gate_residual_adaln returned"
        )
    _check_origin(y, (*map(identity, named), norm, eps))
    storage, dtype, device, version = y.untyped_storage()._cdata, y.dtype, y.device.type, y._version
    made_of = tuple(None if tensor is None else tensor.detach() for tensor in (x, shift, scale, weight, bias, index))
    versions = [tensor._version for tensor in made_of if tensor is not None]

    def pack(tensor: Tensor) -> Any:
        # After a change in place, y is no longer what adaln would compute.
        if tensor.untyped_storage()._cdata != storage or tensor.dtype != dtype or tensor._version != version:
            return tensor.detach()  # otherwise an op that saves its own result would keep itself alive
        return made_of, (tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if versions != [tensor._version for tensor in made_of if tensor is not None]:
            raise RuntimeError(
                "recompute_adaln: x, shift, scale, weight, bias or index was changed in place since the forward"
            )
        (x, shift, scale, weight, bias, index), view = kept
        # y's dtype differs from x's under autocast, and where the residual stream is wider than the branches.
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != x.dtype):
            tensors = dict(weight=weight, bias=bias, index=index)
            again = adaln.adaln(x, shift, scale, **tensors, norm=norm, eps=eps, backend=backend)
        return again.as_strided(*view)

    with saved_tensors_hooks(pack, unpack):
        yield
