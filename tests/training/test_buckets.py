"""Several sizes in one run: which file goes where, which batch a step gets, and a DiT at other sizes than its own."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_data import film
from torch import nn

from minisora_kernels.counters import Counter as Products
from models import checkpoint as checkpoints
from models import registry
from models.data.batches import BucketBatches
from models.data.config import DataConfig
from models.data.media import write_mp4, write_png
from models.data.moving_digits import MovingDigits
from models.data.open import open_source
from models.data.videos import waste
from models.denoisers.dit import DiT, DiTConfig, DiTSettings
from models.protocols import BaseSettings, Denoiser
from models.runtime.plain import as_plain, merge
from models.train import parse
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig, from_dict
from models.training.log import Log
from models.training.run import train
from models.training.trainer import Trainer

TINY = TrainConfig(
    data=DataConfig(frames=2, buckets=((2, 16, 16), (4, 16, 24), (1, 24, 16))),
    model=DiTSettings(width=16, depth=2, heads=2, patch=(1, 8, 8), class_dropout=0.3),
    optimizer=OptimizerConfig(learning_rate=1e-2, ema=0.9),
    preview=PreviewConfig(count=2, steps=2),
    steps=8,
    batch_tokens=60,
    log_every=3,
)
VIDEO = DiTConfig(
    input_size=(4, 8, 12), patch=(2, 2, 2), channels=3, width=32, depth=3, heads=4, num_classes=5, class_dropout=0.0
)
CONFIGS = {
    "joint": (VIDEO, (2, 6, 14)),
    "factorized": (replace(VIDEO, attention="factorized", patch=(1, 2, 2), qk_norm="rms"), (3, 10, 6)),
    "one frame": (replace(VIDEO, attention="factorized", patch=(1, 2, 2)), (1, 8, 12)),
    "image": (replace(VIDEO, input_size=(8, 12), patch=(2, 2), learn_sigma=True), (6, 4)),
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def randomized(model: DiT) -> DiT:
    """Weights that leave nothing at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def output_and_gradients(model: DiT, x, t, y) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x, t, y)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).sin())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": out.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_dit_at_another_size_is_the_dit_of_that_size(name, per_frame, checkpointing):
    config, size = CONFIGS[name]
    model, other = randomized(DiT(config)), DiT(replace(config, input_size=size))
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key != "pos_embed"}, strict=False)
    model.any_size = True
    model.checkpointing = other.checkpointing = checkpointing
    grid = other.config.grid
    assert grid != config.grid
    x = torch.randn(3, 3, *size)
    t = torch.rand((3, grid[0]) if per_frame else 3) * 1000
    y = torch.tensor([0, 4, 5])
    ours, theirs = output_and_gradients(model, x, t, y), output_and_gradients(other, x, t, y)
    assert set(ours) == set(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]) and ours[key].abs().max() > 0, key
    assert torch.equal(model(x, modulations=model.modulations(t, y)), model(x, t, y))


def test_the_size_of_the_config_is_unchanged_and_others_add_no_weights():
    model = randomized(DiT(VIDEO))
    x, t, y = torch.randn(3, 3, 4, 8, 12), torch.rand(3) * 1000, torch.tensor([0, 4, 5])
    before, keys = output_and_gradients(model, x, t, y), set(model.state_dict())
    model.any_size = True
    small = model(x[:, :, :2, :, :6], t, y)
    assert torch.equal(model(x[:, :, :2, :, :6], t, y), small)
    after = output_and_gradients(model, x, t, y)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert set(model.state_dict()) == keys
    # The positions that were made follow the model's dtype, as its own do.
    half = copy.deepcopy(model).bfloat16()
    other = DiT(replace(VIDEO, input_size=(2, 8, 6)))
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key != "pos_embed"}, strict=False)
    small = x[:, :, :2, :, :6].bfloat16()
    assert torch.equal(half(small, t, y), other.bfloat16()(small, t, y))


def test_other_sizes_compile_without_a_graph_break():
    model = randomized(DiT(replace(VIDEO, depth=1)))
    model.any_size = True
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    t, y = torch.rand(3) * 1000, torch.tensor([0, 4, 5])
    for size in ((2, 6, 14), (4, 8, 12), (2, 6, 14)):
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-4)


