"""Parts of a model that the backward computes again, in place of keeping what they made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minisora_kernels.counters import FLOPS

Checkpointing = bool | Literal["attention", "products"]
"""What of a part is computed again: True for all of it, "attention" for all but attention, "products" for all but
attention and matrix products, whose outputs are kept."""


Keeps = Literal["nothing", "attention", "products"]
"""Outputs that checkpointing keeps all the same."""


def chosen(checkpointing: bool, keeps: Keeps) -> Checkpointing:
    """The options ``checkpointing`` and ``checkpointing_keeps`` as one.

    Raises:
        ValueError: something is kept, and nothing is computed again.
    """
    if keeps == "nothing":
        return checkpointing
    if not checkpointing:
        raise ValueError(f"checkpointing_keeps is {keeps!r}; without checkpointing it must be 'nothing'")
    return keeps


def _policy(kept: str, _: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    # What has a formula is a product or attention, of torch or of this package.
    packet = getattr(op, "overloadpacket", op)
    keeps = packet in FLOPS and (kept == "products" or "attention" in str(packet))
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(part: Callable[..., Any], *arguments: Any, checkpointing: Checkpointing, random: bool = False) -> Any:
    """``part(*arguments)``; the backward computes it again as ``checkpointing`` says, if that is on.

    ``random`` is for a part that draws random numbers, which are drawn alike.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return part(*arguments)
    selective: dict[str, Any] = {}
    if checkpointing is not True:
        policy = functools.partial(_policy, checkpointing)
        selective["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=random, **selective)
