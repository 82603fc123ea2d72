"""A stand-in for torch's flash attention on a GPU: that for CPUs, whose raw ops take and give the same."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


def on_the_library(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets _window_library.py, which is ``library``, serve; returns a list that its calls are added to."""
    calls = []
    aten = torch.ops.aten

    def forward(q, k, v, scale):
        calls.append("forward")
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)

    def backward(dout, q, k, v, out, logarithm, scale):
        calls.append("backward")
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, logarithm, 0.0, False, scale=scale
        )

    monkeypatch.setattr(library, "serves", lambda device: True)
    monkeypatch.setattr(library, "_forward", forward)
    monkeypatch.setattr(library, "_backward", backward)
    return calls
