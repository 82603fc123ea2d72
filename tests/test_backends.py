"""Dispatch: explicit choices run or raise with the reason, automatic ones follow the order and log why.

Also which library of CPU kernels is loaded, and that each one this CPU can run computes.
"""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_BACKENDS

import minisora_kernels as mk
from minisora_kernels import backends

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


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


def test_every_library_that_is_built_has_its_capability_and_the_other_way_round():
    tree = ast.parse((ROOT / "setup.py").read_text())
    (built,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and ast.unparse(node.targets[0]) == "VARIANTS"
    )
    names = [ast.literal_eval(key) for key in built.keys if key is not None]
    assert names == list(backends.VARIANTS.values())
    assert list(backends.VARIANTS) == ["AVX2", "AVX512", "AVX512_BF16", "AMX"]


@pytest.mark.parametrize(
    ("left_out", "variable", "capability"),
    [
        (["cpu_amx"], None, "AVX512_BF16"),
        (["cpu_amx", "cpu_avx512_bf16"], None, "AVX512"),
        (["cpu_avx512"], None, "AMX"),
        (["cpu_avx512"], "avx512", "AVX2"),
        (["cpu_avx2", "cpu_avx512"], "avx512", "AVX512"),
    ],
)
def test_what_the_build_left_out_is_passed_over(monkeypatch, left_out, variable, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_init_amx"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if variable is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", variable)
    record = {"cpu": {"left_out": dict.fromkeys(left_out, "it does not compile")}}
    monkeypatch.setattr(backends, "build_record", lambda: record)
    assert backends.cpu_capability() == capability


@pytest.mark.parametrize(
    ("torchs", "variable", "bf16", "tiles", "allowed", "capability"),
    [
        ("DEFAULT", None, False, False, False, "DEFAULT"),
        ("AVX2", None, False, False, False, "AVX2"),
        ("AVX512", None, False, False, False, "AVX512"),
        ("AVX512", None, True, False, False, "AVX512_BF16"),
        ("AVX512", None, True, True, False, "AVX512_BF16"),
        ("AVX512", None, True, True, True, "AMX"),
        ("AVX512", "avx512", True, True, True, "AVX512"),
        ("AVX2", "avx2", True, True, True, "AVX2"),
        ("AVX2", None, True, True, True, "AVX2"),
    ],
)
def test_capability_is_the_most_that_cpu_system_and_torch_allow(
    monkeypatch, torchs, variable, bf16, tiles, allowed, capability
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if variable is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", variable)
    assert backends.cpu_capability() == capability


CALLS = """
import torch, minisora_kernels as mk
from minisora_kernels import backends
from minisora_kernels.testing import assert_as_accurate

def check(name, call, *arguments):
    results = []
    for dtype, backend in ((torch.bfloat16, "cpu"), (torch.bfloat16, "reference"), (torch.float64, "reference")):
        leaves = [a.to(dtype).requires_grad_() for a in arguments]
        y = call(*leaves, backend=backend)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16().to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for i, result in enumerate(zip(*results, strict=True)):
        assert_as_accurate(f"{name} {i}", *result)

torch.manual_seed(0)
random = lambda *shape: torch.randn(*shape).bfloat16()
check("adaln", mk.adaln, random(2, 12, 40), random(2, 40), random(2, 3, 40))
qkv = random(2, 70, 3, 2, 24)
check("joint", lambda q, backend: mk.window_attention(q, (2, 5, 7), (2, 5, 7), qk_norm="rms", backend=backend), qkv)
check("temporal", lambda q, backend: mk.window_attention(q, (2, 5, 7), (2, 1, 1), backend=backend), qkv)
print(backends.cpu_capability(), *sorted(path.rsplit("/", 1)[-1] for path in torch.ops.loaded_libraries))
"""


@pytest.mark.skipif("cpu" not in KERNEL_BACKENDS, reason="the cpu kernels are not there")
@pytest.mark.parametrize(
    ("wanted", "supported"),
    [
        ("avx2", torch.cpu._is_avx2_supported),
        ("avx512", torch.cpu._is_avx512_supported),
        (None, torch.cpu._is_avx2_supported),
    ],
    ids=["avx2", "avx512", "the most"],
)
def test_the_library_of_the_capability_is_loaded_and_computes(wanted, supported):
    if not supported():
        pytest.skip(f"this CPU has no {wanted or 'avx2'}")
    reason = backends.build_record()["cpu"].get("left_out", {}).get(f"cpu_{wanted}", "")
    if reason.startswith("MINISORA_CPU="):
        pytest.skip(reason)
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    if wanted is not None:
        environment["ATEN_CPU_CAPABILITY"] = wanted
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    capability, *libraries = done.stdout.split()
    assert wanted is None or capability == wanted.upper()
    assert [name for name in libraries if "cpu" in name] == [f"_{backends.VARIANTS[capability]}.so"]
