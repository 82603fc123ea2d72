"""Errors of the commands: one line and a status, nothing written before it, a traceback only where it is asked for."""

from __future__ import annotations

import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minisora_kernels.commands import command, message_of, out_of_memory
from models.runtime.arguments import check_numbers
from models.training.config import OptimizerConfig, TrainConfig
from models.training.options import load

ROOT = Path(__file__).parent.parent.parent
TINY = "--data.frames 2 --model.width 16 --model.depth 1 --model.heads 2 --model.patch 1 8 8 --batch-size 2 --steps 1"
HUGE = "9" * 30


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    importlib.import_module("models.train").main([*TINY.split(), "--run", str(folder)])
    return folder


def fails(name: str, arguments: list[str], capsys) -> str:
    """What the command says at its end: a line with status 1, or what tyro and argparse say of a usage, with 2."""
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"models.{name}").main(arguments)
    said = left.value.code
    if said == 2:
        return capsys.readouterr().err
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said
    assert "--traceback" not in said, f"an error that nobody foresaw: {said}"
    return said


VALUES = [
    *[(f"--{name}", value) for name in ("optimizer.learning-rate", "model.mlp-ratio") for value in ("nan", "inf", "x")],
    *[(f"--{name}", "-inf") for name in ("optimizer.weight-decay", "optimizer.clip", "optimizer.ema")],
    *[(f"--{name}", HUGE) for name in ("seed", "steps", "batch-size", "data.frames", "preview.count", "model.width")],
    *[("--optimizer.betas", pair) for pair in ("1 0.9", "0.9 -1", "nan 0.9", "0.9 inf")],
    *[("--optimizer.weight-decay", "-1"), ("--preview.guidance", "nan"), ("--data.cache-megabytes", HUGE)],
    *[("--backend", "cuda"), ("--backend", "gpu"), ("--device", "cuda:99"), ("--device", "meta")],
    *[("--text.encoder", "nowhere"), ("--encoder", "nowhere"), ("--data.source", "nowhere"), ("--preset", "nothing")],
]


