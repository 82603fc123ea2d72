"""A run verifies the kernels first on a GPU, and goes on with the backends that it began with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_BACKENDS

from minisora_kernels import automatic, backends
from minisora_kernels.verify import record
from minisora_kernels.verify.record import Entry, Record
from models.checkpoint import load
from models.data.config import DataConfig
from models.denoisers.dit import DiTSettings
from models.runtime import verification
from models.runtime.plain import merge
from models.sample import SampleConfig
from models.sample import run as sample
from models.train import parse
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig
from models.training.run import train
from models.training.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def commands(monkeypatch):
    """The commands that would have been run, and the status they end with."""
    ran: list = []

    def run(command):
        ran.append(command)
        return subprocess.CompletedProcess(command, commands_status[0])

    commands_status = [0]
    monkeypatch.setattr(verification.subprocess, "run", run)
    monkeypatch.setattr(backends, "VERIFIED", None)
    monkeypatch.setattr(automatic, "has_record", lambda device: False)
    return ran, commands_status


@pytest.fixture
def restored():
    """The precision of float32 products afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(("setting", "precision"), [("ieee", "highest"), ("tf32", "high")])
def test_a_gpu_without_a_record_is_verified_before_the_run(commands, caplog, setting, precision, restored):
    ran, status = commands
    torch.backends.cuda.matmul.fp32_precision = setting  # with which torch's older getter raises
    with verification.serving(GPU, "auto", "auto"):
        pass
    (command,) = ran
    assert command[:4] == [sys.executable, "-m", "minisora_kernels", "verify"]
    assert command[4:] == ["--quick", "--missing-only", "--device", "cuda:1", "--precision", precision]
    assert "verified on cuda:1 first. This takes a minute or two. Use `--verify never` to skip it." in caplog.text
    status[0] = 1
    with verification.serving(GPU, "auto", "auto"):
        pass
    assert "verify ended with status 1; what is not verified is served by plain PyTorch" in caplog.text


@pytest.mark.parametrize("why", ["never", "cpu", "by name", "environment", "record", "told not to"])
def test_otherwise_nothing_is_verified(commands, why, monkeypatch):
    if why == "environment":
        monkeypatch.setattr(backends, "FORCED", "reference")
    if why == "record":
        monkeypatch.setattr(automatic, "has_record", lambda device: True)
    if why == "told not to":
        monkeypatch.setattr(backends, "VERIFIED", "0")
    device, backend = CPU if why == "cpu" else GPU, "triton" if why == "by name" else "auto"
    with verification.serving(device, backend, "never" if why == "never" else "auto"):
        assert backends.forced(backends.FORCED) == {"by name": "triton", "environment": "reference"}.get(why)
    assert not commands[0] and backends.forced(None) is None


def test_the_options_of_verify_are_what_the_command_takes():
    """The command above is not run on a GPU here; its options are read by the real parser."""
    from minisora_kernels.__main__ import main

    assert main(["verify", "--quick", "--missing-only", "--device", "cuda:1", "--precision", "high"]) == 2


def tiny(folder: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        data=DataConfig(frames=2),
        model=DiTSettings(width=16, depth=1, heads=2, patch=(1, 8, 8)),
        optimizer=OptimizerConfig(warmup=2),
        preview=PreviewConfig(count=2, steps=2, every=0),
        steps=4,
        batch_size=2,
        save_every=2,
        keep=9,
    )
    return merge(config, {"run": str(folder)} | changes)


