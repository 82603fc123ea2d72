"""DiT, SiT, Latte and STDiT: values, every gradient, and what is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_parts import check, counts, randomise, reasons
from originals import DiT, Latte, STDiT
from torch import nn

pytestmark = pytest.mark.usefixtures("nothing_compiled")

T = torch.tensor([0.3, 0.8])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# The model, its inputs, and the number of sites: two blocks and a final layer, whose norm joins the last gate.
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "DiT": (
        DiT,
        {},
        dict(x=random(2, 4, 8, 8), t=T, y=torch.tensor([1, 10])),
        {"adaln": 1, "gate_residual_adaln": 4, "gelu_mlp": 2, "window_attention": 2, "patch_embed": 1},
    ),
    "Latte": (
        Latte,
        {},
        dict(x=random(2, 3, 4, 8, 8), t=T),
        {
            **{"adaln": 3, "gate_residual_adaln": 2, "gate_residual": 2},
            **{"gelu_mlp": 2, "window_attention": 2, "patch_embed": 1},
        },
    ),
    "Latte, math": (
        Latte,
        dict(written_out=True),
        dict(x=random(2, 3, 4, 8, 8), t=T),
        {
            **{"adaln": 3, "gate_residual_adaln": 2, "gate_residual": 2},
            **{"gelu_mlp": 2, "window_attention": 2, "patch_embed": 1},
        },
    ),
    "STDiT": (
        STDiT,
        {},
        dict(x=random(2, 4, 3, 8, 8), text=random(2, 5, 32, seed=1), t=T),
        {
            **{"adaln": 3, "gate_residual_adaln": 2, "gate_residual": 2},  # text stands between the others
            **{"gelu_mlp": 2, "attention": 2, "window_attention": 2, "patch_embed": 1},
        },
    ),
}


def model(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, int]]:
    cls, options, inputs, expected = MODELS[name]
    made = cls(**options)
    randomise(made)
    return made, inputs, expected


@pytest.mark.parametrize("name", MODELS)
def test_float32(name: str):
    made, inputs, expected = model(name)
    fused = check(made, inputs)
    assert counts(fused.sites) == expected, fused.report()
    assert reasons(fused.sites) == set()


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_by_autocast(name: str):
    """As these code bases train: float32 weights, bfloat16 products."""

    def call(model: nn.Module, **inputs: Any) -> torch.Tensor:
        exact = next(model.parameters()).dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
            return model(**inputs).to(torch.float64 if exact else torch.float32)

    made, inputs, expected = model(name)
    fused = check(made, inputs, call, draws=4)
    if name == "STDiT":  # its stream is float32 and its branches are not: a norm after a gate has another dtype
        expected = {**expected, "adaln": 5, "gate_residual": 4}
        del expected["gate_residual_adaln"]
    assert counts(fused.sites) == expected, fused.report()
