"""Checkpoints that survive a crash, hold all that a run needs to go on, and cannot execute code when loaded.

A file is written under a temporary name in its folder, flushed to the disk, and renamed: under its final name it is
always whole. It is a ``torch.save`` archive of tensors, numbers, strings, lists and dictionaries, which is all that
``torch.load(weights_only=True)`` accepts. The archive's comment is a checksum of every byte before it
(:func:`models.runtime.files.checksum`), which :func:`load` compares: torch reads an archive without a look at its sums.

Tensors are mapped from the file, so that what nobody reads, as the optimizer in sampling, takes no memory.

The checkpoint of a sharded run is a folder of that name, with a file for each part of weights, averages and optimizer
states. The files are written into a folder under a temporary name, which is renamed when all are there. A tensor is the
rows of all parts along an axis, one after the other. The first file has everything else. Each is an archive as above.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import IO, Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from minisora_kernels.commands import NO_MEMORY

from .denoisers.lora import LoRAConfig, adapt, merged
from .registry import build, config_from
from .runtime.files import checksum, sync_folder, whole_file
from .runtime.packages import package
from .runtime.plain import merge

FORMAT = 2


MAGIC = "minisora checkpoint"
# What every part of a sharded checkpoint has some rows of.
DIVIDED = ("model", "ema", "optimizer")
# The comment at the end of the archive, and the record of a zip archive before it, which ends with its length.
COMMENT = b"minisora sums %s\n"
COMMENT_SIZE = len(COMMENT % bytes(64))
END, END_SIZE = b"PK\5\6", 22
_log = logging.getLogger(__name__)


class Joined(Mapping[str, Tensor]):
    """Tensors by name that are divided among parts; one is whole, and takes memory, while somebody holds it.

    A part has the axis and its rows of a tensor that is divided. Only the first has what is not divided.
    """

    def __init__(self, parts: list[Mapping[str, Any]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        first = self._parts[0][name]
        if isinstance(first, Tensor):
            return first
        axis, _ = first
        return torch.cat([part[name][1] for part in self._parts], axis)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])


class NotACheckpoint(ValueError):
    """A file that is not a whole checkpoint of this project."""


class NotEnoughMemory(OSError):
    """A checkpoint that may well be whole, but that memory does not hold."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` optimizer steps, which is also its place in the data.

    ``train`` and ``config`` are the run's and the model's configuration as JSON-able dictionaries, ``classes`` the
    class names, ``empty_classes`` the ids of those that no clip had, ``ema`` the averaged weights, ``rng`` the states
    of the random generators by name, ``memory`` what the objective's loss remembers. ``encoder`` says what made the
    latents that the model was trained on (see ``data/encoder.py``); None for pixels. ``text_encoder`` says what encoded
    the captions (``data/text.py``); None without text. ``data_digest`` is of the source (see ``data/source.py``); None
    for one that is not made of files. ``served`` says by op and regime which backend the automatic choice took.
    """

    train: dict[str, Any]
    config: dict[str, Any]
    classes: list[str]
    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    encoder: Mapping[str, Any] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    text_encoder: dict[str, Any] | None = None
    data_digest: str | None = None
    served: dict[str, str] = field(default_factory=dict)
    empty_classes: list[int] = field(default_factory=list)

    @property
    def lora(self) -> LoRAConfig:
        """The adapters that were trained; those of rank 0 are none."""
        return merge(LoRAConfig(), self.train.get("lora", {}))

    def merged(self) -> Checkpoint:
        """The same without adapters, which are added to the weights."""
        lora = self.lora
        if not lora.rank:
            return self
        train = {**self.train, "lora": {}}
        return dataclasses.replace(self, train=train, model=merged(self.model, lora), ema=merged(self.ema, lora))

    def build(self, *, ema: bool = True) -> Any:
        """The model, a subclass of :class:`models.protocols.Model`, with the averaged (or else the last) weights.

        Its parameters are the tensors of this checkpoint, not copies. It has adapters if the checkpoint has.

        Raises:
            ValueError: weights that do not belong to the stored configuration.
            NotEnoughMemory: as it says.
        """
        weights = self.ema if ema else self.model
        if self.lora.rank:
            package("peft")
        try:
            with uninitialised():
                model = build(config_from(self.config))
                if self.lora.rank:
                    adapt(model, self.lora)
            kinds = {name: value.dtype for name, value in model.state_dict().items()}
            weights = {name: value.to(kinds.get(name, value.dtype)) for name, value in weights.items()}
            model.load_state_dict(weights, assign=True)
        except (RuntimeError, TypeError, ValueError) as error:
            if NO_MEMORY.search(str(error)):
                size = sum(value.nbytes for value in weights.values()) / 2**20
                raise NotEnoughMemory(f"not enough memory for the model, whose weights take {size:,.0f} MiB") from error
            raise ValueError(f"the weights do not match the stored model configuration: {error}") from error
        return model


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Modules that are built in this block have parameters that nothing was written to, so that they take no memory.

    Source: ``no_init_weights`` of transformers. On the meta device ``normal_`` alone imports 150 MiB of torch.
    """
    functions = {name: value for name, value in vars(nn.init).items() if re.fullmatch(r"[a-z]\w*_", name)}
    for name in functions:
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, value in functions.items():
            setattr(nn.init, name, value)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def part_of(path: Path, number: int, parts: int) -> Path:
    """The file of a part, 0-based, of a sharded checkpoint."""
    return path / f"part_{number:05d}_of_{parts:05d}.pt"


