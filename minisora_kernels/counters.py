"""Figures that do not depend on the machine: bytes saved for backward, bytes that ops read and write, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .scratch import SCRATCH


def saved_bytes(forward: Callable[[], Any], inputs: list[Tensor]) -> int:
    """Bytes that ``forward`` keeps alive for its backward.

    Every storage counts once and in full, however many views of it are saved. Storages of ``inputs`` (the leaves:
    parameters, and the tensors an op is called with) do not count: they live anyway. Where ``forward`` has hooks of its
    own, the tensors in what they keep count.
    """
    storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def count(kept: Any) -> Any:
        for leaf in tree_leaves(kept):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                storages[storage.data_ptr(), storage.nbytes()] = storage
        return kept

    plain = saved_tensors_hooks.__init__

    def counting(self: saved_tensors_hooks, pack: Callable, unpack: Callable) -> None:
        plain(self, lambda tensor: count(pack(tensor)), unpack)

    # Detached: an op that saves its result itself would keep itself alive for good.
    with patch.object(saved_tensors_hooks, "__init__", counting), saved_tensors_hooks(Tensor.detach, lambda t: t):
        result = forward()
    for tensor in inputs:
        storage = tensor.untyped_storage()
        storages.pop((storage.data_ptr(), storage.nbytes()), None)
    del result
    return sum(storage.nbytes() for storage in storages.values())


def _bytes(tensor: Tensor) -> int:
    """Bytes of distinct elements: an expanded dimension is read once."""
    count = tensor.element_size() if tensor.numel() else 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


aten = torch.ops.aten
# torch's own formulas; its table lacks the attention that a CPU runs.
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
}


def scratch_bytes(op: Any, arguments: tuple) -> int:
    """Bytes that an op holds while it runs, beside its arguments and results; 0 for an op that does not say."""
    library, name = op.name().split(".")[0].split("::")
    return SCRATCH[name](*arguments) if library.startswith("minisora") and name in SCRATCH else 0


# They return memory without writing it.
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Counter(TorchDispatchMode):
    """What the ops inside the block do, backward included.

    An op is what PyTorch dispatches: a matrix product, an addition, one of this package's kernels. Views do nothing.

    Attributes:
        moved: bytes of the tensors that the ops read and write.
        flops: FLOPs of matrix products, convolutions and attention.
        kernels: names of this package's kernels that ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.flops = 0
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace.startswith("minisora"):
            self.kernels.add(func._schema.name.split("::")[1])
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=result)
        if func._schema.name in ALLOCATIONS:
            return result
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        view = not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in storages for tensor in written)
        if not view:
            self.moved += sum(map(_bytes, read)) + sum(map(_bytes, written))
        return result
