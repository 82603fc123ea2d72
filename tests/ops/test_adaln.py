"""What is special to adaln: the equation written out, the row of a token, errors."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import minisora_kernels as mk

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
P = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ("reference", None))
@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("rows", (1, 3, 12))
def test_the_equation_token_by_token(backend, norm, rows):
    x = X.double() if backend == "reference" else X
    shift, scale = torch.randn(2, 2, rows, 8, dtype=x.dtype).unbind(0)
    weight, bias = torch.randn(8, dtype=x.dtype), torch.randn(8, dtype=x.dtype) if norm == "layer" else None
    y = mk.adaln(x, shift, scale, weight=weight, bias=bias, norm=norm, eps=1e-3, backend=backend)
    for b in range(2):
        for n in range(12):
            token, row = x[b, n], n // (12 // rows)
            center = token.mean() if norm == "layer" else 0
            h = (token - center) / ((token - center).square().mean() + 1e-3).sqrt() * weight
            h = h if bias is None else h + bias
            torch.testing.assert_close(y[b, n], h * (1 + scale[b, row]) + shift[b, row])


@pytest.mark.parametrize("each", (False, True), ids=("shared", "per sample"))
def test_an_index_names_the_row_of_a_token(each):
    """Values and gradients are those of a gather; rows that no token has get zeros, not what was in memory."""
    index = torch.randint(4, (2, 12) if each else (12,))
    index[index == 2] = 3
    shift, scale = torch.randn(2, 2, 5, 8, requires_grad=True).unbind(0)
    gathered = [torch.stack([rows[b, index[b] if each else index] for b in range(2)]) for rows in (shift, scale)]
    theirs = mk.adaln(X, *gathered)
    expected = torch.autograd.grad(theirs.square().sum(), (shift, scale), retain_graph=True)
    for backend in ("reference", None):
        for given in (index, index.int()):
            ours = mk.adaln(X, shift, scale, index=given, backend=backend)
            torch.testing.assert_close(ours, theirs)
            gradients = torch.autograd.grad(ours.square().sum(), (shift, scale), retain_graph=True)
            for one, other in zip(gradients, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
                assert (one[:, [2, 4]] == 0).all()


def test_an_index_out_of_range_is_an_error_on_every_way_to_the_kernel():
    rows, good, bad = torch.randn(2, 3, 8), torch.arange(12) % 3, torch.arange(12) % 4
    with torch.no_grad():
        for _ in range(3):  # the third goes straight to the raw op
            mk.adaln(X, rows, rows, index=good)
        with pytest.raises((RuntimeError, ValueError), match=r"index .*3"):
            mk.adaln(X, rows, rows, index=bad)
        with pytest.raises((RuntimeError, ValueError, IndexError), match="index"):
            mk.adaln(X, rows, rows, index=-good)
    with pytest.raises((RuntimeError, IndexError), match="index"):
        torch.compile(mk.adaln, backend="eager")(X, rows, rows, index=bad)


def test_the_row_comes_from_the_token_at_every_batch_size():
    """The fault of a known kernel, which took the row from the program's index: right at batch 1, wrong beyond."""
    for batch in (1, 2, 3, 8):
        x, scale = torch.randn(batch, 257, 24), torch.randn(batch, 24)
        alone = [mk.adaln(x[b : b + 1], scale[b : b + 1], scale[b : b + 1]) for b in range(batch)]
        assert torch.equal(mk.adaln(x, scale, scale), torch.cat(alone))


def test_chunks_of_a_projection_are_read_in_place():
    projection = torch.randn(2, 6 * 8, requires_grad=True)
    shift, scale = projection.chunk(6, dim=-1)[:2]
    assert not shift.is_contiguous()
    y = mk.adaln(X, shift, scale)
    assert torch.equal(y, mk.adaln(X, shift.contiguous(), scale.contiguous()))
    y.square().sum().backward()
    assert projection.grad is not None and projection.grad[:, 16:].abs().max() == 0
    assert (projection.grad[:, :16] != 0).all()


