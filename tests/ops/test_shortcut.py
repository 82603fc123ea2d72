"""A repeated call takes the shortcut, and differs in nothing: results, errors, backends, what looks on."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES
from conftest import DEVICE
from test_ops import outputs
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import minisora_kernels as mk
from minisora_kernels import automatic, backends, shortcut

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None or DEVICE != "cpu", reason="no CPU kernels serve here"
)
OPS = (
    *("adaln", "attention", "gate_residual", "gate_residual_adaln", "gelu_mlp", "glu_mlp"),
    *("grn", "guided_step", "norm_rope", "patch_embed", "unpatchify", "window_attention"),
)


def tokens(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 12, 16), generator=torch.Generator().manual_seed(seed))


QKV = tokens(5, 2, 4, 3, 2, 8), (4, 1, 1), (4, 1, 1)


@pytest.fixture(autouse=True)
def afresh() -> None:
    shortcut.forget()


def recorded(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the call takes the long way."""
    ways: list[str] = []
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda op, *rest, **more: (ways.append(op), choose(op, *rest, **more))[1])
    call()
    monkeypatch.setattr(backends, "choose", choose)
    return bool(ways)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", [case for case in CASES if case.op in OPS and case.name != "a-clip"], ids=str)
def test_the_same_bits_from_other_tensors(case, backend: backends.Name):
    """The second call has other numbers in tensors of the same signature."""
    with torch.no_grad():
        first = {name: leaf.detach() for name, leaf in case.leaves(torch.bfloat16).items()}
        case.call(first, backend=backend)
        second = case.laid({name: (leaf * 0.5 + 0.25).to(leaf.dtype) for name, leaf in first.items()})
        found = outputs(case.call(second, backend=backend))
        shortcut.forget()
        expected = outputs(case.call(second, backend=backend))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@torch.no_grad()
def test_what_takes_it(monkeypatch):
    x, row, bias = tokens(), tokens(1, 2, 16), tokens(2, 16)
    calls: dict[str, Callable[[], Any]] = {
        "rows without a dimension": lambda: mk.adaln(x, row, tokens(3, 2, 16)),
        "shared rows": lambda: mk.adaln(x, row[:1]),
        "names": lambda: mk.gate_residual(x, branch=tokens(4), gate=row, branch_bias=bias),
        "None": lambda: mk.gate_residual_adaln(x, tokens(4), None, row, eps=1e-5),
        "a grid": lambda: mk.unpatchify(x, (1, 3, 4), (1, 2, 2), 4),
        "a third weight": lambda: mk.glu_mlp(x, tokens(5, 32, 16), None, tokens(6, 8, 32), None, w3=tokens(8, 32, 16)),
        "a vector": lambda: mk.gelu_mlp(x[0, 0], tokens(5, 32, 16), None, tokens(6, 8, 32), tokens(7, 8)),
        "q, k and v": lambda: mk.attention(*tokens(5, 2, 4, 3, 2, 8).unbind(2), backend="cpu"),
        "a norm": lambda: mk.norm_rope(tokens(5, 2, 4, 2, 8), norm="rms", weight=tokens(6, 8), backend="cpu"),
        "a bias": lambda: mk.window_attention(*QKV, bias=tokens(6, 2, 4, 4), backend="cpu"),
        "weights and rotation": lambda: mk.window_attention(
            *QKV, qk_norm="rms", q_weight=tokens(6, 8), rope=mk.rope_3d((4, 1, 1), 8), backend="cpu"
        ),
        "rotation": lambda: mk.norm_rope(tokens(5, 2, 4, 2, 8), rope=mk.rope_3d((4, 1, 1), 8), backend="cpu"),
        "packed coefficients": lambda: mk.guided_step(tokens(), tokens(1), torch.ones(5), null=tokens(2)),
        "the reference": lambda: mk.adaln(x, row, tokens(3, 2, 16), backend="reference"),
        "the reference of two": lambda: mk.gate_residual_adaln(x, tokens(4), row, backend="reference"),
    }
    for name, call in calls.items():
        assert recorded(call, monkeypatch), name
        assert not recorded(call, monkeypatch), name


