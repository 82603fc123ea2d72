"""``torchrun --standalone --nproc-per-node 2 -m -- bench.processes``: what ``--parallel.data`` gains on this machine.

Each process has one thread and the same number of clips, whether it trains alone or with the others. Rounds take turns:
the first process trains alone while the others wait, all train one model together, and all train models of their own.

    speed   = processes * time alone / time together
    ceiling = processes * time alone / time of all, each with a model of its own

The ceiling is what the machine gives: memory and caches are shared. The gap to it is the time to sum gradients.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from bench.harness import record
from bench.harness.session import spread
from minisora_kernels.commands import command
from models.data.config import DataConfig
from models.denoisers.dit import DiTSettings
from models.parallel.config import ParallelConfig
from models.parallel.ranks import open_ranks, processes
from models.runtime.allocator import reuse_large_allocations
from models.runtime.arguments import read
from models.training.config import TrainConfig
from models.training.trainer import Trainer

COMMAND = "torchrun --standalone --nproc-per-node 2 -m -- bench.processes"


@dataclass(frozen=True)
class ProcessesConfig:
    """What is trained, and whether the ratios are kept."""

    width: int = 384
    """Channels of a DiT of 6 blocks."""
    clips: int = 128
    """Clips of 4 frames that a process has per step."""
    rounds: int = 11
    """Rounds that are timed, after one that is not."""
    save: bool = False
    """Write ``processes.json`` of this machine under bench/results."""


def gains(rounds: list[tuple[float, float, float]], count: int) -> dict[str, dict[str, float]]:
    """Seconds of a step, speed and ceiling from those of each round: alone, together, and each with its own model."""
    alone, together, apart = zip(*rounds, strict=True)
    return {
        "seconds": {"alone": median(alone), "together": median(together), "apart": median(apart)},
        "speed": spread([count * one / all_ for one, all_ in zip(alone, together, strict=True)]),
        "ceiling": spread([count * one / all_ for one, all_ in zip(alone, apart, strict=True)]),
    }


@command()
def main(arguments: list[str]) -> None:
    bench = read(ProcessesConfig, COMMAND, __doc__, arguments)
    count = processes()
    if count == 1:
        raise ValueError(
            "there is one process; start 2 with torchrun --standalone --nproc-per-node 2 -m -- bench.processes"
        )
    torch.set_num_threads(1)
    reuse_large_allocations()
    config = TrainConfig(
        data=DataConfig(frames=4),
        model=DiTSettings(width=bench.width, depth=6, heads=max(1, bench.width // 64), patch=(2, 4, 4)),
        batch_size=count * bench.clips,
        parallel=ParallelConfig(count),
        device="cpu",
        precision="bf16",
    )
    with open_ranks(config.parallel, torch.device("cpu")) as ranks:
        together = Trainer(config, ranks=ranks)
        alone = Trainer(dataclasses.replace(config, batch_size=bench.clips, parallel=ParallelConfig()))

        def seconds(trainer: Trainer, here: bool = True) -> float:
            dist.barrier()
            start = time.perf_counter()
            if here:
                trainer.train_step()
            taken = time.perf_counter() - start
            dist.barrier()
            return taken

        rounds = [(seconds(alone, ranks.first), seconds(together), seconds(alone)) for _ in range(bench.rounds + 1)]
        if not ranks.first:
            return
    head = record.head(torch.device("cpu"), "reuse")
    result = {
        **{key: head[key] for key in ("format", "date", "commit", "dirty", "machine", "versions")},
        "processes": count,
        "config": {name: value for name, value in dataclasses.asdict(bench).items() if name != "save"},
        "tokens": together.tokens // together.step // count,
        "parameters": sum(parameter.numel() for parameter in together.trained),
        **gains(rounds[1:], count),
    }
    print(json.dumps(record.round_floats(result), indent=1))
    if bench.save:
        record.save(result, record.path_of(head["machine"], "processes"), over=True)
        print("saved", record.path_of(head["machine"], "processes"), file=sys.stderr)


if __name__ == "__main__":
    main()
