"""The bytes that Inductor's own kernels move; ``minisora_kernels.counters`` counts those of ops."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log

from minisora_kernels.__main__ import ops


def raw_ops() -> list[str]:
    """The raw ops that Triton serves, forward and backward."""
    names = [f"{op}_{direction}" for op in ops() for direction in ("fwd", "bwd")]
    return [name for name in names if hasattr(torch.ops.minisora_triton, name)]


class InductorBytes:
    """``moved``: bytes that the kernels and calls of what Inductor compiles inside the block read and write.

    Inductor's own count, of fused kernels. It counts only what it compiles anew, so its graph caches are off meanwhile.
    """

    def __enter__(self) -> InductorBytes:
        self._stack = ExitStack()
        self._stack.enter_context(inductor_config.patch(fx_graph_cache=False))
        self._stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        # It would count for a log that nothing reads.
        self._stack.callback(inductor_metrics_log.setLevel, inductor_metrics_log.level)
        inductor_metrics_log.setLevel(logging.INFO)
        self._stack.callback(inductor_metrics_log.removeFilter, _nothing)
        inductor_metrics_log.addFilter(_nothing)
        self._before = metrics.num_bytes_accessed
        return self

    def __exit__(self, *exception: object) -> None:
        self.moved = metrics.num_bytes_accessed - self._before
        self._stack.close()


def _nothing(record: logging.LogRecord) -> bool:
    return False
