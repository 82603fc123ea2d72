"""The steps of bench/gpu/steps.py without a GPU: what they leave, when they run again, what they exit with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import steps as gpu
from minisora_kernels.__main__ import ops

ROOT = Path(__file__).parents[2]


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """The names of the steps that ran; verify leaves status 3, the sanitizer 4."""
    ran: list[str] = []

    def stand_in(step: gpu.Step) -> gpu.Result:
        ran.append(step.name)
        return {"verify": 3, "sanitizer": 4}.get(step.name, 0), {"of": step.name}

    monkeypatch.setattr(gpu, "STEPS", dict.fromkeys(gpu.STEPS, stand_in))
    monkeypatch.setattr(gpu, "of_op", stand_in)
    here = {"commit": "abc", "dirty": False, "dry_run": True}
    monkeypatch.setattr(gpu, "provenance", lambda dry: dict(here))
    return ran


def main(out: Path, *options: str) -> int:
    return gpu.main(["--dry-run", "--out", str(out), *options])


def test_all_run_and_the_first_failure_is_the_exit_status(steps, tmp_path, capsys):
    assert main(tmp_path) == 3
    assert steps == ["tests", "verify", "sanitizer", "quick", *gpu.op_steps()]
    assert {name.split(":")[1] for name in gpu.op_steps()} == {*ops(), "model"}
    found = json.loads((tmp_path / "op-window_attention-W.A.L.T.json").read_text())
    assert found["status"] == 0 and found["results"] == {"of": "op:window_attention:W.A.L.T"}
    assert not list(tmp_path.glob("*.part"))
    capsys.readouterr()
    assert main(tmp_path, "--step", "quick", "sanitizer") == 4
    # What failed is tried again.
    assert "quick: done before" in capsys.readouterr().out and steps[4 + len(gpu.op_steps()) :] == ["sanitizer"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(path.read_text()[:40]),
        lambda path: path.unlink(),
        lambda path: path.write_text(path.read_text().replace('"abc"', '"another"')),
        lambda path: path.write_text(path.read_text().replace('"dirty": false', '"dirty": true')),
        lambda path: path.write_text(path.read_text().replace('"status": 0', '"status": 124')),
        lambda path: path.write_text("[]"),
    ],
    ids=("cut off", "not there", "of another commit", "of changed files", "out of time", "not a step"),
)
def test_what_is_not_whole_runs_again(spoil, steps, tmp_path):
    assert main(tmp_path, "--step", "quick") == main(tmp_path, "--step", "quick") == 0 and steps == ["quick"]
    spoil(tmp_path / "quick.json")
    assert main(tmp_path, "--step", "quick") == 0 and steps == ["quick"] * 2
    assert main(tmp_path, "--step", "quick", "--again") == 0 and steps == ["quick"] * 3


def test_what_a_step_is_called(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(tmp_path, "--step", "op:nothing")
    assert (
        "step is 'op:nothing'; it may be one of tests, verify, sanitizer, quick, tune, op:adaln"
        in capsys.readouterr().err
    )


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    step = gpu.Step("tests", tmp_path, True, time.monotonic() + 1)
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    assert step.run(sys.executable, "-c", sleeper) == gpu.LATE and time.monotonic() - started < 30


def test_tests_are_counted(tmp_path):
    assert gpu.counted(tmp_path / "none.xml")["failed"]
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure/></testcase>'
        '<testcase classname="a" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu.counted(path) == {"passed": 1, "skipped": 1, "failed": ["a::c"]}


def dry_run(out: Path, *names: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--limit", "580", "--out", str(out), "--step", *names]
    # A process of pytest-xdist hands its name on, and pytest-benchmark then takes no time.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    said = "\n".join(path.read_text()[-2000:] for path in out.glob("*.txt"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    return {name: json.loads((out / f"{name.replace(':', '-')}.json").read_text()) for name in names}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_the_steps_of_right_and_wrong_go_their_way(tmp_path):
    found = dry_run(tmp_path, "tests", "sanitizer")
    assert found["tests"]["results"]["passed"] > 0 and found["tests"]["results"]["failed"] == []
    assert found["tests"]["dry_run"] and found["tests"]["seconds"] < 300


@pytest.mark.skipif(importlib.util.find_spec("minisora_kernels.verify") is None, reason="there is no verify yet")
@pytest.mark.slow
def test_the_step_of_verify_leaves_its_record(tmp_path):
    found = dry_run(tmp_path, "verify")
    assert found["verify"]["results"]["verified"]


@pytest.mark.slow
def test_the_steps_of_benches_leave_their_records(tmp_path):
    found = dry_run(tmp_path, "quick", "op:unpatchify")
    for name in ("quick", "op:unpatchify"):
        ((case, figures),) = found[name]["results"]["cases"].items()
        assert case.startswith("unpatchify") and figures["us"] > 0 and {"eager", "compile"} <= figures.keys()
        assert (tmp_path / found[name]["results"]["record"]).exists()
