"""Where a configuration starts from: a preset, a file, a run, a named system."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from ..registry import OBJECTIVES, SYSTEMS
from ..runtime.plain import merge
from .config import TrainConfig
from .presets import PRESETS, preset


def load(path: str | Path) -> TrainConfig:
    """A YAML or JSON file; what it does not name has its default. It may name a ``preset`` to start from.

    Raises:
        ValueError: a file that is neither, or a key or value that the configuration does not have.
    """
    import yaml

    content = Path(path).read_bytes()
    try:
        text = content.decode()
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # a date that is none is a ValueError
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds {type(values).__name__}; it must hold a mapping")
    try:
        return merge(preset(values.pop("preset")) if "preset" in values else TrainConfig(), values)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def choose(config: TrainConfig, system: str | None, objective: str | None) -> TrainConfig:
    """``config`` with the model and the objective of a named system, then with the objective of that name.

    Another objective turns off the options that only the published one trains.

    Raises:
        ValueError: no such system.
        SystemExit: system ``"list"``, after the names were printed.
    """
    if system == "list":
        for name, (settings, published) in SYSTEMS.items():
            print(f"{name:20} {settings.name}, objective {published.name}")
        raise SystemExit
    if system is not None:
        if system not in SYSTEMS:
            raise ValueError(f"model is {system!r}; it may be 'list' or one of {', '.join(SYSTEMS)}")
        settings, published = SYSTEMS[system]
        if objective not in (None, published.name):
            off = {name: type(getattr(settings, name))() for name in settings.only_ddpm()}
            settings = dataclasses.replace(settings, **off)
            published = OBJECTIVES[objective]()
        return dataclasses.replace(config, model=settings, objective=published)
    return config if objective is None else dataclasses.replace(config, objective=OBJECTIVES[objective]())


def start_parser(program: str) -> argparse.ArgumentParser:
    """The options that decide what the others start from."""
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=sorted(PRESETS))
    start.add_argument("--config", metavar="FILE")
    start.add_argument("--resume", metavar="RUN")
    start.add_argument("--init", metavar="RUN")
    parser.add_argument("--model", metavar="NAME")
    parser.add_argument("--objective", choices=sorted(OBJECTIVES))
    return parser
