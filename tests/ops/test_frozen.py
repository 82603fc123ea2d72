"""What is frozen costs nothing: nothing is kept for its gradient, and its gradient is not computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from cases import CASES, Case
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from test_ops import outputs
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import minisora_kernels as mk
from minisora_kernels.counters import saved_bytes
from minisora_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.skipif(not KERNEL_BACKENDS, reason="no kernel backend is available: see the header")

MODULATED = {"x": "x scale weight statistics", "shift": "", "scale": "x weight bias statistics"}
MODULATED |= {"weight": "x scale statistics", "bias": "scale"}
# Per op and gradient: the inputs that it takes, and what the forward made (MADE).
KEPT = {
    "adaln": MODULATED,
    "gate_residual": {"x": "", "branch": "gate", "gate": "branch branch_bias", "branch_bias": "gate"},
    "attention": dict.fromkeys(
        ("q", "k", "v", "q_weight", "k_weight", "q_bias", "k_bias"),
        "q k v q_weight k_weight q_bias k_bias cos sin lengths out softmax",
    ),
    "gate_residual_adaln": {name: kept.replace("x ", "residual ") for name, kept in MODULATED.items()}
    | {
        "branch": "residual scale weight statistics gate",
        "gate": "residual scale weight statistics branch branch_bias",
        "branch_bias": "residual scale weight statistics gate",
    },
    "gelu_mlp": {"x": "w1 w2 h", "w1": "x w2 h", "b1": "w2 h", "w2": "h", "b2": ""},
    "glu_mlp": {"x": "w1 w3 w2 halves", "w2": "halves", "b2": ""}
    | dict.fromkeys(("w1", "w3"), "x w2 halves")
    | dict.fromkeys(("b1", "b3"), "w2 halves"),
    "grn": {"x": "x weight norms", "weight": "x norms", "bias": ""},
    "norm_rope": dict.fromkeys(("x", "weight", "bias"), "x weight bias cos sin"),
    "patch_embed": {"x": "weight", "weight": "x", "bias": "", "pos": ""},
    "unpatchify": {"tokens": ""},
    "window_attention": dict.fromkeys(
        ("qkv", "q_weight", "k_weight", "bias"), "qkv q_weight k_weight bias cos sin out softmax"
    ),
}


def queries(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["q"] if "q" in tensors else tensors["qkv"][:, :, 0]


# Bytes of what a forward makes and keeps.
MADE = {
    "statistics": lambda t: 8 * t["x"].shape[:2].numel(),
    "residual": lambda t: t["x"].nbytes,
    "h": lambda t: t["x"].shape[:-1].numel() * t["b1"].nbytes,
    "halves": lambda t: 2 * t["x"].shape[:-1].numel() * t["w2"][0].nbytes,
    "norms": lambda t: 4 * t["x"].numel(),
    "lengths": lambda t: 8 * t["q"].shape[0],
    "out": lambda t: queries(t).nbytes,
    "softmax": lambda t: 8 * queries(t).shape[:3].numel(),
}


def chosen() -> list[Case]:
    """Per op the first case, and one with all of its tensors; rows that differ for the modulated ones."""
    found: dict[str, Case] = {}
    for case in CASES:
        if case.differentiable:
            found.setdefault(case.op, case)
            for name in (
                "mixed-rows",
                "lcm-rows",
                "per-token",
                "ragged",
                "pixels",
                "without-scale",
                "without-gate",
                "branch-bias",
                "shared",
                "exact",
                "apart",
                "norm-cross",
                "layer-across",
            ):
                if case.name == name:
                    found[str(case)] = case
    return list(found.values())


ONE_CASE = [next(case for case in CASES if case.op == op) for op in KEPT]


def subsets(names: list[str]) -> Iterator[set[str]]:
    for count in {1, len(names) - 1} - {0}:
        yield from map(set, combinations(names, count))


def some_gradients(case: Case, dtype: torch.dtype, backend: str, asked: set[str], like: torch.dtype | None = None):
    """The gradients of the inputs in ``asked``, with the others frozen."""
    leaves = {name: leaf.detach().to(dtype) for name, leaf in case.leaves(like or dtype).items()}
    for name in asked:
        leaves[name].requires_grad_()
    result = outputs(case.call(leaves, backend=backend))
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in result]
    result, given = zip(*((v, g) for v, g in zip(result, given, strict=True) if v.requires_grad), strict=True)
    torch.autograd.backward(
        result, [g.to(DEVICE, like or v.dtype).to(v.dtype) for v, g in zip(result, given, strict=True)]
    )
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == asked
    return {name: leaves[name].grad for name in asked}


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", chosen(), ids=str)
def test_gradients_beside_frozen_inputs(case: Case, dtype: torch.dtype, backend: str, nan_filled):
    """The bits of a run that asks for all, or as accurate, where a sum has another order."""
    names = [name for name in case.tensors if name not in case.constants]
    whole = some_gradients(case, dtype, backend, set(names))
    for asked in subsets(names):
        seen = Seen()
        with seen:
            found = some_gradients(case, dtype, backend, asked)
        for name, gradient in found.items():
            if not torch.equal(gradient, whole[name]):
                reference = some_gradients(case, dtype, "reference", asked)[name]
                exact = some_gradients(case, torch.float64, "reference", asked, like=dtype)[name]
                assert_as_accurate(f"{case} {name} of {asked}", gradient, reference, exact)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", chosen(), ids=str)
def test_what_is_kept_is_what_the_gradients_take(case: Case, backend: str):
    names = [name for name in case.tensors if name not in case.constants]
    for asked in subsets(names):
        leaves = {name: leaf.detach() for name, leaf in case.leaves(torch.float32).items()}
        kept: dict[int, Tensor] = {}
        for name in asked:
            leaves[name].requires_grad_()

        def pack(tensor: Tensor, kept=kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = case.call(leaves, backend=backend)
        allowed = {part for name in asked for part in KEPT[case.op][name].split()}
        own = {leaf.untyped_storage().data_ptr(): name for name, leaf in leaves.items() if leaf.numel()}
        assert {own[key] for key in kept if key in own} <= allowed, f"{case}: for {asked}"
        made = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
        assert made <= sum(MADE[part](leaves) for part in allowed & MADE.keys()), f"{case}: for {asked}"
        del result


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", chosen(), ids=str)
def test_no_gradient_is_computed_that_is_not_asked_for(case: Case, backend: str):
    """A raw op's results are the gradients that are asked for; the others have no elements."""
    names = [name for name in case.tensors if name not in case.constants]
    if any(tensor.numel() == 0 for tensor in case.tensors.values()):
        return
    for asked in subsets(names):
        seen = Results()
        with seen:
            some_gradients(case, torch.float32, backend, asked)
        for op, results in seen.backward:
            if not op.startswith(case.op):  # norm_rope as a part of attention: test_attention.py asks what it computes
                continue
            # without a gate the gradient of the branch is that of x
            ungated = op == "gate_residual_adaln_bwd" and "gate" not in case.tensors
            taken = {"x" if ungated and name == "branch" else name for name in asked}
            if op == "glu_mlp_bwd":  # one result for both halves
                taken |= {name.replace("3", "1") for name in asked}
            if op == "attention_bwd":  # the gradient of a norm's weight comes from that of what it was taken of
                taken = {name[0] for name in asked}
            for label, tensor in zip(RETURNS[op], results, strict=True):
                wanted = label in taken
                assert (tensor.numel() > 0) == wanted, f"{case}: {label} of {op} for {asked}"


