"""Which backends exist here, which one serves a call, and why. Every op comes here.

- ``reference``: plain PyTorch, any device and dtype. The oracle, the fallback and the eager baseline.
- ``cpu``: C++ (``csrc/cpu``), one library per instruction set, chosen at load.
- ``cuda``: CUDA C++ (``csrc/cuda``).
- ``triton``: Triton kernels (``minisora_kernels/triton``).

An explicit choice (``backend=``, :func:`use_backend` or the environment variable ``MINISORA_BACKEND``, read once at
import) runs or raises the reason. An automatic choice takes the fastest backend of :data:`PREFERENCE` that is built,
has the op, does not refuse the call, and is right and faster than plain PyTorch here, by the record of
``python -m minisora_kernels verify`` (see ``verify/record.py``; ``MINISORA_VERIFIED=PATH`` names another record,
``MINISORA_VERIFIED=0`` takes none). Each refusal is logged once at INFO level. Records are read when an op first asks
for one, never at import.

For tests, ``TRITON_INTERPRET=1`` or ``MINISORA_EXECUTE_IR=1`` has Triton's kernels executed on CPU tensors (see
:data:`EXECUTOR`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.autograd import forward_ad

from .forcing import force, forced

R = TypeVar("R")
Name = Literal["reference", "cpu", "cuda", "triton"]
BACKENDS: tuple[Name, ...] = get_args(Name)

# What an automatic choice may take per device type, in the order that settles a tie; any other device is served by the
# reference.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

# The library of CPU kernels for what cpu_capability() says, the least first; setup.py builds all that the compiler can.
VARIANTS = {"AVX2": "cpu_avx2", "AVX512": "cpu_avx512", "AVX512_BF16": "cpu_avx512_bf16", "AMX": "cpu_amx"}

# An op's table: backend name -> predicate. The predicate gets the call's arguments and returns why this backend cannot
# serve them, or None if it can.
Refusal = Callable[..., "str | None"]
Table = Mapping[str, Refusal]

# Schemas are defined here in Python. What is compiled (cpu, cuda) implements them under "minisora", Triton's launchers
# under "minisora_triton": a CUDA tensor may be served by either.
LIBRARIES = [torch.library.Library(name, "DEF") for name in ("minisora", "minisora_triton")]

# What executes Triton's kernels: the "device"; or on CPU tensors, slowly, for tests, Triton's "interpreter", or a tool
# that executes the "ir" its compiler makes (ttsem, in a session that the tests open).
EXECUTOR = (
    "interpreter"
    if os.environ.get("TRITON_INTERPRET", "0") == "1"
    else "ir"
    if os.environ.get("MINISORA_EXECUTE_IR", "0") == "1"
    else "device"
)
INTERPRETED = EXECUTOR == "interpreter"

# The device type that a backend's kernels run on.
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda" if EXECUTOR == "device" else "cpu"}
if DEVICES["triton"] == "cpu":  # it stands in for a GPU
    PREFERENCE["cpu"] = PREFERENCE["cuda"]

# The record to read in place of the one in the cache folder; "0" for none.
VERIFIED: str | None = os.environ.get("MINISORA_VERIFIED") or None

_built: set[tuple[str, str]] = set()
_package = Path(__file__).parent
_unavailable: dict[str, str | None] = {"reference": None}


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it may be one of {', '.join(BACKENDS)}")
    return name


# What the process was told to run on.
FORCED: str | None = os.environ.get("MINISORA_BACKEND") or None
# What is wrong with the environment. It is raised by the first call, so that a command can say it in one line.
broken: Exception | None = None


def check_environment() -> None:
    """Raise ValueError for an unknown MINISORA_BACKEND, ImportError for a library that is there and cannot be used."""
    if broken is not None:
        raise broken.with_traceback(None)  # else each call would add its frames to those of the last


def cache_folder() -> Path | None:
    """Where records of this user are; None if there is no such place."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(named) if named and Path(named).is_absolute() else Path.home() / ".cache") / "minisora_kernels"
    except RuntimeError:  # no home
        return None


@functools.cache
def launcher(name: str) -> Callable:
    """The function that launches Triton's kernels for raw op ``name``; imports its file."""
    op = re.sub("_[a-z]+$", "", name)
    return getattr(importlib.import_module(f"{__package__}.triton.{op}"), name)


def tf32() -> bool:
    """Whether float32 products on a GPU may be TF32: those of torch, and so those of the kernels.

    ``torch.get_float32_matmul_precision()`` raises once a setting was made by its newer name. This is what
    ``torch.backends.cuda.matmul.fp32_precision`` reads, in a tenth of its time, which every call pays.
    """
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" and torch.version.hip is None


