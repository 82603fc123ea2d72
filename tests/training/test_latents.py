"""Latents made beforehand: the files survive a crash and show damage; training, previews and samples use them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.data.pixels import to_bytes
from models.protocols import Autoencoder, BaseSettings, Denoiser
from models.sampling.sampler import SampleRequest

pytest.importorskip("safetensors")

from models import checkpoint as checkpoints
from models import precompute, registry, sample
from models.data.batches import Batches
from models.data.config import DataConfig
from models.data.encoder import Decoder, identify, open_encoder
from models.data.latents import LatentClips, read_index, write_shard
from models.data.media import write_mp4, write_png
from models.data.moving_digits import MovingDigits
from models.data.open import open_source
from models.data.pixels import to_float
from models.denoisers.cascade import Cascade
from models.denoisers.cascade_config import CascadeSettings
from models.denoisers.dit import DiTSettings
from models.denoisers.walt import WALT
from models.denoisers.walt_config import WALTSettings
from models.objectives.ddpm import DDPM
from models.objectives.logsnr import LogSNR
from models.precompute import PrecomputeConfig, main, run
from models.runtime.files import locked
from models.runtime.plain import as_plain, merge
from models.sample import SampleConfig
from models.sampling import sampler as samplers
from models.train import parse
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig
from models.training.run import train
from models.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
DIGITS = DataConfig(frames=2, size=(12, 16))
MODEL = DiTSettings(width=16, depth=2, heads=2, patch=(1, 4, 4))
LATENT = replace(MODEL, patch=(1, 2, 2))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch):
    """22 digits instead of 1438."""
    original = MovingDigits.__init__

    def init(self, **options):
        original(self, **options)
        self.images, self.labels = self.images[:22], self.labels[:22]

    monkeypatch.setattr(MovingDigits, "__init__", init)


def pixels(folder: Path, **changes) -> PrecomputeConfig:
    options = {"data": DIGITS, "precision": "fp32", "shard_clips": 8, "batch_size": 3} | changes
    return PrecomputeConfig(folder, "pixels", **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def videos(folder: Path) -> DataConfig:
    """Five clips of two classes, from which nothing is drawn at random."""
    generator = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0", "b/1", "b/2"):
        path = folder / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = generator.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
        write_mp4(path, blocks.repeat(4, axis=1).repeat(4, axis=2), 8)
    return DataConfig(source=str(folder), frames=3, size=(16, 16), crop="center", positions=1)


@dataclass(frozen=True)
class ShuffleSettings(BaseSettings):
    autoencoder: ClassVar[bool] = True
    name: ClassVar[str] = "shuffle"


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig(ShuffleSettings):
    input_size: tuple[int, ...]
    channels: int
    num_classes: int = 0


class Shuffle(Autoencoder):
    """An autoencoder without loss: 2x2 pixels to channels, times a weight."""

    def __init__(self, config: ShuffleConfig) -> None:
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.tensor(3.0))

    def encode(self, x):
        return F.pixel_unshuffle(x.transpose(1, 2), 2).transpose(1, 2) * self.weight

    def decode(self, z):
        return F.pixel_shuffle(z.transpose(1, 2) / self.weight, 2).transpose(1, 2)


def autoencoder(folder: Path, monkeypatch, *, weight: float = 3.0) -> Path:
    """A checkpoint of it."""
    family = registry.Family(ShuffleSettings, ShuffleConfig, Shuffle, {})
    monkeypatch.setitem(registry.FAMILIES, "shuffle", family)
    config = ShuffleConfig(input_size=(2, 12, 16), channels=1)
    state = {"weight": torch.tensor(weight)}
    folder.mkdir()
    saved = checkpoints.Checkpoint(as_plain(TrainConfig()), as_plain(config), [], 7, state, state, {}, {})
    return checkpoints.save(folder, saved, keep=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_clips_come_back(tmp_path, precision):
    index = read_index(run(pixels(tmp_path / "z", precision=precision, passes=2, seed=3)).parent)
    assert [entry["count"] for entry in index["shards"]] == [8, 8, 8, 8, 8, 4]
    source, latents = MovingDigits(frames=2, size=(12, 16)), LatentClips(tmp_path / "z")
    assert latents.shape == source.shape and latents.classes == source.classes and len(latents) == 2 * len(source) == 44
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    clips = []
    for number in range(len(latents)):
        epoch, item = divmod(number, len(source))
        clip, label = source.clip(item, np.random.default_rng((3, epoch, item)))
        got, got_label = latents.clip(number, np.random.default_rng(99))
        expected = to_float(torch.from_numpy(clip)).to(dtype).float()
        assert got.dtype == np.float32 and torch.equal(torch.from_numpy(got), expected) and got_label == label
        clips.append(expected)
    assert index["mean"] == pytest.approx([torch.stack(clips).double().mean().item()])
    assert index["std"] == pytest.approx([torch.stack(clips).double().std(correction=0).item()])


class Killed(BaseException):
    pass


def kill(*_):
    raise Killed


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after it"])
def test_an_interrupted_run_goes_on_and_gives_the_same_files(tmp_path, monkeypatch, after):
    run(pixels(tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    assert set(whole) == {"index.json", *(f"shard_0000{number}.safetensors" for number in range(3))}
    original, done = os.replace, []

    def replace_or_die(source, target):
        if len(done) == fatal and not after:
            raise Killed
        original(source, target)
        done.append(target)
        if len(done) == fatal + 1:
            raise Killed

    # Each of the three shards and of their entries, and the index.
    for fatal in range(7):
        done.clear()
        folder = tmp_path / f"{fatal}"
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", replace_or_die)
            with pytest.raises(Killed):
                run(pixels(folder))
        # All that a kill leaves: a file that was not renamed is still there, nothing was cleaned up.
        assert len(list(folder.glob("*.tmp"))) == (not after)
        if fatal < 6 or not after:
            with pytest.raises(ValueError, match=r"are not finished|no file ending"):
                open_source(DataConfig(str(folder), frames=2, size=(12, 16)))
        run(pixels(folder))
        assert contents(folder) == whole


def test_a_killed_process_goes_on(tmp_path, monkeypatch):
    monkeypatch.undo()  # all digits, as in the process
    folder = tmp_path / "killed"
    options = [
        "--encoder",
        "pixels",
        "--data.frames",
        "2",
        "--shard-clips",
        "20",
        "--batch-size",
        "1",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "models.precompute", "--out", str(folder), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (folder / "shard_00005.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "index.json").exists()
    shard = folder / "shard_00003.safetensors"
    written = shard.stat().st_mtime_ns
    main(["--out", str(folder), *options])
    assert shard.stat().st_mtime_ns == written
    main(["--out", str(tmp_path / "whole"), *options])
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_damaged_shard_is_made_again_when_a_run_goes_on(tmp_path, monkeypatch, caplog):
    run(pixels(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("models.precompute.moments", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(pixels(tmp_path / "z"))
    damage(tmp_path / "z/shard_00001.safetensors")
    run(pixels(tmp_path / "z"))
    assert "shard_00001.safetensors are damaged" in caplog.text
    assert contents(tmp_path / "z") == contents(tmp_path / "whole")


def test_a_folder_of_other_options_is_refused(tmp_path, monkeypatch):
    finished, stopped = tmp_path / "finished", tmp_path / "stopped"
    run(pixels(finished))
    with monkeypatch.context() as patch:
        patch.setattr("models.precompute.moments", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(pixels(stopped))
    encoder = autoencoder(tmp_path / "encoder", monkeypatch)
    for folder in (finished, stopped):
        before = contents(folder)
        for changes, differs in (
            ({"seed": 1}, "seed"),
            ({"precision": "fp16"}, "precision"),
            ({"shard_clips": 9, "passes": 2}, "passes, shard_clips"),
            ({"data": replace(DIGITS, size=(16, 12))}, "data.size"),
        ):
            with pytest.raises(ValueError, match=f"holds latents of other options: {differs} differ"):
                run(pixels(folder, **changes))
        with pytest.raises(ValueError, match="encoder differ"):
            run(replace(pixels(folder), encoder=str(encoder)))
        assert contents(folder) == before
    written = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
    assert run(pixels(finished)) == finished / "index.json"
    assert {file: file.stat().st_mtime_ns for file in finished.iterdir()} == written
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files, notes\.txt for one"):
        run(pixels(tmp_path / "other"))
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_files_that_changed_are_other_options(tmp_path):
    data = videos(tmp_path / "videos")
    run(pixels(tmp_path / "z", data=data))
    write_mp4(tmp_path / "videos/a/0.mp4", np.zeros((9, 16, 24, 3), dtype=np.uint8), 8)
    with pytest.raises(ValueError, match="other options: files differ"):
        run(pixels(tmp_path / "z", data=data))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_damage_is_named_and_refused_before_training(tmp_path):
    config = TrainConfig(run=str(tmp_path / "run"), model=MODEL, steps=1, batch_size=22)
    for name, harm, reason in (
        ("flipped", damage, r"shard_00001\.safetensors are damaged: the checksum"),
        (
            "short",
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"shard_00001\.safetensors are damaged: .* bytes",
        ),
        ("missing", lambda path: path.unlink(), r"shard_00001\.safetensors are missing"),
    ):
        folder = run(pixels(tmp_path / name)).parent
        harm(folder / "shard_00001.safetensors")
        with pytest.raises(ValueError, match=reason):
            train(merge(config, {"data": {"source": str(folder)}}))
        assert not (tmp_path / "run").exists()
    # A shard that is whole is still read: the checksum is of each when it is first read.
    latents = LatentClips(tmp_path / "flipped")
    latents.clip(7, np.random.default_rng(0))
    with pytest.raises(ValueError, match="checksum"):
        latents.clip(8, np.random.default_rng(0))


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    path = run(pixels(tmp_path / "z"))
    whole = json.loads(path.read_text())
    for text, reason in (
        (path.read_text()[:-9], "is damaged"),
        ("[]", "was not written by models.precompute"),
        (json.dumps(whole | {"format": 2}), "has format version 2; this code reads version 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            open_source(DataConfig(str(tmp_path / "z"), frames=2, size=(12, 16)))


def changes(value, path=()):
    """A JSON value without one of its parts, or with another in its place, and what was changed: all ways of a few."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key), {name: item for name, item in value.items() if name != key}
            for where, other in changes(part, (*path, key)):
                yield where, {**value, key: other}
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield path, value[1:]
        for where, other in changes(value[0], (*path, 0)):
            yield where, [other, *value[1:]]
    else:
        others = [None, -1, 1.5, "x", True, [], {}, [float("nan")], 10**9, [0, 1, 2, 3]]
        yield from ((path, other) for other in others if other != value or type(other) is not type(value))


