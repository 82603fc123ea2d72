"""``python -m models.train``: train a diffusion transformer on clips.

    python -m models.train --preset digits
    python -m models.train --config run.yaml --optimizer.learning-rate 3e-4
    python -m models.train --resume runs/digits
    python -m models.train --init runs/dit-xl --data.source latents --run runs/mine
    python -m models.train --init runs/dit-xl --data.source latents --lora.rank 16 --run runs/mine

A run's folder gets ``config.json``, checkpoints ``step_*.pt``, ``losses.csv``, ``metrics.jsonl``, ``previews/*.png``
and TensorBoard's ``events.*``. A folder that exists is refused, unless a run ended in it before its first checkpoint.
``--resume RUN`` continues from its newest whole checkpoint, ``--resume FILE`` from that one. The losses are bit for bit
those of a run that was not stopped (on the same machine, with the same number of threads). If the data, the autoencoder
or the text encoder have moved, give the new place with ``--data.source``, ``--encoder`` or ``--text.encoder``.

SIGTERM, SIGHUP (a terminal that closes) and Ctrl-C end the step in hand, save, and leave with status 128 + signal; a
second one leaves at once. An error saves as well, where the state of the last whole step is there.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from pathlib import Path

import tyro

from minisora_kernels.commands import command

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .parallel.ranks import is_first, launcher
from .registry import OBJECTIVES
from .runtime.allocator import reuse_large_allocations
from .runtime.arguments import read
from .training.config import RESUMABLE, TrainConfig, from_dict
from .training.options import choose, load, start_parser
from .training.presets import preset
from .training.run import Stopped, is_unsaved, train

_log = logging.getLogger(__name__)


def parse(arguments: list[str]) -> tuple[TrainConfig, Checkpoint | None]:
    """The configuration of a command line, and the checkpoint to resume.

    Raises:
        ValueError: a preset, file or checkpoint that does not fit, or options that change a resumed run.
    """
    start, rest = start_parser(f"python -m {__package__}.train").parse_known_args(arguments)
    resume = None
    default = TrainConfig()
    if start.resume is not None:
        given = Path(start.resume)
        if given.is_dir() and is_unsaved(given):
            raise ValueError(f"{given} holds no whole checkpoint: start it again with the command that began it")
        alone = checkpoints.is_checkpoint(given)
        path, resume = (given, checkpoints.load(given)) if alone else checkpoints.latest(given)
        if not resume.optimizer:
            raise ValueError(f"{path} has weights only, of no training; start one from them with --init {given}")
        if is_first():
            print(f"resuming from {path}")
        # The folder may have been moved since.
        default = dataclasses.replace(from_dict(resume.train), run=str(given.parent if alone else given))
    elif start.init is not None:
        # The trainer reads the weights, and compares the checksum.
        trained = from_dict(checkpoints.open_checkpoint(Path(start.init), compare=False)[1].train)
        own = {name: getattr(default, name) for name in ("run", "lora", "parallel")}
        default = dataclasses.replace(trained, init=start.init, **own)
    elif start.config is not None:
        default = load(start.config)
    elif start.preset is not None:
        default = preset(start.preset)
    if resume is not None and (start.model or start.objective):
        raise ValueError("model and objective cannot change in a resumed run; start a new one")
    default = choose(default, start.model, start.objective)
    description = (
        f"{__doc__}\nStart from --preset NAME, --config FILE, --init RUN or --resume RUN, then choose a system with "
        f"--model NAME ('list' shows them) and an objective with --objective {{{','.join(OBJECTIVES)}}}; the options "
        "below change it."
    )
    config = read(
        tyro.conf.AvoidSubcommands[TrainConfig],
        f"python -m {__package__}.train",
        description,
        rest,
        default=default,
    )
    if resume is not None:
        moved = default
        if resume.text_encoder is not None and config.text.encoder is not None:
            moved = dataclasses.replace(moved, text=dataclasses.replace(moved.text, encoder=config.text.encoder))
        source = moved.data.source if resume.data_digest is None else config.data.source
        data = dataclasses.replace(moved.data, source=source, workers=config.data.workers)
        moved = dataclasses.replace(moved, data=data)
        names = [item.name for item in dataclasses.fields(config)]
        changed = [name for name in names if getattr(config, name) != getattr(moved, name)]
        refused = [name for name in changed if name not in RESUMABLE]
        if refused:
            raise ValueError(f"{', '.join(refused)} cannot change in a resumed run; start a new one")
        if "steps" in changed and config.optimizer.schedule != "constant":
            raise ValueError("steps cannot change in a resumed run whose learning rate falls to 0 at the last step")
    return config, resume


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_first() else logging.ERROR)
    reuse_large_allocations()
    try:
        config, resume = parse(arguments)
        path = train(config, resume)
    except Stopped as stopped:
        if is_first():
            run = shlex.quote(str(stopped.path.parent))
            print(f"{stopped}\ncontinue with: {launcher()} {__package__}.train --resume {run}", file=sys.stderr)
        sys.exit(stopped.status)
    if is_first():
        follows = "measure" if config.model.autoencoder else "sample"
        print(f"trained: {path}\n{follows} with: python -m {__package__}.{follows} {path.parent}")


if __name__ == "__main__":
    main()
