"""What tests of the pass share: a model or function in eager, fused and in float64, held together by the one rule."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import minisora_kernels as mk
from minisora_kernels.testing import assert_as_accurate


class Function(nn.Module):
    """A function as a module, for ``fuse``."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def counts(sites: Iterable[Any]) -> dict[str, int]:
    """Number of served sites per op."""
    return dict(Counter(site.op for site in sites if site.backend))


def reasons(sites: Iterable[Any]) -> set[str]:
    return {site.reason for site in sites if not site.backend}


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Random weights in place of zeros, which would leave most gradients 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(noise + (1 if parameter.dim() == 1 and parameter.data.eq(1).all() else 0))


def run(model: nn.Module, inputs: dict[str, Any], call: Callable[..., Any]) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter and every input that needs one."""
    fresh = {
        name: each.detach().clone().requires_grad_(each.requires_grad) if isinstance(each, Tensor) else each
        for name, each in inputs.items()
    }
    model.zero_grad(set_to_none=True)
    out = call(model, **fresh)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    (out * weights).sum().backward()
    found = {"output": out.detach()}
    named = [*model.named_parameters(), *((name, each) for name, each in fresh.items() if isinstance(each, Tensor))]
    return found | {f"d{name}": each.grad for name, each in named if each.grad is not None}


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As ``from_pretrained`` casts: what the model says it keeps in float32 stays."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def in_double(model: nn.Module) -> nn.Module:
    """A copy in float64. Some models make float32 of a time, whatever their dtype: their Linears cast it."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    return double


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: each.detach().double().requires_grad_(each.requires_grad)
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for name, each in inputs.items()
    }


def first_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def drawn(inputs: dict[str, Any], draw: int) -> dict[str, Any]:
    """Inputs of another draw; the first is the one given."""
    generator = torch.Generator().manual_seed(draw)
    return {
        name: torch.randn(each.shape, generator=generator).to(each.dtype).requires_grad_()
        if draw and isinstance(each, Tensor) and each.requires_grad
        else each
        for name, each in inputs.items()
    }


def pooled(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The numbers of all draws, and of all blocks for a parameter: the error of a few numbers is a matter of luck."""
    pools: dict[str, list[Tensor]] = {}
    for found in runs:
        for name, each in found.items():
            pools.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(each.flatten())
    return {name: torch.cat(each) for name, each in pools.items()}


def check(
    model: nn.Module,
    inputs: dict[str, Any],
    call: Callable[..., Any] | None = None,
    draws: int = 1,
    whole: bool = False,
    **options: Any,
) -> Any:
    """Hold the fused model against eager and float64, in the output and every gradient.

    Args:
        model: What is fused.
        inputs: By name; those that require a gradient are drawn anew for each draw.
        call: Calls the model.
        draws: How often it is run; the numbers are judged together.
        whole: Whether it is a whole model, of which there are hundreds of gradients.
        options: Those of ``fuse``.

    Returns:
        The handle, undone.
    """
    call = call or (lambda model, **inputs: first_of(model(*inputs.values())))
    before = dict(model.__dict__)
    each = [drawn(inputs, draw) for draw in range(draws)]
    reference = pooled([run(model, one, call) for one in each])
    double = in_double(model)
    exact = pooled([run(double, in_float64(one), call) for one in each])
    with mk.fuse(model, **{"backend": "cpu", **options}) as fused:
        kernel = pooled([run(model, one, call) for one in each])
    assert dict(model.__dict__) == before
    assert kernel.keys() == reference.keys() == exact.keys()
    compare_models(kernel, reference, exact) if whole else compare(kernel, reference, exact)
    return fused


def compare(kernel: dict[str, Tensor], reference: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Each tensor by the rule."""
    largest = max(each.abs().max().item() for name, each in exact.items() if name != "output")
    for name, values in kernel.items():
        if name != "output" and exact[name].abs().max() < 1e-12 * largest:
            # A gradient that is 0 but for rounding, as that of a bias of keys: it has no relative accuracy.
            bound = 2 * reference[name].abs().max() + torch.finfo(values.dtype).eps * largest
            assert values.abs().max() <= bound, name
        else:
            assert_as_accurate(name, values, reference[name], exact[name])


def compare_models(kernel: dict[str, Tensor], reference: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """As the benches compare models: of hundreds of gradients one may miss the rule by chance.

    The rule holds the output, and all gradients of a dtype together, each scaled to about the same size. Each gradient
    alone must compute the same thing: what is neither as near as eager is, but for a factor of 8, nor within sqrt(eps)
    in the root mean square, is wrong.
    """
    assert_as_accurate("output", kernel["output"], reference["output"], exact["output"])
    together: dict[torch.dtype, list[list[Tensor]]] = {}
    largest = max(each.abs().max().item() for name, each in exact.items() if name != "output")
    for name in kernel.keys() - {"output"}:
        tensors = [each[name] for each in (kernel, reference, exact)]
        ours, theirs, scale = (
            each.square().mean().sqrt().item()
            for each in (tensors[0].double() - exact[name], tensors[1].double() - exact[name], exact[name])
        )
        eps = torch.finfo(tensors[0].dtype).eps
        assert ours <= max(8 * theirs, eps**0.5 * scale), f"{name}: {ours:.1e} against {theirs:.1e}, of {scale:.1e}"
        size = exact[name].abs().max().item()
        size = size if size > 1e-12 * largest else largest  # 0 but for rounding
        unit = 2.0 ** -round(math.log2(size))  # a power of two: exact in any dtype
        together.setdefault(tensors[0].dtype, []).append([each * unit for each in tensors])
    for dtype, parts in together.items():
        assert_as_accurate(f"all gradients, {dtype}", *(torch.cat(part) for part in zip(*parts, strict=True)))
