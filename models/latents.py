"""Latents that an autoencoder made of the clips beforehand: the files, the encoders, and the source that reads them.

Latent diffusion (Rombach et al. 2021, arXiv 2112.10752) trains on z = E(clip) and samples clip = D(z). E is frozen and
costs more than a small model's step, so ``models.precompute`` runs it once. The folder that it writes:

    shard_00000.safetensors ...    latents [N, C, T, H, W] fp16, bf16 or fp32; labels [N] int64; on demand low, the
                                   clips themselves in [-1, 1], smaller in height and width by a factor
    index.json                     format, encoder (kind, path, sha256), what it was made from, shape, factor and shape
                                   of low, classes or captions (labels are their numbers), mean and std of each
                                   channel, and of each shard: name, clips, bytes, sha256

With ``data.buckets`` a shard is of one of them, and the index names the pixels, the shape of the latents and the shards
of each; its own pixels and shape are then those of ``data.frames`` and ``data.size``, which previews and samples have.

The index is written last; until then ``index.partial.json`` says which shards are whole. With ``normalize`` the source
gives (z - mean) / std, and the decoder undoes it (W.A.L.T, Gupta et al. 2023, arXiv 2312.06662, needs it).

The sizes of all shards are checked when the folder is opened, and the checksum of a shard when it is first read.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint as checkpoints
from .config import DataConfig
from .data import LATENT_INDEX, LATENT_PROGRESS, Bucket, Source, to_float
from .digests import describe, sha256_of, sha256_of_folder
from .runtime.files import write_whole
from .runtime.packages import package
from .runtime.plain import as_plain

FORMAT = 1


MAGIC = "minisora latents"


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


Shape = tuple[int, int, int, int]


class Encoder(Protocol):
    """An autoencoder, as this module and ``models.precompute`` use it."""

    def shape(self, pixels: Shape) -> Shape:
        """``(C, T, H, W)`` of the latents of clips of ``pixels``; ValueError if it does not take such clips."""
        ...

    def encode(self, clips: Tensor) -> Tensor:
        """uint8 ``[B, C, T, H, W]`` to float32 latents ``[B, C', T', H', W']``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to float32 pixels in [-1, 1]."""
        ...


class Pixels:
    """The identity: latents are the pixels in [-1, 1]."""

    def shape(self, pixels: Shape) -> Shape:
        return pixels

    def encode(self, clips: Tensor) -> Tensor:
        return to_float(clips)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float()


class Autoencoder:
    """Anything with ``encode`` and ``decode`` between pixels in [-1, 1] and latents, both ``[B, C, T, H, W]``."""

    def __init__(self, autoencoder: Any, device: torch.device) -> None:
        self.autoencoder, self.device = autoencoder, device

    def shape(self, pixels: Shape) -> Shape:
        try:
            channels, frames, height, width = self.encode(torch.zeros(1, *pixels, dtype=torch.uint8)).shape[1:]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the encoder does not take clips of {pixels} (C, T, H, W): {error}") from error
        return channels, frames, height, width

    def encode(self, clips: Tensor) -> Tensor:
        return self._run(self.autoencoder.encode, to_float(clips))

    def decode(self, latents: Tensor) -> Tensor:
        return self._run(self.autoencoder.decode, latents).clamp(-1, 1)

    @torch.no_grad()
    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # Half precision is for the model that is trained; an autoencoder may overflow in it.
        with torch.autocast(self.device.type, enabled=False):
            return function(x.to(self.device)).float()


def identify(path: str | Path) -> dict[str, Any]:
    """Which encoder this is: ``{"kind", "path", "sha256"}``.

    Args:
        path: ``"pixels"``; a checkpoint of an autoencoder or a run's folder for its newest one (kind "checkpoint"); or
            a folder that diffusers' ``save_pretrained`` wrote (kind "diffusers").

    Raises:
        ValueError: none of these.
    """
    if str(path) == "pixels":
        return {"kind": "pixels", "path": "pixels", "sha256": None}
    path = Path(path)
    if path.is_dir() and any(path.glob("step_*.pt")):
        path = checkpoints.latest(path)[0]
    if path.is_file():
        return {"kind": "checkpoint", "path": str(path.resolve()), "sha256": sha256_of(path)}
    if (path / "config.json").is_file():
        return {"kind": "diffusers", "path": str(path.resolve()), "sha256": sha256_of_folder(path)}
    raise ValueError(
        f"encoder is {str(path)!r}, which is not there; it may be 'pixels', a checkpoint of an autoencoder, the folder "
        f"of its run, or a folder of a diffusers autoencoder"
    )


def open_encoder(record: Mapping[str, Any], device: torch.device, path: str | Path | None = None) -> Encoder:
    """The encoder of a record that :func:`identify` made, loaded from ``path`` or where it was then.

    Raises:
        ValueError: it is not there, is another one than the record says, or cannot encode and decode.
    """
    try:
        found = identify(path or record["path"])
    except ValueError as error:
        raise ValueError(f"{error}; the latents were made with {describe(record)}") from None
    if (found["kind"], found["sha256"]) != (record["kind"], record["sha256"]):
        raise ValueError(f"encoder {describe(found)} is not the one of the latents, {describe(record)}")
    if found["kind"] == "pixels":
        return Pixels()
    if found["kind"] == "diffusers":
        from .autoencoders.pretrained import load_autoencoder

        return Autoencoder(load_autoencoder(found["path"], device=device), device)
    checkpoint = checkpoints.load(found["path"])
    if checkpoint.encoder is not None:
        raise ValueError(f"encoder {found['path']} was trained on latents itself; it must be trained on pixels")
    module: nn.Module = checkpoint.build()
    if not (hasattr(module, "encode") and hasattr(module, "decode")):
        raise ValueError(f"encoder {found['path']} holds a {type(module).__name__}, which has no encode and decode")
    return Autoencoder(module.to(device).eval().requires_grad_(False), device)


class Decoder:
    """Latents as :class:`LatentClips` gives them, ``[B, C, T, H, W]``, to pixels in [-1, 1], and back.

    ``record`` is the source's ``encoder``, which checkpoints keep; ``path`` as for :func:`open_encoder`.
    """

    def __init__(self, record: Mapping[str, Any], device: torch.device, path: str | Path | None = None) -> None:
        self.encoder = open_encoder(record, device, path)
        self.moments = None
        if record["mean"] is not None:
            self.moments = [torch.tensor(record[key], device=device).view(-1, 1, 1, 1) for key in ("mean", "std")]

    def __call__(self, latents: Tensor) -> Tensor:
        latents = latents.float()
        if self.moments is not None:
            mean, std = self.moments
            latents = latents * std + mean
        return self.encoder.decode(latents)

    def encode(self, clips: Tensor) -> Tensor:
        """Such latents, float32, of uint8 clips ``[B, C, T, H, W]``."""
        latents = self.encoder.encode(clips)
        if self.moments is not None:
            mean, std = self.moments
            latents = (latents - mean) / std
        return latents


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps({"magic": MAGIC, "format": FORMAT, **values}, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote.

    Raises:
        ValueError: something else, or another format version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("magic") != MAGIC:
        raise ValueError(f"{path} was not written by models.precompute")
    if values.get("format") != FORMAT:
        raise ValueError(f"{path} has format version {values.get('format')}; this code reads version {FORMAT}")
    return values


def write_shard(
    folder: Path, number: int, latents: Tensor, labels: Tensor, low: Tensor | None = None
) -> dict[str, Any]:
    """Write a shard and return its entry in the index.

    Args:
        folder: of the shards.
        number: of this one.
        latents: ``[N, C, T, H, W]``, fp16, bf16 or fp32.
        labels: class ids ``[N]``, int64.
        low: the small clips ``[N, C, T, h, w]``.
    """
    tensors = {"latents": latents, "labels": labels}
    if low is not None:
        tensors["low"] = low
    content = package("safetensors.torch").save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    path = folder / f"shard_{number:05d}.safetensors"
    write_whole(path, content)
    digest = hashlib.sha256(content).hexdigest()
    return {"name": path.name, "count": len(latents), "bytes": len(content), "sha256": digest}


def check_shard(folder: Path, entry: Mapping[str, Any], *, whole: bool) -> None:
    """Check the size of a shard against its entry, and with ``whole`` its checksum.

    Raises:
        ValueError: a shard that is missing or damaged, by name.
    """
    path = folder / entry["name"]
    if not path.is_file():
        raise ValueError(f"latents {path} are missing; make them again with models.precompute")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"latents {path} are damaged: {path.stat().st_size} bytes, not {entry['bytes']}")
    if whole and sha256_of(path) != entry["sha256"]:
        raise ValueError(f"latents {path} are damaged: the checksum is not that of the index")


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder whose shards all have the size that it says.

    Raises:
        ValueError: no whole index, or a shard that is missing or of another size.
    """
    path = folder / LATENT_INDEX
    if not path.is_file() and (folder / LATENT_PROGRESS).is_file():
        raise ValueError(f"latents in {folder} are not finished; go on with the same command of models.precompute")
    index = read_json(path)
    for entry in index["shards"]:
        check_shard(folder, entry, whole=False)
    return index


