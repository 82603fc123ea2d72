"""A run between two steps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minisora_kernels import automatic
from minisora_kernels.counters import Counter

from ..checkpoint import Checkpoint, open_checkpoint
from ..data.batches import Batch, Batches, BucketBatches, Prefetching
from ..data.encoder import Decoder
from ..data.media import contact_sheet
from ..data.open import open_source
from ..data.pixels import shrink, to_bytes
from ..data.source import Source
from ..data.text import TextEncoder, identify_text_encoder, refuse_another
from ..data.wrappers import WithImages
from ..denoisers.lora import adapt, share_frozen
from ..denoisers.text import Text
from ..objectives.reconstruction import Reconstruction
from ..parallel.draws import sharing
from ..parallel.ranks import Ranks
from ..parallel.replicas import Loss, replicas, without_sums
from ..parallel.sequence import check_divisible, dividing
from ..parallel.shards import divided, part_of, shard
from ..registry import build, config_from, configure
from ..runtime.device import choose_device
from ..runtime.gpus import peak_of
from ..runtime.plain import as_plain
from ..runtime.recompute import chosen
from ..sampling.clips import ClipRequest, sample_clips
from ..weights.start import start_from
from .config import TrainConfig, from_dict
from .log import Step
from .optimizer import OffloadedAdamW, check_offload, learning_rate, update_ema

_log = logging.getLogger(__name__)


class Trainer:
    """A run between two steps: model, optimizer, EMA, random generators, the loss's memory and place in the data.

    ``resume`` continues from a checkpoint, ``ranks`` are the processes that train together. Raises ValueError for a
    configuration that does not fit together.
    """

    def __init__(self, config: TrainConfig, resume: Checkpoint | None = None, ranks: Ranks | None = None) -> None:
        self.config, self.device = config, choose_device(config.device)
        self.ranks = ranks or Ranks()
        check_offload(config, self.device)
        data = config.data
        self.source: Source = open_source(data)
        self.data_digest: str | None = self.source.digest
        self.classes = list(self.source.classes)
        # What made the latents, if the clips are latents: their previews need it, so it must be there from the start.
        self.encoder: Mapping[str, Any] | None = self.source.encoder
        if self.encoder is None and config.encoder is not None:
            raise ValueError(f"encoder is {config.encoder!r}, but {data.source!r} has pixels, not latents")
        self.decode = None if self.encoder is None else Decoder(self.encoder, self.device, config.encoder)
        captions = list(self.source.captions)
        self.text, self.captions, text_width = None, captions or self.classes, 0
        self.text_encoder: dict[str, Any] | None = None
        if config.text.encoder is not None:
            self.text = self._encoder()
            self.text_encoder = identify_text_encoder(config.text.encoder)
            self.classes, text_width = [], self.text.width
        elif captions:
            _log.warning("the captions of %s are not used: text.encoder is not given", data.source)
        if config.preview.guidance != 1 and not self.classes and not text_width:
            raise ValueError(f"preview.guidance is {config.preview.guidance}; without classes or text it must be 1")
        channels, frames, height, width = self.source.shape
        built_from = configure(config.model, channels, frames, (height, width), len(self.classes), text_width)
        if resume is not None:
            self._refuse(resume, built_from)
        self.model, self.ema = self._models(built_from, resume)
        # What a checkpoint has and a forward may change, as the statistics of a batch norm.
        kept = self.model.state_dict().keys()
        self.buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        check_divisible(config.parallel.sequence, self.model.divisible(config.data.images))
        self.reads_low = self._reads_low()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        self.objective = config.objective
        self.memory = self.objective.memory(self.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.batches = self._batches()
        self.step = 0
        self.tokens = self.flops = 0
        # The table is of bfloat16 products.
        self.peak = peak_of(self.device) if config.precision == "bf16" else None
        self._products: dict[torch.Size, int] = {}
        self.sound = True  # False while a step changes the weights
        self.served = {} if resume is None else resume.served
        if resume is not None:
            self._restore(resume)
        if config.compile:
            self.model.compile()
        self.loss = replicas(Loss(self.model, self.objective), self.ranks)
        if self.ranks.size > 1 and not self.ranks.sharded:
            self._rehearse()

    def _optimizer(self) -> torch.optim.AdamW:
        options = self.config.optimizer
        # What FSDP2 offloads is on the CPU already.
        offload = options.offload and not self.ranks.sharded
        return (OffloadedAdamW if offload else torch.optim.AdamW)(
            self.trained,
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def _models(self, built_from: Any, resume: Checkpoint | None) -> tuple[Any, Any]:
        """The model and its average, with the weights that the run starts from or goes on with."""
        config = self.config
        torch.manual_seed(config.seed)
        model = build(built_from).to(self.device)
        if config.init is not None and resume is None:
            rows_train = config.lora.classes or not config.lora.rank
            start = open_checkpoint(Path(config.init))[1].merged()
            start_from(model, start, self.classes, rows_train=rows_train)
        if config.lora.rank:
            adapt(model, config.lora)
        if resume is not None:
            model.load_state_dict(resume.model)
        model.checkpointing = chosen(config.checkpointing, config.checkpointing_keeps)
        ema = copy.deepcopy(model, {} if self.ranks.sharded else share_frozen(model)).eval().requires_grad_(False)
        if resume is not None:
            ema.load_state_dict(resume.ema)
        if self.ranks.sharded:
            for each in (model, ema):
                shard(each, self.ranks, bf16=config.precision == "bf16", offload=config.optimizer.offload)
        return model, ema

    def _reads_low(self) -> bool:
        """Whether batches have small clips for the model; those that do not fit it are refused.

        A second stage that can do without is trained without them where the data has none.
        """
        small, data = self.model.small_clips, self.config.data.source
        if small is None or small.of_input:
            return False
        low, (channels, frames) = self.source.low_shape, small.shape[:2]
        if low is None:
            _log.warning(
                "model.%s is %d, but %s has no small clips, as models.precompute --low makes: the model is trained "
                "without",
                small.option,
                channels,
                data,
            )
            return False
        if low[:2] != (channels, frames):
            raise ValueError(
                f"model.{small.option} is {channels}, but the small clips of {data!r} have {low[0]} channels and "
                f"{low[1]} frames; it must be {channels} and {frames}"
            )
        return True

    def _batches(self) -> Prefetching:
        """Batches of one size, or, with buckets, of as many samples of a bucket's size as ``batch_tokens`` allows."""
        config = self.config
        # Latents know the buckets that they were made with, in cells.
        cells = self.source.buckets
        buckets = cells or config.data.buckets
        if not buckets:
            if config.batch_tokens:
                raise ValueError(f"batch_tokens is {config.batch_tokens}; it is for buckets only, use batch_size")
            source = WithImages(self.source, config.data.images) if config.data.images else self.source
            rows = self._rows(config.batch_size)
            return Batches(source, config.batch_size, config.seed, rows=rows, workers=config.data.workers)
        if not config.batch_tokens:
            raise ValueError(f"batch_tokens is 0; {config.data.source} has buckets, so it must be at least 1")
        named = "data.buckets"
        if cells:
            named = f"data.source {config.data.source!r}, whose buckets are in cells of latents,"
        if not self.model.takes_any_size:
            raise ValueError(f"{named} needs a model for inputs of any size; {config.model.name!r} has one size")
        self.model.any_size = True
        for frames, height, width in buckets:
            try:
                configure(config.model, self.source.shape[0], frames, (height, width), len(self.classes))
                check_divisible(config.parallel.sequence, self.model.divisible(size=(frames, height, width)))
            except ValueError as error:
                message = f"{named} has {(frames, height, width)}, which this run cannot take: {error}"
                raise ValueError(message) from error
        sources = self.source.split(config.data.buckets)
        sizes = self._bucket_sizes(sources, self.ranks.share.ranks)
        rows_of = [self._rows(size) for size in sizes]
        return BucketBatches(sources, sizes, config.seed, rows=rows_of, workers=config.data.workers)

    def _bucket_sizes(self, sources: list[Source], shares: int) -> list[int]:
        """Samples of a batch of each bucket, a multiple of its parts and of the ranks that have shares of these."""
        config, sizes = self.config, []
        parts = config.accumulation * shares
        for source in sources:
            tokens = self._tokens(source.shape[1:])
            count = config.batch_tokens // tokens // parts * parts
            if not count:
                needed = f"{parts} sample{'s' * (parts > 1)} of {tokens} tokens"
                raise ValueError(f"batch_tokens is {config.batch_tokens}; bucket {source.shape[1:]} needs {needed}")
            sizes.append(count)
        return sizes

    def _rows(self, batch_size: int) -> list[int]:
        return self.ranks.share.rows(batch_size, self.config.accumulation)

    def _tokens(self, size: tuple[int, ...]) -> int:
        """Tokens of a sample of this many cells per axis."""
        return self.model.tokens_per_sample * math.prod(size) // math.prod(self.model.config.input_size)

    def _encoder(self) -> TextEncoder:
        if not self.captions:
            text, data = self.config.text.encoder, self.config.data.source
            raise ValueError(f"text.encoder is {text!r}, but {data} has neither captions nor classes")
        return TextEncoder(**dataclasses.asdict(self.config.text), device=self.device)

    def _refuse(self, saved: Checkpoint, config: Any) -> None:
        """Raises ValueError for a checkpoint of other data, or of another model than ``config`` builds."""
        if saved.text_encoder is not None and self.text_encoder is not None:
            refuse_another(self.text_encoder, saved.text_encoder)
        built_from = as_plain(config)
        # Older files lack newer fields; those get their defaults.
        was_built_from = as_plain(config_from(saved.config))
        if was_built_from != built_from or saved.classes != self.classes:
            changed = sorted(key for key in built_from if was_built_from.get(key) != built_from[key]) or ["classes"]
            raise ValueError(f"the checkpoint does not match the data: {', '.join(changed)} differ")
        # The file may have been moved since, so its path may differ.
        if any((saved.encoder or {}).get(k) != (self.encoder or {}).get(k) for k in ("kind", "sha256", "mean", "std")):
            raise ValueError(f"the checkpoint does not match the data: its encoder was {saved.encoder}")
        if saved.data_digest not in (None, self.data_digest):
            now, before = self.config.data.source, saved.train["data"]["source"]
            raise ValueError(
                f"data.source is {now!r}; in a resumed run it must hold files of the same names and sizes as "
                f"{before!r} did"
            )
        was = "cuda" if "cuda" in saved.rng else "cpu"
        if was != self.device.type:
            raise ValueError(
                f"the run drew random numbers on {was}, which {self.device.type} cannot continue; use --device {was}"
            )

    def _restore(self, saved: Checkpoint) -> None:
        if isinstance(self.batches, BucketBatches):
            shares = from_dict(saved.train).parallel.shares
            sizes = [bucket.batch_size for bucket in self.batches.buckets]
            before = self._bucket_sizes([bucket.source for bucket in self.batches.buckets], shares)
            if sizes != before:
                raise ValueError(
                    f"{self.config.parallel} makes batches of {sizes} samples of the buckets; the run had {before}, so "
                    f"parallel.data x parallel.shard must be {shares}, as before"
                )
        self.optimizer.load_state_dict(divided(saved.optimizer, self.trained))
        self._set_generators(saved.rng)
        self.memory = {name: value.to(self.device) for name, value in saved.memory.items()}
        self.step = saved.step

    def checkpoint(self) -> Checkpoint:
        """The state of the run; with shards a copy of this rank's part of it, which steps do not change."""
        states = [part.state_dict() for part in (self.model, self.ema, self.optimizer)]
        memory = self.memory
        if self.ranks.sharded:
            *states, memory = (part_of(state, first=self.ranks.first) for state in (*states, memory))
        model, ema, optimizer = states
        return Checkpoint(
            train=as_plain(self.config),
            config=as_plain(self.model.config),
            classes=self.classes,
            step=self.step,
            model=model,
            ema=ema,
            optimizer=optimizer,
            rng=self._generators(),
            encoder=self.encoder,
            memory=memory,
            text_encoder=self.text_encoder,
            data_digest=self.data_digest,
            served=self.served | automatic.current_choices(),
            empty_classes=self.source.empty_classes if self.classes else [],
        )

    def train_step(self) -> Step:
        """One optimizer step. After an error the state is that before the step, but for one while ``sound`` is False.

        Raises:
            ValueError: a loss or a gradient that is not finite, or data that cannot be read.
        """
        undo = self._undo()
        try:
            loss, norm = self._gradients()
        except BaseException:
            undo()
            raise
        self.sound = False
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.ema, self.model, self.config.optimizer.ema, self.step)
        self.step += 1
        self.sound = True
        return Step(loss, norm, rate)

    def _undo(self) -> Callable[[], None]:
        """What brings back all that :meth:`_gradients` changes, as it is now."""
        generators, memory, buffers = self._generators(), self._copies(self.memory), self._copies(self.buffers)
        tokens, flops = self.tokens, self.flops

        def undo() -> None:
            self.optimizer.zero_grad()
            self._set_generators(generators)
            self.memory, self.tokens, self.flops = memory, tokens, flops
            for name, buffer in self.buffers.items():
                buffer.copy_(buffers[name])

        return undo

    def _rehearse(self) -> None:
        """Compute the gradients of the next step once, for nothing.

        DDP orders its sums by the first backward that it sees. Without a rehearsal the first step of a resumed run
        would be summed in another order than that of a run that was not stopped.
        """
        undo = self._undo()
        self._gradients()
        undo()

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """The loss of the next batch and the norm of its gradient, which is clipped."""
        config = self.config
        self.ranks.at(self.step, "reads data")
        x, y, low = self.batches.batch(self.step)
        self.ranks.at(self.step, "computes gradients")
        tokens = len(x) * self.ranks.share.ranks * self._tokens(x.shape[2:])
        x = x.to(self.device, non_blocking=True)
        low = low.to(self.device, non_blocking=True) if low is not None and self.reads_low else None
        if config.model.is_image:
            x = x.squeeze(2)
        labels: Tensor | Text | None = y if self.classes else None
        if self.text is not None:
            labels = self.text([self.captions[i] for i in y.flatten()])
            labels = labels.map(lambda part: part.unflatten(0, y.shape))
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        total = torch.zeros((), device=self.device)
        forward = Counter() if self.peak is not None and x.shape not in self._products else None
        for i, part in enumerate(x.chunk(config.accumulation)):
            part_labels = None if labels is None else labels.chunk(config.accumulation)[i]
            part_low = None if low is None else low.chunk(config.accumulation)[i]
            last = i == config.accumulation - 1
            with (
                sharing(self.ranks.share),
                dividing(self.ranks.line),
                contextlib.nullcontext() if last else without_sums(self.loss),
            ):
                with (
                    torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"),
                    forward or contextlib.nullcontext(),
                ):
                    loss = self.loss(part, part_labels, self.generator, self.memory, part_low)
                loss = loss / config.accumulation
                # Of the ranks that divide a sample the mean of gradients is taken, where their sum is asked for.
                (loss * self.ranks.line.ranks).backward()
            total += loss.detach()
        total = self.ranks.mean(total)
        norm = nn.utils.clip_grad_norm_(self.trained, config.optimizer.clip or math.inf, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Read back before the update, for it would spoil weights and average; GradScaler waits here as well.
        if not math.isfinite(total.item()) or not math.isfinite(norm.item()):
            raise ValueError(
                f"step {self.step} has loss {total.item()} and gradient norm {norm.item()}; lower the learning rate, "
                "or use fp32"
            )
        if forward is not None:
            self._products[x.shape] = forward.flops
        # A product has two in the backward, or one if its weight is frozen.
        self.flops += self._products.get(x.shape, 0) * (2 if config.lora.rank else 3)
        self.tokens += tokens
        return total, norm

    @staticmethod
    def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def _generators(self) -> dict[str, Tensor]:
        """The states of the random generators."""
        states = {"torch": torch.get_rng_state(), "objective": self.generator.get_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_generators(self, states: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(states["torch"].cpu())
        self.generator.set_state(states["objective"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)

    def preview(self) -> Any:
        """A contact sheet of the averaged model's samples, uint8 ``[H, W, 3]``; does not disturb the training.

        An autoencoder's are reconstructions of the first clips of the run; a second stage makes those large again.
        Ranks that divide the tokens of a clip in the training do so here, and all of them call this.
        """
        preview = self.config.preview
        if isinstance(self.objective, Reconstruction):
            pairs = self.objective.preview(self.ema, self._first().clips.to(self.device))
            return contact_sheet(to_bytes(pairs).permute(0, 2, 3, 4, 1).cpu().numpy())
        numbers = [i for i in range(len(self.captions)) if i not in self.source.empty_classes] or [0]
        labels, low = torch.tensor([numbers[i % len(numbers)] for i in range(preview.count)]), None
        small = self.model.small_clips
        if small is not None and (self.reads_low or small.of_input):
            x, labels, low = self._first()
            low = low if self.reads_low else shrink(x, 2)
        y: Tensor | Text | None = labels if self.classes else None
        if self.text is not None:
            y = self.text([self.captions[i] for i in labels])
        request = ClipRequest(
            count=preview.count,
            y=y,
            steps=preview.steps,
            guidance=preview.guidance,
            seed=self.config.seed,
            decode=self.decode,
            low=low,
        )
        with dividing(self.ranks.line):
            return contact_sheet(sample_clips(self.ema, self.objective, request).numpy())

    def _first(self) -> Batch:
        """The first clips of the run, as many as a preview shows."""
        return Batches(self.source, self.config.preview.count, self.config.seed, prefetch=0).batch(0)
