"""Latents that an autoencoder made of the clips beforehand: the files, the encoders, and the source that reads them.

Latent diffusion (Rombach et al. 2021, arXiv 2112.10752) trains on z = E(clip) and samples clip = D(z). E is frozen and
costs more than a small model's step, so ``models.precompute`` runs it once. The folder that it writes:

    shard_00000.safetensors ...    latents [N, C, T, H, W] fp16, bf16 or fp32; labels [N] int64; on demand low, the
                                   clips themselves in [-1, 1], smaller in height and width by a factor
    index.json                     format, encoder (kind, path, sha256), what it was made from, shape, factor and shape
                                   of low, classes or captions (labels are their numbers), mean and std of each
                                   channel, of each shard name, clips, bytes, sha256, and the index's own sha256

With ``data.buckets`` a shard is of one of them, and the index names the pixels, the shape of the latents and the shards
of each; its own pixels and shape are then those of ``data.frames`` and ``data.size``, which previews and samples have.

The index is written last; until then ``index.partial.json`` says which shards are whole. With ``normalize`` the source
gives (z - mean) / std, and the decoder undoes it (W.A.L.T, Gupta et al. 2023, arXiv 2312.06662, needs it).

The sizes of all shards are checked when the folder is opened, and the checksum of a shard when it is first read.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import write_whole
from ..runtime.packages import package
from ..runtime.plain import as_plain
from .checksums import sha256_of
from .config import DataConfig
from .index import read_json
from .source import Bucket, Shape, Source

# Options of the data that the latents keep.
SAME_OPTIONS = ("frames", "size", "reduce", "stride", "fps", "crop", "positions")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


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
    index = read_json(path, whole=True)
    for entry in index["shards"]:
        check_shard(folder, entry, whole=False)
    return index


class _Shard(NamedTuple):
    file: Any
    labels: Tensor


class LatentClips(Source):
    """The clips of a folder of latents, float32 ``[C, T, H, W]``, as a source (see ``source.py``).

    With buckets the clips differ in size, and ``shape`` is that of previews and samples.

    Args:
        folder: of ``models.precompute``.
        data: its options; one that is neither the default nor what the latents were made with is refused.

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

    def __init__(self, folder: str | Path, data: DataConfig | None = None) -> None:
        self.folder = Path(folder)
        self.index = index = read_index(self.folder)
        default = DataConfig()
        for name in SAME_OPTIONS if data is not None else ():
            value, usual = getattr(data, name), getattr(default, name)
            # Older folders lack newer options; those have their defaults.
            written = index["made"]["data"].get(name, as_plain(usual))
            if value != usual and as_plain(value) != written:
                raise ValueError(f"data.{name} is {value}; the latents in {self.folder} were made with {written}")
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
    def empty_classes(self) -> list[int]:
        return self.index.get("empty_classes", [])

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
        labels, names = file.get_tensor("labels"), self.captions or self.classes
        bucket = next((part for part in self.index.get("buckets", ()) if entry["name"] in part["shards"]), self.index)
        stored, wanted = file.get_slice("latents").get_shape(), [entry["count"], *bucket["shape"]]
        if stored != wanted:
            raise ValueError(f"latents {self.folder / entry['name']} are {stored}; by the index they must be {wanted}")
        if names and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise ValueError(f"latents {self.folder / entry['name']} have labels that the index does not name")
        return _Shard(file, labels)


# A folder with one of these, by models.precompute, is a source of latents: the second while it is being written.
LATENT_INDEX, LATENT_PROGRESS = "index.json", "index.partial.json"
