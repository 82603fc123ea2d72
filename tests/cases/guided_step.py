"""More cases of guided_step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.guided_step import guided_step


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(5 + 100 * draw)
    half = torch.bfloat16
    # name, latents, guided channels, variance learned, guidance, z, a row a sample, dtypes
    table: list[tuple] = [
        ("euler", (2, 4, 3, 6, 10), None, False, True, False, False, {}),
        ("heun", (3, 3, 2, 4, 4), None, False, True, True, False, {}),
        ("ddpm", (1, 4, 5, 7, 3), None, False, False, True, True, {}),
        ("ddpm-learned", (3, 4, 3, 6, 5), 3, True, True, True, True, {}),
        ("ddim-learned", (2, 3, 6, 4), 2, True, True, False, False, {}),
        ("learned-unguided", (2, 3, 6, 4), None, True, False, True, False, {}),
        ("no-cells", (2, 3), 1, True, True, True, True, {}),
        ("a-clip", (2, 4, 16, 16, 17), 3, True, True, True, True, {}),
        ("bf16-prediction", (2, 4, 3, 8, 8), None, True, True, True, True, {"cond": half, "null": half}),
        ("bf16-state", (2, 4, 3, 8, 8), None, True, True, True, True, {"x": half, "z": half}),
        ("empty-batch", (0, 4, 2, 3), None, False, True, True, True, {}),
        ("no-pixels", (2, 4, 0, 3), None, False, True, True, True, {}),
    ]
    for row in table:
        yield guided_step(random, *row)
