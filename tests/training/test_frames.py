"""Frames are upright, of square pixels, opaque, of one field and of ordinary colours, or their file is refused."""

from __future__ import annotations

import logging
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from test_films import ffmpeg, needs_ffmpeg

from models.data.files import Item
from models.data.frames import BACKGROUND
from models.data.videos import VideoClips

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
# Grey, so that chroma planes, which programs scale differently, play no part.
RAMP = np.add.outer(3 * np.arange(48), 2 * np.arange(64))[..., None].repeat(3, 2).astype(np.uint8)


def frame_of(path: Path, size: tuple[int, int], **options) -> np.ndarray:
    options = {"frames": 1, "crop": "center", "positions": 1} | options
    clip = VideoClips([Item(path, 0)], (), "test", size=size, **options).clip(0, np.random.default_rng(0))[0]
    return clip[:, 0].transpose(1, 2, 0).astype(int)


def write(path: Path, image: np.ndarray, codec: str = "libx264", pix_fmt: str = "yuv420p", **changes) -> Path:
    """A film of four equal frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5, options=changes.pop("options", {}))
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = pix_fmt
        turn = changes.pop("turn", None)
        if turn is not None:
            stream.set_display_rotation(*turn)
        for name, value in changes.items():
            setattr(stream.codec_context, name, value)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def first_of_ffmpeg(path: Path, filters: str, size: tuple[int, int]) -> np.ndarray:
    raw = ffmpeg("-i", path, "-vf", filters, "-frames:v", 1, "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    return np.frombuffer(raw, np.uint8).reshape(*size, 3).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_pictures_are_upright_in_all_eight_orientations(tmp_path, suffix, orientation):
    picture = PIL.Image.fromarray(IMAGE)
    exif = picture.getexif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    picture.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    expected = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(tmp_path / f"a.{suffix}")))
    assert (frame_of(tmp_path / f"a.{suffix}", expected.shape[:2]) == expected).all()


@pytest.mark.parametrize("turn", [(degrees, flip, False) for degrees in (0, 90, 180, 270) for flip in (False, True)])
def test_films_are_upright_in_all_eight_orientations(tmp_path, turn):
    path = write(tmp_path / "a.mp4", IMAGE, pix_fmt="yuv444p", options={"crf": "5"}, turn=turn)
    expected = np.rot90(IMAGE, turn[0] // 90)
    expected = expected[:, ::-1] if turn[1] else expected
    assert np.abs(frame_of(path, expected.shape[:2]) - expected).mean() < 1
    # A film of the other shape is cut in its middle.
    assert frame_of(path, (16, 16)).shape == (16, 16, 3)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(1, 2), Fraction(4, 3), Fraction(10, 11)])
def test_pixels_that_are_not_square_are_stretched(tmp_path, ratio, suffix):
    path = write(tmp_path / f"a.{suffix}", RAMP, sample_aspect_ratio=ratio, options={"crf": "1"})
    size = (24, round(64 * ratio / 2))
    expected = first_of_ffmpeg(path, f"scale={size[1]}:{size[0]}:flags=area", size)
    assert np.abs(frame_of(path, size) - expected).max() <= 3
    turned = write(tmp_path / f"b.{suffix}", RAMP, sample_aspect_ratio=ratio, options={"crf": "1"}, turn=(90,))
    assert np.abs(frame_of(turned, size[::-1]) - np.rot90(expected)).max() <= 3


def test_pixels_of_an_absurd_shape_are_refused(tmp_path, caplog):
    path = write(tmp_path / "a.mkv", RAMP, sample_aspect_ratio=Fraction(30))
    with pytest.raises(ValueError, match="none of its 1 files"):
        frame_of(path, (24, 24))
    assert f"{path} cannot be decoded and is skipped: its pixels are 30:1" in caplog.text


def see_through() -> np.ndarray:
    """Green, a stripe of half-transparent black, and a magenta that nobody is to see."""
    image = np.zeros((32, 48, 4), np.uint8)
    image[:, :16], image[:, 16:32], image[:, 32:] = (0, 200, 0, 255), (0, 0, 0, 128), (255, 0, 255, 0)
    return image


def assert_over_the_background(frame: np.ndarray) -> None:
    assert np.abs(frame[16, 6] - (0, 200, 0)).max() <= 2
    assert np.abs(frame[16, 24] - BACKGROUND * 127 / 255).max() <= 3
    assert np.abs(frame[16, 42] - BACKGROUND).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_transparent_pictures_lie_over_the_background(tmp_path, suffix):
    PIL.Image.fromarray(see_through()).save(
        tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {})
    )
    assert_over_the_background(frame_of(tmp_path / f"a.{suffix}", (32, 48)))
    # What nobody is to see leaves no seam in smaller pictures either: green there is no less than red and blue.
    small = frame_of(tmp_path / f"a.{suffix}", (6, 9))
    assert (small[..., 1] >= small[..., 0] - 1).all()


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_transparent_colour_of_a_palette_shows_the_background(tmp_path, suffix):
    palette = PIL.Image.fromarray(see_through()).convert("RGB").quantize(4)
    palette.save(tmp_path / f"a.{suffix}", transparency=palette.getpixel((42, 6)))
    frame = frame_of(tmp_path / f"a.{suffix}", (32, 48))
    assert np.abs(frame[16, 6] - (0, 200, 0)).max() <= 3 and (frame[16, 42] == BACKGROUND).all()


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vp9.webm", "-c:v libvpx-vp9 -pix_fmt yuva420p"),
        ("vp8.webm", "-c:v libvpx -pix_fmt yuva420p -auto-alt-ref 0"),
        ("prores.mov", "-c:v prores_ks -pix_fmt yuva444p10le"),
        ("animation.mov", "-c:v qtrle -pix_fmt argb"),
        ("ffv1.mkv", "-c:v ffv1 -pix_fmt yuva444p"),
        ("deep.png", "-pix_fmt rgba64be -frames:v 1"),
    ],
)
def test_transparent_films_lie_over_the_background(tmp_path, name, options):
    PIL.Image.fromarray(see_through()).save(tmp_path / "a.png")
    ffmpeg("-loop", 1, "-t", 0.4, "-i", tmp_path / "a.png", *options.split(), tmp_path / name)
    assert_over_the_background(frame_of(tmp_path / name, (32, 48)))
    assert_over_the_background(frame_of(tmp_path / name, (32, 48), cache_bytes=0))


@needs_ffmpeg
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mpg", "mpeg2video"), ("a.mov", "prores_ks")])
def test_of_an_interlaced_film_one_field_is_shown(tmp_path, name, codec):
    """Squares that move: two fields woven into each other would show two of each, as a comb."""
    path, flags = tmp_path / name, ("-flags", "+ilme+ildct", "-b:v", "9M")
    moving = "nullsrc=s=64x48:r=50:d=0.6,geq=lum='16+200*between(X-mod(N*4,40),4,20)':cb=128:cr=128"
    ffmpeg("-f", "lavfi", "-i", moving, "-vf", "interlace", "-c:v", codec, *flags, path)
    expected = first_of_ffmpeg(path, "field=top,scale=64:48:flags=area", (48, 64))
    woven = first_of_ffmpeg(path, "null", (48, 64))
    frame = frame_of(path, (48, 64))
    assert np.abs(np.diff(woven[8:40], axis=0)).max() > 100 > 30 > np.abs(np.diff(frame[8:40], axis=0)).max()
    assert np.abs(frame - expected).max() <= 3
    assert (frame == frame_of(path, (48, 64), cache_bytes=0)).all()


@pytest.mark.parametrize(("number", "name"), [(16, "PQ"), (18, "HLG")])
def test_colours_of_high_dynamic_range_are_refused_by_name(tmp_path, caplog, number, name):
    path = write(tmp_path / "a.mp4", RAMP, pix_fmt="yuv420p10le", color_trc=number, color_primaries=9, colorspace=9)
    with pytest.raises(ValueError, match="none of its 1 files"):
        frame_of(path, (24, 32))
    assert f"{path} cannot be decoded and is skipped: its colours are HDR ({name})" in caplog.text


@pytest.mark.parametrize("shape", [(1, 15000), (15000, 1), (3, 900)])
def test_a_very_long_picture_is_cut_before_it_is_resized(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "a.png")
    begun = time.perf_counter()
    frames = [frame_of(tmp_path / "a.png", (256, 256), crop=crop) for crop in ("random", "center")]
    assert time.perf_counter() - begun < 5  # 68 GB of pixels would take longer
    assert frames[0].shape == frames[1].shape == (256, 256, 3) and (frames[0] != frames[1]).any()
    if min(shape) == 1:
        middle = image.reshape(-1, 3)[7499].tolist()
        assert all((frame == frame[0, 0]).all() for frame in frames) and frames[1][0, 0].tolist() == middle


PICTURES: dict[str, dict] = {name: {} for name in ("jpg", "gif", "png", "bmp", "tiff", "webp")}
PICTURES["jpeg"] = {"progressive": True}


@pytest.mark.parametrize("suffix", PICTURES)
def test_a_picture_that_is_cut_is_skipped_by_name(tmp_path, caplog, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / f"a.{suffix}", **PICTURES[suffix])
    data = (tmp_path / f"a.{suffix}").read_bytes()
    for number, ending in enumerate((b"", b"a maker's own data" * 9)):
        (tmp_path / f"{number}.{suffix}").write_bytes(data + ending)
        assert frame_of(tmp_path / f"{number}.{suffix}", (64, 96)).std() > 50
    for share in (0.3, 0.6, 0.9, 0.98):
        path = tmp_path / f"{share}.{suffix}"
        path.write_bytes(data[: int(share * len(data))])
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="none of its 1 files"):
            frame_of(path, (64, 96))
        assert f"{path} cannot be decoded and is skipped" in caplog.text
