"""A pair of DiT blocks (spatial, then temporal), a training step, and a sampling step with classifier-free guidance.

The whole model is in the case's dtype. Its adaLN and final weights are random: in a fresh DiT they are zero, so most of
it would be multiplied by nothing. ``as written`` is the model of ``written.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.harness.session import BOTH, FWD, Problem, Random, cases, on_backend, ours_on
from bench.harness.shapes import LONG, Model, Triple, latents
from bench.written import WrittenDiT
from minisora_kernels import adaln, guided_step
from models.denoisers.dit import SIZES, DiT, DiTConfig
from models.denoisers.layers import Modulation
from models.objectives.flow import FlowMatching
from models.sampling.predictor import Predictor
from models.sampling.solvers import flow_plan

GUIDANCE, STEPS = 4.0, 50


def model_shape(size: str, clip: Triple, depth: int | None = None, **options) -> Model:
    settings: dict = {**SIZES[size], **({} if depth is None else {"depth": depth})}
    config = DiTConfig(
        input_size=latents(*clip),
        patch=(1, 2, 2),
        channels=4,
        attention="factorized",
        num_classes=10,
        class_dropout=0.0,
        **settings,
    )
    return Model(f"factorized {size}/2 {'x'.join(map(str, clip))} b1", config, **options)


BLOCK = (model_shape("XL", (16, 256, 256), quick=True, depth=2, dtypes=LONG),)
TRAINING_STEP = (
    model_shape("B", (16, 256, 256), dtypes=LONG),
    model_shape("S", (16, 256, 256), dtypes=LONG),
    model_shape("S", (8, 256, 256), dtypes=("float32",)),
)
SAMPLING_STEP = TRAINING_STEP[:2]  # in float32 a sampling run does
# A short clip: the shorter, the more of a step goes into what does not depend on the tokens.
SAMPLING_RUN = (model_shape("XL", (1, 256, 256), depth=2),)


class Blocks(nn.Module):
    """The blocks of a DiT and the norm that reads them: tokens and condition to tokens and normalised tokens."""

    def __init__(self, model: DiT | WrittenDiT) -> None:
        super().__init__()
        self.blocks: Any = model.blocks
        self.norm = model.final_layer.adaLN_modulation
        self.written = [model] if isinstance(model, WrittenDiT) else []  # a list: not one more path to the parameters

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.written:
            return self.written[0].trunk(x, c)
        modulations = [block.adaLN_modulation(c).chunk(6, dim=-1) for block in self.blocks]
        modulations.append(self.norm(c).chunk(2, dim=-1))
        y = adaln(x, modulations[0][0], modulations[0][1])
        for block, own, (shift, scale, *_) in zip(self.blocks, modulations, modulations[1:], strict=False):
            x, y = block(x, y, Modulation(*own), shift, scale)
        return x, y


class TrainingStep(nn.Module):
    """Mean squared error of the prediction."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.model(x, t, y), target)


class Sampling(nn.Module):
    """Guided Euler steps of 50 at the times ``t``; ``together``: how many have their modulations computed at once."""

    def __init__(self, model: DiT | WrittenDiT, together: int | None = None) -> None:
        super().__init__()
        self.model, self.together = model, together
        plan = flow_plan(FlowMatching(), "euler", STEPS, GUIDANCE)
        self.coefficients = plan.coefficients[0, 0].to(next(model.parameters()).device, torch.float32)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        predict = Predictor(self.model, y, GUIDANCE)
        for part in t.split(self.together or len(t)):
            for condition in predict.conditions(part):
                cond, null = predict(x, condition)
                x = guided_step(x, cond, self.coefficients, null=null)
        return x


def build(shape: Model, dtype: torch.dtype, device: torch.device) -> DiT:
    torch.manual_seed(0)
    model = DiT(shape.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or name.startswith("final_layer") or name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model.to(device, dtype)


def problem_of(step: Callable[[Any], nn.Module], model: DiT, data: dict[str, Tensor], constants: list[str]) -> Problem:
    """``step`` of the model and of the one as written, as functions of data and parameters."""

    def call_of(module: nn.Module):
        def call(tensors: dict[str, Tensor]):
            parameters = {name: tensor for name, tensor in tensors.items() if name not in data}
            return functional_call(module, parameters, tuple(tensors[name] for name in data))

        return call

    ours, written = step(model), step(WrittenDiT(model))
    parameters = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    frozen = [name for name, parameter in ours.named_parameters() if not parameter.requires_grad]
    return Problem(data | parameters, call_of(ours), constants + frozen, ("as written", call_of(written)), model=True)


def block(shape: Model, dtype: torch.dtype, device: torch.device) -> Problem:
    random, model = Random(dtype, device), build(shape, dtype, device)
    width = shape.config.width
    data = {"x": random(shape.batch, model.tokens_per_sample, width), "c": random(shape.batch, width)}
    return problem_of(Blocks, model, data, [])


def training_step(shape: Model, dtype: torch.dtype, device: torch.device) -> Problem:
    random, size = Random(dtype, device), (shape.batch, shape.config.channels, *shape.config.input_size)
    data = {
        "x": random(*size),
        "t": torch.linspace(100, 900, shape.batch, device=device),
        "y": torch.arange(shape.batch, device=device),
        "target": random(*size),
    }
    return problem_of(TrainingStep, build(shape, dtype, device), data, list(data))


def sampling_data(shape: Model, dtype: torch.dtype, device: torch.device, steps: int) -> dict[str, Tensor]:
    return {
        "x": Random(dtype, device)(shape.batch, shape.config.channels, *shape.config.input_size),
        "t": 500 + 1000 / STEPS * torch.arange(steps, device=device),
        "y": torch.arange(shape.batch, device=device),
    }


def sampling_step(shape: Model, dtype: torch.dtype, device: torch.device) -> Problem:
    data = sampling_data(shape, dtype, device, 1)
    return problem_of(Sampling, build(shape, dtype, device), data, list(data))


def sampling_run(shape: Model, dtype: torch.dtype, device: torch.device) -> Problem:
    """A few steps; the written form is ours, kernels and all, but for modulations that are computed step by step."""
    data, model = sampling_data(shape, dtype, device, 4), build(shape, dtype, device)
    problem = problem_of(Sampling, model, data, list(data))
    step_by_step = problem_of(lambda model: Sampling(model, 1), model, data, list(data))
    return dataclasses.replace(problem, written=("step by step", on_backend(ours_on(device), step_by_step.call)))


@cases(BLOCK)
def test_block(bench, shape: Model, dtype: str, direction: str):
    bench("block pair", block, shape, dtype, direction)


@cases(TRAINING_STEP, [BOTH])
def test_training_step(bench, shape: Model, dtype: str, direction: str):
    bench("training step", training_step, shape, dtype, direction)


@cases(SAMPLING_RUN, [FWD])
def test_sampling_run(bench, shape: Model, dtype: str, direction: str):
    bench("sampling run", sampling_run, shape, dtype, direction)


@cases(SAMPLING_STEP, [FWD])
def test_sampling_step(bench, shape: Model, dtype: str, direction: str):
    bench("sampling step", sampling_step, shape, dtype, direction)
