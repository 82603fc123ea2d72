"""W.A.L.T: a transformer with window attention that denoises images and video (Gupta et al. 2023, arXiv 2312.06662).

    c      = t_embed(t) + y_embed(y) [+ t_embed'(low_t)]                      [B, D]
    A_1    = Linear(SiLU(c))                                                 [B, 6 D]: shift, scale, gate, twice
    A_i    = A_1 + B_i A'_i c                                                AdaLN-LoRA: A'_i [r, D], B_i [6 D, r]
    x      = patch_embed([x_t | previous | low | past, mask]) + pos_space + pos_time          [B, N, D]
    x      = x + gate_msa * attention(adaln(x, shift_msa, scale_msa))        depth times
    x      = x + cross(norm(x), [the query's window | text])                 only with text
    x      = x + gate_mlp * mlp(adaln(x, shift_mlp, scale_mlp))
    output = unpatchify(Linear(adaln(x, shift, scale)))

The layers alternate: attention inside a frame, in windows (1, h, w), then inside windows of all frames, (T, h', w').
Windows do not overlap and are not shifted. Queries and keys have a layer norm; scores have a learned bias for each
relative position (Swin, Liu et al. 2021, arXiv 2103.14030), one table a layer.

The paper prints the shapes of AdaLN-LoRA as D x r and r x 6D, which cannot act on c in the printed order; the only
reading that can, ``B A' c`` with the shapes above, also gives its 12 M parameters for width 1408. B starts at zero, so
the fresh model is adaLN-Zero. c stands in ``A'_i c`` without SiLU, as printed.

What the model may be told besides t and y, all on channels next to x_t:

    previous   self-conditioning (Chen et al. 2022, arXiv 2208.04202): its last estimate of the data, without gradient
    past       frame prediction: the first one or two frames and a mask of which are known. The paper prints
               ``m * z_t``; here they are the clean frames, without which there is nothing to continue from
    low        super-resolution: the clip at half the size, with noise of level low_t (Ho et al. 2021, arXiv
               2106.15282), through a convolution and depth to space. The paper gives neither its kernel (here 3 x 3)
               nor the range of low_t

Joint training on images and video: frames of x beyond the model's own are independent images, with the first temporal
position. They take part in layers within a frame; in the others they attend to themselves alone, which passes v on.

Cross-attention is plain PyTorch (scaled_dot_product_attention), not one of our kernels; it has QK-norm, no relative
positions, no modulation, and a projection that starts at zero.

Sizes: L and XL, with the paper's 313 M and 460 M parameters, are in ``registry.py``. Its text-to-video model of 3 B is
not: the table's width of 9216 at 52 layers would be 53 B parameters, and the true width is not printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import (
    adaln,
    unpatchify,
)

from ..objectives.common import alpha_bars, at, expand, gaussian
from ..objectives.ddpm import DDPM
from ..parallel import draws, sequence
from ..protocols import Denoiser, SmallClips, System
from ..runtime.recompute import recomputed
from .dit import SIZES
from .layers import (
    FinalLayer,
    Modulation,
    TimestepEmbedder,
    drop_labels,
    embed_patches,
    modulation,
    modulations_of,
)
from .text import Text, drop_captions
from .walt_config import WALTConfig, WALTSettings
from .walt_layers import Block, Upsampler


class WALT(Denoiser):
    """The denoiser.

    Attributes:
        config: what it was built from.
        out_channels: ``channels``.
        null_class: the label of "no class"; None without classes.
        checkpointing: recompute each layer in backward instead of keeping its activations; otherwise only what adaln
            made is recomputed. False at first.
    """

    def __init__(self, config: WALTConfig) -> None:
        super().__init__()
        self.config, self.out_channels = config, config.channels
        self.null_class = config.num_classes or None
        t, h, w = config.grid
        d, r = config.width, config.lora_rank

        told = [config.self_conditioning > 0, config.low_resolution, config.past > 0]
        self.x_embedder = nn.Conv3d(config.channels * (1 + sum(told)) + told[2], d, config.patch, config.patch)
        self.upsampler = Upsampler(config.channels) if config.low_resolution else None
        self.pos_space = nn.Parameter(torch.empty(h, w, d))
        self.pos_time = nn.Parameter(torch.empty(t, d))
        self.t_embedder = TimestepEmbedder(d)
        self.low_t_embedder = TimestepEmbedder(d) if config.low_resolution else None
        self.y_embedder = nn.Embedding(config.num_classes + 1, d) if config.num_classes else None
        self.text_embedder = nn.Linear(config.text_width, d) if config.text_width else None
        self.adaLN_modulation = modulation(d, 6)
        self.lora_down = nn.Parameter(torch.empty(config.depth - 1, r, d))
        self.lora_up = nn.Parameter(torch.empty(config.depth - 1, 6 * d, r))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch, config.channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier, except that every layer starts as the identity and the model as zero."""
        zero = ("adaLN_modulation", "lora_up", "final_layer.linear.weight", "cross.proj.weight")
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or any(part in name for part in zero):
                nn.init.zeros_(parameter)
            elif name == "lora_down":
                nn.init.normal_(parameter, std=self.config.width**-0.5)
            elif name.startswith(("pos_", "t_embedder.", "low_t_embedder.", "y_embedder.")) or "bias_table" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter.flatten(1))

    @property
    def known_frames(self) -> int:
        return self.config.known_frames

    @property
    def self_conditioning(self) -> bool:
        return self.config.self_conditioning > 0

    @property
    def small_clips(self) -> SmallClips | None:
        if not self.config.low_resolution:
            return None
        t, h, w = self.config.input_size
        shape = (self.config.channels, t, h // 2, w // 2)
        return SmallClips(
            shape, of_input=True, required=True, option="low_resolution", most_noise=self.config.low_noise
        )

    def small_clip_arguments(
        self, low: Tensor, level: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        low_t = torch.full((len(low),), level, device=low.device)
        return {"low": augment(low, low_t, generator), "low_t": low_t}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | None = None,
        *,
        previous: Tensor | None = None,
        past: Tensor | None = None,
        past_frames: Tensor | None = None,
        low: Tensor | None = None,
        low_t: Tensor | None = None,
    ) -> Tensor:
        """What the objective asks of a noisy clip: its noise or its velocity.

        Args:
            x: ``[B, C, T + images, H, W]``: T frames of video, then any number of independent images.
            t: timesteps in [0, 1000]: ``[B]``, or ``[B, 1 + images]``, of the video and of each image.
            y: classes, int64, of t's possible shapes, ``null_class`` for none; for a model with text
                ``Text(states [B, L, E], mask [B, L])``, or ``[B, 1 + images, L, E]`` and ``[B, 1 + images, L]``. A mask
                of False alone is no text. None if and only if the model has neither.
            previous: the last estimate of the data, of x's shape; None is zeros.
            past: clean first frames ``[B, C, k, H, W]``, k = 1 or 2; None is none.
            past_frames: how many of the k each sample is told, int64 ``[B]`` in 0..k; None is all.
            low: the clip and the images at half the size ``[B, C, T + images, H/2, W/2]``, with noise of level low_t
                (:func:`augment`).
            low_t: timesteps ``[B]``.

        Returns:
            x's shape.

        Raises:
            ValueError: an argument whose shape does not fit the config, or one that is missing or not wanted.
            TypeError: y of the wrong kind.
        """
        config = self.config
        self._check(x, previous, past, past_frames, low, low_t)
        images = x.shape[2] - config.input_size[0]
        frame = self._frame_of_condition(images, x.device)
        vectors, last = self._modulations(self._condition(t, y, low_t, len(x), images), frame)
        text = self._text(y, len(x), images, frame) if self.text_embedder is not None else None

        # Under autocast the embedding comes out in half precision; the residual stream keeps the parameters' dtype.
        x = self._embed(x, images, previous, low, self._known(x, past, past_frames) if config.past else None)
        grid = config.grid[0] + images, *config.grid[1:]
        # Ranks divide the tokens; with images by frames, for each frame may have a modulation of its own.
        pieces = grid[0] if images else math.prod(grid)
        x = sequence.own(x, 1, pieces)
        y = adaln(x, vectors[0].shift_msa, vectors[0].scale_msa)
        for block, own, (shift, scale, *_) in zip(self.blocks, vectors, [*vectors[1:], last], strict=True):
            arguments = (x, y, text, own, shift, scale, pieces)
            if self.checkpointing and torch.is_grad_enabled():
                # A layer draws no random numbers, so there is no generator state to restore.
                x, y = recomputed(block, *arguments, False, checkpointing=self.checkpointing)
            else:
                x, y = block(*arguments)
        patches = sequence.joined(self.final_layer.linear(y), 1, pieces)
        return unpatchify(patches, grid, config.patch, self.out_channels)

    def divisible(self, images: int = 0, size: tuple[int, ...] | None = None) -> dict[str, int]:
        frames, height, width = self.config.grid
        divided = {"frames and images": frames + images} if images else {"tokens": frames * height * width}
        return {**divided, "heads": self.config.heads}

    def units(self) -> list[list[nn.Module]]:
        return [list(block.children()) for block in self.blocks]

    def _embed(
        self, x: Tensor, images: int, previous: Tensor | None, low: Tensor | None, known: Tensor | None
    ) -> Tensor:
        """Tokens ``[B, N, D]`` of x and of what stands on the channels next to it."""
        parts = [x]
        if self.config.self_conditioning:
            parts.append(torch.zeros_like(x) if previous is None else previous.to(x.dtype))
        if self.upsampler is not None:
            parts.append(self.upsampler(low).to(x.dtype))
        if known is not None:
            parts.append(known)
        # The images' temporal position is the first.
        time = torch.cat((self.pos_time, self.pos_time[:1].expand(images, -1)))
        pos = (time[:, None, None] + self.pos_space).flatten(0, 2)
        return embed_patches(torch.cat(parts, dim=1), self.x_embedder, pos).to(pos.dtype)

    def _condition(self, t: Tensor, y: Tensor | Text | None, low_t: Tensor | None, batch: int, images: int) -> Tensor:
        """c: ``[B, D]``, or ``[B, 1 + images, D]`` if t or y has one for each image."""
        shapes = ((batch,), (batch, 1 + images)) if images else ((batch,),)
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        if tuple(t.shape) not in shapes:
            raise ValueError(f"t has shape {tuple(t.shape)}; with images = {images} it may be {allowed}")
        conditions = [self.t_embedder(t, self.pos_time.dtype)]
        if self.low_t_embedder is not None and low_t is not None:
            conditions.append(self.low_t_embedder(low_t, self.pos_time.dtype))
        if self.y_embedder is not None:
            if y is None:
                raise ValueError(f"y is None; a model with {self.null_class} classes needs {allowed}")
            if isinstance(y, Text):
                raise TypeError(f"y is a Text; a model with {self.null_class} classes needs a tensor of labels")
            if tuple(y.shape) not in shapes:
                raise ValueError(f"y has shape {tuple(y.shape)}; with images = {images} it may be {allowed}")
            conditions.append(self.y_embedder(drop_labels(y, self.config.num_classes, self._dropout)))
        elif self.text_embedder is None and y is not None:
            raise ValueError("y was given to an unconditional model (num_classes = 0, text_width = 0)")
        if any(condition.dim() == 3 for condition in conditions):
            conditions = [c if c.dim() == 3 else c[:, None] for c in conditions]
        return sum(conditions[1:], start=conditions[0])

    def _modulations(self, c: Tensor, frame: Tensor | None) -> tuple[list[Modulation], tuple[Tensor, Tensor]]:
        """The modulation of each layer, and shift and scale of the end: ``[B, D]``, or one per frame."""
        first = self.adaLN_modulation(c)
        low_rank = F.linear(c, self.lora_down.flatten(0, 1)).unflatten(-1, self.lora_down.shape[:2])
        others = first.unsqueeze(-2) + torch.einsum("...lr,lor->...lo", low_rank, self.lora_up)
        rows = [first, *others.unbind(-2), self.final_layer.adaLN_modulation(c)]
        if c.dim() == 3 and frame is not None:
            rows = [sequence.own(row.index_select(1, frame), 1) for row in rows]
        return modulations_of(rows, self.config.width)

    def _text(self, y: Tensor | Text | None, batch: int, images: int, frame: Tensor | None) -> tuple[Tensor, Tensor]:
        """The captions in the model's width, ``[B, S, L, D]``, and their mask; S is 1, or all frames with images."""
        if not isinstance(y, Text):
            raise TypeError(f"y is {type(y).__name__}; a model with text needs a Text(states, mask)")
        states, mask = y.states, y.mask
        shapes = ((batch,), (batch, 1 + images)) if images else ((batch,),)
        if tuple(states.shape[:-2]) not in shapes or states.shape[-1] != self.config.text_width:
            wanted = " or ".join(f"[{', '.join(map(str, shape))}, L, {self.config.text_width}]" for shape in shapes)
            raise ValueError(f"y.states has shape {tuple(states.shape)}; with images = {images} it may be {wanted}")
        if mask.shape != states.shape[:-1] or mask.dtype != torch.bool:
            raise ValueError(
                f"y.mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool {list(states.shape[:-1])}"
            )
        if images and self.config.cross_attention != "spatial":
            raise ValueError(f"images is {images}; a model with text needs cross_attention = 'spatial' for it")
        mask = drop_captions(y, self._dropout).tokens
        text = cast(nn.Linear, self.text_embedder)(states.to(self.pos_time.dtype))
        if text.dim() == 3 or frame is None:
            return text[:, None], mask[:, None]
        return text.index_select(1, frame), mask.index_select(1, frame)

    @property
    def _dropout(self) -> float:
        return self.config.class_dropout if self.training else 0.0

    def _frame_of_condition(self, images: int, device: torch.device) -> Tensor | None:
        """For each frame, which of the 1 + images conditions is its own."""
        if not images:
            return None
        frames = self.config.grid[0]
        return (torch.arange(frames + images, device=device) - (frames - 1)).clamp_min(0)

    @staticmethod
    def _known(x: Tensor, past: Tensor | None, past_frames: Tensor | None) -> Tensor:
        """``[B, C + 1, T, H, W]``: the frames that are known, others zero, and the mask."""
        batch, channels, frames, height, width = x.shape
        if past is None:
            return x.new_zeros(batch, channels + 1, frames, height, width)
        k = past.shape[2]
        counts = past.new_full((batch,), k) if past_frames is None else past_frames
        mask = (torch.arange(k, device=x.device) < counts[:, None]).to(x.dtype)[:, None, :, None, None]
        known = torch.cat((past.to(x.dtype) * mask, mask.expand(-1, -1, -1, height, width)), dim=1)
        return F.pad(known, (0, 0, 0, 0, 0, frames - k))

    def _check(
        self,
        x: Tensor,
        previous: Tensor | None,
        past: Tensor | None,
        past_frames: Tensor | None,
        low: Tensor | None,
        low_t: Tensor | None,
    ) -> None:
        config, batch, expected = self.config, len(x), tuple(x.shape)
        frames, height, width = config.input_size
        if x.dim() != 5 or x.shape[2] < frames or (x.shape[1], *x.shape[3:]) != (config.channels, height, width):
            raise ValueError(
                f"x has shape {expected}; it must be [B, {config.channels}, {frames} + images, {height}, {width}]"
            )
        for name, given, wanted in (
            ("previous", previous, config.self_conditioning),
            ("past", past, config.past),
            ("low", low, config.low_resolution),
        ):
            if given is not None and not wanted:
                raise ValueError(f"{name} was given to a model that was built without it")
        if previous is not None and tuple(previous.shape) != expected:
            raise ValueError(f"previous has shape {tuple(previous.shape)}; it must be {list(expected)}")
        if past is not None:
            most = config.known_frames
            if past.dim() != 5 or past.shape[:2] + past.shape[3:] != x.shape[:2] + x.shape[3:]:
                raise ValueError(
                    f"past has shape {tuple(past.shape)}; it must be [{batch}, {config.channels}, k, {height}, {width}]"
                )
            if not 1 <= past.shape[2] <= most:
                raise ValueError(f"past has {past.shape[2]} frames; it must have 1..{most}")
        if past_frames is not None and (past is None or tuple(past_frames.shape) != (batch,)):
            raise ValueError(f"past_frames has shape {tuple(past_frames.shape)}; it must be [{batch}], with past")
        if config.low_resolution:
            small = (*expected[:3], height // 2, width // 2)
            if low is None or tuple(low.shape) != small:
                raise ValueError(f"low {_described(low)}; it must be {list(small)}")
            if low_t is None or tuple(low_t.shape) != (batch,):
                raise ValueError(f"low_t {_described(low_t)}; it must be [{batch}]")
        elif low_t is not None:
            raise ValueError("low_t was given to a model that was built without low_resolution")

    def training_conditions(
        self,
        x: Tensor,
        estimate: Callable[..., Tensor] | None,
        generator: torch.Generator | None = None,
        low: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What an objective tells the model in training besides x_t, t and y.

        - past: the first one or two frames of x, as many of either, for the share ``config.past`` of the samples.
        - low: the 2 x 2 means of x, with noise. For pixels that is the clip at half the size; for latents it stands in
          for the encoded small clip, as ``sampling.clips.small_latents`` makes it.
        - previous: the estimate that a first pass without gradient gives, for the share ``config.self_conditioning``;
          zeros for the others. It drops the same labels as the second pass: an estimate made with the class would
          tell it to the pass without.

        Args:
            x: data ``[B, C, T + images, H, W]``.
            estimate: the data that the model's prediction points at, given what is returned here but ``previous``;
                None if the objective has no such estimate.
            generator: on x's device; of all that is drawn here.
            low: not used: small clips are those of x.

        Returns:
            arguments of :meth:`forward` by name.

        Raises:
            ValueError: options that only the objective 'ddpm' teaches, without ``estimate``.
        """
        config, batch = self.config, len(x)
        if estimate is None:
            for name in config.only_ddpm():
                raise ValueError(f"model.{name} is {getattr(config, name)}; only the objective 'ddpm' teaches it")
            return {}
        given: dict[str, Tensor] = {}
        if config.past:
            k = config.known_frames
            told = draws.rand(batch, generator=generator, device=x.device) < config.past
            count = draws.randint(1, k + 1, batch, generator=generator, device=x.device)
            given |= {"past": x[:, :, :k], "past_frames": count * told}
        if config.low_resolution:
            low_t = draws.randint(0, config.low_noise + 1, batch, generator=generator, device=x.device)
            given |= {"low": augment(F.avg_pool3d(x, (1, 2, 2)), low_t, generator), "low_t": low_t}
        if config.self_conditioning:
            told = draws.rand(batch, generator=generator, device=x.device) < config.self_conditioning
            kind = x.device.type
            with (
                torch.no_grad(),
                torch.random.fork_rng([x.device] if kind == "cuda" else []),
                # Weights that autocast converts here have no gradient, and must not be kept for the second pass.
                torch.autocast(
                    kind,
                    torch.get_autocast_dtype(kind),
                    enabled=torch.is_autocast_enabled(kind),
                    cache_enabled=False,
                ),
            ):
                given["previous"] = estimate(**given) * expand(told, x)
        return given


def _described(tensor: Tensor | None) -> str:
    return "is None" if tensor is None else f"has shape {tuple(tensor.shape)}"


def augment(low: Tensor, low_t: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``sqrt(alpha_bar) low + sqrt(1 - alpha_bar) e`` at timesteps ``low_t [B]``, int64 in 0..999.

    alpha_bar is of DDPM's linear betas, whatever the schedule of the model's own noise.

    Source: noise-conditioning augmentation, Ho et al. 2021 (arXiv 2106.15282).

    Raises:
        ValueError: low_t of another shape.
    """
    if tuple(low_t.shape) != (len(low),):
        raise ValueError(f"low_t has shape {tuple(low_t.shape)}; it must be [{len(low)}]")
    alpha_bar = alpha_bars("linear", False).to(low.device)
    return at(alpha_bar.sqrt(), low_t, low) * low + at((1 - alpha_bar).sqrt(), low_t, low) * gaussian(low, generator)


def systems() -> dict[str, System]:
    """The published sizes whose parameters can be counted."""
    velocity = DDPM(prediction="velocity", zero_snr=True)
    return {f"walt-{size.lower()}": System(WALTSettings(**SIZES[size]), velocity) for size in ("L", "XL")}