def test_sizes_that_do_not_fit_are_refused():
    model = DiT(VIDEO)
    t, y = torch.rand(3) * 1000, torch.tensor([0, 4, 5])
    with pytest.raises(ValueError, match=r"x has shape \(3, 3, 2, 8, 12\); it must be \[B, 3, 4, 8, 12\]$"):
        model(torch.randn(3, 3, 2, 8, 12), t, y)
    model.any_size = True
    for shape in ((3, 3, 3, 8, 12), (3, 3, 2, 8, 0), (3, 2, 2, 8, 12), (3, 3, 8, 12), (3, 3, 2, 2, 8, 12)):
        with pytest.raises(ValueError, match=r"x has shape .*, or other multiples of the patch \(2, 2, 2\)"):
            model(torch.randn(shape), t, y)
    x = torch.randn(3, 3, 2, 8, 12)
    with pytest.raises(ValueError, match=r"t has shape \(3, 2\); it may be \[3\] or, per frame, \[3, 1\]"):
        model(x, t[:, None].expand(3, 2), y)
    with pytest.raises(ValueError, match="modulations have shape"):
        model(x, modulations=model.modulations(t[:, None].expand(3, 2), y))


def test_waste():
    assert waste((8, 32, 48), (8, 32, 48)) == 0
    # Twice as wide: half of each frame is cut off, and twice as many pixels as are shown are there.
    assert waste((8, 32, 64), (8, 32, 32)) == 1 - 0.5 * 0.5
    assert waste((8, 64, 64), (8, 32, 32)) == 1 - 0.25 == waste((8, 32, 32), (8, 64, 64))
    assert waste((12, 32, 32), (8, 32, 32)) == pytest.approx(1 / 3) == waste((8, 32, 32), (12, 32, 32))


def test_a_file_goes_to_the_bucket_that_wastes_least(tmp_path, caplog):
    write_mp4(tmp_path / "long.mp4", film(12, 32, 32), 8)
    write_mp4(tmp_path / "short.mp4", film(4, 32, 32), 8)
    write_mp4(tmp_path / "wide.mp4", film(6, 32, 64), 8)
    write_png(tmp_path / "large.png", film(1, 128, 128)[0])
    write_png(tmp_path / "tall.png", film(1, 60, 30)[0])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    buckets = ((10, 32, 32), (4, 32, 32), (4, 24, 48), (1, 32, 16), (1, 64, 64), (64, 8, 8))
    source = open_source(DataConfig(str(tmp_path), frames=4, size=(32, 32)))
    with caplog.at_level(logging.WARNING):
        parts = source.split(buckets)
    assert "broken.mp4 cannot be decoded" in caplog.text and "bucket (64, 8, 8) is left out" in caplog.text
    found = {part.shape: [item.path.name for item in part.items] for part in parts}
    assert found == {
        (3, 10, 32, 32): ["long.mp4"],
        (3, 4, 32, 32): ["short.mp4"],
        (3, 4, 24, 48): ["wide.mp4"],
        (3, 1, 32, 16): ["tall.png"],
        (3, 1, 64, 64): ["large.png"],
    }
    for part in parts:
        assert part.clip(0, np.random.default_rng(0))[0].shape == part.shape
    # Of every third frame, the long one has four, and the short one two.
    parts = open_source(DataConfig(str(tmp_path), frames=4, size=(32, 32), stride=3)).split(buckets)
    assert next([item.path.name for item in p.items] for p in parts if p.shape[1:] == (4, 32, 32)) == [
        "long.mp4",
        "short.mp4",
    ]


def test_files_that_cannot_be_decoded_fill_no_bucket(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="none of its 1 files can be decoded"):
        open_source(DataConfig(str(tmp_path), frames=4, size=(32, 32))).split(((4, 32, 32),))


def test_digits_are_dealt_to_the_buckets_evenly_and_whatever_they_show():
    source = MovingDigits(frames=2, size=(16, 16))
    parts = source.split(((2, 16, 16), (4, 16, 24), (1, 24, 16)))
    assert [part.shape for part in parts] == [(1, 2, 16, 16), (1, 4, 16, 24), (1, 1, 24, 16)]
    assert sorted(image.tobytes() for part in parts for image in part.images) == sorted(
        image.tobytes() for image in source.images
    )
    for part in parts:
        assert len(part) in (479, 480) and min(Counter(part.labels.tolist()).values()) > 30


