"""bench/gpu/tune.py without a GPU: a clock that knows what each candidate takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch

from bench.aot import on_meta_tensors, set_target
from bench.gpu import steps, tune
from bench.gpu.architectures import ARCHITECTURES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def tiles(monkeypatch) -> ModuleType:
    from minisora_kernels.triton import _tiles

    monkeypatch.setattr(_tiles, "architecture", lambda: 90)
    return _tiles


class Stub:
    """Takes for a call what ``seconds`` says of the sizes that serve then, a tenth more in every other turn."""

    def __init__(self, tiles: ModuleType, seconds: dict) -> None:
        self.tiles, self.seconds, self.seen = tiles, seconds, []

    def call(self) -> None:
        if self.seconds.get(self.sizes) is None and self.sizes in self.seconds:
            raise RuntimeError("out of resource: shared memory")

    @property
    def sizes(self):
        return self.tiles.sizes(self.tiles.AHEAD)

    def __call__(self, call) -> float:
        self.seen.append(self.sizes)
        turn = self.seen.count(self.sizes)
        return self.seconds.get(self.sizes, 2.0) * (1.1 if turn % 2 else 1.0)


def test_candidates_are_timed_in_turns_and_the_fastest_serves(tiles):
    now, fastest, broken = tiles.AHEAD[0], tiles.Ahead(40_000, 8), tiles.Ahead(13_000, 4)
    clock = Stub(tiles, {now: 1.0, fastest: 0.9, broken: None})
    found = tune.tune("AHEAD", 90, clock.call, clock)
    assert found.sizes == fastest and found.ratios[str(fastest)] == pytest.approx(0.9)
    assert found.ratios[str(now)] == 1 and str(broken) not in found.ratios
    once = set(tiles.CANDIDATES["AHEAD"]) - {broken}
    assert len(clock.seen) == tune.TURNS * len(once)
    assert all(set(clock.seen[first : first + len(once)]) == once for first in range(0, len(clock.seen), len(once)))
    assert 90 not in tiles.AHEAD  # as it was


def test_what_gains_little_does_not_serve(tiles):
    now = tiles.AHEAD[0]
    clock = Stub(tiles, {now: 1.0, tiles.Ahead(40_000, 8): 0.98})
    assert tune.tune("AHEAD", 90, clock.call, clock).sizes == now


def test_sizes_that_serve_now_must_work(tiles):
    clock = Stub(tiles, {tiles.AHEAD[0]: None})
    with pytest.raises(RuntimeError, match="out of resource"):
        tune.tune("AHEAD", 90, clock.call, clock)


def test_the_file_is_written_with_what_was_found(tiles):
    sizes = {
        "AHEAD": tiles.Ahead(40_000, 8),
        "PRODUCT": tiles.Product(64, 64, 8, 3),
        "WINDOW_FORWARD": tiles.Blocks(128, 32, 4, 2),
    }
    text = tune.written(
        Path(tiles.__file__).read_text(), 90, {name: tune.Found(each, {}) for name, each in sizes.items()}
    )
    again = ModuleType("_tiles")
    again.__package__ = tiles.__package__
    exec(text, again.__dict__)
    for name, each in sizes.items():
        assert repr(getattr(again, name)) == repr({**getattr(tiles, name), 90: each})
    assert repr(again.CANDIDATES) == repr(tiles.CANDIDATES)


def test_every_table_is_timed_and_has_candidates(tiles):
    assert tune.TIMED.keys() == tiles.CANDIDATES.keys()
    for name, candidates in tiles.CANDIDATES.items():
        assert set(getattr(tiles, name).values()) <= set(candidates)


@pytest.mark.parametrize("table", sorted(tune.TIMED))
def test_each_candidate_changes_what_the_timed_call_launches(table: str, tiles):
    from triton.runtime.jit import JITFunction

    from minisora_kernels.triton import _launch

    launches: list[tuple] = []

    def note(self: JITFunction, *args, grid, warmup, **options) -> None:
        numbers = [each for each in args if not isinstance(each, torch.Tensor)]
        launches.append((self.__name__, grid, str(numbers), str(options)))

    set_target(ARCHITECTURES["sm_90"])
    found = []
    with on_meta_tensors(), patch.object(JITFunction, "run", note):
        call = tune.call_of(table, torch.device("meta"))
        for sizes in tiles.CANDIDATES[table]:
            with patch.dict(getattr(tiles, table), {90: sizes}):
                _launch.forget_plans()
                launches.clear()
                call()
                found.append(tuple(launches))
    _launch.forget_plans()
    assert len(set(found)) == len(found)


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    for main, arguments in (
        (tune.main, ["--out", str(tmp_path / "_tiles.py")]),
        (steps.main, ["--step", "tune", "--out", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "torch finds no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        steps.main(["--dry-run", "--step", "tune", "--out", str(tmp_path)])
    assert "tune, which times candidates on a GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
