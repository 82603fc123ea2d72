"""The systems: which models there are, by name, and the objective that each was published with."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import nn

from .autoencoders.tokenizer import CausalTokenizer, TokenizerConfig, TokenizerSettings
from .autoencoders.vqgan import VQGAN, VQGANConfig, VQGANSettings
from .denoisers.cascade import Cascade
from .denoisers.cascade_config import SIZES as CASCADE_SIZES
from .denoisers.cascade_config import CascadeConfig, CascadeSettings, with_time
from .denoisers.dit import SIZES, DiT, DiTConfig, DiTSettings
from .denoisers.stdit import STDiT, STDiTConfig, STDiTSettings
from .denoisers.walt import WALT
from .denoisers.walt_config import WALTConfig, WALTSettings
from .objectives.ddpm import DDPM
from .objectives.flow import FlowMatching
from .objectives.logsnr import LogSNR
from .objectives.reconstruction import Reconstruction

Settings = DiTSettings | STDiTSettings | WALTSettings | CascadeSettings | TokenizerSettings | VQGANSettings
Config = DiTConfig | STDiTConfig | WALTConfig | CascadeConfig | TokenizerConfig | VQGANConfig
Objective = FlowMatching | DDPM | LogSNR | Reconstruction


class Family(NamedTuple):
    """The settings of a kind of model, all that it is built from, and the model."""

    settings: type[Settings]
    config: type[Config]
    model: type[nn.Module]


FAMILIES = {
    DiTSettings.name: Family(DiTSettings, DiTConfig, DiT),
    STDiTSettings.name: Family(STDiTSettings, STDiTConfig, STDiT),
    WALTSettings.name: Family(WALTSettings, WALTConfig, WALT),
    CascadeSettings.name: Family(CascadeSettings, CascadeConfig, Cascade),
    TokenizerSettings.name: Family(TokenizerSettings, TokenizerConfig, CausalTokenizer),
    VQGANSettings.name: Family(VQGANSettings, VQGANConfig, VQGAN),
}
OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (FlowMatching, DDPM, LogSNR, Reconstruction)}


class System(NamedTuple):
    """A named model with the objective that it was published with."""

    settings: Settings
    objective: Objective


def _systems() -> dict[str, System]:
    systems = {}
    for size, shape in SIZES.items():
        for patch in (2, 4, 8):
            image = DiTSettings(patch=(patch, patch), **shape)
            learned = dataclasses.replace(image, learn_sigma=True)
            systems[f"dit-{size.lower()}/{patch}"] = System(learned, DDPM())
            systems[f"sit-{size.lower()}/{patch}"] = System(image, FlowMatching())
        for patch in ((1, 2, 2), (2, 2, 2)):
            name = f"{size.lower()}/{'x'.join(map(str, patch))}"
            for kind, attention in (("vdit", "joint"), ("latte", "factorized")):
                video = DiTSettings(patch=patch, attention=attention, learn_sigma=True, **shape)
                systems[f"{kind}-{name}"] = System(video, DDPM())
        # Only XL was published; the others have DiT's shapes.
        space_time = STDiTSettings(patch=(1, 2, 2), learn_sigma=True, **shape)
        systems[f"stdit-{size.lower()}/1x2x2"] = System(space_time, DDPM())
    velocity = DDPM(prediction="velocity", zero_snr=True)
    for size in ("L", "XL"):
        systems[f"walt-{size.lower()}"] = System(WALTSettings(**SIZES[size]), velocity)
    systems["walt-tokenizer"] = System(TokenizerSettings(), Reconstruction())
    systems["cascade-a"] = System(VQGANSettings(), Reconstruction(penalty_weight=1.0))
    for name, shape in CASCADE_SIZES.items():
        image = CascadeSettings(**shape)
        objective = LogSNR(sample_shift=2.0 if name.startswith("c-") else 1.0)
        systems[f"cascade-{name}"] = System(image, objective)
        systems[f"cascade-{name}/video"] = System(with_time(image), objective)
    return systems


SYSTEMS = _systems()


def configure(
    settings: Settings, channels: int, frames: int, size: tuple[int, int], num_classes: int, text_width: int = 0
) -> Config:
    """What the model for data of this shape, with classes or with text of this width, is built from.

    Raises:
        ValueError: settings that do not fit the data, by name.
    """
    patch = getattr(settings, "patch", (1, 1, 1))
    if len(patch) == 2 and frames != 1:
        raise ValueError(f"model.patch is {patch}, that of an image model, but data.frames is {frames}, not 1")
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    values |= {"input_size": size if len(patch) == 2 else (frames, *size), "channels": channels}
    config = FAMILIES[settings.name].config
    if text_width:
        if "text_width" not in {item.name for item in dataclasses.fields(config)}:
            raise ValueError(f"model is {settings.name!r}, which takes no text, but text.encoder was given")
        values["text_width"] = text_width
    return config(**values, num_classes=num_classes)


def build(config: Config) -> nn.Module:
    """The model, with fresh weights."""
    return FAMILIES[config.name].model(config)


def config_from(values: dict[str, Any]) -> Config:
    """A configuration from what ``config.as_plain`` and JSON made of it.

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
