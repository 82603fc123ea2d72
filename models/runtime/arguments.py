"""The arguments of a command as its configuration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import tyro

from minisora_kernels.commands import HELP

Config = TypeVar("Config")

# What files of films, sizes and counts of steps can hold; a seed has 64 bits.
MOST, MOST_OF_SEED = 2**31 - 1, 2**63 - 1


def read(kind: type[Config], program: str, description: str | None, arguments: list[str], **options: Any) -> Config:
    """The configuration of a command line.

    Raises:
        ValueError: a number that is not finite, or too large.
    """
    config = tyro.cli(kind, prog=program, description=f"{description}\n{HELP}", args=arguments, **options)
    check_numbers(config)
    return config


def check_numbers(config: Any, path: str = "") -> None:
    """Raises ValueError for a number that is not finite, or too large, by its dotted name."""
    if dataclasses.is_dataclass(config):
        for item in dataclasses.fields(config):
            check_numbers(getattr(config, item.name), f"{path}.{item.name}" if path else item.name)
    elif isinstance(config, (list, tuple)):
        for item in config:
            check_numbers(item, path)
    elif isinstance(config, float) and not math.isfinite(config):
        raise ValueError(f"{path} is {config}; it must be finite")
    elif isinstance(config, int):
        most = MOST_OF_SEED if path == "seed" else MOST
        if abs(config) > most:
            raise ValueError(f"{path} is {config}; it may be -{most}..{most}")
