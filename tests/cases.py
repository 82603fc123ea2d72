"""Small inputs for every op: each case is run on every backend, dtype and check of test_ops.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import DEVICE
from torch import Tensor

import minisora_kernels as mk
from minisora_kernels import backends

Call = Callable[..., Any]


@dataclass
class Case:
    """``tensors`` are float64 masters by name; ``call(tensors, **kwargs)`` runs the public op on (casts of) them."""

    op: str
    name: str
    tensors: dict[str, Tensor]
    call: Call
    # Tensors that keep a dtype of their own, whatever the case is run in.
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    # Tensors that are constants of the op; all of them, if its kernels have no backward.
    constants: tuple[str, ...] = ()
    # False where matrix products are torch's, which may round differently with another number of threads.
    any_threads: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def differentiable(self) -> bool:
        return any(name not in self.constants for name in self.tensors)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs in ``dtype``, rounded; leaves that require gradients, but for the constants."""
        return {
            name: master.to(DEVICE, self.dtypes.get(name, dtype)).detach().requires_grad_(name not in self.constants)
            for name, master in self.tensors.items()
        }


def _random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def _adaln_family() -> Iterator[Case]:
    random = _random(0)
    # name, B, N, D, rows of gate, rows of shift and scale, affine, norm, dtypes
    table: list[tuple] = [
        ("per-sample", 2, 17, 96, 1, 1, False, "layer", {}),
        ("one-token", 3, 1, 8, 1, 1, False, "layer", {}),
        ("per-frame", 2, 4 * 33, 40, 4, 4, False, "layer", {}),
        ("per-token", 2, 19, 24, 19, 19, False, "rms", {}),
        ("mixed-rows", 2, 12, 16, 1, 4, False, "layer", {}),
        ("lcm-rows", 1, 12, 16, 6, 4, True, "layer", {}),
        ("odd-width", 3, 257, 7, 1, 1, True, "layer", {}),
        ("width-one", 2, 5, 1, 1, 1, False, "rms", {}),
        ("long", 1, 1590, 72, 1, 1, True, "layer", {}),
        ("a-clip", 1, 16384, 8, 1, 1, True, "layer", {}),
        ("a-clip-of-mixed-rows", 1, 8192, 8, 1, 8192, False, "layer", {}),
        ("rows-over-chunks", 2, 3 * 100, 33, 3, 3, True, "rms", {}),
        ("model-width", 2, 70, 1152, 1, 1, False, "layer", {}),
        ("fp32-modulation", 2, 65, 48, 1, 1, True, "layer", dict.fromkeys(("shift", "scale", "gate"), torch.float32)),
        ("fp32-stream", 2, 65, 48, 1, 1, False, "layer", {"x": torch.float32}),
        ("empty-batch", 0, 5, 16, 1, 1, True, "layer", {}),
        ("no-tokens", 2, 0, 16, 1, 1, True, "layer", {}),
    ]
    for name, batch, tokens, width, gate_rows, rows, affine, norm, dtypes in table:
        tensors = {
            "x": random(batch, tokens, width) * 2 + 0.5,
            "branch": random(batch, tokens, width),
            "gate": random(batch, gate_rows, width),
            "shift": random(batch, rows, width),
            "scale": random(batch, rows, width),
        }
        if affine:
            tensors["weight"] = random(width) + 1
            if norm == "layer":
                tensors["bias"] = random(width)
        for op, names in (
            ("adaln", ("x", "shift", "scale", "weight", "bias")),
            ("gate_residual", ("x", "branch", "gate")),
            ("gate_residual_adaln", ("x", "branch", "gate", "shift", "scale", "weight", "bias")),
        ):
            options = {} if op == "gate_residual" else {"norm": norm}
            yield Case(
                op,
                name,
                {key: value for key, value in tensors.items() if key in names},
                lambda t, op=op, options=options, **kwargs: getattr(mk, op)(**t, **options, **kwargs),
                {key: value for key, value in dtypes.items() if key in names},
            )


