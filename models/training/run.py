"""A run from its first step, or from a checkpoint, to its last."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint as checkpoints
from ..checkpoint import Checkpoint
from ..parallel.ranks import Ranks, open_ranks, serving_on
from ..parallel.watch import watching
from ..runtime.device import check_backend, choose_device
from ..runtime.files import locked, write_whole
from ..runtime.plain import as_plain
from ..sampling.solvers import NotFinite
from .config import TrainConfig, from_dict
from .log import Log, Step
from .saving import Saving
from .trainer import Trainer

_log = logging.getLogger(__name__)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """Training was stopped by a signal, after its state was saved."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {path}")
        self.number, self.path, self.status = number, path, 128 + number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, Path]]:
        return Stopped, (self.number, self.path)  # from another process


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which the first SIGTERM, SIGINT or SIGHUP is appended; the second has its usual effect.

    SIGHUP, by which a terminal says that it closes, stays ignored where nohup ignores it.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, _: Any) -> None:
        received.append(number)
        restore()

    try:
        for number in SIGNALS:
            if number not in (signal.SIGTERM, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, receive)
    except ValueError:
        _log.info("not the main thread: signals do not stop this run")
    try:
        yield received
    finally:
        restore()


def is_unsaved(folder: Path) -> bool:
    """Whether a folder has no more than what a run leaves that ended before its first checkpoint, or nothing."""
    for file in folder.iterdir():
        if file.name == "config.json":
            # Older versions may have left a part of it.
            content, start = file.read_bytes(), b'{\n  "run": '
            if not content.startswith(start) and not start.startswith(content):
                return False
        elif not re.fullmatch(r"config\.json\.tmp|step_\d+(\.pt)?\.tmp", file.name):
            return False
    return True


def train(config: TrainConfig, resume: Checkpoint | None = None) -> Path:
    """Train to ``config.steps``; returns the last checkpoint.

    Raises:
        ValueError: a configuration that does not fit together, a run folder that is there already, or a loss that is
            not finite.
        OSError: a checkpoint that could not be written, or a run folder that another process writes to.
        Stopped: SIGTERM, SIGHUP or Ctrl-C.
    """
    device = choose_device(config.device)
    check_backend(config.backend, device)
    # A little later than the watch, which says then what the ranks wait for.
    with open_ranks(config.parallel, device, 1.5 * config.patience) as ranks:
        return _train_on(ranks, device, config, resume)


def _train_on(ranks: Ranks, device: torch.device, config: TrainConfig, resume: Checkpoint | None) -> Path:
    """As :func:`train`; nothing that the ranks share outlives this call."""
    folder = Path(config.run)
    stored = {} if resume is None else resume.served
    ranks.agree({"the configuration": config, "the step": None if resume is None else resume.step})
    with contextlib.ExitStack() as stack:
        if ranks.first:
            _take(folder, stack, fresh=resume is None)
        stack.enter_context(serving_on(ranks, device, config.backend, config.verify, stored))
        trainer = Trainer(config, resume, ranks)
        try:
            # The first batch proves that there is data before anything is written.
            trainer.batches.batch(trainer.step)
            trainer.batches.waited = 0.0
            if ranks.first and not folder.exists():
                folder.mkdir(parents=True)
                stack.enter_context(locked(folder))
            return _train(trainer, folder, fresh=resume is None)
        finally:
            trainer.batches.close()


