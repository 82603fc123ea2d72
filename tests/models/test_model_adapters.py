"""No kernel reads past an adapter: one that stands in a Linear's place, and shows its weight, is computed too."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import test_cascade
import test_model_kernels
import test_stdit
import test_walt
import torch
from torch import nn

from minisora_kernels.modules import is_plain
from models.denoisers.text import Text
from models.registry import build


class Adapter(nn.Module):
    """As peft's LoRA layer: its ``weight`` is that of the layer beneath, to which it adds."""

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        rows, columns = base.weight.shape
        self.up = nn.Parameter(torch.randn(rows, 2, generator=generator) * 0.3)
        self.down = nn.Parameter(torch.randn(2, columns, generator=generator) * 0.3)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def adapted(model):
    """The model with an adapter on every Linear, and one whose weights have what the adapters add."""
    merged, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        parent, _, child = name.rpartition(".")
        adapter = Adapter(model.get_submodule(name), generator)
        setattr(model.get_submodule(parent), child, adapter)
        with torch.no_grad():
            merged.get_submodule(name).weight += adapter.up @ adapter.down
    return model, merged, names


def cases():
    for name, config in test_model_kernels.CONFIGS.items():
        y = torch.tensor([0, 3, 5]) if config.num_classes else None
        yield f"dit {name}", config, (torch.randn(3, config.channels, *config.input_size), torch.tensor([7.0, 3, 9]), y)
    for name, config in test_stdit.CONFIGS.items():
        yield f"stdit {name}", config, test_stdit.inputs(config)
    for name, (config, images) in test_walt.CASES.items():
        yield f"walt {name}", config, test_walt.inputs(config, images, dtype=torch.float32)
    text = Text(torch.randn(3, 1, 10), torch.ones(3, 1, dtype=torch.bool))
    config = replace(test_model_kernels.CONFIGS["joint"], num_classes=0, text_width=10)
    yield "dit text", config, (torch.randn(3, config.channels, *config.input_size), torch.tensor([7.0, 3, 9]), text)
    for name, config in {**test_cascade.CONFIGS, **test_cascade.PUBLISHED}.items():
        yield f"cascade {name}", config, test_cascade.inputs(config)


CASES = {name: (config, inputs) for name, config, inputs in cases()}


def made(name):
    """A model with random weights, and what it is called with, by place and by name."""
    config, arguments = CASES[name]
    torch.manual_seed(0)
    model = build(config).eval()
    test_cascade.randomized(model)
    named = arguments[-1] if isinstance(arguments[-1], dict) else {}
    return model, [part for part in arguments if not isinstance(part, dict)], named


@pytest.mark.parametrize("name", CASES)
def test_adapters_on_every_linear_are_computed(name):
    model, arguments, named = made(name)
    plain = copy.deepcopy(model)
    model, merged, names = adapted(model)
    assert len(names) > 10
    expected, without = merged(*arguments, **named), plain(*arguments, **named)
    torch.testing.assert_close(model(*arguments, **named), expected, rtol=1e-3, atol=1e-3)
    assert (expected - without).abs().max() > 0.05
    model(*arguments, **named).square().sum().backward()
    # Every adapter has a gradient, and the layers beneath have none.
    for name in names:
        adapter = model.get_submodule(name)
        assert adapter.base_layer.weight.grad is None
        assert adapter.up.grad is not None and adapter.up.grad.any(), name


def test_what_is_plain():
    linear = nn.Linear(2, 2)
    assert is_plain(linear, nn.Conv3d(1, 1, 1))
    assert not is_plain(linear, Adapter(nn.Linear(2, 2), torch.Generator()))
    for hook in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(linear, hook)(lambda *_: None)
        assert not is_plain(linear)
        handle.remove()
        assert is_plain(linear)
