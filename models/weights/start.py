"""The weights that a training starts from: those of another run, by name."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..denoisers.lora import TABLE

_log = logging.getLogger(__name__)
# Parameters that are a function of the grid and are not trained.
POSITIONS = "pos_embed"


def start_from(model: nn.Module, checkpoint: Checkpoint, classes: list[str], *, rows_train: bool = True) -> None:
    """Copy the averaged weights of a checkpoint into a fresh model.

    What belongs to the data is made anew where the data differs, and said: the rows of classes that the checkpoint does
    not have by name, and positions that are not trained, for another size or length.

    Raises:
        ValueError: any other tensor that is missing, unknown or of another shape; nothing is copied then.
    """
    own, weights = model.state_dict(), dict(checkpoint.ema)
    notes = []
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = POSITIONS in own and POSITIONS in weights and POSITIONS not in trained
    if frozen and own[POSITIONS].shape != weights[POSITIONS].shape:
        before, now = weights[POSITIONS].shape[1], own[POSITIONS].shape[1]
        notes.append(f"the positions of {now} tokens are made anew; the weights had {before}")
        weights[POSITIONS] = own[POSITIONS]
    tables = [values[TABLE].shape[1:] for values in (own, weights) if TABLE in values]
    if len(tables) == 2 and tables[0] == tables[1] and classes != checkpoint.classes:
        weights[TABLE], fresh = _rows(own[TABLE], weights[TABLE], classes, checkpoint.classes)
        if fresh and not rows_train:
            raise ValueError(
                f"lora.classes is False, but init has no class {', '.join(fresh[:5])}: with lora.rank their rows stay "
                "random, so it must be True"
            )
        notes.append(f"the rows of {len(fresh)} of {len(classes)} classes are fresh: {', '.join(fresh[:5])}")
    channels = checkpoint.config.get("channels"), getattr(getattr(model, "config", None), "channels", None)
    if None not in channels and channels[0] != channels[1]:
        raise ValueError(
            f"init does not fit the data: its model takes {channels[0]} channels, the data have {channels[1]}; pixels "
            "become latents by models.precompute"
        )
    if (TABLE in own) != (TABLE in weights):
        raise ValueError(
            f"init does not fit the data: its model has {len(checkpoint.classes)} classes, the data {len(classes)}; "
            "each sub-folder of clips is a class"
        )
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
    if wrong:
        raise ValueError(
            f"init does not fit the model: {len(wrong)} tensors are missing, unknown or of another shape, such as "
            f"{', '.join(wrong[:5])}"
        )
    model.load_state_dict(weights)
    for note in notes:
        _log.warning("%s", note)


def _rows(own: Tensor, weights: Tensor, classes: list[str], before: list[str]) -> tuple[Tensor, list[str]]:
    """The table of classes, its rows taken by name, the last by its place; and the classes that have none."""
    table, fresh = own.clone(), []
    with torch.no_grad():
        for number, name in enumerate(classes):
            if name in before:
                table[number] = weights[before.index(name)]
            else:
                fresh.append(name)
        table[-1] = weights[-1]
    return table, fresh