def is_checkpoint(path: Path) -> bool:
    """Whether this is the path of a checkpoint, a file or the folder of a sharded one, and not the folder of a run."""
    return path.is_file() or any(path.glob("part_*.pt"))


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint into the folder and remove all but the newest ``keep``.

    Raises:
        OSError: it could not be written; nothing of it is left, and older checkpoints are untouched.
    """
    path = path_of(folder, checkpoint.step)
    before = path.rename(path.with_name(f"{path.name}.aside")) if path.is_dir() else None
    try:
        _save_file(path, {item.name: _plain(getattr(checkpoint, item.name)) for item in fields(checkpoint)})
    except OSError:
        if before is not None:
            before.rename(path)
        raise
    if before is not None:
        shutil.rmtree(before)
    _remove_old(folder, path, keep)
    return path


def save_part(path: Path, number: int, parts: int, checkpoint: Checkpoint) -> None:
    """Write a part of a sharded checkpoint into the folder ``path``: the rows of the tensors that it has.

    Raises:
        OSError: it could not be written.
    """
    names = DIVIDED if number else [item.name for item in fields(checkpoint)]
    content = {name: getattr(checkpoint, name) for name in ("step", *names)}
    # The folder may have another name as soon as all parts have theirs.
    _save_file(part_of(path, number, parts), content, sync_name=False)


def complete(path: Path, temporary: Path, keep: int) -> None:
    """Give the folder ``temporary``, whose parts are all written, its name; remove all but the newest ``keep``."""
    sync_folder(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)
    _remove_old(path.parent, path, keep)


def _save_file(path: Path, content: dict[str, Any], *, sync_name: bool = True) -> None:
    try:
        with whole_file(path, "w+b", sync_name=sync_name) as file:
            _write({"magic": MAGIC, "format": FORMAT} | content, file)
    except Exception as error:
        raise OSError(f"checkpoint {path} was not written: {error}") from error


def _plain(value: Any) -> Any:
    """A value with dictionaries in place of what joins the parts of one."""
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _remove_old(folder: Path, path: Path, keep: int) -> None:
    # A file of a later step is a broken one that this run has resumed before; it must not count as the newest.
    old = sorted(file for file in folder.glob("step_*.pt") if file.name <= path.name)[:-keep]
    for each in [*folder.glob("step_*.tmp"), *old]:
        if each.is_dir():
            # Under its name it is whole until the last moment.
            shutil.rmtree(each if each.suffix == ".tmp" else each.rename(each.with_name(f"{each.name}.tmp")))
        else:
            each.unlink(missing_ok=True)


def _write(content: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch reports a failed write as an inconsistent position; the cause is the exception that it met meanwhile.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    file.seek(-2, os.SEEK_END)
    if file.read(2) != bytes(2):
        raise RuntimeError(f"torch {torch.__version__} ended the archive with a comment of its own")
    file.seek(-2, os.SEEK_END)
    file.write(COMMENT_SIZE.to_bytes(2, "little"))
    size = file.tell()
    file.write(COMMENT % checksum(file, size).encode())


def _has_checksum(path: Path) -> bool:
    """Whether the file has a checksum, which is then the right one.

    Raises:
        NotACheckpoint: a checksum of another content, or a part of one.
        OSError: a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size - COMMENT_SIZE
            file.seek(max(size - END_SIZE, 0))
            end = file.read()
            comment = end[-COMMENT_SIZE:]
            if not comment.startswith(COMMENT.partition(b"%")[0]):
                place = end.rfind(END)
                if place >= 0 and any(end[place + END_SIZE - 2 : place + END_SIZE]):
                    raise NotACheckpoint(f"{path} is not a whole checkpoint: it has lost its checksum")
                return False
            right = comment == COMMENT % checksum(file, size).encode()
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    if not right:
        raise NotACheckpoint(f"{path} is not a whole checkpoint: its checksum is not that of its content")
    return True


