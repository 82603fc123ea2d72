"""Dispatch: explicit choices run or raise with the reason, automatic ones follow the order and log why.

Also which library of CPU kernels is loaded, and that each one this CPU can run computes.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from conftest import KERNEL_BACKENDS

import minisora_kernels as mk
from minisora_kernels import automatic, backends, forcing
from minisora_kernels.verify import record

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def table(**refusals: str | None) -> dict:
    return {name: (lambda *call, reason=reason: reason) for name, reason in refusals.items()}


@pytest.fixture
def unasked(monkeypatch):
    """As if no op had asked yet."""
    monkeypatch.setattr(automatic, "_logged", set())
    monkeypatch.setattr(automatic, "_warned", set())
    monkeypatch.setattr(automatic, "_orders", {})
    monkeypatch.setattr(automatic, "_of_calls", {})


@pytest.fixture
def all_available(monkeypatch, unasked):
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "_check_built", lambda op, name: None)
    monkeypatch.setattr(record, "refusal", lambda *regime: None)


def test_automatic_choice_follows_the_order(all_available):
    x, cuda = torch.zeros(1), torch.device("cuda")
    assert backends.choose("op", table(reference=None, cpu=None), CPU, None, x) == "cpu"
    assert backends.choose("op", table(reference=None, cuda=None), cuda, None, x) == "cuda"
    assert backends.choose("op", table(reference=None, cuda=None, triton=None), cuda, None, x.bfloat16()) == "triton"
    assert backends.choose("op", table(reference=None, cuda=None), torch.device("cuda"), "cuda", x) == "cuda"
    assert backends.choose("op", table(reference=None, cpu=None), torch.device("meta"), None, x) == "reference"


def test_automatic_choice_skips_a_refusal_and_logs_it_once(all_available, caplog):
    refusing = table(reference=None, cpu="head_dim 12 is odd")
    with caplog.at_level(logging.INFO, logger="minisora_kernels"):
        for _ in range(3):
            assert backends.choose("op", refusing, CPU, None, torch.zeros(1)) == "reference"
    assert [record.message for record in caplog.records] == ["op: not the cpu backend: head_dim 12 is odd"]


@pytest.mark.parametrize(
    ("verdict", "missing", "told"),
    [
        (("slower here", "slower here: 1.20"), "no CUDA library", None),
        (("wrong here", "wrong here: nan"), "no CUDA library", None),
        (("not verified", "not verified on X"), "no CUDA library", "instead of triton kernels: not verified on X"),
        (None, "no CUDA library", None),
    ],
)
def test_plain_pytorch_is_warned_of_unless_a_record_has_judged(monkeypatch, unasked, verdict, missing, told):
    monkeypatch.setattr(backends, "unavailable", lambda name: missing if name == "cuda" else None)
    monkeypatch.setattr(record, "refusal", lambda *regime: verdict)
    tables = table(reference=None, cuda=None, triton=None)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        automatic.choose("op", tables, torch.device("cuda"), (torch.zeros(1),), "")
    assert [str(item.message).partition("PyTorch ")[2] for item in found] == ([told] if told else [])


@pytest.fixture
def precision():
    """Sets the precision of float32 products by its newer name, with which torch's older getter raises."""

    def set_to(value):
        torch.backends.cuda.matmul.fp32_precision = value

    before = torch.backends.cuda.matmul.fp32_precision
    yield set_to
    torch.set_float32_matmul_precision("highest")
    set_to(before)


