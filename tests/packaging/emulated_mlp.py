"""csrc/cuda/gelu_mlp.cu by values, gradients and bits, before a stand-in for cuBLASLt (cublaslt_on_cpu.cpp)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import emulated
import pytest
import torch
from torch import Tensor

from minisora_kernels.ops import gelu_mlp
from minisora_kernels.testing import assert_as_accurate

ops = emulated.load("gelu_mlp_fwd", "gelu_mlp_bwd")

BF16, F16 = torch.bfloat16, torch.float16
NAMES = ("x", "w1", "b1", "w2", "b2")
# Shape of x, hidden, D_out: several samples, odd numbers of tokens, one token, and a square, whose transposition fits.
SHAPES = {
    "tokens": ((2, 17, 24), 40, 16),
    "one sample": ((31, 8), 8, 24),
    "vector": ((16,), 32, 8),
    "square": ((3, 5, 16), 16, 16),
}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(gelu_mlp, "kernels", lambda backend: ops)


def tensors(shape: str, dtype: torch.dtype, biases: tuple[str, ...] = ("b1", "b2")) -> dict[str, Tensor | None]:
    size, hidden, out = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found = {"x": random(*size), "w1": random(hidden, size[-1]) / 4, "b1": random(hidden)}
    found |= {"w2": random(out, hidden) / 8, "b2": random(out), "dy": random(*size[:-1], out)}
    return {name: None if name in ("b1", "b2") and name not in biases else each for name, each in found.items()}


def emulate(given: dict[str, Tensor | None], needs: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The output, and the gradients of what ``needs`` names."""
    leaves = {
        name: None if given[name] is None else given[name].detach().requires_grad_(name in needs) for name in NAMES
    }
    y = gelu_mlp._GeluMLP.apply(*leaves.values(), False, "cuda")
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), given["dy"]) if wanted else ()
    return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))


def forward(given: dict[str, Tensor | None], keep: bool) -> tuple[Tensor, Tensor]:
    return ops.gelu_mlp_fwd(*(given[name] for name in NAMES), False, keep)


def reference(given: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: each.detach().to(dtype).requires_grad_() for name, each in given.items() if each is not None}
    y = gelu_mlp.reference(*(leaves.get(name) for name in NAMES))
    y.backward(leaves.pop("dy").detach())
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def judge(given: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    kernel, plain, exact = emulate(given), reference(given, dtype), reference(given, torch.float64)
    assert kernel.keys() == plain.keys()
    for name, value in kernel.items():
        assert_as_accurate(name, value, plain[name], exact[name])


@pytest.mark.parametrize("biases", [("b1", "b2"), ("b1",), ("b2",), ()], ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: str, dtype: torch.dtype, biases: tuple[str, ...], nan_filled):
    judge(tensors(shape, dtype, biases), dtype)


def test_only_what_is_asked_for(nan_filled):
    given = tensors("tokens", BF16)
    whole = emulate(given)
    for count in range(2 ** len(NAMES)):
        needs = tuple(name for i, name in enumerate(NAMES) if count >> i & 1)
        found = emulate(given, needs)
        assert found.keys() == {"y", *needs}
        for name, value in found.items():
            assert torch.equal(value, whole[name]), (name, needs)


def raw_backwards() -> Iterator[tuple[bool, ...]]:
    """w1, w2, need_a, need_dh, need_b1."""
    for has_w1, has_w2, *needs in product((False, True), repeat=5):
        if has_w2 or not (has_w1 or needs[1] or needs[2]):
            yield has_w1, has_w2, *needs


@pytest.mark.parametrize("flags", raw_backwards(), ids=str)
def test_the_raw_backward_gives_what_its_schema_says(flags: tuple[bool, ...], nan_filled):
    has_w1, has_w2, *needs = flags
    given = tensors("tokens", F16)
    _, h = forward(given, True)
    dy, w1, w2 = given["dy"].flatten(0, 1), given["w1"] if has_w1 else None, given["w2"] if has_w2 else None
    found = ops.gelu_mlp_bwd(dy, h, w1, w2, False, *needs)
    with torch.device("meta"):
        like = [None if each is None else torch.empty_like(each) for each in (dy, h, w1, w2)]
        expected = torch.ops.minisora.gelu_mlp_bwd(*like, False, *needs)
    for value, fake in zip(found, expected, strict=True):
        assert value.shape == fake.shape and value.dtype == fake.dtype and value.isfinite().all()
    assert not needs[0] or torch.equal(found[1], torch.nn.functional.gelu(h, approximate="tanh"))
    assert len({value.data_ptr() for value in found if value.numel()}) == sum(value.numel() > 0 for value in found)


@pytest.mark.parametrize("refuses", ("0", "1"))
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("biases", [("b1", "b2"), ()], ids=["biases", "none"])
def test_the_bits_are_the_same_whether_h_is_kept(biases, dtype: torch.dtype, refuses: str, monkeypatch, nan_filled):
    """Also where the algorithm needs to write h."""
    monkeypatch.setenv("CUBLASLT_ON_CPU_REFUSES", refuses)
    given = tensors("tokens", dtype, biases)
    y, h = forward(given, True)
    alone, none = forward(given, False)
    assert torch.equal(y, alone) and none.shape == (0, 0)
    plain = [given[name] for name in NAMES[:3]]
    exact = [None if each is None else each.double() for each in plain]
    assert_as_accurate("h", h, *(torch.nn.functional.linear(*each).flatten(0, 1) for each in (plain, exact)))
    assert torch.equal(y, emulate(given)["y"]) and torch.equal(y, emulate(given, ())["y"])


def test_strided_unaligned_and_empty_tensors(nan_filled):
    given = tensors("tokens", BF16)
    whole = emulate(given)
    for name, each in given.items():
        assert each is not None
        unaligned = torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape)
        strided = torch.stack([each, each], -1)[..., 0]
        swapped = each.transpose(0, -1).contiguous().transpose(0, -1)
        for other in (unaligned, strided, swapped):
            for result, value in emulate(given | {name: other}).items():
                assert torch.equal(value, whole[result]), (name, result)
    nothing = emulate(given | {name: given[name][:0] for name in ("x", "dy")})
    assert nothing["y"].shape == (0, 17, 16) and not any(nothing[name].any() for name in ("w1", "b1", "w2", "b2"))


