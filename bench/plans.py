"""``python -m bench.plans``: what ``models/plan.py`` says of the goals, 3 and 10 seconds at 480p, into ``plans.json``.

Nothing runs on a GPU for it: memory is counted on tensors without any, and times follow from the published peaks and
the assumptions that the record names.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from bench.harness import record
from minisora_kernels.commands import command
from models.parallel.config import ParallelConfig
from models.plan import PlanConfig, available, needs, seconds

PATH = record.RESULTS / "plans.json"
FRAMES_PER_SECOND = 24
ONE = ParallelConfig()
# Model, GPU, seconds, and how GPUs share the work: the recipes of docs/training.md, and what does not fit.
GOALS = (
    ("latte-xl/1x2x2", "a100-80g", 3, ParallelConfig(data=8)),
    ("latte-xl/1x2x2", "a100-80g", 3, ParallelConfig(shard=8)),
    ("latte-xl/1x2x2", "a100-80g", 10, ParallelConfig(shard=4, sequence=2)),
    ("latte-xl/1x2x2", "a6000-48g", 3, ParallelConfig(shard=4)),
    ("latte-xl/1x2x2", "a6000-48g", 10, ParallelConfig(sequence=4)),
    ("latte-xl/1x2x2", "rtx4090-24g", 3, ONE),
    ("latte-xl/1x2x2", "rtx4090-24g", 10, ONE),
    ("latte-b/1x2x2", "rtx4090-24g", 3, ONE),
    ("latte-b/1x2x2", "rtx4090-24g", 10, ONE),
)


def configs() -> list[PlanConfig]:
    """Training with checkpointing, on our kernels, sharded where there are several GPUs."""
    return [
        PlanConfig(
            model=model,
            gpu=gpu,
            frames=length * FRAMES_PER_SECOND,
            size=(480, 848),
            parallel=parallel,
            backend="kernels",
            checkpointing=True,
        )
        for model, gpu, length, parallel in GOALS
    ]


def row(config: PlanConfig) -> dict[str, Any]:
    """The plan of a configuration: gigabytes a GPU, whether they fit, and seconds, of training and of sampling."""
    found: dict[str, Any] = {"config": dataclasses.asdict(config), "available": available(config)}
    for name, training in (("training", True), ("sampling", False)):
        part = needs(config, training=training)
        steps = 1 if training else config.steps
        found[name] = {
            "bytes": part.total,
            "fits": part.total <= available(config),
            "seconds": steps * seconds(part, config),
        }
    return found


@command()
def main(_: list[str]) -> None:
    plans = []
    for config in configs():
        plans.append(row(config))
        print(config.model, config.frames, config.gpu, plans[-1]["training"], plans[-1]["sampling"], file=sys.stderr)
    head = record.head(torch.device("cpu"), "default")
    found = {key: head[key] for key in ("format", "date", "commit", "dirty", "versions")}
    PATH.write_text(json.dumps(record.round_floats({**found, "plans": plans}), indent=1) + "\n")


if __name__ == "__main__":
    main()
