"""Every op x backend x case: values, gradients, determinism, raw ops, compile, autocast, checkpointing, layouts."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from cases import CASES, Case, drawn
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import minisora_kernels as mk
from minisora_kernels import backends
from minisora_kernels.testing import assert_as_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = sorted({case.op for case in CASES})
ONE_CASE = [next(case for case in CASES if case.op == op) for op in OPS]
DIFFERENTIABLE = [case for case in ONE_CASE if case.differentiable]

pytestmark = pytest.mark.skipif(not KERNEL_BACKENDS, reason="no kernel backend is available: see the header")


def outputs(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def run(case: Case, dtype: torch.dtype, backend: str | None, function=None, like=None) -> dict[str, Tensor]:
    """Outputs and the gradient of every input that has one, by name; incoming gradients are fixed by the shapes."""
    leaves = case.leaves(dtype)
    if like is not None:  # the float64 oracle gets the inputs as the kernel got them: rounded
        rounded = case.leaves(like)
        leaves = {
            name: rounded[name].detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()
        }
    call = function or case.call
    result = outputs(call(leaves, backend=backend))
    named = {f"output {i}": value for i, value in enumerate(result)}
    if not case.differentiable:
        return named
    generator = torch.Generator().manual_seed(7)
    loss_gradients = [
        torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu") for value in result
    ]
    rounded_gradients = [
        g.to(DEVICE, like or value.dtype).to(value.dtype) for value, g in zip(result, loss_gradients, strict=True)
    ]
    torch.autograd.backward(result, rounded_gradients)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None, f"{case}: no gradient for {name}"
            named[f"gradient of {name}"] = leaf.grad
    return {name: value.detach() for name, value in named.items()}


def draws(case: Case) -> list[Case]:
    """The case with other numbers, so often that 64 judge it: the error of one in ten is a matter of luck."""
    counts = [t.numel() for name, t in case.tensors.items() if name not in case.constants or not case.differentiable]
    fewest = min((count for count in counts if count), default=64)
    return [drawn(draw).get(str(case), case) for draw in range(min(8, -(-64 // fewest)))]


def judge(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Values and gradients over all draws, by the tolerance rule."""

    def over_draws(*how, **options) -> dict[str, Tensor]:
        found = [run(draw, *how, **options) for draw in draws(case)]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    kernel, reference = over_draws(dtype, backend), over_draws(dtype, "reference")
    exact = over_draws(torch.float64, "reference", like=dtype)
    assert kernel.keys() == reference.keys() == exact.keys()
    for name in kernel:
        assert_as_accurate(f"{case} {name}", kernel[name], reference[name], exact[name].double())


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype, backend: str, nan_filled):
    seen = Seen()
    with seen:
        judge(case, dtype, backend)
    assert any(name.startswith(case.op) for name in seen.names()), f"no kernel of {case.op} ran, only {seen.names()}"


@pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter runs programs one by one, always in one order")
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_on_every_run_and_for_any_number_of_threads(case: Case, dtype: torch.dtype, backend: str, threads):
    results = []
    counts = (1, 2, 3, 2) if case.any_threads else (2, 2, 2)
    for count in counts:
        torch.set_num_threads(count)
        results.append(run(case, dtype, backend))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), f"{case} {name} changes with the number of threads"


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", ONE_CASE, ids=str)
def test_raw_ops_pass_opcheck(case: Case, backend: str):
    seen = Seen()
    with seen:
        run(case, torch.float32, backend)
    assert ({"_fwd", "_bwd"} if case.differentiable else {"_fwd"}) <= {name[-4:] for name in seen.names()}
    for func, args, kwargs in seen.calls:
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", ONE_CASE, ids=str)
def test_compiles_as_one_graph(case: Case, backend: str):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t, backend: case.call(t, backend=backend), fullgraph=True, backend="aot_eager")
    plain = run(case, torch.float32, backend)
    traced = run(case, torch.float32, backend, function=compiled)
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", ONE_CASE, ids=str)
def test_strided_and_expanded_inputs(case: Case, backend: str):
    """Values do not depend on how an input lies in memory, nor on an expanded gradient."""

    def strided(leaves, backend):
        moved = {}
        for name, leaf in leaves.items():
            order = list(range(leaf.dim()))[::-1]
            moved[name] = leaf.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
        return case.call(moved, backend=backend)

    plain, moved = run(case, torch.float32, backend), run(case, torch.float32, backend, function=strided)
    for name, value in plain.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    if not case.differentiable:
        return
    gradients = []
    for expand in (True, False):
        leaves = case.leaves(torch.float32)
        result = outputs(case.call(leaves, backend=backend))[-1]
        # what .sum().backward() hands over
        one = torch.ones((), dtype=result.dtype, device=DEVICE).expand(result.shape)
        result.backward(one if expand else one.contiguous())
        gradients.append([leaf.grad for leaf in leaves.values() if leaf.requires_grad])
    for expanded, dense in zip(*gradients, strict=True):
        assert expanded is not None and torch.equal(expanded, dense)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.differentiable], ids=str)
