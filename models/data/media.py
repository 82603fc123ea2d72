"""Clips as files: contact sheets as PNG, mosaics as MP4 and GIF, and the clips themselves as npz.

A file is encoded in memory and has its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from torch import Tensor

from ..runtime.files import locked, whole_file, write_whole

SMALLEST_SIDE = 128
# FFmpeg's number of the matrix, of the primaries and of the transfer curve.
BT709 = 1
# A frame of a GIF lasts hundredths of a second, and viewers take fewer than two for ten.
FASTEST_GIF = 50
FORMATS = ("mp4", "gif", "png", "npz")
_log = logging.getLogger(__name__)


def enlarge(clips: np.ndarray) -> np.ndarray:
    """Pixels repeated by a whole number so that the shorter side of ``[..., H, W, C]`` is 128 or more; RGB."""
    factor = -(-SMALLEST_SIDE // min(clips.shape[-3:-1]))
    clips = clips.repeat(factor, axis=-3).repeat(factor, axis=-2)
    return clips.repeat(3, axis=-1) if clips.shape[-1] == 1 else clips


def contact_sheet(clips: np.ndarray, gap: int = 4) -> np.ndarray:
    """uint8 ``[N, T, H, W, C]`` as one RGB image: a row a sample, a column a frame."""
    clips = enlarge(clips)
    count, frames, height, width, _ = clips.shape
    sheet = np.full((count * (height + gap) - gap, frames * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, clip in enumerate(clips):
        for j, frame in enumerate(clip):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = frame
    return sheet


def mosaic(clips: np.ndarray, gap: int = 4) -> np.ndarray:
    """uint8 ``[N, T, H, W, C]`` as one RGB clip ``[T, H', W', 3]`` with the samples side by side, about square.

    H' and W' are even, as H.264 wants them.
    """
    clips = enlarge(clips)
    count, frames, height, width, _ = clips.shape
    columns = min(count, max(1, round((count * height / width) ** 0.5)))
    rows = -(-count // columns)
    tall, wide = rows * (height + gap) - gap, columns * (width + gap) - gap
    film = np.full((frames, tall + tall % 2, wide + wide % 2, 3), 255, dtype=np.uint8)
    for i, clip in enumerate(clips):
        top, left = (height + gap) * (i // columns), (width + gap) * (i % columns)
        film[:, top : top + height, left : left + width] = clip
    return film


def write_png(path: Path, image: np.ndarray) -> None:
    """RGB uint8 ``[H, W, 3]`` as a PNG file."""
    write_whole(path, _png(image))


def _png(image: np.ndarray) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    packets = encoder.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + encoder.encode(None)
    return b"".join(bytes(packet) for packet in packets)


def write_mp4(path: Path, film: np.ndarray, fps: int) -> None:
    """RGB uint8 ``[T, H, W, 3]``, H and W even, as H.264, or as MPEG-4 where this FFmpeg has no H.264 encoder.

    Colours are those of BT.709 in limited range, and the file says so.
    """
    write_whole(path, _mp4(film, fps))


def _mp4(film: np.ndarray, fps: int) -> bytes:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = film.shape[1:3]
        stream.pix_fmt = "yuv420p"
        colours = stream.codec_context
        colours.colorspace = colours.color_primaries = colours.color_trc = BT709
        colours.color_range = ColorRange.MPEG
        if codec == "libx264":
            stream.options = {"crf": "14"}
        else:
            stream.bit_rate = 8_000_000
        for image in film:
            # The mean of four pixels is the chroma of all of them; the default, bicubic, rings by 4 levels at edges.
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.AREA,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


def write_gif(path: Path, film: np.ndarray, fps: int) -> None:
    """RGB uint8 ``[T, H, W, 3]`` as an endless GIF with a palette of its own."""
    write_whole(path, _gif(film, fps))


def _gif(film: np.ndarray, fps: int) -> bytes:
    if fps > FASTEST_GIF:
        _log.warning("fps is %d; a GIF of more than %d is played at 10 by most viewers", fps, FASTEST_GIF)
    height, width = film.shape[1:3]
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=VideoFormat("rgb24"), time_base=Fraction(1, fps))
    split, palette = graph.add("split"), graph.add("palettegen")
    use, sink = graph.add("paletteuse"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    content = io.BytesIO()
    with av.open(content, "w", format="gif", options={"loop": "0"}) as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for number, image in enumerate(film):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            source.push(frame)
        source.push(None)
        for _ in film:
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode(None))
    return content.getvalue()


def write_samples(
    folder: Path,
    clips: np.ndarray,
    labels: Tensor | list[str] | None,
    classes: list[str],
    fps: int,
    *,
    overwrite: bool = True,
) -> list[Path]:
    """The four files for uint8 clips ``[N, T, H, W, C]``: all of them, or none if one cannot be written.

    The npz has ``clips`` and ``labels``, captions or class ids, and besides ids ``classes``, the names that they count.
    Latents, float32, have the npz alone.

    Raises:
        ValueError: files that are there already, without ``overwrite``.
        OSError: a file that cannot be written, or another process that writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = []
    if clips.dtype == np.uint8:
        film = mosaic(clips)
        contents = [_mp4(film, fps), _gif(film, fps), _png(contact_sheet(clips))]
    paths = output_paths(folder)[len(FORMATS) - 1 - len(contents) :]
    arrays: dict[str, Any] = {} if labels is None else {"labels": np.asarray(labels)}
    if classes:
        arrays["classes"] = np.asarray(classes)
    with locked(folder), contextlib.ExitStack() as stack:
        if not overwrite:
            refuse_present(folder)
        files = [stack.enter_context(whole_file(path)) for path in paths]
        for file, content in zip(files[:-1], contents, strict=True):
            file.write(content)
        np.savez_compressed(files[-1], clips=clips, **arrays)
        for file in files:  # before the first has its name
            file.flush()
            os.fsync(file.fileno())
    return paths


def refuse_present(folder: Path) -> None:
    """Raises ValueError if one of the four files is there."""
    present = [str(file) for file in output_paths(folder) if file.exists()]
    if present:
        raise ValueError(f"{', '.join(present)} exists already; use --overwrite or another --out")


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """``clips`` and, where there are, ``labels`` of an npz that :func:`write_samples` wrote.

    Labels are captions or names of classes, or class ids of a file that has no ``classes``.

    Raises:
        ValueError: something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with np.load(path) as arrays:
            clips, labels, classes = arrays["clips"], arrays.get("labels"), arrays.get("classes")
    except (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz with clips: {error}") from error
    if clips.dtype not in (np.uint8, np.float32) or clips.ndim != 5:
        raise ValueError(
            f"{path} has clips of {clips.dtype} {list(clips.shape)}; they must be uint8 [N, T, H, W, C], or latents in "
            "float32"
        )
    if labels is not None and labels.shape != clips.shape[:1]:
        raise ValueError(f"{path} has labels of shape {list(labels.shape)}; it must be [{len(clips)}]")
    if labels is None or classes is None:
        return clips, labels
    if classes.dtype.kind != "U" or classes.ndim != 1:
        raise ValueError(f"{path} has classes of {classes.dtype} {list(classes.shape)}; they must be a list of names")
    if labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(len(classes))).all():
        raise ValueError(f"{path} has labels {labels.tolist()}; with its classes they must be in 0..{len(classes) - 1}")
    return clips, classes[labels]


def output_paths(folder: Path) -> list[Path]:
    return [folder / f"samples.{suffix}" for suffix in FORMATS]
