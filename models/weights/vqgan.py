"""StableCascade's stage A, under the names of its code or of diffusers' ``PaellaVQModel``: the codes' name differs.

Convolutions over one site are Linears here, and the channels of a patch come in another order. Pixels are in [0, 1]
inside. A ``config.json`` of diffusers says the divisor of the latents, which is 0.43 in StableCascade.

Source: Pernias et al. 2023 (arXiv 2306.00637), https://github.com/Stability-AI/StableCascade.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..autoencoders.vqgan import VQGANConfig
from ..checkpoint import Checkpoint
from ..objectives.reconstruction import Reconstruction
from ..registry import config_from
from .layout import Converted, Hints, settings_beside, shape_of
from .pairs import Pair, linear, patches, pixels, read, site

CODES, DIFFUSERS_CODES = "vquantizer.codebook.weight", "vquantizer.embedding.weight"
CLASS = "PaellaVQModel"
# Height and width of the clips that a run of these weights names; the model takes any.
SIZE = (256, 256)


def _block(ours: str, theirs: str) -> list[Pair]:
    return [
        Pair(f"{ours}.gammas", f"{theirs}.gammas"),
        *linear(f"{ours}.depthwise", f"{theirs}.depthwise.1"),
        *linear(f"{ours}.mlp.0", f"{theirs}.channelwise.0"),
        *linear(f"{ours}.mlp.2", f"{theirs}.channelwise.2"),
    ]


def pairs(blocks: int) -> list[Pair]:
    """All tensors, with so many blocks in the decoder's lower level."""
    found = [
        *patches("patches", "in_block.1", 2),
        *_block("encoder_high", "down_blocks.0"),
        *linear("down", "down_blocks.1"),
        *_block("encoder_low", "down_blocks.2"),
        site("to_latents", "down_blocks.3.0")[0],
        *linear("norm", "down_blocks.3.1"),
        Pair("codebook.weight", CODES),
        *site("from_latents", "up_blocks.0.0"),
        *linear("up", f"up_blocks.{blocks + 1}"),
        *_block("decoder_high", f"up_blocks.{blocks + 2}"),
        *pixels("pixels", "out_block.0", 2),
    ]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        found.append(Pair(f"norm.{name}", f"down_blocks.3.1.{name}"))
    for i in range(blocks):
        found += _block(f"decoder_low.{i}", f"up_blocks.{i + 1}")
    return found


def stage_a(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """Stage A: an autoencoder of pictures."""
    weights = {CODES if name == DIFFUSERS_CODES else name: value for name, value in weights.items()}
    width, latent_channels, _, _ = shape_of(weights, "up_blocks.0.0.weight", 4)
    codes, _ = shape_of(weights, CODES, 2)
    blocks = len([name for name in weights if name.startswith("up_blocks.") and name.endswith(".gammas")]) - 1
    scale = settings_beside(hints.source, CLASS).get("scale_factor", VQGANConfig.scale)
    config = VQGANConfig(
        input_size=(1, *(hints.size or SIZE)),
        channels=shape_of(weights, "out_block.0.weight", 4)[0] // 4,
        width=width,
        blocks=blocks,
        latent_channels=latent_channels,
        codes=codes,
        scale=scale,
        unit_pixels=True,
    )
    return Converted(config, Reconstruction(penalty_weight=1.0), read(pairs(blocks), weights))


def to_stage_a(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights as StableCascade's stage A has them.

    Raises:
        ValueError: a model that its code does not build.
    """
    config = config_from(checkpoint.config)
    if not isinstance(config, VQGANConfig) or not config.unit_pixels or config.channels != 3:
        raise ValueError("only a VQGAN of RGB pictures with unit_pixels is StableCascade's stage A")
    return {theirs: write(checkpoint.ema[ours]) for ours, theirs, _, write in pairs(config.blocks)}


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of diffusers."""
    return {DIFFUSERS_CODES if name == CODES else name: value for name, value in weights.items()}
