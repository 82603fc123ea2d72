"""Which backend serves an op at a site, or why none does."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .. import automatic, backends
from ..forcing import forced

MODES = ("auto", "on")
OPS = (
    *("adaln", "attention", "gate_residual", "gate_residual_adaln"),
    *("gelu_mlp", "glu_mlp", "patch_embed", "window_attention"),
)


class Unserved(ValueError):
    """A site that no kernel serves, with ``mode="on"``."""


@dataclass(frozen=True)
class Choice:
    """What a user chose, checked.

    Attributes:
        ops: The ops that may stand in the model.
        backend: A backend by name, or None for the automatic choice.
        mode: "auto": what the record of the device allows; "on": any kernel that takes the call, or an error.
        compiling: Whether the graph goes on to a compiler, for which records have regimes of their own.
    """

    ops: frozenset[str]
    backend: str | None
    mode: str
    compiling: bool

    @classmethod
    def of(cls, name: str, ops: object, backend: str | None, mode: str, *, compiling: bool = False) -> Choice:
        """Raises ValueError or TypeError for what there is not, RuntimeError for a backend that is not here."""
        if isinstance(ops, str):
            raise TypeError(f"{name}: ops is {ops!r}; it must be a collection of names, or None for all")
        try:
            chosen = frozenset(OPS if ops is None else ops)  # type: ignore[call-overload]
        except TypeError:
            raise TypeError(f"{name}: ops is {ops!r}; it must be a collection of names, or None for all") from None
        unknown = sorted(map(str, chosen - set(OPS)))
        if unknown:
            raise ValueError(f"{name}: ops has {', '.join(unknown)}; it may have {', '.join(OPS)}")
        if mode not in MODES:
            raise ValueError(f"{name}: mode is {mode!r}; it may be {' or '.join(map(repr, MODES))}")
        if backend is not None:
            if backend not in backends.BACKENDS:
                raise ValueError(f"{name}: backend is {backend!r}; it may be one of {', '.join(backends.BACKENDS)}")
            missing = backends.unavailable(backend)
            if missing is not None:
                raise RuntimeError(f"{name}: backend {backend!r} is not available: {missing}")
        return cls(chosen, backend, mode, compiling)

    def serve(
        self, op: str, call: Mapping[str, Tensor | None], both: bool, detail: str, table: backends.Table | None = None
    ) -> tuple[str | None, str]:
        """The backend for a call with these (fake) tensors, or None and the reason.

        Args:
            op: Name of the op.
            call: The tensors that its predicates take, in their order; the first has the dtype of the regime.
            both: Whether a gradient follows.
            detail: What else tells regimes of the op apart.
            table: Which backends can serve such a call; None for the op's ``BACKENDS``.

        Raises Unserved where the mode asks for a kernel.
        """
        table = table or importlib.import_module(f"..ops.{op}", __package__).BACKENDS
        tensors = list(call.values())
        first = tensors[0]
        assert first is not None
        device = first.device
        name = self.backend or forced(backends.FORCED)
        if name is not None:
            reason = backends.refusal(table, name, *tensors)
            if reason is None and backends.DEVICES.get(name, device.type) != device.type:
                reason = f"it does not run on {device.type} tensors"
            reasons = {} if reason is None else {name: reason}
            return self._answer(op, None if reason else name, reasons)
        if self.mode == "on":
            names, reasons = backends.PREFERENCE.get(device.type, ()), {}
        else:
            regime = automatic.regime(device, first.dtype, both, detail)
            label = f"{op} {regime}{' compiled' if self.compiling else ''}"
            names, reasons = automatic.would_serve(label, device)
            here = backends.PREFERENCE.get(device.type, ())
            reasons = {each: why for each, why in reasons.items() if each in here}
        for candidate in names:
            if candidate == "reference":
                break
            reason = backends.refusal(table, candidate, *tensors)
            if reason is None:
                return candidate, ""
            reasons = {candidate: reason, **reasons}
        return self._answer(op, None, reasons)

    def _answer(self, op: str, name: str | None, reasons: Mapping[str, str]) -> tuple[str | None, str]:
        if name is not None and not (name == "reference" and self.mode == "on"):
            return name, ""
        reason = "; ".join(f"{backend}: {why}" for backend, why in reasons.items()) or "there is no kernel here"
        if self.mode == "on":
            raise Unserved(f"fuse: no kernel serves {op}: {reason}")
        return None, reason
