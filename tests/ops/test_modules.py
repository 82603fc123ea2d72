"""The modules: the state dict of what they replace, the same values and gradients, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import modules
from minisora_kernels.testing import assert_as_accurate

X = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GluMlp(nn.Module):
    """timm's, with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 96), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        first, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(first * F.gelu(gate))


class Attention(nn.Module):
    """timm's, with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q_norm, self.k_norm = nn.RMSNorm(8, 1e-6), nn.RMSNorm(8, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 24, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(y.transpose(1, 2).reshape(2, 24, 32))


class MultiHeadCrossAttention(nn.Module):
    """PixArt's, whose text is padded to one length."""

    def __init__(self) -> None:
        super().__init__()
        self.q_linear, self.kv_linear, self.proj = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.q_linear(x).view(2, 24, 4, 8).transpose(1, 2)
        k, v = self.kv_linear(text).view(2, 10, 2, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=COUNTING[:, None, None])
        return self.proj(y.transpose(1, 2).reshape(2, 24, 32))


TEXT = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(3))
COUNTING = torch.arange(10) < torch.tensor([10, 4])[:, None]


def modulated(norm: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    shift, scale = rows[:, None].chunk(2, dim=-1)
    return norm(x) * (1 + scale) + shift


Call = Callable[..., Tensor]
# What is replaced and how it is called, then the module and how it is.
CASES: dict[str, tuple[Callable[[], nn.Module], Call, Callable[[], nn.Module], Call, tuple[Tensor, ...]]] = {
    "PatchEmbed3d": (
        lambda: nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2)),
        lambda module, x: module(x).flatten(2).transpose(1, 2),
        lambda: modules.PatchEmbed3d(4, 32, (1, 2, 2)),
        lambda module, x: module(x),
        (torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2)),),
    ),
    "AdaLayerNorm": (
        lambda: nn.LayerNorm(32, 1e-6),
        modulated,
        lambda: modules.AdaLayerNorm(32, elementwise_affine=True, bias=True),
        lambda module, x, rows: module(x, *rows.chunk(2, dim=-1)),
        (X, ROWS),
    ),
    "AdaLayerNorm, rms": (
        lambda: nn.RMSNorm(32, 1e-6),
        modulated,
        lambda: modules.AdaLayerNorm(32, norm="rms", elementwise_affine=True),
        lambda module, x, rows: module(x, *rows.chunk(2, dim=-1)),
        (X, ROWS),
    ),
    "GeluMLP": (Mlp, lambda module, x: module(x), lambda: modules.GeluMLP(32, 64), lambda module, x: module(x), (X,)),
    "GluMLP": (
        GluMlp,
        lambda module, x: module(x),
        lambda: modules.GluMLP(32, 48, activation="gelu", gate_first=False),
        lambda module, x: module(x),
        (X,),
    ),
    "GatedResidual": (
        nn.Identity,
        lambda module, x, y, rows: x + rows[:, None, :32] * y,
        modules.GatedResidual,
        lambda module, x, y, rows: module(x, y, rows[:, :32]),
        (X, X.flip(1), ROWS),
    ),
    "CrossAttention": (
        MultiHeadCrossAttention,
        lambda module, x, text: module(x, text),
        lambda: modules.CrossAttention(32, 4),
        lambda module, x, text: module(x, text, mask=COUNTING),
        (X, TEXT),
    ),
    "WindowAttention": (
        Attention,
        lambda module, x: module(x),
        lambda: modules.WindowAttention(32, 4, qk_norm="rms"),
        lambda module, x: module(x, (2, 3, 4)),
        (X,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_takes_the_state_and_computes_the_same(name: str):
    replaced, call_replaced, make, call, inputs = CASES[name]
    old, new = replaced(), make()
    for each in old.parameters():
        nn.init.normal_(each, std=0.5)
    state = old.state_dict()
    new.load_state_dict(state)
    assert list(new.state_dict()) == list(state)

    def run(module: nn.Module, call: Call, dtype: torch.dtype) -> dict[str, Any]:
        module = module.to(dtype)
        module.load_state_dict(state)
        given = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
        y = call(module, *given)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        gradients = {name: each.grad for name, each in module.named_parameters()}
        return {"y": y.detach(), **{f"input {i}": each.grad for i, each in enumerate(given)}, **gradients}

    kernel, reference = run(new, call, torch.float32), run(old, call_replaced, torch.float32)
    exact = run(replaced(), call_replaced, torch.float64)
    for key in exact:
        assert_as_accurate(key, kernel[key], reference[key], exact[key])


class Adapted(nn.Linear):
    """As LoRA's layers: the weight is that of the base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("make", [modules.GeluMLP, modules.GluMLP])
def test_an_adapter_or_a_hook_on_a_linear_of_the_mlp_runs(make):
    mlp = make(32, 64)
    before = mlp(X)
    mlp.fc2.register_forward_hook(lambda module, inputs, y: y + 1)
    torch.testing.assert_close(mlp(X), before + 1)
    mlp = make(32, 64)
    adapted = Adapted(64, 32)
    adapted.load_state_dict(mlp.fc2.state_dict())
    before, mlp.fc2 = mlp(X), adapted
    torch.testing.assert_close(mlp(X), before + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: modules.GluMLP(32, 64, activation="relu"), "activation is 'relu'; it may be 'silu', 'gelu', "),
        (lambda: modules.PatchEmbed3d(4, 32, (2, 2)), r"patch is \(2, 2\); it must be three numbers"),
        (lambda: modules.AdaLayerNorm(32, norm="batch"), "norm is 'batch'; it may be 'layer' or 'rms'"),
        (lambda: modules.AdaLayerNorm(32, norm="rms", elementwise_affine=True, bias=True), "bias is True"),
        (lambda: modules.CrossAttention(32, 0), "heads is 0; it must divide dim = 32"),
        (lambda: modules.WindowAttention(32, 5), "heads is 5; it must divide dim = 32"),
        (lambda: modules.WindowAttention(32, 4, qk_norm="batch"), "qk_norm is 'batch'"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
