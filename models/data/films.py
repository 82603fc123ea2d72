"""When the frames of a file are shown, and the frames of given times, decoded by PyAV."""

from __future__ import annotations

import errno
import itertools
import math
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from .frames import Undecodable, check, upright_size

Convert = Callable[[av.VideoFrame], np.ndarray]

# Packets that are decoded to see whether every packet is a frame of its own time.
CHECKED = 48
# How many places to begin at a search goes back by, before it begins with the file.
BACK = (0, 1, 4, 16)
# Decoders that see the transparency of WebM, which FFmpeg's own leave out.
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Metadata that is not UTF-8 is no error. PyAV 19 (Python 3.12 and newer) sees to that itself and has no such option.
LENIENT: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


@dataclass(frozen=True)
class Film:
    """The frames of a file in the order in which they are shown.

    Attributes:
        pts: int64 ``[n]``, when each is shown, in units of ``base`` seconds; rising.
        end: when the last one ends.
        base: the unit of time.
        keys: int64 ``[k, 4]``, pts, dts, size and place in the file of the packets that a decoder can begin with; none
            if it must begin with the file.
        timed: False for a file without sound times: ``pts`` then counts the frames.
        height, width: of a frame, upright and of square pixels.
    """

    pts: np.ndarray
    end: int
    base: Fraction
    keys: np.ndarray
    timed: bool
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.pts.nbytes + self.keys.nbytes

    @property
    def rate(self) -> float:
        """Frames per second, on average."""
        return (len(self.pts) - 1) / float((self.pts[-1] - self.pts[0]) * self.base) if len(self.pts) > 1 else 0.0

    def count(self, fps: float) -> int:
        """The number of frames at ``fps`` frames per second; of its own for 0."""
        if not fps or len(self.pts) == 1:
            return len(self.pts)
        return max(1, round(float((self.end - int(self.pts[0])) * self.base) * fps))

    def _moments(self, fps: float) -> np.ndarray:
        """The first of the frames at ``fps`` at which each of its own is on the screen."""
        # Times are rounded to the unit, so a frame may be late by half of it.
        times = self.pts - self.pts[0] - 0.5
        return np.maximum(np.ceil(times * (fps * float(self.base))), 0).astype(np.int64)

    def shown(self, fps: float, numbers: np.ndarray) -> np.ndarray:
        """Which frame of its own is on the screen at each of ``numbers`` of the frames at ``fps``."""
        if not fps or len(self.pts) == 1:
            return numbers
        return np.searchsorted(self._moments(fps), numbers, side="right") - 1

    def used(self, fps: float) -> np.ndarray:
        """The numbers of its own frames that are on the screen at any of those at ``fps``."""
        if not fps or len(self.pts) == 1:
            return np.arange(len(self.pts))
        return np.flatnonzero(np.diff(self._moments(fps), append=self.count(fps)) > 0)

    def starts(self, pts: int) -> list[Any]:
        """Where to begin for the frame of a time, the best first: a row of ``keys``, or None for the file's start."""
        last = int(np.searchsorted(self.keys[:, 0], pts, side="right")) - 1
        return [*(self.keys[last - back].tolist() for back in BACK if last - back > 0), None]


