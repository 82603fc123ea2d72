"""Kernels and runs: they are verified before a run on a GPU, and a run goes on with the backends that it began with."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping

import torch

from minisora_kernels import automatic, backends, use_backend

_log = logging.getLogger(__name__)


def verify_first(device: torch.device, mode: str) -> None:
    """On a GPU without a record run ``python -m minisora_kernels verify --quick``; not if "never".

    If that fails plain PyTorch serves, as without it.
    """
    if mode == "never" or device.type != "cuda" or backends.VERIFIED == "0" or automatic.has_record(device):
        return
    _log.warning(
        "The kernels are verified on %s first. This takes a minute or two. Use `--verify never` to skip it.", device
    )
    command = [sys.executable, "-m", "minisora_kernels", "verify", "--quick", "--missing-only"]
    command += ["--device", str(device), "--precision", "high" if backends.tf32() else "highest"]
    done = subprocess.run(command)
    if done.returncode:
        _log.warning("verify ended with status %d; what is not verified is served by plain PyTorch", done.returncode)
    automatic.forget()


@contextlib.contextmanager
def serving(device: torch.device, backend: str, verify: str, stored: Mapping[str, str] | None = None) -> Iterator[None]:
    """Within the block the ops run on ``backend``; "auto" leaves the choice, to the environment variable if it is set.

    Then kernels that are not verified are verified first, and what ``stored`` says of an earlier part of the run is
    kept. Where another backend would serve now, or has to, a line of the log says so.
    """
    if backend != "auto" or backends.FORCED is not None:
        with contextlib.nullcontext() if backend == "auto" else use_backend(backend):
            yield
        return
    verify_first(device, verify)
    stored = stored or {}
    now = {label: automatic.would_serve(label, device) for label in stored}
    with automatic.keep(stored):
        for label, before in stored.items():
            names, reasons = now[label]
            if not names or names[0] == before:
                continue
            kept = automatic.would_serve(label, device)[0][0]
            said = f": {reasons[before]}" if before in reasons else ""
            what = f"{before} is kept" if kept == before else f"{kept} serves the rest"
            _log.warning("%s: %s served this run, now %s would%s; %s", label, before, names[0], said, what)
        yield
