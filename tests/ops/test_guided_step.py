"""What is special to guided_step: the equation number by number, what it does not read, no backward, errors."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import KERNEL_BACKENDS
from torch.autograd import forward_ad

import minisora_kernels as mk

BACKENDS = ["reference", *KERNEL_BACKENDS]
ROWS = torch.tensor([[3.0, 0.9, -0.4, 0.7, 0.3], [1.5, 1.1, 0.2, 0.5, -0.6]])
X, Z = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
COND, NULL = (torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", (None, 2))
def test_the_equation_number_by_number(channels, backend):
    y = mk.guided_step(X, COND, ROWS, null=NULL, z=Z, channels=channels, backend=backend)
    for b, c, h, w in torch.cartesian_prod(*map(torch.arange, X.shape)).tolist():
        scale, of_x, of_g, deviation, slope = ROWS[b].tolist()
        g, null, v = (tensor.item() for tensor in (COND[b, c, h, w], NULL[b, c, h, w], COND[b, c + 3, h, w]))
        if channels is None or c < channels:
            g = null + scale * (g - null)
        expected = of_x * X[b, c, h, w].item() + of_g * g + deviation * math.exp(slope * (v - 1)) * Z[b, c, h, w].item()
        assert y[b, c, h, w].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_of_one_is_the_conditional_prediction_itself(backend):
    rows = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    assert torch.equal(mk.guided_step(X, COND[:, :3], rows, null=NULL[:, :3], backend=backend), COND[:, :3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_count_is_not_read(backend):
    """NaN in the variance and the channels of null that are not guided, and in coefficients of what is not given."""
    null = NULL.clone()
    null[:, 2:] = math.nan
    whole = mk.guided_step(X, COND, ROWS, null=NULL, z=Z, channels=2, backend=backend)
    assert torch.equal(mk.guided_step(X, COND, ROWS, null=null, z=Z, channels=2, backend=backend), whole)

    rows, cond = ROWS.clone(), COND.clone()
    rows[:, [0, 3, 4]] = math.nan
    cond[:, 3:] = math.nan
    plain = mk.guided_step(X, COND[:, :3], ROWS, backend=backend)
    assert torch.equal(mk.guided_step(X, cond, rows, backend=backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_serves_every_sample(backend):
    one = mk.guided_step(X, COND, ROWS[0], null=NULL, z=Z, backend=backend)
    assert torch.equal(one, mk.guided_step(X, COND, ROWS[:1].repeat(2, 1), null=NULL, z=Z, backend=backend))
    assert torch.equal(one, mk.guided_step(X, COND, ROWS.T.contiguous().T[:1][0], null=NULL, z=Z, backend=backend))


def test_the_learned_variance_lies_between_its_bounds():
    small, large = 1e-4, 0.02
    row = torch.tensor([1.0, 0.0, 0.0, large**0.5, math.log(large / small) / 4])
    for v, variance in ((-1.0, small), (1.0, large), (0.0, math.sqrt(small * large))):
        cond = torch.cat((X, torch.full_like(X, v)), dim=1)
        torch.testing.assert_close(mk.guided_step(X, cond, row, z=Z), variance**0.5 * Z)
    torch.testing.assert_close(mk.guided_step(X, X, row, z=Z), large**0.5 * Z)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_call_that_wants_a_gradient_is_refused_by_kernels_and_served_by_the_reference(backend):
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="x requires a gradient; the kernels have no backward"):
        mk.guided_step(x, COND, ROWS, backend=backend)
    with torch.no_grad():
        assert not mk.guided_step(x, COND, ROWS, backend=backend).requires_grad
    mk.guided_step(x, COND, ROWS).sum().backward()
    torch.testing.assert_close(x.grad, ROWS[:, 1].reshape(2, 1, 1, 1).expand_as(X))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(ValueError, match="forward mode AD"):
            mk.guided_step(dual, COND, ROWS, backend=backend)


@pytest.mark.parametrize("backend", ["reference", *KERNEL_BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_by_name_are_those_of_the_packed_row(backend, dtype):
    x, cond, null, z = (tensor.to(dtype) for tensor in (X, COND, NULL, Z))
    same = mk.Coefficients(guidance=3.0, state=0.9, prediction=-0.5, noise=0.25, variance=0.125)
    row = torch.tensor([3.0, 0.9, -0.5, 0.25, 0.125])
    ours = mk.guided_step(x, cond, same, null=null, z=z, backend=backend)
    assert torch.equal(ours, mk.guided_step(x, cond, row, null=null, z=z, backend=backend))
    each = same._replace(state=torch.tensor([0.9, 0.1]))
    rows = torch.stack((row, row.index_fill(0, torch.tensor(1), 0.1)))
    ours = mk.guided_step(x, cond, each, null=null, z=z, backend=backend)
    assert torch.equal(ours, mk.guided_step(x, cond, rows, null=null, z=z, backend=backend))


def test_coefficients_default_to_a_step_that_stays():
    assert torch.equal(mk.guided_step(X, COND, mk.Coefficients()), X)
    double = mk.guided_step(X.double(), COND.double(), mk.Coefficients(prediction=1 / 3))
    torch.testing.assert_close(double, X.double() + COND[:, :3].double() / 3, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_kernels_take_coefficients_in_float32_only(backend):
    with pytest.raises(ValueError, match=r"coefficients have dtype torch\.bfloat16"):
        mk.guided_step(X, COND, ROWS.bfloat16(), backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=X.int()), TypeError, "x has dtype torch.int32"),
        (dict(x=X.flatten()), ValueError, r"x must be \[B, C, \.\.\.\], got shape \(120,\)"),
        (dict(cond=COND[:, :5]), ValueError, r"cond has shape \(2, 5, 4, 5\); it may be \(2, 3, 4, 5\), or .*\(2, 6,"),
        (dict(cond=COND.to("meta")), ValueError, "cond is on meta, x is on cpu"),
        (dict(null=NULL[:, :3]), ValueError, r"null is .*\(2, 3, 4, 5\); it must be as cond: .*\(2, 6, 4, 5\)"),
        (dict(null=NULL.half()), ValueError, "null is torch.float16 .* as cond: torch.float32"),
        (dict(z=Z[:1]), ValueError, r"z is .*\(1, 3, 4, 5\); it must be as x"),
        (dict(coefficients=ROWS[:1]), ValueError, r"coefficients have shape \(1, 5\); .*B = 2"),
        (dict(coefficients=ROWS[0, :4]), ValueError, r"coefficients have shape \(4,\)"),
        (dict(channels=4), ValueError, r"channels is 4; it may be 1\.\.3"),
        (dict(channels=0), ValueError, r"channels is 0; it may be 1\.\.3"),
        (dict(channels=2, null=None), ValueError, "channels is 2, but there is no null"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    arguments = dict(x=X, cond=COND, coefficients=ROWS, null=NULL, z=Z) | arguments
    with pytest.raises(error, match="guided_step: " + message):
        mk.guided_step(**arguments)
