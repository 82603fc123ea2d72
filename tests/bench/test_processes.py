from __future__ import annotations

import json

import pytest
from ranks import on_ranks

from bench import processes


def test_the_speed_is_that_of_each_round():
    found = processes.gains([(1.0, 2.0, 1.0), (2.0, 2.0, 4.0), (3.0, 4.0, 3.0)], 2)
    assert found["seconds"] == {"alone": 2.0, "together": 2.0, "apart": 3.0}
    assert found["speed"]["median"] == 1.5 and found["ceiling"]["median"] == 2


@pytest.mark.slow
def test_two_processes_are_timed_against_one(capfd: pytest.CaptureFixture):
    on_ranks(2, lambda: processes.main(["--width", "16", "--clips", "2", "--rounds", "2"]))
    record = json.loads(capfd.readouterr().out)
    assert record["processes"] == 2 and record["tokens"] == 2 * 32
    assert all(seconds > 0 for seconds in record["seconds"].values())


def test_one_process_is_refused():
    with pytest.raises(SystemExit, match="there is one process; start 2 with torchrun"):
        processes.main([])