def define(schema: str) -> None:
    """Define a raw op for every backend. Triton's is imported when it is first called."""
    for library in LIBRARIES:
        library.define(schema)
    name = schema.split("(")[0]

    def launch(first: torch.Tensor, *arguments: Any) -> Any:
        if not first.is_cuda:
            return launcher(name)(first, *arguments)
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return launcher(name)(first, *arguments)

    LIBRARIES[1].impl(name, launch, DEVICES["triton"].upper())


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Decorate the function that returns the shapes and dtypes of a raw op, for every backend."""

    def register(fake: Callable) -> Callable:
        for library in LIBRARIES:
            torch.library.register_fake(f"{library.ns}::{name}", fake)
        return fake

    return register


class _Watch(threading.local):
    """Who is told what this thread calls: a list of raw ops or references, arguments and results; or None."""

    def __init__(self) -> None:  # in every thread; Dynamo would not guard on an attribute of the class
        self.calls: list[tuple[Any, tuple, Any]] | None = None


watch = _Watch()


class _Watched:
    """The raw ops of a library, which note their calls."""

    def __init__(self, library: Any, calls: list[tuple[Any, tuple, Any]]) -> None:
        self._library, self._calls = library, calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(_noted, self._calls, getattr(self._library, name).default)


def _noted(calls: list[tuple[Any, tuple, Any]], function: Callable[..., R], *arguments: Any) -> R:
    result = function(*arguments)
    calls.append((function, arguments, result))
    return result


def kernels(name: str) -> Any:
    """The raw ops of backend ``name``, as attributes."""
    library = torch.ops.minisora_triton if name == "triton" else torch.ops.minisora
    return library if watch.calls is None else _Watched(library, watch.calls)


def plain(reference: Callable[..., R], *arguments: Any) -> R:
    """The result of an op's reference, noted as that of a raw op is."""
    return reference(*arguments) if watch.calls is None else _noted(watch.calls, reference, *arguments)


