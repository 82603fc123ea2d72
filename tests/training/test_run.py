"""What becomes of a run that ends early, by whatever: nothing is lost, and it goes on as if it had not been stopped."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import signal
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import rows, stop_after, tiny
from torch.utils.tensorboard import SummaryWriter

from models import checkpoint as checkpoints
from models.checkpoint import latest, load, path_of, save
from models.objectives.flow import FlowMatching
from models.runtime.files import locked
from models.sampling.solvers import NotFinite
from models.train import parse
from models.training.log import Losses
from models.training.run import SIGNALS, train, train_or_continue
from models.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def same(ours, theirs) -> bool:
    """Whether two checkpoints hold the same bits."""
    for part in ("model", "ema", "rng", "memory"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        if mine.keys() != other.keys() or not all(torch.equal(mine[key], other[key]) for key in other):
            return False
    return str(ours.optimizer) == str(theirs.optimizer) and ours.step == theirs.step


@pytest.mark.parametrize("number", SIGNALS)
def test_stopping_saves_and_says_so(tmp_path, monkeypatch, number):
    before = signal.signal(number, signal.default_int_handler)
    try:
        stopped = stop_after(3, tiny(tmp_path / "run"), monkeypatch, number)
        # A signal after training has its own effect again.
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert stopped.status == 128 + number and stopped.args[0].startswith(f"stopped by {number.name}; saved")
    path, checkpoint = latest(tmp_path / "run")
    assert checkpoint.step == 3 and str(path) in stopped.args[0]
    assert len(rows(tmp_path / "run")) == 4


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_nohup_stays_in_force(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    original = Trainer.train_step

    def step(self):
        os.kill(os.getpid(), signal.SIGHUP)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    try:
        assert load(train(tiny(tmp_path / "run", steps=3))).step == 3
    finally:
        signal.signal(signal.SIGHUP, before)


UNSAVED = {
    "nothing": {},
    "config": {"config.json": b'{\n  "run": "x",\n  "data": {}}\n'},
    "part of it": {"config.json": b'{\n  "ru'},
    "no part of it": {"config.json": b""},
    "temporary": {"config.json.tmp": b"{", "step_00000000.pt.tmp": b"PK", "step_00000000.tmp": b"PK"},
}


@pytest.mark.parametrize("name", UNSAVED)
def test_an_unsaved_beginning_starts_again(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    for file, content in UNSAVED[name].items():
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match="holds no whole checkpoint: start it again with the command that began it"):
        parse(["--resume", str(folder)])
    assert train_or_continue(tiny(folder, steps=1)) == path_of(folder, 1)
    assert not list(folder.glob("*.tmp"))


def test_a_run_starts_again_after_a_full_disk_at_its_first_checkpoint(tmp_path, monkeypatch):
    for fatal in range(3):
        config, calls, flush = tiny(tmp_path / str(fatal), steps=1), itertools.count(), os.fsync

        def full(descriptor, fatal=fatal, calls=calls, flush=flush):
            if next(calls) == fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(OSError, match=r"No space left on device: '.*(config\.json|step_00000000\.pt)'"):
                train(config)
        assert load(train(config)).step == 1


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", b'{\n  "_class_name": "AutoencoderKL"', "exists already; choose another --run"),
        ("notes.txt", b"mine", "exists already; choose another --run"),
        ("losses.csv", b"step", "exists already; choose another --run"),
        ("step_00000003.pt", b"", "exists already; continue it with --resume .*, or choose another --run"),
    ],
)
def test_a_folder_with_anything_else_is_never_written_to(tmp_path, file, content, reason):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        train(tiny(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]
    with pytest.raises(ValueError, match="which is a file; it must be a folder"):
        train(tiny(tmp_path / "run" / file))


def test_one_trainer_per_run_folder(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stop_after(3, tiny(folder), monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with locked(folder):
        for arguments in ((tiny(folder),), parse(["--resume", str(folder)])):
            with pytest.raises(BlockingIOError, match="run is in use: another process writes there"):
                train(*arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert load(train(*parse(["--resume", str(folder)]))).step == 8


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"accumulation": 2}, ValueError("data")),
        ({}, MemoryError()),
        ({"precision": "bf16"}, RuntimeError("CUDA out of memory")),
        ({"objective": {"name": "ddpm", "timesteps": "loss_aware"}, "accumulation": 3}, OSError("disk")),
        (
            {"objective": {"name": "reconstruction"}, "model": {"name": "vqgan", "width": 8, "blocks": 1, "codes": 64}},
            ZeroDivisionError(),
        ),
    ],
    ids=["flow", "memory", "bf16", "loss_aware", "batch norm"],
)
def test_an_error_saves_first_and_the_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, error, changes, caplog):
    whole = load(train(tiny(tmp_path / "whole", **changes)))
    config = tiny(tmp_path / "run", **changes)
    kind, calls = type(config.objective), itertools.count()
    original = kind.loss

    def fail(self, *arguments):
        loss = original(self, *arguments)  # it has drawn from the generators, and changed memory and statistics
        if next(calls) == 6 * config.accumulation + config.accumulation - 1:
            raise error
        return loss

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(kind, "loss", fail)
        with pytest.raises(type(error)):
            train(config)
    path, checkpoint = latest(tmp_path / "run")
    assert (
        checkpoint.step == 6
        and f"saved {path}; once the cause is gone, go on with --resume {path.parent}" in caplog.text
    )
    assert len(rows(tmp_path / "run")) == 7
    assert same(load(train(*parse(["--resume", str(tmp_path / "run")]))), whole)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, value, where):
    whole = load(train(tiny(tmp_path / "whole")))
    original, calls = FlowMatching.loss, itertools.count()

    def spoil(self, model, *arguments):
        loss = original(self, model, *arguments)
        if next(calls) != 5:
            return loss
        if where == "loss":
            return loss * value
        last = model.final_layer.linear.weight
        return loss + (last - last.detach()).sum() * value if math.isinf(value) else loss + (last * 0).sqrt().sum()

    with monkeypatch.context() as patch:
        patch.setattr(FlowMatching, "loss", spoil)
        with pytest.raises(ValueError, match=r"step 5 has loss .* and gradient norm .*; lower the learning rate"):
            train(tiny(tmp_path / "run"))
    path, checkpoint = latest(tmp_path / "run")
    assert checkpoint.step == 5 and len(rows(tmp_path / "run")) == 6
    assert all(value.isfinite().all() for part in (checkpoint.model, checkpoint.ema) for value in part.values())
    assert same(load(train(*parse(["--resume", str(path)]))), whole)


def test_a_state_that_is_not_sound_is_not_saved(tmp_path, monkeypatch):
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        original(self, *arguments)
        if next(calls) == 5:
            raise RuntimeError("in the middle of an update")

    calls = itertools.count()
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(RuntimeError, match="in the middle"):
        train(tiny(tmp_path / "run"))
    assert latest(tmp_path / "run")[1].step == 4


def test_a_checkpoint_that_cannot_be_written_is_not_tried_again(tmp_path, monkeypatch):
    def full(folder, checkpoint, keep):
        tried.append(checkpoint.step)
        if checkpoint.step == 4:
            raise OSError("disk full")
        return save(folder, checkpoint, keep)

    tried = []
    monkeypatch.setattr(checkpoints, "save", full)
    with pytest.raises(OSError, match="disk full"):
        train(tiny(tmp_path / "run"))
    assert tried == [0, 4]


def test_a_preview_that_is_not_finite_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def preview(self):
        raise NotFinite("the samples are not finite")

    monkeypatch.setattr(Trainer, "preview", preview)
    assert load(train(tiny(tmp_path / "run", preview={"every": 4}))).step == 8
    assert "no preview after step 4: the samples are not finite" in caplog.text


def test_a_run_goes_on_from_a_file(tmp_path, monkeypatch, caplog):
    whole = load(train(tiny(tmp_path / "whole")))
    folder = tmp_path / "run"
    stop_after(6, tiny(folder), monkeypatch)
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000004.pt", "step_00000006.pt"]
    config, checkpoint = parse(["--resume", str(path_of(folder, 4))])
    assert checkpoint.step == 4 and config == tiny(folder)
    stop_after_resume = load(train(config, checkpoint))
    assert same(stop_after_resume, whole) and rows(folder) == rows(tmp_path / "whole")
    assert "step_00000006.pt is of a later step; it is set aside as step_00000006.pt.aside" in caplog.text
    assert load(folder / "step_00000006.pt.aside").step == 6
    with pytest.raises(ValueError, match=r"step_00000009\.pt holds no whole checkpoint"):
        parse(["--resume", str(path_of(folder, 9))])


def test_the_curves_stay_one_curve(tmp_path, monkeypatch):
    """Over many stops, a clock that goes back, and what an older version and a dead machine have left."""
    folder = tmp_path / "run"
    clock = itertools.count(2_000_000_000, -1000)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    options = {"steps": 12, "save_every": 2, "log_every": 1, "preview": {"every": 2}}
    stop_after(3, tiny(folder, **options), monkeypatch)
    board = SummaryWriter(str(folder))  # named by the clock, with steps that the run has undone
    for step in (1, 2, 3, 4):
        board.add_scalar("loss", -1.0 if step > 2 else 7.0, step)
    board.close()
    for name in ("events.out.tfevents.0000000002.run.tmp", "events.out.tfevents.9999999998.x"):
        (folder / name).write_bytes(b"\x10\0\0\0\0\0\0\0broken")
    for stop in (5, 7, 9):
        original = Trainer.train_step

        def step(self, original=original, stop=stop):
            result = original(self)
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        with monkeypatch.context() as patch, pytest.raises(Exception, match="stopped by SIGTERM"):
            patch.setattr(Trainer, "train_step", step)
            train(*parse(["--resume", str(folder)]))
    train(*parse(["--resume", str(folder)]))
    assert len(list(folder.glob("*tfevents*"))) == 1
    events = EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()
    for tag in ("loss", "gradient norm", "learning rate", "tokens/s"):
        assert [event.step for event in events.Scalars(tag)] == list(range(12))
    assert [event.step for event in events.Images("samples")] == [2, 4, 6, 8, 10, 12]
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert all(losses[int(row[0])] == pytest.approx(float(row[1])) for row in rows(folder)[1:] if row[0] not in "12")
    times = [event.wall_time for event in events.Scalars("learning rate")]
    assert times == sorted(times)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_losses_are_named_and_the_rest_is_kept(tmp_path, caplog, seed):
    path = tmp_path / "losses.csv"
    losses = Losses(path, 0)
    losses.write([(step, 0.123 + step, 4.5, 1e-4) for step in range(20)])
    losses.close()
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for place, damage in itertools.product(range(seed + 40, 200, 17), (b"\xd0", b"\0", b'"', b"\n", b"\r", b",")):
        caplog.clear()
        path.write_bytes(content[:place] + damage + content[place + 1 :])
        Losses(path, 20).close()
        kept = path.read_bytes().splitlines(keepends=True)
        assert kept[0] == lines[0] and len(kept) >= 18
        assert len(kept) == 21 or f"{path} has no line that can be read of" in caplog.text
