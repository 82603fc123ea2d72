"""Attention over time between two rearrangements: found as windows of the grid, or as attention of its own batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_parts import Function, check, counts
from torch import Tensor

import minisora_kernels as mk

pytestmark = pytest.mark.usefixtures("nothing_compiled")

B, T, S, HEADS, WIDTH = 2, 5, 3, 2, 8
D = HEADS * WIDTH


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The window of each call of the op."""
    module = importlib.import_module("minisora_kernels.ops.window_attention")
    attention, found = module.window_attention, []

    def call(qkv: Tensor, grid: Any, window: Any, **options: Any) -> Tensor:
        found.append(window)
        return attention(qkv, grid, window, **options)

    monkeypatch.setattr(module, "window_attention", call)
    return found


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "x": made(B, T * S, D, dtype=dtype),
        "w": made(3 * D, D, dtype=dtype),
        "p": made(D, D, dtype=dtype, seed=1),
        "c": made(D, dtype=dtype),
    }


def attend(y: Tensor, w: Tensor, turn: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    q, k, v = F.linear(y, w).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(turn(q), turn(k), v).transpose(1, 2).flatten(2)


def over_time(x: Tensor) -> Tensor:
    return x.unflatten(1, (T, S)).transpose(1, 2).reshape(B * S, T, -1)


def back(y: Tensor) -> Tensor:
    return y.view(B, S, T, -1).transpose(1, 2).reshape(B, T * S, -1)


def turned_by(x: Tensor, angles: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * angles.cos() + torch.stack([-imaginary, real], -1).flatten(-2) * angles.sin()).to(x.dtype)


PAIRS = torch.linspace(-3, 3, T * WIDTH // 2).view(T, -1).repeat_interleave(2, dim=-1)
APART = torch.linspace(-3, 3, T * WIDTH).view(T, -1)  # the channels of a pair turn by angles of their own


def turned(x: Tensor) -> Tensor:
    return turned_by(F.rms_norm(x, (WIDTH,)), PAIRS)


ON_GRID = {
    "plain": lambda x, w, p, c: back(F.linear(attend(over_time(x), w), p, c)),
    "of a grid": lambda x, w, p, c: back(F.linear(attend(x.view(B, T, S, D).transpose(1, 2).flatten(0, 1), w), p, c)),
    "dropout that is off": lambda x, w, p, c: back(F.dropout(F.linear(attend(over_time(x), w), p, c), 0.1, False)),
    "norm and rotation": lambda x, w, p, c: back(F.linear(attend(over_time(x), w, turned), p, c)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ON_GRID)
def test_no_rearrangement_is_left(name: str, dtype: torch.dtype, windows: list[Any]) -> None:
    given = inputs(dtype)
    fused = check(Function(ON_GRID[name]), given, draws=2)
    assert counts(fused.sites) == {"window_attention": 1} and set(windows) == {(T, 1, 1)}


def other_sizes(x: Tensor, w: Tensor, p: Tensor, c: Tensor) -> Tensor:
    """Not back, but on: rows of one place go to frames."""
    y = F.linear(attend(over_time(x), w), p, c)
    return y.view(B, T, S, -1).transpose(1, 2).reshape(B, T * S, -1)


def read_twice(x: Tensor, w: Tensor, p: Tensor, c: Tensor) -> Tensor:
    y = over_time(x)
    return back(y + F.linear(attend(y, w), p, c))


def with_positions(x: Tensor, w: Tensor, p: Tensor, c: Tensor) -> Tensor:
    return back(F.linear(attend(over_time(x) + torch.ones(T, D), w), p, c))


def heads_in_another_order(x: Tensor, w: Tensor, p: Tensor, c: Tensor) -> Tensor:
    q, k, v = F.linear(over_time(x), w).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).flatten(2)
    return back(F.linear(y, p, c))


AS_ITS_OWN = {
    "other sizes": other_sizes,
    "read twice": read_twice,
    "positions between": with_positions,
    "heads in another order": heads_in_another_order,
    "tables apart": lambda x, w, p, c: back(F.linear(attend(over_time(x), w, lambda x: turned_by(x, APART)), p, c)),
}


@pytest.mark.parametrize("name", AS_ITS_OWN)
def test_anything_else_is_as_right(name: str, windows: list[Any]) -> None:
    fused = check(Function(AS_ITS_OWN[name]), inputs())
    assert counts(fused.sites) == {"window_attention": 1} and (T, 1, 1) not in windows


def test_other_lengths_need_no_other_graph(windows: list[Any]) -> None:
    def forward(x: Tensor, w: Tensor, p: Tensor) -> Tensor:  # [B, T, S, D]
        b, t, s, d = x.shape
        y = F.linear(attend(x.transpose(1, 2).reshape(b * s, t, d), w), p)
        return x + y.view(b, s, t, d).transpose(1, 2)

    given, model = inputs(), Function(forward)
    with mk.fuse(model, backend="cpu") as fused:
        for b, t, s in ((2, 5, 3), (3, 7, 4), (4, 6, 9)):
            x = made(b, t, s, D)
            close = dict(rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(x, given["w"], given["p"]), forward(x, given["w"], given["p"]), **close)
    assert [window[0] for window in windows] == [5, 7, 6] and all(window[1:] == (1, 1) for window in windows)
    assert "2 graphs" in fused.report()
