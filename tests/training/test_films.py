"""The frames of films are those that their times say, and those that FFmpeg's own program shows."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from models.data import films
from models.data.files import Item
from models.data.films import Film, read_film
from models.data.frames import Undecodable
from models.data.videos import Kept, VideoClips

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed")
SIZE = (16, 32)


def numbered(count: int) -> np.ndarray:
    """Frame i shows i as eight bits, black or white, from the left."""
    bits = np.arange(count)[:, None] >> np.arange(8) & 1
    wide = np.where(bits, 235, 20).astype(np.uint8).repeat(8, axis=1)
    return np.broadcast_to(wide[:, None, :, None], (count, 32, 64, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames ``[n, H, W, 3]`` show."""
    bits = frames.reshape(len(frames), frames.shape[1], 8, -1, 3).mean((1, 3, 4)) > 127
    return (bits << np.arange(8)).sum(1).tolist()


def write(
    path: Path, times: list[int], base: Fraction = Fraction(1, 25), codec: str = "libx264", **options: str
) -> Path:
    """A film that shows its frames at ``times`` x ``base`` seconds."""
    with av.open(str(path), "w", options=options.pop("muxer", None)) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.time_base = base
        for time, image in zip(times, numbered(len(times)), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ffmpeg(*arguments: object) -> bytes:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def shown_by_ffmpeg(path: Path, *filters: str) -> list[int]:
    raw = ffmpeg(
        "-i", path, "-map", "0:v:0", *filters, "-vsync", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"
    )
    return numbers(np.frombuffer(raw, np.uint8).reshape(-1, 32, 64, 3))


def source(path: Path, cached: bool, **options) -> VideoClips:
    options = {"frames": 5, "size": SIZE, "crop": "center", "cache_bytes": (1 << 30) if cached else 0} | options
    return VideoClips([Item(path, 0)], (), "test", **options)


def clip_numbers(clips: VideoClips, seed: int) -> list[int]:
    return numbers(clips.clip(0, np.random.default_rng(seed))[0].transpose(1, 2, 3, 0))


def all_frames(path: Path, **options) -> list[int]:
    """What the whole film shows, from the cache."""
    count = read_film(path).count(options.get("fps", 0))
    return clip_numbers(source(path, True, frames=count, positions=1, **options), 0)


GOP = {"g": "10", "bf": "3", "b_strategy": "0", "sc_threshold": "0"}


def constant(folder: Path) -> Path:
    return write(folder / "a.mp4", list(range(64)), **GOP)


def edit_list(folder: Path) -> Path:
    """Cut without decoding: an edit list hides the frames before 0.5 seconds."""
    ffmpeg("-ss", "0.5", "-i", constant(folder), "-c", "copy", folder / "cut.mp4")
    return folder / "cut.mp4"


def edit_list_mov(folder: Path) -> Path:
    ffmpeg("-ss", "1.3", "-i", constant(folder), "-c", "copy", folder / "cut.mov")
    return folder / "cut.mov"


def late(folder: Path) -> Path:
    return write(folder / "late.mkv", [500 + i for i in range(60)], **GOP)


def slow_at_the_end(folder: Path) -> Path:
    return write(folder / "vfr.mp4", [*range(20), *range(40, 160, 4)], **GOP)


def fast_at_the_start(folder: Path) -> Path:
    return write(folder / "vfr.mkv", [*range(20), *range(100, 400, 10)], **GOP)


def no_duration(folder: Path) -> Path:
    """As a browser records: no duration, no number of frames, no index."""
    return write(folder / "live.webm", list(range(60)), codec="libvpx", g="12", muxer={"live": "1"})


def hidden_packets(folder: Path) -> Path:
    """VP8 with packets that are decoded, but never shown."""
    with av.open(str(no_duration(folder))) as container, av.open(str(folder / "hidden.webm"), "w") as hidden:
        stream = hidden.add_stream_from_template(container.streams.video[0])
        for number, packet in enumerate(packet for packet in container.demux(video=0) if packet.size):
            data = bytes(packet)
            new = av.Packet(bytes([data[0] & ~16]) + data[1:] if number % 12 == 5 else data)
            new.pts, new.dts, new.time_base, new.stream = packet.pts, packet.dts, packet.time_base, stream
            new.is_keyframe = packet.is_keyframe
            hidden.mux(new)
    return folder / "hidden.webm"


def mpeg_ts(folder: Path) -> Path:
    return write(folder / "a.ts", list(range(60)), **GOP)


def mpeg_ts_of_one_key(folder: Path) -> Path:
    return write(folder / "one.ts", list(range(40)), **GOP | {"g": "400"})


def mpeg_ts_twice(folder: Path) -> Path:
    """Two films in a row, whose times begin again."""
    whole = mpeg_ts(folder).read_bytes()
    (folder / "twice.ts").write_bytes(whole + whole)
    return folder / "twice.ts"


def mpeg_2(folder: Path) -> Path:
    return write(folder / "a.mpg", list(range(60)), codec="mpeg2video", g="12", bf="2")


def avi(folder: Path) -> Path:
    return write(folder / "a.avi", list(range(60)), codec="mpeg4", g="12", bf="2")


def raw(folder: Path) -> Path:
    ffmpeg("-i", constant(folder), "-c", "copy", folder / "a.h264")
    return folder / "a.h264"


def open_gop(folder: Path) -> Path:
    return write(folder / "open.mp4", list(range(64)), **GOP, **{"x264-params": "open-gop=1"})


def hevc(folder: Path) -> Path:
    return write(folder / "hevc.mp4", list(range(64)), codec="libx265", **{"x265-params": "keyint=10:log-level=none"})


def gif(folder: Path) -> Path:
    ffmpeg("-i", constant(folder), folder / "a.gif")
    return folder / "a.gif"


def truncated(suffix: str, part: float):
    def make(folder: Path) -> Path:
        options = {"movflags": "frag_keyframe+empty_moov"} if suffix == "mp4" else None
        codec = {"codec": "libvpx", "g": "10"} if suffix == "webm" else GOP
        whole = write(folder / f"whole.{suffix}", list(range(64)), **codec, muxer=options).read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[: int(len(whole) * part)])
        return folder / f"cut.{suffix}"

    make.__name__ = f"truncated_{suffix}_{part}"
    return make


