"""window_attention: the reference against the equation written out, the kernels against the reference in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from conftest import DEVICE, KERNEL_BACKENDS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import minisora_kernels as mk
from minisora_kernels import Rope, backends, rope_3d, window_attention
from minisora_kernels.testing import assert_as_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
kernels = pytest.mark.parametrize(
    "backend",
    KERNEL_BACKENDS
    or [
        pytest.param("cpu", marks=pytest.mark.skip(reason="no kernel backend is available here: see the report header"))
    ],
)


# ---- the equation, token by token


def angle(grid, token: int, head_dim: int, pair: int, theta: float = 10_000.0) -> float:
    """The turn of a pair of channels: equal thirds of the channels for t, h and w, what is left over to t."""
    t, rest = divmod(token, grid[1] * grid[2])
    h, w = divmod(rest, grid[2])
    third = head_dim // 6 * 2
    shares = [head_dim - 2 * third, third, third]
    channel = 2 * pair
    for place, share in zip((t, h, w), shares, strict=True):
        if channel < share:
            return place / theta ** (channel / share)
        channel -= share
    raise AssertionError("a pair beyond head_dim")


def literal(qkv, grid, window, *, q_weight=None, k_weight=None, qk_norm=None, convention=None, bias=None, eps=1e-6):
    """Loops over samples, heads and pairs of tokens; float64."""
    batch, tokens, _, heads, head_dim = qkv.shape
    place = [(n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]) for n in range(tokens)]

    def prepare(x: Tensor, weight: Tensor | None, head: int, n: int) -> Tensor:
        if qk_norm == "layer":
            x = x - x.mean()
        if qk_norm is not None:
            x = x / (x.square().mean() + eps).sqrt()
        if weight is not None:
            x = x * (weight if weight.dim() == 1 else weight[head])
        if convention is None:
            return x
        turned: list[Tensor] = [x[0]] * head_dim
        for pair in range(head_dim // 2):
            i, j = (2 * pair, 2 * pair + 1) if convention == "interleaved" else (pair, pair + head_dim // 2)
            c, s = math.cos(angle(grid, n, head_dim, pair)), math.sin(angle(grid, n, head_dim, pair))
            turned[i], turned[j] = x[i] * c - x[j] * s, x[j] * c + x[i] * s
        return torch.stack(turned)

    rows = []
    for b, n, head in product(range(batch), range(tokens), range(heads)):
        mine = [p // w for p, w in zip(place[n], window, strict=True)]
        others = [m for m in range(tokens) if [p // w for p, w in zip(place[m], window, strict=True)] == mine]

        def local(m: int) -> int:
            t, h, w = (p % size for p, size in zip(place[m], window, strict=True))
            return (t * window[1] + h) * window[2] + w

        q = prepare(qkv[b, n, 0, head], q_weight, head, n)
        scores = [q @ prepare(qkv[b, m, 1, head], k_weight, head, m) / head_dim**0.5 for m in others]
        if bias is not None:
            scores = [score + bias[head, local(n), local(m)] for score, m in zip(scores, others, strict=True)]
        weights = torch.stack(scores).softmax(0)
        rows.append(sum(p * qkv[b, m, 2, head] for p, m in zip(weights, others, strict=True)))
    return torch.stack(rows).reshape(batch, tokens, heads * head_dim)


def leaves(dtype, batch, grid, window, heads, head_dim, weights=0, biased=False, seed=0) -> dict[str, Tensor]:
    """``weights``: 0 none, 1 ``[head_dim]``, 2 ``[heads, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    tensors = {"qkv": random(batch, math.prod(grid), 3, heads, head_dim)}
    if weights:
        shape = (head_dim,) if weights == 1 else (heads, head_dim)
        tensors |= {"q_weight": 1 + random(*shape) / 2, "k_weight": 1 + random(*shape) / 2}
    if biased:
        tensors["bias"] = random(heads, math.prod(window), math.prod(window))
    return {name: value.to(DEVICE, dtype).requires_grad_() for name, value in tensors.items()}


def gradients(out: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu").to(out)
    grads = torch.autograd.grad(out, list(tensors.values()), weight)
    return {"output": out.detach()} | dict(zip(tensors, grads, strict=True))


@pytest.mark.parametrize(
    ("grid", "window", "head_dim", "norm", "convention", "weights", "biased"),
    [
        ((3, 2, 2), (3, 1, 1), 8, None, None, 0, False),
        ((2, 2, 3), (1, 2, 3), 8, "rms", "interleaved", 1, False),
        ((2, 2, 2), (2, 2, 2), 14, "layer", "half", 2, True),
        ((3, 3, 2), (2, 2, 2), 8, "rms", "half", 0, True),
        ((1, 2, 2), (1, 1, 1), 6, "layer", "interleaved", 1, True),
    ],
)
def test_the_reference_is_the_equation(grid, window, head_dim, norm, convention, weights, biased):
    tensors = leaves(torch.float64, 2, grid, window, 2, head_dim, weights, biased)
    rope = None
    if convention:
        # The tables are fp32, so that both sides read their angles from one source in float64.
        turns = torch.tensor(
            [[angle(grid, n, head_dim, i) for i in range(head_dim // 2)] for n in range(math.prod(grid))]
        )
        rope = Rope(turns.double().cos(), turns.double().sin(), convention == "interleaved")
        tables = rope_3d(grid, head_dim, interleaved=convention == "interleaved")
        assert tables.interleaved == rope.interleaved
        for table, exact in zip(tables[:2], rope[:2], strict=True):
            torch.testing.assert_close(table.double(), exact, rtol=0, atol=1e-6)
    names = {name: value for name, value in tensors.items() if name != "qkv"}
    exact = literal(tensors["qkv"], grid, window, qk_norm=norm, convention=convention, **names)
    ours = window_attention(tensors["qkv"], grid, window, qk_norm=norm, rope=rope, backend="reference", **names)
    expected, got = gradients(exact, tensors), gradients(ours, tensors)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_rope_3d_splits_the_channels_as_asked():
    tables = rope_3d((3, 1, 2), 8, split=(4, 0, 4), theta=100.0)
    turns = torch.tensor([[t, t / 10, w, w / 10] for t in range(3) for w in range(2)], dtype=torch.float64)
    torch.testing.assert_close(tables.cos, turns.cos().float())
    torch.testing.assert_close(tables.sin, turns.sin().float())


# ---- kernels


def assert_kernel(dtype, backend, call, make) -> None:
    """``make(dtype)`` gives leaves, ``call(leaves, backend)`` the output."""
    tensors = make(dtype)
    exact = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
    kernel = gradients(call(tensors, backend), tensors)
    reference = gradients(call(tensors, "reference"), tensors)
    truth = gradients(call(exact, "reference"), exact)
    for name in kernel:
        assert_as_accurate(name, kernel[name], reference[name], truth[name])


RAGGED = (2, (3, 5, 7), (2, 3, 4))


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "grid", "window", "head_dim"),
    [
        pytest.param(2, (16, 1, 3), (16, 1, 1), 72, id="temporal"),
        pytest.param(1, (2, 5, 7), (1, 5, 7), 64, id="spatial"),
        pytest.param(3, (3, 3, 3), (3, 3, 3), 40, id="joint"),
        pytest.param(1, (5, 6, 5), (5, 3, 4), 64, id="walt-ragged"),
        pytest.param(2, (1, 2, 3), (1, 1, 1), 72, id="identity"),
        pytest.param(1, (65, 1, 2), (65, 1, 1), 8, id="block-and-one"),
        *(pytest.param(*RAGGED, head_dim, id=f"ragged-{head_dim}") for head_dim in (8, 40, 64, 72, 128)),
    ],
)
def test_windows_and_head_dims(dtype, batch, grid, window, head_dim, backend, nan_filled):
    assert_kernel(
        dtype,
        backend,
        lambda t, backend: window_attention(t["qkv"], grid, window, backend=backend),
        lambda dtype: leaves(dtype, batch, grid, window, 2, head_dim),
    )


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", (0, 1, 2))
@pytest.mark.parametrize("norm", (None, "rms", "layer"))
@pytest.mark.parametrize("convention", (None, "interleaved", "half"))
def test_norms_and_rotations(dtype, weights, norm, convention, backend, nan_filled):
    if norm is None and weights:
        weights = 0
    grid, window = (5, 3, 2), (4, 2, 2)

    def call(t, backend):
        rope = rope_3d(grid, 24, interleaved=convention == "interleaved") if convention else None
        if rope is not None:
            rope = rope._replace(cos=rope.cos.to(torch.float64), sin=rope.sin.to(torch.float64))
        names = {name: value for name, value in t.items() if name != "qkv"}
        return window_attention(t["qkv"], grid, window, qk_norm=norm, rope=rope, backend=backend, **names)

    assert_kernel(dtype, backend, call, lambda dtype: leaves(dtype, 2, grid, window, 3, 24, weights))


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "grid", "window"),
    [(3, (1, 4, 6), (1, 2, 3)), (1, (5, 6, 4), (5, 6, 4)), (2, (4, 5, 7), (3, 5, 6)), (1, (2, 1, 2), (1, 1, 1))],
    ids=("short", "long", "ragged-long", "identity"),
)
def test_bias_and_its_gradient(dtype, batch, grid, window, backend, nan_filled):
    assert_kernel(
        dtype,
        backend,
        lambda t, backend: window_attention(t["qkv"], grid, window, bias=t["bias"], backend=backend),
        lambda dtype: leaves(dtype, batch, grid, window, 2, 16, biased=True),
    )


@kernels
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_window_of_1590_tokens(dtype, backend):
    grid = (1, 30, 53)
    rope = rope_3d(grid, 40)
    assert_kernel(
        dtype,
        backend,
        lambda t, backend: window_attention(
            t["qkv"],
            grid,
            grid,
            qk_norm="rms",
            q_weight=t["q_weight"],
            k_weight=t["k_weight"],
            rope=rope,
            backend=backend,
        ),
        lambda dtype: leaves(dtype, 1, grid, grid, 1, 40, weights=1),
    )


@kernels
def test_parameters_of_other_dtypes(backend):
    """fp32 weights, bias and tables beside bf16 tokens; gradients come in the dtype of what they belong to."""
    grid, window = (2, 4, 4), (2, 2, 2)
    rope = rope_3d(grid, 16)

    def make(dtype):
        tensors = leaves(torch.float32, 2, grid, window, 2, 16, weights=2, biased=True)
        return tensors | {"qkv": tensors["qkv"].detach().to(dtype).requires_grad_()}

    def call(t, backend):
        return window_attention(**t, grid=grid, window=window, qk_norm="layer", rope=rope, backend=backend)

    assert_kernel(torch.bfloat16, backend, call, make)
    tensors = make(torch.bfloat16)
    for name, gradient in gradients(call(tensors, backend), tensors).items():
        if name != "output":
            assert gradient.dtype == tensors[name].dtype, name


@kernels
@pytest.mark.parametrize(
    ("grid", "window"), [((16, 3, 3), (16, 1, 1)), ((2, 9, 11), (2, 9, 10))], ids=("short", "long")
)
def test_same_bits_for_any_number_of_threads(grid, window, backend, threads):
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        tensors = leaves(torch.float32, 3, grid, window, 3, 24, weights=1, biased=True)
        results.append(
            gradients(window_attention(**tensors, grid=grid, window=window, qk_norm="rms", backend=backend), tensors)
        )
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@kernels
def test_a_projection_with_strides(backend):
    grid = (4, 2, 3)
    tensors = leaves(torch.float32, 2, grid, grid, 2, 16)
    dense = gradients(window_attention(tensors["qkv"], grid, (4, 1, 1), backend=backend), tensors)

    def moved(permutation):
        inverse = sorted(range(5), key=permutation.__getitem__)
        return tensors["qkv"].permute(permutation).contiguous().permute(inverse)

    for permutation in ((4, 3, 2, 1, 0), (0, 2, 3, 1, 4), (1, 0, 2, 3, 4)):
        qkv = moved(permutation)
        assert not qkv.is_contiguous()
        strided = gradients(window_attention(qkv, grid, (4, 1, 1), backend=backend), tensors)
        for name, value in dense.items():
            assert torch.equal(strided[name], value), (name, permutation)

    one = leaves(torch.float32, 1, grid, grid, 2, 16)
    wide = gradients(window_attention(one["qkv"].expand(3, -1, -1, -1, -1), grid, (4, 1, 1), backend=backend), one)
    copied = gradients(window_attention(one["qkv"].repeat(3, 1, 1, 1, 1), grid, (4, 1, 1), backend=backend), one)
    for name, value in copied.items():
        assert torch.equal(wide[name], value), name


@kernels
@pytest.mark.parametrize("length", (12, 150))
def test_scores_far_from_zero(length, backend):
    """Scores of several thousand neither overflow nor lose their gradients."""
    grid = (1, 1, length)

    def make(dtype):
        qkv = leaves(torch.float64, 1, grid, grid, 2, 8)["qkv"].detach() * 60
        return {"qkv": qkv.to(dtype).requires_grad_()}

    assert_kernel(
        torch.float32, backend, lambda t, backend: window_attention(t["qkv"], grid, grid, backend=backend), make
    )


@kernels
@pytest.mark.parametrize("length", (12, 150))
def test_a_bias_of_minus_infinity_masks(length, backend):
    """Causal attention; from the 65th row on whole blocks of keys are masked."""
    grid = (1, 1, length)
    mask = torch.full((2, length, length), -math.inf).triu(1).double()
    assert_kernel(
        torch.float32,
        backend,
        lambda t, backend: window_attention(t["qkv"], grid, grid, bias=mask.to(t["qkv"].dtype), backend=backend),
        lambda dtype: leaves(dtype, 1, grid, grid, 2, 16),
    )


@kernels
@pytest.mark.parametrize("length", (1, 6, 80))
@pytest.mark.parametrize("part", (0, 1, 2))
def test_a_nan_is_not_lost(length, part, backend):
    qkv = leaves(torch.float32, 1, (2, 1, length), (1, 1, length), 1, 8)["qkv"].detach()
    qkv[0, length - 1, part, 0, 3] = math.nan
    out = window_attention(qkv, (2, 1, length), (1, 1, length), backend=backend)
    assert out[0, length - 1].isnan().any() and not out[0, length:].isnan().any()
    leaf = qkv.clone().requires_grad_()
    window_attention(leaf, (2, 1, length), (1, 1, length), backend=backend).sum().backward()
    assert leaf.grad is not None and not leaf.grad[0, length:].isnan().any()
    if length > 1:  # the softmax of one score is 1, and its gradient nothing, whatever the score
        assert leaf.grad[0, :length].isnan().any()


@kernels
@pytest.mark.parametrize("window", (64, 65))
def test_a_nan_does_not_reach_a_later_smaller_window(window, backend, threads):
    """One thread takes both windows, in bfloat16, where sums are padded."""
    torch.set_num_threads(1)
    grid, window = (1, 1, window + 5), (1, 1, window)
    qkv = leaves(torch.bfloat16, 1, grid, window, 2, 64)["qkv"].detach()
    qkv[0, : window[2], 0] = math.nan
    leaf = qkv.requires_grad_()
    out = window_attention(leaf, grid, window, backend=backend)
    out.sum().backward()
    assert leaf.grad is not None
    for result in (out, leaf.grad):
        assert result[0, 0].isnan().any() and not result[0, window[2] :].isnan().any()


@kernels
def test_no_gradient_where_none_is_wanted(backend):
    grid = (2, 2, 2)
    tensors = leaves(torch.float32, 1, grid, grid, 2, 8, weights=1, biased=True)
    for name in ("bias", "q_weight"):
        frozen = {key: value.detach() if key == name else value for key, value in tensors.items()}
        out = window_attention(**frozen, grid=grid, window=grid, qk_norm="rms", backend=backend)
        rest = {key: value for key, value in frozen.items() if value.requires_grad}
        whole = gradients(window_attention(**tensors, grid=grid, window=grid, qk_norm="rms", backend=backend), tensors)
        for key, value in gradients(out, rest).items():
            assert torch.equal(value, whole[key]), key


@kernels
def test_autocast(backend):
    qkv = leaves(torch.float32, 1, (2, 2, 2), (2, 1, 1), 2, 8)["qkv"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(qkv, (2, 2, 2), (2, 1, 1), backend=backend)
    assert out.dtype == torch.bfloat16
    plain = window_attention(qkv.bfloat16(), (2, 2, 2), (2, 1, 1), backend=backend)
    assert torch.equal(out, plain)


@kernels
@pytest.mark.parametrize("biased", (False, True))
def test_one_graph_for_all_lengths(biased, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(qkv, weight, cos, sin, bias, grid, window):
        return window_attention(
            qkv, grid, window, q_weight=weight, qk_norm="rms", rope=Rope(cos, sin), bias=bias, backend=backend
        )

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    counts = []
    for frames, height in ((3, 2), (5, 4), (7, 6), (9, 3), (4, 7)):
        grid, window = (frames, height, 2), (frames, 1, 1)
        tensors = leaves(torch.float32, 2, grid, window, 2, 16, weights=1, biased=biased)
        cos, sin, _ = rope_3d(grid, 16)
        arguments = (tensors["q_weight"], cos, sin, tensors.get("bias"), grid, window)
        del tensors["k_weight"]
        traced = gradients(compiled(tensors["qkv"], *arguments), tensors)
        plain = gradients(attend(tensors["qkv"], *arguments), tensors)
        for name, value in plain.items():
            assert torch.equal(traced[name], value), name
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 4 and counts[1] <= 2, counts


# ---- which backend runs, and errors


class Ran(TorchDispatchMode):
    """Whether a kernel of ours ran."""

    kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kernel = self.kernel or func.namespace == "minisora"
        return func(*args, **(kwargs or {}))


@kernels
@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"), [(12, torch.float32, "head_dim is 12"), (8, torch.float64, "float64")]
)
def test_what_the_kernels_refuse_goes_to_the_reference(head_dim, dtype, reason, backend):
    qkv = leaves(dtype, 1, (2, 2, 2), (2, 1, 1), 2, head_dim)["qkv"]
    with Ran() as ran:
        window_attention(qkv, (2, 2, 2), (2, 1, 1))
    assert not ran.kernel
    with pytest.raises(ValueError, match=reason):
        window_attention(qkv, (2, 2, 2), (2, 1, 1), backend=backend)


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "reason"),
    [
        (16, 72, torch.float32, "qkv has dtype torch.float32; the CUDA kernels take bfloat16 and float16"),
        (16, 80, torch.bfloat16, "head_dim is 80; the CUDA kernels take 64, 72, 96, 128"),
        (65, 72, torch.bfloat16, "the CUDA kernels take windows of up to 64 tokens"),
    ],
)
def test_what_cuda_refuses(length, head_dim, dtype, reason, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    qkv = torch.zeros(1, length, 3, 1, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        window_attention(qkv, (length, 1, 1), (length, 1, 1), backend="cuda")
    with pytest.raises(ValueError, match="it does not run on cpu tensors"):  # what it does not refuse
        window_attention(torch.zeros(1, 64, 3, 1, 72).bfloat16(), (64, 1, 1), (64, 1, 1), backend="cuda")


@kernels
def test_the_raw_ops_check_what_they_get(backend):
    qkv = torch.randn(1, 8, 3, 2, 8)
    rest = (None, None, 0, None, None, True, None, 1.0, 1e-6)
    forward = torch.ops.minisora.window_attention_fwd
    forward(qkv, 2, 2, 2, 2, 1, 1, *rest)
    with pytest.raises(RuntimeError, match="contiguous"):
        forward(qkv.transpose(3, 4).contiguous().transpose(3, 4), 2, 2, 2, 2, 1, 1, *rest)
    with pytest.raises(RuntimeError, match="8 tokens"):
        forward(qkv, 2, 2, 3, 2, 1, 1, *rest)
    with pytest.raises(RuntimeError, match="does not fit"):
        forward(qkv, 2, 2, 2, 3, 1, 1, *rest)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        forward(torch.randn(1, 8, 3, 2, 12), 2, 2, 2, 2, 1, 1, *rest)
    with pytest.raises(RuntimeError, match="bias must have size 2"):
        forward(qkv, 2, 2, 2, 2, 1, 1, None, None, 0, None, None, True, torch.zeros(2, 4, 4), 1.0, 1e-6)
    out, softmax = forward(qkv, 2, 2, 2, 2, 1, 1, *rest)
    with pytest.raises(RuntimeError, match="dtype of qkv"):
        torch.ops.minisora.window_attention_bwd(
            out.bfloat16(), qkv, out, softmax, 2, 2, 2, 2, 1, 1, *rest, True, *(False,) * 3
        )


GRID, WINDOW = (2, 2, 2), (2, 1, 1)
QKV = torch.zeros(1, 8, 3, 2, 8)
TABLE = torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("qkv", "grid", "window", "options", "error", "message"),
    [
        ("x", GRID, WINDOW, {}, TypeError, "qkv must be a tensor, got str"),
        (QKV.int(), GRID, WINDOW, {}, TypeError, "qkv has dtype torch.int32"),
        (QKV[0], GRID, WINDOW, {}, ValueError, r"qkv must be \[B, N, 3, heads, head_dim\]"),
        (QKV[:, :, :2], GRID, WINDOW, {}, ValueError, r"qkv must be \[B, N, 3, heads, head_dim\]"),
        (QKV[:, :, :, :0], GRID, WINDOW, {}, ValueError, r"qkv must be \[B, N, 3, heads, head_dim\]"),
        (QKV, (2, 4), WINDOW, {}, ValueError, "grid is .2, 4.; it must be three positive"),
        (QKV, (2, 2, 3), WINDOW, {}, ValueError, "has 12 tokens, qkv has 8"),
        (QKV, GRID, (0, 1, 1), {}, ValueError, "window is .0, 1, 1.; it must be three positive"),
        (QKV, GRID, (2, 3, 1), {}, ValueError, "window 2 x 3 x 1 is larger than the grid 2 x 2 x 2"),
        (QKV, GRID, WINDOW, {"qk_norm": "l2"}, ValueError, "qk_norm is 'l2'; it may be None, 'rms' or 'layer'"),
        (QKV, GRID, WINDOW, {"q_weight": torch.ones(8)}, ValueError, "q_weight needs qk_norm, which is None"),
        (QKV, GRID, WINDOW, {"qk_norm": "rms", "k_weight": torch.ones(4)}, ValueError, "k_weight has shape"),
        (QKV, GRID, WINDOW, {"qk_norm": "rms", "k_weight": torch.ones(8).int()}, TypeError, "k_weight has dtype"),
        (QKV, GRID, WINDOW, {"rope": (TABLE, TABLE)}, TypeError, "rope must be a Rope"),
        (QKV, GRID, WINDOW, {"rope": Rope(TABLE, TABLE[:4])}, ValueError, "rope.sin has shape"),
        (
            QKV,
            GRID,
            WINDOW,
            {"rope": Rope(TABLE.clone().requires_grad_(), TABLE)},
            ValueError,
            "rope.cos requires a gradient",
        ),
        (QKV[..., :7], GRID, WINDOW, {"rope": Rope(TABLE, TABLE)}, ValueError, "rope needs an even head_dim, got 7"),
        (QKV, GRID, WINDOW, {"bias": torch.zeros(2, 8, 8)}, ValueError, "bias has shape"),
        (
            QKV,
            GRID,
            WINDOW,
            {"bias": torch.zeros(2, 2, 2, device="meta")},
            ValueError,
            "bias is on meta, qkv is on cpu",
        ),
        (QKV, GRID, WINDOW, {"backend": "mps"}, ValueError, "backend is 'mps'"),
    ],
)
def test_errors_name_the_argument(qkv, grid, window, options, error, message):
    with pytest.raises(error, match=message):
        window_attention(qkv, grid, window, **options)


@pytest.mark.parametrize(
    ("head_dim", "split", "message"),
    [(7, None, "head_dim is 7"), (8, (4, 2, 4), "sum 8"), (8, (3, 3, 2), "even"), (8, (4, 4), "three even numbers")],
)
def test_errors_of_rope_3d(head_dim, split, message):
    with pytest.raises(ValueError, match=message):
        mk.rope_3d((2, 2, 2), head_dim, split=split)


@pytest.mark.parametrize("interleaved", [True, False])
def test_tables_of_diffusers(interleaved: bool):
    plain = rope_3d((2, 3, 4), 16, interleaved=interleaved)
    both = [
        table.repeat_interleave(2, dim=1) if interleaved else torch.cat((table, table), dim=1)
        for table in (plain.cos, plain.sin)
    ]
    found = Rope.from_pairs(*both, interleaved=interleaved)
    assert torch.equal(found.cos, plain.cos) and torch.equal(found.sin, plain.sin)
    assert found.interleaved == interleaved
    with pytest.raises(ValueError, match=r"cos has two angles for a pair of channels; with interleaved="):
        Rope.from_pairs(*both, interleaved=not interleaved)
    with pytest.raises(
        ValueError, match=r"sin has shape \(24,\); it must be \[N, head_dim\], \[N, heads, head_dim\] or"
    ):
        Rope.from_pairs(both[0], both[1][:, 0], interleaved=interleaved)
    with pytest.raises(TypeError, match=r"Rope\.from_pairs: cos must be a tensor, got list"):
        Rope.from_pairs([], both[1])
    qkv = torch.randn(1, 24, 3, 2, 16)
    with pytest.raises(ValueError, match=r"rope\.cos has shape \(24, 16\); .*; Rope\.from_pairs takes such tables"):
        window_attention(qkv, (2, 3, 4), (2, 3, 4), rope=Rope(*both))


@pytest.mark.parametrize("before", [0, 3])
def test_text_beside_a_video_does_not_turn(before: int):
    after, grid = 3 - before, (1, 1, 15)
    video = rope_3d((1, 3, 4), 16)
    tables = video.padded(before=before, after=after)
    qkv = torch.randn(2, 15, 3, 2, 16)
    q, k, v = qkv.clone().unbind(2)
    inner = slice(before, before + 12)
    for part in (q, k):
        a, b = part[:, inner].clone().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = video.cos[:, None], video.sin[:, None]
        part[:, inner] = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    expected = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
    found = window_attention(qkv, grid, grid, rope=tables)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)
    for name in ("before", "after"):
        with pytest.raises(ValueError, match=rf"Rope\.padded: {name} is -1; it must be at least 0"):
            video.padded(**{name: -1})
