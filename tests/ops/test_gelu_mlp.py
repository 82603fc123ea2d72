"""gelu_mlp: the activation's kernel forward and backward, and what is kept between them."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import KERNEL_BACKENDS
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from minisora_kernels import backends, gelu_mlp, glu_mlp
from minisora_kernels.counters import scratch_bytes
from minisora_kernels.testing import assert_as_accurate

UNAVAILABLE = backends.unavailable("cpu")
KERNELS = [pytest.param("cpu", marks=pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "w1", "b1", "w2", "b2")


def parameters(shape, hidden, out, *, bias=True, dtype=torch.float32):
    """x, w1, b1, w2, b2 as leaves that need a gradient."""
    torch.manual_seed(0)
    d = shape[-1]
    values = [torch.randn(shape), torch.randn(hidden, d) * d**-0.5 * 2, torch.randn(hidden)]
    values += [torch.randn(out, hidden) * hidden**-0.5, torch.randn(out)]
    leaves = [value.to(dtype).requires_grad_() for value in values]
    return leaves if bias else [leaves[0], leaves[1], None, leaves[3], None]


def run(arguments, backend, dtype=None):
    """y and the gradients of all given tensors, for a fixed dy."""
    arguments = [
        None if a is None else a.detach().to(dtype or a.dtype).requires_grad_(a.requires_grad) for a in arguments
    ]
    y = gelu_mlp(*arguments, backend=backend)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    results = {"y": y.detach()}
    results |= {f"d{name}": a.grad for name, a in zip(NAMES, arguments, strict=True) if a is not None}
    return results


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "hidden", "out"), [((1, 1, 1), 1, 1), ((2, 17, 12), 33, 12), ((3, 5, 7, 8), 32, 5), ((72,), 100, 72)]
)
def test_values_and_gradients(shape, hidden, out, dtype, bias, backend):
    arguments = parameters(shape, hidden, out, bias=bias, dtype=dtype)
    kernel, reference = run(arguments, backend), run(arguments, "reference")
    exact = run(arguments, "reference", torch.float64)
    assert kernel["y"].shape == (*shape[:-1], out)
    for name in exact:
        assert_as_accurate(name, kernel[name], reference[name], exact[name])


def allocated(function) -> int:
    """The most bytes that are there at a time in a call, beside what it returns."""
    with torch.profiler.profile(profile_memory=True) as profile:
        results = function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak - sum(result.nbytes for result in results)


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_it_says_what_it_holds_while_it_runs():
    tokens, hidden = 1024, 64  # fewer tokens than a chunk
    x, w1, b1, w2, b2 = (each.detach() for each in parameters((2, tokens // 2, 8), hidden, 8))
    dy, h = torch.randn(tokens, 8), torch.randn(tokens, hidden)
    activation, library = 4 * tokens * hidden, torch.ops.minisora
    for raw, arguments, held in (
        (library.gelu_mlp_fwd, (x, w1, b1, w2, b2, False, True), activation),
        (library.gelu_mlp_fwd, (x, w1, b1, w2, b2, True, False), activation),
        (library.gelu_mlp_bwd, (dy, h, w1, w2, False, True, True, False), 0),
        (library.gelu_mlp_bwd, (dy, h, w1, w2, False, False, False, False), activation),
        (library.gelu_mlp_bwd, (dy, h, None, None, False, True, False, False), 0),
    ):
        assert scratch_bytes(raw.default, arguments) == held
        assert allocated(lambda raw=raw, arguments=arguments: raw(*arguments)) == pytest.approx(held, abs=1 << 14)
    assert scratch_bytes(torch.ops.aten.add.Tensor, (x, x)) == 0


@pytest.mark.parametrize("backend", KERNELS)
def test_compiled_without_gradients_keeps_no_activation(backend):
    arguments = parameters((2, 3, 8), 16, 8)
    recorded = AotEagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(gelu_mlp, backend=recorded, fullgraph=True)(*arguments, backend=backend)
    (call,) = recorded.fw_graphs[0].graph.find_nodes(op="call_function", target=torch.ops.minisora.gelu_mlp_fwd.default)
    assert call.args[-1] is False  # keep


def activation(h):
    """gelu of every number of ``h``, by the forward op between products with 1."""
    one = torch.ones(1, 1, dtype=h.dtype)
    y, kept = torch.ops.minisora.gelu_mlp_fwd(h.reshape(-1, 1), one, None, one, None, False, True)
    torch.testing.assert_close(kept.view_as(h), h, rtol=0, atol=0, equal_nan=True)
    return y.view_as(h)


def slope(h, da):
    """``a`` and ``dh`` of the backward op, for finite ``h`` and ``da`` ``[tokens, hidden]``, and ``db1``."""
    dy = torch.eye(h.shape[0], dtype=h.dtype)
    _, a, dh, db1 = torch.ops.minisora.gelu_mlp_bwd(
        dy, h, torch.zeros(h.shape[1], 1, dtype=h.dtype), da, False, *(True,) * 3
    )
    return a, dh, db1


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 33, 5000])
def test_activation_and_its_slope(size, dtype, backend):
    torch.manual_seed(0)
    h, da = (3 * torch.randn(1, size)).to(dtype), torch.randn(1, size).to(dtype)
    a, dh, db1 = slope(h, da)
    assert torch.equal(a, activation(h)) and torch.equal(db1, dh[0])
    exact_h = h.double().requires_grad_()
    exact = F.gelu(exact_h, approximate="tanh")
    (exact_dh,) = torch.autograd.grad(exact, exact_h, da.double())
    assert_as_accurate("a", a, F.gelu(h, approximate="tanh"), exact.detach())
    assert_as_accurate("dh", dh, torch.ops.aten.gelu_backward(da, h, approximate="tanh"), exact_dh)


@pytest.mark.parametrize("backend", KERNELS)
def test_activation_keeps_its_digits_where_it_is_small(backend):
    """tanh(u) rounds to -1 long before gelu(h) is 0; the sigmoid form does not."""
    h = torch.linspace(-9, -0.01, 4097)
    exact = h.double() / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (h.double() + 0.044715 * h.double() ** 3)))
    torch.testing.assert_close(activation(h).double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_behave_as_in_torch(dtype, backend):
    values = [1e4, -1e4, 20, -20, 6e4, -6e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0]
    values += [torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).smallest_normal / 4]
    h = torch.tensor([values * 3], dtype=dtype)
    one = torch.ones_like(h)
    a, dh, _ = slope(h, one)
    for ours in (a, activation(h)):
        torch.testing.assert_close(ours, F.gelu(h, approximate="tanh"), rtol=1e-6, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(
        dh, torch.ops.aten.gelu_backward(one, h, approximate="tanh"), rtol=1e-6, atol=1e-37, equal_nan=True
    )


def saved_bytes(backend):
    arguments = parameters((2, 8, 16), 256, 16)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gelu_mlp(*arguments, backend=backend)
    given = sum(a.numel() * 4 for a in (arguments[1], arguments[3]))
    return sum(storages.values()) - given


@pytest.mark.parametrize("backend", KERNELS)
def test_keeps_the_input_and_the_pre_activation_only(backend):
    tokens, width, hidden = 16, 16, 256
    assert saved_bytes("reference") == 4 * tokens * (width + 2 * hidden)
    assert saved_bytes(backend) == 4 * tokens * (width + hidden)


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_input_and_gradient(backend):
    x, w1, b1, w2, b2 = (a.detach() for a in parameters((5, 3, 16), 24, 8))
    for view in (x.transpose(0, 1), x[..., ::2].repeat(1, 1, 2), x[:1].expand(4, -1, -1), x.permute(2, 1, 0)[..., :3]):
        width = view.shape[-1]
        results = []
        for chosen in (backend, "reference"):
            leaf = view.detach().requires_grad_()
            weights = [w.clone().requires_grad_() for w in (w1[:, :width], b1, w2.t().contiguous().t(), b2)]
            y = gelu_mlp(leaf, *weights, backend=chosen)
            y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape[::-1]).permute(2, 1, 0))
            results.append([y, leaf.grad, *(w.grad for w in weights)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_no_tokens(backend):
    arguments = parameters((2, 0, 12), 16, 12)
    results = run(arguments, backend)
    assert results["y"].shape == (2, 0, 12)
    assert results["dx"].shape == (2, 0, 12)
    for name in ("dw1", "db1", "dw2", "db2"):
        assert torch.equal(results[name], torch.zeros_like(results[name]))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("needed", range(5))
def test_gradient_of_one_argument_alone(needed, backend):
    arguments = parameters((2, 5, 12), 16, 12)
    everything = run(arguments, backend)
    for i, argument in enumerate(arguments):
        argument.requires_grad_(i == needed)
    alone = run(arguments, backend)
    for i, name in enumerate(NAMES):
        if i == needed:
            assert torch.equal(alone[f"d{name}"], everything[f"d{name}"])
        else:
            assert alone[f"d{name}"] is None


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_works_in_its_dtype_and_returns_gradients_in_the_parameters(backend):
    arguments = parameters((2, 17, 12), 32, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = gelu_mlp(*arguments, backend=backend)
        reference = gelu_mlp(*arguments, backend="reference")
    assert y.dtype == torch.bfloat16
    ours, theirs = (torch.autograd.grad(out.float().square().sum(), arguments) for out in (y, reference))
    exact_arguments = [a.detach().double().requires_grad_() for a in arguments]
    exact_y = gelu_mlp(*exact_arguments, backend="reference")
    exact = torch.autograd.grad(exact_y.square().sum(), exact_arguments)
    assert_as_accurate("y", y.detach(), reference.detach(), exact_y.detach())
    for name, a, b, c in zip(NAMES, ours, theirs, exact, strict=True):
        assert a.dtype == torch.float32
        error, bound = ((v.double() - c).square().mean().sqrt() for v in (a, b))
        assert error <= 2 * bound, name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(257, 48, 96), (1030, 16, 32), (40, 96, 384)])
def test_same_bits_on_every_run_with_as_many_threads(tokens, width, hidden, dtype, backend, threads):
    """The matrix products are torch's: they may round differently with another number of threads."""
    arguments = parameters((1, tokens, width), hidden, width, dtype=dtype)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, again = run(arguments, backend), run(arguments, backend)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name}, {count} threads"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (257, 96), (1030, 33), (40, 1537)])
