"""LoRA by peft, hooks and offload by accelerate, and FSDP2: before fuse and after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fusion_parts import check, counts, first_of, randomise
from originals import DiT
from torch import nn
from video_models import CASES

import minisora_kernels as mk

diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.usefixtures("nothing_compiled"), pytest.mark.slow]


def made() -> nn.Module:
    model = diffusers.WanTransformer3DModel(**CASES["Wan"].config)
    randomise(model)
    return model.eval()


def call(model: nn.Module, **inputs: Any) -> torch.Tensor:
    return first_of(model(**inputs, return_dict=False))


def inputs() -> dict[str, Any]:
    return CASES["Wan"].inputs(torch.float32)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return call(model, **inputs())


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def add_lora(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    names = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"]
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=names), model)
    for name, each in model.named_parameters():
        if "lora_" in name:
            each.data = torch.randn(each.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3


def test_peft_before():
    model = made()
    add_lora(model)
    fused = check(model, inputs(), call, draws=2, whole=True)
    found = counts(fused.sites)
    assert found["attention"] == 4 and found["gelu_mlp"] == 1  # that of the time; those of the blocks have LoRA


def test_peft_after_and_its_scale():
    model = made()
    with mk.fuse(model, backend="cpu") as fused:
        base = output(model)
        assert counts(fused.sites)["gelu_mlp"] == 3
        add_lora(model)
        ours = output(model)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.5)
        half = output(model)
    close(half, output(model))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 1.0)
    close(ours, output(model))
    assert (ours - base).abs().max() > 0.1 and (half - ours).abs().max() > 0.05


@pytest.mark.parametrize("hook_first", [True, False])
def test_hooks_of_accelerate_run_and_come_off_in_both_orders(hook_first: bool):
    hooks = pytest.importorskip("accelerate.hooks")

    class Bends(hooks.ModelHook):
        def post_forward(self, module, output):
            return output.sin()

    model = made()
    before = output(model)
    block = model.blocks[0]
    if hook_first:
        hooks.add_hook_to_module(block, Bends())
        expected = output(model)
    fused = mk.fuse(model, backend="cpu")
    if not hook_first:
        close(output(model), before)
        hooks.add_hook_to_module(block, Bends())
        expected = None
    ours = output(model)
    fused.undo()
    close(ours, output(model) if expected is None else expected)
    assert (ours - before).abs().max() > 0.1
    hooks.remove_hook_from_module(block)
    close(output(model), before)


@pytest.mark.parametrize("offload_first", [True, False])
def test_sequential_offload(offload_first: bool):
    """Weights are on no device until the hook of their module loads them."""
    accelerate = pytest.importorskip("accelerate")
    model = made()
    before = output(model)
    fused = None if offload_first else mk.fuse(model, backend="cpu")
    if fused is not None:
        close(output(model), before)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].ffn.net[2].weight.is_meta
    fused = fused or mk.fuse(model, backend="cpu")
    close(output(model), before)
    close(output(model), before)
    assert model.blocks[0].ffn.net[2].weight.is_meta
    fused.undo()
    close(output(model), before)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_on_blocks(one_process: None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = made()
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with mk.fuse(model, backend="cpu"):
        y = call(model, **inputs())
        y.square().mean().backward()
    expected = call(plain, **inputs())
    expected.square().mean().backward()
    close(y, expected)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-3, atol=1e-4)


def test_tensor_parallel_weights_are_left(one_process: None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = DiT()
    randomise(model)
    given = (torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([1, 5]))
    expected = model(*given)
    for block in model.blocks:
        plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
        parallelize_module(block.mlp, init_device_mesh("cpu", (1,)), plan)
    with mk.fuse(model, backend="cpu") as fused:
        close(model(*given), expected)
    found = counts(fused.sites)
    assert "gelu_mlp" not in found and found["window_attention"] == 2, fused.report()
