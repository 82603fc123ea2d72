"""Checks that all ops share: type, dtype and device of a tensor, and what the kernels can take."""

from __future__ import annotations

import functools
import math
import numbers
import operator
import re
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import backends

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_FLOATS = FLOATS[:3]
# Of numbers that a trace leaves open.
SYMBOLS = (torch.SymInt, torch.SymFloat)


def check_tensor(op: str, name: str, tensor: object, like: Tensor | None = None, like_name: str = "x") -> None:
    """Raise unless ``tensor`` is a dense floating-point tensor, and on the device of ``like`` if there is one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {_layout(tensor)}")
    if not is_compiling() and tensor._is_zerotensor():
        raise TypeError(f"{op}: {name} must be a dense tensor, got torch's zero tensor, which has no memory")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it may be float16, bfloat16, float32 or float64")
    if like is not None and not (tensor.is_cpu and like.is_cpu) and tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, {like_name} is on {like.device}; they must be on one device"
        )


def _layout(tensor: Tensor) -> str:
    return "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"


def number(op: str, name: str, value: Any, least: float = -math.inf) -> Any:
    """``value``, a finite number that is at least ``least``.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or less.
    """
    if isinstance(value, SYMBOLS):
        return value
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{op}: {name} is {value!r}; it must be a number")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{op}: {name} is too large for a float; it must be finite") from None
    if not least <= value < math.inf or value == -math.inf:  # NaN too
        raise ValueError(f"{op}: {name} is {value}; it must be finite{'' if least < 0 else f' and at least {least}'}")
    return value


def whole(op: str, name: str, value: Any) -> Any:
    """``value``, a whole number.

    Raises:
        TypeError: it is none.
    """
    if type(value) is int:
        return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}; it must be a whole number") from None


def sizes(op: str, name: str, value: Any) -> tuple[int, ...]:
    """``value``, some whole numbers.

    Raises:
        TypeError: it is something else.
    """
    try:
        items = tuple(value)
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}; it must be a sequence of whole numbers") from None
    for item in items:
        if type(item) is not int:
            return tuple([whole(op, name, item) for item in items])
    return items


def check_flag(op: str, name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}; it must be True or False")


def as_matrix(x: Tensor) -> Tensor:
    """``x [..., D]`` as ``[tokens, D]``; D may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_weight(op: str, name: str, weight: Any, x: Tensor, layout: str, columns: int) -> None:
    """Raise unless ``weight`` is a matrix beside x with so many columns; ``layout`` says what it must be."""
    check_tensor(op, name, weight, x)
    if weight.dim() != 2 or weight.shape[1] != columns:
        meaning = layout.rpartition(", ")[2].rstrip("]")
        raise ValueError(
            f"{op}: {name} has shape {tuple(weight.shape)}; it must be {layout} with {meaning} = {columns}"
        )


def check_bias(op: str, name: str, bias: Any, x: Tensor, size: int) -> None:
    """Raise unless ``bias`` is None, or a vector beside x of that size."""
    if bias is None:
        return
    check_tensor(op, name, bias, x)
    if bias.dim() != 1 or bias.shape[0] != size:
        raise ValueError(f"{op}: {name} has shape {tuple(bias.shape)}; it must be [{size}]")


def kernel_refusal(**tensors: Tensor | None) -> str | None:
    """Return why a kernel that computes in fp32 cannot take these tensors, or None if it can."""
    for tensor in tensors.values():
        if tensor is not None and tensor.dtype == torch.float64:  # all others are checked, see FLOATS
            name = next(name for name, each in tensors.items() if each is tensor)
            return f"{name} has dtype {tensor.dtype}; the kernels take float16, bfloat16 and float32"
    return None


def covered(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, spelled as in TORCH_CUDA_ARCH_LIST, runs on a GPU of that capability.

    Machine code runs on its own generation, on GPUs at least as new; ``9.0a`` on its very own; PTX on any newer GPU.
    """
    for entry in re.split("[; ]+", architectures.strip("; ")):
        found = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", entry)
        if found is None:
            continue
        built = int(found[1]), int(found[2])
        same_generation = built[0] == capability[0] and built <= capability
        if built == capability or (not found[3] and (same_generation or (found[4] and built <= capability))):
            return True
    return False


@functools.cache
def _uncovered(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    built = backends.build_record().get("cuda", {}).get("architectures", "")
    if covered(built, capability):
        return None
    number = ".".join(map(str, capability))
    return (
        f"the library has code for compute capabilities {built or 'that its build did not record'}, this GPU has "
        f"{number}: build it anew with TORCH_CUDA_ARCH_LIST={number}"
    )


def architecture_refusal(index: int | None) -> str | None:
    """Why the CUDA library has no code for the GPU of that index, or None if it has; None too for no GPU."""
    return None if index is None else _uncovered(index)


# A constant while torch.compile traces: what assume_constant_result does, whose own import of Dynamo takes seconds.
setattr(architecture_refusal, "_dynamo_marked_constant", True)  # noqa: B010 - no attribute that mypy knows


def gradient_refusal(**tensors: Tensor | None) -> str | None:
    """Return why a kernel without a backward cannot take these tensors, or None if it can."""
    if not is_compiling() and forward_ad._current_level >= 0:
        return "it has no forward mode AD"
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                return f"{name} requires a gradient; the kernels have no backward"
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a Linear that reads x works: autocast's inside autocast, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def beside(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``, as float32 if it and ``dtype`` are the two 16-bit dtypes: no kernel is compiled for both."""
    if tensor.dtype != dtype and tensor.itemsize == dtype.itemsize == 2:
        return tensor.float()
    return tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``. Where it has that already, this takes a fifth of the time of ``Tensor.to``."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def linear_dtype(op: str, x: Tensor, **parameters: Tensor | None) -> torch.dtype:
    """The dtype of a Linear, of weights that it multiplies with x.

    Raises:
        TypeError: a parameter of another dtype than x, outside autocast, which would cast it.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {parameter.dtype}, x has {x.dtype}; outside autocast they must be the same"
            )
    return x.dtype
