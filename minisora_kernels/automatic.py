"""The automatic choice: what a record allows in each regime of an op, what served, and what a run keeps to.

A regime is what a record tells apart: dtype, direction, and what an op adds. The answer for one is kept, so that a call
pays for looking it up alone; torch.compile finds it while tracing, as a constant.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from . import backends, shortcut

_log = logging.getLogger("minisora_kernels")
_logged: set[tuple[str, str, str]] = set()
_warned: set[str] = set()


def regime(device: torch.device, dtype: torch.dtype, both: bool, detail: str) -> str:
    """What a record tells apart for an op: dtype, direction, and what the op adds, as "bfloat16 forward short norm".

    On a GPU float32 is "tf32" while torch's products may use it.
    """
    name = single(device) if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return f"{name} forward{'+backward' if both else ''} {detail}".rstrip()


def single(device: torch.device) -> str:
    """What a record calls float32 on this device now: "float32" or "tf32"."""
    return "tf32" if device.type == "cuda" and backends.tf32() else "float32"


class _Order:
    """The backends that an automatic choice tries in a regime, and the one that served the last call."""

    __slots__ = ("names", "served", "tf32")

    def __init__(self, names: tuple[str, ...], tf32: bool | None = None) -> None:
        # tf32: what float32 products could use then, on a GPU; None where that says nothing
        self.names, self.served, self.tf32 = names, "", tf32


_orders: dict[tuple[str, torch.device], _Order] = {}  # by label and device
_of_calls: dict[tuple, _Order] = {}  # the same by what a call has, to find one in less time
_kept: dict[str, str] = {}


def choose(op: str, table: backends.Table, device: torch.device, call: tuple, detail: str) -> str:
    """The backend for a call, as :func:`minisora_kernels.backends.choose` has it."""
    both = False
    if torch.is_grad_enabled():
        for tensor in call:
            if tensor is not None and tensor.requires_grad:
                both = True
                break
    dtype = call[0].dtype
    if torch.compiler.is_compiling():
        label, *names = _order_in_compile(op, tuple(table), device.type, device.index, dtype, both, detail)
        for name in names:
            if table[name](*call) is None:
                return _served_in_compile(label, device.type, device.index, name)
        raise RuntimeError(f"{op}: no backend serves this call on {device.type}")
    key = (op, device, dtype, both, detail)
    order = _of_calls.get(key)
    if order is None or (order.tf32 is not None and order.tf32 != backends.tf32()):
        order = _of_calls[key] = _order_of_call(*key, tuple(table))
    for name in order.names:
        reason = table[name](*call)
        if reason is None:
            if name != order.served:
                order.served = name
            return name
        _log_once(op, name, reason)
    raise RuntimeError(f"{op}: no backend serves this call on {device.type}")


def _order_of_call(
    op: str, device: torch.device, dtype: torch.dtype, both: bool, detail: str, has: tuple[str, ...]
) -> _Order:
    found = regime(device, dtype, both, detail)
    key = _label(op, found, False), device
    if key not in _orders:
        tf32 = backends.tf32() if device.type == "cuda" and dtype == torch.float32 else None
        _orders[key] = _Order(_order(op, has, device, found), tf32)
    return _orders[key]


def _order_in_compile(
    op: str, has: tuple[str, ...], kind: str, index: int | None, dtype: torch.dtype, both: bool, detail: str
) -> tuple[str, ...]:  # plain values, which Dynamo can hand over
    """The label of the choice, then the backends that it tries."""
    device = _device(kind, index)
    found = regime(device, dtype, both, detail)
    label = _label(op, found, True)
    order = _orders[label, device] = _Order(_order(op, has, device, found, compiling=True))
    return label, *order.names


def _served_in_compile(label: str, kind: str, index: int | None, name: str) -> str:
    """Notes what a call that is traced takes, and returns it."""
    _orders[label, _device(kind, index)].served = name
    return name


def _device(kind: str, index: int | None) -> torch.device:
    return torch.device(kind, index) if index is not None else torch.device(kind)


# What torch.compiler.assume_constant_result does; its own import of Dynamo would take seconds here.
for _function in (_order_in_compile, _served_in_compile):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010 - no attribute that mypy knows


def _order(
    op: str, has: tuple[str, ...], device: torch.device, regime: str, *, compiling: bool = False
) -> tuple[str, ...]:
    """The backends in turn, the fastest first; why the others are not among them is logged, and the user told once if
    none is.
    """
    allowed, refused = [], {}
    kept = _kept.get(_label(op, regime, compiling))
    for name in backends.PREFERENCE.get(device.type, ("reference",)):
        if name not in has:
            continue
        verdict = _verdict(op, name, device, regime, compiling)
        if verdict is None or (verdict[0] == "slower here" and name == kept):
            allowed.append(name)
        else:
            refused[name] = verdict
            _log_once(op, name, verdict[1])
    told = [(name, reason) for name, (status, reason) in refused.items() if status in ("not verified", "not here")]
    if told and len(told) == len(refused) and allowed == ["reference"]:  # no record has judged a kernel
        name, reason = min(told, key=lambda pair: refused[pair[0]][0] != "not verified")
        _warn_once(device.type, f"minisora_kernels runs plain PyTorch instead of {name} kernels: {reason}")
    if len(allowed) > 2:  # kernels beside the reference
        from .verify import record

        times = {name: record.share(name, op, device, regime, compiling) for name in allowed if name != "reference"}
        allowed = [*sorted(times, key=lambda name: times[name]), "reference"]
    if kept in allowed:
        allowed = [kept, *(name for name in allowed if name != kept)]
    return tuple(allowed)


def _verdict(op: str, name: str, device: torch.device, regime: str, compiling: bool) -> tuple[str, str] | None:
    """Why the automatic choice passes over backend ``name``, as a status and a reason; None if it does not."""
    if name == "reference":
        return None
    missing = backends.unavailable(name)
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


def current_choices() -> dict[str, str]:
    """By op and regime the backend that an automatic choice last took; since :func:`keep`, in whose block a run is."""
    return {label: order.served for (label, _), order in list(_orders.items()) if order.served}


def would_serve(label: str, device: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """For a key of :func:`current_choices` the backends that the automatic choice tries now, and why not the others.

    None, if there is no such op any more.
    """
    compiling = label.endswith(" compiled")
    op, _, regime = label.removesuffix(" compiled").partition(" ")
    if importlib.util.find_spec(f"{__package__}.ops.{op}") is None:
        return (), {}
    table: backends.Table = importlib.import_module(f"{__package__}.ops.{op}").BACKENDS
    names = _order(op, tuple(table), device, regime, compiling=compiling)
    verdicts = {name: _verdict(op, name, device, regime, compiling) for name in table if name not in names}
    return names, {name: verdict[1] for name, verdict in verdicts.items() if verdict is not None}


@contextmanager
def keep(stored: Mapping[str, str]) -> Iterator[None]:
    """Within the block the automatic choice takes what served before, as :func:`current_choices` gave it, where it can.

    It cannot where a kernel is not there, wrong here, not verified, or refuses the call. For the process.
    """
    global _kept
    previous, _kept = _kept, dict(stored)
    _forget_orders()
    try:
        yield
    finally:
        _kept = previous
        _forget_orders()


def has_record(device: torch.device) -> bool:
    """Whether there is a record of all ops on this device, with float32 products as torch makes them now."""
    from .verify import record

    found = record.find(device)
    return found is not None and found[0].covers(single(device))


def forget() -> None:
    """Read the record anew at the next call of an op. What is compiled stays as it is."""
    from .verify import record

    _forget_orders()
    record.find.cache_clear()


def _forget_orders() -> None:
    _orders.clear()
    _of_calls.clear()
    shortcut.forget()


def _log_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _logged:
        _logged.add((op, name, reason))
        _log.info("%s: not the %s backend: %s", op, name, reason)
