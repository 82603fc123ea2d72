"""torch's FLOP counter counts the kernels' products as it does those of plain PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import CASES
from conftest import KERNEL_BACKENDS
from test_ops import outputs
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(not KERNEL_BACKENDS, reason="no kernel backend is available: see the header")


def counted(case, backend: str) -> tuple[int, int]:
    """Forward and backward."""
    totals = []
    with FlopCounterMode(display=False) as counter:
        result = outputs(case.call(case.leaves(torch.float32), backend=backend))
    totals.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(result, [torch.ones_like(value) for value in result])
    return totals[0], counter.get_total_flops()


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.op in ("gelu_mlp", "glu_mlp", "patch_embed")], ids=str)
def test_products_count_as_in_plain_pytorch(case, backend: str):
    assert counted(case, backend) == counted(case, "reference")


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if "attention" in case.op], ids=str)
def test_attention_counts_two_products_and_in_the_backward_five(case, backend: str):
    """The backward computes the scores again, which torch counts for its flash attention too."""
    forward, backward = counted(case, "reference")
    if case.op != "attention" and case.name != "long":  # torch's own, of whose variant for CPUs it has no formula
        assert counted(case, backend) == (forward, backward // 4 * 5)
    ours = counted(case, backend)
    assert ours[1] * 2 == ours[0] * 5 and (ours[0] > 0 or any(t.numel() == 0 for t in case.tensors.values()))


@pytest.mark.parametrize("first", ["minisora_kernels", "torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter_and_triton_is_not_imported(first: str):
    code = f"""
import sys, torch, {first}
assert "triton" not in sys.modules or {first!r} != "minisora_kernels"
import minisora_kernels as mk
from torch.utils.flop_counter import FlopCounterMode, flop_registry
print([str(key) for key in flop_registry if str(key).startswith("minisora")])
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "minisora.gelu_mlp_fwd" in printed and "minisora_triton.window_attention_bwd" in printed
