from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.checkpoint import (
    Checkpoint,
    NotACheckpoint,
    NotEnoughMemory,
    complete,
    latest,
    load,
    open_checkpoint,
    part_of,
    path_of,
    save,
    save_part,
)
from models.denoisers.dit import DiT, DiTConfig
from models.runtime.plain import as_plain
from models.training.config import TrainConfig, from_dict

DIT = DiTConfig(input_size=(2, 8, 8), patch=(1, 4, 4), channels=1, width=16, depth=1, heads=2, num_classes=3)
ROOT = Path(__file__).parent.parent.parent


def make(step: int) -> Checkpoint:
    model = DiT(DIT)
    return Checkpoint(
        train=as_plain(TrainConfig(seed=step)),
        config=as_plain(DIT),
        classes=["a", "b", "c"],
        step=step,
        model=model.state_dict(),
        ema={name: weight + 1 for name, weight in model.state_dict().items()},
        optimizer=torch.optim.AdamW(model.parameters()).state_dict(),
        rng={"torch": torch.get_rng_state()},
    )


def test_what_is_saved_comes_back(tmp_path):
    saved = make(7)
    path = save(tmp_path, saved, keep=2)
    read = load(path)
    assert path == path_of(tmp_path, 7) and os.listdir(tmp_path) == [path.name]
    for item in dataclasses.fields(Checkpoint):
        if item.name in ("model", "ema", "rng"):
            ours, theirs = getattr(saved, item.name), getattr(read, item.name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        else:
            assert getattr(saved, item.name) == getattr(read, item.name)
    assert from_dict(read.train) == TrainConfig(seed=7)
    for ema, weights in ((True, saved.ema), (False, saved.model)):
        built = read.build(ema=ema)
        assert built.config == DIT and all(
            torch.equal(value, weights[key]) for key, value in built.state_dict().items()
        )


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, make(step), keep=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_00000003.pt", "step_00000010.pt"]


def test_a_broken_newer_file_does_not_push_out_whole_ones(tmp_path):
    save(tmp_path, make(4), keep=1)
    path_of(tmp_path, 8).write_bytes(b"broken")
    save(tmp_path, make(6), keep=1)
    assert latest(tmp_path)[0] == path_of(tmp_path, 6)


def test_latest_skips_what_is_not_whole_and_names_it(tmp_path, caplog):
    whole = [save(tmp_path, make(step), keep=9) for step in (1, 2, 3, 4)]
    content = whole[3].read_bytes()
    whole[3].write_bytes(content[: len(content) // 2])
    whole[2].write_bytes(b"")
    path_of(tmp_path, 5).with_suffix(".tmp").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        path, checkpoint = latest(tmp_path)
    assert path == whole[1] and checkpoint.step == 2
    for name in ("step_00000003.pt", "step_00000004.pt", "step_00000005.tmp"):
        assert name in caplog.text
    with pytest.raises(NotACheckpoint, match="holds no whole checkpoint"):
        latest(tmp_path / "nowhere")


def test_a_truncated_file_is_refused(tmp_path):
    path = save(tmp_path, make(1), keep=1)
    content = path.read_bytes()
    for size in (*(int(len(content) * share) for share in (0.02, 0.5, 0.98)), *range(len(content) - 120, len(content))):
        path.write_bytes(content[:size])
        with pytest.raises(NotACheckpoint, match="is not a whole checkpoint"):
            load(path)


def damaged(content: bytes, seed: int):
    """Copies of a file with one byte changed, in each part of it, or with a page of zeros."""
    rng = random.Random(seed)
    ends = [*range(100), *range(len(content) - 100, len(content))]
    for place in [*ends, *(rng.randrange(len(content)) for _ in range(100))]:
        copy = bytearray(content)
        copy[place] ^= rng.randrange(1, 256)
        yield place, copy
    for place in (rng.randrange(len(content) - 4096) for _ in range(20)):
        copy = bytearray(content)
        copy[place : place + 4096] = bytes(4096)
        if copy != content:
            yield place, copy


def test_damage_anywhere_is_seen_and_the_newest_whole_one_is_taken(tmp_path, caplog):
    older, path = (save(tmp_path, make(step), keep=9) for step in (1, 2))
    content = path.read_bytes()
    for place, copy in damaged(content, 0):
        path.write_bytes(copy)
        with pytest.raises(NotACheckpoint, match=r"step_00000002\.pt is not a whole checkpoint"):
            pytest.fail(f"byte {place} of {len(content)}: {load(path).step}")
    caplog.clear()
    assert latest(tmp_path)[0] == older
    assert [record.getMessage().partition(" is not")[0] for record in caplog.records] == [f"skipped: {path}"]
    path.write_bytes(content)
    assert latest(tmp_path)[0] == path


def test_a_checkpoint_of_before_there_was_a_checksum(tmp_path, caplog):
    path = save(tmp_path, make(1), keep=1)
    torch.save(torch.load(path, weights_only=True), path)
    assert load(path).step == 1 and "has no checksum" in caplog.text
    file = bytearray(path.read_bytes())
    file[len(file) // 2] ^= 1  # in a tensor, whose own sum torch wrote
    path.write_bytes(file)
    with pytest.raises(NotACheckpoint, match="not a whole checkpoint"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [{"step": "7"}, {"step": -1}, {"step": True}, {"classes": [1]}, {"model": []}, {"ema": {"a": 1}}, {"encoder": 3}],
)
def test_a_field_of_another_type_is_named(tmp_path, change):
    path = save(tmp_path, dataclasses.replace(make(1), **change) if change != {"step": "7"} else make(1), keep=1)
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(NotACheckpoint, match=f"has {next(iter(change))} "):
        load(path)


MEMORY = """
import resource, sys
from models.checkpoint import NotEnoughMemory, latest

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    print(latest(sys.argv[1])[1].step)
except NotEnoughMemory as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is of Linux")
def test_too_little_memory_is_not_taken_for_damage(tmp_path):
    save(tmp_path, make(1), keep=9)
    large = dataclasses.replace(make(2), memory={"large": torch.zeros(48 << 18)})
    path = save(tmp_path, large, keep=9)
    found = []
    for limit in (0, 8 << 20, 40 << 20, 400 << 20):
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(limit)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0 and not result.stderr, result.stderr
        found.append(result.stdout.strip())
    assert found[:3] == [f"not enough memory to read {path}, which takes 48 MiB; no damage was found"] * 3
    assert found[3] == "2"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory in use is read from /proc")
def test_what_is_not_read_takes_no_memory(tmp_path):
    """Weights are mapped: neither the optimizer nor the last weights are read, and the averaged ones not copied."""
    model = DiT(dataclasses.replace(DIT, width=256, depth=12))
    weights = model.state_dict()
    size = sum(weight.nbytes for weight in weights.values())
    state = {"state": {}, "param_groups": [], "moments": {name: torch.ones_like(w) for name, w in weights.items()}}
    config = as_plain(model.config)
    path = save(tmp_path, dataclasses.replace(make(1), config=config, model=weights, ema=weights, optimizer=state), 1)
    torch.manual_seed(0)
    before, started = resident(), torch.get_rng_state()
    built = load(path).build()
    assert torch.equal(torch.get_rng_state(), started)
    total = sum(parameter.double().sum() for parameter in built.parameters())
    assert resident() - before < 1.5 * size
    assert total == sum(weights[name].double().sum() for name, _ in built.named_parameters())
    # What is written to a mapped tensor does not reach the file.
    with torch.no_grad():
        next(built.parameters()).zero_()
    load(path)


def test_a_model_that_memory_does_not_hold_is_not_said_to_be_another(monkeypatch):
    def full(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes")

    monkeypatch.setattr("models.checkpoint.build", full)
    with pytest.raises(NotEnoughMemory, match="not enough memory for the model, whose weights take 0 MiB"):
        make(1).build()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.remove, (str(self.victim),)


@pytest.mark.parametrize("writer", [torch.save, pickle.dump])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, writer):
    victim = tmp_path / "victim"
    victim.touch()
    path = path_of(tmp_path, 1)
    with open(path, "wb") as file:
        writer({"magic": "minisora checkpoint", "format": 1, "model": Malicious(victim)}, file)
    with pytest.raises(NotACheckpoint, match="refused" if writer is torch.save else "not a whole checkpoint"):
        load(path)
    with pytest.raises(NotACheckpoint):
        latest(tmp_path)
    assert victim.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert not victim.exists(), "the checkpoint of this test was harmless"


def test_other_files_and_versions_are_refused_with_the_reason(tmp_path):
    path = save(tmp_path, make(1), keep=1)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format": 99}, path)
    with pytest.raises(ValueError, match="format version 99; this code reads version 2"):
        load(path)
    with pytest.raises(ValueError, match="format version 99"):
        latest(tmp_path)
    del content["ema"]
    torch.save(content, path)
    with pytest.raises(NotACheckpoint, match="lacks ema"):
        load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(NotACheckpoint, match="not a checkpoint of this trainer"):
        load(path)
    with pytest.raises(NotACheckpoint, match="is not a file"):
        load(tmp_path)


def test_weights_that_do_not_match_the_configuration_are_refused():
    checkpoint = make(1)
    for change in (
        {"width": 32},
        {"depth": 2},
        {"learn_sigma": True},
        {"num_classes": 0},
        {"colour": 1},
        {"width": 17},
    ):
        with pytest.raises(ValueError, match="do not match the stored model configuration"):
            dataclasses.replace(checkpoint, config=checkpoint.config | change).build()


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import make
from models.checkpoint import latest, save

folder = Path({folder!r})
save(folder, make(1), keep=1)
size = (folder / "step_00000001.pt").stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
try:
    save(folder, make(2), keep=1)
except OSError as error:
    print("refused:", error)
print(latest(folder)[0].name, *sorted(file.name for file in folder.iterdir()))
"""


def test_a_disk_that_takes_no_more_leaves_the_older_checkpoint(tmp_path):
    script = LIMITED.format(tests=str(ROOT / "tests/training"), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("refused: checkpoint") and "step_00000002.pt was not written" in first
    assert "File too large" in first
    assert second == "step_00000001.pt step_00000001.pt"


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, make(1), keep=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("models.checkpoint.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, make(2), keep=1)
    assert [file.name for file in tmp_path.iterdir()] == ["step_00000001.pt"]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import make
from models.checkpoint import save

for step in range(1, 100000):
    save(Path({folder!r}), make(step), keep=2)
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_the_newest_checkpoint(tmp_path):
    script = KILLED.format(tests=str(ROOT / "tests/training"), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    # Interrupt several saves of one process at arbitrary moments, looking at the folder while it stands still.
    steps = []
    try:
        process.stdout.readline()
        for pause in (0.003, 0.01, 0.001, 0.02, 0.006, 0.013, 0.0, 0.004):
            time.sleep(pause)
            process.send_signal(signal.SIGSTOP)
            steps.append(latest(tmp_path)[1].step)
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        reported = [int(line) for line in process.stdout]
        process.wait()
    final = latest(tmp_path)[1].step
    assert final in (reported[-1], reported[-1] + 1)
    assert steps == sorted(steps) and steps[0] >= 1 and final > steps[0]


def divide(folder: Path, checkpoint: Checkpoint, parts: int = 2) -> Path:
    """The checkpoint with the rows of its weights and averages divided, as shards are."""
    path, temporary = path_of(folder, checkpoint.step), folder / "writing.tmp"
    temporary.mkdir()
    for part in range(parts):
        rows = {
            name: {
                key: (axis := value.dim() - 1, value.chunk(parts, axis)[part])
                for key, value in getattr(checkpoint, name).items()
                if len(value) > 3
            }
            for name in ("model", "ema")
        }
        rest = {
            name: {key: value for key, value in getattr(checkpoint, name).items() if len(value) <= 3 and not part}
            for name in rows
        }
        own = {name: rows[name] | rest[name] for name in rows}
        save_part(temporary, part, parts, dataclasses.replace(checkpoint, **own))
    complete(path, temporary, keep=2)
    return path


def test_a_sharded_checkpoint_is_that_of_one_file(tmp_path, caplog):
    saved = make(3)
    save(tmp_path, make(2), keep=2)
    path = divide(tmp_path, saved)
    assert path.is_dir() and len(list(path.iterdir())) == 2
    assert latest(tmp_path)[0] == open_checkpoint(path)[0] == path
    read = load(path)
    for name in ("model", "ema"):
        ours, theirs = getattr(saved, name), getattr(read, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    built = read.build().state_dict()
    assert all(torch.equal(value, saved.ema[key]) for key, value in built.items())
    # As one file again, under the same name.
    assert save(tmp_path, read, keep=2) == path and path.is_file()
    assert torch.equal(load(path).ema["pos_embed"], saved.ema["pos_embed"])
    # Without a part, with damage in one, or without a name: the one before is taken.
    for damage in (Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-500] + bytes(500))):
        path.unlink() if path.is_file() else shutil.rmtree(path)
        damage(max(divide(tmp_path, saved).iterdir()))
        assert latest(tmp_path)[1].step == 2
        assert f"skipped: {path}/part_00001_of_00002.pt is not a" in caplog.text
        caplog.clear()
    path.rename(f"{path}.tmp")
    assert latest(tmp_path)[1].step == 2
    save(tmp_path, make(4), keep=1)
    assert os.listdir(tmp_path) == ["step_00000004.pt"]


def test_the_first_rank_may_rename_the_folder_as_soon_as_it_sees_the_last_part(tmp_path, monkeypatch):
    temporary, whole = tmp_path / "step.tmp", tmp_path / "step"
    temporary.mkdir()
    replace = os.replace

    def replace_and_rename(old, new):
        replace(old, new)
        temporary.rename(whole)

    monkeypatch.setattr(os, "replace", replace_and_rename)
    save_part(temporary, 1, 2, make(1))
    assert part_of(whole, 1, 2).exists()
