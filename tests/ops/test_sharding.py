"""DTensors through the token-local ops, on two processes: split by sample and by token, as on one process alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import minisora_kernels as mk
from minisora_kernels import backends

pytestmark = pytest.mark.slow

B, N, D = 2, 6, 8

# What each takes of the tensors by name.
CALLS = {
    "adaln": lambda t: mk.adaln(t["x"], t["shift"], t["scale"], weight=t["weight"], bias=t["bias"], backend="cpu"),
    "gate_residual": lambda t: mk.gate_residual(
        t["x"], t["branch"], t["gate"], branch_bias=t["branch_bias"], backend="cpu"
    ),
    "gate_residual_adaln": lambda t: mk.gate_residual_adaln(
        *(t[name] for name in ("x", "branch", "gate", "shift", "scale")),
        branch_bias=t["branch_bias"],
        index=t.get("index"),
        backend="cpu",
    )[1],
    "gelu_mlp": lambda t: mk.gelu_mlp(t["x"], t["w1"], t["b1"], t["w2"], t["b2"], backend="cpu"),
    "glu_mlp": lambda t: mk.glu_mlp(
        t["x"], t["w1"], t["b1"], t["w2"], t["b2"], w3=t["w1"].sin(), b3=t["b1"].sin(), backend="cpu"
    ),
}


def tensors(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {name: torch.randn(B, N, D) for name in ("x", "branch")}
    found |= {name: torch.randn(B, rows, D) for name in ("shift", "scale", "gate")}
    found |= {name: torch.randn(D) for name in ("weight", "bias", "branch_bias")}
    return found | {"w1": torch.randn(16, D), "b1": torch.randn(16), "w2": torch.randn(D, 16), "b2": torch.randn(D)}


def compare(op: str, dim: int, rows: int = 1, frozen: tuple[str, ...] = (), index: Tensor | None = None) -> bool:
    """Whether the result is split as the tokens are; values and gradients are those of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    plain = {name: value.requires_grad_(name not in frozen) for name, value in tensors(rows).items()}
    split = {}
    for name, value in plain.items():
        whole = value.dim() < 3 or (dim == 1 and (value.shape[1] == 1 or (index is not None and value.shape[1] != N)))
        placement = Replicate() if whole else Shard(dim)
        split[name] = distribute_tensor(value.detach().clone(), mesh, [placement]).requires_grad_(name not in frozen)
    if index is not None:
        along = Shard(dim) if index.dim() == 2 else Shard(0) if dim == 1 else Replicate()
        plain["index"], split["index"] = index, distribute_tensor(index, mesh, [along])
    expected, found = CALLS[op](plain), CALLS[op](split)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(found.full_tensor(), expected)
    for name, value in plain.items():
        assert (split[name].grad is None) == (value.grad is None), name
        if value.grad is not None:
            torch.testing.assert_close(split[name].grad.full_tensor(), value.grad, rtol=1e-4, atol=1e-4)
    return found.placements == (Shard(dim),)


def on_this_process(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for op in CALLS:
            assert compare(op, 0), op
        for op in ("adaln", "gate_residual", "gate_residual_adaln"):
            assert compare(op, 1), op
            assert compare(op, 1, frozen=("x", "branch")), op  # the same call but for what is asked for
            assert not compare(op, 1, rows=3), op  # a device cannot tell the rows of its tokens: it gets all
        for index in (torch.arange(N) % 3, torch.arange(B * N).view(B, N) % 3):
            for dim in (0, 1):
                assert compare("gate_residual_adaln", dim, rows=3, index=index), (index.shape, dim)
        compare("gelu_mlp", 1)
        compare("glu_mlp", 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no CPU kernels")
def test_values_and_gradients_are_those_of_one_process(tmp_path: Path):
    store = str(tmp_path / "store")
    code = f"import runpy; runpy.run_path({__file__!r})['on_this_process'](1, {store!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as other:
        try:
            on_this_process(0, store)
            assert other.wait(60) == 0, other.stderr and other.stderr.read()
        finally:
            other.kill()


def test_torchs_table_is_filled_where_it_was_imported_first():
    code = """
import torch, torch.distributed.tensor as tensor
import minisora_kernels
known = tensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
print(torch.ops.minisora.adaln_fwd.default in known, torch.ops.minisora_triton.gelu_mlp_bwd.default in known)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "True True\n"
