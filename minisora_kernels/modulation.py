"""Row groups: how shift, scale and gate with R rows belong to N tokens. The row of token n is ``n // (N // R)``."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_FLOATS = FLOATS[:3]


def check_tokens(op: str, name: str, x: Tensor, like: Tensor | None = None) -> None:
    """``x`` must be a floating-point ``[B, N, D]``, of the shape and device of ``like`` if that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}; it may be float16, bfloat16, float32 or float64")
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must be [B, N, D], got shape {tuple(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must have x's shape {tuple(like.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, x is on {like.device}; they must be on one device")


def rows(op: str, name: str, parameter: Tensor, x: Tensor) -> Tensor:
    """``parameter`` as ``[B, R, D]``: ``[B, D]`` is one row a sample; R must divide x's number of tokens.

    A view if the stride over D is 1, as in a chunk of a projection; else a copy.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(parameter).__name__}")
    if parameter.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {parameter.dtype}; it may be float16, bfloat16, float32 or float64")
    if parameter.device != x.device:
        raise ValueError(f"{op}: {name} is on {parameter.device}, x is on {x.device}; they must be on one device")
    batch, tokens, width = x.shape
    if parameter.dim() == 2:
        parameter = parameter.unsqueeze(1)
    if parameter.dim() != 3 or parameter.shape[0] != batch or parameter.shape[2] != width:
        raise ValueError(
            f"{op}: {name} has shape {tuple(parameter.shape)}; it may be [B, D] or [B, R, D] with B = {batch}, "
            f"D = {width}"
        )
    r = parameter.shape[1]
    if r == 0 or tokens % r:
        raise ValueError(f"{op}: {name} has {r} rows, which do not divide the {tokens} tokens of x")
    return parameter if parameter.stride(2) == 1 else parameter.contiguous()


def spread(x: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """``x [B, N, D]`` as ``[B, R, N/R, D]`` beside ``parameter [B, R, D]`` as ``[B, R, 1, D]``: they broadcast."""
    r = parameter.shape[1]
    return x.unflatten(1, (r, x.shape[1] // r)), parameter.unsqueeze(2)


def affine(op: str, name: str, weight: Tensor | None, x: Tensor) -> Tensor | None:
    """The affine parameter ``[D]`` of a norm, dense."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {weight.dtype}; it may be float16, bfloat16, float32 or float64")
    if weight.shape != x.shape[2:]:
        raise ValueError(f"{op}: {name} has shape {tuple(weight.shape)}; it must be [D] with D = {x.shape[2]}")
    if weight.device != x.device:
        raise ValueError(f"{op}: {name} is on {weight.device}, x is on {x.device}; they must be on one device")
    return weight.contiguous()


def check_norm(op: str, norm: str, bias: Tensor | None) -> None:
    if norm not in ("layer", "rms"):
        raise ValueError(f"{op}: norm is {norm!r}; it may be 'layer' or 'rms'")
    if norm == "rms" and bias is not None:
        raise ValueError(f"{op}: bias was given with norm='rms'; an RMS norm has no bias")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a Linear fed by the op works in: autocast's inside autocast, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def kernel_refusal(**tensors: Tensor | None) -> str | None:
    """Why a kernel that computes in fp32 cannot take these tensors, by name."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in KERNEL_FLOATS:
            return f"{name} has dtype {tensor.dtype}; the kernels take float16, bfloat16 and float32"
    return None
