"""What must not creep: memory over a run, and results that depend on how a batch is cut."""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.checkpoint import load
from models.data.batches import Batches
from models.data.config import DataConfig
from models.data.media import write_png
from models.data.open import open_source
from models.denoisers.dit import DiTSettings
from models.denoisers.stdit import STDiTSettings
from models.denoisers.walt_config import WALTSettings
from models.objectives.flow import FlowMatching
from models.registry import build, configure
from models.runtime.plain import merge
from models.sampling.clips import ClipRequest, sample_clips
from models.training.config import PreviewConfig, TrainConfig
from models.training.run import train
from models.training.trainer import Trainer

SMALL = {"width": 16, "depth": 2, "heads": 2}
TINY = TrainConfig(
    data=DataConfig(frames=2),
    model=DiTSettings(**SMALL, patch=(1, 8, 8), class_dropout=0.0),
    preview=PreviewConfig(count=1, steps=1),
    steps=4,
    batch_size=4,
    save_every=2,
    log_every=2,
)
FAMILIES = {
    "dit": DiTSettings(**SMALL, patch=(1, 4, 4), qk_norm="rms"),
    "latte": DiTSettings(**SMALL, patch=(1, 4, 4), attention="factorized"),
    "stdit": STDiTSettings(**SMALL, patch=(1, 4, 4)),
    "walt": WALTSettings(**SMALL, patch=(1, 4, 4), spatial_window=(2, 2), spatiotemporal_window=(2, 2, 2)),
}


def model_of(family: str) -> torch.nn.Module:
    """A model with no layer that is zero."""
    return randomize(build(configure(FAMILIES[family], 3, 2, (16, 16), 4, 0)))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def fixed_loss(model, x, y, generator, memory, low):
    """The loss of a fixed time and noise."""
    noise = torch.linspace(-1, 1, x[0].numel()).view_as(x[0])
    return (model(0.5 * (x + noise), torch.full((x.shape[0],), 500.0), y) - (x - noise)).square().mean()


def gradients(trainer: Trainer, monkeypatch) -> list[torch.Tensor]:
    """The gradients that the optimizer gets."""
    seen: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", lambda: seen.extend(p.grad.clone() for p in trainer.trained))
        trainer.train_step()
    return seen


def test_micro_batches_give_the_gradient_of_the_batch(tmp_path, monkeypatch):
    results = []
    for accumulation in (1, 2, 4):
        trainer = Trainer(merge(TINY, {"run": str(tmp_path), "accumulation": accumulation, "optimizer": {"clip": 0}}))
        randomize(trainer.model)
        trainer.loss.objective = type("Fixed", (), {"name": "flow", "loss": staticmethod(fixed_loss)})()
        results.append(gradients(trainer, monkeypatch))
        trainer.batches.close()
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.abs().max() > 0
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_of_one_sample_are_as_one(family):
    """The prediction of each, and the gradient of the mean loss."""
    model = model_of(family).eval()
    x, t, y = torch.randn(1, 3, 2, 16, 16), torch.tensor([400.0]), torch.tensor([2])
    results = []
    for count in (1, 2):
        prediction = model(x.repeat(count, 1, 1, 1, 1), t.repeat(count), y.repeat(count))
        found = torch.autograd.grad(
            prediction.square().mean(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        results.append((prediction, found))
    (one, of_one), (two, of_two) = results
    assert one.abs().max() > 0 and torch.equal(two[0], two[1])
    torch.testing.assert_close(two[:1], one, rtol=1e-5, atol=1e-6)
    for a, b in zip(of_one, of_two, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * a.abs().max().item() + 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_does_not_depend_on_its_batch(family):
    model, y = model_of(family).eval(), torch.arange(4)
    clips = [
        sample_clips(model, FlowMatching(), ClipRequest(count=4, y=y, steps=3, guidance=2.0, seed=1, batch_size=size))
        for size in (1, 3, 4)
    ]
    assert all((clips[0].int() - other.int()).abs().max() <= 1 for other in clips[1:])


def storages() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors that are alive, by its place."""
    gc.collect()
    found = [item.untyped_storage() for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return {storage._cdata: storage for storage in found}


@pytest.mark.slow
def test_a_trainer_that_goes_on_holds_as_much_as_one_that_was_not_stopped(tmp_path):
    held = []
    path = train(merge(TINY, {"run": str(tmp_path / "run"), "steps": 2}))
    for resume in (False, True):
        before = storages()  # which stay alive, so that no place is taken again
        trainer = Trainer(merge(TINY, {"run": str(tmp_path / "run")}), load(path) if resume else None)
        for _ in range(2):
            trainer.train_step()
        trainer.batches.close()
        trainer.batches._ahead.clear()
        held.append(sum(storage.nbytes() for place, storage in storages().items() if place not in before))
        del trainer, before
    assert held[0] > 100_000 and abs(held[1] - held[0]) < 2_000, held


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_the_memory_of_a_loader_is_flat_over_200_epochs(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        (tmp_path / f"{number % 2}").mkdir(exist_ok=True)
        write_png(tmp_path / f"{number % 2}/{number}.png", rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    # No room for a decoded picture: each is read anew.
    source = open_source(DataConfig(source=str(tmp_path), frames=1, size=(16, 16), cache_megabytes=0))
    batches = Batches(source, 2, seed=0)
    tracemalloc.start()
    try:
        traced, pages = [], []
        for step in range(400):  # two steps an epoch
            batches.batch(step)
            if step in (99, 399):
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])
                pages.append(resident())
    finally:
        tracemalloc.stop()
        batches.close()
    # One clip a batch would be 1.8 MB. What else in the process remembers something takes a tenth of it.
    assert traced[1] - traced[0] < 400_000, traced
    assert pages[1] - pages[0] < 8 << 20, pages


def test_the_share_of_time_that_steps_wait_for_data_is_logged(tmp_path, monkeypatch, capsys):
    make = Batches.make

    def slowly(self, step):
        import time

        time.sleep(0.15)
        return make(self, step)

    monkeypatch.setattr(Batches, "make", slowly)
    train(merge(TINY, {"run": str(tmp_path / "run"), "steps": 6}))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    waited = [event.value for event in events.Scalars("share of time waiting for data")]
    assert len(waited) == 3 and all(value < 1 for value in waited) and waited[-1] > 0.3
    assert "of the time waiting for data" in capsys.readouterr().err