# What may be changed by itself without a contradiction in the index, if its checksum is taken away as well.
FREE = {
    "path",
    "seed",
    "shard_clips",
    "batch_size",
    "files",
    "data",
    "pixels",
    "bytes",
    "sha256",
    "classes",
    "captions",
}


def test_every_field_of_an_index_is_checked(tmp_path, caplog):
    path = run(pixels(tmp_path / "z", low=2, normalize=True))
    content = path.read_bytes()
    index = json.loads(content)
    rng = random.Random(0)
    for _ in range(100):
        copy = bytearray(content)
        copy[rng.randrange(len(copy))] ^= rng.randrange(1, 256)
        path.write_bytes(copy)
        with pytest.raises(ValueError, match=r"z/index\.json (is damaged|was not written|has format)"):
            pytest.fail(str(read_index(path.parent)))
    accepted = set()
    for where, changed in changes(index):
        # With the checksum of before, and without, as an older version wrote it.
        for values in (changed, {key: value for key, value in changed.items() if key != "sha256"}):
            path.write_text(json.dumps(values, indent=1) + "\n")
            try:
                LatentClips(path.parent).clip(0, np.random.default_rng(0))
            except ValueError as error:
                assert "z/" in str(error) or "\n" not in str(error)
            else:
                assert "sha256" not in values
                accepted.add(where)
    # Without the field it has its default; a number of another value may be right.
    optional = {("low",), ("buckets",), ("empty_classes",), ("made", "low"), ("sha256",)}
    wrong = {where for where in accepted - optional if where[-1] not in FREE and where[:2] != ("made", "data")}
    assert not wrong
    path.write_text(json.dumps({key: value for key, value in index.items() if key != "sha256"}))
    caplog.clear()
    assert len(LatentClips(path.parent)) == 22 and "has no checksum" in caplog.text


def test_files_of_others_are_never_overwritten(tmp_path):
    (tmp_path / "z").mkdir()
    other = tmp_path / "z" / "shard_00000.safetensors"
    other.write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds other files, shard_00000"):
        run(pixels(tmp_path / "z"))
    assert contents(tmp_path / "z") == {other.name: b"mine"}


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    (tmp_path / "z").mkdir()
    with locked(tmp_path / "z"), pytest.raises(BlockingIOError, match="z is in use: another process writes there"):
        run(pixels(tmp_path / "z"))
    assert contents(tmp_path / "z") == {}
    with pytest.raises(ValueError, match="encoder is"):
        run(replace(pixels(tmp_path / "new" / "z"), encoder=str(tmp_path / "nowhere")))
    assert not (tmp_path / "new").exists()
    run(pixels(tmp_path / "z"))


def test_training_on_stored_pixels_is_training_on_the_source(tmp_path):
    data = videos(tmp_path / "videos")
    run(pixels(tmp_path / "z", data=data, shard_clips=2))
    optimizer = OptimizerConfig(learning_rate=1e-2)
    config = TrainConfig(data=data, model=MODEL, optimizer=optimizer, batch_size=2, precision="bf16")
    losses = []
    for source in (data.source, str(tmp_path / "z")):
        trainer = Trainer(merge(config, {"data": {"source": source}}))
        losses.append([trainer.train_step()[0].item() for _ in range(8)])
        trainer.batches.close()
    assert losses[0] == losses[1] and len(set(losses[0])) == 8