# Per backward the results in turn, each by the inputs whose gradients take it.
RETURNS = {
    "adaln_bwd": ("x", "shift", "scale", "weight", "bias"),
    "gate_residual_bwd": ("branch", "gate", "branch_bias"),
    "gate_residual_adaln_bwd": ("x", "branch", "gate", "branch_bias", "shift", "scale", "weight", "bias"),
    "attention_bwd": ("q", "k", "v"),
    "gelu_mlp_bwd": ("x", "w2", "w1", "b1"),
    "glu_mlp_bwd": ("x", "w2", "w1", "b1"),
    "grn_bwd": ("x", "weight", "bias"),
    "norm_rope_bwd": ("x", "weight", "bias"),
    "patch_embed_bwd": ("weight", "bias", "pos"),
    "patch_embed_video": ("x",),
    "unpatchify_bwd": ("tokens",),
    "window_attention_bwd": ("qkv", "q_weight", "k_weight", "bias"),
}


class Results(Seen):
    """What the backwards returned."""

    def __init__(self) -> None:
        super().__init__()
        self.backward: list[tuple[str, tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        if func.namespace.startswith("minisora") and name in RETURNS:
            self.backward.append((name, outputs(result)))
        return result


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", ONE_CASE, ids=str)
def test_compiled_gradients_beside_frozen_inputs(case: Case, backend: str):
    names = [name for name in case.tensors if name not in case.constants]
    for asked in ({names[0]}, set(names[1:])) if len(names) > 1 else ({names[0]},):
        torch._dynamo.reset()
        compiled = torch.compile(lambda t, backend: case.call(t, backend=backend), fullgraph=True, backend="aot_eager")
        plain = some_gradients(case, torch.float32, backend, asked)
        traced = some_gradients(replace(case, call=compiled), torch.float32, backend, asked)
        for name, value in plain.items():
            torch.testing.assert_close(traced[name], value, rtol=1e-5, atol=1e-5)


class Adapted(nn.Module):
    """A block with LoRA on its attention's two Linear layers: all else is frozen."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.grid, self.heads = (tokens, 1, 1), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.requires_grad_(False)
        self.adapters = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, 4, bias=False), nn.Linear(4, layer.out_features, bias=False)])
            for layer in (self.qkv, self.out)
        )

    def adapted(self, layer: nn.Linear, adapter: nn.ModuleList, x: Tensor) -> Tensor:
        return layer(x) + adapter[1](adapter[0](x))

    def forward(self, x: Tensor, c: Tensor, backend: str) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = c.chunk(6, dim=-1)
        h = mk.adaln(x, shift, scale, backend=backend)
        qkv = self.adapted(self.qkv, self.adapters[0], h).unflatten(-1, (3, self.heads, -1))
        h = mk.window_attention(qkv, self.grid, self.grid, backend=backend)
        h = self.adapted(self.out, self.adapters[1], h)
        x, h = mk.gate_residual_adaln(x, h, gate, shift2, scale2, backend=backend)
        h = mk.gelu_mlp(h, self.up.weight, self.up.bias, self.down.weight, self.down.bias, backend=backend)
        return mk.gate_residual(x, h, gate2, backend=backend)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_block_with_lora_keeps_no_more_than_eager_pytorch(backend: str, dtype: torch.dtype):
    block = Adapted(64, 4, 32).to(DEVICE, dtype)
    x = torch.randn(2, 32, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    c = torch.randn(2, 6 * 64, device=DEVICE, dtype=dtype)
    leaves = [x, c, *block.parameters()]
    ours, eager = (saved_bytes(lambda name=name: block(x, c, name), leaves) for name in (backend, "reference"))
    assert ours <= eager
