"""plan.py against the memory that steps of several processes take."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shlex
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from ranks import on_ranks
from torch.distributed.tensor import DTensor

from bench import plans as bench_plans
from bench.plans import FRAMES_PER_SECOND, PATH
from bench.scale import Cluster, bandwidth, estimate, meshes
from minisora_kernels import use_backend
from models import plan
from models.data.config import DataConfig
from models.denoisers.dit import DiTSettings
from models.objectives.ddpm import DDPM
from models.parallel.config import ParallelConfig
from models.parallel.ranks import open_ranks
from models.parallel.traffic import Collective
from models.plan import GPUS, Needs, PlanConfig, needs
from models.protocols import System
from models.training import trainer
from models.training.config import OptimizerConfig, TrainConfig
from models.training.trainer import Trainer

SMALL = DiTSettings(width=128, depth=4, heads=4, patch=(1, 2, 2), attention="factorized", learn_sigma=True)
FRAMES = 3


def held() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not isinstance(each, DTensor)]
    storages = {each.data_ptr(): each.nbytes() for each in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def most_allocated(function: Callable[[], object]) -> int:
    """The most bytes that are allocated at a time in one of three calls, beside those from before it.

    What a thread of gloo frees is not always seen to be freed, so a call may seem to need more than it does.
    """
    peaks = []
    for _ in range(3):
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        sizes = [each.nbytes() for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
        peaks.append(max(accumulate(sizes)))
    return min(peaks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "precision", "checkpointing", "offload"),
    [
        (ParallelConfig(shard=2), "fp32", False, False),
        (ParallelConfig(shard=2, sequence=2), "bf16", True, False),  # the first rank has two of three frames
        (ParallelConfig(), "fp32", False, True),
        (ParallelConfig(shard=2), "fp32", False, True),
    ],
    ids=str,
)
def test_a_rank_needs_the_memory_of_the_plan(
    parallel: ParallelConfig, precision: str, checkpointing: bool, offload: bool, monkeypatch: pytest.MonkeyPatch
):
    config = TrainConfig(
        data=DataConfig(frames=FRAMES, size=(32, 32)),
        model=SMALL,
        objective=DDPM(),
        batch_size=2 * parallel.shares,
        parallel=parallel,
        checkpointing=checkpointing,
        optimizer=OptimizerConfig(offload=offload),
        precision=precision,
        device="cpu",
    )

    def measure() -> int:
        # Here the memory that is offloaded to is that which is offloaded from.
        trainer.check_offload = lambda *_: None
        with use_backend("reference"), open_ranks(parallel, torch.device("cpu")) as ranks:
            before = held()
            begun = Trainer(config, None, ranks)
            begun.train_step()
            return held() - before + most_allocated(begun.train_step)

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
        offload=offload,
        precision=precision,
    )
    need = needs(planned, training=True)
    # On a CPU a gradient is copied nowhere, and a part of one is there after the activations are gone.
    total = need.total + sum(size for name, size in need.host.items() if name != "gradients")
    assert need.memory["activations"] > 0.2 * total
    assert total == pytest.approx(on_ranks(parallel.size, measure)[0], rel=0.02 if offload else 0.05)


RECIPE = re.compile(r"^# (\d) x (A100|A6000|RTX 4090), (\d+) seconds.*\n((?:.*\\\n)*.*)$", re.MULTILINE)
NAMES = {"A100": "a100-80g", "A6000": "a6000-48g", "RTX 4090": "rtx4090-24g"}


def test_every_recipe_of_the_docs_fits_its_gpus():
    plans = json.loads(PATH.read_text())["plans"]
    page = (PATH.parents[2] / "docs" / "training.md").read_text()
    block = page.split("## One GPU to many")[1].split("```sh\n")[1].split("```")[0]
    recipes = RECIPE.findall(block)
    assert len(recipes) == block.count("models.train") > 5
    for count, gpu, length, command in recipes:
        words = shlex.split(command)
        options = {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}
        parallel = ParallelConfig(*(int(options.get(f"--parallel.{name}", 1)) for name in ParallelConfig().axes))
        assert parallel.size == int(count) == int(options.get("--nproc-per-node", 1))
        parts = int(options["--accumulation"]) * parallel.shares if "--accumulation" in options else parallel.shares
        wanted = {
            "model": options["--model"],
            "gpu": NAMES[gpu],
            "frames": int(length) * FRAMES_PER_SECOND,
            "size": [480, 848],
            "batch_size": int(options["--batch-size"]) / parts,
            "parallel": parallel.axes,
            "checkpointing": "--checkpointing" in options,
            "precision": options["--precision"],
        }
        found = [plan for plan in plans if wanted.items() <= plan["config"].items()]
        assert len(found) == 1 and found[0]["training"]["fits"], command


@pytest.mark.slow
def test_the_recorded_plans_are_those_of_the_code():
    plans = json.loads(PATH.read_text())["plans"]
    configs = bench_plans.configs()
    assert [json.loads(json.dumps(dataclasses.asdict(config))) for config in configs] == [p["config"] for p in plans]
    plan, config = min(zip(plans, configs, strict=True), key=lambda each: each[0]["training"]["bytes"])
    assert needs(config, training=True).total == pytest.approx(plan["training"]["bytes"], rel=0.01)


def test_what_computing_does_not_hide_is_waited_for():
    cluster = Cluster("h200", per_node=8, link=100.0, network=10.0, source="")
    in_node, over_nodes = ParallelConfig(data=4, sequence=2), ParallelConfig(data=8, sequence=2)
    exchange, sums = Collective("alltoall", "activations", 2, 400), Collective("allreduce", "gradients", 8, 800)
    assert exchange.received == 200 and sums.received == 2 * 7 * 100
    assert bandwidth(cluster, in_node, exchange) == bandwidth(cluster, over_nodes, exchange) == 100
    assert bandwidth(cluster, ParallelConfig(data=2, sequence=2), exchange) == 100
    assert bandwidth(cluster, ParallelConfig(data=8, sequence=8), exchange._replace(ranks=8)) == 100
    # Sums over all GPUs: in a row, so that the eight of a node share its network.
    assert bandwidth(cluster, in_node, sums) == 100
    assert bandwidth(cluster, over_nodes, sums._replace(ranks=16)) == 80
    # Copies of a model that eight divide: one in each node.
    assert bandwidth(cluster, ParallelConfig(data=8, shard=8), sums) == 10
    config = PlanConfig("latte-s/1x2x2", "h200", parallel=in_node, utilization=0.5)
    flops = int(GPUS["h200"].flops)
    for efficiency, waited in ((1.0, 2 + 12), (0.5, 4 + 26)):
        step = estimate(Needs({}, flops, 0, (exchange, sums)), config, cluster, efficiency)
        assert step.compute == pytest.approx(2) and step.exposed == pytest.approx(waited)
    shared = list(meshes(16, per_node=4, most_clips=8))
    assert {mesh.size for mesh in shared} == {16} and {mesh.sequence for mesh in shared} == {2, 4}