def test_kernel_has_the_same_bits_for_any_number_of_threads(tokens, hidden, dtype, backend, threads):
    h, da = (3 * torch.randn(tokens, hidden)).to(dtype), torch.randn(tokens, hidden).to(dtype)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append((activation(h), *slope(h, da)))
    for other in results[1:]:
        for name, one, value in zip(("a", "a recomputed", "dh", "db1"), results[0], other, strict=True):
            assert torch.equal(one, value), name


@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_element_is_written(backend, nan_filled):
    for size in (1, 9, 4096, 4097, 8195):
        h = torch.linspace(-4, 4, size)
        assert all(result.isfinite().all() for result in (activation(h), *slope(h[None], torch.ones(1, size))))


@pytest.mark.parametrize(
    ("width", "hidden", "out", "dtype", "approximate", "reason"),
    [
        (16, 32, 16, torch.float32, "tanh", "x has dtype torch.float32; cuBLASLt's GELU takes bfloat16 and float16"),
        (12, 32, 16, torch.bfloat16, "tanh", "D is 12; cuBLASLt's GELU takes multiples of 8"),
        (16, 33, 16, torch.float16, "tanh", "hidden is 33; cuBLASLt's GELU takes multiples of 8"),
        (16, 32, 0, torch.bfloat16, "tanh", "D_out is 0; cuBLASLt's GELU takes multiples of 8"),
        (16, 32, 16, torch.bfloat16, "none", "approximate is 'none'; cuBLASLt has one form of GELU"),
        (16, 32, 16, torch.bfloat16, "tanh", "it does not run on cpu tensors"),  # what it does not refuse
    ],
)
def test_what_cuda_refuses(width, hidden, out, dtype, approximate, reason, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    arguments = parameters((2, 3, width), hidden, out, dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(reason)):
        gelu_mlp(*arguments, approximate=approximate, backend="cuda")


@pytest.mark.parametrize("backend", KERNELS)
def test_sampling_keeps_nothing_and_gives_the_same_bits(backend):
    arguments = parameters((2, 700, 12), 16, 12)
    with torch.no_grad():
        y = gelu_mlp(*arguments, backend=backend)
    assert torch.equal(y, gelu_mlp(*arguments, backend=backend))
    x, *weights = (argument.detach() for argument in arguments)
    assert torch.ops.minisora.gelu_mlp_fwd(x.flatten(0, 1), *weights, False, False)[1].numel() == 0


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives_are_refused(backend):
    x, *weights = parameters((2, 5, 12), 16, 12)
    (dx,) = torch.autograd.grad(gelu_mlp(x, *weights, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_raw_ops_pass_opcheck(backend):
    x, w1, b1, w2, b2 = (argument.detach() for argument in parameters((3, 12), 20, 8))
    for keep in (True, False):
        torch.library.opcheck(torch.ops.minisora.gelu_mlp_fwd, (x, w1, b1, w2, b2, not keep, keep))
    tensors = torch.randn(3, 8), torch.randn(3, 20)
    for rest in ((w1, w2, False, True, True, True), (w1, w2, *(False,) * 4), (None, None, True, True, False, False)):
        torch.library.opcheck(torch.ops.minisora.gelu_mlp_bwd, (*tensors, *rest))


@pytest.mark.parametrize("backend", KERNELS)
def test_raw_ops_refuse_what_they_cannot_index(backend):
    given = {"x": torch.randn(4, 12), "w1": torch.randn(20, 12), "b1": torch.randn(20)}
    given |= {"w2": torch.randn(8, 20), "b2": torch.randn(8)}
    for name, bad in (
        ("x", torch.randn(4, 24)[:, ::2]),
        ("x", torch.tensor(1.0)),
        ("x", torch.randn(4, 12).double()),
        ("w1", torch.randn(20, 11)),
        ("w1", torch.randn(20, 12).bfloat16()),
        ("b1", torch.randn(19)),
        ("w2", torch.randn(8, 19)),
        ("b2", torch.randn(8).bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must"):
            torch.ops.minisora.gelu_mlp_fwd(*(given | {name: bad}).values(), False, True)
    given = {"dy": torch.randn(4, 8), "h": torch.randn(4, 20), "w1": torch.randn(20, 12), "w2": torch.randn(8, 20)}
    for name, bad in (
        ("dy", torch.randn(3, 8)),
        ("dy", torch.randn(4, 8).bfloat16()),
        ("dy", torch.randn(8, 4).t()),
        ("h", torch.randn(20, 4).t()),
        ("w1", torch.randn(19, 12)),
        ("w2", torch.randn(8, 20).bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must"):
            torch.ops.minisora.gelu_mlp_bwd(*(given | {name: bad}).values(), False, True, True, True)
    with pytest.raises(RuntimeError, match="db1 need w2"):
        torch.ops.minisora.gelu_mlp_bwd(given["dy"], given["h"], None, None, False, True, True, False)


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_whole_and_once_for_all_lengths(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: gelu_mlp(*a, backend=backend).square().sum(), fullgraph=True, backend=counter)
    for length in (5, 6, 9, 14):
        arguments = parameters((2, length, 12), 16, 12)
        ours = torch.autograd.grad(compiled(*arguments), arguments)
        theirs = torch.autograd.grad(gelu_mlp(*arguments, backend="reference").square().sum(), arguments)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.tensor(1.0), ValueError, "x must be"),
        (0, torch.zeros(2, 3, dtype=torch.int32), TypeError, "x has dtype torch.int32"),
        (0, torch.zeros(2, 3), ValueError, r"w1 has shape \(16, 12\).*D = 3"),
        (1, torch.zeros(16, 11), ValueError, r"w1 has shape \(16, 11\)"),
        (1, None, TypeError, "w1 must be a tensor"),
        (2, torch.zeros(1, 16), ValueError, r"b1 has shape \(1, 16\)"),
        (3, torch.zeros(12, 15), ValueError, r"w2 has shape \(12, 15\).*hidden = 16"),
        (4, torch.zeros(16), ValueError, r"b2 has shape \(16,\)"),
        (4, "none", TypeError, "b2 must be a tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(position, value, error, message):
    arguments = parameters((2, 5, 12), 16, 12)
    arguments[position] = value
    with pytest.raises(error, match=message):
        gelu_mlp(*arguments)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_two_forms_differ_and_there_is_no_third(backend):
    x, w1, b1, w2, b2 = parameters((2, 5, 12), 16, 12)
    exact = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    torch.testing.assert_close(gelu_mlp(x, w1, b1, w2, b2, approximate="none", backend=backend), exact)
    assert not torch.allclose(gelu_mlp(x, w1, b1, w2, b2, backend=backend), exact, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="approximate is 'erf'; it may be 'none' or 'tanh'"):
        gelu_mlp(x, w1, b1, w2, b2, approximate="erf")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("width", "out"), [(0, 8), (8, 0)])
def test_gradients_of_no_channels(width: int, out: int, backend: str):
    if backends.unavailable(backend) is not None:
        pytest.skip("no CPU kernels")
    shapes = ((2, 3, width), (16, width), (16,), (out, 16), (out,))
    leaves = [torch.ones(shape, requires_grad=True) for shape in shapes]
    for op in (gelu_mlp, glu_mlp):
        w2 = leaves[3] if op is gelu_mlp else leaves[3][:, :8].detach().requires_grad_()
        given = [*leaves[:3], w2, leaves[4]]
        y = op(*given, backend=backend)
        assert y.shape == (2, 3, out)
        gradients = torch.autograd.grad(y, given, torch.ones_like(y))
        assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in given]
