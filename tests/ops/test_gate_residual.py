"""What is special to gate_residual: the equation written out, zero gates, errors."""

from __future__ import annotations

import pytest
import torch

import minisora_kernels as mk

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", (1, 4, 12))
def test_the_equation_token_by_token(rows):
    branch, gate = torch.randn(2, 12, 8), torch.randn(2, rows, 8)
    y = mk.gate_residual(X, branch, gate)
    for b in range(2):
        for n in range(12):
            torch.testing.assert_close(y[b, n], X[b, n] + gate[b, n // (12 // rows)] * branch[b, n])


def test_a_bias_that_the_linear_leaves_to_the_gate():
    """The same values and gradients, and the Linear's backward sums no gradient for a bias."""
    linear, gate = torch.nn.Linear(8, 8), torch.randn(2, 8, requires_grad=True)
    with_bias = mk.gate_residual(X, linear(X), gate)
    without = mk.gate_residual(X, torch.nn.functional.linear(X, linear.weight), gate, branch_bias=linear.bias)
    torch.testing.assert_close(without, with_bias)
    leaves = (gate, linear.weight, linear.bias)
    theirs = torch.autograd.grad(with_bias.square().sum(), leaves)
    for ours, expected in zip(torch.autograd.grad(without.square().sum(), leaves), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_a_zero_gate_passes_x_and_still_learns():
    branch, gate = torch.randn(2, 12, 8, requires_grad=True), torch.zeros(2, 8, requires_grad=True)
    y = mk.gate_residual(X, branch, gate)
    assert torch.equal(y, X)
    y.square().sum().backward()
    assert branch.grad is not None and branch.grad.abs().max() == 0
    assert gate.grad is not None and gate.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(branch=X[:, :6]), ValueError, r"branch has shape \(2, 6, 8\); it must have x's shape \(2, 12, 8\)"),
        (dict(branch=X.int()), TypeError, "branch has dtype torch.int32"),
        (dict(branch=X.to("meta")), ValueError, "branch is on meta, x is on cpu"),
        (
            dict(branch_bias=torch.zeros(2, 8)),
            ValueError,
            r"branch_bias has shape \(2, 8\); it must be \[D\] with D = 8",
        ),
        (dict(gate=torch.zeros(2, 5, 8)), ValueError, "gate has 5 rows; the number must divide the 12 tokens of x"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    arguments = {"x": X, "branch": X, "gate": X[:, 0]} | arguments
    with pytest.raises(error, match="gate_residual: " + message):
        mk.gate_residual(**arguments)
