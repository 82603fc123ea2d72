"""Low-rank adapters: beside a frozen Linear stands a product of two small matrices, which alone is trained.

    y = W x + b + alpha / rank * B (A x)          A [rank, in], B [out, rank]; B is 0 at first

peft makes the layers. Frozen weights have no gradients, no optimizer state and no average of their own. ``merged`` adds
the product to W, so that what samples or converts a run needs no peft.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..runtime.files import write_whole
from ..runtime.packages import package

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
# The rows of classes.
TABLE = "y_embedder.embedding_table.weight"


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on Linears; they need --init and package peft."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: float = 0.0
    """Factor of the adapters times their rank; 0 takes the rank, so that the factor is 1."""
    targets: tuple[str, ...] = ()
    """Linears that get an adapter, by the end of their names, as `qkv` or `blocks.0.mlp.fc1`; by default all."""
    classes: bool = False
    """Train the rows of classes too, in full. Classes that --init does not have need it."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank!r}; it must be a whole number, at least 0")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be finite and at least 0")
        for name in ("alpha", "targets", "classes") if not self.rank else ():
            if getattr(self, name):
                raise ValueError(f"lora.{name} is {getattr(self, name)}; it goes with lora.rank, which is 0")

    @property
    def lora_alpha(self) -> float:
        """The factor of the adapters times their rank, under peft's name."""
        return self.alpha or self.rank

    @property
    def factor(self) -> float:
        return self.lora_alpha / self.rank


def adapt(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze a model, but for the rows of classes if asked, and put adapters on its Linears, in place.

    Raises:
        ValueError: a target that no Linear has, or a rank that is larger than one of them; peft is not there.
    """
    peft = package("peft")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ends = {target: [name for name in linears if f".{name}".endswith(f".{target}")] for target in config.targets}
    for target, names in ends.items():
        if not names:
            last = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"lora.targets has {target!r}; no Linear's name ends so: they end with {', '.join(last)}")
    if config.classes and TABLE not in dict(model.named_parameters()):
        raise ValueError("lora.classes is True; the model has no classes, so it must be False")
    chosen = list(dict.fromkeys(name for names in ends.values() for name in names)) or list(linears)
    small = min(chosen, key=lambda name: min(linears[name].weight.shape))
    if config.rank > min(linears[small].weight.shape):
        size = list(linears[small].weight.shape)
        raise ValueError(f"lora.rank is {config.rank}; {small} is {size}, so it must be at most {min(size)}")
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules="|".join(map(re.escape, chosen)),
    )
    peft.inject_adapter_in_model(options, model)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)) or (config.classes and name == TABLE))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.cast_input_dtype_enabled = False  # under autocast it would keep its input in float32 as well


def is_adapted(weights: Mapping[str, Any]) -> bool:
    return any(name.endswith(UP) for name in weights)


def merged(weights: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """The weights under the names of the model without adapters, which are added to those that they stand beside."""
    found = {}
    for name, value in weights.items():
        if name.endswith((DOWN, UP)):
            continue
        layer = name.removesuffix(f"{BASE}weight")
        if layer != name and f"{layer}{UP}" in weights:
            product = weights[f"{layer}{UP}"].float() @ weights[f"{layer}{DOWN}"].float()
            value = (value.float() + config.factor * product).to(value.dtype)
        found[name.replace(BASE, ".")] = value
    return found


def write_adapters(folder: Path, weights: Mapping[str, Tensor], config: LoRAConfig) -> None:
    """A new folder with the adapters, as ``peft.PeftModel.from_pretrained`` reads them.

    Raises:
        ValueError: weights without adapters, or a folder that is there already.
    """
    if not is_adapted(weights):
        raise ValueError("these weights have no adapters: they were trained without lora.rank")
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another name")
    if config.classes:
        raise ValueError("these weights were trained with lora.classes: the rows of classes do not go into adapters")
    layers = [name.removesuffix(UP) for name in weights if name.endswith(UP)]
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": value.contiguous()
        for name, value in weights.items()
        if name.endswith((DOWN, UP))
    }
    options = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": layers,
        "bias": "none",
    }
    save = package("safetensors.torch").save
    content = save(tensors, metadata={"format": "pt"})
    part = folder.with_name(f"{folder.name}.tmp")
    part.mkdir(parents=True, exist_ok=True)
    write_whole(part / "adapter_model.safetensors", content)
    write_whole(part / "adapter_config.json", (json.dumps(options, indent=2) + "\n").encode())
    part.rename(folder)


def share_frozen(model: nn.Module) -> dict[int, Any]:
    """The memory of a ``copy.deepcopy`` that copies what is trained and shares the rest."""
    return {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