def test_a_constant_token_stays_finite():
    x = torch.full((1, 3, 8), 5.0, requires_grad=True)
    y = mk.adaln(x, P[:1], P[:1])
    torch.testing.assert_close(y, P[:1, None].expand(1, 3, 8))
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=X[0]), ValueError, r"x must be \[B, N, D\], got shape \(12, 8\)"),
        (dict(x=X.long()), TypeError, "x has dtype torch.int64; it may be float16"),
        (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
        (dict(shift=P[:, :4]), ValueError, r"shift has shape \(2, 1, 4\); it may be \[B, D\] or \[B, R, D\]"),
        (dict(shift=torch.ones(3, 8)), ValueError, r"shift has shape \(3, 1, 8\); .* B = 2, or 1 for all samples"),
        (dict(scale=torch.randn(2, 5, 8)), ValueError, "scale has 5 rows; the number must divide the 12 tokens"),
        (dict(scale=P.int()), TypeError, "scale has dtype torch.int32"),
        (dict(scale=P.to("meta")), ValueError, "scale is on meta, x is on cpu"),
        (dict(weight=torch.ones(7)), ValueError, r"weight has shape \(7,\); it must be \[D\] with D = 8"),
        (
            dict(bias=torch.ones(8), norm="rms"),
            ValueError,
            "bias must be None with norm='rms', because an RMS norm has no bias",
        ),
        (dict(norm="batch"), ValueError, "norm is 'batch'; it may be 'layer' or 'rms'"),
        (dict(index=[0] * 12), TypeError, "index must be a tensor, got list"),
        (dict(index=torch.zeros(12)), TypeError, "index has dtype torch.float32; it may be int64 or int32"),
        (dict(index=torch.zeros(2, 6).long()), ValueError, r"index has shape \(2, 6\); it may be \[N\] or \[B, N\]"),
        (dict(index=torch.arange(12)), ValueError, "index has 11; it may be from 0 to 0"),
        (dict(index=torch.arange(12) - 11), ValueError, "index has -11; it may be from 0 to 0"),
        (dict(index=torch.zeros(12).long().to("meta")), ValueError, "index is on meta, x is on cpu"),
        (dict(index=torch.zeros(12).long(), shift=X), ValueError, r"with an index all .* it is shift 12, scale 1"),
        (dict(index=torch.zeros(12).long(), shift=None, scale=None), ValueError, "index needs shift or scale"),
        (dict(index=torch.zeros(12).long(), shift=X[:, :0]), ValueError, "shift has no rows"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    arguments = {"x": X, "shift": P, "scale": P} | arguments
    with pytest.raises(error, match="adaln: " + message):
        mk.adaln(**arguments)


def test_no_recompile_per_number_of_rows():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(mk.adaln, fullgraph=True, backend=counter)
    for frames in (3, 4, 5, 7):
        x, *rows = torch.randn(2, 4 * frames, 8), *torch.randn(2, 2, frames, 8)
        rows = [each.clone().requires_grad_() for each in rows]
        ours = torch.autograd.grad(step(x, *rows).square().sum(), rows)
        theirs = torch.autograd.grad(mk.adaln(x, *rows, backend="reference").square().sum(), rows)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_rows_that_all_samples_share_get_the_sum_of_their_gradients():
    for backend in ("reference", None):
        x, shared = torch.randn(3, 12, 8), torch.randn(1, 4, 8, requires_grad=True)
        each = shared.detach().repeat(3, 1, 1).requires_grad_()
        assert torch.equal(mk.adaln(x, shared, shared, backend=backend), mk.adaln(x, each, each, backend=backend))
        for rows in (shared, each):
            mk.adaln(x, rows, rows, backend=backend).square().sum().backward()
        torch.testing.assert_close(shared.grad, each.grad.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_without_modulation_it_is_the_norm(norm):
    plain = torch.nn.functional.layer_norm if norm == "layer" else torch.nn.functional.rms_norm
    for backend in ("reference", None):
        torch.testing.assert_close(mk.adaln(X, norm=norm, backend=backend), plain(X, (8,), eps=1e-6))


def test_no_recompile_per_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x, p: mk.adaln(x, p, p), fullgraph=True, backend=counter)
    for tokens in (12, 18, 24, 35, 36):
        step(torch.randn(2, tokens, 8), P)
    assert counter.frame_count <= 2