def parts_of_digits():
    return MovingDigits(frames=2, size=(16, 16)).split(TINY.data.buckets)


def test_a_step_determines_its_bucket_and_its_clips():
    sizes = (100, 50, 60)
    ahead, plain = BucketBatches(parts_of_digits(), sizes, seed=5), BucketBatches(parts_of_digits(), sizes, 5, 0)
    for step in (0, 1, 2, 700, 3, 3):
        for one, other in zip(ahead.batch(step)[:2], plain.batch(step)[:2], strict=True):
            assert torch.equal(one, other)
    ahead.close()
    # 480 clips make 5, 10 and 8 batches; the second has 479.
    epochs = [[plain.place(step) for step in range(23 * epoch, 23 * (epoch + 1))] for epoch in range(3)]
    for epoch in epochs:
        assert Counter(bucket for bucket, _ in epoch) == {0: 5, 1: 10, 2: 8}
    orders = [[bucket for bucket, _ in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    for bucket, count in ((0, 15), (1, 30), (2, 24)):
        assert [number for epoch in epochs for b, number in epoch if b == bucket] == list(range(count))
    shapes = {(100, 1, 2, 16, 16), (50, 1, 4, 16, 24), (60, 1, 1, 24, 16)}
    assert {tuple(plain.batch(step)[0].shape) for step in range(23)} == shapes
    other = BucketBatches(parts_of_digits(), sizes, seed=6, prefetch=0)
    assert [other.place(step)[0] for step in range(23)] != orders[0]


def test_buckets_draw_for_themselves():
    parts = MovingDigits(frames=1, size=(16, 16)).split(((1, 16, 16), (1, 16, 20)))
    parts[1].images, parts[1].labels = parts[0].images, parts[0].labels
    batches = BucketBatches(parts, (20, 20), seed=0, prefetch=0)
    assert not torch.equal(batches.buckets[0].batch(0)[1], batches.buckets[1].batch(0)[1])


def test_the_batches_have_as_many_samples_as_the_tokens_allow():
    trainer = Trainer(TINY)
    sizes = {bucket.source.shape[1:]: bucket.batch_size for bucket in trainer.batches.buckets}
    # 8, 24 and 6 tokens a sample.
    assert sizes == {(2, 16, 16): 7, (4, 16, 24): 2, (1, 24, 16): 10}
    for _ in range(4):
        before = trainer.tokens
        trainer.train_step()
        assert trainer.tokens - before in (7 * 8, 2 * 24, 10 * 6)
    trainer.batches.close()
    trainer = Trainer(replace(TINY, accumulation=2))
    assert [bucket.batch_size for bucket in trainer.batches.buckets] == [6, 2, 10]
    trainer.batches.close()


def test_a_resumed_run_goes_on_in_the_same_buckets(tmp_path):
    whole = Trainer(TINY)
    expected = [whole.train_step() for _ in range(12)]
    whole.batches.close()
    first = Trainer(TINY)
    for _ in range(5):
        first.train_step()
    first.batches.close()
    path = checkpoints.save(tmp_path, first.checkpoint(), keep=1)
    torch.manual_seed(12345)
    second = Trainer(from_dict(checkpoints.load(path).train), checkpoints.load(path))
    got = [second.train_step() for _ in range(7)]
    second.batches.close()
    assert [(loss.item(), norm.item()) for loss, norm, _ in got] == [
        (loss.item(), norm.item()) for loss, norm, _ in expected[5:]
    ]
    weights = second.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())


def test_a_run_with_buckets_trains_and_previews(tmp_path):
    path = train(merge(TINY, {"run": str(tmp_path / "run"), "steps": 4, "model": {"attention": "factorized"}}))
    assert checkpoints.load(path).config["input_size"] == [2, 16, 16]
    assert (tmp_path / "run/previews/step_00000004.png").exists()


def test_the_speed_counts_the_tokens_of_every_bucket(tmp_path, monkeypatch):
    trainer = Trainer(merge(TINY, {"run": str(tmp_path)}))
    log = Log(tmp_path, 0, 3, TINY.log_every)
    now = log.since
    monkeypatch.setattr("models.training.log.time.perf_counter", lambda: now + 2)
    logged = {}
    monkeypatch.setattr(log.board, "add_scalar", lambda name, value, step: logged.update({name: value}))
    for number in range(3):
        log.add(number, trainer.train_step(), trainer.tokens)
    log.close()
    trainer.batches.close()
    assert logged["tokens/s"] == trainer.tokens / 2 and trainer.tokens > 0


def test_the_share_of_the_peak_counts_no_product_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.trainer.peak_of", lambda device: 1e9)
    found = []
    for checkpointing in (False, True):
        run = tmp_path / str(checkpointing)
        changes = {"run": str(run), "precision": "bf16", "checkpointing": checkpointing, "log_every": 2, "steps": 4}
        trainer = Trainer(merge(TINY, changes))
        log = Log(run.parent, 0, 4, 2, peak=trainer.peak)
        totals = []
        with Products() as counter:
            for number in range(4):
                step = trainer.train_step()
                totals.append((trainer.flops, trainer.tokens))
                log.add(number, step, trainer.tokens, flops=trainer.flops)
        log.close()
        trainer.batches.close()
        found.append((trainer.flops, counter.flops))
        line = json.loads((run.parent / "metrics.jsonl").read_text().splitlines()[-1])
        flops, tokens = (last - before for last, before in zip(totals[3], totals[1], strict=True))
        assert line["MFU"] == pytest.approx(line["tokens/s"] * flops / tokens / 1e9)
    (counted, done), (again, recomputed) = found
    # The gradient of the clips themselves is not computed.
    assert counted == again and done < counted < 1.1 * done < recomputed


@dataclass(frozen=True)
class OneSizeSettings(BaseSettings):
    name: ClassVar[str] = "one size"


@dataclass(frozen=True, kw_only=True)
class OneSizeConfig(OneSizeSettings):
    input_size: tuple[int, ...]
    channels: int
    num_classes: int = 0


class OneSize(Denoiser):
    def __init__(self, config):
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.zeros(1))


