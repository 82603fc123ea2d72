"""What every op refuses: layouts, numbers, further derivatives. Values and gradients are in test_ops.py."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import KERNEL_BACKENDS
from torch.autograd import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import minisora_kernels as mk

X, ROW, WEIGHT = torch.randn(2, 8, 16), torch.randn(2, 16), torch.rand(16)
QKV = torch.randn(1, 8, 3, 2, 8)
Q, ANGLE = QKV[:, :, 0], torch.randn(8, 4)
CLIP, KERNEL = torch.randn(1, 2, 2, 4, 4), torch.randn(16, 2, 1, 2, 2)
W1, W2 = torch.randn(24, 16), torch.randn(16, 24)

# Per op: of a tensor, nonlinear or of two factors that depend on it.
CALLS = {
    "adaln": (X, lambda x, **o: mk.adaln(x, ROW, ROW, **o)),
    "adaln of a strided x": (X, lambda x, **o: mk.adaln(x.transpose(1, 2), ROW[:, :8], ROW[:, :8], **o)),
    "attention": (Q, lambda x, **o: mk.attention(x, x, Q, **o)),
    "gate_residual": (X, lambda x, **o: mk.gate_residual(X, x, ROW + x[:, 0], **o)),
    "gate_residual_adaln": (X, lambda x, **o: mk.gate_residual_adaln(x, x, ROW, ROW, ROW, **o)[1]),
    "gelu_mlp": (X, lambda x, **o: mk.gelu_mlp(x, W1, None, W2, None, **o)),
    "glu_mlp": (X, lambda x, **o: mk.glu_mlp(x, W1 / 8, None, W2[:, :12], None, **o)),
    "grn": (X, lambda x, **o: mk.grn(x, WEIGHT, WEIGHT, **o)),
    "norm_rope": (Q, lambda x, **o: mk.norm_rope(x, norm="rms", rope=mk.Rope(ANGLE.cos(), ANGLE.sin()), **o)),
    "patch_embed": (CLIP, lambda x, **o: mk.patch_embed(x, KERNEL, **o).square()),
    "unpatchify": (X, lambda x, **o: mk.unpatchify(x, (2, 2, 2), (1, 2, 2), 4, **o).square()),
    "window_attention": (QKV, lambda x, **o: mk.window_attention(x, (2, 2, 2), (1, 2, 2), **o)),
}
each_op = pytest.mark.parametrize("name", CALLS)
each_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)


@each_op
@each_backend
@pytest.mark.parametrize("route", ["hessian", "vectorized", "hvp", "vhp", "grad", "unused", "backward"])
def test_no_route_to_a_second_derivative_is_silent(name, backend, route):
    x, call = CALLS[name]

    def loss(x):
        return call(x, backend=backend).square().sum()

    def go():
        if route in ("hessian", "vectorized"):
            return functional.hessian(loss, x, vectorize=route == "vectorized")
        if route in ("hvp", "vhp"):
            return getattr(functional, route)(loss, x, torch.ones_like(x))
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        if route == "backward":
            return dx.sum().backward()
        return torch.autograd.grad(dx.square().sum(), leaf, allow_unused=route == "unused")

    with pytest.raises(RuntimeError, match=r"^\w+: a second derivative was asked for|takes? no batches"):
        go()


@each_op
@each_backend
def test_a_graph_of_gradients_changes_no_gradient(name, backend):
    x, call = CALLS[name]
    leaf = x.clone().requires_grad_()
    results = [
        torch.autograd.grad(call(leaf, backend=backend).square().sum(), leaf, create_graph=graph)[0]
        for graph in (False, True)
    ]
    assert torch.equal(*results) and results[1].requires_grad


def test_what_does_not_depend_on_an_input_has_no_second_derivative_to_refuse():
    """A map that is linear: its gradient is a constant, and zeros are right."""
    hessian = functional.hessian(lambda x: mk.unpatchify(x, (2, 2, 2), (1, 2, 2), 4).sum(), X)
    assert not hessian.any()


@each_op
def test_the_reference_serves_inside_the_transforms_of_torch_func(name):
    x, call = CALLS[name]

    def loss(x, **options):
        return call(x, **options).square().sum()

    exact = {"backend": "reference"}
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf, **exact), leaf)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ops of torch without a rule for batches
        torch.testing.assert_close(torch.vmap(call)(torch.stack((x, -x)))[1], call(-x, **exact))
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no forward-mode derivative
        torch.testing.assert_close(torch.func.jvp(call, (x,), (x,))[0], call(x, **exact))
    assert torch.func.jacrev(call)(x).shape == (*call(x).shape, *x.shape)


@each_op
@each_backend
def test_a_kernel_that_is_named_refuses_the_transforms_of_torch_func(name, backend):
    x, call = CALLS[name]
    message = rf"{name.split()[0]}: backend '{backend}' cannot serve this call: it is inside a transform of torch\.func"
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda x: call(x, backend=backend).sum())(x)
    with pytest.raises(ValueError, match=message):
        torch.vmap(lambda x: call(x, backend=backend))(torch.stack((x, x)))


def odd_layouts(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes of torch
        yield "sparse_coo", x.to_sparse()
        yield "sparse_csr", x.reshape(-1, x.shape[-1]).to_sparse_csr()
        yield "_mkldnn", x.to_mkldnn()
        yield "nested", torch.nested.nested_tensor(list(x))
        yield "nested", torch.nested.nested_tensor(list(x), layout=torch.jagged)
        yield "zero tensor", torch._efficientzerotensor(x.shape)
        yield "dtype torch.quint8", torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


@each_op
def test_tensors_that_are_not_dense_are_refused_by_name(name):
    x, call = CALLS[name]
    call = {
        "adaln of a strided x": lambda x: mk.adaln(X, x, ROW),
        "gate_residual": lambda x: mk.gate_residual(x, X, ROW),
    }.get(name, call)
    for word, odd in odd_layouts(x):
        with pytest.raises(TypeError, match=rf"^{name.split()[0]}: \w+ .*{word}"):
            call(odd)


def test_parameters_that_are_not_dense_are_refused_by_name():
    for parameter, call in {
        "w2": lambda w: mk.gelu_mlp(X, W1, None, w.t(), None),
        "weight": lambda w: mk.grn(X, w[0], WEIGHT),
        "bias": lambda w: mk.adaln(X, ROW, ROW, weight=WEIGHT, bias=w[0]),
    }.items():
        with pytest.raises(TypeError, match=f": {parameter} must be a dense tensor"):
            call(W1.to_sparse())
    with pytest.raises(TypeError, match="guided_step: null must be a dense tensor"):
        mk.guided_step(X, X, mk.Coefficients(), null=X.to_sparse())


NUMBERS = {
    "adaln": lambda v: mk.adaln(X, ROW, ROW, eps=v),
    "attention": lambda v: mk.attention(Q, Q, Q, qk_norm="rms", eps=v),
    "gate_residual_adaln": lambda v: mk.gate_residual_adaln(X, X, ROW, ROW, ROW, eps=v),
    "grn": lambda v: mk.grn(X, WEIGHT, WEIGHT, eps=v),
    "norm_rope": lambda v: mk.norm_rope(Q, norm="rms", eps=v),
    "window_attention": lambda v: mk.window_attention(QKV, (2, 2, 2), (1, 2, 2), qk_norm="rms", eps=v),
}
SCALES = {
    "attention: scale": lambda v: mk.attention(Q, Q, Q, scale=v),
    "window_attention: scale": lambda v: mk.window_attention(QKV, (2, 2, 2), (1, 2, 2), scale=v),
    "rope_3d: theta": lambda v: mk.rope_3d((2, 2, 2), 8, theta=v),
    "guided_step: coefficients.guidance": lambda v: mk.guided_step(X, X, mk.Coefficients(guidance=v)),
    "guided_step: coefficients.noise": lambda v: mk.guided_step(X, X, mk.Coefficients(noise=v), z=X),
}


@pytest.mark.parametrize("op", NUMBERS)
def test_eps_is_a_finite_number_that_is_not_negative(op):
    for value in (-1, -1e-9, float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match=f"{op}: eps is .*it must be"):
            NUMBERS[op](value)
    for value in (None, "x", "1e-6", 1j, True, [1e-6], torch.tensor(1e-6)):
        with pytest.raises(TypeError, match=f"{op}: eps is .*it must be a number"):
            NUMBERS[op](value)
    for value in (1, np.float32(0.5), np.float64(0.5)):
        NUMBERS[op](value)


@pytest.mark.parametrize("argument", SCALES)
def test_other_numbers_are_finite(argument):
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"{argument} is .*finite"):
            SCALES[argument](value)
    for value in ("x", 1j, [1.0]):
        with pytest.raises(TypeError, match=f"{argument} is .*number"):
            SCALES[argument](value)
    SCALES[argument](1)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("unpatchify: grid", lambda v: mk.unpatchify(X, v, (1, 2, 2), 4)),
        ("unpatchify: patch", lambda v: mk.unpatchify(X, (2, 2, 2), v, 4)),
        ("window_attention: grid", lambda v: mk.window_attention(QKV, v, (1, 2, 2))),
        ("window_attention: window", lambda v: mk.window_attention(QKV, (2, 2, 2), v)),
        ("rope_3d: grid", lambda v: mk.rope_3d(v, 8)),
    ],
)
def test_sizes_are_sequences_of_whole_numbers(argument, call):
    for value in (None, 5, (2.0, 2.0, 2.0), ("2", "2", "2"), "222", (2, 2, None), torch.ones(3), (True, 2, 2)):
        with pytest.raises(TypeError, match=f"{argument} is .*whole number"):
            call(value)
    for value in ((2, 2), (0, 2, 2), (2, 2, -2)):
        with pytest.raises(ValueError, match=f"{argument.split()[1]} is "):
            call(value)


def test_counts_are_whole_numbers():
    calls = {
        "unpatchify: channels": lambda v: mk.unpatchify(X, (2, 2, 2), (1, 2, 2), v),
        "grn: groups": lambda v: mk.grn(X, WEIGHT, WEIGHT, groups=v),
        "guided_step: channels": lambda v: mk.guided_step(X, X, mk.Coefficients(), null=X, channels=v),
        "rope_3d: head_dim": lambda v: mk.rope_3d((2, 2, 2), v),
    }
    for argument, call in calls.items():
        for value in (1.5, "x", "4", [4], True, torch.tensor(4)):
            with pytest.raises(TypeError, match=f"{argument} is .*it must be a whole number"):
                call(value)
    mk.unpatchify(X, np.array([2, 2, 2]), (1, np.int64(2), 2), np.int32(4))
    for rope in (mk.Rope(torch.ones(8, 4), torch.ones(8, 4), "x"), mk.Rope(torch.ones(8, 4), torch.ones(8, 4), 1)):
        with pytest.raises(TypeError, match=r"rope\.interleaved is .*; it must be True or False"):
            mk.window_attention(QKV, (2, 2, 2), (1, 2, 2), rope=rope)


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "reference", None])
def test_weights_of_another_dtype_are_refused_as_by_a_linear(backend):
    half = torch.bfloat16
    calls = {
        "w1": lambda o: mk.gelu_mlp(X, W1.to(half), None, W2, None, backend=backend),
        "w3": lambda o: mk.glu_mlp(X, W1, None, W2, None, w3=W1.to(half), backend=backend),
        "b2": lambda o: mk.gelu_mlp(X, W1, None, W2, WEIGHT.to(half), backend=backend),
        "weight": lambda o: mk.patch_embed(CLIP, KERNEL.to(half), backend=backend),
        "bias": lambda o: mk.patch_embed(CLIP, KERNEL, WEIGHT.to(half), backend=backend),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf": {name} has dtype torch\.bfloat16, x has torch\.float32; outside auto"):
            call(None)
        with torch.autocast("cpu", half):
            assert call(None).dtype == half
    assert mk.patch_embed(CLIP, KERNEL, None, torch.zeros(8, 16, dtype=half), backend=backend).dtype == torch.float32


@each_backend
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_no_gradient_is_a_view_of_another(backend, length, wide):
    """What a hook keeps stays as it is when another gradient is set to zero."""
    clip = torch.randn(length, 16 if wide else 2, 2, 4, 4, requires_grad=True)
    weight = torch.randn(16, clip.shape[1], 1, 2, 2, requires_grad=True)
    bias, pos = torch.randn(16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    y = mk.patch_embed(clip, weight, bias, pos, backend=backend)
    kept = []
    y.register_hook(kept.append)
    y.square().sum().backward()
    before = kept[0].clone()
    leaves = (clip, weight, bias, pos)
    storages = {gradient.untyped_storage().data_ptr() for gradient in (kept[0], *(leaf.grad for leaf in leaves))}
    assert len(storages) == 5
    for leaf in leaves:
        leaf.grad.zero_()
    assert torch.equal(kept[0], before)
