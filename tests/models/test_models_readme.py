"""README.md: its table names what is there, its Python runs, its commands train."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from models import plan, train
from models.registry import OBJECTIVES, SYSTEMS
from models.training.presets import PREREQUISITES, PRESETS, training_order

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "models/README.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.split("## Systems")[1].split("## Rooms")[0].splitlines()
    if line.startswith("|")
][2:]
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python -m models.")
]
TRAININGS = [command[3:] for command in COMMANDS if command[2] == "models.train"]
PLANS = [command[3:] for command in COMMANDS if command[2] == "models.plan"]


def named(cells: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cells))


def test_the_table_has_every_system_and_preset():
    prefixes = [name.removesuffix("*") for row in ROWS for name in named(row[0])]
    for system in SYSTEMS:
        assert any(system == name or (name.endswith("-") and system.startswith(name)) for name in prefixes), system
    for prefix in prefixes:
        assert any(system.startswith(prefix) for system in SYSTEMS), prefix
    assert {name for row in ROWS for name in named(row[4])} == {*PRESETS}
    for row in ROWS:
        assert all((ROOT / "models" / name).is_file() for name in named(row[1])), row
        assert named(row[3]) <= {*OBJECTIVES}
        for preset in named(row[4]):
            assert PRESETS[preset].objective.name in ("ddpm", *named(row[3])), preset


def test_what_is_trained_before_a_preset_are_presets_and_gives_its_latents():
    for name, config in PRESETS.items():
        assert ("-latents" in config.data.source) == (name in PREREQUISITES)
        if name in PREREQUISITES:
            assert config.data.source == f"{PRESETS[PREREQUISITES[name].autoencoder].run}-latents"
        assert {*training_order(name)} <= {*PRESETS} and training_order(name)[-1] == name


def test_the_python_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(code, "models/README.md", "exec"), names)
    assert names["nats"].shape == (2,) and names["nats"].isfinite().all()
    assert names["clips"].shape == (1, 3, 5, 32, 32) and names["clips"].isfinite().all()
    assert names["prediction"].shape == (1, 4, 2, 8, 8)
    assert names["walt"].pos_space.shape == (8, 8, 32)
    weight = names["image"].x_embedder.proj.weight
    assert torch.equal(names["video"].x_embedder.proj.weight[:, :, 0], weight)


@pytest.mark.parametrize("command", TRAININGS, ids=lambda command: command[-1])
def test_the_commands_train(command, tmp_path):
    short = "--steps 2 --batch-size 2 --preview.every 0 --preview.count 1 --preview.steps 1 --device cpu"
    train.main([*command, *short.split(), "--run", str(tmp_path / "run")])
    assert (tmp_path / "run/step_00000002.pt").exists()


@pytest.mark.parametrize("command", PLANS, ids=lambda command: command[-1])
def test_the_plans_are_printed(command, capsys):
    small = [argument.replace("latte-xl/", "latte-s/") for argument in command]
    plan.main([*small, "--size", "64", "64", "--frames", "2"])
    assert "training:" in capsys.readouterr().out