def damaged(folder: Path) -> Path:
    """Zeros in the middle of a film."""
    data = bytearray(constant(folder).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (folder / "damaged.mp4").write_bytes(data)
    return folder / "damaged.mp4"


def without_its_beginning(folder: Path) -> Path:
    whole = mpeg_ts(folder).read_bytes()
    (folder / "late.ts").write_bytes(whole[len(whole) // 188 // 3 * 188 :])
    return folder / "late.ts"


CASES = [
    *(
        constant,
        edit_list,
        edit_list_mov,
        late,
        slow_at_the_end,
        fast_at_the_start,
        no_duration,
        hidden_packets,
        mpeg_ts,
    ),
    *(mpeg_ts_of_one_key, mpeg_ts_twice, mpeg_2, avi, raw, open_gop, hevc, gif, truncated("mkv", 0.6)),
    *(truncated("mp4", 0.7), truncated("ts", 0.55), truncated("webm", 0.5), without_its_beginning),
]


@needs_ffmpeg
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_clips_are_those_of_ffmpeg_whether_the_film_fits_the_cache_or_not(tmp_path, make):
    path = make(tmp_path)
    shown = shown_by_ffmpeg(path)
    assert len(set(shown)) > 15
    assert all_frames(path) == shown
    seen = set()
    for stride in (1, 3):
        cached, sought = source(path, True, stride=stride), source(path, False, stride=stride)
        for seed in range(12):
            clip = clip_numbers(cached, seed)
            assert clip == clip_numbers(sought, seed)
            assert any(clip == shown[start : start + 5 * stride : stride] for start in range(len(shown)))
            seen.add(tuple(clip))
        assert sought._cache.held == 0 < cached._cache.held
    assert len(seen) > 12


@needs_ffmpeg
def test_a_damaged_film_is_the_same_from_the_cache_and_not_and_is_named(tmp_path, caplog):
    path = damaged(tmp_path)
    whole = all_frames(path)
    # What needs the lost frames is left out, and the frame before it held, up to the next key.
    assert whole[:45] == list(range(45)) and whole[-3:] == [61, 62, 63] and whole == sorted(whole) and len(whole) == 64
    assert whole != list(range(64)) and f"{path} is damaged" in caplog.text
    cached, sought = source(path, True), source(path, False)
    for seed in range(40):
        clips = [part.clip(0, np.random.default_rng(seed))[0] for part in (cached, sought)]
        assert (clips[0] == clips[1]).all()


@needs_ffmpeg
@pytest.mark.parametrize("fps", [12.5, 30])
@pytest.mark.parametrize("make", [edit_list, late, slow_at_the_end, no_duration, mpeg_ts])
def test_films_are_brought_to_one_rate_as_ffmpeg_does(tmp_path, make, fps):
    """A frame is what is on the screen at its moment: FFmpeg's filter fps, where it rounds times up."""
    path = make(tmp_path)
    shown = shown_by_ffmpeg(path, "-vf", f"fps={fps}:round=up")
    ours = all_frames(path, fps=fps)
    assert abs(len(ours) - len(shown)) <= 1 and ours[: len(shown)] == shown[: len(ours)]
    for seed in range(4):
        cached, sought = source(path, True, fps=fps, stride=2), source(path, False, fps=fps, stride=2)
        assert clip_numbers(cached, seed) == clip_numbers(sought, seed)


def test_films_of_several_rates_are_named_once_unless_they_are_brought_to_one(tmp_path, caplog):
    for name, step in (("a", 1), ("b", 2), ("c", 1), ("d", 4)):
        write(tmp_path / f"{name}.mp4", list(range(0, 20 * step, step)))
    items = [Item(path, 0) for path in sorted(tmp_path.iterdir())]

    def warnings(**options) -> list[str]:
        caplog.clear()
        clips = VideoClips(items, (), "test", **({"frames": 4, "size": SIZE} | options))
        for index in range(8):
            clips.clip(index % 4, np.random.default_rng(0))
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    assert warnings() == [
        f"{tmp_path}/b.mp4 has 12.5 frames per second, {tmp_path}/a.mp4 has 25: "
        "their clips show unequal spans of time; --data.fps brings all to one rate"
    ]
    assert warnings(fps=25) == warnings(frames=1) == []
    items = items[::2]
    assert warnings() == []


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_memory_stays_within_the_cache(tmp_path, suffix):
    """A film of 3.9 MB that says how long it is, or does not; a cache that holds half of it, or two smaller ones."""
    options = {"muxer": {"live": "1"}, "codec": "libvpx"} if suffix == "webm" else {}
    long = write(tmp_path / f"long.{suffix}", list(range(160)), **options)
    short = [write(tmp_path / f"{number}.mp4", list(range(40))) for number in range(4)]
    items = [Item(path, 0) for path in (long, *short)]
    clips = VideoClips(items, (), "test", frames=4, size=(64, 128), cache_bytes=2 << 20)
    tracemalloc.start()
    for seed in range(20):
        clips.clip(seed % 5, np.random.default_rng(seed))
        assert clips._cache.held == sum(frames.nbytes for frames in clips._cache.values.values()) <= 2 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(clips._cache.values) == short[2:]
    # What is kept, a clip and its copy (0.2 MB) and the file's buffer.
    assert (1 << 20) < peak < (2 << 20) + (1 << 19)


def test_a_full_cache_takes_one_more_in_constant_time():
    kept = Kept(10_000 * 100)
    for number in range(10_000):
        kept.put(Path(str(number)), np.empty(100, np.uint8))
    calls: list[object] = []
    sys.setprofile(lambda *event: calls.append(event))
    kept.put(Path("more"), np.empty(100, np.uint8))
    sys.setprofile(None)
    assert len(kept.values) == 10_000 and kept.held == kept.limit and len(calls) < 100
    assert kept.get(Path("0")) is None and kept.get(Path("more")) is not None


def test_a_film_without_a_frame_is_refused_by_name(tmp_path):
    for name, data in (("empty.mp4", b""), ("text.mp4", b"no video")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Undecodable):
            read_film(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(Undecodable, match="no video stream"):
        read_film(tmp_path / "sound.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(Undecodable, match="not a regular file"):
        read_film(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n"]
)
def test_a_file_opens_no_other_file(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.mp4", list(range(20)))
    for suffix in ("mp4", "m3u8"):
        (tmp_path / f"list.{suffix}").write_text(text)
        with pytest.raises(Undecodable):
            read_film(tmp_path / f"list.{suffix}")


def test_a_name_is_a_file_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    for name in ("a:b/x.mp4", "concat:other.mp4|other.mp4", "f%03d.mp4", "-i.mp4"):
        assert all_frames(write(tmp_path / "other.mp4", list(range(20))).rename(name)) == list(range(20))


@pytest.mark.parametrize("place", ["open", "decode"])
def test_too_little_memory_is_not_taken_for_damage(tmp_path, monkeypatch, place):
    path = write(tmp_path / "a.mp4", list(range(20)))

    def fail(*arguments, **options):
        raise av.error.FFmpegError(errno.ENOMEM, "Cannot allocate memory")

    class Decoder:
        decode = fail

    if place == "open":
        monkeypatch.setattr(av, "open", fail)
    else:
        monkeypatch.setattr(films, "_decoder", lambda *arguments: Decoder())
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        source(path, True).clip(0, np.random.default_rng(0))


def test_a_frame_of_an_absurd_time_takes_no_memory():
    pts = np.array([0, 1, 2, 1 << 62])
    film = Film(pts, (1 << 62) + (1 << 40), Fraction(1, 1000), np.empty((0, 4), np.int64), True, 32, 64)
    assert film.used(30).tolist() == [0, 2, 3] and film.count(30) > 1 << 56
    assert film.shown(30, np.array([0, 1, 10**15, film.count(30) - 1])).tolist() == [0, 2, 2, 3]
