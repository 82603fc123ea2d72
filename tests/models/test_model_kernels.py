"""The kernels inside a model in training mode: the output and the gradient of every parameter, by the tolerance rule.

Ops that pass alone can fail together: a tensor that one of them leaves strided and another reads as dense gives a model
whose forward looks right and whose gradients are garbage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from torch import Tensor

import minisora_kernels as mk
from minisora_kernels.testing import assert_as_accurate
from models.denoisers.dit import DiT, DiTConfig

CONFIGS = {
    "joint": DiTConfig(
        input_size=(3, 6, 10), patch=(1, 2, 2), channels=4, width=48, depth=2, heads=3, num_classes=5, class_dropout=0.0
    ),
    "factorized": DiTConfig(
        input_size=(4, 6, 10),
        patch=(2, 2, 2),
        channels=4,
        width=72,
        depth=4,
        heads=1,
        attention="factorized",
        qk_norm="rms",
        learn_sigma=True,
    ),
    "image": DiTConfig(
        input_size=(6, 10),
        patch=(2, 2),
        channels=4,
        width=32,
        depth=2,
        heads=4,
        num_classes=5,
        class_dropout=0.0,
        qk_norm="layer",
    ),
}
OPS = {"adaln", "gate_residual_adaln", "gelu_mlp", "patch_embed", "unpatchify", "window_attention"}


def build(config: DiTConfig, dtype: torch.dtype) -> DiT:
    """In training mode, with random adaLN and final weights: fresh ones are zero, and nothing would have a gradient."""
    torch.manual_seed(0)
    model = DiT(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or name.startswith("final_layer") or name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(DEVICE, dtype)


def run(model: DiT, dtype: torch.dtype, rounded: torch.dtype, layout: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    x = torch.randn(3, config.channels, *config.input_size, generator=generator, dtype=torch.float64).to(rounded)
    x = layout(x.to(DEVICE, dtype)).requires_grad_()
    t = torch.tensor([7.0, 311.0, 990.0], device=DEVICE)
    y = torch.tensor([0, 3, 5], device=DEVICE) if config.num_classes else None
    out = model(x, t, y)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(rounded).to(DEVICE, dtype)
    out.backward(gradient)
    results = {"output": out.detach(), "gradient of x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            results[f"gradient of {name}"] = parameter.grad
    return results


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_in_training_mode(name: str, checkpointing: bool, dtype: torch.dtype, backend: str, nan_filled):
    model = build(CONFIGS[name], dtype)
    model.checkpointing = checkpointing
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    seen = Seen()
    with seen, mk.use_backend(backend):
        kernel = run(model, dtype, dtype, channels_last)
    assert {call.removesuffix("_fwd") for call in seen.names() if call.endswith("_fwd")} == OPS
    assert {call.removesuffix("_bwd") for call in seen.names() if call.endswith("_bwd")} == OPS
    with mk.use_backend("reference"):
        reference = run(plain, dtype, dtype, channels_last)
        truth = run(exact, torch.float64, dtype, channels_last)
    for result in kernel:
        assert_as_accurate(f"{name} {result}", kernel[result], reference[result], truth[result])
