"""Which backends exist here, which one serves a call, and why. The only place that dispatches.

- ``reference``: plain PyTorch, any device and dtype. The oracle, the fallback and the eager baseline.
- ``cpu``: C++ (``csrc/cpu``), one library per instruction set, chosen at load.
- ``cuda``: CUDA C++ (``csrc/cuda``).
- ``triton``: Triton kernels (``minisora_kernels/triton``).

An explicit choice (``backend=``, :func:`use_backend` or the environment variable ``MINISORA_BACKEND``, read once at
import) runs or raises the reason. An automatic choice takes the first backend of :data:`PREFERENCE` that is built, has
the op, does not refuse the call, and is right and faster here by the record of ``python -m minisora_kernels verify``
(see ``verify/record.py``; ``MINISORA_VERIFIED=PATH`` names another record, ``MINISORA_VERIFIED=0`` takes none). Each
refusal is logged once at INFO level. Records are read when an op first asks for one, never at import.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from .forcing import force, forced

BACKENDS = ("reference", "cpu", "cuda", "triton")

# The automatic order per device type; any other device is served by the reference.
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

# Triton's interpreter runs its kernels on CPU tensors: slow, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The device type that a backend's kernels run on.
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if INTERPRETED else "cuda"}
if DEVICES["triton"] == "cpu":  # it stands in for a GPU
    PREFERENCE["cpu"] = PREFERENCE["cuda"]

# The record to read in place of the one in the cache folder; "0" for none.
VERIFIED: str | None = os.environ.get("MINISORA_VERIFIED") or None

_log = logging.getLogger("minisora_kernels")
_logged: set[tuple[str, str, str]] = set()
_warned: set[str] = set()
_built: set[tuple[str, str]] = set()
_package = Path(__file__).parent
_unavailable: dict[str, str | None] = {"reference": None}


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it may be one of {', '.join(BACKENDS)}")
    return name


# What the process was told to run on.
FORCED: str | None = os.environ.get("MINISORA_BACKEND") or None
if FORCED is not None:
    _check_name(FORCED, "the environment variable MINISORA_BACKEND")


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
    """Decorates what gives the shapes and dtypes of a raw op, for every backend."""

    def register(fake: Callable) -> Callable:
        for library in LIBRARIES:
            torch.library.register_fake(f"{library.ns}::{name}", fake)
        return fake

    return register


def kernels(name: str) -> Any:
    """The raw ops of backend ``name``, as attributes."""
    return torch.ops.minisora_triton if name == "triton" else torch.ops.minisora


def build_record() -> dict:
    """What ``setup.py`` built, and why it did not build the rest; empty for a tree that was never installed."""
    path = _package / "build_record.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str, variant: str | None, wanted: str) -> str | None:
    """Load ``_<variant>.so``; the reason it is not there, or None. One that exists and cannot be used raises."""
    libraries = [] if variant is None else sorted(_package.glob(f"_{variant}.*so"))
    if not libraries:
        record = build_record().get(name, {})
        why = record.get("not_built", "the package was not built: run `pip install -e .`")
        why = record.get("left_out", {}).get(variant, why)
        return f"{wanted}: {why}"
    built = build_record().get("torch", {}).get("version", torch.__version__)
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"{libraries[0].name} was built against torch {built}, this is torch {torch.__version__}. Rebuild it with "
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


def cpu_capability() -> str:
    """The instruction set that the CPU kernels may use here: a key of :data:`VARIANTS`, or what torch calls less.

    torch's own environment variable ``ATEN_CPU_CAPABILITY`` (avx2, avx512) holds for the kernels too; what goes beyond
    AVX-512 (products and conversions of bfloat16, and their tiles if the system allows it) is used if it is not set.
    In the place of one that the build left out stands the next less that it did not.
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
        _unavailable["cuda"] = f"torch {torch.__version__} has no CUDA"
    else:
        _unavailable["cuda"] = _load("cuda", "cuda", "no CUDA library")


_load_libraries()


def unavailable(name: str) -> str | None:
    """Why the backend cannot be used on this machine at all, or None if it can."""
    if name == "triton" and name not in _unavailable:  # asked when wanted: looking for a module takes time
        _unavailable[name] = None if importlib.util.find_spec(name) else "Triton is not installed"
    reason = _unavailable[_check_name(name, "name")]
    if DEVICES.get(name) == "cuda" and reason is None and not torch.cuda.is_available():
        return "torch finds no CUDA device"
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
        detail: what else tells regimes of the op apart (see :func:`regime`).

    Raises ValueError if an explicitly chosen backend refuses this call, RuntimeError if it is not there at all.
    """
    explicit = forced(FORCED) if backend is None else _check_name(backend, "backend")
    if explicit is None:
        name = _automatic(op, table, device, call, detail)
    else:
        name = _explicit(op, table, device, explicit, call)
    if name != "reference" and not torch.compiler.is_compiling():
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


def regime(device: torch.device, dtype: torch.dtype, both: bool, detail: str) -> str:
    """What a record tells apart for an op: dtype, direction, and what the op adds, as "bfloat16 forward short norm".

    On a GPU float32 is "tf32" where torch's products are allowed to use it, at the first call.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu" and name == "float32" and torch.get_float32_matmul_precision() != "highest":
        name = "tf32"
    return f"{name} forward{'+backward' if both else ''} {detail}".rstrip()


class _Order:
    """The backends that an automatic choice tries in a regime, and the one that served the last call."""

    __slots__ = ("names", "served")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.served = names, ""


_orders: dict[tuple, _Order] = {}
_kept: dict[str, str] = {}


