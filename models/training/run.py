"""A run from its first step, or from a checkpoint, to its last."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import checkpoint as checkpoints
from ..checkpoint import Checkpoint
from ..runtime.device import check_backend, choose_device
from ..runtime.plain import as_plain
from ..runtime.verification import serving
from .config import TrainConfig, from_dict
from .log import Log
from .trainer import Trainer

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """Training was stopped by a signal, after its state was saved."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {path}")
        self.number, self.path, self.status = number, path, 128 + number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, Path]]:
        return Stopped, (self.number, self.path)  # from another process


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which the first SIGTERM or SIGINT is appended; the second has its usual effect."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, _: Any) -> None:
        received.append(number)
        restore()

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, receive)
    except ValueError:
        _log.info("not the main thread: signals do not stop this run")
    try:
        yield received
    finally:
        restore()


def train(config: TrainConfig, resume: Checkpoint | None = None) -> Path:
    """Train to ``config.steps``; returns the last checkpoint.

    Raises:
        ValueError: a configuration that does not fit together, a run folder that is there already, or a loss that is
            not finite.
        OSError: a checkpoint that could not be written.
        Stopped: SIGTERM or Ctrl-C.
    """
    folder = Path(config.run)
    if resume is None and folder.exists():
        raise ValueError(f"{folder} exists already; continue it with --resume {folder}, or choose another --run")
    stored = {} if resume is None else resume.served
    device = choose_device(config.device)
    check_backend(config.backend, device)
    with serving(device, config.backend, config.verify, stored):
        trainer = Trainer(config, resume)
        try:
            return _train(trainer, folder, fresh=resume is None)
        finally:
            trainer.batches.close()


def _train(trainer: Trainer, folder: Path, *, fresh: bool) -> Path:
    config = trainer.config
    if not fresh and trainer.step >= config.steps:
        raise ValueError(f"{folder} is complete, at step {trainer.step} of {config.steps}")
    # The first batch proves that there is data before anything is written.
    trainer.batches.batch(trainer.step)
    folder.mkdir(parents=True, exist_ok=not fresh)
    (folder / "config.json").write_text(json.dumps(as_plain(config), indent=2) + "\n")

    def save() -> Path:
        return checkpoints.save(folder, trainer.checkpoint(), config.keep)

    path = save() if fresh else checkpoints.path_of(folder, trainer.step)
    log = Log(folder, trainer.step, config.steps, config.log_every)
    try:
        with stop_signals() as stop:
            trainer.model.train()
            while trainer.step < config.steps:
                step = trainer.train_step()
                log.add(trainer.step - 1, step, trainer.tokens, trainer.batches.waited)
                last = trainer.step == config.steps
                if last or stop or trainer.step % config.save_every == 0:
                    log.flush()
                    path = save()
                if stop and not last:
                    raise Stopped(stop[0], path)
                if last or (config.preview.every and trainer.step % config.preview.every == 0):
                    log.preview(trainer.step, trainer.preview())
    finally:
        log.close()
    return path


def train_or_continue(config: TrainConfig) -> Path:
    """The last checkpoint of the run, trained as far as that is still to be done; what is in its folder is kept."""
    folder = Path(config.run)
    if not folder.exists():
        return train(config)
    path, checkpoint = checkpoints.latest(folder)
    started = dataclasses.replace(from_dict(checkpoint.train), run=config.run)
    if checkpoint.step == started.steps:
        print(f"{folder} is trained already: {path}")
        return path
    return train(started, checkpoint)