class _Shard(NamedTuple):
    file: Any
    labels: Tensor


class LatentClips:
    """The clips of a folder of latents, float32 ``[C, T, H, W]``, as a source (see ``data.py``).

    With buckets the clips differ in size, and ``shape`` is that of previews and samples.

    Args:
        folder: of ``models.precompute``.
        options: of the data; one that is neither the default nor what the latents were made with is refused.

    Attributes:
        classes, captions: names of the classes, or the captions.
        low_shape: of the small clips, None for a folder without.
        encoder: what :class:`Decoder` needs: kind, path and sha256 of the encoder, and mean and std of each channel
            if they were taken out, else None.
        buckets: ``(T, H, W)`` of the latents of each bucket; empty if they have one size.

    Raises:
        ValueError: options or files that do not fit; also from :meth:`clip`, for a shard whose checksum is wrong.
    """

    # Shards that are open at a time: each is a memory map.
    OPEN = 64

    def __init__(self, folder: str | Path, options: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.index = index = read_index(self.folder)
        default = {item.name: item.default for item in dataclasses.fields(DataConfig)}
        for name, value in (options or {}).items():
            # A folder of before an option was there has its default.
            made = index["made"]["data"].get(name, as_plain(default[name]))
            if value != default[name] and as_plain(value) != made:
                raise ValueError(f"data.{name} is {value}; the latents in {self.folder} were made with {made}")
        self.classes, self.captions = tuple(index["classes"]), tuple(index["captions"])
        self.low_shape: Shape | None = tuple(index["low"]["shape"]) if index.get("low") else None
        normalized = index["made"]["normalize"]
        self.encoder = index["encoder"] | {key: index[key] if normalized else None for key in ("mean", "std")}
        self._moments = None
        if normalized:
            self._moments = [torch.tensor(index[key]).view(-1, 1, 1, 1) for key in ("mean", "std")]
        self._shape: list[int] = index["shape"]
        self.buckets = [tuple(bucket["shape"][1:]) for bucket in index.get("buckets", ())]
        self._ends = np.cumsum([entry["count"] for entry in index["shards"]])
        self._clips = range(self._ends[-1])
        self._checked: set[int] = set()
        self._shard = functools.lru_cache(maxsize=self.OPEN)(self._open)

    @property
    def shape(self) -> Shape:
        channels, frames, height, width = self._shape
        return channels, frames, height, width

    @property
    def digest(self) -> str:
        """Of the index, which has the checksums of the shards."""
        return sha256_of(self.folder / LATENT_INDEX)

    def __len__(self) -> int:
        return len(self._clips)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        shard, row = self._find(self._clips[index])
        latents = shard.file.get_slice("latents")[row : row + 1][0].float()
        if self._moments is not None:
            mean, std = self._moments
            latents = (latents - mean) / std
        return latents.numpy(), int(shard.labels[row])

    def low(self, index: int) -> np.ndarray:
        """The small clip of ``low_shape``, float32."""
        shard, row = self._find(self._clips[index])
        return shard.file.get_slice("low")[row : row + 1][0].float().numpy()

    def split(self, buckets: Sequence[Bucket] = ()) -> list[Source]:
        """A source for each bucket; ``buckets``, in frames and pixels, may repeat those that they were made with.

        Raises:
            ValueError: other buckets, or latents of one size.
        """
        made = self.index["made"]["data"].get("buckets", [])
        if not made or (buckets and as_plain(buckets) != made):
            there = made or f"one size, {tuple(self.index['pixels'][1:])}"
            raise ValueError(f"data.buckets is {buckets}; the latents in {self.folder} were made with {there}")
        counts = {entry["name"]: entry["count"] for entry in self.index["shards"]}
        parts: list[Source] = []
        start = 0
        for bucket in self.index["buckets"]:
            part = copy.copy(self)  # the open shards are shared
            part._shape, part.buckets = bucket["shape"], []
            stop = start + sum(counts[name] for name in bucket["shards"])
            part._clips = range(start, stop)
            parts.append(part)
            start = stop
        return parts

    def _find(self, index: int) -> tuple[_Shard, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self._shard(number), index - start

    def _open(self, number: int) -> _Shard:
        entry = self.index["shards"][number]
        if number not in self._checked:
            check_shard(self.folder, entry, whole=True)
            self._checked.add(number)
        file = package("safetensors.torch").safe_open(self.folder / entry["name"], framework="pt")
        return _Shard(file, file.get_tensor("labels"))
