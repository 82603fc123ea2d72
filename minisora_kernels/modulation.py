"""Row groups: shift, scale and gate have R rows for N tokens.

Token n reads row ``n // (N // R)``, or the row that an index names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from .checks import check_tensor, kernel_refusal

# The widest token that Triton's kernels take: they keep one in the registers of a program, of 512 threads at most, and
# a thread has room for 24 columns beside its sums. See triton/_rows.py.
TRITON_WIDEST = 8192

Norm = Literal["layer", "rms"]

# The attribute of a result of a norm.
MADE_OF = "_minisora_made_of"


def triton_refusal(x: Tensor, **tensors: Tensor | None) -> str | None:
    """Why Triton's kernels cannot take tokens ``x [B, N, D]`` and what goes with them, by name."""
    if x.shape[-1] > TRITON_WIDEST:
        return f"D is {x.shape[-1]}; Triton's kernels keep a token in registers and take D up to {TRITON_WIDEST}"
    return kernel_refusal(x=x, **tensors)


def check_tokens(op: str, name: str, x: Tensor, like: Tensor | None = None) -> None:
    """Raise unless ``x`` is a floating-point ``[B, N, D]``, with the shape and device of ``like`` if there is one."""
    check_tensor(op, name, x, like)
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must be [B, N, D], got shape {tuple(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must have x's shape {tuple(like.shape)}")


@overload
def rows(op: str, name: str, parameter: None, x: Tensor, by_index: bool = False) -> None: ...
@overload
def rows(op: str, name: str, parameter: Tensor, x: Tensor, by_index: bool = False) -> Tensor: ...
@overload
def rows(op: str, name: str, parameter: Tensor | None, x: Tensor, by_index: bool = False) -> Tensor | None: ...
def rows(op: str, name: str, parameter: Tensor | None, x: Tensor, by_index: bool = False) -> Tensor | None:
    """``parameter`` as ``[B, R, D]``, or None. ``[B, D]`` has one row per sample.

    R must divide x's number of tokens, unless tokens find their rows ``by_index``. B may be 1: all samples share the
    rows. The result is a view if the stride over D is 1, as in a chunk of a projection. Otherwise it is a copy.
    """
    if parameter is None:
        return None
    check_tensor(op, name, parameter, x)
    if parameter.dim() == 2:
        parameter = parameter.unsqueeze(1)
    batch, tokens, width = x.shape
    shape = parameter.shape
    if len(shape) != 3 or (shape[0] != batch and shape[0] != 1) or shape[2] != width:
        raise ValueError(
            f"{op}: {name} has shape {tuple(shape)}; it may be [B, D] or [B, R, D] with B = {batch}, or 1 for all "
            f"samples, and D = {width}"
        )
    r = shape[1]
    if r == 0 and by_index:
        raise ValueError(f"{op}: {name} has no rows; with an index it needs one at least")
    if not by_index and (r == 0 or tokens % r):
        raise ValueError(f"{op}: {name} has {r} rows; the number must divide the {tokens} tokens of x")
    if shape[0] != batch:
        parameter = parameter.expand(batch, r, width)
    return parameter if parameter.stride(2) == 1 else parameter.contiguous()


def row_index(op: str, index: Tensor | None, x: Tensor, **parameters: Tensor | None) -> Tensor | None:
    """``index [N]`` or ``[B, N]`` as int64: the row of each token in ``parameters``, which :func:`rows` made.

    Looks at the numbers on a CPU alone, and where they are there: not in a trace.
    """
    if index is None:
        return None
    if not isinstance(index, Tensor):
        raise TypeError(f"{op}: index must be a tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: index has dtype {index.dtype}; it may be int64 or int32")
    if index.device != x.device:
        raise ValueError(f"{op}: index is on {index.device}, x is on {x.device}; they must be on one device")
    batch, tokens, _ = x.shape
    if tuple(index.shape) not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"{op}: index has shape {tuple(index.shape)}; it may be [N] or [B, N] with B = {batch} and N = {tokens}"
        )
    counts = {name: parameter.shape[1] for name, parameter in parameters.items() if parameter is not None}
    if not counts:
        raise ValueError(f"{op}: index needs {' or '.join(parameters)}, whose rows it names")
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{op}: with an index all must have the same number of rows; it is {numbers}")
    known = index.is_cpu and type(index) is Tensor and index.numel() > 0
    if known and not is_compiling() and not torch._C._are_functorch_transforms_active():
        least, most = (int(end) for end in torch.aminmax(index))
        last = next(iter(counts.values())) - 1
        if least < 0 or most > last:
            raise ValueError(f"{op}: index has {least if least < 0 else most}; it may be from 0 to {last}")
    return index.to(torch.int64).contiguous()


def row_of_each(parameter: Tensor | None, index: Tensor | None) -> Tensor | None:
    """``parameter [B, R, D]`` gathered as ``[B, N, D]``; as it is without an index, or without tokens."""
    if parameter is None or index is None or index.shape[-1] == 0:
        return parameter
    if index.dim() == 1:
        return parameter.index_select(1, index)
    return parameter.gather(1, index.unsqueeze(2).expand(-1, -1, parameter.shape[2]))


def row_gradient(parameter: Tensor | None, needed: bool) -> tuple[torch.dtype | None, int]:
    """What asks a raw op for the gradient of ``parameter [B, R, D]``: its dtype and R, or None and 0."""
    return (parameter.dtype, parameter.shape[1]) if needed and parameter is not None else (None, 0)


def gradient_dtype(parameter: Tensor | None, needed: bool) -> torch.dtype | None:
    """What asks a raw op for the gradient of ``parameter``: its dtype, or None."""
    return parameter.dtype if needed and parameter is not None else None


def asked_for(needs: Sequence[bool], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asked for, None for the others."""
    return tuple([gradient if need else None for need, gradient in zip(needs, gradients, strict=True)])


def row_sums(dy: Tensor, rows: int) -> Tensor:
    """The sums of ``dy [B, N, D]`` over the tokens of each of ``rows`` rows, in fp32."""
    return dy.unflatten(1, (rows, dy.shape[1] // rows)).sum(2, dtype=torch.float32)


def offset_gradients(
    dy: Tensor, scale: Tensor | None, shift: tuple[torch.dtype | None, int], bias: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """dshift and dbias of a norm where they alone are asked for: sums of ``dy``, which need no tokens."""
    dshift = None if shift[0] is None else row_sums(dy, shift[1]).to(shift[0])
    if bias is None:
        return dshift, None
    sums = row_sums(dy, 1 if scale is None else scale.shape[1])
    return dshift, (sums if scale is None else sums * (1 + scale.float())).sum((0, 1)).to(bias)


def broadcast(x: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """``x [B, N, D]`` as ``[B, R, N/R, D]`` and ``parameter [B, R, D]`` as ``[B, R, 1, D]``, which broadcast."""
    r = parameter.shape[1]
    return x.unflatten(1, (r, x.shape[1] // r)), parameter.unsqueeze(2)


def affine(op: str, name: str, weight: Tensor | None, x: Tensor) -> Tensor | None:
    """The affine parameter ``[D]`` of a norm, checked and contiguous."""
    if weight is None:
        return None
    check_tensor(op, name, weight, x)
    if weight.shape != x.shape[2:]:
        raise ValueError(f"{op}: {name} has shape {tuple(weight.shape)}; it must be [D] with D = {x.shape[2]}")
    return weight.contiguous()


def check_norm(op: str, norm: str, bias: Tensor | None) -> None:
    """Raise unless ``norm`` is a norm of the op, and one that has a bias if there is one."""
    if norm not in ("layer", "rms"):
        raise ValueError(f"{op}: norm is {norm!r}; it may be 'layer' or 'rms'")
    if norm == "rms" and bias is not None:
        raise ValueError(f"{op}: bias must be None with norm='rms', because an RMS norm has no bias")


def identity(tensor: Tensor | None) -> tuple | None:
    """What tells whether another tensor is the same numbers; None where that cannot be told, as of fake tensors."""
    if tensor is None or isinstance(tensor, FakeTensor):
        return None
    try:
        return (tensor.data_ptr(), tensor._version, tensor.numel(), tensor.stride(0))
    except RuntimeError:
        return None


def remember(y: Tensor, made_of: tuple[Tensor | None, ...], norm: str, eps: float) -> None:
    """Note on ``y`` what a norm made it of, as the caller named it, for :func:`.recompute_adaln`."""
    if torch.is_grad_enabled() and not is_compiling():
        setattr(y, MADE_OF, (*map(identity, made_of), norm, eps))


def origin(y: Tensor) -> tuple[Any, ...] | None:
    """What :func:`remember` noted: x, shift, scale, weight and bias by their :func:`identity`, norm and eps."""
    return getattr(y, MADE_OF, None)
