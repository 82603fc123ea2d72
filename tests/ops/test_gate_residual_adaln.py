"""What is special to gate_residual_adaln: it is the pair of ops, to the bit; each output can be used alone; errors."""

from __future__ import annotations

import pytest
import torch

import minisora_kernels as mk

X = torch.randn(2, 130, 40, generator=torch.Generator().manual_seed(0))
P = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_it_is_the_pair_of_ops_to_the_bit(dtype):
    x, branch, p = X.to(dtype), X.flip(1).to(dtype), P.to(dtype)
    residual, y = mk.gate_residual_adaln(x, branch, p, p, p)
    assert torch.equal(residual, mk.gate_residual(x, branch, p))
    assert torch.equal(y, mk.adaln(residual, p, p))


def test_an_unused_output_costs_no_gradient():
    """The last block uses y only, a block whose branch is dropped x' only."""
    for used in (0, 1):
        x, p = X.clone().requires_grad_(), P.clone().requires_grad_()
        mk.gate_residual_adaln(x, x.detach().flip(0), p, P, P)[used].square().sum().backward()
        x2, p2 = X.double().requires_grad_(), P.double().requires_grad_()
        mk.gate_residual_adaln(x2, x2.detach().flip(0), p2, P.double(), P.double())[used].square().sum().backward()
        assert x.grad is not None and p.grad is not None and x2.grad is not None and p2.grad is not None
        torch.testing.assert_close(x.grad, x2.grad.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(p.grad, p2.grad.float(), rtol=1e-4, atol=1e-3)


def test_the_stream_may_be_wider_than_the_branch():
    residual, y = mk.gate_residual_adaln(X, X.bfloat16(), P, P, P)
    assert residual.dtype == torch.float32 and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(branch=X[:, :6]), ValueError, r"branch has shape \(2, 6, 40\); it must have x's shape"),
        (dict(gate=P[:, :4]), ValueError, r"gate has shape \(2, 1, 4\)"),
        (dict(norm="group"), ValueError, "norm is 'group'"),
        (dict(weight=torch.ones(3)), ValueError, r"weight has shape \(3,\)"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    arguments = {"x": X, "branch": X, "gate": P, "shift": P, "scale": P} | arguments
    with pytest.raises(error, match="gate_residual_adaln: " + message):
        mk.gate_residual_adaln(**arguments)
