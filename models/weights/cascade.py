"""StableCascade's stages C and B, under the names of its code or of diffusers' ``StableCascadeUNet``.

A tensor here has the values of one there. Convolutions over one site are Linears here, those over 2 x 2 sites Linears
of four sites, and the channels of a patch come in another order. diffusers has q, k and v apart, and another name for
what maps stage B's text.

The stages read a CLIP with projection: stage C its states, its pooled output and the embedding of a picture, stage B
its pooled output. Captions that are dropped are what that CLIP makes of no words. The EfficientNet, whose features
stage C learns to make and stage B is trained under, is not here.

Heads have 64 channels in all published weights. T's further inputs are told 0.

Source: Pernias et al. 2023 (arXiv 2306.00637), https://github.com/Stability-AI/StableCascade.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..denoisers.cascade_config import CascadeConfig
from ..objectives.logsnr import LogSNR
from ..registry import Config, config_from
from .layout import Converted, Hints, empty_caption, shape_of
from .pairs import Pair, linear, patches, pixels, read, site

Stage = Literal["b", "c"]
HEAD_DIM = 64
TEXT = {"cascade": True, "max_length": 77}
NULL = "null_text"
# Height and width of the latents of a picture of 1024 x 1024, and cells per token, which the weights do not tell.
SIZES = {"b": (256, 256), "c": (24, 24)}
PATCHES = {"b": 2, "c": 1}
POOLED = {"b": "clip_mapper", "c": "clip_txt_pooled_mapper"}


def _ends(config: CascadeConfig, stage: Stage) -> list[Pair]:
    """What is outside of the levels."""
    p = config.patch[-1]
    found = linear("pooled_mapper", POOLED[stage])
    if config.captions == "both":
        found += linear("text_mapper", "clip_txt_mapper")
    if config.image_width:
        found += linear("image_mapper", "clip_img_mapper")
    for ours, theirs in (("latent_mapper", "effnet_mapper"), ("pixel_mapper", "pixels_mapper")):
        if config.latent_channels if ours == "latent_mapper" else config.pixel_channels:
            found += [pair for i in (0, 2) for pair in site(f"{ours}.{i}", f"{theirs}.{i}")]
    return [
        *found,
        *patches("embedding", "embedding.1", p),
        *pixels("output", "clf.1", p),
    ]


def _block(config: CascadeConfig, letter: str, ours: str, theirs: str) -> list[Pair]:
    if letter == "T":
        names = ("mapper", *(f"mapper_{name}" for name in config.further_times))
        return [pair for name in names for pair in linear(f"{ours}.{name}", f"{theirs}.{name}")]
    if letter == "A":
        packed = [Pair(f"{ours}.qkv.{part}", f"{theirs}.attention.attn.in_proj_{part}") for part in ("weight", "bias")]
        after = linear(f"{ours}.proj", f"{theirs}.attention.attn.out_proj")
        return [*packed, *after, *linear(f"{ours}.condition", f"{theirs}.kv_mapper.1")]
    inside, outside = f"{ours}.channelwise", f"{theirs}.channelwise"
    found = linear(f"{ours}.depthwise", f"{theirs}.depthwise") if letter == "C" else []
    found += [*linear(f"{inside}.expand", f"{outside}.0"), *linear(f"{inside}.contract", f"{outside}.4")]
    for part, name in (("weight", "gamma"), ("bias", "beta")):
        ours, theirs = f"{inside}.grn_{part}", f"{outside}.2.{name}"
        found.append(Pair(ours, theirs, lambda x: x[0, 0, 0], lambda x: x[None, None, None]))
    return found


def _resample(config: CascadeConfig) -> Iterator[Pair]:
    for i in range(len(config.widths) - 1):
        down, up = f"down_downscalers.{i + 1}.1", f"up_upscalers.{i}.1"
        if not config.downsample:
            yield from site(f"down_resample.{i}.linear", f"{down}.blocks.0")
            yield from site(f"up_resample.{i}.linear", f"{up}.blocks.1")
            continue
        yield Pair(
            f"down_resample.{i}.linear.weight",
            f"{down}.weight",
            lambda x: x.permute(0, 2, 3, 1).flatten(1),
            lambda x: x.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2),
        )
        yield Pair(f"down_resample.{i}.linear.bias", f"{down}.bias")
        yield Pair(
            f"up_resample.{i}.linear.weight",
            f"{up}.weight",
            lambda x: x.permute(2, 3, 1, 0).flatten(0, 2),
            lambda x: x.unflatten(0, (2, 2, -1)).permute(3, 2, 0, 1),
        )
        yield Pair(f"up_resample.{i}.bias", f"{up}.bias")


def pairs(config: CascadeConfig, stage: Stage) -> list[Pair]:
    """All tensors of a stage."""
    found, last = [*_ends(config, stage), *_resample(config)], len(config.widths) - 1
    for i in range(last + 1):
        for way, level, groups in (("down", i, config.down[i]), ("up", last - i, config.up[i])):
            letters = config.levels[level]
            for number in range(groups * len(letters)):
                letter = letters[number % len(letters)]
                ours = f"{way}.{i}.groups.{number // len(letters)}.{letter}"
                found += _block(config, letter, ours, f"{way}_blocks.{i}.{number}")
        for j in range(config.repeats[i] - 1):
            found += site(f"up.{i}.between.{j}", f"up_repeat_mappers.{i}.{j}")
    return found


def _letters(weights: Mapping[str, Tensor], blocks: str) -> str:
    """The letters of the blocks ``down_blocks.0`` and so on, in their order."""
    kinds: dict[int, set[str]] = {}
    for name in weights:
        match = re.match(rf"{re.escape(blocks)}\.(\d+)\.(\w+)\.", name)
        if match:
            kinds.setdefault(int(match[1]), set()).add(match[2])
    letters = []
    for _, parts in sorted(kinds.items()):
        known = [letter for part, letter in (("depthwise", "C"), ("mapper", "T"), ("attention", "A")) if part in parts]
        letters.append(known[0] if known else "F")
    return "".join(letters)


def _groups(weights: Mapping[str, Tensor], blocks: str) -> tuple[str, int]:
    """The letters of one group, which begins with C, and how many groups there are.

    Raises:
        ValueError: blocks that are no such groups.
    """
    letters = _letters(weights, blocks)
    count = letters.count("C")
    if not count or letters != letters[: len(letters) // count] * count:
        raise ValueError(f"{blocks} has blocks {letters!r}; they must be groups that begin with C")
    return letters[: len(letters) // count], count


def _config(weights: Mapping[str, Tensor], hints: Hints, stage: Stage) -> CascadeConfig:
    rows, text_width = shape_of(weights, f"{POOLED[stage]}.weight", 2)
    outputs = shape_of(weights, "clf.1.weight", 4)[0]
    count = len({name.split(".")[1] for name in weights if name.startswith("down_blocks.")})
    down = [_groups(weights, f"down_blocks.{i}") for i in range(count)]
    up = [_groups(weights, f"up_blocks.{i}") for i in range(count)]
    widths = tuple(shape_of(weights, f"down_blocks.{i}.0.depthwise.weight", 4)[0] for i in range(count))
    mapped = [name for name in sorted(weights) if name.endswith("kv_mapper.1.weight")]
    condition_width = shape_of(weights, mapped[0], 2)[1] if mapped else rows // 4
    head_dim = HEAD_DIM if hints.heads is None else widths[-1] // hints.heads
    further = {name: None for name in weights for name in re.findall(r"\.mapper_(\w+)\.weight$", name)}
    patch = PATCHES[stage]
    both = stage == "c"
    return CascadeConfig(
        input_size=hints.size or SIZES[stage],
        channels=outputs // patch**2,
        text_width=text_width,
        widths=widths,
        heads=tuple(max(width // head_dim, 1) for width in widths),
        levels=tuple(letters for letters, _ in down),
        down=tuple(number for _, number in down),
        up=tuple(number for _, number in up),
        repeats=tuple(
            1 + len({name.split(".")[2] for name in weights if name.startswith(f"up_repeat_mappers.{i}.")})
            for i in range(count)
        ),
        patch=(patch, patch),
        downsample="down_downscalers.1.1.weight" in weights,
        condition_width=condition_width,
        condition_tokens=rows // condition_width,
        class_dropout=0.05,
        captions="both" if both else "pooled",
        null_tokens=1 + TEXT["max_length"],
        image_width=shape_of(weights, "clip_img_mapper.weight", 2)[1] if both else 0,
        further_times=tuple(further),
        latent_channels=0 if both else shape_of(weights, "effnet_mapper.0.weight", 4)[1],
        pixel_channels=0 if both else shape_of(weights, "pixels_mapper.0.weight", 4)[1],
        dropout=tuple(0.1 if "A" in letters else 0.0 for letters, _ in down),
    )


def _read(weights: dict[str, Tensor], hints: Hints, stage: Stage) -> Converted:
    weights = _from_diffusers(weights, stage)
    config = _config(weights, hints, stage)
    found = read(pairs(config, stage), weights) | {NULL: empty_caption(hints, config.text_width, **TEXT)}
    objective = LogSNR(sample_shift=2.0) if stage == "c" else LogSNR(noise="pyramid")
    return Converted(config, objective, found, text=TEXT)


def stage_b(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """Stage B: noise, trained on pyramids of noise."""
    return _read(weights, hints, "b")


def stage_c(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """Stage C: noise, sampled with a shift of 2."""
    return _read(weights, hints, "c")


def _write(checkpoint: Checkpoint, stage: Stage) -> dict[str, Tensor]:
    config, weights = config_from(checkpoint.config), checkpoint.ema
    if not isinstance(config, CascadeConfig) or not config.is_image or not config.null_tokens:
        raise ValueError("only a Cascade for images with null_tokens is StableCascade's")
    if config.captions != ("both" if stage == "c" else "pooled"):
        raise ValueError(f"captions is {config.captions!r}; that is not stage {stage.upper()}'s")
    return {theirs: write(weights[ours]) for ours, theirs, _, write in pairs(config, stage)}


def to_stage_b(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights as StableCascade's stage B has them.

    Raises:
        ValueError: a model that its code does not build.
    """
    return _write(checkpoint, "b")