class _Opened:
    """An open file.

    Attributes:
        ratio: the width of a pixel over its height.
        whole: whether all could be decoded so far, and is where it was when the file was read first.
        sought: the row of :attr:`Film.keys` that was sought.
        lost: whether a packet could not, and no key came since.
        key: the time of the last key after such a packet; what is shown before it may be made of what is lost.
        doubtful: times of frames that may be made of what is lost.
    """

    def __init__(self, container: Any, stream: Any, decoder: Any) -> None:
        self.container, self.stream, self.decoder = container, stream, decoder
        self.ratio: Fraction | None = stream.sample_aspect_ratio
        self.whole, self.lost = True, False
        self.sought: list[int] | None = None
        self.key: int | None = None
        self.doubtful: set[int | None] = set()

    def seek(self, key: list[int] | None) -> bool:
        """Go to a row of :attr:`Film.keys`, or stay at the start for None; False where the file cannot be sought."""
        try:
            if key is not None:
                self.container.seek(key[1], stream=self.stream)
                self.sought = key
        except FFmpegError:
            return False
        return True

    def packets(self) -> Iterator[Any]:
        """The packets of the stream; a file that is cut ends where it cannot be read on."""
        try:
            for packet in self.container.demux(self.stream):
                if self.sought and packet.pts == self.sought[0]:
                    self.whole = self.whole and self.sought == _key(packet)
                if packet.size:
                    yield packet
        except FFmpegError as error:
            _raise_memory(error)

    def frames(self) -> Iterator[av.VideoFrame]:
        """The sound frames from here on, in the order in which they are shown."""
        for packet in itertools.chain(self.packets(), [None]):
            yield from self.decode(packet)

    def decode(self, packet: Any) -> list[av.VideoFrame]:
        """The frames that come out when the packet, or None at the end, goes in.

        A frame is left out if damage was found in it, or in what it may be made of: a decoder fills those with whatever
        its memory holds.
        """
        if packet is not None and self.lost and packet.is_keyframe:
            self.lost, self.key = False, packet.pts or 0
        try:
            if packet is not None and self._is_cut(packet):
                raise av.error.InvalidDataError(0, "a part of the packet is missing")
            frames = self.decoder.decode(packet)
        except FFmpegError as error:
            _raise_memory(error)
            self.whole, self.lost, frames = False, True, []
        if packet is not None and (self.lost or (self.key is not None and (packet.pts or 0) < self.key)):
            self.doubtful.add(packet.pts)
        sound = [f for f in frames if not f.is_corrupt and not (self.doubtful and f.pts in self.doubtful)]
        self.whole = self.whole and len(sound) == len(frames)
        return sound

    def _is_cut(self, packet: Any) -> bool:
        """Whether its end is missing, which FFmpeg fills with what memory holds: as the container knows, or as the last
        bytes of a JPEG picture (the marker EOI comes after the last SOS) or of a frame of a GIF (0, and a semicolon at
        the end of the file) tell."""
        kind = self.stream.codec_context.name
        if kind == "mjpeg" and self.container.format.name in ("image2", "jpeg_pipe"):
            data = bytes(packet)
            return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
        if kind == "gif":
            data = bytes(packet)
            return not data.endswith(b"\0") and b"\0;" not in data[-1024:]
        return bool(packet.is_corrupt)


class _Packets(NamedTuple):
    """What the packets say.

    ``times`` and ``ends`` are of those that are shown; ``keys`` as in :class:`Film`; ``size`` is that of the first
    frame, None if none was decoded; ``timed``: all have times, and never go back; ``exact``: those that were decoded
    were frames of those times.
    """

    times: list[Any]
    ends: list[int]
    keys: list[list[int]]
    size: tuple[int, int] | None
    timed: bool
    exact: bool


def _raise_memory(error: Exception) -> None:
    """Raise MemoryError if that is what it is: it says nothing about the file."""
    if getattr(error, "errno", None) == errno.ENOMEM:
        raise MemoryError(str(error)) from error


