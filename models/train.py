"""``python -m models.train``: train a diffusion transformer on clips.

    python -m models.train --preset digits
    python -m models.train --config run.yaml --optimizer.learning-rate 3e-4
    python -m models.train --resume runs/digits

A run's folder gets ``config.json``, checkpoints ``step_*.pt``, ``losses.csv``, ``previews/*.png`` and TensorBoard's
``events.*``. A folder that is there already is never written to, except by ``--resume``, which goes on from its newest
whole checkpoint with the same losses, bit for bit, as the run that was not stopped (on the same machine, with the same
number of threads). Data, the autoencoder of latents or a text encoder that have moved since are named anew with
``--data.source``, ``--encoder`` and ``--text.encoder``.

SIGTERM and Ctrl-C end the step in hand, save, and leave with status 128 + signal; a second one leaves at once.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor, nn

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .config import TrainConfig, choose, from_dict, load, preset, start_parser
from .data.batches import Batch, Batches, BucketBatches, Prefetching
from .data.encoder import Decoder
from .data.media import contact_sheet, write_png
from .data.open import open_source
from .data.pixels import shrink, to_bytes
from .data.source import Source
from .data.text import TextEncoder, identify_text_encoder, refuse_another
from .data.wrappers import WithImages
from .denoisers.cascade import Cascade, Conditioned
from .denoisers.text import Text
from .registry import OBJECTIVES, build, config_from, configure
from .runtime.allocator import reuse_large_allocations
from .runtime.device import choose_backend, choose_device
from .runtime.plain import as_plain
from .runtime.progress import progress_bar
from .sampling.clips import sample_clips

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# What a continuation may change: what does not touch the losses, but for the rounding of another backend or GPU, and
# where the data and the text encoder are, if the checkpoint can tell that they are the same.
RESUMABLE = {"encoder", "steps", "save_every", "keep", "log_every", "preview", "backend", "device"}

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """Training was stopped by a signal, after its state was saved."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {path}")
        self.number, self.path, self.status = number, path, 128 + number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, Path]]:
        return Stopped, (self.number, self.path)  # from another process


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of 0-based ``step``: linear warm-up, then constant, or half a cosine or a line to 0 after the last step."""
    optimizer = config.optimizer
    if step < optimizer.warmup:
        return optimizer.learning_rate * (step + 1) / (optimizer.warmup + 1)
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    progress = (step - optimizer.warmup) / max(config.steps - optimizer.warmup, 1)
    share = 1 - progress if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.learning_rate * share


def average(ema: list[Tensor], weights: list[Tensor], decay: float, step: int) -> None:
    """``ema = decay * ema + (1 - decay) * weights`` in place, with less decay in the first steps."""
    if ema:
        torch._foreach_lerp_(ema, weights, 1 - min(decay, (1 + step) / (10 + step)))


def _statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that training changes and a state keeps, as a batch norm's."""
    kept = model.state_dict()
    return [buffer for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point()]


class Losses:
    """``losses.csv``: a line ``step,loss,gradient_norm,learning_rate`` for every step, all digits kept."""

    HEADER = ("step", "loss", "gradient_norm", "learning_rate")

    def __init__(self, path: Path, start: int) -> None:
        kept = []
        if path.exists():
            with open(path, newline="") as file:
                # A line that the machine died on is incomplete; its step is after the checkpoint.
                kept = [row for row in list(csv.reader(file))[1:] if len(row) == 4 and int(row[0]) < start]
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([self.HEADER, *kept])
        os.replace(temporary, path)
        self._file = open(path, "a", newline="")  # noqa: SIM115 - closed by close()
        self._writer = csv.writer(self._file)

    def write(self, rows: list[tuple[int, float, float, float]]) -> None:
        self._writer.writerows(rows)
        self._file.flush()
        os.fsync(self._file.fileno())  # no checkpoint may outlive the lines of its steps

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which the first SIGTERM or SIGINT is appended; the second has its usual effect."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, _: Any) -> None:
        received.append(number)
        restore()

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, receive)
    except ValueError:
        _log.info("not the main thread: signals do not stop this run")
    try:
        yield received
    finally:
        restore()