@pytest.mark.parametrize(("name", "dim"), [("w1", 1), ("b1", 0), ("w2", 1), ("b2", 0)])
def test_what_does_not_fit_is_refused(name: str, dim: int):
    given = tensors("tokens", BF16)
    with pytest.raises(RuntimeError, match=f"{name} must have size"):
        forward(given | {name: torch.cat([given[name]] * 2, dim)}, False)
    with pytest.raises(RuntimeError, match=f"{name} must have the dtype of the first tensor"):
        forward(given | {name: given[name].half()}, False)


def test_what_cublaslt_does_not_have_is_refused():
    given = tensors("tokens", BF16)
    arguments = [given[name] for name in NAMES]
    with pytest.raises(RuntimeError, match="which stands for the tanh form"):
        ops.gelu_mlp_fwd(*arguments, True, False)
    with pytest.raises(RuntimeError, match="multiples of 8, got 12"):
        forward(given | {"x": given["x"][..., :12], "w1": given["w1"][:, :12]}, False)
    with pytest.raises(RuntimeError, match="bfloat16 and float16"):
        ops.gelu_mlp_fwd(*(each.float() for each in arguments), False, False)
    with pytest.raises(RuntimeError, match="dx, dh and db1 need w2"):
        ops.gelu_mlp_bwd(given["dy"].flatten(0, 1), forward(given, True)[1], None, None, False, True, True, False)


# ---- faults that must be seen


def barely_aligned(tensor: Tensor) -> Tensor:
    """The same numbers 16 bytes after a multiple of 256, which is what cuBLASLt takes an address for by default."""
    buffer = tensor.new_empty(tensor.numel() + 256)
    start = -buffer.data_ptr() // buffer.itemsize % 128 + 8
    return buffer[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("fault", "value", "seen"),
    [
        ("FORGETS", "3", "sizes of A, B and D do not agree"),  # the transposition
        ("FORGETS", "8", "a bias and no address"),
        ("FORGETS", "11", "an aux matrix and no address"),
        ("FORGETS", "12", "leading dimension of the aux matrix is too small"),
        ("FORGETS", "101", "has no algorithm|failed with status 15"),  # the workspace
        *[("FORGETS", str(105 + i), f"{'ABCD'[i]} is less aligned") for i in (0, 1, 3)],
        ("STEP", "8", "reaches outside a tensor"),
        ("STEP", "-8", "a leading dimension is less than the rows"),
        ("STEP", "4", "no multiple of 16 bytes"),
        ("WORKSPACE", "1", "the workspace is too small"),
    ],
)
def test_a_fault_in_a_call_of_cublaslt_is_seen(fault: str, value: str, seen: str, monkeypatch):
    monkeypatch.setenv(f"CUBLASLT_ON_CPU_{fault}", value)
    with pytest.raises(RuntimeError, match=seen):
        emulate({name: barely_aligned(each) for name, each in tensors("tokens", BF16).items()})


@pytest.mark.parametrize("attribute", ("3", "7"))
def test_a_transposition_or_an_epilogue_that_is_missing_gives_other_values(attribute: str, monkeypatch):
    monkeypatch.setenv("CUBLASLT_ON_CPU_FORGETS", attribute)
    with pytest.raises(AssertionError, match=r"error|not finite"):
        judge(tensors("square", BF16), BF16)


def test_sums_that_are_split_over_blocks_change_the_bits(monkeypatch):
    given = tensors("tokens", BF16)
    first = emulate(given)
    assert all(torch.equal(value, first[name]) for name, value in emulate(given).items())
    monkeypatch.setenv("CUBLASLT_ON_CPU_FORGETS", "103")
    first = emulate(given)
    assert not all(torch.equal(value, first[name]) for name, value in emulate(given).items())
