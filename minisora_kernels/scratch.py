"""What raw ops hold while they run, beside their arguments and results: a dispatch mode does not see it.

An op's file declares it, but for sums of gradients, which are small. ``counters.scratch_bytes`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable

Scratch = Callable[..., int]
SCRATCH: dict[str, Scratch] = {}


def scratch(name: str) -> Callable[[Scratch], Scratch]:
    """Decorate the function that returns the bytes of a raw op's scratch from its arguments, the most of a backend."""

    def keep(function: Scratch) -> Scratch:
        SCRATCH[name] = function
        return function

    return keep
