"""More cases of glu_mlp."""

from __future__ import annotations

from collections.abc import Iterator

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.glu_mlp import glu_mlp


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(12 + 100 * draw)
    # name, shape of x, hidden, D_out, options
    for name, shape, hidden, out, options in [
        ("tokens", (2, 17, 32), 128, 32, {}),
        ("odd-widths", (2, 17, 24), 45, 7, {"gate_first": False}),
        ("no-bias", (3, 5, 8), 33, 7, {"biased": False}),
        ("flat", (31, 16), 64, 16, {}),
        ("vector", (12,), 20, 12, {"gate_first": False}),
        ("empty-batch", (0, 4, 8), 32, 8, {}),
        ("apart", (2, 17, 32), 64, 32, {"apart": True}),
        ("apart-odd", (2, 17, 24), 45, 7, {"apart": True, "biased": False, "gate_first": False}),
        ("exact", (2, 17, 32), 64, 32, {"activation": "gelu", "gate_first": False}),
        ("exact-odd-widths", (2, 17, 24), 45, 7, {"activation": "gelu"}),
        ("tanh", (2, 17, 32), 64, 32, {"activation": "gelu_tanh"}),
    ]:
        yield glu_mlp(random, name, shape, hidden, out, **options)