def test_digits_are_the_same_for_as_many_epochs_as_there_are_passes(tmp_path):
    run(pixels(tmp_path / "z", seed=4))
    config = TrainConfig(data=DIGITS, model=MODEL, batch_size=11, seed=4)
    batches = []
    for source in ("digits", str(tmp_path / "z")):
        trainer = Trainer(merge(config, {"data": {"source": source}}))
        batches.append([trainer.batches.batch(step)[0] for step in range(4)])
        trainer.batches.close()
    assert [torch.equal(*pair) for pair in zip(*batches, strict=True)] == [True, True, False, False]


def test_options_that_the_latents_do_not_have_are_refused(tmp_path):
    run(pixels(tmp_path / "z"))
    source = str(tmp_path / "z")
    for same in ({}, {"frames": 2, "size": (12, 16)}):
        options = {"frames": 8, "size": (16, 16)} | same
        assert open_source(DataConfig(source, **options)).shape == (1, 2, 12, 16)
    others = (("size", (32, 32), r"\[12, 16\]"), ("stride", 2, "1"), ("fps", 8.0, "0.0"), ("crop", "center", "random"))
    for name, value, made in others:
        with pytest.raises(ValueError, match=f"data.{name} is .*; the latents in .* were made with {made}"):
            open_source(DataConfig(source, **({"frames": 8, "size": (16, 16)} | {name: value})))
    with pytest.raises(
        ValueError, match=r"data.buckets is \(\(2, 12, 16\),\); the latents in .* with one size, \(2, 12"
    ):
        Trainer(TrainConfig(data=DataConfig(source, buckets=((2, 12, 16),)), model=MODEL, batch_tokens=99))
    with pytest.raises(ValueError, match="holds latents already"):
        run(pixels(tmp_path / "again", data=DataConfig(source)))


BUCKETS = ((2, 12, 16), (1, 16, 24), (4, 12, 12))
BUCKETED = replace(DIGITS, buckets=BUCKETS)


