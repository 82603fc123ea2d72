"""``python -m models.plan``: does training or sampling of such clips fit into such GPUs, and how fast could it be?

    python -m models.plan --model latte-xl/1x2x2 --frames 72 --size 480 848 --gpu a100-80g --parallel.shard 8

Nothing is allocated: the model runs on fake tensors, which have shapes but no memory, forward and backward, while
every tensor that an op makes is counted from its birth to its death. So activations are those that this code keeps,
with its kernels, autocast and checkpointing, not a formula; tests/models/test_plan.py holds them against a real step.

    training = weights + gradients + optimizer (two moments) + EMA, fp32, over the GPUs if sharded, + activations;
               gradients, optimizer and EMA are of what is trained, with --lora-rank of the adapters alone, but for a
               sharded EMA, which is of all; of the gradients, those that are there when there is most in all;
               with --parallel.shard + gathered: what belongs to no unit, and the two largest units (parallel/shards.py)
    host     = with --optimizer.offload, in the CPU's memory for each GPU: the moments, and copies of the weights and
               gradients; with shards the weights, gradients, EMA and moments themselves, which the GPU then lacks
    sampling = weights + activations of one guided step
    seconds  = FLOPs / (peak FLOP/s * utilization) + bytes moved by the ops / peak bytes/s
    received = bytes that a GPU gets from others in a step, by collective (Collective)

A training step is a forward and a backward of the model; what an objective adds, as the first pass of a model with
self-conditioning, is not in it. The peaks are the vendors' figures for dense bfloat16 products with fp32 sums, and for
memory; the utilization is an assumption to be replaced by a measurement on that GPU. Not counted: what the allocator
loses between blocks, workspaces of libraries, an autoencoder (encode beforehand, decode in tiles), the gradients of a
unit before they are divided, and that GPUs wait for each other (``bench/scale.py`` estimates that). Sampling is that of
one GPU, or of those that divide the tokens of a clip. tests/training/test_parallel_plan.py holds memory and bytes
against steps of 2 and 4 processes.
"""

from __future__ import annotations

import weakref
from collections import Counter as Counts
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisora_kernels import use_backend
from minisora_kernels.commands import command
from minisora_kernels.counters import Counter, scratch_bytes

from .denoisers.lora import LoRAConfig, adapt
from .parallel.config import ParallelConfig
from .parallel.sequence import Line, check_divisible, dividing
from .parallel.shards import held
from .parallel.traffic import Collective, Parameter, collectives, held_by, parameters_of, parts_of
from .protocols import Model
from .registry import SYSTEMS, build, configure
from .runtime.arguments import read
from .runtime.gpus import GPUS
from .runtime.recompute import Keeps, chosen


@dataclass(frozen=True)
class PlanConfig:
    """The model, the clip and the GPUs of a plan."""

    model: Literal[tuple(SYSTEMS)]  # type: ignore[valid-type]
    """Name of a system; `python -m models.train --model list` describes them."""
    gpu: Literal[tuple(GPUS)]  # type: ignore[valid-type]
    """GPU whose memory and published peaks are used."""
    frames: int = 16
    """Frames per clip."""
    size: tuple[int, int] = (256, 256)
    """Height and width in pixels."""
    compression: tuple[int, int] = (1, 8)
    """Frames per latent frame, and pixels per latent cell on each side; `1 1` for a model of pixels."""
    channels: int = 4
    """Channels of the latents."""
    classes: int = 1000
    """Number of classes."""
    batch_size: int = 1
    """Clips per GPU, or per group of GPUs that divide the tokens of a clip."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    backend: Literal["reference", "kernels"] = "reference"
    """Plain PyTorch, or the kernels."""
    checkpointing: bool = False
    """Recompute the blocks in the backward."""
    checkpointing_keeps: Keeps = "nothing"
    """With checkpointing: outputs that are kept all the same, those of attention, or of attention and products."""
    offload: Annotated[bool, tyro.conf.arg(name="optimizer.offload")] = False
    """Keep the moments in the CPU's memory, with shards the weights, gradients and averages too."""
    lora_rank: int = 0
    """Rank of adapters on all Linears, which alone are trained; 0 trains all weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the activations."""
    steps: int = 50
    """Steps of sampling. Each calls the model on a doubled batch, for guidance."""
    utilization: float = 0.5
    """Share of the peak FLOP/s that matrix products reach: an assumption, not a measurement."""
    reserve: float = 0.1
    """Share of the GPU's memory for CUDA, its libraries and fragmentation: an assumption, not a measurement."""


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at a time.

    A storage counts once, in full, from the op that returns it until it is freed; that of an argument does not count.
    What an op of this package holds while it runs counts until it returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outside = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in outside and key not in self._seen:
                    self._seen.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now + scratch_bytes(func, args))
        return result

    def mark(self) -> int:
        """The most bytes since the last mark."""
        peak, self.peak = self.peak, self.now
        return peak

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Needs(NamedTuple):
    """Of one GPU: bytes by what holds them, FLOPs, bytes moved by the ops, what it sends, and bytes of the CPU."""

    memory: dict[str, float]
    flops: int
    moved: int
    collectives: tuple[Collective, ...] = ()
    host: Mapping[str, float] = MappingProxyType({})

    @property
    def total(self) -> float:
        """Bytes of memory in all."""
        return sum(self.memory.values())


