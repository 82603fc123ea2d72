"""Less memory between forward and backward: the output of adaln is made again rather than kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from . import backends
from .modulation import rows
from .ops import adaln


@contextmanager
def recompute_adaln(
    y: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Iterator[None]:
    """Within the block, whoever keeps ``y`` for its backward keeps how to make it again instead.

    ``y`` is the output of :func:`minisora_kernels.adaln` or :func:`minisora_kernels.gate_residual_adaln` for the other
    arguments (x the new residual stream), and the block is the Linear or MLP that reads it and keeps it for its weight
    gradient. x is kept in any case, by the op that made y. The backward reads x and writes y once more, per reader::

        x, y = mk.gate_residual_adaln(x, branch, gate, shift, scale)
        with mk.recompute_adaln(y, x, shift, scale):
            branch = mlp(y)

    Does nothing where the reference serves adaln, where y is wider than x, without gradients, and while compiling
    (torch.compile decides itself what it recomputes). Not for a block inside ``torch.utils.checkpoint``, which
    recomputes all and whose own hooks these would hide. Source: selective recomputation, Korthikanti et al. 2022
    (arXiv 2205.05198).

    Raises:
        ValueError: y has another shape than x, or is a part of another tensor.
        RuntimeError: in the backward, for an argument that was changed in place since.
    """
    if y.shape != x.shape:
        raise ValueError(f"recompute_adaln: y has shape {tuple(y.shape)}, x {tuple(x.shape)}; y must be adaln of x")
    shift, scale = rows("recompute_adaln", "shift", shift, x), rows("recompute_adaln", "scale", scale, x)
    backend = backends.choose("adaln", adaln.BACKENDS, x.device, None, x, shift, scale, weight, bias)
    wider = y.element_size() > x.element_size()
    if backend == "reference" or wider or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    if y.untyped_storage().nbytes() != y.numel() * y.element_size():
        raise ValueError(
            "recompute_adaln: y is a part of another tensor; it must be what adaln or gate_residual_adaln made"
        )
    storage, dtype, device, version = y.untyped_storage()._cdata, y.dtype, y.device.type, y._version
    made_of = tuple(None if tensor is None else tensor.detach() for tensor in (x, shift, scale, weight, bias))
    versions = [tensor._version for tensor in made_of if tensor is not None]

    def pack(tensor: Tensor) -> Any:
        # A y that was changed is not what adaln makes.
        if tensor.untyped_storage()._cdata != storage or tensor.dtype != dtype or tensor._version != version:
            return tensor.detach()  # an op that saves its own result would else keep itself alive
        return made_of, (tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if versions != [tensor._version for tensor in made_of if tensor is not None]:
            raise RuntimeError(
                "recompute_adaln: x, shift, scale, weight or bias was changed in place since the forward"
            )
        (x, shift, scale, weight, bias), view = kept
        # y has another dtype than x under autocast, or where the residual stream is wider than the branches.
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != x.dtype):
            again = adaln.adaln(x, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, backend=backend)
        return again.as_strided(*view)

    with saved_tensors_hooks(pack, unpack):
        yield