@pytest.mark.parametrize(("option", "value"), VALUES)
def test_a_bad_option_of_train_is_one_line_and_leaves_nothing(option, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fails("train", [*TINY.split(), "--run", "run", option, *value.split()], capsys)
    assert option.split(".")[-1].lstrip("-").replace("-", "_") in said.replace("-", "_"), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--fps", "2147483648"), ("--seed", HUGE), ("--count", HUGE), ("--continuations", "2147483648")],
        *[("--guidance", "nan"), ("--guidance", "inf"), ("--rtol", "nan"), ("--diffusion-norm", "inf")],
        *[("--backend", "cuda"), ("--device", "cuda:7"), ("--class", "nothing"), ("--steps", "ddim")],
    ],
)
def test_a_bad_option_of_sample_is_one_line_and_leaves_nothing(option, value, run, tmp_path, capsys):
    said = fails("sample", [str(run), "--out", str(tmp_path / "out"), "--steps", "1", option, value], capsys)
    assert option.lstrip("-").replace("-", "_") in said.replace("-", "_"), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("precompute", ["--out", "out", "--encoder", "nowhere"], "nowhere"),
        ("precompute", ["--out", "out", "--encoder", "pixels", "--seed", HUGE], "seed"),
        ("precompute", ["--out", "out", "--encoder", "pixels", "--backend", "cuda"], "backend is 'cuda'"),
        ("measure", ["nowhere"], "nowhere"),
        ("measure", ["nowhere", "--seed", "-1"], "seed is -1; it must be at least 0"),
        ("plan", ["--model", "dit-s/2", "--gpu", "h200", "--utilization", "nan"], "utilization is nan"),
        ("plan", ["--model", "dit-s/2", "--gpu", "h200", "--classes", "-5"], "classes is -5"),
        ("plan", ["--model", "dit-s/2", "--gpu", "h200", "--size", "0", "8"], "size is (0, 8)"),
        ("plan", ["--model", "dit-s/2", "--gpu", "h200", "--compression", "0", "8"], "compression is (0, 8)"),
        ("digits", ["--runs", "runs", "--guidance", "inf"], "guidance is inf"),
        ("digits", ["--runs", "runs", "--seed", HUGE], "seed"),
        ("digits", ["--runs", "runs", "--steps", "0"], "steps is 0; it must be at least 1"),
    ],
)
def test_a_bad_option_of_another_command_is_one_line(name, arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(name, arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "preset: [digits]",
        "preset:",
        "model: {name: [dit]}",
        "objective: {name: {a: 1}}",
        "? [steps]\n: 2",
        "1: 2",
        "optimizer: {learning_rate: .inf}",
        "seed: " + HUGE,
        "data: {size: 5}",
        "data: {buckets: [3]}",
        "run: 2020-13-45",
        "run: !!python/object/apply:os.getcwd []",
        "a: &a [*a]",
        "steps: true",
        "[" * 3000,
        "a: [b\nc: {",
        b"\xff\xfer\x00u\x00n\x00",
        "run: caf\xe9".encode("latin-1"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_read_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = fails("train", ["--config", str(path), "--run", str(tmp_path / "run")], capsys)
    assert "run.yaml" in said or "is inf; it must be finite" in said or HUGE in said
    assert not (tmp_path / "run").exists()


def test_the_file_and_the_key_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {learning_rate: fast}")
    with pytest.raises(ValueError, match=r"run\.yaml': optimizer\.learning_rate is 'fast'; it must be float"):
        load(path)


def test_every_number_of_a_configuration_is_checked():
    with pytest.raises(ValueError, match=r"optimizer\.ema is nan; it must be finite"):
        check_numbers(_unchecked(ema=float("nan")))
    check_numbers(TrainConfig(seed=2**63 - 1))
    for changes in ({"seed": 2**63}, {"keep": 2**31}):
        with pytest.raises(ValueError, match=rf"{next(iter(changes))} is \d+; it may be"):
            check_numbers(TrainConfig(**changes))


def _unchecked(**changes: float) -> TrainConfig:
    config = TrainConfig()
    object.__setattr__(config, "optimizer", OptimizerConfig(**changes))
    return config


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                     "tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_too_little_memory_is_known_by_any_name(error):
    assert out_of_memory(error) and message_of(error).startswith("out of memory")


def test_other_errors_are_not_memory():
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(OSError(errno.ENOSPC, "full"))


def test_real_tensors_and_arrays_that_do_not_fit_are_out_of_memory():
    for make in (lambda: torch.empty(2**60), lambda: np.empty(2**60), lambda: torch.empty(2**40, 2**40)):
        with pytest.raises((RuntimeError, MemoryError, ValueError)) as caught:
            make()
        assert out_of_memory(caught.value), caught.value


def test_an_unforeseen_error_is_a_line_and_its_traceback_can_be_had(capsys):
    @command()
    def main(arguments):
        assert arguments == ["a"]
        raise KeyError("b\nc")

    with pytest.raises(SystemExit, match=r"error: KeyError: 'b\\nc'; --traceback shows where"):
        main(["a"])
    with pytest.raises(KeyError):
        main(["a", "--traceback"])

    @command(failed=2)
    def other(_):
        raise ValueError("two\nlines")

    assert other([]) == 2 and capsys.readouterr().err == "error: two lines\n"


def test_a_command_that_is_interrupted_says_so(capsys):
    @command()
    def main(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_every_main_is_a_command():
    paths = [*(ROOT / "models").glob("*.py"), *(ROOT / "bench").rglob("*.py"), ROOT / "minisora_kernels/__main__.py"]
    mains = [path for path in paths if re.search(r"^def main\(", path.read_text(), re.MULTILINE)]
    assert len(mains) > 15
    for path in mains:
        assert re.search(r"^@\w+\((failed=2)?\)\ndef main\(", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_a_reader_that_has_enough_ends_the_command_without_a_word(arguments):
    with subprocess.Popen(
        [sys.executable, "-m", "minisora_kernels", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