@pytest.mark.parametrize("both", [False, True])
def test_the_precision_of_float32_products_is_asked_at_every_call(monkeypatch, unasked, precision, both):
    asked = []
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(record, "refusal", lambda name, op, device, regime, compiling: asked.append(regime) or None)
    tables, cuda = table(reference=None, triton=None), torch.device("cuda")
    x = torch.zeros(1, requires_grad=both)
    for value in ("tf32", "ieee", "tf32", "ieee"):
        precision(value)
        assert automatic.choose("op", tables, cuda, (x,), "") == "triton"
        automatic.choose("op", tables, cuda, (x.bfloat16(),), "")
        automatic.choose("op", tables | {"cpu": lambda *call: None}, CPU, (x,), "")
    rest = "forward+backward" if both else "forward"
    assert sorted(set(asked)) == [f"{name} {rest}" for name in ("bfloat16", "float32", "tf32")]
    assert {f"op {name} {rest}" for name in ("bfloat16", "float32", "tf32")} == automatic.current_choices().keys()


def test_on_an_amd_gpu_no_kernel_of_ours_serves(monkeypatch, unasked):
    """torch calls these GPUs "cuda"."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "DEVICES", {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"})
    monkeypatch.setitem(backends._unavailable, "triton", None)
    tables, cuda, x = table(reference=None, triton=None), torch.device("cuda"), torch.zeros(1)
    with pytest.warns(UserWarning, match="plain PyTorch instead of triton kernels: not run on AMD GPUs"):
        assert backends.choose("op", tables, cuda, None, x) == "reference"
    with pytest.raises(RuntimeError, match="'triton' is not available: not run on AMD GPUs"):
        backends.choose("op", tables, cuda, "triton", x)
    monkeypatch.setattr(backends, "DEVICES", {"cpu": "cpu", "cuda": "cuda", "triton": "cpu"})  # interpreted
    assert backends.unavailable("triton") is None


@pytest.mark.parametrize("amd", [False, True])
def test_on_an_amd_gpu_every_launch_goes_through_triton(monkeypatch, amd):
    """Its compiler looks at more than addresses and numbers: a kernel that is compiled may not fit the next call."""
    jit = pytest.importorskip("triton.runtime.jit")
    from minisora_kernels.triton import _launch

    calls = []

    class Kernel(jit.JITFunction):
        hash = "of no kernel"

        def __init__(self):
            pass

        def __getitem__(self, grid):
            def through_triton(*arguments, **options):
                calls.append("triton")
                return {(2, 1, 1): lambda *arguments: calls.append("direct")}

            return through_triton

    monkeypatch.setattr(_launch, "_LAUNCH", jit.JITFunction.run)
    monkeypatch.setattr(_launch, "_DIRECT", not amd)
    launch, aligned = _launch.Launch(Kernel(), (2,), 7), torch.zeros(64)
    aligned = aligned[-aligned.data_ptr() % 64 // 4 :]
    for tensor in (aligned, aligned, aligned[1:], None):
        launch(tensor)
    assert calls == (["triton"] * 4 if amd else ["triton", "direct", "triton", "direct"])


def test_explicit_choice_raises_the_reason(all_available):
    with pytest.raises(ValueError, match="op: backend 'cpu' cannot serve this call: head_dim 12 is odd"):
        backends.choose("op", table(reference=None, cpu="head_dim 12 is odd"), CPU, "cpu")
    with pytest.raises(ValueError, match="the op has no triton kernel"):
        backends.choose("op", table(reference=None), CPU, "triton")
    with pytest.raises(ValueError, match="it does not run on cpu tensors"):
        backends.choose("op", table(reference=None, cuda=None), CPU, "cuda")


def test_explicit_choice_of_a_missing_backend_raises_its_reason(monkeypatch, unasked):
    monkeypatch.setitem(backends._unavailable, "cpu", "no C++ compiler was found")
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


@pytest.fixture
def name_of_choice(monkeypatch, all_available):
    """What ``choose`` takes, as a number, so that it shows in a graph: 1 automatic, 2 reference, 3 cpu by name."""
    tables = table(reference=None, triton=None, cpu=None)
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("triton", "reference")})
    monkeypatch.setattr(backends, "DEVICES", {"cpu": "cpu", "cuda": "cuda", "triton": "cpu"})

    def number(x):
        chosen = backends.choose("op", tables, x.device, None, x)
        return x + {"triton": 1, "reference": 2, "cpu": 3}[chosen]

    return number


@pytest.mark.parametrize("compiled", [False, True])
def test_use_backend_is_of_the_thread(name_of_choice, compiled):
    torch._dynamo.reset()
    call = torch.compile(name_of_choice, fullgraph=True, backend="eager") if compiled else name_of_choice
    x = torch.zeros(1)
    found: dict = {name: set() for name in ("reference", "cpu", None, "outside")}
    barrier = threading.Barrier(len(found))

    def run(name):
        barrier.wait()
        with mk.use_backend(name) if name != "outside" else contextlib.nullcontext():
            for _ in range(50):
                found[name].add(call(x).item())
        with pytest.raises(KeyError), mk.use_backend(name if name != "outside" else "cpu"):
            raise KeyError
        found["outside"].add(call(x).item())

    threads = [threading.Thread(target=run, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"reference": {2}, "cpu": {3}, None: {1}, "outside": {1}}
    assert call(x).item() == 1


def test_use_backend_nests_within_what_is_compiled(name_of_choice):
    torch._dynamo.reset()

    def call(x):
        with mk.use_backend("reference"):
            y = name_of_choice(x)
            with mk.use_backend("cpu"):
                y = torch.cat([y, name_of_choice(x)])
            y = torch.cat([y, name_of_choice(x)])
        return torch.cat([y, name_of_choice(x)])

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for _ in range(2):
        assert call(torch.zeros(1)).tolist() == compiled(torch.zeros(1)).tolist() == [2, 3, 2, 1]
    with mk.use_backend("cpu"):
        assert compiled(torch.zeros(1)).tolist() == [2, 3, 2, 3]


def test_use_backend_goes_with_a_backward_into_the_threads_of_autograd(name_of_choice, monkeypatch):
    """torch hands its state to a GPU's thread; here the handing over is stood in for by another identity."""
    x = torch.zeros(1)
    with mk.use_backend("reference"):
        handed = torch._C._get_obj_in_tls(forcing._KEY)

    def in_the_thread_of_autograd(results):
        torch._C._stash_obj_in_tls(forcing._KEY, handed)
        results.append(name_of_choice(x).item())
        with mk.use_backend("cpu"):
            results.append(name_of_choice(x).item())
        results.append(name_of_choice(x).item())

    results: list = []
    thread = threading.Thread(target=in_the_thread_of_autograd, args=(results,))
    thread.start()
    thread.join()
    assert results == [2, 3, 2]
    assert name_of_choice(x).item() == 1


