"""Options of ``pytest bench/``, the ``bench`` fixture, and the report at the end."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.harness import record
from bench.harness.clock import ceilings
from bench.harness.report import report
from bench.harness.session import Session
from minisora_kernels import backends
from models.runtime.allocator import reuse_large_allocations

# The benches time every kernel, whatever a record says of it.
backends.VERIFIED = "0"

SESSION = pytest.StashKey[Session]()
CEILINGS = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="a first impression: few shapes, short rounds")
    group.addoption("--device", help="cpu or cuda; by default cuda where there is one")
    group.addoption(
        "--allocator",
        choices=("default", "reuse"),
        default="default",
        help="reuse: large blocks of freed memory stay in the process, as the trainer and the sampler have it",
    )
    group.addoption("--save", metavar="NAME", help="write bench/results/<machine>/NAME.json and its plots")
    group.addoption("--results", type=Path, default=record.RESULTS, metavar="DIR", help="instead of bench/results")
    group.addoption("--save-over", action="store_true", help="let --save replace an existing record")
    group.addoption("--save-into", action="store_true", help="let --save replace those cases of it that this run times")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--allocator") == "reuse" and not reuse_large_allocations():
        raise pytest.UsageError("--allocator reuse needs glibc")
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("torch.__trace").disabled = True  # pytest would capture its thousands of records
    config.stash[SESSION] = Session(torch.device(device), quick=config.getoption("--quick"))
    name = config.getoption("--save")
    if name and not config.getoption("--save-over"):
        path = record.path_of(record.machine(torch.device(device)), name, config.getoption("--results"))
        if path.exists() != config.getoption("--save-into"):
            wrong = "is not there to be saved into" if config.getoption("--save-into") else "exists"
            raise pytest.UsageError(f"{path} {wrong}; give another name, --save-over or --save-into")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    kept = [item for item in items if _is_quick(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _is_quick(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "shape" in parameters and parameters["shape"].quick and parameters["dtype"] == "bfloat16"


@pytest.fixture
def bench(benchmark, request: pytest.FixtureRequest):
    """``bench(op, problem, shape, dtype, direction)`` runs one case."""
    config = request.config
    if not benchmark.disabled and CEILINGS not in config.stash:
        config.stash[CEILINGS] = {"start": ceilings(config.stash[SESSION].clock)}
    return partial(config.stash[SESSION].run, benchmark)


@pytest.hookimpl(trylast=True)  # the last thing on the screen
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if not session.records:
        return
    config.stash[CEILINGS]["end"] = ceilings(session.clock)
    made = record.make(
        session.device,
        session.records,
        config.stash[CEILINGS],
        allocator=config.getoption("--allocator"),
        quick=session.quick,
    )
    terminalreporter.section("what the kernels are worth here")
    for line in report(made):
        terminalreporter.write_line(line)
    name = config.getoption("--save")
    if name:
        from bench.plots import draw

        path = record.path_of(made["machine"], name, config.getoption("--results"))
        if config.getoption("--save-into"):
            made = record.merged(made, record.load(path))
        record.save(made, path, over=config.getoption("--save-over") or config.getoption("--save-into"))
        for written in (path, *draw(made, path)):
            terminalreporter.write_line(f"wrote {written}")
