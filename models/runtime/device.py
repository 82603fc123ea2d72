"""Which device and which backend a command runs on."""

from __future__ import annotations

import contextlib
import os
import re

import torch

from minisora_kernels import backends, use_backend


def choose_device(name: str) -> torch.device:
    """The device for ``--device``: of 'cuda' under torchrun the one with the number of the process on its machine.

    A CUDA device is the current one of the process from now on, with TF32 products.

    Raises:
        ValueError: a device that is none of these, or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"device is {name!r}; it may be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if name != "cpu":
        number = int(match[1] or 0)
        if number >= torch.cuda.device_count():
            raise ValueError(f"device is {name!r}; torch finds {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(number)
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def check_backend(name: str, device: torch.device) -> None:
    """Raises ValueError where the ``--backend``, or else the environment, names one that is not here for the device."""
    source = "backend"
    if name == "auto" and backends.FORCED is not None:
        source, name = "the environment variable MINISORA_BACKEND", backends.FORCED
    if name == "auto":
        return
    reason = backends.unavailable(name)
    if reason is None and backends.DEVICES.get(name, device.type) != device.type:
        reason = f"it does not run on device {device.type!r}"
    if reason is not None:
        raise ValueError(f"{source} is {name!r}, which cannot serve here: {reason}; 'auto' takes what can")


def choose_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """The context for ``--backend``; "auto" leaves the choice, and the environment variable, as they are."""
    return contextlib.nullcontext() if name == "auto" else use_backend(name)
