"""Seeds, uninitialised memory filled with NaN, and the backends that exist on this machine."""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import nullcontext

import approximate
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisora_kernels import backends

# Where the tests of ops and of models with kernels run: "cuda" for a GPU (python -m bench.gpu sets it).
DEVICE = os.environ.get("MINISORA_TEST_DEVICE", "cpu")

# What is right and fast on this machine is no concern of the tests, but for those that say so: every kernel serves.
backends.VERIFIED = "0"

# The backends of that device; where a CPU executes Triton's kernels, only those.
KERNEL_BACKENDS = [
    name
    for name, device in backends.DEVICES.items()
    if device == DEVICE and backends.unavailable(name) is None and (name == "triton" or backends.EXECUTOR == "device")
]

# For tests of Triton's kernels: on a GPU, or in the interpreter; tensors are made there.
on_triton = [
    pytest.mark.skipif(
        "triton" not in KERNEL_BACKENDS, reason="set TRITON_INTERPRET=1, or MINISORA_TEST_DEVICE=cuda where a GPU is"
    ),
    pytest.mark.usefixtures("default_device"),
]

if "triton" in KERNEL_BACKENDS and backends.INTERPRETED:
    # The interpreter patches triton.language whenever a kernel calls a helper. Once is enough, and takes half the time.
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    patch_once = functools.cache(_patch_lang)

    def call_helper(helper, *args, **kwargs):
        patch_once(helper.fn)
        return helper.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call_helper

    if os.environ.get("MINISORA_APPROXIMATE") == "1":
        approximate.install()


class Seen(TorchDispatchMode):
    """The raw ops of ours that ran, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("minisora"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def names(self) -> set[str]:
        return {func._schema.name.split("::")[1] for func, _, _ in self.calls}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op", help="of the tests that take every op or case, only those of this op")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the backend "cuda", whose cases are in tests/packaging, and what ``--op`` does not ask for."""
    only = config.getoption("--op")

    def fits(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        op = getattr(parameters.get("case"), "op", None)
        if only is not None and (op or parameters.get("op", only)) != only:
            return False
        return parameters.get("backend") != "cuda"

    config.hook.pytest_deselected(items=[item for item in items if not fits(item)])
    items[:] = [item for item in items if fits(item)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plans():
    """Tests change constants that the launchers' plans are made with."""
    if "triton" in KERNEL_BACKENDS:
        from minisora_kernels.triton._launch import forget_plans

        forget_plans()


@pytest.fixture
def nan_filled():
    """Every ``torch.empty`` is full of NaN: a kernel that leaves a value unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def default_device():
    """Tensors are made where the tests run."""
    with torch.device(DEVICE) if DEVICE != "cpu" else nullcontext():
        yield


@pytest.fixture
def launches(monkeypatch):
    """The kernel, positional and keyword arguments of every launch of Triton's."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    seen: list[tuple] = []
    kind = InterpretedFunction if backends.INTERPRETED else JITFunction
    launch = kind.run

    def record(self, *args, grid, warmup, **kwargs):
        seen.append((self, args, kwargs))
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(kind, "run", record)
    return seen


@pytest.fixture
def ropes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """The rotary tables, or None, and the norm of each attention that the pass over other people's models puts in."""
    found: list[tuple[object, object]] = []

    def watch(name: str) -> None:
        module = importlib.import_module(f"minisora_kernels.ops.{name}")
        attention = getattr(module, name)

        def call(*inputs, **options):
            found.append((options.get("rope"), options.get("qk_norm")))
            return attention(*inputs, **options)

        monkeypatch.setattr(module, name, call)

    watch("attention")
    watch("window_attention")
    return found


@pytest.fixture
def threads():
    """Restores the number of threads."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def pytest_report_header() -> list[str]:
    return [
        f"backend {name}: {backends.unavailable(name) or 'available'}"
        for name in backends.BACKENDS
        if name != "reference"
    ]


@pytest.fixture
def nothing_compiled():
    """Dynamo starts anew: sizes that one test saw must not become symbols in the next."""
    torch.compiler.reset()
