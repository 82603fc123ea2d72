"""More cases of gelu_mlp."""

from __future__ import annotations

from collections.abc import Iterator

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.gelu_mlp import gelu_mlp


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(4 + 100 * draw)
    # name, shape of x, hidden, D_out, biases, form of GELU
    for row in [
        ("tokens", (2, 17, 32), 128, 32, True),
        ("odd-widths", (2, 17, 24), 90, 7, True),
        ("no-bias", (3, 5, 8), 33, 7, False),
        ("flat", (31, 16), 64, 16, True),
        ("vector", (12,), 20, 12, True),
        ("empty-batch", (0, 4, 8), 32, 8, True),
        ("exact", (2, 17, 32), 128, 32, True, "none"),
        ("exact-odd-widths", (2, 17, 24), 90, 7, True, "none"),
    ]:
        yield gelu_mlp(random, *row)
