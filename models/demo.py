"""``python -m models.demo``: train a small video DiT on clips of real films, and sample new renderings of them.

A few minutes on a CPU are enough to learn these clips by heart, and no more. Each sample starts from noise and shows a
scene that the model has seen. The demo shows that the whole path works; so small a model invents nothing.

It leaves ``index.html`` in the folder of the run, with the clips, the losses and the commands to go on.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from minisora_kernels.commands import command

from . import sample
from .data.page import write_page
from .runtime.allocator import reuse_large_allocations
from .runtime.arguments import read
from .runtime.plain import merge
from .training.presets import PRESETS
from .training.run import Stopped, train_or_continue

LEARNED = "The model has learned clips of a few films by heart. These are new renderings of them, from noise."


@dataclass(frozen=True)
class DemoConfig:
    """The folder of the demo."""

    run: str = "runs/demo"
    """Folder of the run. An interrupted run continues; a complete one is only sampled from."""


def go_on(run: Path) -> list[tuple[str, str]]:
    """What the reader of the page may do next: a sentence, and the command."""
    python = Path(sys.executable)
    here = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    folder = shlex.quote(str(run))
    return [
        ("Sample more clips from this run:", f"{here} -m models.sample {folder} --count 12 --seed 1 --overwrite"),
        (
            "Train it for longer, from its last step on:",
            f"{here} -m models.train --resume {folder} --steps 3000",
        ),
        (
            "Train on your own videos:",
            f"{here} -m models.train --data.source FOLDER --data.size 64 64 --model.patch 2 8 8 --run runs/mine",
        ),
        ("Train on moving digits, and count the frames that a classifier recognises:", "make digits"),
        ("See what the kernels are worth on this machine:", "make bench-quick"),
    ]


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s")
    reuse_large_allocations()
    config = read(DemoConfig, f"python -m {__package__}.demo", __doc__, arguments)
    try:
        path = train_or_continue(merge(PRESETS["demo"], {"run": config.run}))
        files = {file.suffix: file for file in sample.run(sample.SampleConfig(path, count=6, steps=30, overwrite=True))}
        page = write_page(path.parent, files[".gif"], files[".png"], LEARNED, go_on(path.parent))
    except Stopped as stopped:
        print(f"{stopped}\nrun the same command again to go on", file=sys.stderr)
        sys.exit(stopped.status)
    print(f"{LEARNED}\nOpen {page.resolve()} in a browser: the clips, the losses, and the commands to go on.")


if __name__ == "__main__":
    main()
