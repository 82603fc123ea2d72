"""The examples run, as a user would run them, and say what they found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The last line of each, and an op that its report names.
SAYS = {
    "diffusers_video": (r"largest difference: .*e-0[4-9] of \d+\.\d", "gate_residual"),
    "dit": (r"loss: \d\.\d+ to \d\.\d+", "gate_residual_adaln"),
    "lora": (r"\d+ parameters trained, loss: \d\.\d+ to \d\.\d+", "gelu_mlp"),
}


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str):
    if name == "diffusers_video":
        pytest.importorskip("diffusers")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINISORA_VERIFIED": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    lines, (last, op) = result.stdout.splitlines(), SAYS[name]
    assert re.fullmatch(last, lines[-1]), lines[-1]
    assert any(re.match(rf"  {op} +\d+  cpu", line) for line in lines), result.stdout
