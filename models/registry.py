"""The systems: which models there are, by name, and the objective that each was published with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from .autoencoders import tokenizer, vqgan
from .autoencoders.tokenizer import CausalTokenizer, TokenizerConfig, TokenizerSettings
from .autoencoders.vqgan import VQGAN, VQGANConfig, VQGANSettings
from .denoisers import cascade, dit, stdit, walt
from .denoisers.cascade import Cascade
from .denoisers.cascade_config import CascadeConfig, CascadeSettings
from .denoisers.dit import DiT, DiTConfig, DiTSettings
from .denoisers.stdit import STDiT, STDiTConfig, STDiTSettings
from .denoisers.walt import WALT
from .denoisers.walt_config import WALTConfig, WALTSettings
from .objectives.ddpm import DDPM
from .objectives.flow import FlowMatching
from .objectives.logsnr import LogSNR
from .objectives.reconstruction import Reconstruction
from .protocols import Model, System

Settings = DiTSettings | STDiTSettings | WALTSettings | CascadeSettings | TokenizerSettings | VQGANSettings
Config = DiTConfig | STDiTConfig | WALTConfig | CascadeConfig | TokenizerConfig | VQGANConfig
NoiseObjective = FlowMatching | DDPM | LogSNR
Objective = NoiseObjective | Reconstruction


class Family(NamedTuple):
    """The settings of a kind of model, all that it is built from, the model, and its named systems."""

    settings: type[Settings]
    config: type[Config]
    model: type[Model]
    systems: Mapping[str, System]


FAMILIES = {
    family.settings.name: family
    for family in (
        Family(DiTSettings, DiTConfig, DiT, dit.systems()),
        Family(STDiTSettings, STDiTConfig, STDiT, stdit.systems()),
        Family(WALTSettings, WALTConfig, WALT, walt.systems()),
        Family(CascadeSettings, CascadeConfig, Cascade, cascade.systems()),
        Family(TokenizerSettings, TokenizerConfig, CausalTokenizer, tokenizer.systems()),
        Family(VQGANSettings, VQGANConfig, VQGAN, vqgan.systems()),
    )
}
OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (FlowMatching, DDPM, LogSNR, Reconstruction)}
SYSTEMS = {name: system for family in FAMILIES.values() for name, system in family.systems.items()}


def configure(
    settings: Settings, channels: int, frames: int, size: tuple[int, int], num_classes: int, text_width: int = 0
) -> Config:
    """What the model for data of this shape, with classes or with text of this width, is built from.

    Raises:
        ValueError: settings that do not fit the data, by name.
    """
    if settings.is_image and frames != 1:
        raise ValueError(f"model.patch is {settings.patch}, that of an image model, but data.frames is {frames}, not 1")
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    values |= {"input_size": size if settings.is_image else (frames, *size), "channels": channels}
    config = FAMILIES[settings.name].config
    if text_width:
        if "text_width" not in {item.name for item in dataclasses.fields(config)}:
            raise ValueError(f"model is {settings.name!r}, which takes no text, but text.encoder was given")
        values["text_width"] = text_width
    return config(**values, num_classes=num_classes)


def build(config: Config) -> Any:
    """The model, a subclass of :class:`models.protocols.Model`, with fresh weights."""
    return FAMILIES[config.name].model(config)


def config_from(values: dict[str, Any]) -> Config:
    """A configuration from what ``runtime.plain.as_plain`` and JSON made of it.

    Raises:
        ValueError: of a model that this version does not have, or with values that do not fit.
    """
    values = dict(values)
    name = values.pop("name", None)
    if name not in FAMILIES:
        raise ValueError(f"the model is {name!r}; it may be one of {', '.join(FAMILIES)}")
    try:
        return FAMILIES[name].config(**values)
    except TypeError as error:
        raise ValueError(f"the model {name!r} is not built from these values: {error}") from error
