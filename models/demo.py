"""``python -m models.demo``: train a small video DiT on three real clips and sample each of them anew.

A few minutes of a CPU are enough to learn these clips by heart and no more: what comes out is a new rendering, from
noise, of scenes that the model has seen. It shows that the whole path works, not that so small a model invents.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import tyro

from . import sample
from .runtime.allocator import reuse_large_allocations
from .runtime.plain import merge
from .training.presets import PRESETS
from .training.run import Stopped, train_or_continue


@dataclass(frozen=True)
class DemoConfig:
    """Where."""

    run: str = "runs/demo"
    """Folder of the run; one that is there is continued, or only sampled from if its training is complete."""


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    reuse_large_allocations()
    config = tyro.cli(DemoConfig, prog=f"python -m {__package__}.demo", description=__doc__, args=arguments)
    try:
        path = train_or_continue(merge(PRESETS["demo"], {"run": config.run}))
        sample.run(sample.SampleConfig(path, count=6, steps=30, overwrite=True))
    except Stopped as stopped:
        print(f"{stopped}\nrun the same command again to go on", file=sys.stderr)
        sys.exit(stopped.status)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("The model has learned a few clips of three films by heart; these are new renderings of them from noise.")


if __name__ == "__main__":
    main()