def _take(folder: Path, stack: contextlib.ExitStack, *, fresh: bool) -> None:
    """Lock the folder, where it is there, until the stack ends; a fresh run may not have one with a run in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"run is {str(folder)!r}, which is a file; it must be a folder")
    stack.enter_context(locked(folder))
    if fresh and not is_unsaved(folder):
        go_on = f"continue it with --resume {folder}, or " if any(folder.glob("step_*.pt")) else ""
        raise ValueError(f"{folder} exists already; {go_on}choose another --run")


class _Files:
    """What a run that trains leaves in its folder; the first rank writes it."""

    def __init__(self, trainer: Trainer, folder: Path, *, fresh: bool) -> None:
        config = trainer.config
        self.trainer, self.folder = trainer, folder
        self.path = checkpoints.path_of(folder, trainer.step)
        self.log: Log | None = None
        self.saving = Saving(folder, trainer.ranks, config.keep, config.patience)
        if trainer.ranks.first:
            write_whole(folder / "config.json", (json.dumps(as_plain(config), indent=2) + "\n").encode())
        if fresh:
            self.save()
        elif trainer.ranks.first:
            set_aside(folder, trainer.step)
        if trainer.ranks.first:
            self.log = Log(folder, trainer.step, config.steps, config.log_every, trainer.ranks.size, trainer.peak)

    def add(self, step: Step) -> None:
        """Note the step that was just made."""
        if self.log is not None:
            trainer = self.trainer
            self.log.add(trainer.step - 1, step, trainer.tokens, trainer.batches.waited, trainer.flops)

    def save(self) -> None:
        """Write the lines of the steps so far, then the checkpoint."""
        self.trainer.ranks.at(self.trainer.step, "saves a checkpoint")
        self.path = checkpoints.path_of(self.folder, self.trainer.step)
        self.saving.finish()
        checkpoint = self.trainer.checkpoint()
        if self.log is not None:
            self.log.flush()
        self.saving.save(checkpoint)

    def rescue(self) -> None:
        """Save the steps since the last checkpoint, for an error ends the run; the error itself is the caller's."""
        # A checkpoint of this step is there, or could not be written.
        saved = self.path == checkpoints.path_of(self.folder, self.trainer.step)
        # What is divided among ranks cannot be gathered when one of them is gone.
        if self.log is None or saved or not self.trainer.sound or self.trainer.ranks.sharded:
            return
        try:
            self.save()
            _log.warning("saved %s; once the cause is gone, go on with --resume %s", self.path, self.folder)
        except Exception as error:
            _log.warning("the steps since the last checkpoint are lost: %s", error)

    def preview(self) -> None:
        """Write samples of the averaged model, drawn by the ranks that have a part of it, or of the clips."""
        if not self.trainer.ranks.previews:
            return
        self.trainer.ranks.at(self.trainer.step, "samples a preview")
        try:
            sheet = self.trainer.preview()
        except NotFinite as error:  # of an average that has learned little yet, or of too much guidance
            _log.warning("no preview after step %d: %s", self.trainer.step, error)
        else:
            if self.log is not None:
                self.log.preview(self.trainer.step, sheet)

    def close(self) -> None:
        self.saving.close()
        if self.log is not None:
            self.log.close()


def _train(trainer: Trainer, folder: Path, *, fresh: bool) -> Path:
    config = trainer.config
    if not fresh and trainer.step >= config.steps:
        raise ValueError(f"{folder} is complete, at step {trainer.step} of {config.steps}")
    files = _Files(trainer, folder, fresh=fresh)
    # torchrun ends the ranks by a signal when one dies, which must not end the saving of the others' last step.
    with stop_signals() as received:
        try:
            with watching(trainer.ranks, config.patience):
                _train_steps(trainer, files, received)
        except Exception:
            files.rescue()
            raise
        finally:
            files.close()
    return files.path


def _train_steps(trainer: Trainer, files: _Files, received: list[int]) -> None:
    """Train until the last step, or until a rank has received a signal."""
    config = trainer.config
    trainer.model.train()
    while trainer.step < config.steps:
        files.add(trainer.train_step())
        last = trainer.step == config.steps
        stop = trainer.ranks.any(bool(received))
        if last or stop or trainer.step % config.save_every == 0:
            files.save()
        if last or stop:
            files.saving.finish()
        if stop and not last:
            raise Stopped(received[0] if received else signal.SIGTERM, files.path)
        if last or (config.preview.every and trainer.step % config.preview.every == 0):
            files.preview()


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, for the run goes on from an earlier one, or they are not whole."""
    for file in folder.glob("step_*.pt"):
        if file.name > checkpoints.path_of(folder, step).name:
            _log.warning("%s is of a later step; it is set aside as %s.aside", file, file.name)
            aside = file.with_name(f"{file.name}.aside")
            if aside.is_dir():
                shutil.rmtree(aside)
            file.rename(aside)


def train_or_continue(config: TrainConfig) -> Path:
    """The last checkpoint of the run, trained as far as that is still to be done; what is in its folder is kept."""
    folder = Path(config.run)
    if not folder.exists() or is_unsaved(folder):
        return train(config)
    path, checkpoint = checkpoints.latest(folder)
    started = dataclasses.replace(from_dict(checkpoint.train), run=config.run)
    if checkpoint.step == started.steps:
        print(f"{folder} is trained already: {path}")
        return path
    return train(started, checkpoint)