def to_stage_c(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights as stage C has them.

    Raises: as :func:`to_stage_b`.
    """
    return _write(checkpoint, "c")


def no_adapters(adapters: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Raises ValueError: StableCascade's code has other layers than Linears where adapters are here."""
    raise ValueError("adapters of a StableCascade have no published layers; write the weights, to which they are added")


def _from_diffusers(weights: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
    """The tensors under the names of StableCascade's code, which they may have already."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(.+\.attention)\.to_([qkv])\.(weight|bias)", name)
        if match is None:
            if name.startswith(POOLED["c"]):
                name = name.replace(POOLED["c"], POOLED[stage])
            found[name.replace(".attention.to_out.0.", ".attention.attn.out_proj.")] = value
            continue
        parts = [f"{match[1]}.to_{part}.{match[3]}" for part in "qkv"]
        if len({tuple(weights[part].shape) if part in weights else None for part in parts}) > 1:
            raise ValueError(f"{', '.join(parts)} must all be there, and have one shape")
        if match[2] == "q":
            found[f"{match[1]}.attn.in_proj_{match[3]}"] = torch.cat([weights[part] for part in parts])
    return found


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a stage under the names of diffusers."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(.+\.attention)\.attn\.in_proj_(weight|bias)", name)
        if match is not None:
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {f"{match[1]}.to_{part}.{match[2]}": rows.clone() for part, rows in parts}
            continue
        if name.startswith(f"{POOLED['b']}."):
            name = name.replace(POOLED["b"], POOLED["c"])
        found[name.replace(".attention.attn.out_proj.", ".attention.to_out.0.")] = value
    return found
