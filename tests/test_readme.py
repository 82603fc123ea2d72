"""The README's example runs, its table says what the code says, and its commands exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import torch

from bench import systems
from minisora_kernels import backends
from minisora_kernels.__main__ import ops
from models.training.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_trains():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    names["x"].square().mean().backward()
    assert names["x"].shape == (2, 240, 64)
    for layer in ("project", "qkv", "out", "fc1", "fc2"):
        gradient = names[layer].weight.grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0, layer


def test_the_table_is_what_the_code_has():
    section = README.split("## Ops and backends")[1].split("\n## ")[0]
    header, *rows = (line for line in section.splitlines() if line.startswith(("| op |", "| `")))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert tuple(columns[2:]) == backends.BACKENDS
    table = {}
    for row in rows:
        op, _, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        table[op.strip("`")] = [name for name, cell in zip(backends.BACKENDS, cells, strict=True) if cell]
    claimed = {op: list(importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS) for op in ops()}
    assert table == claimed


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets
    for module in re.findall(r"python -m ([a-z_.]+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_share_of_recognised_digits_is_the_committed_record():
    path = re.search(r"\((bench/results/.*?digits\.json)\)", README)
    assert path is not None
    record = json.loads((ROOT / path[1]).read_text())
    assert f"{record['generated_recognised']:.1%}, against {record['real_recognised']:.1%} of real frames" in README
    assert record["wall_seconds"] < 600


def test_the_systems_are_judged_on_presets_of_digits():
    """Every preset of digits, but those of ``make digits`` alone, belongs to a system."""
    judged = {preset for presets in systems.SYSTEMS.values() for preset in presets}
    assert judged == {name for name in PRESETS if name.startswith("digits-")}
