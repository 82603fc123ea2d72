"""Transformers of diffusers, small and with random weights: values, every gradient, and what is found."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_parts import check, counts, first_of, in_dtype, randomise
from torch import nn
from video_models import CASES, noise

import minisora_kernels as mk

diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.usefixtures("nothing_compiled"), pytest.mark.slow]

# Norms, gates, MLPs of both kinds, attentions and patch embeddings; a joined norm and gate counts as both.
FOUND = {
    "DiT": (5, 4, 2, 2, 1),
    "PixArt": (5, 4, 3, 4, 1),
    "Latte": (9, 8, 5, 6, 1),
    "CogVideoX": (9, 8, 2, 2, 1),
    "Wan": (5, 4, 3, 4, 1),
    "Wan per token": (5, 4, 3, 4, 1),
    "SkyReels": (5, 4, 3, 4, 1),
    "WanVACE": (9, 8, 5, 8, 2),
    "HunyuanVideo": (11, 12, 4, 4, 1),
    "HunyuanVideo15": (4, 6, 2, 0, 1),
    "LTX": (5, 4, 3, 4, 0),
    "Allegro": (5, 4, 3, 4, 1),
    "SanaVideo": (5, 4, 1, 2, 1),
    "Cosmos": (7, 6, 2, 4, 0),
    "Kandinsky5": (9, 8, 3, 5, 0),
    "Mochi": (4, 4, 2, 0, 1),
    "Flux": (11, 10, 4, 4, 0),
    "Flux2": (10, 9, 4, 3, 0),
    "Lumina2": (5, 6, 3, 3, 0),
    "SD3": (9, 7, 3, 3, 1),
    "QwenImage": (9, 8, 4, 2, 0),
}


def parts(found: dict[str, int]) -> tuple[int, ...]:
    both = Counter(found)
    joined = both["gate_residual_adaln"]
    attentions = both["attention"] + both["window_attention"]
    norms, gates = both["adaln"] + joined, both["gate_residual"] + joined
    return norms, gates, both["gelu_mlp"] + both["glu_mlp"], attentions, both["patch_embed"]


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    case = CASES[name]
    model = getattr(diffusers, case.cls)(**case.config)
    randomise(model)
    return in_dtype(model, dtype).eval()


def call(model: nn.Module, **inputs: Any) -> torch.Tensor:
    return first_of(model(**inputs, return_dict=False))


# Its code rounds q and k to bfloat16 in any dtype, so a last bit before that becomes one of bfloat16.
ROUNDS = {"Kandinsky5"}
# With its norms in bfloat16, Mochi rounds between norm and modulation: those norms stay.
FEWER = {"Mochi": (2, 4, 2, 0, 1)}
# Attentions that turn q and k themselves. In the others q and k turn in thirds of a head (Allegro), or not at all.
TURNED = {
    **{"CogVideoX": 2, "Wan": 2, "Wan per token": 2, "SkyReels": 2, "WanVACE": 4},
    **{"HunyuanVideo": 2, "LTX": 2, "Cosmos": 2, "Flux": 4, "Flux2": 3},
}
# Attentions that norm q and k themselves. Where text and video have norms of their own, those stay.
NORMED = {
    **{"CogVideoX": 2, "Wan": 4, "Wan per token": 4, "SkyReels": 4, "WanVACE": 8},
    **{"HunyuanVideo": 2, "LTX": 4, "SanaVideo": 2, "Cosmos": 2, "Flux": 2, "Flux2": 1, "SD3": 1},
}
TURNED_BFLOAT16 = TURNED | {"Kandinsky5": 3}


def turned(ropes: list[Any], draws: int) -> int:
    """Calls with rotary tables per draw."""
    return sum(rope is not None for rope, _ in ropes) // draws


def normed(ropes: list[Any], draws: int) -> int:
    """Calls with a norm of q and k per draw."""
    return sum(norm is not None for _, norm in ropes) // draws


@pytest.mark.parametrize("name", [name for name in CASES if name not in ROUNDS])
def test_float32(name: str, ropes: list[Any]):
    fused = check(made(name), CASES[name].inputs(torch.float32), call, draws=3, whole=True)
    assert parts(counts(fused.sites)) == FOUND[name], fused.report()
    assert turned(ropes, 3) == TURNED.get(name, 0)
    assert normed(ropes, 3) == NORMED.get(name, 0)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str, ropes: list[Any]):
    dtype = torch.bfloat16
    fused = check(made(name, dtype), CASES[name].inputs(dtype), call, draws=2, whole=True)
    assert parts(counts(fused.sites)) == FEWER.get(name, FOUND[name]), fused.report()
    assert turned(ropes, 2) == TURNED_BFLOAT16.get(name, 0)


# MLPs of tokens of width 32: the module of diffusers.models, the class, its arguments.
GATED = {
    "SwiGLU": ("attention", "FeedForward", dict(dim=32, activation_fn="swiglu")),
    "GEGLU": ("attention", "FeedForward", dict(dim=32, activation_fn="geglu")),
    "AuraFlow": ("transformers.auraflow_transformer_2d", "AuraFlowFeedForward", dict(dim=32, hidden_dim=96)),
    "Cosmos3": ("transformers.transformer_cosmos3", "Cosmos3VLTextMLP", dict(hidden_size=32, intermediate_size=64)),
    "Flux2": ("transformers.transformer_flux2", "Flux2FeedForward", dict(dim=32)),
    "HiDream": ("transformers.transformer_hidream_image", "HiDreamImageFeedForwardSwiGLU", dict(dim=32, hidden_dim=96)),
    "Krea2": ("transformers.transformer_krea2", "Krea2SwiGLU", dict(dim=32, hidden_dim=64)),
    "Lumina2": ("attention", "LuminaFeedForward", dict(dim=32, inner_dim=64, multiple_of=8)),
    "OmniGen": ("transformers.transformer_omnigen", "OmniGenFeedForward", dict(hidden_size=32, intermediate_size=64)),
    "QwenImage21": (
        "transformers.transformer_qwenimage21",
        "QwenImage21SwiGLUFeedForward",
        dict(hidden_size=32, mlp_hidden_size=64),
    ),
    "ZImage": ("transformers.transformer_z_image", "FeedForward", dict(dim=32, hidden_dim=64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATED)
def test_gated_mlps(name: str, dtype: torch.dtype):
    module, cls, options = GATED[name]
    mlp = getattr(importlib.import_module(f"diffusers.models.{module}"), cls)(**options)
    randomise(mlp)
    fused = check(mlp.to(dtype), {"x": noise(2, 12, 32, dtype=dtype)})
    assert counts(fused.sites) == {"glu_mlp": 1}, fused.report()


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_a_gated_mlp_under_autocast_is_as_near_as_in_eager(activation: str):
    from diffusers.models.attention import FeedForward

    mlp = FeedForward(32, activation_fn=activation)
    randomise(mlp)

    def cast(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            return model(x).to(x.dtype)

    fused = check(mlp, {"x": noise(2, 12, 32)}, cast)
    assert counts(fused.sites) == {"glu_mlp": 1}, fused.report()


def test_checkpointing():
    model = made("Wan").train()
    model.enable_gradient_checkpointing()
    fused = check(model, CASES["Wan"].inputs(torch.float32), call, draws=2, whole=True)
    assert parts(counts(fused.sites)) == FOUND["Wan"], fused.report()


def same(model: nn.Module, name: str, before: torch.Tensor | None = None, **tolerance: float) -> torch.Tensor:
    """The output, held against another."""
    with torch.no_grad():
        y = call(model, **CASES[name].inputs(torch.float32))
    if before is not None:
        torch.testing.assert_close(y, before, **{"rtol": 1e-4, "atol": 1e-4, **tolerance})
    return y


def test_a_fused_model_is_saved_and_loaded(tmp_path: Path):
    model = made("LTX")
    y = same(model, "LTX")
    with mk.fuse(model, backend="cpu"):
        same(model, "LTX", y)
        model.save_pretrained(tmp_path)
    loaded = diffusers.LTXVideoTransformer3DModel.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    with mk.fuse(loaded, backend="cpu") as fused:
        same(loaded, "LTX", y)
    assert parts(counts(fused.sites)) == FOUND["LTX"]


def test_diffusers_ema():
    from diffusers.training_utils import EMAModel

    model = made("Wan")
    with mk.fuse(model, backend="cpu"):
        ema = EMAModel(model.parameters())
        y = same(model, "Wan")
        ema.step(model.parameters())
        ema.copy_to(model.parameters())
        same(model, "Wan", y)
        assert copy.deepcopy(model)._compiled_call_impl is None


class Counting(diffusers.hooks.ModelHook):
    def __init__(self) -> None:
        self.runs = 0

    def pre_forward(self, module, *args, **kwargs):
        self.runs += 1
        return args, kwargs


@pytest.mark.parametrize("hook_first", [True, False])
def test_hooks_of_diffusers_run_in_both_orders(hook_first: bool):
    from diffusers.hooks import HookRegistry

    model, hook = made("Wan"), Counting()
    y = same(model, "Wan")
    forward = model.blocks[0].forward

    def add() -> None:
        HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(hook, "counting")

    if hook_first:
        add()
    fused = mk.fuse(model, backend="cpu")
    if not hook_first:
        same(model, "Wan", y)
        add()
    same(model, "Wan", y)
    same(model, "Wan", y)
    assert hook.runs == 2
    assert counts(fused.sites)["adaln"] >= 3
    fused.undo()
    same(model, "Wan", y)
    assert hook.runs == 3
    model.blocks[0]._diffusers_hook.remove_hook("counting")
    assert model.blocks[0].forward == forward
    same(model, "Wan", y)
    assert hook.runs == 3


@pytest.mark.parametrize("cast_first", [True, False])
def test_layerwise_casting_in_both_orders(cast_first: bool):
    model = made("Wan")
    options = dict(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = copy.deepcopy(model)
    plain.enable_layerwise_casting(**options)
    y = same(plain, "Wan")
    if cast_first:
        model.enable_layerwise_casting(**options)
    with mk.fuse(model, backend="cpu") as fused:
        if not cast_first:
            same(model, "Wan")
            model.enable_layerwise_casting(**options)
        same(model, "Wan", y)
        assert model.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn  # and it is cast back
        # Its hooks break the graph at every Linear, so what lies between them is found alone.
        assert "the graph breaks" in fused.report()


def test_first_block_cache_still_skips_blocks():
    from diffusers.hooks import FirstBlockCacheConfig

    model = made("Wan")
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # after the first step all others skip
    runs: list[int] = []
    model.blocks[1].ffn.register_forward_hook(lambda *_: runs.append(1))
    results = []
    for fused in (False, True):
        model._reset_stateful_cache() if hasattr(model, "_reset_stateful_cache") else None
        handle = mk.fuse(model, backend="cpu") if fused else None
        with model.cache_context("steps"):
            results.append([same(model, "Wan"), same(model, "Wan")])
        if handle is not None:
            assert counts(handle.sites), handle.report()
            handle.undo()
        assert len(runs) == 1
        runs.clear()
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_compile_repeated_blocks_with_the_pass():
    model = made("Wan")
    y = same(model, "Wan")
    compiler = mk.compiler("aot_eager", backend="cpu")
    model.compile_repeated_blocks(backend=compiler, fullgraph=True)
    same(model, "Wan", y)
    assert parts(counts(compiler.sites))[:4] == (2, 2, 1, 2), compiler.report()  # one graph serves both blocks


def test_fused_qkv_and_another_processor_are_what_is_read():
    model = made("Wan")
    y = same(model, "Wan")
    model.fuse_qkv_projections()
    with mk.fuse(model, backend="cpu") as fused:
        same(model, "Wan", y)
    assert counts(fused.sites)["attention"] == 4
