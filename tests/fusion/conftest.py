"""Fixtures of the tests of the pass."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from minisora_kernels.fusion import calls


@pytest.fixture
def ropes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rotary tables, or None, and the norm of each call of attention."""
    found: list[Any] = []
    attention = calls._window_attention.window_attention

    def call(qkv: Tensor, *sizes: Any, **options: Any) -> Tensor:
        found.append((options.get("rope"), options.get("qk_norm")))
        return attention(qkv, *sizes, **options)

    monkeypatch.setattr(calls._window_attention, "window_attention", call)
    return found
