"""The weights that a training starts from: those of another run, by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..denoisers.lora import TABLE
from ..denoisers.walt_config import WALTConfig
from ..denoisers.walt_resize import resize
from ..registry import config_from

_log = logging.getLogger(__name__)
# Parameters that are a function of the grid, where they are not trained: of all tokens, and of the frames.
POSITIONS, FRAMES = "pos_embed", ("temp_embed", "pos_embed_temporal")


def start_from(model: nn.Module, checkpoint: Checkpoint, classes: list[str], *, rows_train: bool = True) -> None:
    """Copy the averaged weights of a checkpoint into a fresh model.

    What belongs to the data is made to fit where the data differs, and said: the rows of classes that the checkpoint
    does not have by name are fresh, and positions for another size or length are interpolated.

    Raises:
        ValueError: any other tensor that is missing, unknown or of another shape; nothing is copied then.
    """
    own, weights = model.state_dict(), dict(checkpoint.ema)
    notes = [*_fit_positions(model, own, weights, checkpoint)]
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


def _fit_positions(
    model: nn.Module, own: Mapping[str, Tensor], weights: dict[str, Tensor], checkpoint: Checkpoint
) -> list[str]:
    """Bring positions in ``weights`` to the grid of the model, in place; what was done, in words."""
    config, before = getattr(model, "config", None), config_from(checkpoint.config)
    if type(config) is not type(before):
        return []
    if isinstance(before, WALTConfig):
        sizes = {name: getattr(config, name) for name in ("input_size", "spatial_window", "spatiotemporal_window")}
        resized = dataclasses.replace(before, **sizes)
        weights |= {} if resized == before else resize(weights, before, resized)
        return [] if resized == before else [_fitted(before.grid, resized.grid)]
    if before.grid == config.grid:
        return []
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = [name for name in (POSITIONS, *FRAMES) if name in own and name in weights and name not in trained]
    for name in frozen:
        if own[name].shape[-1] == weights[name].shape[-1]:
            weights[name] = (_places if name == POSITIONS else _frames)(
                own[name], weights[name], before.grid, config.grid
            )
    return [_fitted(before.grid, config.grid)] if frozen else []


def _fitted(before: tuple[int, ...], now: tuple[int, ...]) -> str:
    sizes = [" x ".join(map(str, grid)) for grid in (now, before)]
    return f"the positions are fitted to {sizes[0]} tokens; the weights had {sizes[1]}"


def _places(own: Tensor, weights: Tensor, before: tuple[int, ...], now: tuple[int, ...]) -> Tensor:
    """Those of the first frame, between the centres of its tokens, and how those of later frames differ from it."""
    first = weights.unflatten(1, before)[0, 0].movedim(-1, 0)[None]
    if before[1:] != now[1:]:
        first = F.interpolate(first.float(), now[1:], mode="bilinear")
    fresh = own.unflatten(1, now)
    return (first[0].movedim(0, -1)[None, None].to(own) + fresh - fresh[:, :1]).flatten(1, 3)


def _frames(own: Tensor, weights: Tensor, before: tuple[int, ...], now: tuple[int, ...]) -> Tensor:
    """The model's own, which go on where those of the weights end; positions that are scaled are interpolated."""
    common = min(before[0], now[0])
    if torch.allclose(own[:, :common], weights[:, :common].to(own), atol=1e-3):
        return own
    return F.interpolate(weights.to(own).transpose(1, 2), now[0], mode="linear").transpose(1, 2)


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