def _automatic(op: str, table: Table, device: torch.device, call: tuple, detail: str) -> str:
    both = False
    if torch.is_grad_enabled():
        for tensor in call:
            if tensor is not None and tensor.requires_grad:
                both = True
                break
    if torch.compiler.is_compiling():
        for name in _order_in_compile(op, tuple(table), device.type, device.index, call[0].dtype, both, detail):
            if table[name](*call) is None:
                return name
        raise RuntimeError(f"{op}: no backend serves this call on {device.type}")
    key = (op, device, call[0].dtype, both, detail)
    order = _orders.get(key)
    if order is None:
        order = _orders[key] = _Order(_order(op, tuple(table), device, regime(*key[1:])))
    for name in order.names:
        reason = table[name](*call)
        if reason is None:
            if name != order.served:
                order.served = name
            return name
        _log_once(op, name, reason)
    raise RuntimeError(f"{op}: no backend serves this call on {device.type}")


@torch.compiler.assume_constant_result
def _order_in_compile(
    op: str, has: tuple[str, ...], kind: str, index: int | None, dtype: torch.dtype, both: bool, detail: str
) -> tuple[str, ...]:  # plain values, which Dynamo can hand over
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    order = _Order(_order(op, has, device, regime(device, dtype, both, detail), compiling=True))
    order.served = order.names[0]
    _orders["compile", op, device, dtype, both, detail] = order
    return order.names


def _order(
    op: str, has: tuple[str, ...], device: torch.device, regime: str, *, compiling: bool = False
) -> tuple[str, ...]:
    """The backends in turn; why the others are not among them is logged, and the user told once if none is."""
    allowed, refused = [], {}
    kept = _kept.get(_label(op, regime, compiling))
    for name in PREFERENCE.get(device.type, ("reference",)):
        if name not in has:
            continue
        verdict = _verdict(op, name, device, regime, compiling)
        if verdict is None or (verdict[0] == "slower here" and name == kept):
            allowed.append(name)
        else:
            refused[name] = verdict
            _log_once(op, name, verdict[1])
    told = [(name, reason) for name, (status, reason) in refused.items() if status in ("not verified", "not here")]
    if told and allowed == ["reference"]:
        name, reason = min(told, key=lambda pair: refused[pair[0]][0] != "not verified")
        _warn_once(device.type, f"minisora_kernels runs plain PyTorch instead of {name} kernels: {reason}")
    if kept in allowed:
        allowed = [kept, *(name for name in allowed if name != kept)]
    return tuple(allowed)


def _verdict(op: str, name: str, device: torch.device, regime: str, compiling: bool) -> tuple[str, str] | None:
    """Why the automatic choice passes over backend ``name``, as a status and a reason; None if it does not."""
    if name == "reference":
        return None
    missing = unavailable(name)
    if missing is not None:
        return "not here", missing
    from .verify import record  # when an op first asks

    return record.refusal(name, op, device, regime, compiling)


def _warn_once(device: str, message: str) -> None:
    if device not in _warned:
        _warned.add(device)
        warnings.warn(message, stacklevel=6)


def _label(op: str, regime: str, compiling: bool) -> str:
    return f"{op} {regime}{' compiled' if compiling else ''}"


def served() -> dict[str, str]:
    """By op and regime the backend that an automatic choice last took; since :func:`keep`, in whose block a run is."""
    return {
        _label(key[-5], regime(*key[-4:]), len(key) == 6): order.served
        for key, order in list(_orders.items())
        if order.served
    }


def would_serve(label: str, device: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """For a key of :func:`served` the backends that the automatic choice tries now, and why not the others."""
    compiling = label.endswith(" compiled")
    op, _, regime = label.removesuffix(" compiled").partition(" ")
    table: Table = importlib.import_module(f"{__package__}.ops.{op}").BACKENDS
    names = _order(op, tuple(table), device, regime, compiling=compiling)
    verdicts = {name: _verdict(op, name, device, regime, compiling) for name in table if name not in names}
    return names, {name: verdict[1] for name, verdict in verdicts.items() if verdict is not None}


@contextmanager
def keep(stored: Mapping[str, str]) -> Iterator[None]:
    """Within the block the automatic choice takes what served before, as :func:`served` gave it, where it can.

    It cannot where a kernel is not there, wrong here, not verified, or refuses the call. For the process.
    """
    global _kept
    previous, _kept = _kept, dict(stored)
    _orders.clear()
    try:
        yield
    finally:
        _kept = previous
        _orders.clear()


def has_record(device: torch.device) -> bool:
    """Whether there is a record of this device, with float32 products as torch makes them now."""
    from .verify import record

    found = record.find(device)
    return found is not None and found[0].covers(torch.get_float32_matmul_precision())


def forget() -> None:
    """Read the record anew at the next call of an op. What is compiled stays as it is."""
    from .verify import record

    _orders.clear()
    record.find.cache_clear()


def _check_built(op: str, name: str) -> None:
    """A library that was built before the op was written is an error that says so."""
    if (op, name) in _built or name == "triton":
        return
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"minisora::{op}_fwd", name.upper()):
        raise ImportError(f"the {name} library was built without {op}; rebuild it with `pip install -e .`")
    _built.add((op, name))


def _log_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _logged:
        _logged.add((op, name, reason))
        _log.info("%s: not the %s backend: %s", op, name, reason)


class _NoContext:
    """What an ``autograd.Function`` writes its context to where there will be no backward."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``; where no derivative can follow, ``function.forward`` alone, which costs less per call.

    Forward-mode derivatives go through ``apply``, which refuses them: a raw op would drop them in silence.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
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
