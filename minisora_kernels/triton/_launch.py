"""Launches whose arguments are worked out once per signature of a call.

A launcher describes the tensors of a call by :func:`signature`, asks its plan, a function that is cached by signatures,
for the :class:`Launch` of every kernel, allocates, and calls them with the tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from math import gcd
from operator import or_
from types import CodeType
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..backends import INTERPRETED

Result = TypeVar("Result")
PLANS = 4096  # kept per function: buckets of many sizes and lengths are some hundreds of signatures

# For every launch: products and sums become fused multiply-adds, the default until Triton 3.10. Bits, and the speed,
# do not change with the version.
FUSED = {"enable_fp_fusion": True}

# Triton's own; another function may stand in its place already when this file is imported.
_LAUNCH = JITFunction.run if JITFunction.run.__module__ == JITFunction.__module__ else None
_DIRECT = torch.version.hip is None
_plans: list[Any] = []


def plan(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a function of signatures, numbers and a device whose results are kept."""
    kept = lru_cache(PLANS)(function)
    _plans.append(kept)
    return kept


def forget_plans() -> None:
    """For whoever changes a constant that plans were made with."""
    for kept in _plans:
        kept.cache_clear()


def architecture() -> int:
    """What Triton compiles for: 90 for sm_90; 0 in the interpreter and for AMD."""
    target = None if INTERPRETED else driver.active.get_current_target()
    return target.arch if target is not None and target.backend == "cuda" else 0


def multiprocessors(device: int) -> int:
    """Of a GPU by its number; 132, an H100's, where there is none."""
    return 132 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


class Like(NamedTuple):
    """What a plan knows of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def signature(tensor: Tensor | None) -> tuple | None:
    """A :class:`Like` in the making: a plain tuple costs half."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


@overload
def dense(name: str, tensor: None) -> None: ...
@overload
def dense(name: str, tensor: tuple) -> Like: ...
def dense(name: str, tensor: tuple | None) -> Like | None:
    """The signature of a tensor that a kernel indexes with no strides.

    Raises:
        ValueError: it has some.
    """
    if tensor is None:
        return None
    like = Like._make(tensor)
    step = 1
    for size, stride in zip(reversed(like.shape), reversed(like.stride), strict=True):
        if size != 1 and stride != step and 0 not in like.shape:
            raise ValueError(f"{name} must be contiguous, got strides {like.stride}")
        step *= size
    return like


class Strides(NamedTuple):
    """Strides in units that a kernel is compiled for, so that it knows how its rows are aligned; see `strides_of`."""

    unit: int
    steps: tuple[int, ...]


def strides_of(**named: Like) -> Strides:
    """Of all axes but the last of tensors ``[..., head_dim]``, in units that are a power of two, 16 at most.

    Triton looks whether a number is a multiple of 16, no further: rows of 72 channels it would read one by one. Axes of
    one place have no stride.

    Raises:
        ValueError: the last axis has one.
    """
    steps: list[int] = []
    for name, like in named.items():
        if like.stride[-1] != 1:
            raise ValueError(f"{name} must have stride 1 over head_dim, got strides {like.stride}")
        places = zip(like.shape[:-1], like.stride[:-1], strict=True)
        steps += [stride if size > 1 else 0 for size, stride in places]
    unit = gcd(16, *steps)
    return Strides(unit, tuple(step // unit for step in steps))


@overload
def empty_gradient(tensor: Tensor) -> Tensor: ...
@overload
def empty_gradient(tensor: None) -> None: ...
def empty_gradient(tensor: Tensor | None) -> Tensor | None:
    """For the gradient of a tensor that may be strided: contiguous. (``new_empty`` takes twice as long.)"""
    return None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def give_key(kernel: Any) -> None:
    """Give a kernel its key in Triton's cache of compiled kernels, after the helpers that it calls.

    Triton leaves the constants of a helper out of its caller's key if the helper has no key yet. The key would then
    depend on what ran before, and another process would compile the kernel again.
    """
    if not isinstance(kernel, JITFunction) or kernel.hash is not None:
        return
    for name in _names(kernel.fn.__code__):
        helper = kernel.fn.__globals__.get(name)
        if helper is not kernel:
            give_key(helper)
    _ = kernel.cache_key


def _names(code: CodeType) -> Iterator[str]:
    """The names that code looks up, in its comprehensions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class Launch:
    """A kernel, its grid, and all of its arguments but the tensors, which come first; for one device.

    The first launch goes through Triton, which compiles the kernel for the dtypes, for what it sees in the numbers, and
    for addresses that are multiples of 16 or not. With the next only the addresses may differ, so they go straight to
    the compiled kernel, on whatever stream is current. Through Triton goes what is not aligned, what is interpreted,
    and every launch while another function stands in the place of Triton's (bench/aot.py only compiles), or for AMD,
    where the size of a tensor's memory, too, decides what Triton compiles.
    """

    __slots__ = ("_direct", "_grid", "_kernel", "_numbers", "_options")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **options: int) -> None:
        give_key(kernel)
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._options = {**FUSED, **options}
        self._direct: Callable[..., Any] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if JITFunction.run is not _LAUNCH or not _DIRECT or not isinstance(self._kernel, JITFunction):
            self._kernel[self._grid](*tensors, *self._numbers, **self._options)
            return
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if reduce(or_, addresses) % 16:
            self._kernel[self._grid](*tensors, *self._numbers, **self._options)
        elif self._direct is not None:
            self._direct(*addresses, *self._numbers)
        else:
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._options)
            self._direct = compiled[(*self._grid, 1, 1)[:3]]
