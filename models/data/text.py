"""The frozen encoders that make a condition of captions.

    T5:    states = encoder(tokens of the caption)     [n, E], one row per token
    CLIP:  the same, or its pooled output alone        [1, E], the state of the end token
           or, for StableCascade, what it reads        [1 + max_length, E]: the projected pooled output, then the states
                                                       of caption and padding, before the last norm

Source: T5, Raffel et al. 2019 (arXiv 1910.10683); CLIP, Radford et al. 2021 (arXiv 2103.00020).
"""

from __future__ import annotations

import functools
import json
import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..denoisers.text import Text
from ..runtime.packages import package
from .checksums import describe, sha256_of_files

_log = logging.getLogger(__name__)

# What transformers loads of an encoder's folder besides config.json; of the weights, the first that are there.
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def loaded_files(folder: Path) -> set[Path]:
    """The files of an encoder that transformers loads: configuration, tokenizer and one format of the weights.

    Raises:
        ValueError: no weights, or an index of their shards that is damaged.
    """
    files = {file for pattern in ("config.json", *TOKENIZER) for file in folder.glob(pattern) if file.is_file()}
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"text encoder {str(folder)!r} has no weights; they may be {', '.join(WEIGHTS)}")
    shards: set[str] = set()
    if weights.suffix == ".json":
        try:
            shards = set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise ValueError(f"{weights} is damaged: {error}") from error
    return files | {weights} | {folder / shard for shard in shards}


def identify_text_encoder(encoder: str) -> dict[str, Any]:
    """Which text encoder this is: ``{"path", "sha256"}``; a hub name stands for itself and has no checksum.

    Raises:
        ValueError: as :func:`loaded_files`.
    """
    folder = Path(encoder)
    if folder.is_dir():
        return {"path": str(folder.resolve()), "sha256": sha256_of_files(folder, loaded_files(folder))}
    return {"path": encoder, "sha256": None}


