"""``python -m bench.scale``: estimated steps of 8, 64 and 512 GPUs on 3 and 10 seconds of 480p, into ``scale.json``.

Nothing runs on a GPU. FLOPs, bytes and memory are those of ``models/plan.py``; the links are the vendors' figures.

    compute   = FLOPs / (peak * utilization) + bytes moved / memory's bytes/s
    transfer  = bytes received / (bytes/s of the slowest link in the group * link efficiency)
    exposed   = transfer of activations + max(0, transfer of weights and gradients - compute)
    step      = compute + exposed

FSDP2 gathers the next unit, and DDP sums the last gradients, while a unit computes: they are hidden as long as there is
enough to compute. An exchange of activations is not: the attention waits for it. A group inside of a node takes its
link. A group over several nodes takes the network of all its members in a node together, as rings of NCCL do.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness import record
from bench.plans import FRAMES_PER_SECOND
from minisora_kernels.commands import command
from models.parallel.config import ParallelConfig
from models.parallel.traffic import Collective
from models.plan import Needs, PlanConfig, Run, available, needs_of, seconds, work
from models.runtime.arguments import read


class Cluster(NamedTuple):
    """Nodes of some GPUs: bytes/s that a GPU receives inside of a node, and from other nodes."""

    gpu: str
    per_node: int
    link: float
    network: float
    source: str


CLUSTERS = (
    Cluster(
        "a100-80g",
        8,
        300e9,
        25e9,
        "NVLink 3, 600 GB/s both ways (NVIDIA A100 datasheet); InfiniBand, 200 Gb/s per GPU (DGX A100 datasheet)",
    ),
    Cluster(
        "a6000-48g",
        4,
        32e9,
        3.125e9,
        "PCI Express 4.0 x16, 64 GB/s both ways (NVIDIA RTX A6000 datasheet); Ethernet, 100 Gb/s per node (assumed)",
    ),
    Cluster(
        "h200",
        8,
        450e9,
        50e9,
        "NVLink 4, 900 GB/s both ways (NVIDIA H200 datasheet); InfiniBand, 400 Gb/s per GPU (DGX H200 datasheet)",
    ),
)
MODEL, SIZE, SECONDS, GPUS, SEQUENCES = "latte-xl/1x2x2", (480, 848), (3, 10), (8, 64, 512), (1, 2, 4, 8)


@dataclass(frozen=True)
class ScaleConfig:
    """What is assumed, and where the estimates go."""

    utilization: float = 0.5
    """Share of the peak FLOP/s that matrix products reach: an assumption, not a measurement."""
    link_efficiency: float = 0.7
    """Share of the links' bytes/s that collectives reach: an assumption, not a measurement."""
    most_clips: int = 256
    """The most clips that a step may have: how large a batch is of use, an assumption."""
    out: Path = record.RESULTS / "scale.json"
    """The file."""

    def __post_init__(self) -> None:
        for name in ("utilization", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        if self.most_clips < 1:
            raise ValueError(f"most_clips is {self.most_clips}; it must be at least 1")


class Step(NamedTuple):
    """Seconds of a step: of computing, of transfers, and of those that computing does not hide."""

    compute: float
    transfer: float
    exposed: float

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed


def bandwidth(cluster: Cluster, parallel: ParallelConfig, each: Collective) -> float:
    """Bytes/s at which the GPUs of a collective's group receive, at the vendors' figures.

    Neighbours divide tokens, then shards, then copies: a group is of GPUs in a row, but the copies of a divided model,
    which are as far apart as that is wide.
    """
    apart = parallel.size // parallel.data if each.kind == "allreduce" and each.ranks < parallel.size else 1
    if each.ranks * apart <= cluster.per_node:
        return cluster.link
    return min(cluster.link, max(1, cluster.per_node // apart) * cluster.network)


def estimate(need: Needs, config: PlanConfig, cluster: Cluster, efficiency: float) -> Step:
    """The step of a cluster, by the formulas above."""
    compute, waited, hidden = seconds(need, config), 0.0, 0.0
    for each in need.collectives:
        transfer = each.received / (bandwidth(cluster, config.parallel, each) * efficiency)
        if each.what in ("weights", "gradients"):
            hidden += transfer
        else:
            waited += transfer
    return Step(compute, waited + hidden, waited + max(0.0, hidden - compute))


def meshes(gpus: int, per_node: int, most_clips: int) -> Iterator[ParallelConfig]:
    """The ways to share so many GPUs: tokens inside of a node, and at most so many clips."""
    for sequence in SEQUENCES:
        shares = gpus // sequence
        if sequence > per_node or shares > most_clips:
            continue
        for shard in (2**n for n in range(shares.bit_length())):
            if shares % shard == 0:
                yield ParallelConfig(shares // shard, shard, sequence)


def best(runs: dict[int, Run], config: PlanConfig, cluster: Cluster, gpus: int, scale: ScaleConfig) -> dict[str, Any]:
    """The mesh with the most clips per second among those that fit, with its step; only names where none fits."""
    found: list[tuple[float, ParallelConfig, Needs, Step]] = []
    for parallel in meshes(gpus, cluster.per_node, scale.most_clips):
        asked = dataclasses.replace(config, gpu=cluster.gpu, parallel=parallel)
        need = needs_of(runs[parallel.sequence], asked, training=True)
        if need.total <= available(asked):
            step = estimate(need, asked, cluster, scale.link_efficiency)
            found.append((parallel.shares / step.seconds, parallel, need, step))
    row: dict[str, Any] = {"gpu": cluster.gpu, "gpus": gpus, "frames": config.frames}
    if not found:
        return row
    rate, parallel, need, step = max(found, key=lambda each: (each[0], each[1].data))
    return row | {
        "parallel": dataclasses.asdict(parallel),
        "bytes": need.total,
        "received": sum(each.received for each in need.collectives),
        "step": step._asdict(),
        "clips_per_second": rate,
    }


@command()
def main(arguments: list[str]) -> None:
    scale = read(ScaleConfig, "python -m bench.scale", __doc__, arguments)
    rows = []
    for length in SECONDS:
        config = PlanConfig(
            MODEL,
            CLUSTERS[0].gpu,
            frames=length * FRAMES_PER_SECOND,
            size=SIZE,
            backend="kernels",
            checkpointing=True,
            utilization=scale.utilization,
        )
        runs = {}
        for sequence in SEQUENCES:
            runs[sequence] = work(
                dataclasses.replace(config, parallel=ParallelConfig(sequence=sequence)), training=True
            )
            print(length, "s, sequence", sequence, file=sys.stderr)
        rows += [best(runs, config, cluster, gpus, scale) for cluster in CLUSTERS for gpus in GPUS]
    head = record.head(torch.device("cpu"), "default")
    found = {key: head[key] for key in ("format", "date", "commit", "dirty", "versions")}
    assumed = {name: value for name, value in dataclasses.asdict(scale).items() if name != "out"}
    inputs = {"model": MODEL, "size": SIZE, "assumed": assumed, "clusters": [each._asdict() for each in CLUSTERS]}
    scale.out.write_text(json.dumps(record.round_floats({**found, **inputs, "steps": rows}), indent=1) + "\n")


if __name__ == "__main__":
    main()