def test_a_caller_may_write_to_a_result_in_place(case: Case, backend: str):
    """Autograd refuses it of a view that an op makes inside. A backward raises then, where the op keeps its result."""
    for value in outputs(case.call(case.leaves(torch.float32), backend=backend)):
        value.add_(1.0)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", ONE_CASE, ids=str)
def test_autocast_gives_the_dtype_of_the_reference(case: Case, backend: str):
    results = []
    for name in (backend, "reference"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            result = outputs(case.call(case.leaves(torch.float32), backend=name))
        if case.differentiable:
            sum(value.float().square().sum() for value in result).backward()
        results.append(result)
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", ONE_CASE, ids=str)
def test_checkpointing_changes_nothing(case: Case, backend: str):
    def recomputed(leaves, backend):
        return checkpoint(lambda leaves: case.call(leaves, backend=backend), leaves, use_reentrant=False)

    plain, again = run(case, torch.float32, backend), run(case, torch.float32, backend, function=recomputed)
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_without_gradients(case: Case, backend: str):
    leaves = case.leaves(torch.float32)
    with_gradients = outputs(case.call(leaves, backend=backend))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = outputs(case.call(leaves, backend=backend))
        for one, other in zip(with_gradients, without, strict=True):
            assert torch.equal(one, other) and not other.requires_grad


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_a_forward_mode_derivative_is_refused(case: Case, gradients: bool, backend: str):
    leaves = case.leaves(torch.float32)
    name, x = next(iter(leaves.items()))
    with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        leaves[name] = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            case.call(leaves, backend=backend)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_float64_goes_to_the_reference_and_is_refused_by_kernels(op: str, backend: str):
    case = next(case for case in CASES if case.op == op)
    seen = Seen()
    with seen:
        case.call(case.leaves(torch.float64), backend=None)
    assert not seen.calls
    with pytest.raises(ValueError, match="float64"):
        case.call(case.leaves(torch.float64), backend=backend)


@pytest.mark.skipif("cpu" not in KERNEL_BACKENDS, reason="the cpu kernels are not under test")
@pytest.mark.parametrize("op", OPS)
def test_the_automatic_choice_on_a_cpu_is_the_cpu_kernel(op: str):
    case = next(case for case in CASES if case.op == op)
    seen = Seen()
    with seen:
        case.call(case.leaves(torch.float32), backend=None)
    assert any(name.startswith(op) for name in seen.names())


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_public_function_with_a_whole_docstring(op: str):
    module = importlib.import_module(f"minisora_kernels.ops.{op}")
    public = getattr(module, op)
    assert public is getattr(mk, op) and callable(module.reference)
    text = inspect.getdoc(public) or ""
    assert "Args:" in text and "Returns:" in text and "Raises:" in text


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_a_second_derivative_is_refused(case: Case, backend: str):
    """The backward kernels have no derivative of their own: an error, never a wrong number."""
    leaves = case.leaves(torch.float32)
    result = outputs(case.call(leaves, backend=backend))[-1]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients = torch.autograd.grad(result.square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.square().sum() for gradient in gradients).backward()