@torch.no_grad()
def test_what_does_not(monkeypatch):
    x, row = tokens(), tokens(1, 2, 16)
    mk.adaln(x, row, tokens(2, 2, 16), eps=1)
    others: dict[str, Callable[[], Any]] = {
        "one tensor twice": lambda: mk.adaln(x, row, row, eps=1),
        "other strides": lambda: mk.adaln(x.transpose(0, 1).contiguous().transpose(0, 1), row, tokens(2, 2, 16), eps=1),
        "another dtype": lambda: mk.adaln(x, row.bfloat16(), tokens(2, 2, 16), eps=1),
        "another eps": lambda: mk.adaln(x, row, tokens(2, 2, 16), eps=1e-6),
        "a parameter": lambda: mk.adaln(torch.nn.Parameter(x), row, tokens(2, 2, 16), eps=1),
        "no tokens": lambda: mk.adaln(x[:, :0], row, tokens(2, 2, 16), eps=1),
        "float64": lambda: mk.adaln(x.double(), row, tokens(2, 2, 16), eps=1),
        "an index": lambda: mk.adaln(x, tokens(1, 2, 3, 16), eps=1, index=torch.zeros(12, dtype=torch.int64)),
        "lengths": lambda: mk.attention(*tokens(5, 2, 4, 3, 2, 8).unbind(2), lengths=torch.tensor([1, 2])),
    }
    for name, call in others.items():
        assert recorded(call, monkeypatch), name
    for name in ("an index", "lengths"):  # the op looks at the numbers each time
        assert recorded(others[name], monkeypatch), name
    same = lambda: mk.adaln(x, row, tokens(2, 2, 16), eps=1)  # noqa: E731
    assert not recorded(same, monkeypatch)
    for around in (
        torch.enable_grad(),
        torch.autocast("cpu"),
        mk.use_backend("reference"),
        FlopCounterMode(display=False),
    ):
        with around:
            assert recorded(same, monkeypatch), around
    assert not recorded(same, monkeypatch)
    automatic.forget()
    assert recorded(same, monkeypatch)


@torch.no_grad()
def test_errors_are_those_of_the_first_call():
    x, row = tokens(), tokens(1, 2, 16)
    mk.adaln(x, row, eps=1)
    mk.unpatchify(x, (1, 3, 4), (1, 2, 2), 4, channels_first=True)
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: mk.adaln(x, row, eps=True), TypeError, "adaln: eps is True; it must be a number"),
        (lambda: mk.adaln(x, row, eps=-1), ValueError, "adaln: eps is -1.0; it must be finite"),
        (lambda: mk.adaln(x, row[:, :8], eps=1), ValueError, "adaln: shift has shape"),
        (lambda: mk.adaln(x, row.int(), eps=1), TypeError, "adaln: shift has dtype torch.int32"),
        (lambda: mk.adaln(x, row, eps=1, backend="none"), ValueError, "backend is 'none'"),
        (lambda: mk.unpatchify(x, (True, 3, 4), (1, 2, 2), 4, channels_first=True), TypeError, "grid is True"),
        (lambda: mk.unpatchify(x, (1, 3, 4), (1, 2, 2), 4, channels_first=1), TypeError, "channels_first is 1"),
        (lambda: mk.adaln(x, row, 1.0), TypeError, "adaln: scale must be a tensor, got float"),
        (lambda: mk.adaln(torch.nested.nested_tensor([x[0]])), TypeError, "adaln: x must be a dense tensor"),
        (lambda: mk.adaln(x, row, epsilon=1), TypeError, "unexpected keyword argument 'epsilon'"),
    ]
    for _ in range(2):
        for call, error, message in wrong:
            with pytest.raises(error, match=message):
                call()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_other_tables_are_read(backend: backends.Name):
    ropes = [mk.rope_3d((4, 1, 1), 8, theta=theta) for theta in (10.0, 100.0)]
    ropes.append(ropes[1]._replace(interleaved=False))
    found = [mk.window_attention(*QKV, rope=rope, backend=backend) for _ in range(2) for rope in ropes]
    for rope, first, second in zip(ropes, found, found[3:], strict=False):
        shortcut.forget()
        expected = mk.window_attention(*QKV, rope=rope, backend=backend)
        assert torch.equal(first, expected) and torch.equal(second, expected)
    for wrong in (ropes[0][:2], (*ropes[0][:2], 1), ropes[0]._replace(cos=None), "rope"):
        with pytest.raises((TypeError, ValueError), match="window_attention: rope"):
            mk.window_attention(*QKV, rope=wrong, backend=backend)


