"""A decoded frame as it is to be seen: upright, of square pixels, opaque, of one field, in RGB."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type

# What transparent parts show.
BACKGROUND = 255
# Transfer functions of high dynamic range, by their numbers in H.273.
HDR = {16: "PQ", 18: "HLG"}
# Pixels that are taller or wider than this are a mistake of the file.
MOST_OBLONG = 16


# Where a frame is cut, from the top and from the left: in [0, 1), or None for the middle.
Place = tuple[float | None, float | None]


class Undecodable(Exception):
    """A file without a video frame that can be decoded."""


def check(transfer: int, ratio: Fraction | None) -> None:
    """Refuse what would be shown wrongly.

    Args:
        transfer: the number of the transfer function in H.273.
        ratio: the width of a pixel over its height.

    Raises:
        Undecodable: colours of high dynamic range, or pixels of an absurd shape.
    """
    if transfer in HDR:
        raise Undecodable(
            f"its colours are HDR ({HDR[transfer]}), which are not mapped to ordinary ones; convert it first"
        )
    if ratio and not 1 / MOST_OBLONG <= ratio <= MOST_OBLONG:
        raise Undecodable(f"its pixels are {ratio.numerator}:{ratio.denominator}; at most {MOST_OBLONG}:1 is read")


def upright_size(frame: av.VideoFrame, ratio: Fraction | None) -> tuple[int, int]:
    """Height and width as it is shown, in square pixels; ``ratio`` is the width of a pixel over its height."""
    height, width = frame.height, max(1, round(frame.width * (ratio or 1)))
    return (width, height) if _turns(frame)[0] else (height, width)


def to_rgb(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 ``[height, width, 3]``, upright."""
    turns = _turns(frame)
    if turns[0]:
        height, width = width, height
    frame = _opaque(_field(frame))
    return _turn(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA"), turns)


def window_to_rgb(frame: av.VideoFrame, share: tuple[float, float], at: Place, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``[*size, 3]``, upright: a window, ``share`` of the frame's height and width, that is cut out at ``at``
    before it is resized."""
    image = _turn(_opaque(_field(frame)).to_ndarray(format="rgb24"), _turns(frame))
    (height, width), (tall, wide) = image.shape[:2], share
    tall, wide = max(1, round(tall * height)), max(1, round(wide * width))
    top, left = offset(height - tall, at[0]), offset(width - wide, at[1])
    image = np.ascontiguousarray(image[top : top + tall, left : left + wide])
    cut = av.VideoFrame.from_ndarray(image, format="rgb24")
    return cut.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation="AREA")


def offset(room: int, at: float | None) -> int:
    """Where of ``room + 1`` places: ``at`` in [0, 1), or in the middle."""
    return room // 2 if at is None else int(at * (room + 1))


def _turns(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """From the display matrix: whether rows and columns change places, then rows are reversed, then columns."""
    try:
        parts: Any = frame.side_data
        data = parts.get(Type.DISPLAYMATRIX)
    except ValueError as error:
        # PyAV has no name for this kind (EXIF, 31): FFmpeg takes it out, and the others can be read.
        return _turns(_through(frame, "sidedata", mode="delete", type=str(error).split()[0]))
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _turn(image: np.ndarray, turns: tuple[bool, bool, bool]) -> np.ndarray:
    change, rows, columns = turns
    image = image.transpose(1, 0, 2) if change else image
    return image[:: -1 if rows else 1, :: -1 if columns else 1]


def _field(frame: av.VideoFrame) -> av.VideoFrame:
    """The upper field of an interlaced frame, which shows two moments in turn, line by line."""
    return _through(frame, "field", type="top") if frame.interlaced_frame and frame.height > 1 else frame


def _through(frame: av.VideoFrame, name: str, **options: str) -> av.VideoFrame:
    """What a filter of FFmpeg makes of the frame."""
    graph = Graph()
    base = frame.time_base or Fraction(1)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)
    chosen, sink = graph.add(name, **options), graph.add("buffersink")
    source.link_to(chosen)
    chosen.link_to(sink)
    graph.configure()
    source.push(frame)
    return cast(av.VideoFrame, sink.pull())


def _opaque(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame over BACKGROUND where it is transparent."""
    if not frame.format.has_palette and not any(part.is_alpha for part in frame.format.components):
        return frame
    image = frame.to_ndarray(format="rgba")
    alpha = image[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return frame
    mixed = (image[..., :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(mixed.astype(np.uint8), format="rgb24")