class Trainer:
    """A run between two steps: model, optimizer, average, random generators, the loss's memory and place in the data.

    ``resume`` continues from a checkpoint. Raises ValueError for a configuration that does not fit together.
    """

    def __init__(self, config: TrainConfig, resume: Checkpoint | None = None) -> None:
        self.config, self.device = config, choose_device(config.device)
        data = config.data
        self.source: Source = open_source(data)
        self.data_digest: str | None = self.source.digest
        self.classes = list(self.source.classes)
        # What made the latents, if the clips are latents: their previews need it, so it must be there from the start.
        self.encoder: dict[str, Any] | None = self.source.encoder
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
        torch.manual_seed(config.seed)
        self.model = build(built_from).to(self.device)
        self.told_low = self._told_low()
        self.model.checkpointing = config.checkpointing
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.trained = trained
        self.objective = config.objective
        self.memory = self.objective.memory(self.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.batches = self._batches()
        self.step = 0
        self.tokens = 0
        if resume is not None:
            self._restore(resume)
        if config.compile:
            self.model.compile()

    def _told_low(self) -> bool:
        """Whether the model is told the small clips of the data; those that do not fit it are refused.

        Stage B trains without them too, on zeros, which stand for none.
        """
        config = self.model.config
        if not isinstance(self.model, Cascade) or config.low_shape is None:
            return False
        low = self.source.low_shape
        data, (channels, frames) = self.config.data.source, config.low_shape[:2]
        if low is None:
            _log.warning(
                "model.latent_channels is %d, but %s has no small clips, as models.precompute --low makes: the model "
                "is trained without",
                channels,
                data,
            )
            return False
        if low[:2] != (channels, frames):
            raise ValueError(
                f"model.latent_channels is {channels}, but the small clips of {data!r} have {low[0]} channels and "
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
            return Batches(source, config.batch_size, config.seed)
        if not config.batch_tokens:
            raise ValueError(f"batch_tokens is 0; {config.data.source} has buckets, so it must be at least 1")
        named = "data.buckets"
        if cells:
            named = f"data.source {config.data.source!r}, whose buckets are in cells of latents,"
        if not hasattr(self.model, "any_size"):
            raise ValueError(f"{named} needs a model for inputs of any size; {config.model.name!r} has one size")
        self.model.any_size = True
        for frames, *size in buckets:
            try:
                configure(config.model, self.source.shape[0], frames, tuple(size), len(self.classes))
            except ValueError as error:
                raise ValueError(f"{named} has {(frames, *size)}, which the model cannot take: {error}") from error
        sources = self.source.split(config.data.buckets)
        sizes = []
        for source in sources:
            tokens = self._tokens(source.shape[1:])
            size = config.batch_tokens // tokens // config.accumulation * config.accumulation
            if not size:
                needed = f"{config.accumulation} sample{'s' * (config.accumulation > 1)} of {tokens} tokens"
                raise ValueError(f"batch_tokens is {config.batch_tokens}; bucket {source.shape[1:]} needs {needed}")
            sizes.append(size)
        return BucketBatches(sources, sizes, config.seed)

    def _tokens(self, size: tuple[int, ...]) -> int:
        """Tokens of a sample of this many cells per axis."""
        return self.model.tokens_per_sample * math.prod(size) // math.prod(self.model.config.input_size)

    def _encoder(self) -> TextEncoder:
        if not self.captions:
            text, data = self.config.text.encoder, self.config.data.source
            raise ValueError(f"text.encoder is {text!r}, but {data} has neither captions nor classes")
        return TextEncoder(**dataclasses.asdict(self.config.text), device=self.device)

    def _restore(self, saved: Checkpoint) -> None:
        if saved.text_encoder is not None and self.text_encoder is not None:
            refuse_another(self.text_encoder, saved.text_encoder)
        built_from = as_plain(self.model.config)
        # A file of before a field was there has its default.
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
        self.model.load_state_dict(saved.model)
        self.ema.load_state_dict(saved.ema)
        self.optimizer.load_state_dict(saved.optimizer)
        torch.set_rng_state(saved.rng["torch"].cpu())
        self.generator.set_state(saved.rng["objective"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved.rng["cuda"].cpu(), self.device)
        self.memory = {name: value.to(self.device) for name, value in saved.memory.items()}
        self.step = saved.step

    def checkpoint(self) -> Checkpoint:
        rng = {"torch": torch.get_rng_state(), "objective": self.generator.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            train=as_plain(self.config),
            config=as_plain(self.model.config),
            classes=self.classes,
            step=self.step,
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rng=rng,
            encoder=self.encoder,
            memory=self.memory,
            text_encoder=self.text_encoder,
            data_digest=self.data_digest,
        )

    def train_step(self) -> tuple[Tensor, Tensor, float]:
        """One optimizer step: mean loss of the batch, norm of the gradient before clipping, learning rate."""
        config = self.config
        x, y, low = self.batches.batch(self.step)
        self.tokens += len(x) * self._tokens(x.shape[2:])
        x = x.to(self.device, non_blocking=True)
        low = low.to(self.device, non_blocking=True) if low is not None and self.told_low else None
        if len(self.model.config.input_size) == 2:
            x = x.squeeze(2)
            low = None if low is None else low.squeeze(2)
        labels: Tensor | Text | None = y if self.classes else None
        if self.text is not None:
            labels = self.text([self.captions[i] for i in y.flatten()])
            labels = Text(*(part.unflatten(0, y.shape) for part in labels))
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(x.chunk(config.accumulation)):
            part_labels = None if labels is None else labels.chunk(config.accumulation)[i]
            model = self.model if low is None else Conditioned(self.model, low.chunk(config.accumulation)[i])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = self.objective.loss(model, part, part_labels, self.generator, self.memory)
            loss = loss / config.accumulation
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.trained, config.optimizer.clip or math.inf, foreach=True)
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        average(list(self.ema.parameters()), list(self.model.parameters()), config.optimizer.ema, self.step)
        average(_statistics(self.ema), _statistics(self.model), config.optimizer.ema, self.step)
        self.step += 1
        return total, norm, rate

    def preview(self) -> Any:
        """A contact sheet of the averaged model's samples, uint8 ``[H, W, 3]``; does not disturb the training.

        An objective with a ``preview`` of its own makes it from the first clips of the run, and a second stage that is
        told small clips from those made small.
        """
        preview = self.config.preview
        own = getattr(self.objective, "preview", None)
        if own is not None:
            x = self._first().clips.to(self.device)
            return contact_sheet(to_bytes(own(self.ema, x)).permute(0, 2, 3, 4, 1).cpu().numpy())
        labels, low = torch.arange(preview.count) % max(len(self.captions), 1), None
        if self.told_low or getattr(self.model.config, "low_resolution", False):
            x, labels, low = self._first()
            low = low if self.told_low else shrink(x, 2)
        y: Tensor | Text | None = labels if self.classes else None
        if self.text is not None:
            y = self.text([self.captions[i] for i in labels])
        clips = sample_clips(
            self.ema,
            self.objective,
            preview.count,
            y,
            steps=preview.steps,
            guidance=preview.guidance,
            seed=self.config.seed,
            decode=self.decode,
            low=low,
        )
        return contact_sheet(clips.numpy())

    def _first(self) -> Batch:
        """As many of the first clips of the run as a preview has."""
        return Batches(self.source, self.config.preview.count, self.config.seed, prefetch=0).batch(0)


class Log:
    """Losses and previews into the run's folder and TensorBoard; the progress bar."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.trainer, self.folder = trainer, folder
        config = trainer.config
        self.losses = Losses(folder / "losses.csv", trainer.step)
        self.board: SummaryWriter = SummaryWriter(str(folder), purge_step=trainer.step or None)
        self.bar = progress_bar(total=config.steps, initial=trainer.step, desc=folder.name, unit="step")
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []
        self.tokens = trainer.tokens
        self.since = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        self.pending.append((self.trainer.step - 1, loss, norm, rate))
        self.bar.update()
        if len(self.pending) >= self.trainer.config.log_every:
            self.flush()

    def flush(self) -> None:
        """Write what is pending. Only here are losses read back from the device.

        Raises:
            ValueError: a loss that is not finite.
        """
        if not self.pending:
            return
        rows = [(step, loss.item(), norm.item(), rate) for step, loss, norm, rate in self.pending]
        self.pending.clear()
        speed = (self.trainer.tokens - self.tokens) / (time.perf_counter() - self.since)
        self.tokens = self.trainer.tokens
        self.losses.write(rows)
        step, loss, norm, rate = rows[-1]
        for name, value in (("loss", loss), ("gradient norm", norm), ("learning rate", rate), ("tokens/s", speed)):
            self.board.add_scalar(name, value, step)
        self.bar.set_postfix_str(
            f"loss {sum(row[1] for row in rows) / len(rows):.4f}, {speed:,.0f} tokens/s", refresh=False
        )
        self.since = time.perf_counter()
        for step, loss, norm, _ in rows:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(
                    f"step {step} has loss {loss} and gradient norm {norm}; lower the learning rate, or use fp32"
                )

    def preview(self) -> None:
        sheet = self.trainer.preview()
        path = self.folder / "previews" / f"step_{self.trainer.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(path, sheet)
        self.board.add_image("samples", sheet, self.trainer.step, dataformats="HWC")
        self.bar.write(f"step {self.trainer.step}: {path}")
        self.since = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.losses.close()


def train(config: TrainConfig, resume: Checkpoint | None = None) -> Path:
    """Train to ``config.steps``; returns the last checkpoint.

    Raises:
        ValueError: a configuration that does not fit together, a run folder that is there already, or a loss that is
            not finite.
        OSError: a checkpoint that could not be written.
        Stopped: SIGTERM or Ctrl-C.
    """
    folder = Path(config.run)
    if resume is None and folder.exists():
        raise ValueError(f"{folder} exists already; continue it with --resume {folder}, or choose another --run")
    with choose_backend(config.backend):
        trainer = Trainer(config, resume)
        try:
            return _train(trainer, folder, fresh=resume is None)
        finally:
            trainer.batches.close()


def _train(trainer: Trainer, folder: Path, *, fresh: bool) -> Path:
    config = trainer.config
    if not fresh and trainer.step >= config.steps:
        raise ValueError(f"{folder} is complete, at step {trainer.step} of {config.steps}")
    # The first batch proves that there is data before anything is written.
    trainer.batches.batch(trainer.step)
    folder.mkdir(parents=True, exist_ok=not fresh)
    (folder / "config.json").write_text(json.dumps(as_plain(config), indent=2) + "\n")

    def save() -> Path:
        return checkpoints.save(folder, trainer.checkpoint(), config.keep)

    path = save() if fresh else checkpoints.path_of(folder, trainer.step)
    log = Log(trainer, folder)
    try:
        with stop_signals() as stop:
            trainer.model.train()
            while trainer.step < config.steps:
                log.add(*trainer.train_step())
                last = trainer.step == config.steps
                if last or stop or trainer.step % config.save_every == 0:
                    log.flush()
                    path = save()
                if stop and not last:
                    raise Stopped(stop[0], path)
                if last or (config.preview.every and trainer.step % config.preview.every == 0):
                    log.preview()
    finally:
        log.close()
    return path


def train_or_continue(config: TrainConfig) -> Path:
    """The last checkpoint of the run, trained as far as that is still to be done; what is in its folder is kept."""
    folder = Path(config.run)
    if not folder.exists():
        return train(config)
    path, checkpoint = checkpoints.latest(folder)
    started = dataclasses.replace(from_dict(checkpoint.train), run=config.run)
    if checkpoint.step == started.steps:
        print(f"{folder} is trained already: {path}")
        return path
    return train(started, checkpoint)


def parse(arguments: list[str]) -> tuple[TrainConfig, Checkpoint | None]:
    """The configuration of a command line, and the checkpoint to resume.

    Raises:
        ValueError: a preset, file or checkpoint that does not fit, or options that change a resumed run.
    """
    start, rest = start_parser("python -m models.train").parse_known_args(arguments)
    resume = None
    default = TrainConfig()
    if start.resume is not None:
        path, resume = checkpoints.latest(start.resume)
        print(f"resuming from {path}")
        # The folder may have been moved since.
        default = dataclasses.replace(from_dict(resume.train), run=start.resume)
    elif start.config is not None:
        default = load(start.config)
    elif start.preset is not None:
        default = preset(start.preset)
    if resume is not None and (start.model or start.objective):
        raise ValueError("model and objective cannot change in a resumed run; start a new one")
    default = choose(default, start.model, start.objective)
    description = (
        f"{__doc__}\nStart from --preset NAME, --config FILE or --resume RUN, then choose a system with --model NAME "
        f"('list' shows them) and an objective with --objective {{{','.join(OBJECTIVES)}}}; the options below change "
        "it."
    )
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[TrainConfig],
        prog="python -m models.train",
        description=description,
        default=default,
        args=rest,
    )
    if resume is not None:
        moved = default
        if resume.text_encoder is not None and config.text.encoder is not None:
            moved = dataclasses.replace(moved, text=dataclasses.replace(moved.text, encoder=config.text.encoder))
        if resume.data_digest is not None:
            moved = dataclasses.replace(moved, data=dataclasses.replace(moved.data, source=config.data.source))
        names = [item.name for item in dataclasses.fields(config)]
        changed = [name for name in names if getattr(config, name) != getattr(moved, name)]
        refused = [name for name in changed if name not in RESUMABLE]
        if refused:
            raise ValueError(f"{', '.join(refused)} cannot change in a resumed run; start a new one")
        if "steps" in changed and config.optimizer.schedule != "constant":
            raise ValueError("steps cannot change in a resumed run whose learning rate falls to 0 at the last step")
    return config, resume


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    reuse_large_allocations()
    try:
        config, resume = parse(sys.argv[1:] if arguments is None else arguments)
        path = train(config, resume)
    except Stopped as stopped:
        print(f"{stopped}\ncontinue with: python -m models.train --resume RUN", file=sys.stderr)
        sys.exit(stopped.status)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    follows = "measure" if getattr(config.model, "autoencoder", False) else "sample"
    print(f"trained: {path}\n{follows} with: python -m models.{follows} {path.parent}")


if __name__ == "__main__":
    main()