def test_a_checkpointed_forward_runs_again_on_what_the_block_says(name_of_choice):
    seen = []

    def forward(x):
        y = name_of_choice(x)
        seen.append(y.item())
        return y * x

    x = torch.ones(1, requires_grad=True)
    with mk.use_backend("cpu"):
        torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert seen == [4, 4]


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
from torch.nn.attention import SDPBackend, sdpa_kernel

# On a CPU with AMX torch's flash attention fails where the variable hides AVX-512 ("pack_vnni2 is only supported").
@sdpa_kernel(SDPBackend.MATH)
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


@pytest.mark.parametrize(
    ("variables", "executor", "upcast"),
    [
        ({}, ("device", "cuda"), False),
        ({"TRITON_INTERPRET": "1"}, ("interpreter", "cpu"), True),
        ({"MINISORA_EXECUTE_IR": "1"}, ("ir", "cpu"), False),
    ],
)
def test_who_executes_tritons_kernels(variables: dict[str, str], executor: tuple[str, str], upcast: bool):
    """The interpreter alone takes the branches that mend its flaws."""
    pytest.importorskip("triton")
    code = (
        "from minisora_kernels import backends; from minisora_kernels.triton import _common; "
        "print(backends.EXECUTOR, backends.DEVICES['triton'], _common._UPCAST.value)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINISORA_EXECUTE_IR")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [*executor, str(upcast)]
