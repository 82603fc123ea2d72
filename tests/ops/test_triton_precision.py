"""Products of float32 in Triton's kernels: as exact as torch takes its own, and no other product changes with that."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import on_triton

from minisora_kernels import attention, patch_embed, window_attention

triton = pytest.importorskip("triton")

from minisora_kernels.triton._common import Constants, precision_of  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _restored():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(("setting", "wanted"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_setting_of_torch_holds(setting: str, wanted: str):
    torch.set_float32_matmul_precision(setting)
    assert precision_of(F32) == wanted
    assert precision_of(BF16) == precision_of(torch.float16) == "ieee"


def test_its_newer_name_holds_too():
    for value, wanted in (("tf32", "tf32"), ("ieee", "ieee")):
        torch.backends.cuda.matmul.fp32_precision = value
        assert precision_of(F32) == wanted


@on_triton[0]
@on_triton[1]
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("length", (4, 66))
def test_a_change_between_calls_asks_for_other_kernels(length: int, dtype: torch.dtype, launches):
    def keys(setting: str) -> list[tuple]:
        torch.set_float32_matmul_precision(setting)
        launches.clear()
        qkv = torch.randn(1, length, 3, 1, 8, dtype=dtype, requires_grad=True)
        window_attention(qkv, (length, 1, 1), (length, 1, 1), backend="triton").sum().backward()
        attention(*qkv.unbind(2), backend="triton").sum().backward()
        x = torch.randn(1, 1, 1, 4, 4, dtype=dtype, requires_grad=True)
        weight = torch.randn(8, 1, 1, 2, 2, dtype=dtype, requires_grad=True)
        patch_embed(x, weight, backend="triton").sum().backward()
        found = []
        for kernel, args, kwargs in launches:
            constants = [arg for arg in args if isinstance(arg, Constants)]
            named = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=False)) | kwargs
            found.append((kernel.fn.__qualname__, *constants, named.get("PRECISION")))
        return [key for key in found if key[1:] != (None,)]

    exact, rounded, exact_again = keys("highest"), keys("high"), keys("highest")
    assert len(exact) >= 8 and exact == exact_again
    if dtype == F32:
        assert not any(a == b for a, b in zip(exact, rounded, strict=True))
    else:
        assert exact == rounded


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "wanted"), [("highest", "ieee"), ("high", "tf32")])
def test_the_setting_reaches_every_product(setting: str, wanted: str, tmp_path):
    script = Path(__file__).parent / "triton_ttir.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script), "16", setting]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    products = [line for line in done.stdout.splitlines() if " tt.dot " in line]
    assert len(products) >= 10
    for line in products:
        assert ("inputPrecision = tf32" in line) == (wanted == "tf32"), line