def _window_attention() -> Iterator[Case]:
    random = _random(1)
    # name, B, grid, window, heads, head_dim, norm, weights, rope, bias
    table: list[tuple] = [
        ("temporal", 2, (5, 2, 3), (5, 1, 1), 2, 8, None, None, None, False),
        ("temporal-16-72", 1, (16, 1, 2), (16, 1, 1), 2, 72, "rms", 1, "interleaved", False),
        ("spatial", 3, (2, 3, 4), (1, 3, 4), 2, 16, "layer", 2, "half", False),
        ("joint", 2, (2, 3, 5), (2, 3, 5), 1, 40, "rms", None, "interleaved", False),
        ("ragged", 2, (5, 7, 6), (2, 3, 4), 2, 8, "rms", 1, "half", True),
        ("identity", 2, (2, 2, 3), (1, 1, 1), 2, 8, None, None, None, False),
        ("bias", 2, (1, 6, 6), (1, 3, 3), 3, 24, None, None, None, True),
        ("long", 1, (1, 1, 257), (1, 1, 257), 1, 64, None, None, "interleaved", False),
        ("long-bias", 1, (2, 9, 10), (2, 9, 10), 2, 16, "layer", 2, None, True),
        ("empty-batch", 0, (2, 2, 2), (2, 1, 1), 2, 8, None, None, None, False),
    ]
    for name, batch, grid, window, heads, head_dim, norm, weights, rotary, biased in table:
        tokens = grid[0] * grid[1] * grid[2]
        length = window[0] * window[1] * window[2]
        tensors = {"qkv": random(batch, tokens, 3, heads, head_dim) * 1.5}
        if weights is not None:
            shape = (head_dim,) if weights == 1 else (heads, head_dim)
            tensors |= {"q_weight": random(*shape) + 1, "k_weight": random(*shape) + 1}
        if biased:
            tensors["bias"] = random(heads, length, length)
        constants: tuple[str, ...] = ()
        if rotary is not None:
            table_ = mk.rope_3d(grid, head_dim)
            tensors |= {"cos": table_.cos.double(), "sin": table_.sin.double()}
            constants = ("cos", "sin")

        def call(t, grid=grid, window=window, norm=norm, rotary=rotary, **kwargs):
            t = dict(t)
            rope = mk.Rope(t.pop("cos"), t.pop("sin"), rotary == "interleaved") if rotary else None
            return mk.window_attention(t.pop("qkv"), grid, window, qk_norm=norm, rope=rope, **t, **kwargs)

        yield Case("window_attention", name, tensors, call, dict.fromkeys(constants, torch.float32), constants)


def _patch_embed() -> Iterator[Case]:
    random = _random(2)
    # name, B, C, size, patch, D, bias, pos
    table: list[tuple] = [
        ("latents", 2, 4, (3, 6, 10), (1, 2, 2), 24, True, True),
        ("tubelets", 3, 4, (4, 6, 6), (2, 2, 2), 40, True, True),
        ("pixels", 1, 3, (1, 16, 32), (1, 16, 16), 9, True, False),
        ("one-channel", 2, 1, (5, 3, 7), (1, 1, 1), 1, False, False),
        ("image", 2, 4, (6, 4), (2, 2), 33, True, True),
        ("frames", 2, 3, (2, 6, 4), (2, 2), 16, False, True),
        ("empty-batch", 0, 4, (2, 4, 4), (2, 2, 2), 8, True, True),
    ]
    for name, batch, channels, size, patch, width, biased, placed in table:
        tensors = {"x": random(batch, channels, *size), "weight": random(width, channels, *patch)}
        full = (1,) * (len(size) - len(patch)) + tuple(patch)
        count = 1
        for n, p in zip(size, full, strict=True):
            count *= n // p
        if biased:
            tensors["bias"] = random(width)
        if placed:
            tensors["pos"] = random(count, width)
        yield Case("patch_embed", name, tensors, lambda t, **kwargs: mk.patch_embed(**t, **kwargs))


def _unpatchify() -> Iterator[Case]:
    random = _random(3)
    for name, batch, grid, patch, channels in [
        ("video", 2, (3, 2, 5), (2, 2, 2), 4),
        ("latents", 3, (2, 3, 3), (1, 2, 2), 8),
        ("one-channel", 1, (5, 1, 7), (1, 4, 4), 1),
        ("image", 2, (3, 4), (2, 2), 3),
        ("empty-batch", 0, (1, 2, 2), (1, 2, 2), 4),
    ]:
        count = width = 1
        for n, p in zip(grid, patch, strict=True):
            count, width = count * n, width * p
        yield Case(
            "unpatchify",
            name,
            {"tokens": random(batch, count, width * channels)},
            lambda t, rest=(grid, patch, channels), **kwargs: mk.unpatchify(t["tokens"], *rest, **kwargs),
        )