def test_buckets_are_trained_on_as_those_of_the_source(tmp_path, capsys):
    folder = str(tmp_path / "z")
    index = read_index(run(pixels(tmp_path / "z", data=BUCKETED, shard_clips=4, seed=4)).parent)
    # 22 digits: 8, 7 and 7, a shard holding clips of one bucket.
    names = [f"shard_0000{number}.safetensors" for number in range(6)]
    assert [entry["count"] for entry in index["shards"]] == [4, 4, 4, 3, 4, 3]
    shapes = [[1, *bucket] for bucket in BUCKETS]
    assert index["buckets"] == [
        {"pixels": shape, "shape": shape, "shards": names[2 * i : 2 * i + 2]} for i, shape in enumerate(shapes)
    ]
    config = TrainConfig(data=BUCKETED, model=MODEL, batch_tokens=60, seed=4, steps=4)
    latent = replace(config, data=DataConfig(folder))
    seen = []
    for given in (config, latent, replace(latent, data=DataConfig(folder, buckets=BUCKETS))):
        trainer = Trainer(given)
        assert trainer.model.config.input_size == (2, 12, 16)
        # An epoch is 2 + 2 + 4 batches of 5, 2 and 2 clips: of 12, 24 and 36 tokens.
        seen.append([trainer.batches.batch(step) for step in range(4)])
        trainer.batches.close()
    for batches in zip(*seen, strict=True):
        for x, y, _ in batches[1:]:
            assert torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1])
    assert len({x.shape for x, *_ in seen[0]}) > 1
    for changes, reason in (
        ({"batch_tokens": 0}, r"batch_tokens is 0; .*z has buckets, so it must be at least 1"),
        ({"data": {"buckets": BUCKETS[:2]}}, r"data.buckets is .*; the latents in .* were made with \[\[2, 12, 16"),
        ({"batch_tokens": 30}, r"batch_tokens is 30; bucket \(4, 12, 12\) needs 1 sample of 36 tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            Trainer(merge(latent, changes))
    with pytest.raises(ValueError, match=r"other options: data\.buckets differ"):
        run(pixels(tmp_path / "z", data=DIGITS, shard_clips=4, seed=4))
    options = "--encoder pixels --precision fp32 --shard-clips 4 --batch-size 3 --seed 4 --data.frames 2"
    sizes = "--data.size 12 16 --data.buckets 2 12 16 1 16 24 4 12 12"
    main(["--out", folder, *options.split(), *sizes.split()])
    assert "22 clips (1, 2, 12, 16) as latents (1, 2, 12, 16), (1, 1, 16, 24) as" in capsys.readouterr().out


@pytest.mark.parametrize("normalize", [False, True])
def test_an_autoencoder_encodes_every_bucket_and_a_run_on_them_goes_on(tmp_path, monkeypatch, normalize):
    encoder = str(autoencoder(tmp_path / "encoder", monkeypatch))
    options = {"data": BUCKETED, "shard_clips": 4, "passes": 2, "normalize": normalize}
    run(replace(pixels(tmp_path / "z", **options), encoder=encoder))
    source = LatentClips(tmp_path / "z")
    parts = source.split(())
    assert [part.shape for part in parts] == [(4, 2, 6, 8), (4, 1, 8, 12), (4, 4, 6, 6)]
    assert source.shape == (4, 2, 6, 8) and [len(part) for part in parts] == [16, 14, 14] and len(source) == 44
    clips = [torch.from_numpy(part.clip(i, None)[0]) for part in parts for i in range(len(part))]
    channels = torch.cat([clip.flatten(1) for clip in clips], dim=1).double()
    mean, std = channels.mean(1), channels.std(1, correction=0)
    expected = (torch.zeros(4), torch.ones(4)) if normalize else (source.index["mean"], source.index["std"])
    torch.testing.assert_close(mean, torch.as_tensor(expected[0], dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.as_tensor(expected[1], dtype=torch.float64), rtol=0, atol=1e-5)
    digits = MovingDigits(frames=2, size=(12, 16)).split(BUCKETS)
    for i in (3, 10):
        epoch, item = divmod(i, 7)
        seed = int(np.random.SeedSequence((0, 2)).generate_state(1)[0])
        clip, label = digits[2].clip(item, np.random.default_rng((seed, epoch, item)))
        decoded = Decoder(source.encoder, CPU)(torch.from_numpy(parts[2].clip(i, None)[0])[None])[0]
        torch.testing.assert_close(decoded, to_float(torch.from_numpy(clip)), rtol=0, atol=1e-5)
        assert parts[2].clip(i, None)[1] == label

    config = TrainConfig(str(tmp_path / "run"), DataConfig(str(tmp_path / "z")), LATENT, steps=9, batch_tokens=80)
    with pytest.raises(
        ValueError,
        match=r"data.source '.*z', whose buckets are in cells of latents, has \(4, 6, 6\), which this run .* patch",
    ):
        Trainer(merge(config, {"model": {"patch": (1, 2, 4)}}))
    config = replace(config, preview=PreviewConfig(count=1, steps=1), save_every=5)
    train(config)
    train(replace(config, run=str(tmp_path / "parts"), steps=5))
    resumed, checkpoint = parse(["--resume", str(tmp_path / "parts"), "--steps", "9"])
    train(resumed, checkpoint)
    assert (tmp_path / "parts/losses.csv").read_text() == (tmp_path / "run/losses.csv").read_text()


def test_data_that_does_not_fit_together_is_refused_by_the_command(tmp_path, capsys):
    command = ["--out", str(tmp_path / "z"), "--encoder", "pixels"]
    for options, reason in (
        ("--data.reduce 2 --data.buckets 2 12 16", "data.reduce is 2; with data.buckets it must be 1"),
        ("--data.buckets 2 12 16 2 12 16", "data.buckets is ((2, 12, 16), (2, 12, 16)); it must be"),
        ("--data.buckets 2 0 16", "data.buckets is ((2, 0, 16),); it must be different sizes"),
        ("--data.stride 0", "data.stride is 0; it must be at least 1"),
        ("--data.cache-megabytes -1", "data.cache_megabytes is -1; it must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *options.split()])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "z").exists()


def test_an_interrupted_run_goes_on_in_the_same_bucket(tmp_path, monkeypatch):
    options = {"data": BUCKETED, "shard_clips": 4}
    run(pixels(tmp_path / "whole", **options))
    for written in range(1, 6):
        folder = tmp_path / f"{written}"

        def shard_or_die(*arguments, written=written):
            if arguments[1] == written:
                raise Killed
            return write_shard(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("models.precompute.write_shard", shard_or_die)
            with pytest.raises(Killed):
                run(pixels(folder, **options))
        run(pixels(folder, **options))
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_folder_of_before_there_were_buckets_is_read(tmp_path, capsys):
    path = run(pixels(tmp_path / "z"))
    index = json.loads(path.read_text())
    del index["buckets"], index["made"]["data"]["buckets"], index["sha256"]
    path.write_text(json.dumps(index))
    assert LatentClips(tmp_path / "z").buckets == [] and len(LatentClips(tmp_path / "z")) == 22
    options = "--encoder pixels --precision fp32 --shard-clips 8 --batch-size 3 --data.frames 2 --data.size 12 16"
    main(["--out", str(tmp_path / "z"), *options.split()])
    out = capsys.readouterr().out
    assert "is complete" in out and "22 clips (1, 2, 12, 16) as latents (1, 2, 12, 16), " in out
    with pytest.raises(ValueError, match=r"other options: data\.buckets differ"):
        run(pixels(tmp_path / "z", data=BUCKETED))


@pytest.mark.parametrize("normalize", [False, True])
def test_an_autoencoder_makes_the_latents_and_decodes_previews_and_samples(tmp_path, monkeypatch, normalize):
    encoder = autoencoder(tmp_path / "encoder", monkeypatch)
    run(replace(pixels(tmp_path / "z", normalize=normalize), encoder=str(tmp_path / "encoder")))
    latents = LatentClips(tmp_path / "z")
    assert latents.shape == (4, 2, 6, 8)
    assert {key: latents.encoder[key] for key in ("kind", "path")} == {"kind": "checkpoint", "path": str(encoder)}
    clip, _ = MovingDigits(frames=2, size=(12, 16)).clip(5, np.random.default_rng((0, 0, 5)))
    exact = to_float(torch.from_numpy(clip))
    stored = torch.from_numpy(latents.clip(5, np.random.default_rng(0))[0])
    decoder = Decoder(latents.encoder, CPU)
    torch.testing.assert_close(decoder(stored[None])[0], exact)
    assert torch.equal(decoder.encode(torch.from_numpy(clip)[None])[0], stored)
    everything = torch.stack([torch.from_numpy(latents.clip(i, np.random.default_rng(0))[0]) for i in range(22)])
    mean, std = everything.mean((0, 2, 3, 4)), everything.std((0, 2, 3, 4), correction=0)
    if normalize:
        assert mean.abs().max() < 1e-5 and (std - 1).abs().max() < 1e-5
    else:
        assert torch.equal(stored, Shuffle(None).encode(exact[None])[0].detach())
        assert mean.tolist() == pytest.approx(latents.index["mean"]) and std.tolist() == pytest.approx(
            latents.index["std"]
        )

    config = TrainConfig(run=str(tmp_path / "run"), data=DataConfig(str(tmp_path / "z")), model=LATENT, steps=2)
    path = train(replace(config, preview=PreviewConfig(count=2, steps=2)))
    assert checkpoints.load(path).encoder == latents.encoder
    with av.open(str(tmp_path / "run/previews/step_00000002.png")) as container:
        frame = next(container.decode(video=0))
    # Two samples of two frames of 12x16 pixels, eleven times as large, 4 pixels apart.
    assert (frame.height, frame.width) == (2 * 132 + 4, 2 * 176 + 4)
    seen = []
    decode = Shuffle.decode
    monkeypatch.setattr(Shuffle, "decode", lambda self, z: seen.append(decode(self, z)) or seen[-1])
    files = sample.run(SampleConfig(path, count=2, steps=1))
    expected = to_bytes(seen[0]).permute(0, 2, 3, 4, 1).numpy()
    assert expected.shape == (2, 2, 12, 16, 1) and (np.load(files[3])["clips"] == expected).all()


def test_a_run_goes_on_with_latents_that_have_moved(tmp_path):
    run(pixels(tmp_path / "z"))
    config = TrainConfig(str(tmp_path / "run"), DataConfig(str(tmp_path / "z")), MODEL, steps=2, batch_size=2)
    train(config)
    train(replace(config, run=str(tmp_path / "whole"), steps=3))
    (tmp_path / "z").rename(tmp_path / "moved")
    run(pixels(tmp_path / "other", seed=1))
    resume = ["--resume", str(tmp_path / "run"), "--steps", "3", "--data.source"]
    with pytest.raises(
        ValueError, match=r"data.source is .*other'; in a resumed run it must hold files of the same names"
    ):
        train(*parse([*resume, str(tmp_path / "other")]))
    train(*parse([*resume, str(tmp_path / "moved")]))
    assert (tmp_path / "run/losses.csv").read_text() == (tmp_path / "whole/losses.csv").read_text()


def test_a_run_goes_on_with_an_autoencoder_that_has_moved(tmp_path, monkeypatch):
    autoencoder(tmp_path / "encoder", monkeypatch)
    run(replace(pixels(tmp_path / "z"), encoder=str(tmp_path / "encoder")))
    config = TrainConfig(str(tmp_path / "run"), DataConfig(str(tmp_path / "z")), LATENT, steps=2, batch_size=2)
    train(config)
    train(replace(config, run=str(tmp_path / "whole"), steps=3))
    moved = (tmp_path / "encoder").rename(tmp_path / "moved")
    other = autoencoder(tmp_path / "other", monkeypatch, weight=4.0)
    resume = ["--resume", str(tmp_path / "run"), "--steps", "3"]
    with pytest.raises(ValueError, match=r"encoder is .*encoder/step_00000007\.pt', which is not there"):
        train(*parse(resume))
    with pytest.raises(ValueError, match=r"encoder .*other.* is not the one of the latents"):
        train(*parse([*resume, "--encoder", str(other)]))
    resumed, checkpoint = parse([*resume, "--encoder", str(moved)])
    # A checkpoint of before there was the option.
    before = {key: value for key, value in checkpoint.train.items() if key != "encoder"}
    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoint.latest", lambda folder: (folder, replace(checkpoint, train=before)))
        assert parse([*resume, "--encoder", str(moved)])[0] == resumed
    train(resumed, checkpoint)
    assert (tmp_path / "run/losses.csv").read_text() == (tmp_path / "whole/losses.csv").read_text()
    # It stays where it was named until it moves again.
    assert parse([*resume, "--steps", "4"])[0].encoder == str(moved)
    pictures = [(tmp_path / name / "previews/step_00000003.png").read_bytes() for name in ("run", "whole")]
    assert pictures[0] == pictures[1]
    with pytest.raises(ValueError, match=r"encoder is '.*moved', but 'digits' has pixels, not latents"):
        train(replace(config, run=str(tmp_path / "pixels"), data=DIGITS, model=MODEL, encoder=str(moved)))
    assert not (tmp_path / "pixels").exists()


def test_an_encoder_that_is_missing_or_another_is_refused(tmp_path, monkeypatch):
    autoencoder(tmp_path / "encoder", monkeypatch)
    run(replace(pixels(tmp_path / "z"), encoder=str(tmp_path / "encoder")))
    config = TrainConfig(run=str(tmp_path / "run"), data=DataConfig(str(tmp_path / "z")), model=LATENT, steps=1)
    path = train(config)
    moved = (tmp_path / "encoder").rename(tmp_path / "moved") / "step_00000007.pt"
    for start in (
        lambda: sample.run(SampleConfig(path, tmp_path / "out")),
        lambda: train(replace(config, run=str(tmp_path / "second"))),
    ):
        with pytest.raises(ValueError, match=r"encoder is .*encoder/step_00000007\.pt', which is not there.*made with"):
            start()
    assert not (tmp_path / "out").exists() and not (tmp_path / "second").exists()
    assert sample.run(SampleConfig(path, tmp_path / "out", count=1, steps=1, encoder=str(moved)))[0].exists()
    other = autoencoder(tmp_path / "encoder", monkeypatch, weight=4.0)
    with pytest.raises(ValueError, match=r"step_00000007\.pt \(sha256 .*\) is not the one of the latents"):
        sample.run(SampleConfig(path, tmp_path / "other"))
    with pytest.raises(ValueError, match="is not the one of the latents"):
        train(replace(config, run=str(tmp_path / "second")))
    # A run cannot go on with the latents of another encoder.
    run(replace(pixels(tmp_path / "z4"), encoder=str(other)))
    with pytest.raises(ValueError, match="does not match the data: its encoder was"):
        Trainer(merge(config, {"data": {"source": str(tmp_path / "z4")}}), checkpoints.load(path))
    with pytest.raises(ValueError, match=r"was trained on latents itself"):
        run(replace(pixels(tmp_path / "none"), encoder=str(path)))


def test_encoders_that_cannot_be_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"encoder is 'nowhere', which is not there; it may be 'pixels', a checkpoint"):
        run(replace(pixels(tmp_path / "z"), encoder="nowhere"))
    path = train(TrainConfig(run=str(tmp_path / "run"), data=DIGITS, model=MODEL, steps=1))
    with pytest.raises(ValueError, match="holds a DiT, which has no encode and decode"):
        run(replace(pixels(tmp_path / "z"), encoder=str(path)))
    odd = autoencoder(tmp_path / "encoder", monkeypatch)
    with pytest.raises(ValueError, match=r"the encoder does not take clips of \(1, 2, 13, 16\)"):
        run(replace(pixels(tmp_path / "z", data=replace(DIGITS, size=(13, 16))), encoder=str(odd)))
    with pytest.raises(ValueError, match=r"encoder is 'pixels', but .* makes pixels, not latents"):
        sample.run(SampleConfig(path, tmp_path / "out", encoder="pixels"))
    assert not (tmp_path / "z").exists()


def test_an_autoencoder_of_diffusers_is_loaded_from_its_folder(tmp_path, monkeypatch):
    asked = []

    def load_autoencoder(name, *, device):
        asked.append((name, device))
        return Shuffle(None)

    monkeypatch.setattr("models.data.encoder.load_autoencoder", load_autoencoder)
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"weights")
    run(replace(pixels(tmp_path / "z"), encoder=str(folder)))
    latents = LatentClips(tmp_path / "z")
    assert asked == [(str(folder), CPU)] and latents.shape == (4, 2, 6, 8) and latents.encoder["kind"] == "diffusers"
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(os.listdir(folder))}
    whole = "".join(f"{name} {checksum}\n" for name, checksum in sums.items())
    assert latents.encoder["sha256"] == hashlib.sha256(whole.encode()).hexdigest()
    assert Decoder(latents.encoder, CPU)(torch.ones(1, *latents.shape)).shape == (1, 1, 2, 12, 16)
    (folder / "weights.safetensors").write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"vae .* is not the one of the latents"):
        Decoder(latents.encoder, CPU)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="package 'safetensors' is needed: pip install safetensors "):
        run(pixels(tmp_path / "z"))


def test_pixels_are_clamped(tmp_path, monkeypatch):
    encoder = open_encoder(identify(autoencoder(tmp_path / "encoder", monkeypatch)), CPU)
    assert encoder.decode(torch.full((1, 4, 1, 2, 2), 9.0)).unique().tolist() == [1.0]


def test_images_train_on_latents(tmp_path):
    run(pixels(tmp_path / "z", data=DataConfig(frames=1, size=(12, 16))))
    config = TrainConfig(run=str(tmp_path / "run"), data=DataConfig(str(tmp_path / "z")), steps=1, batch_size=2)
    path = train(replace(config, model=replace(MODEL, patch=(4, 4)), preview=PreviewConfig(count=2, steps=1)))
    assert checkpoints.load(path).config["input_size"] == [12, 16]
    assert np.load(sample.run(SampleConfig(path, count=2, steps=1))[3])["clips"].shape == (2, 1, 12, 16, 1)


def test_the_images_of_joint_training_are_first_latent_frames(tmp_path):
    run(pixels(tmp_path / "z"))
    settings = WALTSettings(width=16, depth=2, heads=2, patch=(1, 4, 4))
    data = DataConfig(str(tmp_path / "z"), images=2)
    trainer = Trainer(TrainConfig(data=data, model=settings, objective=DDPM(), batch_size=11))
    x, y, _ = trainer.batches.batch(1)
    clips = [trainer.source.clip(number, np.random.default_rng(0)) for number in range(22)]
    for frames, labels in zip(x, y.tolist(), strict=True):
        for frame, label in zip(frames[:, 2:].transpose(0, 1), labels[1:], strict=True):
            assert any(number == label and (frame.numpy() == clip[:, 0]).all() for clip, number in clips)
    assert trainer.train_step()[0].isfinite() and trainer.model.config.input_size == (2, 12, 16)
    trainer.batches.close()


def test_latents_that_the_precision_cannot_hold_are_refused(tmp_path, monkeypatch):
    path = autoencoder(tmp_path / "encoder", monkeypatch, weight=1e5)
    with pytest.raises(ValueError, match="clips 0 to 2 have latents that fp16 cannot hold"):
        run(replace(pixels(tmp_path / "z", precision="fp16"), encoder=str(path)))
    run(replace(pixels(tmp_path / "z2", precision="bf16"), encoder=str(path)))


def test_a_constant_channel_cannot_be_normalized(tmp_path):
    (tmp_path / "black").mkdir()
    write_mp4(tmp_path / "black/a.mp4", np.zeros((2, 16, 16, 3), dtype=np.uint8), 8)
    data = DataConfig(str(tmp_path / "black"), frames=2, size=(16, 16))
    with pytest.raises(ValueError, match="channel 0 of the latents is constant"):
        run(pixels(tmp_path / "z", data=data, normalize=True))


def test_captions_stay_with_their_clips(tmp_path):
    for name, value in (("a", 40), ("b", 200)):
        write_png(tmp_path / f"{name}.png", np.full((16, 16, 3), value, dtype=np.uint8))
    (tmp_path / "list.csv").write_text("path,text\na.png,dark\nb.png,bright\n")
    data = DataConfig(source=str(tmp_path / "list.csv"), frames=1)
    run(pixels(tmp_path / "z", data=data))
    clips = LatentClips(tmp_path / "z")
    found = {
        clips.captions[label]: clip.mean() for clip, label in (clips.clip(i, np.random.default_rng(0)) for i in (0, 1))
    }
    assert clips.classes == () and found["dark"] < 0 < found["bright"]


STAGE_B = CascadeSettings(
    widths=(16, 16),
    heads=(2, 2),
    levels=("CT", "CTAV"),
    condition_width=8,
    latent_channels=1,
    latent_dropout=0.0,
    dropout=(0.0, 0.0),
)


def halved(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool3d(x, (1, 2, 2))


def stage(folder: Path, source: str, **changes) -> TrainConfig:
    """A training of stage B on the latents ``source``."""
    config = TrainConfig(run=str(folder), data=DataConfig(source), model=STAGE_B, objective=LogSNR(), steps=2)
    return merge(config, {"batch_size": 4, "preview": {"count": 2, "steps": 2}} | changes)


def untrained(config: TrainConfig) -> Path:
    """A checkpoint with random weights: those of a fresh stage return zero."""
    trainer = Trainer(config)
    for parameter in (*trainer.model.parameters(), *trainer.ema.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    trainer.batches.close()
    Path(config.run).mkdir()
    return checkpoints.save(Path(config.run), trainer.checkpoint(), keep=1)


@pytest.mark.parametrize("normalize", [False, True])
def test_small_clips_are_kept_beside_the_latents(tmp_path, monkeypatch, normalize):
    autoencoder(tmp_path / "encoder", monkeypatch)
    config = replace(pixels(tmp_path / "z", low=2, normalize=normalize), encoder=str(tmp_path / "encoder"))
    index = read_index(run(config).parent)
    assert index["low"] == {"factor": 2, "shape": [1, 2, 6, 8]} and index["made"]["low"] == 2
    source, latents = MovingDigits(frames=2, size=(12, 16)), LatentClips(tmp_path / "z")
    assert latents.low_shape == (1, 2, 6, 8)
    for number in range(22):
        clip = torch.from_numpy(source.clip(number, np.random.default_rng((0, 0, number)))[0])
        low = torch.from_numpy(latents.low(number))
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), halved(clip.double() / 127.5 - 1), rtol=0, atol=1e-6)
    assert low.std() > 0.1
    run(replace(config, out=tmp_path / "half", precision="fp16"))
    assert torch.equal(torch.from_numpy(LatentClips(tmp_path / "half").low(21)), low.half().float())


def test_small_clips_of_a_bucket_are_those_of_its_clips(tmp_path):
    """models.precompute keeps none with buckets; the format has room for both."""
    path = run(pixels(tmp_path / "z", low=2))
    index = read_index(path.parent)
    names, size = [entry["name"] for entry in index["shards"]], {"pixels": index["pixels"], "shape": index["shape"]}
    index["buckets"] = [{**size, "shards": names[:1]}, {**size, "shards": names[1:]}]
    index["made"]["data"]["buckets"] = [[2, 12, 16], [2, 16, 12]]
    path.write_text(json.dumps(index))
    for part, count in zip(LatentClips(path.parent).split(), (8, 14), strict=True):
        x, _, low = Batches(part, count, 0, prefetch=0).batch(0)
        assert len(part) == count
        torch.testing.assert_close(low, halved(x), rtol=0, atol=1e-6)


def test_small_clips_do_not_depend_on_an_interruption(tmp_path, monkeypatch):
    config = pixels(tmp_path / "z", low=3, data=replace(DIGITS, size=(12, 18)))
    run(replace(config, out=tmp_path / "whole"))
    original, died = precompute.write_shard, []

    def write_or_die(folder, number, *tensors):
        if number == 1 and not died:
            died.append(number)
            raise Killed
        return original(folder, number, *tensors)

    monkeypatch.setattr(precompute, "write_shard", write_or_die)
    with pytest.raises(Killed):
        run(config)
    first = tmp_path / "z/shard_00000.safetensors"
    before = first.stat().st_mtime_ns
    run(config)
    assert first.stat().st_mtime_ns == before
    assert contents(tmp_path / "z") == contents(tmp_path / "whole")
    for low in (0, 2):
        with pytest.raises(ValueError, match="holds latents of other options: low differ"):
            run(replace(config, low=low))
    for low, reason in ((5, r"low is 5; it must divide the clips' height and width \(12, 18\)"), (-1, "low is -1; it")):
        with pytest.raises(ValueError, match=reason):
            run(replace(config, out=tmp_path / "none", low=low))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_before_there_were_small_clips_is_read_and_continued(tmp_path, monkeypatch, finished):
    run(pixels(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr("models.precompute.moments", kill)
            with pytest.raises(Killed):
                run(pixels(tmp_path / "z"))
        else:
            run(pixels(tmp_path / "z"))
    path = tmp_path / "z" / ("index.json" if finished else "index.partial.json")
    values = json.loads(path.read_text())
    values.pop("low", None)
    del values["sha256"], values["made"]["low"], values["made"]["data"]["reduce"]
    path.write_text(json.dumps(values))
    before = (tmp_path / "z/shard_00001.safetensors").stat().st_mtime_ns
    for changes, differs in (({"low": 2}, "low"), ({"data": replace(DIGITS, reduce=2)}, "data.reduce")):
        with pytest.raises(ValueError, match=f"holds latents of other options: {differs} differ"):
            run(pixels(tmp_path / "z", **changes))
    run(pixels(tmp_path / "z"))
    assert (tmp_path / "z/shard_00001.safetensors").stat().st_mtime_ns == before
    assert finished or contents(tmp_path / "z") == contents(tmp_path / "whole")
    source = str(tmp_path / "z")
    assert open_source(DataConfig(source, frames=2, size=(12, 16))).low_shape is None
    with pytest.raises(ValueError, match=r"data.reduce is 2; the latents in .* were made with 1"):
        open_source(DataConfig(source, frames=2, size=(12, 16), reduce=2))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stage_b_is_told_the_small_clip_of_its_sample(tmp_path, monkeypatch, accumulation):
    run(pixels(tmp_path / "z", low=2))
    trainer = Trainer(stage(tmp_path / "run", str(tmp_path / "z"), accumulation=accumulation))
    seen = []

    class Looks:
        name = "logsnr"

        def loss(self, model, x, y, generator, memory, low):
            seen.append((x, y, low))
            return model(x, torch.full((len(x),), 500.0), y, low=low).square().mean()

    trainer.loss.objective = Looks()
    for _ in range(2):
        trainer.train_step()
    trainer.batches.close()
    assert [len(x) for x, _, _ in seen] == [4 // accumulation] * (2 * accumulation)
    for x, _, low in seen:
        torch.testing.assert_close(low, halved(x))
    weight = next(p for name, p in trainer.model.named_parameters() if name.startswith("latent_mapper.2"))
    assert weight in trainer.optimizer.state

    first, labels, low = Batches(trainer.source, 2, 0, prefetch=0).batch(0)
    assert torch.equal(low, seen[0][2][:2]) and torch.equal(first, seen[0][0][:2])
    trainer.objective, calls = LogSNR(), []
    forward = Cascade.forward

    def told(self, x, t, y=None, **given):
        calls.append((y, given["low"]))
        return forward(self, x, t, y, **given)

    monkeypatch.setattr(Cascade, "forward", told)
    assert trainer.preview().dtype == np.uint8 and not trainer.ema.training
    assert len(calls) == 2 and all(torch.equal(y, labels) and torch.equal(given, low) for y, given in calls)


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulation": 2, "precision": "bf16", "checkpointing": True}, {"compile": True}],
    ids=["plain", "bf16", "compile"],
)
def test_stage_b_resumes_bit_for_bit(tmp_path, monkeypatch, changes):
    # Inductor takes a minute; what it compiles is traced the same way here.
    monkeypatch.setattr(Cascade, "compile", functools.partialmethod(Cascade.compile, backend="aot_eager"))
    run(pixels(tmp_path / "z", low=2))
    config = stage(tmp_path / "run", str(tmp_path / "z"), steps=4, model={"latent_dropout": 0.3}, **changes)
    whole = checkpoints.load(train(config))
    first = Trainer(config)
    for _ in range(2):
        first.train_step()
    second = Trainer(config, first.checkpoint())
    for _ in range(2):
        second.train_step()
    for trainer in (first, second):
        trainer.batches.close()
    assert all(torch.equal(weight, whole.model[name]) for name, weight in second.model.state_dict().items())
    assert all(torch.equal(weight, whole.ema[name]) for name, weight in second.ema.state_dict().items())


def test_images_and_models_without_a_condition_train_beside_small_clips(tmp_path):
    run(pixels(tmp_path / "z", low=4, data=replace(DIGITS, frames=1)))
    source = str(tmp_path / "z")
    for name, model in (
        ("image", {"patch": (1, 1), "levels": ("CT", "CTA")}),
        ("untold", {"latent_channels": 0}),
        ("dit", as_plain(replace(MODEL, patch=(1, 2, 2)))),
    ):
        assert train(stage(tmp_path / name, source, model=model)).exists()


def test_small_clips_that_do_not_fit_stage_b_are_refused(tmp_path, monkeypatch):
    run(pixels(tmp_path / "z", low=2))
    run(pixels(tmp_path / "without"))
    refused = r"model.latent_channels is 3, but the small clips of .* have 1 channels and 2 frames; it must be 3 and 2"
    with pytest.raises(ValueError, match=refused):
        train(stage(tmp_path / "run", str(tmp_path / "z"), model={"latent_channels": 3}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("system", ["cascade-b-tiny", "cascade-b-tiny/video"])
def test_the_published_stage_b_trains_and_samples_without_small_clips(tmp_path, monkeypatch, caplog, system):
    """16 channels of latents and 3 of pixels, none of which the data has."""
    options = f"--model {system} --data.frames {1 + 2 * system.endswith('video')} --data.size 16 16 --steps 2"
    options += f" --batch-size 3 --preview.count 2 --preview.steps 1 --run {tmp_path / 'run'}"
    told, forward = [], Cascade.forward

    def without(self, x, t, y=None, **given):
        told.append(given)
        return forward(self, x, t, y, **given)

    monkeypatch.setattr(Cascade, "forward", without)
    path = train(*parse(options.split()))
    assert caplog.messages == [
        "model.latent_channels is 16, but digits has no small clips, as models.precompute --low makes: the model is "
        "trained without"
    ]
    low = sample.run(SampleConfig(path, count=2, steps=1))[3]
    assert np.load(low)["clips"].shape[0] == 2 and told and not any(told)
    with pytest.raises(ValueError, match=r"low has shape .*; it must be \[N, C, T, h, w\] = \[2, 16, .*any, any\]"):
        sample.run(SampleConfig(path, tmp_path / "large", low=low, steps=1))


def test_stage_c_then_b_then_the_decoder(tmp_path, monkeypatch):
    """Two stages and an autoencoder make clips, by the commands, as the equations do."""
    autoencoder(tmp_path / "encoder", monkeypatch, weight=1.0)
    run(replace(pixels(tmp_path / "z", low=2), encoder=str(tmp_path / "encoder")))
    small = {"data": as_plain(replace(DIGITS, reduce=2)), "model": {"latent_channels": 0}}
    first = untrained(stage(tmp_path / "c", "digits", **small))
    second = untrained(stage(tmp_path / "b", str(tmp_path / "z")))
    assert Trainer(stage(tmp_path / "none", "digits", **small)).source.shape == LatentClips(tmp_path / "z").low_shape

    low = sample.run(SampleConfig(first, count=3, classes=("4", "7", "1"), steps=2))[3]
    clips = np.load(low)["clips"]
    assert clips.shape == (3, 2, 6, 8, 1) and clips.std() > 10
    config = SampleConfig(second, tmp_path / "large", low=low, steps=2, solver="ddim", guidance=2.0)
    large = np.load(sample.run(config)[3])
    assert large["clips"].shape == (3, 2, 12, 16, 1) and large["labels"].tolist() == [4, 7, 1]

    model = checkpoints.load(second).build()
    told = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    class Doubled(Denoiser):
        config, null_class = model.config, 10

        def forward(self, x, t, y):
            assert y.tolist() == [4, 7, 1, 10, 10, 10]
            return torch.cat((model(x[:3], t[:3], y[:3], low=told), model(x[3:], t[3:], y[3:])))

    noise = torch.randn(3, 4, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    z = samplers.sample(
        Doubled(), LogSNR(), SampleRequest(noise=noise, y=torch.tensor([4, 7, 1]), solver="ddim", steps=2, guidance=2.0)
    )
    decoded = F.pixel_shuffle(z.transpose(1, 2), 2).transpose(1, 2).clamp(-1, 1)
    expected = (decoded + 1) * 127.5
    assert expected.std() > 10 and (expected.permute(0, 2, 3, 4, 1) - torch.from_numpy(large["clips"])).abs().max() < 1

    again = np.load(sample.run(replace(config, out=tmp_path / "one", batch_size=1))[3])["clips"]
    assert (np.abs(again.astype(int) - large["clips"]) <= 1).all()
    others = clips.copy()
    others[1] = 255 - others[1]
    np.savez(tmp_path / "others.npz", clips=others, labels=[4, 7, 1])
    changed = np.load(sample.run(replace(config, out=tmp_path / "changed", low=tmp_path / "others.npz"))[3])["clips"]
    assert [(changed[i] != large["clips"][i]).mean() > 0.05 for i in range(3)] == [False, True, False]


@pytest.mark.parametrize("normalize", [False, True])
def test_super_resolution_of_latents_is_told_what_small_pixels_encode_to(tmp_path, monkeypatch, normalize):
    """All four pixels of a cell being equal, its four channels are the weight times the pixel; then the 2 x 2 means."""
    autoencoder(tmp_path / "encoder", monkeypatch)
    run(replace(pixels(tmp_path / "z", low=2, normalize=normalize), encoder=str(tmp_path / "encoder")))
    config = {"objective": as_plain(DDPM(prediction="velocity", zero_snr=True)), "optimizer": {"learning_rate": 1e-2}}
    model = WALTSettings(width=16, depth=2, heads=2, low_resolution=True, self_conditioning=0.0, low_noise=9)
    path = train(stage(tmp_path / "large", str(tmp_path / "z"), model=as_plain(model), **config))
    source = LatentClips(tmp_path / "z")
    low = np.random.default_rng(0).integers(0, 256, (3, 2, 6, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "low.npz", clips=low, labels=[4, 7, 1])
    told, forward = [], WALT.forward

    def tell(self, x, t, y=None, **given):
        told.append(given.get("low"))
        return forward(self, x, t, y, **given)

    monkeypatch.setattr(WALT, "forward", tell)
    options = SampleConfig(path, tmp_path / "a", low=tmp_path / "low.npz", steps=1, solver="ddim", batch_size=2)
    made = np.load(sample.run(options)[3])
    assert made["clips"].shape == (3, 2, 12, 16, 1) and made["labels"].tolist() == [4, 7, 1]
    small = torch.from_numpy(low).permute(0, 4, 1, 2, 3).double() / 127.5 - 1
    latents = 3 * halved(small).expand(-1, 4, -1, -1, -1)
    if normalize:
        mean, std = (torch.tensor(source.encoder[key], dtype=torch.float64).view(4, 1, 1, 1) for key in ("mean", "std"))
        latents = (latents - mean) / std
    # Level 0 of the noise has a deviation of 0.01.
    assert latents.std() > 0.5 and (torch.cat(told) - (1 - 1e-4) ** 0.5 * latents).abs().max() < 0.06
    for shape, reason in (
        (
            (3, 2, 12, 16, 1),
            r"low has shape \(3, 1, 2, 12, 16\), of which .* are \(4, 2, 12, 16\); .* be \(4, 2, 6, 8\)",
        ),
        (
            (3, 2, 6, 8, 3),
            r"low has shape \(3, 3, 2, 6, 8\), of which the latents .* are \(12, 2, 6, 8\); they must be",
        ),
    ):
        np.savez(tmp_path / "low.npz", clips=np.zeros(shape, np.uint8), labels=[4, 7, 1])
        with pytest.raises(ValueError, match=reason):
            sample.run(replace(options, out=tmp_path / "b"))
    plain = stage(
        tmp_path / "plain", str(tmp_path / "z"), model=as_plain(replace(model, low_resolution=False)), **config
    )
    with pytest.raises(ValueError, match="low was given, but the model is no second stage"):
        sample.run(replace(options, checkpoint=train(plain), out=tmp_path / "b"))


def test_small_clips_for_the_sampler_are_checked(tmp_path):
    run(pixels(tmp_path / "z", low=2))
    second = untrained(stage(tmp_path / "b", str(tmp_path / "z")))
    plain = untrained(stage(tmp_path / "c", str(tmp_path / "z"), model={"latent_channels": 0}))
    generator = np.random.default_rng(0)

    def npz(name, shape=(4, 2, 6, 8, 1), **labels):
        np.savez(tmp_path / name, clips=generator.integers(0, 256, shape, dtype=np.uint8), **labels)
        return tmp_path / name

    low = npz("low.npz", labels=np.arange(5, 9))
    base = SampleConfig(second, tmp_path / "out", low=low, steps=1)
    (tmp_path / "text.npz").write_text("mine")
    np.savez(tmp_path / "floats.npz", clips=np.zeros((1, 2, 6, 8, 1)))
    for changes, reason in (
        ({"checkpoint": plain}, "low was given, but the model is no second stage"),
        ({"count": 5}, r"count is 5; .*low\.npz has 4 clips"),
        ({"low": tmp_path / "none.npz"}, r"none\.npz does not exist"),
        ({"low": tmp_path / "text.npz"}, r"text\.npz is not an npz with clips"),
        ({"low": tmp_path / "floats.npz"}, r"floats\.npz has clips of float.*; they must be uint8 \[N, T, H, W, C\]"),
        ({"low": npz("short.npz", labels=[1])}, r"short\.npz has labels of shape \[1\]; it must be \[4\]"),
        ({"low": npz("without.npz")}, r"without\.npz has no labels; use --class"),
        ({"low": npz("words.npz", labels=["a"] * 4)}, r"label is 'a'; for this model it must be a class id in 0\.\.9"),
        ({"low": npz("ten.npz", labels=[1, 2, 3, 10])}, "label is 10; for this model it must be a class id"),
        (
            {"low": npz("long.npz", (4, 3, 6, 8, 1), labels=[0] * 4)},
            r"low has shape \(4, 1, 3, 6, 8\); it must be \[N, C, T, h, w\] = \[4, 1, 2, any, any\]",
        ),
        ({"low": npz("rgb.npz", (4, 2, 6, 8, 3), labels=[0] * 4)}, r"low has shape \(4, 3, 2, 6, 8\)"),
        ({"low_noise": 1}, r"low_noise is 1; with this model it must be in 0\.\.0"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample.run(replace(base, **changes))
    assert not (tmp_path / "out").exists()
    for changes, labels in (
        ({}, [5, 6, 7, 8]),
        ({"count": 2}, [5, 6]),
        ({"classes": ("3", "1")}, [3, 1, 3, 1]),
        ({"low": tmp_path / "without.npz", "classes": ("3",)}, [3, 3, 3, 3]),
        ({"low": None, "count": 2, "classes": ("3",)}, [3, 3]),
    ):
        made = np.load(sample.run(replace(base, overwrite=True, **changes))[3])
        assert made["labels"].tolist() == labels and len(made["clips"]) == len(labels)
