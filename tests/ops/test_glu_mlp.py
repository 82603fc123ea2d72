"""glu_mlp: the equation written out, the gated activation's kernel, what is kept, and one test per error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import KERNEL_BACKENDS
from test_gelu_mlp import allocated
from torch._dynamo.testing import AotEagerAndRecordGraphs

from minisora_kernels import backends, glu_mlp
from minisora_kernels.counters import scratch_bytes
from minisora_kernels.ops.glu_mlp import ACTIVATIONS
from minisora_kernels.testing import assert_as_accurate

UNAVAILABLE = backends.unavailable("cpu")
KERNELS = [pytest.param("cpu", marks=pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACT = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_backend = pytest.mark.parametrize("backend", KERNELS)


def parameters(shape=(2, 5, 12), hidden=16, out=12, *, apart=False):
    """The tensors by name, as leaves that need a gradient."""
    torch.manual_seed(0)
    rows = hidden if apart else 2 * hidden
    shapes = {"x": shape, "w1": (rows, shape[-1]), "b1": (rows,), "w2": (out, hidden), "b2": (out,)}
    if apart:
        shapes |= {"w3": (hidden, shape[-1]), "b3": (hidden,)}
    return {name: torch.randn(size).requires_grad_() for name, size in shapes.items()}


def run(given, **options):
    """y and the gradients of all tensors, for a fixed dy."""
    leaves = {
        name: None if each is None else each.detach().requires_grad_(each.requires_grad) for name, each in given.items()
    }
    y = glu_mlp(**leaves, **options)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return {"y": y.detach()} | {name: each.grad for name, each in leaves.items() if each is not None}


@each_activation
@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "reference"])
@pytest.mark.parametrize("gate_first", [True, False])
def test_equation(gate_first, backend, activation):
    t = parameters()
    first, second = (t["x"] @ t["w1"].t() + t["b1"]).split(16, dim=-1)
    gate, value = (first, second) if gate_first else (second, first)
    expected = ACT[activation](gate) * value @ t["w2"].t() + t["b2"]
    y = glu_mlp(**t, activation=activation, gate_first=gate_first, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    swapped = glu_mlp(**t, activation=activation, gate_first=not gate_first, backend=backend)
    assert not torch.allclose(swapped, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_weights_of_their_own_give_what_one_weight_gives(gate_first, backend):
    t = parameters()
    halves = {"w1": t["w1"][:16], "b1": t["b1"][:16], "w3": t["w1"][16:], "b3": t["b1"][16:]}
    whole, apart = (run(each, gate_first=gate_first, backend=backend) for each in (t, t | halves))
    for name in ("y", "x", "w2", "b2"):
        torch.testing.assert_close(apart[name], whole[name], rtol=1e-4, atol=1e-4)
    for first, second in (("w1", "w3"), ("b1", "b3")):
        torch.testing.assert_close(torch.cat([apart[first], apart[second]]), whole[first], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("missing", ["b1", "b3"])
def test_one_half_may_have_no_bias(missing, backend):
    t = parameters(apart=True)
    zero = run(t | {missing: torch.zeros(16)}, backend=backend)
    found = run(t | {missing: None}, backend=backend)
    for name, value in found.items():
        torch.testing.assert_close(value, zero[name], rtol=1e-4, atol=1e-4)


def activated(g, u, activation="silu", gate_first=True):
    """act(g) * u of every number, by the forward op between products with 1."""
    one = torch.ones(1, 1, dtype=g.dtype)
    x = torch.stack([g.flatten(), u.flatten()] if gate_first else [u.flatten(), g.flatten()], -1)
    raw = torch.ops.minisora.glu_mlp_fwd
    y, h = raw(x, torch.eye(2, dtype=g.dtype), None, None, None, one, None, number(activation), gate_first, True)
    torch.testing.assert_close(h, x, rtol=0, atol=0, equal_nan=True)
    return y.view_as(g)


def number(activation):
    return ACTIVATIONS.index(activation)


def slopes(g, u, da, activation="silu", gate_first=True):
    """``a``, ``dg`` and ``du`` of the backward op, for finite ``da`` ``[1, hidden]``, and ``db1``."""
    h = torch.cat([g, u] if gate_first else [u, g], -1)
    w1, one = torch.zeros(h.shape[1], 1, dtype=g.dtype), torch.ones(1, 1, dtype=g.dtype)
    raw = torch.ops.minisora.glu_mlp_bwd
    _, a, dh, db1 = raw(one, h, w1, None, da, number(activation), gate_first, *(True,) * 3)
    first, second = dh.chunk(2, dim=-1)
    return a, *((first, second) if gate_first else (second, first)), db1


@each_activation
@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("size", [1, 7, 33, 5000])
def test_activation_and_its_slope(size, gate_first, dtype, backend, activation):
    torch.manual_seed(0)
    g, u, da = ((3 * torch.randn(1, size)).to(dtype) for _ in range(3))
    options = activation, gate_first
    a, dg, du, db1 = slopes(g, u, da, *options)
    assert torch.equal(a, activated(g, u, *options))
    assert torch.equal(db1, torch.cat([dg, du] if gate_first else [du, dg], -1)[0])

    def plain(dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (g, u)]
        result = ACT[activation](leaves[0]) * leaves[1]
        return result.detach(), *torch.autograd.grad(result, leaves, da.to(dtype))

    for name, ours, theirs, exact in zip(
        ("a", "dg", "du"), (a, dg, du), plain(dtype), plain(torch.float64), strict=True
    ):
        assert_as_accurate(name, ours, theirs, exact)


@each_backend
def test_silu_keeps_its_digits_where_it_is_small(backend):
    g = torch.linspace(-80, -0.01, 4097)[None]
    one = torch.ones_like(g)
    a, dg, _, _ = slopes(g, one, one)
    exact = g.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(exact).sum(), exact)
    torch.testing.assert_close(a.double(), F.silu(exact).detach(), rtol=2e-5, atol=0)
    torch.testing.assert_close(dg.double(), slope, rtol=1e-4, atol=1e-7)


@each_activation
@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_behave_as_in_torch(dtype, backend, activation):
    values = [1e4, -1e4, 20, -20, 6e4, -6e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0]
    values += [torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).smallest_normal / 4]
    g = torch.tensor([values * 3], dtype=dtype)
    one = torch.ones_like(g)
    a, dg, _, _ = slopes(g, one, one, activation)
    leaf = g.clone().requires_grad_()
    expected = torch.stack([ACT[activation](each) for each in leaf[0]])[None]  # torch's vectors make nan of gelu(inf)
    (slope,) = torch.autograd.grad(expected, leaf, one)
    close = {"rtol": 1e-6, "atol": 1e-37, "equal_nan": True}
    torch.testing.assert_close(a, expected.detach(), **close)
    torch.testing.assert_close(dg, slope, **close)


@each_backend
@pytest.mark.parametrize("apart", [True, False])
def test_compiled_without_gradients_keeps_no_activation(apart, backend):
    recorded = AotEagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(glu_mlp, backend=recorded, fullgraph=True)(**parameters(apart=apart), backend=backend)
    (call,) = recorded.fw_graphs[0].graph.find_nodes(op="call_function", target=torch.ops.minisora.glu_mlp_fwd.default)
    assert call.args[-1] is False  # keep


def saved_bytes(backend, tokens, width, hidden):
    given = parameters((tokens, width), hidden, width)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        glu_mlp(**given, backend=backend)
    return sum(storages.values()) - given["w1"].nbytes - given["w2"].nbytes


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_keeps_the_input_and_the_pre_activations_only(backend):
    tokens, width, hidden = 16, 16, 256
    assert saved_bytes("reference", tokens, width, hidden) == 4 * tokens * (width + 4 * hidden)
    assert saved_bytes(backend, tokens, width, hidden) == 4 * tokens * (width + 2 * hidden)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("needed", ["x", "w1", "b1", "w3", "b3", "w2", "b2"])
def test_gradient_of_one_argument_alone(needed, backend):
    given = parameters(apart=True)
    everything = run(given, backend=backend)
    for name, each in given.items():
        each.requires_grad_(name == needed)
    alone = run(given, backend=backend)
    assert torch.equal(alone[needed], everything[needed])
    assert all(alone[name] is None for name in given if name != needed)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("apart", [True, False])
def test_no_tokens_and_no_hidden_units(apart, backend):
    found = run(parameters((2, 0, 12), apart=apart), backend=backend)
    assert found["y"].shape == found["x"].shape == (2, 0, 12)
    for name in found.keys() - {"y", "x"}:
        assert torch.equal(found[name], torch.zeros_like(found[name])), name
    given = parameters(hidden=0, apart=apart)
    found = run(given, backend=backend)
    assert torch.equal(found["y"], given["b2"].expand_as(found["y"]))
    assert torch.equal(found["x"], torch.zeros_like(found["x"])) and found["w1"].shape == (0, 12)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (257, 96), (1030, 33), (40, 1537)])
def test_kernel_has_the_same_bits_for_any_number_of_threads(tokens, hidden, dtype, backend, threads):
    h, da = (3 * torch.randn(tokens, 2 * hidden)).to(dtype), torch.randn(tokens, hidden).to(dtype)
    eye, w1 = torch.eye(tokens, dtype=dtype), torch.zeros(2 * hidden, 1, dtype=dtype)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(torch.ops.minisora.glu_mlp_bwd(eye, h, w1, None, da, 0, True, *(True,) * 3))
    for other in results[1:]:
        for name, one, value in zip(("dx", "a", "dh", "db1"), results[0], other, strict=True):
            assert torch.equal(one, value), name


@each_backend
@pytest.mark.parametrize("apart", [True, False])
def test_chunks_of_tokens_give_what_all_tokens_give(apart, backend, threads, nan_filled):
    """More tokens than a thread takes at a time."""
    torch.set_num_threads(1)
    given = parameters((1, 2100, 8), 16, 8, apart=apart)
    found, expected = run(given, backend=backend), run(given, backend="reference")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(glu_mlp(**given, backend=backend), found["y"])


@each_backend
def test_raw_ops_refuse_what_they_cannot_index(backend):
    given = {"x": torch.randn(4, 12), "w1": torch.randn(20, 12), "b1": torch.randn(20), "w3": torch.randn(20, 12)}
    given |= {"b3": torch.randn(20), "w2": torch.randn(8, 20), "b2": torch.randn(8)}
    for name, bad in (
        ("x", torch.randn(4, 24)[:, ::2]),
        ("w1", torch.randn(20, 11)),
        ("b1", torch.randn(19)),
        ("w3", torch.randn(19, 12)),
        ("w3", torch.randn(20, 12).bfloat16()),
        ("b3", torch.randn(21)),
        ("w2", torch.randn(8, 19)),
        ("b2", torch.randn(8).bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must"):
            torch.ops.minisora.glu_mlp_fwd(*(given | {name: bad}).values(), 0, True, True)
    with pytest.raises(RuntimeError, match="activation must be 0, 1 or 2, got 3"):
        torch.ops.minisora.glu_mlp_fwd(*given.values(), 3, True, True)
    given = {"dy": torch.randn(4, 8), "h": torch.randn(4, 40), "w1": torch.randn(20, 12), "w3": torch.randn(20, 12)}
    given |= {"w2": torch.randn(8, 20)}
    for name, bad in (
        ("dy", torch.randn(3, 8)),
        ("h", torch.randn(4, 41)),
        ("h", torch.randn(40, 4).t()),
        ("w1", torch.randn(19, 12)),
        ("w3", torch.randn(20, 11)),
        ("w2", torch.randn(8, 20).bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must"):
            torch.ops.minisora.glu_mlp_bwd(*(given | {name: bad}).values(), 0, True, True, True, True)
    for names, message in ((("w2",), "db1 need w2"), (("w1",), "w3 needs w1")):
        without = given | dict.fromkeys(names)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.minisora.glu_mlp_bwd(*without.values(), 0, True, True, True, False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
        ({"x": torch.zeros(2, 3)}, ValueError, r"w1 has shape \(32, 12\).*\[2 \* hidden, D\] with D = 3"),
        ({"w1": None}, TypeError, "w1 must be a tensor"),
        ({"w1": torch.zeros(31, 12)}, ValueError, r"w1 has shape \(31, 12\); it must be \[2 \* hidden, D\]"),
        ({"b1": torch.zeros(16)}, ValueError, r"b1 has shape \(16,\); it must be \[32\]"),
        ({"w2": torch.zeros(12, 15)}, ValueError, r"w2 has shape \(12, 15\).*hidden = 16"),
        ({"b2": torch.zeros(16)}, ValueError, r"b2 has shape \(16,\)"),
        ({"b3": torch.zeros(16)}, ValueError, "b3 is given without w3"),
        ({"w3": torch.zeros(32, 11)}, ValueError, r"w3 has shape \(32, 11\).*D = 12"),
        ({"w3": torch.zeros(31, 12)}, ValueError, r"w3 has shape \(31, 12\).*hidden = 32"),
        ({"w3": torch.zeros(32, 12), "b3": torch.zeros(16)}, ValueError, r"b3 has shape \(16,\); it must be \[32\]"),
        ({"activation": "swish"}, ValueError, "activation is 'swish'; it may be 'silu', 'gelu', 'gelu_tanh'"),
        ({"gate_first": 1}, TypeError, "gate_first is 1; it must be True or False"),
        ({"w2": torch.zeros(12, 16).double()}, TypeError, "w2 has dtype torch.float64, x has torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    with pytest.raises(error, match=f"glu_mlp: {message}"):
        glu_mlp(**(parameters() | change))


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_it_says_what_it_holds_while_it_runs():
    tokens, hidden = 1024, 64  # fewer tokens than a chunk
    x, w1, b1, w2, b2 = (each.detach() for each in parameters((2, tokens // 2, 8), hidden, 8).values())
    dy, h = torch.randn(tokens, 8), torch.randn(tokens, 2 * hidden)
    half, library = 4 * tokens * hidden, torch.ops.minisora
    for raw, arguments, held in (
        (library.glu_mlp_fwd, (x, w1, b1, None, None, w2, b2, 0, True, True), half),
        (library.glu_mlp_fwd, (x, w1, b1, None, None, w2, b2, 0, True, False), 3 * half),
        (library.glu_mlp_bwd, (dy, h, w1, None, w2, 0, True, True, True, False), 0),
        (library.glu_mlp_bwd, (dy, h, w1, None, w2, 0, True, False, False, False), 2 * half),
        (library.glu_mlp_bwd, (dy, h, None, None, None, 0, True, True, False, False), 0),
    ):
        assert scratch_bytes(raw.default, arguments) == held
        assert allocated(lambda raw=raw, arguments=arguments: raw(*arguments)) == pytest.approx(held, abs=1 << 14)
