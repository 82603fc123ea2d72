"""norm_rope: the reference against the equation written out, and what is special to its kernels."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from torch import Tensor

from minisora_kernels import Rope, backends, norm_rope, rope_3d
from minisora_kernels.testing import assert_as_accurate

kernels = pytest.mark.parametrize(
    "backend",
    KERNEL_BACKENDS
    or [
        pytest.param("cpu", marks=pytest.mark.skip(reason="no kernel backend is available here: see the report header"))
    ],
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE, dtype)


def gradients(out: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    grads = torch.autograd.grad(out, list(tensors.values()), random(*out.shape, seed=1).to(out))
    return {"output": out.detach()} | dict(zip(tensors, grads, strict=True))


# ---- the equation, channel by channel


def literal(x, norm, across, weight, bias, angle, interleaved, eps=1e-6):
    """Loops over samples, tokens and heads; ``angle [B, N, heads, head_dim / 2]`` or None."""
    batch, tokens, heads, head_dim = x.shape
    out = []
    for b, n, head in product(range(batch), range(tokens), range(heads)):
        over = x[b, n] if across else x[b, n, head]
        z = x[b, n, head]
        if norm == "layer":
            z = (z - over.mean()) / (over.var(correction=0) + eps).sqrt()
        elif norm == "rms":
            z = z / (over.square().mean() + eps).sqrt()
        if weight is not None:
            z = z * (weight if weight.dim() == 1 else weight[head])
        if bias is not None:
            z = z + (bias if bias.dim() == 1 else bias[head])
        if angle is not None:
            turned: list[Tensor] = [z[0]] * head_dim
            for pair in range(head_dim // 2):
                i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + head_dim // 2)
                c, s = angle[b, n, head, pair].cos(), angle[b, n, head, pair].sin()
                turned[i], turned[j] = z[i] * c - z[j] * s, z[i] * s + z[j] * c
            z = torch.stack(turned)
        out.append(z)
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize(
    ("norm", "across", "weights", "biases", "angles", "interleaved"),
    [
        ("rms", True, 2, 0, (3,), True),
        ("layer", True, 1, 2, (2, 3, 2), False),
        ("layer", False, 2, 1, (3, 2), True),
        ("rms", False, 1, 0, (1, 3, 1), False),
        ("rms", False, 0, 0, None, True),
        (None, True, 0, 0, (2, 3, 1), False),
    ],
)
def test_the_reference_is_the_equation(norm, across, weights, biases, angles, interleaved):
    sides = (2, 6)
    tensors = {"x": random(2, 3, *sides)}
    tensors |= {
        name: random(*sides[dims == 1 :], seed=seed) + 1
        for name, dims, seed in (("weight", weights, 2), ("bias", biases, 3))
        if dims
    }
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    rope = angle = None
    if angles is not None:
        turns = random(*angles, 3, seed=4)
        rope = Rope(turns.cos(), turns.sin(), interleaved)
        angle = (turns[None, :, None] if len(angles) == 1 else turns[None] if len(angles) == 2 else turns).expand(
            2, 3, 2, 3
        )
    options = {name: tensors.get(name) for name in ("weight", "bias")}
    exact = literal(tensors["x"], norm, across, options["weight"], options["bias"], angle, interleaved)
    ours = norm_rope(tensors["x"], norm=norm, across_heads=across, rope=rope, backend="reference", **options)
    expected, got = gradients(exact, tensors), gradients(ours, tensors)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# ---- kernels


@kernels
@pytest.mark.parametrize("across", (False, True))
def test_x_is_read_where_it_lies(across, backend):
    """Parts of one projection, and heads before tokens: the bits of a dense x, without a copy."""
    weight = random(3, 8, seed=2, dtype=torch.float32)
    packed = random(2, 5, 3, 3, 8, dtype=torch.float32)
    turned = random(2, 3, 5, 8, dtype=torch.float32)
    wide = random(2, 5, 3, 24, dtype=torch.float32)
    for x in (
        packed[:, :, 1],
        turned.transpose(1, 2),
        wide[..., 8:16],
        packed[:, 1:4, 2],
        packed[:1, :, 0].expand(2, -1, -1, -1),
    ):
        results = []
        for leaf in (x.detach(), x.contiguous()):
            leaf.requires_grad_()
            seen = Seen()
            with seen:
                out = norm_rope(leaf, norm="layer", weight=weight, across_heads=across, backend=backend)
                results.append(gradients(out, {"x": leaf}))
            assert len(seen.calls) == 2
            for func, args, _ in seen.calls:
                assert args["bwd" in func._schema.name].data_ptr() == leaf.data_ptr()
        for name, value in results[1].items():
            assert torch.equal(results[0][name], value) and results[0][name].shape == x.shape, (name, x.stride())


@kernels
def test_channels_that_are_apart_are_copied(backend):
    x = random(2, 5, 8, 3, dtype=torch.float32).transpose(2, 3)
    rope = rope_3d((1, 1, 5), 8)
    assert torch.equal(norm_rope(x, rope=rope, backend=backend), norm_rope(x.contiguous(), rope=rope, backend=backend))


@kernels
@pytest.mark.parametrize("interleaved", (False, True))
def test_tables_of_every_shape(interleaved, backend):
    """A table that heads or samples share is one that repeats their rows."""
    x = random(2, 5, 3, 8, dtype=torch.float32)
    for shape in ((5,), (5, 3), (5, 1), (1, 5, 1), (1, 5, 3), (2, 5, 1), (2, 5, 3)):
        turns = random(*shape, 4, seed=3, dtype=torch.float32)
        full = turns[None, :, None] if turns.dim() == 2 else turns[None] if turns.dim() == 3 else turns
        whole = full.expand(2, 5, 3, 4).contiguous()
        one, other = (
            norm_rope(x, rope=Rope(angle.cos(), angle.sin(), interleaved), backend=backend) for angle in (turns, whole)
        )
        assert torch.equal(one, other), shape


@kernels
def test_parameters_and_tables_of_other_dtypes(backend):
    """fp32 weight and bf16 bias beside fp16 tokens; gradients come in the dtype of what they belong to."""
    rope = rope_3d((1, 1, 9), 16)
    rope = rope._replace(cos=rope.cos.double(), sin=rope.sin.bfloat16())
    weight = (random(3, 16, seed=1) + 1).float().requires_grad_()
    bias = random(16, seed=2).bfloat16().requires_grad_()
    x = random(2, 9, 3, 16).half().requires_grad_()
    tensors = {"x": x, "weight": weight, "bias": bias}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}

    def run(tensors, backend):
        return gradients(norm_rope(**tensors, norm="layer", across_heads=True, rope=rope, backend=backend), tensors)

    kernel, reference, truth = run(tensors, backend), run(tensors, "reference"), run(exact, "reference")
    for name, value in kernel.items():
        assert value.dtype == tensors[name].dtype if name != "output" else torch.float16
        assert_as_accurate(name, value, reference[name], truth[name])


@kernels
def test_rows_of_zeros_without_eps(backend):
    """A norm of nothing is NaN in its own token alone, as in plain PyTorch."""
    x = random(1, 3, 2, 8, dtype=torch.float32)
    x[0, 1] = 0
    leaf, weight = x.requires_grad_(), torch.ones(8, device=DEVICE, requires_grad=True)
    out = norm_rope(leaf, norm="rms", weight=weight, eps=0.0, backend=backend)
    out[:, [0, 2]].sum().backward()
    assert out[0, [0, 2]].isfinite().all() and out[0, 1].isnan().all()
    assert leaf.grad is not None and leaf.grad[0, [0, 2]].isfinite().all()


@kernels
@pytest.mark.parametrize("across", (False, True))
def test_a_nan_stays_in_what_the_norm_is_over(across, backend):
    x = random(2, 5, 3, 8, dtype=torch.float32)
    x[1, 2, 1, 6] = float("nan")
    leaf = x.requires_grad_()
    out = norm_rope(leaf, norm="layer", across_heads=across, rope=rope_3d((1, 1, 5), 8), backend=backend)
    out.sum().backward()
    for value in (out, leaf.grad):
        found = value.isnan().all(-1).nonzero().tolist()
        assert found == ([[1, 2, head] for head in range(3)] if across else [[1, 2, 1]])
        assert value.isnan().any(-1).sum() == len(found)


@kernels
def test_autocast(backend):
    x, rope = random(2, 5, 3, 8, dtype=torch.float32), rope_3d((1, 1, 5), 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = norm_rope(x, norm="rms", rope=rope, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, norm_rope(x.bfloat16(), norm="rms", rope=rope, backend=backend))


@kernels
def test_an_odd_head_goes_to_the_reference(backend):
    x = random(2, 5, 3, 7, dtype=torch.float32)
    seen = Seen()
    with seen:
        norm_rope(x, norm="rms")
    assert not seen.calls
    with pytest.raises(ValueError, match="head_dim is 7; the kernels take even ones"):
        norm_rope(x, norm="rms", backend=backend)


@pytest.mark.parametrize(
    ("heads", "head_dim", "fits"), [(64, 128, True), (40, 128, True), (65, 72, False), (1, 8194, False)]
)
def test_tokens_too_wide_for_a_program_are_refused_by_their_shape(heads, head_dim, fits):
    table = importlib.import_module("minisora_kernels.ops.norm_rope").BACKENDS
    x = torch.empty(1, 1, heads, head_dim, device="meta")
    reason = table["triton"](x, None, None)
    assert (reason is None) == fits and (fits or f"is {heads} x {head_dim}; Triton's kernels take up to 8192" in reason)
    assert table["cpu"](x, None, None) is None


# ---- errors


def test_the_raw_ops_check_what_they_get():
    if "cpu" not in KERNEL_BACKENDS:
        pytest.skip("the cpu kernels are not under test")
    forward, backward = torch.ops.minisora.norm_rope_fwd, torch.ops.minisora.norm_rope_bwd
    x, table = torch.randn(2, 5, 3, 8), torch.ones(1, 5, 1, 4)
    rest = (True, 1e-6)

    def call(x=x, weight=None, bias=None, norm=1, across=True, cos=None, sin=None):
        return forward(x, weight, bias, norm, across, cos, sin, *rest)

    call()
    for message, options in {
        "x must be float32": {"x": x.double()},
        "x must be .B, N, heads, head_dim.": {"x": x[0]},
        "even width": {"x": x[..., :7]},
        "stride 1 over head_dim": {"x": x.transpose(2, 3)[..., :2]},
        "norm must be 0, 1 or 2, got 3": {"norm": 3},
        "weight needs a norm": {"norm": 0, "weight": torch.ones(8)},
        "weight must have size 8": {"weight": torch.ones(7)},
        "weight must have size 3": {"weight": torch.ones(2, 8)},
        "weight must be float32": {"weight": torch.ones(8, dtype=torch.int64)},
        "bias must be contiguous": {"bias": torch.ones(8, 3).t()},
        "given together": {"cos": table},
        "cos must be float32": {"cos": table.bfloat16(), "sin": table},
        "sin must have size 5": {"cos": table, "sin": table[:, :4]},
        "1 or B samples, got 3": {"cos": table.expand(3, -1, -1, -1), "sin": table},
        "1 or all heads, got 2": {"cos": table.expand(-1, -1, 2, -1), "sin": table},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**options)
    for message, dy, needs in (
        ("dtype of x", x.bfloat16(), (True, False, False)),
        ("dy must have size 3", x[:, :, :2].contiguous(), (True, False, False)),
        ("not given", x, (True, True, False)),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(dy, x, None, None, 1, True, None, None, *rest, *needs)


X, TABLE = torch.zeros(2, 5, 3, 8), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ("x", {}, TypeError, "x must be a tensor, got str"),
        (X.int(), {}, TypeError, "x has dtype torch.int32"),
        (X[0], {}, ValueError, r"x must be \[B, N, heads, head_dim\]"),
        (X[:, :, :0], {}, ValueError, r"x must be \[B, N, heads, head_dim\]"),
        (X, {"norm": "l2"}, ValueError, "norm is 'l2'; it may be None, 'rms' or 'layer'"),
        (X, {"weight": torch.ones(8)}, ValueError, "weight needs norm, which is None"),
        (X, {"norm": "rms", "bias": torch.ones(8)}, ValueError, "bias must be None with norm='rms'"),
        (X, {"norm": "rms", "weight": torch.ones(24)}, ValueError, r"weight has shape \(24,\); it may be \[head_dim\]"),
        (X, {"norm": "layer", "bias": torch.ones(8).int()}, TypeError, "bias has dtype torch.int32"),
        (X, {"norm": "rms", "weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta, x is on cpu"),
        (X, {"across_heads": 1}, TypeError, "across_heads is 1; it must be True or False"),
        (X, {"rope": (TABLE, TABLE)}, TypeError, "rope must be a Rope"),
        (
            X,
            {"rope": Rope(TABLE[:4], TABLE)},
            ValueError,
            r"rope.cos has shape \(4, 4\); it may be \[N, head_dim / 2\]",
        ),
        (X, {"rope": Rope(TABLE, torch.zeros(1, 5, 2, 4))}, ValueError, r"rope.sin has shape \(1, 5, 2, 4\)"),
        (X, {"rope": Rope(TABLE, torch.zeros(2, 5, 1, 4))}, ValueError, "it must be that of rope.cos"),
        (X, {"rope": Rope(torch.zeros(5, 8), TABLE)}, ValueError, "Rope.from_pairs takes such tables"),
        (X, {"rope": Rope(TABLE.clone().requires_grad_(), TABLE)}, ValueError, "rope.cos requires a gradient"),
        (X[..., :7], {"rope": Rope(TABLE, TABLE)}, ValueError, "rope needs an even head_dim, got 7"),
        (X, {"backend": "mps"}, ValueError, "backend is 'mps'"),
    ],
)
def test_errors_name_the_argument(x, options, error, message):
    with pytest.raises(error, match=f"{message}"):
        norm_rope(x, **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_result_is_never_the_argument(backend: str):
    if backends.unavailable(backend) is not None:
        pytest.skip("no CPU kernels")
    x = torch.ones(1, 2, 2, 8)
    for _ in range(2):
        with torch.no_grad():
            norm_rope(x, backend=backend).add_(1)
    assert x.eq(1).all()
