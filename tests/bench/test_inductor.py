"""The record of what torch.compile reads and writes on a GPU is what this torch emits, and says what is said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import inductor

pytest.importorskip("triton")
RECORD = json.loads(inductor.RECORD.read_text())
# One of each kind of claim: ours less, Inductor at the least possible, library calls.
AGAIN = ("adaln: batch 1", "adaln: batch 2, 16 rows", "patch_embed: patch 1x2x2, batch 8")


def test_the_record_has_every_row():
    assert list(RECORD["rows"]) == list(inductor.ROWS)


@pytest.mark.slow
def test_rows_made_again_are_those_of_the_record():
    """A minute of generating code, in a process of its own: there torch is told of a GPU."""
    if RECORD["versions"]["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(f"the record is of torch {RECORD['versions']['torch']}")
    options = [word for row in AGAIN for word in ("--row", row)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.inductor", *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {row: RECORD["rows"][row] for row in AGAIN}


def moved(row: str, part: str, whose: str) -> float:
    return RECORD["rows"][row][part][whose]


def of(*ops: str) -> list[str]:
    return [row for row in inductor.ROWS if row.split(":")[0] in ops]


@pytest.mark.parametrize("row", of("adaln", "gate_residual", "gate_residual_adaln"))
def test_nothing_is_claimed_of_forwards_that_inductor_fuses(row: str):
    assert moved(row, "forward", "ours") == pytest.approx(moved(row, "forward", "compile"), rel=0.01)


@pytest.mark.parametrize("row", of("adaln", "gate_residual_adaln"))
def test_backwards_of_modulation_move_less_but_for_one_row(row: str):
    ours, theirs = (moved(row, "backward", whose) for whose in ("ours", "compile"))
    if row.endswith("batch 1"):  # there Inductor adds up over tokens and over columns in one kernel
        assert theirs < ours if row.startswith("adaln") else theirs < 1.15 * ours
    else:
        assert theirs > 1.4 * ours


@pytest.mark.parametrize("row", [row for row in of("window_attention") if "temporal" in row])
def test_short_windows_move_less_with_norm_and_rotation_and_in_the_backward(row: str):
    times = 2 if "norm" in row else 1.5
    assert moved(row, "backward", "compile") > times * moved(row, "backward", "ours")
    if "norm" in row:
        assert moved(row, "forward", "compile") > times * moved(row, "forward", "ours")
    else:
        assert moved(row, "forward", "ours") == pytest.approx(moved(row, "forward", "compile"), rel=0.01)


@pytest.mark.parametrize("row", of("patch_embed"))
def test_patch_embedding_moves_less(row: str):
    assert moved(row, "forward", "compile") > 1.8 * moved(row, "forward", "ours")
    # Of one clip the gradient of the positions is as large as the tokens, for both.
    times = 1.2 if row.endswith("batch 1") else 1.3
    assert moved(row, "backward", "compile") > times * moved(row, "backward", "ours")
