"""plan.py against the memory that steps of several processes take."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from ranks import on_ranks

from minisora_kernels import use_backend
from models import plan
from models.data.config import DataConfig
from models.denoisers.dit import DiTSettings
from models.objectives.ddpm import DDPM
from models.parallel.config import ParallelConfig
from models.parallel.ranks import open_ranks
from models.plan import PlanConfig, needs
from models.protocols import System
from models.training.config import TrainConfig
from models.training.trainer import Trainer

SMALL = DiTSettings(width=128, depth=4, heads=4, patch=(1, 2, 2), attention="factorized", learn_sigma=True)
FRAMES = 3


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes that are allocated in a call and not freed, and the most there were at a time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
        gc.collect()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return now, peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "precision", "checkpointing"),
    [
        (ParallelConfig(shard=2), "fp32", False),
        (ParallelConfig(sequence=2), "fp32", False),  # the first rank has two of three frames
        (ParallelConfig(shard=2, sequence=2), "bf16", True),
    ],
    ids=str,
)
def test_a_rank_needs_the_memory_of_the_plan(
    parallel: ParallelConfig, precision: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    config = TrainConfig(
        data=DataConfig(frames=FRAMES, size=(32, 32)),
        model=SMALL,
        objective=DDPM(),
        batch_size=2 * parallel.shares,
        parallel=parallel,
        checkpointing=checkpointing,
        precision=precision,
        device="cpu",
    )

    def measure() -> int:
        made: list[Trainer] = []

        def begin() -> None:
            made.append(Trainer(config, None, ranks))
            made[0].train_step()

        with use_backend("reference"), open_ranks(parallel, torch.device("cpu")) as ranks:
            kept, _ = allocated(begin)
            _, peak = allocated(made[0].train_step)
        return kept + peak

    monkeypatch.setitem(plan.SYSTEMS, "small", System(SMALL, DDPM()))
    planned = PlanConfig(
        "small",
        "h200",
        frames=FRAMES,
        size=(32, 32),
        compression=(1, 1),
        channels=1,
        classes=10,
        batch_size=2,
        parallel=parallel,
        checkpointing=checkpointing,
        precision=precision,
    )
    need = needs(planned, training=True)
    assert need.memory["activations"] > 0.2 * need.total
    assert need.total == pytest.approx(on_ranks(parallel.size, measure)[0], rel=0.1)
