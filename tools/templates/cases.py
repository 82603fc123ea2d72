"""Cases of new_op: batches, odd lengths, nothing at all. ``verify`` and tests/ops/test_ops.py run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import minisora_kernels as mk

from . import Case, Random, random_tensors


def _case(random: Random, name: str, *shape: int) -> Case:
    return Case("new_op", name, {"x": random(*shape)}, lambda t, **kwargs: mk.new_op(t["x"], 0.3, **kwargs))


def cases(draw: int = 0) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(draw)
    yield _case(random, "tokens", 2, 17, 96)
    yield _case(random, "odd", 3, 5, 7)
    yield _case(random, "one", 1)
    yield _case(random, "a-clip", 1, 4096, 8)
    yield _case(random, "empty-batch", 0, 5, 16)


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What ``verify`` times, on about so many tokens."""
    yield "new_op", lambda: _case(random, "", 2, tokens // 2, 1152)
