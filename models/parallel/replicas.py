"""The loss on all ranks: each computes that of its own samples, and gradients are the mean over the ranks.

Without shards every rank has the whole model, and DDP takes the mean; else FSDP2 does (``shards.py``).
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .ranks import Ranks
from .shards import is_sharded
from .shards import without_sums as without_sums_of


class Loss(nn.Module):
    """The loss of a model as a module, so that DDP sees one forward, however often the loss calls the model."""

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *arguments: Any) -> Tensor:
        """``objective.loss(model, *arguments)``."""
        return self.objective.loss(self.model, *arguments)


def replicas(loss: Loss, ranks: Ranks) -> nn.Module:
    """The loss whose backward leaves the mean of the ranks' gradients; as it is for one process, and for shards."""
    if ranks.size == 1 or ranks.sharded:
        return loss
    return DistributedDataParallel(
        loss,
        gradient_as_bucket_view=True,
        # A discriminator that joins later has no gradient before.
        find_unused_parameters=getattr(loss.objective, "adversarial_start", 0) > 0,
    )


def without_sums(loss: Any) -> contextlib.AbstractContextManager[None]:
    """In the block a backward adds to this rank's gradients, which the next one outside takes the mean of."""
    if isinstance(loss, DistributedDataParallel):
        return loss.no_sync()
    return without_sums_of(loss.model) if is_sharded(loss.model) else contextlib.nullcontext()
