"""Batch norm over the samples of all ranks; torch's own, ``SyncBatchNorm``, runs on GPUs only."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .draws import Share, current


class _Mean(torch.autograd.Function):
    """The mean of the values of the ranks; the gradient of each is the mean of the gradients of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:
        ctx.share = share
        total = x / share.ranks
        dist.all_reduce(total, group=share.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Mean.forward(ctx, gradient, ctx.share), None


def batch_norm(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """``norm(x)`` of ``x [N, C]``, in training with the mean and the variance over the rows of all ranks.

        y = (x - mean) / sqrt(variance + eps) * weight + bias

    Every rank has as many rows. Statistics are float32; running ones are updated as torch does.
    """
    share = current()
    if share.ranks == 1 or not norm.training:
        return norm(x)
    rows = x.float()
    mean = cast(Tensor, _Mean.apply(rows.mean(0), share))
    centred = rows - mean
    variance = cast(Tensor, _Mean.apply(centred.square().mean(0), share))
    count = len(rows) * share.ranks
    for running, found in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
        cast(Tensor, running).lerp_(found.detach(), cast(float, norm.momentum))
    cast(Tensor, norm.num_batches_tracked).add_(1)
    return ((centred * (variance + norm.eps).rsqrt()) * norm.weight + norm.bias).to(x.dtype)