@contextmanager
def _open(path: Path, threads: str = "AUTO") -> Iterator[_Opened]:
    """The file alone: what it holds cannot make FFmpeg open another file, a pipe or an address.

    With threads that take a frame each, PyAV loses sound frames beside one that is damaged; with "SLICE" it does not.

    Raises:
        Undecodable: it is no file, or nothing that FFmpeg can read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Undecodable("it is not a regular file")
        with open(path, "rb") as file:
            only = {"protocol_whitelist": "none"}
            with av.open(file, container_options=only, buffer_size=1 << 17, **LENIENT) as container:
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams:
                    raise Undecodable("it has no video stream")
                yield _Opened(container, streams[0], _decoder(streams[0], threads))
    except (FFmpegError, OSError, ValueError, IndexError) as error:
        _raise_memory(error)
        raise Undecodable(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def _decoder(stream: Any, threads: str) -> Any:
    context = stream.codec_context
    if context is None:
        raise Undecodable("FFmpeg has no decoder for it")
    if context.name == "mjpeg":
        context.options = {"err_detect": "explode"}  # else what is missing of a picture is green
    name = WITH_ALPHA.get(context.name)
    if name in av.codecs_available and {k.lower(): v for k, v in stream.metadata.items()}.get("alpha_mode") == "1":
        context = av.CodecContext.create(name, "r")
    context.thread_type = threads
    return context


def read_film(path: Path) -> Film:
    """The times of the frames, from one pass over the packets, whatever the file says of itself.

    Where packets and frames are not one to one (fields of their own, damage at the start, packets without a time), the
    whole file is decoded once instead.

    Raises:
        Undecodable: it has no frame, or one of a kind that is refused.
    """
    with _open(path) as opened:
        base, rate = opened.stream.time_base, opened.stream.average_rate or Fraction(25)
        packets = _read_packets(opened)
        check(int(opened.stream.codec_context.color_trc), opened.ratio)
    size, times, keys, timed = packets.size, packets.times, packets.keys, packets.timed
    end = max(packets.ends, default=0)
    if size is None or not packets.exact:
        times, size, rising = _decode_times(path)
        timed = timed and rising
        if not timed:
            times, keys, base, end = list(range(len(times))), [], 1 / rate, len(times)
    pts = np.sort(np.array(times, dtype=np.int64))
    if end <= pts[-1]:  # no duration: the last frame lasts as long as the others do on average
        end = int(pts[-1]) + (round((pts[-1] - pts[0]) / (len(pts) - 1)) if len(pts) > 1 else 1)
    starts = np.array(sorted(keys), dtype=np.int64).reshape(-1, 4)
    return Film(pts, end, base, starts, timed, *size)


def _read_packets(opened: _Opened) -> _Packets:
    times: list[int] = []
    ends: list[int] = []
    keys: list[list[int]] = []
    found: list[Any] = []
    size, latest, exact = None, -math.inf, True
    hides = opened.stream.codec_context.name == "vp8"
    for number, packet in enumerate(itertools.chain(opened.packets(), [None])):
        if number <= CHECKED:
            for frame in opened.decode(packet if number < CHECKED else None):
                size = size or upright_size(frame, opened.ratio)
                found.append(frame.pts)
            if number == CHECKED or packet is None:
                exact = sorted(times) == found
        if packet is None:
            break
        before, latest = latest, latest if packet.dts is None else packet.dts
        if packet.pts is None or latest < before:
            return _Packets([], [], [], size, timed=False, exact=False)
        if packet.is_keyframe:
            keys.append(_key(packet))
        # A packet of VP8 says in a bit of its first byte whether it is shown.
        if not packet.is_discard and not (hides and not bytes(packet)[0] & 16):
            times.append(packet.pts)
            ends.append(packet.pts + (packet.duration or 0))
    return _Packets(times, ends, keys, size, timed=True, exact=exact and len(set(times)) == len(times))


def _key(packet: Any) -> list[int]:
    """A row of :attr:`Film.keys`."""
    return [packet.pts, packet.pts if packet.dts is None else packet.dts, packet.size, packet.pos or 0]


def _decode_times(path: Path) -> tuple[list[Any], tuple[int, int], bool]:
    """The times of the frames that can be decoded, the size of the first, and whether the times rise."""
    times: list[Any] = []
    size, rising = None, True
    with _open(path, "SLICE") as opened:
        for frame in opened.frames():
            size = size or upright_size(frame, opened.ratio)
            rising = rising and frame.pts is not None and (not times or times[-1] < frame.pts)
            times.append(frame.pts)
    if size is None:
        raise Undecodable("it holds no frame that can be decoded")
    return times, size, rising


def read_frames(path: Path, film: Film, numbers: np.ndarray, convert: Convert, out: np.ndarray) -> bool:
    """Write ``convert`` of the frames of ``numbers``, which rise, into ``out``; return whether all is sound.

    In the place of one that cannot be decoded the one before it is held.

    Raises:
        Undecodable: no frame at all can be decoded.
    """
    wanted = film.pts[numbers]
    for start in film.starts(wanted[0]):
        with _open(path) as opened:
            if opened.seek(start) and _fill(opened, film, wanted, convert, out) == len(wanted) and opened.whole:
                return True
    with _open(path, "SLICE") as opened:
        filled = _fill(opened, film, wanted, convert, out)
    if filled is None:
        raise Undecodable("it holds no frame that can be decoded")
    return filled == len(wanted) and opened.whole


def _fill(opened: _Opened, film: Film, wanted: np.ndarray, convert: Convert, out: np.ndarray) -> int | None:
    """Fill ``out`` from where the file is now; return how many of its frames have the times ``wanted``.

    None if there is no frame.
    """
    place, right, last = 0, 0, None
    for number, frame in enumerate(opened.frames()):
        now = frame.pts if film.timed else number
        while place < len(wanted) and wanted[place] < now:
            out[place] = convert(last or frame)
            place += 1
        if place < len(wanted) and wanted[place] == now:
            out[place] = convert(frame)
            place, right = place + 1, right + 1
        if place == len(wanted):
            return right
        last = frame
    if last is None:
        return None
    out[place:] = convert(last)
    return right
