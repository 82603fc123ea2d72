"""``python -m models.precompute``: encode clips once, for training on latents (see ``data/latents.py``).

    python -m models.precompute --data.source videos --encoder runs/tokenizer --out latents
    python -m models.train --data.source latents --model.patch 1 2 2

With --low N the folder has the clips themselves too, N times smaller: what a second stage makes the latents from.

Clip ``p * n + i`` of the folder is item i of the n of the source, with the random crop and start that it has in epoch p
of a training with the same seed. With ``--data.buckets`` that holds in every bucket, and ``models.train`` with
``--batch-tokens`` trains on all of them. The same command goes on with an interrupted run; the files are as if it had
not been interrupted (on the same machine, with the same number of threads).
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisora_kernels.commands import command

from .data.batches import bucket_seed
from .data.config import DataConfig
from .data.encoder import Encoder, identify, open_encoder
from .data.files import digest_of
from .data.index import read_json, write_json
from .data.latents import DTYPES, LATENT_INDEX, LATENT_PROGRESS, check_shard, read_index, write_shard
from .data.open import open_source
from .data.pixels import shrink, to_float
from .data.source import Shape, Source
from .runtime.allocator import reuse_large_allocations
from .runtime.arguments import read
from .runtime.device import check_backend, choose_backend, choose_device
from .runtime.files import locked
from .runtime.plain import as_plain
from .runtime.progress import progress_bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecomputeConfig:
    """Options of encoding."""

    out: Path
    """Folder for the latents. An interrupted run with the same options continues."""
    encoder: str
    """A checkpoint of an autoencoder or the folder of its run, a folder of a diffusers autoencoder, or 'pixels' for no
    encoder."""
    data: DataConfig = field(default_factory=DataConfig)
    low: int = 0
    """Factor of a small copy of each clip, kept for stage B of StableCascade; 0 keeps none."""
    passes: int = 1
    """Number of passes over the source, each with crops and starts of its own."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the stored latents; the encoder runs in fp32."""
    normalize: bool = False
    """Give each channel mean 0 and standard deviation 1 for training."""
    shard_clips: int = 256
    """Clips per file."""
    batch_size: int = 16
    """Clips per call of the encoder."""
    seed: int = 0
    """Seed of the crops and starts, as in models.train."""
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    """Kernels of the ops; 'auto' takes the verified ones of the device."""
    device: str = "auto"
    """Device: 'cpu', 'cuda', 'cuda:1' and so on. 'auto' is CUDA if there is a device, else the CPU."""

    def __post_init__(self) -> None:
        for name in ("passes", "shard_clips", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("seed", "low"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.data.buckets and self.low:
            raise ValueError(f"low is {self.low}; with data.buckets it must be 0")
        if self.data.images:
            raise ValueError(f"data.images is {self.data.images}; training draws them, so it must be 0 here")


def recipe_of(config: PrecomputeConfig, source: Source, encoder: dict[str, Any]) -> dict[str, Any]:
    """All that the latents depend on, as JSON returns it."""
    data = as_plain(config.data)
    for name in ("cache_megabytes", "images"):
        del data[name]
    names = ("low", "passes", "precision", "normalize", "shard_clips", "batch_size", "seed")
    return {
        "encoder": {key: encoder[key] for key in ("kind", "sha256")},  # the same one may be found elsewhere
        "data": data,
        "items": len(source),
        "files": digest_of(source.items),
        **{name: getattr(config, name) for name in names},
    }


def whole_shards(folder: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the shards that an interrupted run left whole, up to the first that is not.

    Raises:
        ValueError: the folder holds latents of other options, or something else.
    """
    progress = folder / LATENT_PROGRESS
    if not progress.is_file():
        foreign = [file.name for file in folder.glob("*") if not file.name.endswith(".tmp")]
        if foreign:
            raise ValueError(f"{folder} holds other files, {sorted(foreign)[0]} for one; choose another --out")
        return []
    values = read_json(progress, whole=False)
    refuse_other_recipe(folder, values["made"], recipe)
    whole = []
    for entry in values["shards"]:
        try:
            check_shard(folder, entry, whole=True)
        except ValueError as reason:
            _log.warning("%s; it is made again, with those after it", reason)
            break
        whole.append(entry)
    return whole


def refuse_other_recipe(folder: Path, written: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Raises ValueError if the latents in the folder depend on other options."""
    # Older folders lack newer options; those have their defaults.
    written = {"low": 0, **written, "data": {**as_plain(DataConfig()), **written["data"]}}
    changed = [key for key in recipe if key != "data" and written.get(key) != recipe[key]]
    changed += [f"data.{key}" for key in recipe["data"] if written["data"][key] != recipe["data"][key]]
    if changed:
        raise ValueError(f"{folder} holds latents of other options: {', '.join(changed)} differ; choose another --out")


def encode_clips(
    source: Source, encoder: Encoder, start: int, stop: int, seed: int, config: PrecomputeConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents and labels of the clips ``start`` to ``stop`` of the source, and the clips smaller by ``config.low``.

    Raises:
        ValueError: a latent that is not finite in the precision of the files.
    """
    latents, labels, low = [], [], []
    for first in range(start, stop, config.batch_size):
        clips = []
        for number in range(first, min(first + config.batch_size, stop)):
            epoch, index = divmod(number, len(source))
            clip, label = source.clip(index, np.random.default_rng((seed, epoch, index)))
            clips.append(clip)
            labels.append(label)
        stacked = torch.from_numpy(np.stack(clips))
        encoded = encoder.encode(stacked).to("cpu", DTYPES[config.precision])
        if not encoded.isfinite().all():
            raise ValueError(
                f"clips {first} to {first + len(clips) - 1} have latents that {config.precision} cannot hold"
            )
        latents.append(encoded)
        if config.low:
            low.append(shrink(to_float(stacked), config.low).to(encoded.dtype))
    return torch.cat(latents), torch.tensor(labels), torch.cat(low) if low else None


def low_shape(config: PrecomputeConfig, source: Source) -> Shape | None:
    """The shape of the small clips; None for none.

    Raises:
        ValueError: a factor that does not divide the clips.
    """
    if not config.low:
        return None
    channels, frames, height, width = source.shape
    if height % config.low or width % config.low:
        raise ValueError(f"low is {config.low}; it must divide the clips' height and width {(height, width)}")
    return channels, frames, height // config.low, width // config.low


class Part(NamedTuple):
    """A bucket of the source, or all of it: its clips, their number over all passes, and the shape of the latents."""

    source: Source
    seed: int
    clips: int
    shape: Shape


def parts_of(config: PrecomputeConfig, source: Source, encoder: Encoder) -> list[Part]:
    """The source, or its buckets."""
    parts = source.split(config.data.buckets) if config.data.buckets else [source]
    seeds = [config.seed]
    if config.data.buckets:
        seeds = [bucket_seed(config.seed, number) for number in range(len(parts))]
    return [
        Part(part, seed, config.passes * len(part), encoder.shape(part.shape))
        for part, seed in zip(parts, seeds, strict=True)
    ]


def run(config: PrecomputeConfig) -> Path:
    """Encode as configured; returns the index.

    Raises:
        ValueError: options, an encoder or a source that do not fit, or a folder with something else.
        OSError: a file that could not be written.
    """
    data, folder = config.data, config.out
    source = open_source(data)
    if source.encoder is not None:
        raise ValueError(f"data source {data.source!r} holds latents already")
    small = low_shape(config, source)
    record = identify(config.encoder)
    recipe = recipe_of(config, source, record)
    path = folder / LATENT_INDEX
    if path.is_file():
        refuse_other_recipe(folder, read_index(folder)["made"], recipe)
        (folder / LATENT_PROGRESS).unlink(missing_ok=True)
        print(f"{folder} is complete")
        return path
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out is {str(folder)!r}, which is a file; it must be a folder")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            return _encode(config, source, record, recipe, small)
    finally:
        for place in missing:  # empty, where nothing was encoded
            with contextlib.suppress(OSError):
                place.rmdir()


def _encode(
    config: PrecomputeConfig, source: Source, record: dict[str, Any], recipe: dict[str, Any], small: Shape | None
) -> Path:
    """The shards that are missing, and the index."""
    data, folder = config.data, config.out
    path = folder / LATENT_INDEX
    shards = whole_shards(folder, recipe)
    device = choose_device(config.device)
    check_backend(config.backend, device)
    with choose_backend(config.backend):
        encoder = open_encoder(record, device)
        shape = encoder.shape(source.shape)
        parts = parts_of(config, source, encoder)
        write_shards(config, encoder, parts, recipe, shards)
    mean, std = moments(shards, sum(part.clips * math.prod(part.shape[1:]) for part in parts))
    if config.normalize and min(std) == 0:
        raise ValueError(f"channel {std.index(0)} of the latents is constant; normalize cannot divide by its deviation")
    index = {
        "encoder": record,
        "made": recipe,
        "pixels": source.shape,
        "shape": shape,
        "low": small and {"factor": config.low, "shape": small},
        "buckets": bucket_entries(config, parts, shards) if data.buckets else [],
        "classes": source.classes,
        "empty_classes": source.empty_classes,
        "captions": source.captions,
        "mean": mean,
        "std": std,
        "shards": [{key: entry[key] for key in ("name", "count", "bytes", "sha256")} for entry in shards],
    }
    write_json(path, index)
    (folder / LATENT_PROGRESS).unlink()
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    return path


def shard_starts(config: PrecomputeConfig, parts: list[Part]) -> list[tuple[int, int]]:
    """Of each shard the number of its part, and its first clip there."""
    return [(i, start) for i, part in enumerate(parts) for start in range(0, part.clips, config.shard_clips)]


def write_shards(
    config: PrecomputeConfig, encoder: Encoder, parts: list[Part], recipe: dict[str, Any], shards: list[dict[str, Any]]
) -> None:
    """Write the shards after those in ``shards``, and enter each there and in the list of the folder."""
    folder, starts = config.out, shard_starts(config, parts)
    if not shards:  # a folder with shards and without a list is somebody else's
        write_json(folder / LATENT_PROGRESS, {"made": recipe, "shards": []})
    with progress_bar(total=sum(part.clips for part in parts), desc=folder.name, unit="clip") as bar:
        bar.update(sum(entry["count"] for entry in shards))
        for number in range(len(shards), len(starts)):
            i, start = starts[number]
            part = parts[i]
            stop = min(start + config.shard_clips, part.clips)
            latents, labels, low = encode_clips(part.source, encoder, start, stop, part.seed, config)
            exact = latents.double()
            sums = {"sum": exact.sum((0, 2, 3, 4)).tolist(), "squares": exact.square().sum((0, 2, 3, 4)).tolist()}
            shards.append(write_shard(folder, number, latents, labels, low) | sums)
            write_json(folder / LATENT_PROGRESS, {"made": recipe, "shards": shards})
            bar.update(len(latents))


def bucket_entries(config: PrecomputeConfig, parts: list[Part], shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The buckets' entries in the index."""
    starts = shard_starts(config, parts)
    return [
        {
            "pixels": part.source.shape,
            "shape": part.shape,
            "shards": [entry["name"] for entry, (bucket, _) in zip(shards, starts, strict=True) if bucket == i],
        }
        for i, part in enumerate(parts)
    ]


def moments(shards: list[dict[str, Any]], cells: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, from the shards' sums and sums of squares over ``cells`` cells."""
    totals = [[sum(values) for values in zip(*(e[key] for e in shards), strict=True)] for key in ("sum", "squares")]
    mean = [total / cells for total in totals[0]]
    return mean, [max(total / cells - m * m, 0.0) ** 0.5 for total, m in zip(totals[1], mean, strict=True)]


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s")
    reuse_large_allocations()
    try:
        path = run(read(PrecomputeConfig, f"python -m {__package__}.precompute", __doc__, arguments))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    index = read_index(path.parent)
    count = sum(entry["count"] for entry in index["shards"])
    size = sum(entry["bytes"] for entry in index["shards"])
    sizes = [f"{tuple(part['pixels'])} as latents {tuple(part['shape'])}" for part in index.get("buckets") or [index]]
    print(f"{count} clips {', '.join(sizes)}, {size / 2**20:.1f} MiB: {path}")


if __name__ == "__main__":
    main()