def refuse_another(encoder: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raises ValueError if these are not records of :func:`identify_text_encoder` of the same text encoder."""
    if (encoder["sha256"] or encoder["path"]) != (record["sha256"] or record["path"]):
        raise ValueError(f"text encoder {describe(encoder)} is not the one of the training, {describe(record)}")


MODELS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}


class TextEncoder:
    """A frozen T5 or CLIP text encoder of transformers, in eval mode: captions to :class:`Text`.

    A caption is encoded by itself, so that its states do not depend on what it is batched with, and kept in memory.
    CLIP's padding tokens are not among the states, although Stable Diffusion reads them.

    Args:
        encoder: folder with encoder and tokenizer, or the hub name of a model that was downloaded before: nothing is
            downloaded here.
        max_length: L, the tokens of a caption; longer ones are cut.
        precision: of the encoder; T5 overflows in float16, hence bfloat16.
        pooled: CLIP's pooled output, one token a caption, in the place of its states.
        cascade: what StableCascade reads of CLIP, in the place of its states.
        cache: captions whose states stay in memory; the least recently used goes first.
        device: where the encoder runs.

    Attributes:
        width: E.
        length: L: 1 if pooled, max_length + 1 with cascade.

    Raises:
        ValueError: no such model, one that is neither T5 nor CLIP, a missing package, or an option that does not fit.
    """

    def __init__(
        self,
        encoder: str,
        *,
        max_length: int = 120,
        precision: Literal["fp32", "bf16"] = "fp32",
        pooled: bool = False,
        cascade: bool = False,
        cache: int = 10_000,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {precision!r}; it may be 'fp32' or 'bf16'")
        transformers = package("transformers")
        try:
            config = transformers.AutoConfig.from_pretrained(encoder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text encoder {encoder!r} is neither a folder with one nor the hub name of a downloaded one: {error}"
            ) from error
        if config.model_type not in MODELS:
            raise ValueError(f"text encoder {encoder!r} is a {config.model_type!r}; it may be T5 or CLIP")
        is_clip = config.model_type != "t5"
        if pooled and not is_clip:
            raise ValueError(f"pooled is True, but text encoder {encoder!r} is a T5, which has no pooled output")
        if cascade and (pooled or not is_clip):
            other = "pooled is True too" if pooled else f"text encoder {encoder!r} is a T5"
            raise ValueError(f"cascade is True, but {other}; it goes with a CLIP, and with pooled False")
        kind = "CLIPTextModelWithProjection" if cascade else MODELS[config.model_type]
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, local_files_only=True)
            self.model, loading = getattr(transformers, kind).from_pretrained(
                encoder, local_files_only=True, output_loading_info=True
            )
        except pickle.UnpicklingError as error:
            # torch's own message goes on to advise loading the file unsafely.
            raise ValueError(
                f"text encoder {encoder!r} is refused: it holds more than tensors and plain values"
            ) from error
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"text encoder {encoder!r} cannot be loaded: {error}") from error
        if loading["missing_keys"]:
            raise ValueError(f"text encoder {encoder!r} lacks weights, {', '.join(sorted(loading['missing_keys']))}")
        if is_clip and max_length > self.model.config.max_position_embeddings:
            most = self.model.config.max_position_embeddings
            raise ValueError(f"max_length is {max_length}; text encoder {encoder!r} takes {most} tokens at most")
        if cascade and self.model.config.projection_dim != self.model.config.hidden_size:
            sizes = f"{self.model.config.projection_dim} and {self.model.config.hidden_size}"
            raise ValueError(
                f"cascade is True, but pooled output and states of {encoder!r} have widths {sizes}, not one"
            )
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.model = self.model.to(device, self.dtype).eval().requires_grad_(False)
        self.device, self.max_length, self.pooled, self.cascade = device, max_length, pooled, cascade
        self.width: int = self.model.config.hidden_size
        self.length = 1 if pooled else max_length + cascade
        self._cut = 0
        self._states = functools.lru_cache(maxsize=cache)(self._encode)

    def __call__(self, captions: Sequence[str]) -> Text:
        """``states [B, L, E]`` in the encoder's precision and ``mask [B, L]``, on the CPU.

        ``""`` is the null caption, but with ``cascade``, which encodes it.

        Raises:
            TypeError: captions that are one string.
        """
        if isinstance(captions, str):
            raise TypeError("captions is a string; it must be a sequence of strings")
        states = torch.zeros(len(captions), self.length, self.width, dtype=self.dtype)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        for i, caption in enumerate(captions):
            if caption or self.cascade:
                found = self._states(caption)
                states[i, : len(found)] = found
                mask[i, : len(found)] = True
        return Text(states, mask)

    def empty(self) -> Tensor:
        """What the encoder makes of no words, ``[n, E]``, on the CPU."""
        return self._states("")

    @torch.no_grad()
    def _encode(self, caption: str) -> Tensor:
        """``[n, E]`` of the caption's n tokens, on the CPU."""
        padding = "max_length" if self.cascade else False
        options = {"truncation": True, "max_length": self.max_length, "padding": padding}
        tokens = self.tokenizer([caption], **options, return_tensors="pt")
        if tokens.attention_mask.sum() == self.max_length:
            self._say_if_cut(caption)
        # The training's autocast is none of the encoder's business, which may have run before.
        with torch.autocast(torch.device(self.device).type, enabled=False):
            output = self.model(
                tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device),
                output_hidden_states=self.cascade,
            )
        if self.cascade:
            return torch.cat((output.text_embeds, output.hidden_states[-1][0])).cpu()
        return (output.pooler_output if self.pooled else output.last_hidden_state[0]).cpu()

    def _say_if_cut(self, caption: str) -> None:
        length = len(self.tokenizer(caption, verbose=False).input_ids)
        if length > self.max_length:
            self._cut += 1
            if math.log10(self._cut).is_integer():  # the 1st, 10th, 100th, ...
                _log.warning(
                    "caption %r has %d tokens and is cut to the %d of max_length; captions cut so far: %d",
                    caption if len(caption) <= 80 else f"{caption[:77]}...",
                    length,
                    self.max_length,
                    self._cut,
                )