def build_record() -> dict:
    """What ``setup.py`` built, and why it did not build the rest; empty for a tree that was never installed."""
    path = _package / "build_record.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _digest(folder: Path) -> str:
    """As in setup.py."""
    total = hashlib.sha256()
    for path in sorted([*folder.parent.glob("[!.]*.h"), *folder.glob("[!.]*")]):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _load(name: str, variant: str | None, wanted: str) -> str | None:
    """Load ``_<variant>.so``; the reason it is not there, or None. One that exists and cannot be used raises."""
    libraries = [] if variant is None else sorted(_package.glob(f"_{variant}.*so"))
    record = build_record().get(name, {})
    if not libraries:
        why = record.get("not_built", "the package was not built: run `pip install -e .`")
        why = record.get("left_out", {}).get(variant, why)
        return f"{wanted}: {why}"
    built = build_record().get("torch", {}).get("version", torch.__version__)
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"{libraries[0].name} was built against torch {built}, this is torch {torch.__version__}. Rebuild it with "
            "`pip install -e .`, or set MINISORA_BACKEND=reference to run without it."
        )
    sources = _package.parent / "csrc" / name  # there in a checkout, not where a wheel was installed
    if "sources" in record and sources.is_dir() and record["sources"] != _digest(sources):
        # The ops of this checkout would call it with other arguments than it takes.
        raise ImportError(
            f"{libraries[0].name} was built from other sources than those of {sources}. Rebuild it with "
            "`pip install -e .`, or set MINISORA_BACKEND=reference to run without it."
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        raise ImportError(
            f"{libraries[0].name} is built but does not load with torch {torch.__version__}: {error}. Rebuild it with "
            "`pip install -e .`, or set MINISORA_BACKEND=reference to run without it."
        ) from error
    return None


def _packaged() -> str:
    """What would load the CUDA kernels that are in the package; nothing if there are none."""
    record = build_record()
    architectures = record.get("cuda", {}).get("architectures")
    if architectures is None:
        return ""
    built = ".".join(record["torch"]["version"].split(".")[:2])
    return (
        f"; the package has kernels for compute capabilities {architectures}: torch {built} with CUDA loads them, on "
        "such a GPU"
    )


def cpu_capability() -> str:
    """The instruction set that the CPU kernels may use here: a key of :data:`VARIANTS`, or what torch calls less.

    torch's own environment variable ``ATEN_CPU_CAPABILITY`` (avx2, avx512) holds for the kernels too; what goes beyond
    AVX-512 (products and conversions of bfloat16, and their tiles if the system allows it) is used if it is not set.
    If the build skipped that variant, the best smaller one is used.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and "ATEN_CPU_CAPABILITY" not in os.environ and torch.cpu._is_avx512_bf16_supported():
        # asks Linux for the right to use tiles
        capability = "AMX" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "AVX512_BF16"
    left_out = build_record().get("cpu", {}).get("left_out", {})
    if VARIANTS.get(capability) not in left_out:
        return capability
    less = list(VARIANTS)[: list(VARIANTS).index(capability)]
    return next((name for name in reversed(less) if VARIANTS[name] not in left_out), capability)


def _load_libraries() -> None:
    if FORCED is not None:
        _check_name(FORCED, "the environment variable MINISORA_BACKEND")
    if FORCED == "reference":
        for name in ("cpu", "cuda"):
            _unavailable[name] = "MINISORA_BACKEND=reference: the libraries were not loaded"
        return
    capability = cpu_capability()
    variant = VARIANTS.get(capability)
    if variant is None:
        _unavailable["cpu"] = f"the kernels need AVX2 or AVX-512; this CPU offers {capability}"
    else:
        _unavailable["cpu"] = _load("cpu", variant, f"no library for {capability}")
    if torch.version.cuda is None:
        _unavailable["cuda"] = f"torch {torch.__version__} has no CUDA" + _packaged()
    else:
        _unavailable["cuda"] = _load("cuda", "cuda", "no CUDA library")


try:
    _load_libraries()
except (ImportError, ValueError) as error:
    broken = error


def unavailable(name: str) -> str | None:
    """Why the backend cannot be used on this machine at all, or None if it can."""
    check_environment()
    if name == "triton" and name not in _unavailable:  # checked on first use: the search for a module takes time
        _unavailable[name] = None if importlib.util.find_spec(name) else "Triton is not installed"
    reason = _unavailable[_check_name(name, "name")]
    if DEVICES.get(name) == "cuda" and reason is None:
        if torch.version.hip is not None:  # torch calls these GPUs "cuda" too
            return "not run on AMD GPUs"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device" + (_packaged() if name == "cuda" else "")
    return reason


def refusal(table: Table, name: str, *call: object) -> str | None:
    """Why backend ``name`` cannot serve this call, or None if it can."""
    if name not in table:
        return f"the op has no {name} kernel"
    return unavailable(name) or table[name](*call)


def choose(
    op: str, table: Table, device: torch.device, backend: str | None, *call: torch.Tensor | None, detail: str = ""
) -> str:
    """The backend that serves this call of ``op``.

    Args:
        call: the tensors of the call, the first of which has the dtype of the regime.
        detail: what else tells regimes of the op apart (see :func:`.automatic.regime`).

    Raises ValueError if an explicitly chosen backend refuses this call, RuntimeError if it is not there at all.
    """
    check_environment()
    explicit = forced(FORCED) if backend is None else _check_name(backend, "backend")
    if explicit is None:
        name = automatic.choose(op, table, device, call, detail)
    else:
        name = _explicit(op, table, device, explicit, call)
    if name != "reference" and not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            if explicit is not None:
                raise ValueError(
                    f"{op}: backend {name!r} cannot serve this call: it is inside a transform of torch.func, for which "
                    "the kernels have no rules; use 'reference'"
                )
            return "reference"
        _check_built(op, name)
    return name


def _explicit(op: str, table: Table, device: torch.device, name: str, call: tuple) -> str:
    missing = unavailable(name)
    if missing is not None:
        raise RuntimeError(f"{op}: backend {name!r} is not available: {missing}")
    reason = refusal(table, name, *call)
    if reason is None and DEVICES.get(name, device.type) != device.type:
        reason = f"it does not run on {device.type} tensors"
    if reason is not None:
        raise ValueError(f"{op}: backend {name!r} cannot serve this call: {reason}")
    return name


def _check_built(op: str, name: str) -> None:
    """Raise ImportError for a library that is older than the op."""
    if (op, name) in _built or name == "triton":
        return
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"minisora::{op}_fwd", name.upper()):
        raise ImportError(f"the {name} library was built without {op}; rebuild it with `pip install -e .`")
    _built.add((op, name))


class _NoContext:
    """A context for an ``autograd.Function`` without a backward: it asks for no gradient and drops what it gets."""

    needs_input_grad = (False,) * 32  # no op has as many inputs

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``; where no derivative can follow, ``function.forward`` alone, which costs less per call.

    Forward-mode derivatives go through ``apply``, which refuses them: a raw op would drop them in silence.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op runs on backend ``name`` or raises; ``None`` restores the automatic choice.

    The choice is the thread's, as that of ``torch.no_grad`` is, and goes with it into a backward. Raises ValueError for
    an unknown name.
    """
    with force(None if name is None else _check_name(name, "name")):
        yield


from . import automatic  # noqa: E402 - it needs what is above
