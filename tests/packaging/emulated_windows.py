"""csrc/cuda/window_attention.cu by values and gradients, order of threads, and planted faults."""

from __future__ import annotations

import math
from dataclasses import dataclass

import emulated
import pytest
import torch
from torch import Tensor

from minisora_kernels import Rope, rope_3d
from minisora_kernels.modulation import Norm
from minisora_kernels.ops import window_attention
from minisora_kernels.ops.norm_rope import NORMS
from minisora_kernels.testing import assert_as_accurate

ops = emulated.load("window_attention_fwd", "window_attention_bwd")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("qkv", "q_weight", "k_weight", "bias")


@dataclass(frozen=True)
class Case:
    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    head_dim: int
    batch: int = 1
    heads: int = 1
    norm: Norm | None = None
    weights: int = 0  # dimensions
    rope: str | None = None
    biased: bool = False
    dtype: torch.dtype = BF16
    parameters: torch.dtype = F32

    def tensors(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(7)

        def random(*size: int, dtype: torch.dtype, around: float = 0.0) -> Tensor:
            return (around + torch.randn(size, generator=generator)).to(dtype)

        tokens, length = math.prod(self.grid), math.prod(self.window)
        weight = (self.heads, self.head_dim)[2 - self.weights :]
        return {
            "dout": random(self.batch, tokens, self.heads * self.head_dim, dtype=self.dtype),
            "qkv": random(self.batch, tokens, 3, self.heads, self.head_dim, dtype=self.dtype),
            "q_weight": random(*weight, dtype=self.parameters, around=1.0) if self.weights else None,
            "k_weight": random(*weight, dtype=self.parameters, around=1.0) if self.weights else None,
            "bias": random(self.heads, length, length, dtype=self.parameters) if self.biased else None,
        }

    def angles(self) -> Rope | None:
        return None if self.rope is None else rope_3d(self.grid, self.head_dim, interleaved=self.rope == "interleaved")


# Windows of 1 to 64 tokens: several in a tile, tiles of one, two and four warps, rows left empty, edges cut off.
CASES = {
    "single tokens": Case((1, 1, 19), (1, 1, 1), 72, norm="rms", rope="half", biased=True),
    "packed": Case((5, 1, 4), (5, 1, 1), 72, 2, 2, "layer", 2, "interleaved", True, F16),
    "packed edges": Case((3, 3, 1), (2, 2, 1), 96, 2, 1, "rms", 1, "half", True, parameters=BF16),
    "temporal": Case((16, 1, 2), (16, 1, 1), 72, 1, 2, "rms", 1, "half"),
    "temporal plain": Case((16, 1, 2), (16, 1, 1), 64),
    "odd": Case((13, 1, 1), (13, 1, 1), 128, 2, 1, "rms", 2, "interleaved", parameters=F16),
    "two warps": Case((1, 5, 6), (1, 5, 4), 72, 1, 1, "layer", 1, "half", True),
    "two warps, wide": Case((32, 1, 1), (32, 1, 1), 96, rope="interleaved", dtype=F16),
    "four warps": Case((64, 1, 1), (64, 1, 1), 64, 1, 1, "rms", 1, "half", True),
    "four warps, edge": Case((1, 8, 6), (1, 8, 5), 128, 1, 1, "rms", 2, "half"),
}


def emulate(case: Case, tensors: dict[str, Tensor | None], needs: tuple[bool, ...] = (True,) * 4) -> dict[str, Tensor]:
    """The output, and the gradients that ``needs`` asks for, in the order of ``NAMES``."""
    rope = case.angles()
    angles = (None, None, True) if rope is None else (rope.cos.float(), rope.sin.float(), rope.interleaved)
    qkv, weights, bias = tensors["qkv"], (tensors["q_weight"], tensors["k_weight"]), tensors["bias"]
    options = (*weights, NORMS[case.norm], *angles, bias, case.head_dim**-0.5, 1e-6)
    out, softmax = ops.window_attention_fwd(qkv, *case.grid, *case.window, *options)
    asked = [need and tensors[name] is not None for name, need in zip(NAMES, needs, strict=True)]
    arguments = (tensors["dout"], qkv, out, softmax, *case.grid, *case.window, *options)
    gradients = dict(zip(NAMES, ops.window_attention_bwd(*arguments, *asked), strict=True))
    assert all(gradients[name].numel() == 0 for name, need in zip(NAMES, asked, strict=True) if not need)
    return {"out": out} | {name: gradients[name] for name, need in zip(NAMES, asked, strict=True) if need}


def reference(case: Case, tensors: dict[str, Tensor | None], exact: bool) -> dict[str, Tensor]:
    leaves = {
        name: tensor.detach().to(torch.float64 if exact else tensor.dtype).requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    dout = leaves.pop("dout").detach()
    rope = case.angles()
    if rope is not None and exact:
        rope = rope._replace(cos=rope.cos.double(), sin=rope.sin.double())
    given = (leaves.get(name) for name in NAMES)
    out = window_attention.reference(*given, case.grid, case.window, case.norm, rope, case.head_dim**-0.5, 1e-6)
    out.backward(dout)
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_values_and_gradients(case: Case, nan_filled):
    tensors = case.tensors()
    kernel, plain, exact = emulate(case, tensors), reference(case, tensors, False), reference(case, tensors, True)
    assert kernel.keys() == plain.keys()
    for name, value in kernel.items():
        assert_as_accurate(name, value, plain[name], exact[name])


@pytest.mark.parametrize(("name", "seed", "blocks"), [("packed", "1", "1"), ("two warps", "2", "3")])
def test_same_bits_in_any_order_and_grid(name: str, seed: str, blocks: str, monkeypatch):
    case = CASES[name]
    tensors = case.tensors()
    first = emulate(case, tensors)
    monkeypatch.setenv("CUDA_ON_CPU_SEED", seed)
    monkeypatch.setenv("CUDA_ON_CPU_BLOCKS", blocks)
    for each, result in emulate(case, tensors).items():
        assert torch.equal(result, first[each]), f"{each} changes with the order of threads, or with the grid"


def test_only_what_is_asked_for(nan_filled):
    case = CASES["packed edges"]
    tensors = case.tensors()
    whole = emulate(case, tensors)
    for needs in ((True, False, False, False), (False, True, False, True), (False, False, True, False)):
        for name, value in emulate(case, tensors, needs).items():
            assert torch.equal(value, whole[name]), name


def test_unaligned_and_empty_tensors(nan_filled):
    case = CASES["temporal"]
    tensors = case.tensors()
    whole = emulate(case, tensors)
    for name in ("qkv", "dout"):
        tensor = tensors[name]
        assert tensor is not None
        tensors[name] = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    for name, value in emulate(case, tensors).items():
        assert torch.equal(value, whole[name]), name
    none = {
        name: tensor[:0] if name in ("qkv", "dout") else tensor
        for name, tensor in tensors.items()
        if tensor is not None
    }
    nothing = emulate(case, none | {"bias": None})
    assert nothing["out"].shape[0] == 0 and not nothing["q_weight"].any()


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("part", ("q", "k", "v", "dout"))
def test_what_is_not_finite_stays_in_its_window(part: str, bad: float):
    case = Case((5, 1, 4), (5, 1, 1), 64, norm="rms" if part == "k" else None, biased=True)
    clean = case.tensors()
    dirty = {name: None if tensor is None else tensor.clone() for name, tensor in clean.items()}
    if part == "dout":
        dirty["dout"][0, 4 * 3 + 1, 30] = bad  # token 3 of window 1
    else:
        dirty["qkv"][0, 4 * 3 + 1, "qkv".index(part), 0, 6] = bad
    before, after = emulate(case, clean), emulate(case, dirty)
    for name in ("out", "qkv"):
        was, now = (result[name].view(5, 4, -1) for result in (before, after))
        assert torch.equal(now[:, [0, 2, 3]], was[:, [0, 2, 3]])
        assert not now[:, 1].isfinite().all() or (name, part) == ("out", "dout")
    assert not after["bias"].isfinite().all()


# ---- faults that must be seen


@pytest.mark.parametrize("name", ("temporal", "two warps"))
def test_a_barrier_that_is_missing_is_seen_as_a_race(name: str, monkeypatch):
    case = CASES[name]
    tensors = case.tensors()
    seen = 0
    for barrier in range(6):
        monkeypatch.setenv("CUDA_ON_CPU_SKIPPED_BARRIER", str(barrier))
        try:
            emulate(case, tensors)
        except RuntimeError as error:
            assert "a race" in str(error)
            seen += 1
    assert seen >= 5, seen


def test_a_wait_that_is_missing_is_seen(monkeypatch):
    case = CASES["temporal"]
    monkeypatch.setenv("CUDA_ON_CPU_SKIPPED_WAIT", "0")
    with pytest.raises(RuntimeError, match="a wait is missing"):
        emulate(case, case.tensors())


def test_accesses_out_of_bounds_are_seen(monkeypatch):
    case = CASES["temporal"]
    monkeypatch.setenv("CUDA_ON_CPU_SHIFTED_BYTES", "16")
    with pytest.raises(RuntimeError, match="a copy from outside a tensor"):
        emulate(case, case.tensors())
    monkeypatch.setenv("CUDA_ON_CPU_SHIFTED_BYTES", "0")
    monkeypatch.setenv("CUDA_ON_CPU_MISSING_BYTES", "4096")
    with pytest.raises(RuntimeError, match="outside shared memory"):
        emulate(case, case.tensors())
