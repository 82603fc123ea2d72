"""Checkpoints that survive a crash, hold all that a run needs to go on, and cannot execute code when loaded.

A file is written under a temporary name in its folder, flushed to the disk, and renamed: under its final name it is
always whole. It is a ``torch.save`` archive of tensors, numbers, strings, lists and dictionaries, which is all that
``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .registry import build, config_from
from .runtime.files import sync_folder

FORMAT = 2


MAGIC = "minisora checkpoint"
_log = logging.getLogger(__name__)


class NotACheckpoint(ValueError):
    """A file that is not a whole checkpoint of this project."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` optimizer steps, which is also its place in the data.

    ``train`` and ``config`` are the run's and the model's configuration as JSON-able dictionaries, ``classes`` the
    class names, ``ema`` the averaged weights, ``rng`` the states of the random generators by name, ``memory`` what the
    objective's loss remembers. ``encoder`` says what made the latents that the model was trained on (see
    ``data/encoder.py``); None for pixels. ``text_encoder`` says what encoded the captions (``data/text.py``); None
    without text. ``data_digest`` is of the source (see ``data/source.py``); None for one that is not made of files.
    ``served`` says by op and regime which backend the automatic choice took.
    """

    train: dict[str, Any]
    config: dict[str, Any]
    classes: list[str]
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    encoder: Mapping[str, Any] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    text_encoder: dict[str, Any] | None = None
    data_digest: str | None = None
    served: dict[str, str] = field(default_factory=dict)

    def build(self, *, ema: bool = True) -> Any:
        """The model, a subclass of :class:`models.protocols.Model`, with the averaged (or else the last) weights.

        Raises:
            ValueError: weights that do not belong to the stored configuration.
        """
        try:
            model = build(config_from(self.config))
            model.load_state_dict(self.ema if ema else self.model)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the weights do not match the stored model configuration: {error}") from error
        return model


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint into the folder and remove all but the newest ``keep``.

    Raises:
        OSError: it could not be written; nothing of it is left, and older checkpoints are untouched.
    """
    path = path_of(folder, checkpoint.step)
    temporary = path.with_suffix(".tmp")
    content = {"magic": MAGIC, "format": FORMAT}
    content.update((item.name, getattr(checkpoint, item.name)) for item in fields(checkpoint))
    try:
        with open(temporary, "wb") as file:
            _write(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, Exception):
            raise OSError(f"checkpoint {path} was not written: {error}") from error
        raise
    for leftover in folder.glob("step_*.tmp"):
        leftover.unlink(missing_ok=True)
    # A file of a later step is a broken one that this run has resumed before; it must not count as the newest.
    for old in sorted(file for file in folder.glob("step_*.pt") if file.name <= path.name)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch reports a failed write as an inconsistent position; the cause is the exception that it met meanwhile.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, into the CPU's memory, without executing anything in it.

    Raises:
        NotACheckpoint: not a file, not whole, or not a checkpoint.
        ValueError: a checkpoint of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise NotACheckpoint(f"{path} is not a file")
    if not zipfile.is_zipfile(path):
        raise NotACheckpoint(f"{path} is not a whole checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise loading the file unsafely.
        raise NotACheckpoint(f"{path} is refused: it holds more than tensors and plain values") from error
    except (OSError, MemoryError):
        raise  # the file may well be whole: going back to an older one would lose work
    except Exception as error:
        raise NotACheckpoint(f"{path} is not a whole checkpoint: {error or type(error).__name__}") from error
    if not isinstance(content, dict) or content.get("magic") != MAGIC:
        raise NotACheckpoint(f"{path} is not a checkpoint of this trainer")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format version {content.get('format')}; this code reads version {FORMAT}")
    # What has a default was added after the first checkpoints of this version.
    required = [item.name for item in fields(Checkpoint) if item.default is item.default_factory is MISSING]
    missing = sorted(set(required) - content.keys())
    if missing:
        raise NotACheckpoint(f"{path} lacks {', '.join(missing)}")
    names = {item.name for item in fields(Checkpoint)}
    return Checkpoint(**{name: value for name, value in content.items() if name in names})


def latest(folder: str | Path) -> tuple[Path, Checkpoint]:
    """The newest whole checkpoint of a run's folder; what is not whole is skipped with a warning that names it.

    Raises:
        NotACheckpoint: the folder holds none.
        ValueError: the newest whole one has another format version.
    """
    folder = Path(folder)
    for leftover in sorted(folder.glob("step_*.tmp")):
        _log.warning("%s is skipped: its writing was not finished", leftover)
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            return path, load(path)
        except NotACheckpoint as reason:
            _log.warning("skipped: %s", reason)
    raise NotACheckpoint(f"{folder} holds no whole checkpoint (step_*.pt)")


def open_checkpoint(path: Path) -> tuple[Path, Checkpoint]:
    """A checkpoint file, or the newest one of a run's folder."""
    return latest(path) if path.is_dir() else (path, load(path))