def available(config: PlanConfig) -> float:
    """Bytes of a GPU that are not reserved."""
    return GPUS[config.gpu].memory * (1 - config.reserve)


def _model(config: PlanConfig, *, training: bool) -> tuple[Model, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    time, space = config.compression
    if any(side % space for side in config.size):
        raise ValueError(f"size is {config.size}; it must be a multiple of compression {space}")
    if (config.frames - 1) % time:
        raise ValueError(f"frames is {config.frames}; with compression {time} it must be 1 + a multiple of that")
    frames = 1 + (config.frames - 1) // time
    height, width = (side // space for side in config.size)
    settings = SYSTEMS[config.model].settings
    built_from = configure(settings, config.channels, frames, (height, width), config.classes)
    if config.lora_rank and training:
        with unset_fake_temporarily(), torch.device("meta"):  # peft moves its weights, which fake tensors refuse
            model = build(built_from)
            adapt(model, LoRAConfig(config.lora_rank))
        _allocate(model)
    else:
        model = build(built_from)
    x = torch.empty(config.batch_size, config.channels, *model.config.input_size)
    y = torch.zeros(config.batch_size, dtype=torch.int64) if config.classes else None
    return model, x, torch.empty(config.batch_size), y


def _allocate(model: torch.nn.Module) -> None:
    """Fake tensors in place of those on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class Run(NamedTuple):
    """Of one step: bytes of activations, FLOPs, bytes moved, and what ranks that divide tokens give to collectives.

    ``arrivals`` are the gradients in the order of the backward: the most bytes of activations since the last one, and
    the number of the parameter.
    """

    activations: int
    arrivals: tuple[tuple[int, int], ...]
    flops: int
    moved: int
    parameters: tuple[Parameter, ...]
    given: dict[str, int]


def _run(config: PlanConfig, *, training: bool, backend: str) -> Run:
    given: Counts[str] = Counts()
    line = Line(ranks=config.parallel.sequence, given=given)
    with FakeTensorMode(), use_backend(backend), dividing(line):
        model, x, t, y = _model(config, training=training)
        check_divisible(line.ranks, model.divisible())
        model.train(training)
        model.checkpointing = chosen(config.checkpointing, config.checkpointing_keeps)
        if not training:
            x, t = torch.cat((x, x)), torch.cat((t, t))
            y = None if y is None else torch.cat((y, y))
        arrivals: list[tuple[int, int]] = []
        numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}

        def arrived(parameter: torch.Tensor) -> None:
            parameter.grad = None  # gradients are counted by themselves
            arrivals.append((alive.mark(), numbers[id(parameter)]))

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(arrived)
        with Counter() as counter, Alive() as alive, torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(x, t, y).square().mean()
            if training:
                loss.backward()
    activations = max([alive.peak, *(peak for peak, _ in arrivals)])
    return Run(activations, tuple(arrivals), counter.flops, counter.moved, parameters_of(model), given)


def needs(config: PlanConfig, *, training: bool) -> Needs:
    """What a training step, or a guided step of sampling, needs of each GPU.

    Raises:
        ValueError: sizes that the model does not take.
    """
    return needs_of(work(config, training=training), config, training=training)


def work(config: PlanConfig, *, training: bool) -> Run:
    """The step that :func:`needs` prices; of ``parallel`` it depends on ``sequence`` alone, and not on the GPU.

    Raises:
        ValueError: as :func:`needs`.
    """
    for name in ("frames", "batch_size", "steps", "channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("size", "compression"):
        if min(getattr(config, name)) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; both numbers must be at least 1")
    if config.classes < 0:
        raise ValueError(f"classes is {config.classes}; it must be at least 0")
    if SYSTEMS[config.model].settings.autoencoder:
        raise ValueError(f"model is {config.model!r}, an autoencoder; it must be a model that denoises")
    for name, low, high in (("utilization", 0.01, 1.0), ("reserve", 0.0, 0.9)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be in [{low}, {high}]")
    backend = "cpu" if config.backend == "kernels" else "reference"  # whose memory is that of the other kernels
    run = _run(config, training=training, backend=backend)
    if backend != "reference":  # it has the same products, in ops whose FLOPs torch knows
        run = run._replace(flops=_run(config, training=training, backend="reference").flops)
    return run


def needs_of(run: Run, config: PlanConfig, *, training: bool) -> Needs:
    """What each GPU needs for a step whose :func:`work` is known."""
    parallel = config.parallel
    if not training:
        exchanged = collectives((), run.given, parallel, bf16=False)
        weights = 4 * held_by(run.parameters, 1)
        return Needs({"weights": weights, "activations": run.activations}, run.flops, run.moved, exchanged)
    bf16 = config.precision == "bf16"
    memory, host = states(run, parallel, bf16=bf16), dict[str, float]()
    if config.offload:
        memory, host = offloaded(memory, sharded=parts_of(parallel) > 1)
    return Needs(memory, run.flops, run.moved, collectives(run.parameters, run.given, parallel, bf16=bf16), host)


def states(run: Run, parallel: ParallelConfig, *, bf16: bool) -> dict[str, float]:
    """Bytes of a training on a GPU, by what holds them.

    ``gradients`` is what they add to the activations at the moment when there is most of both; copies have all of them
    all the time, in DDP's buckets. ``gathered`` is what a sharded model has whole at a time: what no unit has, and the
    two largest units.
    """
    parts = parts_of(parallel)
    weights = 4 * held_by(run.parameters, parts)
    trained = 4 * held_by((p for p in run.parameters if p.trained), parts)
    most = there = 0
    for activations, number in run.arrivals:
        most = max(most, there + activations)
        there += 4 * held_by([run.parameters[number]], parts)
    found: dict[str, float] = {
        "weights": weights,
        "gradients": trained if parts == 1 < parallel.size else max(most, there) - run.activations,
        "optimizer": 2 * trained,
        "ema": trained if parts == 1 else weights,
        "activations": run.activations,
    }
    if parts > 1:
        sizes: Counts[int | None] = Counts()
        for p in run.parameters:
            sizes[p.unit] += parts * held(p.shape, parts)
        rest = sizes.pop(None, 0)
        found["gathered"] = 4 * rest + (2 if bf16 else 4) * sum(sorted(sizes.values())[-2:])
    return found


def offloaded(memory: dict[str, float], *, sharded: bool) -> tuple[dict[str, float], dict[str, float]]:
    """What ``--optimizer.offload`` leaves of :func:`states` on a GPU, and what the CPU's memory has for it then."""
    trained = memory["optimizer"] / 2
    host = {"weights": trained, "gradients": trained, "optimizer": 2 * trained}
    if not sharded:  # copies of weights and gradients, beside the moments
        return {name: size for name, size in memory.items() if name != "optimizer"}, host
    host |= {name: memory[name] for name in ("weights", "ema")}
    return {name: size for name, size in memory.items() if name not in host}, host


def seconds(need: Needs, config: PlanConfig) -> float:
    """Seconds that the FLOPs and the bytes take at the peaks of the GPU."""
    gpu = GPUS[config.gpu]
    return need.flops / (gpu.flops * config.utilization) + need.moved / gpu.bandwidth


def report(config: PlanConfig) -> str:
    """The plan in words and numbers; every assumption is named."""
    gpu, parallel = GPUS[config.gpu], config.parallel
    divided = f" of {parallel}" if parallel.size > 1 else ""
    lines = [
        f"{config.model}, {config.frames} frames of {config.size[0]}x{config.size[1]}, {config.batch_size} at a time, "
        f"{config.precision}, {config.backend}, on {parallel.size} x {config.gpu}{divided}",
        f"peaks: {gpu.memory / 1e9:.0f} GB, {gpu.flops / 1e12:.0f} TFLOP/s bfloat16, {gpu.bandwidth / 1e9:.0f} GB/s "
        f"({gpu.source}); assumed: {config.utilization:.0%} of the FLOP/s, {config.reserve:.0%} of the memory reserved",
    ]
    for training in (True, False):
        need = needs(config, training=training)
        parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in need.memory.items())
        fits = "fits" if need.total <= available(config) else "does NOT fit"
        step = seconds(need, config)
        lines.append(
            f"{'training' if training else 'sampling'}: {need.total / 1e9:.2f} GB a GPU ({parts}) {fits} in "
            f"{available(config) / 1e9:.1f} GB"
        )
        if need.host:
            parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in need.host.items())
            lines.append(f"  and {sum(need.host.values()) / 1e9:.2f} GB of the CPU's memory for each GPU ({parts})")
        if training:
            clips = config.batch_size * parallel.shares / step
            lines.append(
                f"  {need.flops / 1e12:.1f} TFLOP and {need.moved / 1e9:.0f} GB moved a step: {step:.2f} s, "
                f"{clips:.2f} clips/s"
            )
        else:
            lines.append(f"  {config.steps} guided steps: {config.steps * step:.1f} s for {config.batch_size} clips")
        if need.collectives:
            each = " + ".join(
                f"{one.what} {one.received / 1e9:.3f} ({one.kind} over {one.ranks})" for one in need.collectives
            )
            received = sum(one.received for one in need.collectives)
            lines.append(f"  each GPU receives {received / 1e9:.3f} GB a step: {each}")
    return "\n".join(lines)


@command()
def main(arguments: list[str]) -> None:
    print(report(read(PlanConfig, f"python -m {__package__}.plan", __doc__, arguments)))


if __name__ == "__main__":
    main()
