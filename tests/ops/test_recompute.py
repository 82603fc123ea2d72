"""recompute_adaln: the same gradients from less memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import minisora_kernels as mk
from minisora_kernels import backends
from minisora_kernels.counters import Counter, saved_bytes

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no CPU kernels")
B, N, D = 2, 12, 16


def leaves(dtype=torch.float32, stream=None):
    """x, branch, gate, shift, scale and the weight of a Linear."""
    shapes = [(B, N, D), (B, N, D), (B, D), (B, 3, D), (B, D), (24, D)]
    return [torch.randn(s).to(stream if i == 0 and stream else dtype).requires_grad_() for i, s in enumerate(shapes)]


def step(x, branch, gate, shift, scale, weight, again=True):
    x, y = mk.gate_residual_adaln(x, branch, gate, shift, scale, norm="rms", eps=1e-4)
    if not again:
        return F.linear(y, weight).square().sum() + x.sum()
    with mk.recompute_adaln(y, x, shift, scale, norm="rms", eps=1e-4):
        z = F.linear(y, weight)
    return z.square().sum() + x.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [None, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_bits_from_less_memory(dtype, stream, autocast):
    given = leaves(dtype, stream)
    results = []
    for again in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = step(*given, again=again)
        with Counter() as counter:
            results.append(torch.autograd.grad(loss, given))
        assert ("adaln_fwd" in counter.kernels) == again
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

    def kept(again):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return saved_bytes(lambda: step(*given, again=again), given)

    size = 2 if autocast or dtype == torch.bfloat16 else 4
    assert kept(False) - kept(True) == B * N * D * size


def test_reference_compile_and_sampling_are_left_alone():
    given = leaves()
    expected = torch.autograd.grad(step(*given, again=False), given)
    with mk.use_backend("reference"):
        assert saved_bytes(lambda: step(*given), given) == saved_bytes(lambda: step(*given, again=False), given)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(*given), given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        step(*given)


def test_an_index_is_read_again():
    x, _, _, rows, _, weight = leaves()
    index, results = torch.arange(N) % 3, []
    for again in (True, False):
        y = mk.adaln(x, rows, rows, index=index)
        if again:
            with mk.recompute_adaln(y, x, rows, rows, index=index):
                z = F.linear(y, weight)
        else:
            z = F.linear(y, weight)
        results.append(torch.autograd.grad(z.square().sum(), (x, rows, weight)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    with (
        pytest.raises(ValueError, match="index is another"),
        mk.recompute_adaln(y, x, rows, rows, index=index.clone()),
    ):
        pass


def test_a_y_of_another_shape_is_named():
    x, _, gate, *_ = leaves()
    message = r"recompute_adaln: y has shape \(2, 12, 8\), x \(2, 12, 16\)"
    with pytest.raises(ValueError, match=message), mk.recompute_adaln(x[..., :8], x, gate, gate):
        pass


def test_a_changed_y_is_kept_and_a_changed_argument_is_an_error():
    x, _, _, _, scale, weight = leaves()
    results = []
    for again in (True, False):
        y = mk.adaln(x, scale, scale)
        with mk.recompute_adaln(y, x, scale, scale) if again else torch.enable_grad():
            y = y.mul_(2)
            z = F.linear(y, weight)
        results.append(torch.autograd.grad(z.square().sum(), [x, weight]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    y = mk.adaln(x, scale, scale)
    with mk.recompute_adaln(y, x, scale, scale):
        z = F.linear(y, weight)
    with torch.no_grad():
        scale.add_(1)
    with pytest.raises(RuntimeError, match="changed in place since the forward"):
        torch.autograd.grad(z.sum(), weight)


def test_no_samples():
    given = [torch.randn(0, N, D, requires_grad=True), torch.randn(0, D), torch.randn(24, D, requires_grad=True)]
    y = mk.adaln(given[0], given[1], given[1])
    with mk.recompute_adaln(y, given[0], given[1], given[1]):
        z = F.linear(y, given[2])
    assert all(
        gradient.shape == t.shape
        for gradient, t in zip(torch.autograd.grad(z.sum(), given[::2]), given[::2], strict=True)
    )


def test_a_forward_without_a_backward_leaves_nothing():
    """An op that saves its result, as softmax does, must not hold itself through the hooks."""

    def results():
        x, _, _, shift, scale, _ = leaves()
        y = mk.adaln(x, shift[:, 0], scale)
        with mk.recompute_adaln(y, x, shift[:, 0], scale):
            inside = y.softmax(-1)
        return weakref.ref(inside)

    held = results()
    gc.collect()
    assert held() is None


def test_what_it_cannot_make_again_is_kept_or_refused():
    x, branch, gate, shift, scale, _ = leaves(torch.bfloat16)
    _, y = mk.gate_residual_adaln(x, branch.float(), gate, shift, scale)
    wide = torch.randn(24, D, requires_grad=True)
    assert y.dtype == torch.float32  # wider than the residual stream
    with mk.recompute_adaln(y, x, shift, scale):
        z = F.linear(y, wide)
    z.sum().backward()
    torch.testing.assert_close(wide.grad, y.detach().sum((0, 1)).expand(24, -1))
    whole = torch.randn(2 * B, N, D, dtype=torch.bfloat16)
    with (
        pytest.raises(ValueError, match="y is a part of another tensor"),
        mk.recompute_adaln(whole[:B], x, shift, scale),
    ):
        pass


def test_arguments_that_did_not_make_y_are_refused_by_name():
    x, branch, gate, shift, scale, weight = leaves()
    given = {"norm": "rms", "eps": 1e-3, "weight": torch.rand(D)}
    made = x, mk.adaln(x, shift, scale, **given)
    fused = mk.gate_residual_adaln(x, branch, gate, shift, scale, **given)
    for stream, y in (made, fused):
        with mk.recompute_adaln(y, stream, shift, scale, **given):
            F.linear(y, weight)
        others = {
            "eps": {"eps": 1e-6},
            "norm": {"norm": "layer"},
            "weight": {"weight": None},
            "x": {"x": stream.detach().clone()},
            "shift": {"shift": scale, "scale": shift},
            "scale": {"scale": scale.detach() + 1},
        }
        for name, other in others.items():
            arguments = {"x": stream, "shift": shift, "scale": scale, **given, **other}
            with (
                pytest.raises(ValueError, match=f"recompute_adaln: y was made of other arguments.*: {name} is"),
                mk.recompute_adaln(y, **arguments),
            ):
                pass
    with (
        pytest.raises(ValueError, match=r"eps is 1e-06, not 0\.001"),
        mk.recompute_adaln(made[1], x, shift, scale, **given | {"eps": 1e-6}),
    ):
        pass


def test_what_no_norm_made_and_what_changed_before_the_block_is_refused():
    x, _, _, shift, scale, _ = leaves()
    with pytest.raises(ValueError, match="y is not what adaln"), mk.recompute_adaln(x + 1, x, shift, scale):
        pass
    stream = x.detach().clone()
    y = mk.adaln(stream, shift, scale)
    stream.mul_(2)
    with pytest.raises(ValueError, match="x is another"), mk.recompute_adaln(y, stream, shift, scale):
        pass
    with mk.recompute_adaln(mk.adaln(x, shift, scale), x.view(x.shape), shift[:], scale[:]):  # the same numbers
        pass
