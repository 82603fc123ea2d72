"""Every access of every element of the tensors in bench/gpu/traffic.py, counted in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case
from test_ops import outputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.traffic import named, passes, table
from minisora_kernels import backends

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="needs TRITON_INTERPRET=1: see make check-gpu-code")


@contextmanager
def recorded() -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """The addresses that kernels load from, and store to, within the block."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads: list[np.ndarray] = []
    stores: list[np.ndarray] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(addresses: list[np.ndarray], pointers: Any, mask: Any) -> None:
        addresses.append(np.broadcast_to(pointers.data, mask.data.shape)[mask.data].ravel())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder,
            "create_masked_load",
            lambda self, ptrs, mask, *rest: (note(loads, ptrs, mask), load(self, ptrs, mask, *rest))[1],
        )
        patch.setattr(
            InterpreterBuilder,
            "create_masked_store",
            lambda self, ptrs, value, mask, *rest: (note(stores, ptrs, mask), store(self, ptrs, value, mask, *rest))[1],
        )
        yield loads, stores


def counts(addresses: list[np.ndarray], tensor: Tensor) -> np.ndarray:
    """How often the elements of ``tensor``, which is dense, were accessed."""
    all_of_them = np.concatenate([*addresses, np.empty(0, np.uint64)]).astype(np.int64)
    place = (all_of_them - tensor.data_ptr()) // tensor.element_size()
    place = place[(place >= 0) & (place < tensor.numel())]
    return np.bincount(place, minlength=tensor.numel())


class Recorder(TorchDispatchMode):
    """For each raw op that ran: how often its tensors were read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, dict[str, np.ndarray]] = {}
        self.written: dict[str, dict[str, np.ndarray]] = {}
        self.values: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "minisora_triton":
            return func(*args, **(kwargs or {}))
        with recorded() as (loads, stores):
            result = func(*args)
        op = func._schema.name.split("::")[1]
        self.values[op] = named(op, args, result)
        tensors = {name: value for name, value in self.values[op].items() if isinstance(value, Tensor)}
        self.read[op] = {name: counts(loads, tensor) for name, tensor in tensors.items()}
        self.written[op] = {name: counts(stores, tensor) for name, tensor in tensors.items()}
        return result


FIRST = {case.op: case for case in reversed(CASES)}
FURTHER = [
    case
    for case in CASES
    if (case.op, case.name)
    in {("attention", "several-blocks"), ("patch_embed", "pixels"), ("window_attention", "long-bias")}
]


@pytest.mark.parametrize("case", [*FIRST.values(), *FURTHER], ids=lambda case: f"{case.op} {case.name}")
def test_every_element_passes_as_often_as_the_table_says(case: Case):
    recorder = Recorder()
    leaves = case.leaves(torch.float32)
    with recorder:
        result = outputs(case.call(leaves, backend="triton"))
        if case.differentiable:
            torch.autograd.backward(result, [torch.ones_like(value) for value in result])
    assert recorder.read.keys() <= table().keys()
    assert any(name.startswith(case.op) for name in recorder.read)
    for name, traffic in ((name, table()[name]) for name in recorder.read):
        for way, found in ((traffic.read, recorder.read[name]), (traffic.written, recorder.written[name])):
            for tensor, times in passes(way, recorder.values[name]).items():
                if recorder.values[name][tensor] is None:
                    continue
                assert found[tensor].mean() == pytest.approx(times), f"{name}: {tensor}"
                if times in (0, 1):
                    assert (found[tensor] == times).all(), f"{name}: {tensor}"
