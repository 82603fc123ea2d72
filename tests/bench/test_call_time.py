"""What a call costs beside its kernel stays near what eager PyTorch costs."""

from __future__ import annotations

import pytest
import torch

from bench import call_time
from minisora_kernels import backends

# Measured: at most 1.4. Without the shortcut to a raw op, gate_residual and gelu_mlp took 2.8 times eager's.
BOUND = 2.2


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no CPU kernels")
@pytest.mark.parametrize("op", sorted(call_time.calls()))
def test_a_call_without_gradients(op: str):
    pair = call_time.calls()[op]
    ratios = []
    with torch.no_grad():
        for _ in range(4):  # other work on the machine does not stay
            ours, eager = call_time.least(pair, rounds=60)
            ratios.append(ours / eager)
            if ratios[-1] < BOUND:
                return
    pytest.fail(f"{op}: {min(ratios):.2f} times eager's microseconds")
