"""Calls of every op: builders of cases, those that :mod:`.right` checks, those that :mod:`.faster` times.

An op may have a file of its own beside this one, ``cases_<op>.py`` with ``cases()`` and ``timed(random, tokens)``.
tests/cases.py has more cases by the same builders.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

import minisora_kernels as mk

Call = Callable[..., Any]
Random = Callable[..., Tensor]


@dataclass
class Case:
    """``tensors`` are masters by name; ``call(tensors, **kwargs)`` runs the public op on (casts of) them."""

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
    # Where the masters have NaN: the results that depend on them are NaN, and no others.
    has_nan: bool = False
    # What models give: "chunked" are shift, scale and gate as views of one tensor, as modulation has them; "offset" are
    # addresses that are not multiples of 16 bytes.
    layout: Literal["", "chunked", "offset"] = ""
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def differentiable(self) -> bool:
        return any(name not in self.constants for name in self.tensors)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs in ``dtype``, rounded; leaves that require gradients, but for the constants."""
        rounded = {
            name: master.to(self.device, self.dtypes.get(name, dtype)).detach() for name, master in self.tensors.items()
        }
        return {name: leaf.requires_grad_(name not in self.constants) for name, leaf in self.laid(rounded).items()}

    def laid(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the same values in the case's layout."""
        if self.layout == "offset":
            return {
                name: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
                for name, tensor in tensors.items()
            }
        if self.layout == "chunked":
            names = [name for name in ("shift", "scale", "gate") if name in tensors]
            whole = torch.cat([tensors[name] for name in names for _ in range(2)], -1)
            return tensors | dict(zip(names, whole.chunk(2 * len(names), -1)[::2], strict=True))
        return tensors


def random_tensors(seed: int) -> Random:
    """``random(*shape)``: normal, float64, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


MODULATED = {
    "adaln": ("x", "shift", "scale", "weight", "bias"),
    "gate_residual": ("x", "branch", "gate"),
    "gate_residual_adaln": ("x", "branch", "gate", "shift", "scale", "weight", "bias"),
}


def modulated(
    random: Random,
    name: str,
    batch: int,
    tokens: int,
    width: int,
    gate_rows: int,
    rows: int,
    affine: bool = False,
    norm: str = "layer",
    dtypes: dict[str, torch.dtype] | None = None,
) -> Iterator[Case]:  # one argument a column of the tables
    """The same tokens ``[batch, tokens, width]`` through adaln, gate_residual and gate_residual_adaln."""
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
    for op, names in MODULATED.items():
        options = {} if op == "gate_residual" else {"norm": norm}
        yield Case(
            op,
            name,
            {key: value for key, value in tensors.items() if key in names},
            lambda t, op=op, options=options, **kwargs: getattr(mk, op)(**t, **options, **kwargs),
            {key: value for key, value in (dtypes or {}).items() if key in names},
        )


def window_attention(
    random: Random,
    name: str,
    batch: int,
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    heads: int,
    head_dim: int,
    norm: str | None = None,
    weights: int | None = None,
    rotary: str | None = None,
    biased: bool = False,
) -> Case:  # one argument a column of the tables
    """``weights``: None, 1 for all heads together, 2 a head; ``rotary``: None, "interleaved" or "half"."""
    length = prod(window)
    tensors = {"qkv": random(batch, prod(grid), 3, heads, head_dim) * 1.5}
    if weights is not None:
        shape = (head_dim,) if weights == 1 else (heads, head_dim)
        tensors |= {"q_weight": random(*shape) + 1, "k_weight": random(*shape) + 1}
    if biased:
        tensors["bias"] = random(heads, length, length)
    constants: tuple[str, ...] = ()
    if rotary is not None:
        angles = mk.rope_3d(grid, head_dim)
        tensors |= {"cos": angles.cos.double(), "sin": angles.sin.double()}
        constants = ("cos", "sin")

    def call(t: dict[str, Tensor], **kwargs: Any) -> Tensor:
        rope = mk.Rope(t["cos"], t["sin"], rotary == "interleaved") if rotary else None
        kwargs |= {name: t.get(name) for name in ("q_weight", "k_weight", "bias")}
        return mk.window_attention(t["qkv"], grid, window, qk_norm=norm, rope=rope, **kwargs)

    return Case("window_attention", name, tensors, call, dict.fromkeys(constants, torch.float32), constants)


def patch_embed(
    random: Random,
    name: str,
    batch: int,
    channels: int,
    size: Sequence[int],
    patch: Sequence[int],
    width: int,
    biased: bool = True,
    placed: bool = True,
) -> Case:  # one argument a column of the tables
    tensors = {"x": random(batch, channels, *size), "weight": random(width, channels, *patch)}
    full = (1,) * (len(size) - len(patch)) + tuple(patch)
    count = prod(n // p for n, p in zip(size, full, strict=True))
    if biased:
        tensors["bias"] = random(width)
    if placed:
        tensors["pos"] = random(count, width)
    return Case("patch_embed", name, tensors, lambda t, **kwargs: mk.patch_embed(**t, **kwargs))


def unpatchify(random: Random, name: str, batch: int, grid: Sequence[int], patch: Sequence[int], channels: int) -> Case:
    return Case(
        "unpatchify",
        name,
        {"tokens": random(batch, prod(grid), prod(patch) * channels)},
        lambda t, **kwargs: mk.unpatchify(t["tokens"], grid, patch, channels, **kwargs),
    )


def guided_step(
    random: Random,
    name: str,
    shape: Sequence[int],
    channels: int | None = None,
    learned: bool = False,
    guided: bool = True,
    noisy: bool = False,
    rows: bool = False,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Case:  # one argument a column of the tables
    """``rows``: a row of coefficients a sample."""
    predicted = (shape[0], (2 if learned else 1) * shape[1], *shape[2:])
    tensors = {
        "x": random(*shape) * 2,
        "cond": random(*predicted),
        "coefficients": random(shape[0], 5) * 0.5 + 1 if rows else random(5) * 0.5 + 1,
    }
    tensors |= {"null": tensors["cond"] + random(*predicted) / 4} if guided else {}
    tensors |= {"z": random(*shape)} if noisy else {}
    return Case(
        "guided_step",
        name,
        tensors,
        lambda t, **kwargs: mk.guided_step(**t, channels=channels, **kwargs),
        {"coefficients": torch.float32, **(dtypes or {})},
        tuple(tensors),
    )


def gelu_mlp(random: Random, name: str, shape: Sequence[int], hidden: int, out: int, biased: bool = True) -> Case:
    tensors = {"x": random(*shape), "w1": random(hidden, shape[-1]) / 4, "w2": random(out, hidden) / 8}
    biases = {"b1": random(hidden), "b2": random(out)} if biased else {}
    return Case(
        "gelu_mlp",
        name,
        tensors | biases,
        lambda t, **kwargs: mk.gelu_mlp(t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), **kwargs),
        any_threads=False,
    )


def grn(
    random: Random,
    name: str,
    batch: int,
    tokens: int,
    width: int,
    groups: int = 1,
    activation: str | None = None,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Case:
    return Case(
        "grn",
        name,
        {"x": random(batch, tokens, width) * 2 + 0.5, "weight": random(width), "bias": random(width)},
        lambda t, **kwargs: mk.grn(**t, groups=groups, activation=activation, **kwargs),
        dtypes or {},
    )


def files_of_ops() -> list[ModuleType]:
    """The files ``cases_<op>.py``."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
    return [importlib.import_module(f"{__package__}.{stem}") for stem in stems]


def checked() -> list[Case]:
    """What :mod:`.right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    single = torch.float32
    random = random_tensors(0)
    cases = [
        *modulated(random, "per-sample", 2, 17, 96, 1, 1),
        *modulated(random, "mixed-rows", 1, 12, 16, 6, 4, True),
        *modulated(random, "odd-width", 3, 257, 7, 1, 1, True),
        *modulated(random, "model-width", 2, 70, 1152, 1, 1),
        *modulated(random, "float32-stream", 2, 65, 48, 1, 1, False, "layer", {"x": single}),
        *(case for case in modulated(random, "a-clip", 1, 16384, 8, 1, 1, True) if case.op != "gate_residual"),
        next(modulated(random, "per-token", 2, 19, 24, 19, 19, False, "rms")),
        *(replace(case, layout="chunked") for case in modulated(random, "chunked", 2, 18, 96, 1, 1)),
        *(replace(case, layout="chunked") for case in modulated(random, "chunked-frames", 2, 18, 24, 3, 3, True)),
        *(replace(case, layout="offset") for case in modulated(random, "offset", 2, 17, 96, 1, 1, True)),
    ]
    random = random_tensors(1)
    nan = window_attention(random, "packed-beside-nan", 2, (5, 2, 3), (5, 1, 1), 2, 8)
    nan.tensors["qkv"][0, 1] = float("nan")  # the second place, in the first frame: one window of the first sample
    nan.has_nan = True
    cases += [
        nan,
        window_attention(random, "16x72", 1, (16, 1, 2), (16, 1, 1), 2, 72, "rms", 1, "interleaved"),
        window_attention(random, "32x64", 2, (32, 1, 2), (32, 1, 1), 2, 64),
        window_attention(random, "48-bias", 1, (1, 8, 12), (1, 8, 6), 2, 64, None, None, None, True),
        window_attention(random, "spatial", 3, (2, 3, 4), (1, 3, 4), 2, 16, "layer", 2, "half"),
        window_attention(random, "ragged", 2, (5, 7, 6), (2, 3, 4), 2, 8, "rms", 1, "half", True),
        window_attention(random, "alone", 2, (2, 2, 3), (1, 1, 1), 2, 8),
        window_attention(random, "257", 1, (1, 1, 257), (1, 1, 257), 1, 64, None, None, "interleaved"),
        window_attention(random, "162-bias", 1, (2, 9, 10), (2, 9, 9), 2, 16, "layer", 2, None, True),
        window_attention(random, "320-bias", 1, (5, 8, 8), (5, 8, 8), 2, 72, None, None, None, True),
        window_attention(random, "600", 1, (6, 10, 10), (6, 10, 10), 1, 64, "rms", 1, "half"),
        window_attention(random, "wide-heads", 1, (2, 9, 9), (2, 9, 9), 1, 128),
        replace(window_attention(random, "offset", 1, (4, 3, 4), (4, 1, 1), 2, 16, "rms", 1, "half"), layout="offset"),
        replace(window_attention(random, "offset-long", 1, (2, 9, 9), (2, 9, 9), 1, 64), layout="offset"),
    ]
    random = random_tensors(2)
    cases += [
        patch_embed(random, "latents", 2, 4, (3, 6, 10), (1, 2, 2), 24),
        patch_embed(random, "tubelets", 3, 4, (4, 6, 6), (2, 2, 2), 40),
        patch_embed(random, "pixels", 1, 3, (1, 32, 64), (1, 16, 16), 48, True, False),
        patch_embed(random, "odd", 2, 1, (5, 3, 7), (1, 1, 1), 1, False, False),
        replace(patch_embed(random, "offset", 1, 4, (2, 8, 8), (1, 2, 2), 24), layout="offset"),
    ]
    random = random_tensors(3)
    cases += [
        unpatchify(random, "video", 2, (3, 2, 5), (2, 2, 2), 4),
        unpatchify(random, "odd", 1, (5, 1, 7), (1, 4, 4), 1),
        replace(unpatchify(random, "offset", 1, (3, 2, 5), (1, 2, 2), 4), layout="offset"),
    ]
    random = random_tensors(4)
    cases += [
        gelu_mlp(random, "tokens", (2, 17, 32), 128, 32),
        gelu_mlp(random, "odd-widths", (2, 17, 24), 90, 7),
        gelu_mlp(random, "no-bias", (3, 5, 8), 33, 7, False),
        replace(gelu_mlp(random, "offset", (2, 17, 32), 64, 32), layout="offset"),
    ]
    random, half = random_tensors(5), torch.bfloat16
    cases += [
        guided_step(random, "euler", (2, 4, 3, 6, 10)),
        guided_step(random, "ddpm-learned", (3, 4, 3, 6, 5), 3, True, True, True, True),
        guided_step(random, "a-clip", (2, 4, 16, 16, 17), 3, True, True, True, True),
        replace(guided_step(random, "offset", (2, 4, 3, 6, 10)), layout="offset"),
        guided_step(random, "bf16-state", (2, 4, 3, 8, 8), None, True, True, True, True, {"x": half, "z": half}),
    ]
    random = random_tensors(6)
    cases += [
        grn(random, "frames", 2, 3 * 20, 24, 3),
        grn(random, "odd", 3, 35, 77, 5, "gelu"),
        grn(random, "sites-over-chunks", 2, 2 * 150, 33, 2, "gelu"),
        grn(random, "wide", 1, 2 * 9, 2048, 2),
        replace(grn(random, "offset", 2, 3 * 20, 24, 3), layout="offset"),
        grn(random, "float32-stream", 2, 30, 48, 2, None, {"x": single, "bias": single}),
    ]
    return cases + [case for file in files_of_ops() for case in file.cases()]


def timed(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Per regime of an op (see ``detail`` in ``backends.choose``) what is timed, on about so many tokens of width 1152.

    A case is made when it is asked for: on a GPU each takes up to a gigabyte.
    """
    half, width = tokens // 2, 1152 if tokens >= 1024 else 96

    def one(op: str, detail: str, make: Callable[[], Case]) -> tuple[str, Callable[[], Case]]:
        return f"{op} {detail}".strip(), make

    def of_tokens(op: str) -> Case:
        return next(case for case in modulated(random, "", 2, half, width, 1, 1) if case.op == op)

    for op in MODULATED:
        yield one(op, "", partial(of_tokens, op))
    yield one("gelu_mlp", "", lambda: gelu_mlp(random, "", (tokens // 4, width), 4 * width, width))
    yield one("grn", "", lambda: grn(random, "", 1, tokens // 8 * 8, width, 8, "gelu"))
    side = max(2, int((tokens / 16) ** 0.5))
    latents = (1, 16, 16, 2 * side, 2 * side)
    yield one("guided_step", "", lambda: guided_step(random, "", latents, None, True, True, True))
    yield one("unpatchify", "", lambda: unpatchify(random, "", 4, (16, side, side), (1, 2, 2), 16))
    yield one("patch_embed", "short", lambda: patch_embed(random, "", 1, 4, (16, 2 * side, 2 * side), (1, 2, 2), width))
    yield one(
        "patch_embed", "long", lambda: patch_embed(random, "", 1, 3, (16, 16 * side, 16 * side), (1, 16, 16), width)
    )
    heads, head_dim = (16, 72) if tokens >= 1024 else (2, 8)
    windows = {
        "short": ((16, side, side), (16, 1, 1)),
        "long": ((max(1, tokens // 256), 16, 16), (1, 16, 16)) if tokens >= 1024 else ((1, 9, 9), (1, 9, 9)),
    }
    for length, (grid, window) in windows.items():
        for kind in ("plain", "norm", "bias"):
            of_windows = partial(window_attention, random, "", 1, grid, window, heads, head_dim)
            if kind == "norm":
                of_windows = partial(of_windows, norm="rms", weights=1, rotary="interleaved")
            yield one("window_attention", f"{length} {kind}", partial(of_windows, biased=kind == "bias"))
    for file in files_of_ops():
        yield from file.timed(random, tokens)


DTYPES = ("float32", "bfloat16", "float16")


def regimes() -> Iterator[tuple[str, str, str]]:
    """Of every op what a record tells apart: op, dtype, and direction with detail."""
    for name, _ in timed(random_tensors(0), 32):
        op, _, detail = name.partition(" ")
        both = hasattr(torch.ops.minisora, f"{op}_bwd")
        for dtype in DTYPES:
            for direction in ("forward+backward", "forward") if both else ("forward",):
                yield op, dtype, f"{direction} {detail}".rstrip()