def load(path: str | Path, *, compare: bool = True) -> Checkpoint:
    """Read a checkpoint without executing anything in it.

    Tensors are mapped from the file, and copied when written to. Those of a sharded one are joined when they are asked
    for.

    Args:
        path: of the file, or of the folder of a sharded one.
        compare: compare the checksum, which reads the whole file. Without, damage to tensors is not seen.

    Raises:
        NotACheckpoint: not a file, not whole, damaged, or not a checkpoint.
        ValueError: a checkpoint of another format version.
        NotEnoughMemory: of a file that may well be whole.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    content = _load_parts(path, compare=compare) if path.is_dir() else _load_file(path, compare=compare)
    names = {item.name for item in fields(Checkpoint)}
    return Checkpoint(**{name: value for name, value in content.items() if name in names})


def _load_parts(path: Path, *, compare: bool) -> dict[str, Any]:
    """The content of a sharded checkpoint; its tensors are joined when they are asked for."""
    named = [match for file in path.iterdir() if (match := re.fullmatch(r"part_\d{5}_of_(\d{5})\.pt", file.name))]
    if not named:
        raise NotACheckpoint(f"{path} is not a file")
    parts = int(named[0][1])
    content, *others = (_load_file(part_of(path, i, parts), compare=compare, part=i) for i in range(parts))
    if any(other["step"] != content["step"] for other in others):
        raise NotACheckpoint(f"{path} is not a whole checkpoint: its parts are of different steps")
    return content | {name: _joined([content[name], *(other[name] for other in others)]) for name in DIVIDED}


def _joined(parts: list[Any]) -> Any:
    """What a checkpoint has under a name, of the parts of it."""
    if not isinstance(parts[0], dict):
        return parts[0]
    if parts[0] and all(isinstance(value, (Tensor, tuple)) for value in parts[0].values()):
        return Joined(parts)
    return {key: _joined([part[key] for part in parts if key in part]) for key in parts[0]}


def _load_file(path: Path, *, compare: bool, part: int | None = None) -> dict[str, Any]:
    """The content of a file, of a part of a checkpoint or of all of it."""
    if not path.is_file():
        raise NotACheckpoint(f"{path} is not a file")
    try:
        checked = _has_checksum(path) if compare else None
        content = _content(path, checked)
    except (MemoryError, OSError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        raise NotEnoughMemory(
            f"not enough memory to read {path}, which takes {path.stat().st_size / 2**20:,.0f} MiB; no damage was found"
        ) from error
    _check_fields(path, content, part)
    if checked is False:
        _log.warning("%s has no checksum, as older versions wrote it: some damage to it would not be seen", path)
    return content


def _content(path: Path, checked: bool | None) -> Any:
    """What ``torch.save`` wrote; ``checked`` files have the right checksum, so that no error of torch means damage.

    None is for a file that nobody looked at.
    """
    if not zipfile.is_zipfile(path):
        raise NotACheckpoint(f"{path} is not a whole checkpoint")
    try:
        if checked is False:
            # torch wrote the sum of every part, and does not look at it.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise loading the file unsafely.
        raise NotACheckpoint(f"{path} is refused: it holds more than tensors and plain values") from error
    except (OSError, MemoryError):
        raise  # the file may well be whole: going back to an older one would lose work
    except Exception as error:
        if checked or NO_MEMORY.search(str(error)):
            raise
        raise NotACheckpoint(f"{path} is not a whole checkpoint: {error or type(error).__name__}") from error


def _check_fields(path: Path, content: Any, part: int | None) -> None:
    """Raises ValueError unless this is a checkpoint of this version whose fields have the types of the class."""
    if not isinstance(content, dict) or content.get("magic") != MAGIC:
        raise NotACheckpoint(f"{path} is not a checkpoint of this trainer")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format version {content.get('format')}; this code reads version {FORMAT}")
    # What has a default was added after the first checkpoints of this version.
    required = [item.name for item in fields(Checkpoint) if item.default is item.default_factory is MISSING]
    missing = sorted(set(("step", *DIVIDED) if part else required) - content.keys())
    if missing:
        raise NotACheckpoint(f"{path} lacks {', '.join(missing)}")
    for name, hint in get_type_hints(Checkpoint).items():
        if part is not None and name in DIVIDED:
            hint = dict[str, Any]  # joined later
        if name in content and not _is(content[name], hint):
            raise NotACheckpoint(f"{path} has {name} of type {type(content[name]).__name__}; it must be {hint}")
    if content["step"] < 0:
        raise NotACheckpoint(f"{path} has step {content['step']}; it must be at least 0")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field, and the values of a dictionary or a list theirs."""
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is(value, option) for option in inner)
    if not isinstance(value, origin or hint) or isinstance(value, bool):
        return False
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return all(_is(part, inner[-1]) for part in parts)


def latest(folder: str | Path, *, compare: bool = True) -> tuple[Path, Checkpoint]:
    """The newest whole checkpoint of a run's folder; what is not whole is skipped with a warning that names it.

    ``compare`` as in :func:`load`.

    Raises:
        NotACheckpoint: the folder holds none.
        ValueError: the newest whole one has another format version.
    """
    folder = Path(folder)
    for leftover in sorted(folder.glob("step_*.tmp")):
        _log.warning("%s is skipped: its writing was not finished", leftover)
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            return path, load(path, compare=compare)
        except NotACheckpoint as reason:
            _log.warning("skipped: %s", reason)
    raise NotACheckpoint(f"{folder} holds no whole checkpoint (step_*.pt)")


def open_checkpoint(path: Path, *, compare: bool = True) -> tuple[Path, Checkpoint]:
    """A checkpoint, or the newest one of a run's folder; ``compare`` as in :func:`load`."""
    if path.is_dir() and not is_checkpoint(path):
        return latest(path, compare=compare)
    return path, load(path, compare=compare)
