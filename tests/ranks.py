"""Functions that run in several processes connected by gloo, for tests.

They are forked from a server that has imported what they need and computed nothing. A process that has computed has
threads, and a copy of it can wait for them forever.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch

# torch._dynamo is of DDP.
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "models.sample", "models.train", "pytest"]


def on_ranks(count: int, function: Callable[[], Any]) -> list[Any]:
    """What the function returns on each rank, as if torchrun had started ``count`` processes.

    Raises:
        RuntimeError: it raised an error on a rank, whose traceback is in the message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    work = cloudpickle.dumps(function)  # which takes lambdas
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    started = []
    for rank, (_, end) in enumerate(pipes):
        started.append(context.Process(target=_work, args=(rank, count, port, work, end)))
        started[-1].start()
        end.close()
    results = []
    for receive, _ in pipes:
        try:
            results.append(receive.recv() if receive.poll(120) else (False, "no answer after two minutes"))
        except EOFError:
            results.append((False, "the process died"))
    for process in started:
        process.join(5)
        process.kill()
    failed = [f"rank {rank}: {value}" for rank, (well, value) in enumerate(results) if not well]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in results]


def _work(rank: int, count: int, port: int, work: bytes, end: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        answer = True, cloudpickle.loads(work)()
    except BaseException:
        answer = False, traceback.format_exc()
    end.send(answer)