def _guided_step() -> Iterator[Case]:
    random = _random(5)
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
    for name, shape, channels, learned, guided, noisy, rows, dtypes in table:
        predicted = (shape[0], (2 if learned else 1) * shape[1], *shape[2:])
        tensors = {
            "x": random(*shape) * 2,
            "cond": random(*predicted),
            "coefficients": random(shape[0], 5) * 0.5 + 1 if rows else random(5) * 0.5 + 1,
        }
        tensors |= {"null": tensors["cond"] + random(*predicted) / 4} if guided else {}
        tensors |= {"z": random(*shape)} if noisy else {}
        yield Case(
            "guided_step",
            name,
            tensors,
            lambda t, channels=channels, **kwargs: mk.guided_step(**t, channels=channels, **kwargs),
            {"coefficients": torch.float32, **dtypes},
            tuple(tensors),
        )


def _gelu_mlp() -> Iterator[Case]:
    random = _random(4)
    for name, shape, hidden, out, biased in [
        ("tokens", (2, 17, 32), 128, 32, True),
        ("odd-widths", (2, 17, 24), 90, 7, True),
        ("no-bias", (3, 5, 8), 33, 7, False),
        ("flat", (31, 16), 64, 16, True),
        ("vector", (12,), 20, 12, True),
        ("empty-batch", (0, 4, 8), 32, 8, True),
    ]:
        tensors = {"x": random(*shape), "w1": random(hidden, shape[-1]) / 4, "w2": random(out, hidden) / 8}
        biases = {"b1": random(hidden), "b2": random(out)} if biased else {}
        yield Case(
            "gelu_mlp",
            name,
            tensors | biases,
            lambda t, **kwargs: mk.gelu_mlp(t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), **kwargs),
            any_threads=False,
        )


def _grn() -> Iterator[Case]:
    random = _random(6)
    single = dict.fromkeys(("weight", "bias"), torch.float32)
    # name, B, N, C, groups, activation, dtypes
    table: list[tuple] = [
        ("frames", 2, 3 * 20, 24, 3, None, {}),
        ("gelu", 2, 3 * 20, 24, 3, "gelu", {}),
        ("odd", 3, 35, 7, 1, None, {}),
        ("odd-gelu", 3, 35, 77, 5, "gelu", {}),
        ("width-one", 2, 5, 1, 1, "gelu", {}),
        ("one-site", 1, 4, 40, 4, "gelu", {}),
        ("sites-over-chunks", 2, 2 * 150, 33, 2, "gelu", {}),
        ("wide", 1, 2 * 9, 2048, 2, None, {}),
        ("fp32-weights", 2, 65, 48, 1, "gelu", single),
        ("fp32-stream", 2, 30, 48, 2, None, {"x": torch.float32, "bias": torch.float32}),
        ("many-frames", 1, 120, 8, 40, "gelu", {}),
        ("a-clip", 1, 16 * 576, 64, 16, "gelu", {}),
        ("empty-batch", 0, 6, 16, 2, "gelu", {}),
        ("no-tokens", 2, 0, 16, 1, None, {}),
    ]
    for name, batch, tokens, width, groups, activation, dtypes in table:
        yield Case(
            "grn",
            name,
            {"x": random(batch, tokens, width) * 2 + 0.5, "weight": random(width), "bias": random(width)},
            lambda t, options=dict(groups=groups, activation=activation), **kwargs: mk.grn(**t, **options, **kwargs),
            dtypes,
        )


CASES = [
    *_adaln_family(),
    *_window_attention(),
    *_patch_embed(),
    *_unpatchify(),
    *_guided_step(),
    *_gelu_mlp(),
    *_grn(),
]
# An op that was written since has its cases in a file of its own.
for _path in sorted(Path(__file__).parent.glob("cases_*.py")):
    CASES += importlib.import_module(_path.stem).cases()
# Triton's interpreter takes milliseconds for a program: the longest are for the chunks and threads of a CPU.
# tests/test_triton.py has the widths of models on few tokens.
if backends.INTERPRETED:
    CASES = [case for case in CASES if max(tensor.numel() for tensor in case.tensors.values()) <= 50_000]
