"""DiT as diffusers has it (``DiTTransformer2DModel``): the tensors of Meta's under other names.

q, k and v are apart. The embedders of timestep and class stand in every block, all with the same weights. There are no
positions, which are a function of the size. ``config.json`` beside the weights says heads and size.

diffusers tells this model ``t`` by frequencies ``10000^(-i / 127)``, Meta's code, for which the published weights were
trained, by ``10000^(-i / 128)``. The models here do as Meta's code does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..denoisers.layers import grid_positions
from .layout import Hints, settings_beside, shape_of

CLASS = "DiTTransformer2DModel"
EMBEDDER = "norm1.emb."
# Theirs in a block, and ours.
BLOCK = {
    "norm1.linear.": "adaLN_modulation.1.",
    "attn1.to_out.0.": "attn.proj.",
    "ff.net.0.proj.": "mlp.fc1.",
    "ff.net.2.": "mlp.fc2.",
}
EMBEDDERS = {
    "timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "class_embedder.embedding_table.": "y_embedder.embedding_table.",
}
OUTSIDE = {
    "pos_embed.proj.": "x_embedder.proj.",
    "proj_out_1.": "final_layer.adaLN_modulation.1.",
    "proj_out_2.": "final_layer.linear.",
}
PARTS = ("q", "k", "v")


def is_diffusers(weights: Mapping[str, Tensor]) -> bool:
    return "transformer_blocks.0.attn1.to_q.weight" in weights


def hints_of(hints: Hints) -> Hints:
    """Hints; those that lack come from the ``config.json`` in the folder of the weights, if there is one.

    Raises:
        ValueError: a file of another model, or without what lacks.
    """
    values = {} if hints.heads and hints.size else settings_beside(hints.source, CLASS)
    if not values:
        return hints
    numbers = []
    for name in ("num_attention_heads", "sample_size"):
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json has {name} {value!r}; it must be a positive whole number")
        numbers.append(value)
    heads, side = numbers
    return hints._replace(heads=hints.heads or heads, size=hints.size or (side, side))


def from_diffusers(weights: Mapping[str, Tensor], hints: Hints) -> dict[str, Tensor]:
    """The tensors under Meta's names.

    Raises:
        ValueError: no size, or embedders that are not the same in all blocks.
    """
    if hints.size is None:
        raise ValueError("size must be named: these weights have no positions")
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        if match is None:
            found[_renamed(name, OUTSIDE)] = value
        elif match[2].startswith(EMBEDDER):
            ours = _renamed(match[2].removeprefix(EMBEDDER), EMBEDDERS)
            if not torch.equal(found.setdefault(ours, value), value):
                raise ValueError(f"{name} is not that of block 0; the models here have one embedder for all blocks")
        elif re.match(r"attn1\.to_[qkv]\.", match[2]):
            kind = match[2].rpartition(".")[2]
            parts = [f"transformer_blocks.{match[1]}.attn1.to_{part}.{kind}" for part in PARTS]
            shapes = {tuple(weights[part].shape) for part in parts if part in weights}
            if len(shapes) > 1:
                raise ValueError(f"{', '.join(parts)} have shapes {sorted(shapes)}; they must have one")
            if name == parts[0] and all(part in weights for part in parts):
                found[f"blocks.{match[1]}.attn.qkv.{kind}"] = torch.cat([weights[part] for part in parts])
        else:
            ours = _renamed(match[2], BLOCK)
            found[name if ours == match[2] else f"blocks.{match[1]}.{ours}"] = value
    width, _, *patch = shape_of(found, "x_embedder.proj.weight", 4)
    rows, columns = (side // cells for side, cells in zip(hints.size, patch, strict=True))
    found["pos_embed"] = grid_positions((1, rows, columns), width, video=False)
    return found


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Meta's DiT under the names of diffusers, with those of adapters beside them."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name.startswith(tuple(EMBEDDERS.values())):
            theirs = _renamed(name, {ours: theirs for theirs, ours in EMBEDDERS.items()})
            found |= {f"transformer_blocks.{i}.{EMBEDDER}{theirs}": value.clone() for i in range(depth)}
        elif match is None and name != "pos_embed":
            found[_renamed(name, {ours: theirs for theirs, ours in OUTSIDE.items()})] = value
        elif match is not None and match[2].startswith("attn.qkv."):
            kind = match[2].removeprefix("attn.qkv.")
            # What an adapter reads is for all three; what it adds, and a weight, has rows for each.
            for part, rows in zip(PARTS, [value] * 3 if kind.startswith("lora_A") else value.chunk(3), strict=True):
                found[f"transformer_blocks.{match[1]}.attn1.to_{part}.{kind}"] = rows.clone()
        elif match is not None:
            theirs = _renamed(match[2], {ours: theirs for theirs, ours in BLOCK.items()})
            found[f"transformer_blocks.{match[1]}.{theirs}"] = value
    return found


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A name with another beginning; one that is not known stays, for the check of names to say so."""
    for before, after in names.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
