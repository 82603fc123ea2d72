"""The tool that says what fuse is worth: it refuses what is wrong, and its record has what its table shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import docs, fuse

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("nothing_compiled", "threads")


def test_the_table_of_a_record(tmp_path: Path):
    case = {
        "model": "Wan",
        "dtype": "float32",
        "direction": "fwd+bwd",
        "ratios": {"fuse": 1.254},
        "found": {"adaln": 5},
    }
    parts = {
        "machine": {"cpu": "a CPU"},
        "threads": 1,
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "dirty": False,
    }
    record = {**parts, "date": "2026-01-02T03:04", "cases": [{**case, "kept": {"full": 0.8, "LoRA": 1.0}}]}
    record["cases"].append({**case, "direction": "fwd", "commit": "def"})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "fuse.json").write_text(json.dumps(record))
    text = "\n".join(docs.TABLES["fuse"](tmp_path, "here"))
    assert re.search(r"\| Wan +\| float32 +\| fwd\+bwd +\| - +\| 1.25 +\| - +\| 0.80 +\| 1.00 +\| 5 +\|", text), text
    assert "commit abc (1 cases of def)" in text
    assert list(docs.unshown([""], tmp_path)) == ["<!-- table: fuse here -->"]


@pytest.mark.slow
def test_a_model_is_measured_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "fuse.json"
    words = "--models Wan --dtypes float32 --rounds 1 --no-compile --save-as"
    assert fuse.main([*words.split(), str(path)]) == 0
    forward, both = json.loads(path.read_text())["cases"]
    assert forward["ratios"].keys() == {"fuse"} and forward["seconds"]["eager"] > 0
    assert both["found"]["attention"] == 4 and both["found"]["gelu_mlp"] == 3
    assert 0 < both["kept"]["full"] < 1 and 0 < both["kept"]["LoRA"] < 2
    assert both["left"] == {}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_part_that_is_run_again_replaces_its_cases_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(name: str, dtype: str, direction: str, rounds: int, compiled: bool) -> dict[str, Any]:
        return dict(model=name, dtype=dtype, direction=direction, rounds=rounds, ratios={}, found={})

    monkeypatch.setattr(fuse, "RESULTS", tmp_path)
    monkeypatch.setattr(fuse, "measure", measure)
    for words in ("--rounds 1 --save", "--directions fwd --rounds 2 --save --save-into"):
        assert fuse.main(["--models", "Wan", "--dtypes", "float32", *words.split()]) == 0
    (path,) = tmp_path.glob("*/fuse.json")
    cases = json.loads(path.read_text())["cases"]
    assert [(case["direction"], case["rounds"], "commit" in case) for case in cases] == [
        ("fwd", 2, False),
        ("fwd+bwd", 1, True),
    ]


def test_a_column_that_computes_something_else_is_refused():
    calls = {"eager": lambda: torch.ones(4), "fuse": lambda: torch.ones(4) * 1.01}
    with pytest.raises(RuntimeError, match=r"Wan: fuse differs from eager by 1\.0e-02"):
        fuse.check_same("Wan", calls, torch.float32)


def test_a_compiler_that_computes_something_else_is_left_out():
    right, wrong = (lambda: torch.ones(4)), (lambda: torch.full((4,), torch.nan))
    calls = {"eager": right, "compile": wrong, "fuse": right, "fuse, compile": wrong}
    found = fuse.check_same("Wan", calls, torch.float32)
    assert found.keys() == {"compile", "fuse, compile"} and found["compile"] == "compile differs from eager by nan"
    with pytest.raises(RuntimeError, match="fuse, compile differs from eager by nan"):
        fuse.check_same("Wan", {**calls, "compile": right}, torch.float32)


def test_lora_is_put_on_attention_alone():
    model, _ = fuse.build("Wan", torch.float32)
    fuse.adapt(model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, fuse.LoRA)]
    assert len(adapted) == 2 * 2 * 4
    assert all("attn" in name for name in adapted)
    assert all("down" in name or "up" in name for name, each in model.named_parameters() if each.requires_grad)


@pytest.mark.parametrize("flag", ["--rounds", "--threads"])
def test_numbers_are_checked(flag: str):
    with pytest.raises(SystemExit, match=f"{flag} is 0; it must be at least 1"):
        fuse.main([flag, "0"])
