"""Dispatch: explicit choices run or raise with the reason, automatic ones follow the order and log why."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import KERNEL_BACKENDS

import minisora_kernels as mk
from minisora_kernels import backends

CPU = torch.device("cpu")


def table(**refusals: str | None) -> dict:
    return {name: (lambda *call, reason=reason: reason) for name, reason in refusals.items()}


@pytest.fixture
def all_available(monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "_check_built", lambda op, name: None)
    monkeypatch.setattr(backends, "_logged", set())


def test_automatic_choice_follows_the_order(all_available):
    assert backends.choose("op", table(reference=None, cpu=None), CPU, None) == "cpu"
    assert backends.choose("op", table(reference=None, cuda=None), torch.device("cuda"), None) == "reference"
    assert backends.choose("op", table(reference=None, cuda=None), torch.device("cuda"), "cuda") == "cuda"
    assert backends.choose("op", table(reference=None, cpu=None), torch.device("meta"), None) == "reference"


def test_automatic_choice_skips_a_refusal_and_logs_it_once(all_available, caplog):
    refusing = table(reference=None, cpu="head_dim 12 is odd")
    with caplog.at_level(logging.INFO, logger="minisora_kernels"):
        for _ in range(3):
            assert backends.choose("op", refusing, CPU, None) == "reference"
    assert [record.message for record in caplog.records] == ["op: not the cpu backend: head_dim 12 is odd"]


def test_explicit_choice_raises_the_reason(all_available):
    with pytest.raises(ValueError, match="op: backend 'cpu' cannot serve this call: head_dim 12 is odd"):
        backends.choose("op", table(reference=None, cpu="head_dim 12 is odd"), CPU, "cpu")
    with pytest.raises(ValueError, match="the op has no triton kernel"):
        backends.choose("op", table(reference=None), CPU, "triton")
    with pytest.raises(ValueError, match="it does not run on cpu tensors"):
        backends.choose("op", table(reference=None, cuda=None), CPU, "cuda")


def test_explicit_choice_of_a_missing_backend_raises_its_reason(monkeypatch):
    monkeypatch.setitem(backends._unavailable, "cpu", "no C++ compiler was found")
    monkeypatch.setattr(backends, "_logged", set())
    x = torch.randn(1, 2, 4)
    with pytest.raises(RuntimeError, match="gate_residual: backend 'cpu' is not available: no C"):
        mk.gate_residual(x, x, x, backend="cpu")
    with pytest.warns(UserWarning, match="plain PyTorch instead of cpu kernels: no C"):
        torch.testing.assert_close(mk.gate_residual(x, x, x), x + x * x)


def test_unknown_names_raise():
    x = torch.randn(1, 2, 4)
    with pytest.raises(ValueError, match="backend is 'fast'; it may be one of reference, cpu, cuda, triton"):
        mk.gate_residual(x, x, x, backend="fast")
    with pytest.raises(ValueError, match="name is 'fast'"), mk.use_backend("fast"):
        pass


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_use_backend_holds_within_its_block(name):
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    with mk.use_backend(name):
        with pytest.raises(ValueError, match="float64"):
            mk.gate_residual(x, x, x)
        with mk.use_backend(None):
            mk.gate_residual(x, x, x)
        mk.gate_residual(x, x, x, backend="reference")
    mk.gate_residual(x, x, x)


def test_a_library_from_before_the_op_is_an_error():
    with pytest.raises(ImportError, match=r"the cuda library was built without unpatchify; rebuild it"):
        backends._check_built("unpatchify", "cuda")
