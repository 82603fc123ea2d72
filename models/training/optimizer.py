"""AdamW beside the GPU, the learning rate over the steps, and the exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..parallel.shards import local
from .config import TrainConfig


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments are in the CPU's memory, with a copy of the weights, and which steps there.

    Gradients are copied from the device, and the new weights to it. The state is that of ``torch.optim.AdamW``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        self._trained = list(parameters)
        super().__init__([nn.Parameter(own.detach().to("cpu", copy=True)) for own in self._trained], **options)

    def step(self, closure: Any = None) -> Any:
        both = list(zip(self._trained, self.param_groups[0]["params"], strict=True))
        for own, copied in both:
            copied.grad = None if own.grad is None else own.grad.to("cpu")
        result = super().step(closure)
        with torch.no_grad():
            for own, copied in both:
                own.copy_(copied)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for own in self._trained:
            own.grad = None


def check_offload(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError where there is nothing to offload from."""
    if config.optimizer.offload and device.type == "cpu":
        raise ValueError("optimizer.offload is True; on device 'cpu' it must be False: all is in its memory already")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of 0-based ``step``: linear warm-up, then constant, or half a cosine or a line to 0 after the last step."""
    optimizer = config.optimizer
    if step < optimizer.warmup:
        return optimizer.learning_rate * (step + 1) / (optimizer.warmup + 1)
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    progress = (step - optimizer.warmup) / max(config.steps - optimizer.warmup, 1)
    share = 1 - progress if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.learning_rate * share


def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """``ema = decay * ema + (1 - decay) * model`` in place, with less decay in the first steps.

    Of the parameters that are trained, and of the buffers that training changes and a state keeps, as a batch norm's
    statistics.
    """
    update = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    both = zip(ema.parameters(), model.parameters(), strict=True)
    averages, trained = zip(*((average, own) for average, own in both if own.requires_grad), strict=True)
    update([local(average) for average in averages], [local(own) for own in trained], step)
    if statistics(ema):
        update(statistics(ema), statistics(model), step)


def statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that training changes and a state keeps."""
    kept = model.state_dict()
    return [buffer for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point()]