@torch.no_grad()
def test_a_list_that_changes_is_read_anew():
    grid = [1, 3, 4]
    for _ in range(2):
        grid[:] = [1, 3, 4]
        assert mk.unpatchify(tokens(), grid, (1, 2, 2), 4).shape == (2, 4, 1, 6, 8)
        grid[:] = [1, 4, 3]
        assert mk.unpatchify(tokens(), grid, (1, 2, 2), 4).shape == (2, 4, 1, 8, 6)


@torch.no_grad()
def test_transforms_and_modes_see_the_op():
    x, row = tokens(), tokens(1, 2, 16)
    expected = mk.gate_residual(x, x * 2, row)
    mk.gate_residual(x, x * 2, row)
    torch.testing.assert_close(torch.func.vmap(mk.gate_residual)(x[None], (x * 2)[None], row[None]), expected[None])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x), mode.from_tensor(x), mode.from_tensor(row)
        assert type(mk.gate_residual(*fake)) is torch._subclasses.FakeTensor
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode AD"):  # a raw op would drop the derivative
            mk.gate_residual(dual, x * 2, row)


@torch.no_grad()
def test_who_counts_and_who_profiles_sees_the_op():
    x, w1, w2 = tokens(), tokens(5, 32, 16), tokens(6, 8, 32)
    call = lambda: mk.gelu_mlp(x, w1, None, w2, None, backend="cpu")  # noqa: E731
    call()
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * 24 * 32 * (16 + 8)
    with torch.profiler.profile() as profile:
        call()
    assert "minisora::gelu_mlp_fwd" in {event.key for event in profile.key_averages()}


@torch.no_grad()
def test_other_threads_run_beside_a_large_call():
    x = torch.zeros(1, 1 << 16, 64)
    mk.adaln(x, backend="cpu")
    done = threading.Event()
    counted = 0

    def count() -> None:
        nonlocal counted
        while not done.is_set():
            time.sleep(1e-4)
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    for _ in range(20):
        mk.adaln(x, backend="cpu")
    done.set()
    thread.join()
    assert counted > 40, counted  # with the GIL held, about one per call


@torch.no_grad()
def test_traces_and_captures_hold_the_op():
    x, s, other = tokens(), tokens(1, 2, 16), tokens(2)
    call = lambda x: mk.adaln(mk.adaln(x, s, backend="cpu"), s, backend="cpu") + x  # noqa: E731
    expected = call(other)
    for known in (False, True):
        if not known:
            shortcut.forget()
        traced = torch.jit.trace(call, (x,), check_trace=False)
        torch.testing.assert_close(traced(other), expected)
        captured = make_fx(call, pre_dispatch=True)(x)
        torch.testing.assert_close(captured(other), expected)
        call(x)


@torch.no_grad()
def test_signs_that_are_not_turned_yet():
    x, s = tokens(), tokens(1, 2, 16)
    for first in (torch._neg_view(x), x):
        shortcut.forget()
        mk.adaln(first, s, backend="cpu")
        for _ in range(2):
            torch.testing.assert_close(mk.adaln(torch._neg_view(x), s, backend="cpu"), mk.adaln(-x, s, backend="cpu"))


@torch.no_grad()
def test_as_many_signatures_as_are_kept(monkeypatch):
    x = [tokens(0, 1, count + 1, 16) for count in range(2 * shortcut.KEPT)]
    for each in x:
        mk.adaln(each)
    taken = [not recorded(lambda each=each: mk.adaln(each), monkeypatch) for each in x]
    assert taken == [True] * shortcut.KEPT + [False] * shortcut.KEPT


@torch.no_grad()
def test_no_tensor_is_kept():
    x = tokens()
    alive = weakref.ref(x)
    mk.adaln(x, tokens(1, 2, 16))
    del x
    assert alive() is None