@pytest.mark.skipif(KERNEL_BACKENDS != ["cpu"], reason="the cpu kernels are not under test")
def test_a_run_stores_what_served_it_and_goes_on_with_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(backends, "VERIFIED", "0")
    automatic.forget()
    whole = load(train(tiny(tmp_path / "run")))
    served = whole.served
    assert served["adaln float32 forward+backward"] == served["gelu_mlp float32 forward+backward"] == "cpu"
    for path in sorted((tmp_path / "run").glob("step_*.pt"))[-1:]:
        path.unlink()

    # since then a record says otherwise of three ops
    times: dict = {"ours": [1.0, None], "eager": [1.0, None]}
    regime = "float32 forward+backward"
    entries = (
        Entry("cpu", "adaln", regime, True, 0.5, "", "float32", times, [1.2, 1.3], None),
        Entry("cpu", "unpatchify", regime, False, None, "odd: gradient of tokens", "float32", times, None, None),
        Entry("cpu", "gelu_mlp", regime, True, 0.5, "", "float32", times, [0.5, 0.6], None),
    )
    record.save(Record(record.key(CPU), {}, entries), tmp_path / "record.json")
    monkeypatch.setattr(backends, "VERIFIED", str(tmp_path / "record.json"))
    automatic.forget()
    caplog.clear()
    config, checkpoint = parse(["--resume", str(tmp_path / "run")])
    assert checkpoint.step == 2 and checkpoint.served["adaln float32 forward+backward"] == "cpu"
    resumed = load(train(config, checkpoint))
    adaln = "adaln float32 forward+backward: cpu served this run, now reference would: slower here: 1.20 of plain "
    assert any(line.startswith(adaln) and line.endswith("; cpu is kept") for line in caplog.messages)
    unpatchify = f"unpatchify {regime}: cpu served this run, now reference would: wrong here: odd: gradient of tokens"
    assert f"{unpatchify}; reference serves the rest" in caplog.messages
    assert not any("gelu_mlp" in line for line in caplog.messages)
    assert resumed.served == served | {f"unpatchify {regime}": "reference"}
    assert all(torch.equal(resumed.model[name], value) for name, value in whole.model.items())
    automatic.forget()


@pytest.mark.skipif(KERNEL_BACKENDS != ["cpu"], reason="the cpu kernels are not under test")
def test_a_run_on_plain_pytorch_stays_there_and_sampling_asks_first(tmp_path, monkeypatch, caplog):
    slow = {"ours": [2.0, None], "eager": [1.0, None]}
    entries = [
        Entry("cpu", "adaln", f"float32 {way}", True, 0.5, "", "float32", slow, [2.0, 2.0], None)
        for way in ("forward", "forward+backward")
    ]
    record.save(Record(record.key(CPU), {}, tuple(entries)), tmp_path / "record.json")
    monkeypatch.setattr(backends, "VERIFIED", str(tmp_path / "record.json"))
    automatic.forget()
    assert load(train(tiny(tmp_path / "run", steps=2))).served["adaln float32 forward+backward"] == "reference"
    monkeypatch.setattr(backends, "VERIFIED", "0")
    automatic.forget()
    config, checkpoint = parse(["--resume", str(tmp_path / "run"), "--steps", "4", "--verify", "never"])
    assert load(train(config, checkpoint)).served["adaln float32 forward+backward"] == "reference"
    said = "adaln float32 forward+backward: reference served this run, now cpu would; reference is kept"
    assert said in caplog.messages
    asked: list = []
    monkeypatch.setattr(verification, "verify_first", lambda *given: asked.append(given))
    sample(SampleConfig(tmp_path / "run", count=1, steps=1, verify="never"))
    assert asked == [(CPU, "never")]
    automatic.forget()


def test_a_checkpoint_of_an_op_that_is_gone_is_no_crash(caplog):
    with verification.serving(CPU, "auto", "never", {"softplus float32 forward": "cpu"}):
        pass
    assert not caplog.messages


def test_a_checkpoint_from_before_says_nothing_of_what_served(tmp_path):
    path = train(tiny(tmp_path / "run", steps=2))
    content = torch.load(path, weights_only=True)
    del content["served"], content["train"]["verify"]
    torch.save(content, path)
    config, checkpoint = parse(["--resume", str(tmp_path / "run"), "--steps", "3"])
    assert checkpoint.served == {} and Trainer(config, checkpoint).served == {}