def test_what_does_not_fit_together_is_refused(tmp_path, monkeypatch):
    for changes, reason in (
        ({"batch_tokens": 0}, "batch_tokens is 0; with data.buckets it must be at least 1"),
        ({"batch_tokens": -1, "data": {"buckets": []}}, "batch_tokens is -1; it must be at least 0"),
        ({"data": {"buckets": [[1, 0, 16]]}}, "data.buckets is"),
        ({"data": {"buckets": [[1, 16, 16], [1, 16, 16]]}}, "data.buckets is .* different sizes"),
        ({"data": {"buckets": [[1, 16]]}}, "data.buckets is"),
    ):
        with pytest.raises(ValueError, match=reason):
            merge(TINY, changes)
    for changes, reason in (
        ({"data": {"buckets": []}}, "batch_tokens is 60; it is for buckets only, use batch_size"),
        ({"batch_tokens": 23}, r"batch_tokens is 23; bucket \(4, 16, 24\) needs 1 sample of 24 tokens"),
        ({"accumulation": 3}, r"batch_tokens is 60; bucket \(4, 16, 24\) needs 3 samples of 24 tokens"),
        ({"data": {"buckets": [[2, 20, 16]]}}, r"data.buckets has \(2, 20, 16\), which this run cannot take: patch"),
    ):
        with pytest.raises(ValueError, match=reason):
            Trainer(merge(TINY, changes))
    monkeypatch.setitem(registry.FAMILIES, "one size", registry.Family(OneSizeSettings, OneSizeConfig, OneSize, {}))
    with pytest.raises(ValueError, match="needs a model for inputs of any size; 'one size' has one size"):
        Trainer(replace(TINY, model=OneSizeSettings()))


def test_buckets_on_the_command_line(tmp_path):
    config = parse(["--data.buckets", "2", "16", "16", "4", "16", "24", "--batch-tokens", "60"])[0]
    assert config.data.buckets == ((2, 16, 16), (4, 16, 24)) and config.batch_tokens == 60
    assert from_dict(as_plain(TINY)) == TINY
