"""``guided_step``: guidance and the sampler's update. ``as written`` is one equation after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import minisora_kernels as mk
from bench.gpu.launches import HALF, Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import FWD, Problem, Random, cases
from bench.harness.shapes import Latents, Triple, latents
from models.objectives.ddpm import DDPM, schedule, space_timesteps
from models.objectives.flow import FlowMatching
from models.sampling.plans import diffusion_plan
from models.sampling.solvers import flow_plan

GUIDANCE, STEPS, STEP = 4.0, 50, 20

EULER = flow_plan(FlowMatching(), "euler", STEPS, GUIDANCE).coefficients[STEP, 0].tolist()
ANCESTRAL = diffusion_plan(DDPM(), "ddpm", STEPS, GUIDANCE).coefficients[STEP, 0].tolist()
KEPT = schedule(space_timesteps(STEPS), torch.device("cpu"), torch.float64)
TABLES = [table[STEPS - 1 - STEP].item() for table in KEPT]


def _latents(clip: Triple, ancestral: bool, batch: int, **options) -> Latents:
    name = f"{'ddpm' if ancestral else 'euler'} {'x'.join(map(str, clip))} b{batch}"
    return Latents(name, latents(*clip), ancestral, batch, **options)


SHAPES = tuple(
    _latents((16, side, side), ancestral, 4, quick=side == 256) for ancestral in (False, True) for side in (256, 512)
)

TRAFFIC = {
    "guided_step_fwd": Traffic({"x": 1, "cond": 1, "null": 1}, {"y": 1}),
}


def problem(shape: Latents, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    size = (shape.batch, shape.channels, *shape.size)
    predicted = (shape.batch, shape.channels * (2 if shape.ancestral else 1), *shape.size)
    inputs = {
        "x": random(*size),
        "cond": random(*predicted),
        "null": random(*predicted),
        "coefficients": torch.tensor(ANCESTRAL if shape.ancestral else EULER, device=device),
    }
    inputs |= {"z": random(*size)} if shape.ancestral else {}

    def written(t: dict[str, Tensor]) -> Tensor:
        x, (cond, *variance), (null, *_) = t["x"], *(t[name].split(shape.channels, 1) for name in ("cond", "null"))
        g = null + GUIDANCE * (cond - null)
        if not shape.ancestral:
            return x + g / STEPS
        _, beta, alpha_bar, _, x0_weight, x_weight, smallest = TABLES
        x_0 = (x - (1 - alpha_bar) ** 0.5 * g) / alpha_bar**0.5
        mean = x0_weight * x_0 + x_weight * x
        fraction = (variance[0] + 1) / 2
        log_variance = fraction * math.log(beta) + (1 - fraction) * smallest
        return mean + (0.5 * log_variance).exp() * t["z"]

    return Problem(inputs, lambda t: mk.guided_step(**t), list(inputs), ("as written", written))


def _step(learned: bool, guided: bool, noisy: bool, dtypes: dict[str, torch.dtype], dtype: torch.dtype) -> Problem:
    shape, predicted = (2, 4, 8, 16, 16), (2, 8 if learned else 4, 8, 16, 16)
    shapes: dict[str, tuple[int, ...]] = {"x": shape, "cond": predicted, "coefficients": (2, 5)}
    shapes |= {"null": predicted} if guided else {}
    shapes |= {"z": shape} if noisy else {}
    tensors = {name: meta(dtypes.get(name, dtype), *sizes) for name, sizes in shapes.items()}
    return Problem(tensors, lambda t: mk.guided_step(**t), constants=tuple(tensors))


def launches() -> Iterator[Launch]:
    single = {"coefficients": torch.float32}
    for learned in (False, True):
        for guided in (False, True):
            for noisy in (False, True):
                words = {"learned": learned, "guided": guided, "z": noisy}
                name = ", ".join(word for word, there in words.items() if there) or "plain"
                yield Launch(name, partial(_step, learned, guided, noisy, single))
    yield Launch(
        "fp32 state", partial(_step, True, True, True, single | {"x": torch.float32, "z": torch.float32}), HALF
    )


# Small and odd: what the sanitizer runs.
ODD = (Latents("euler", (3, 5, 7), False, 2), Latents("ddpm", (3, 5, 7), True, 2))
# Small: what a call of them costs the host.
HOST = (Latents("", (2, 8, 8), True, 1),)
LAUNCHES = tuple(launches())


@cases(SHAPES, [FWD])
def test_guided_step(bench, shape: Latents, dtype: str, direction: str):
    bench("guided_step", problem, shape, dtype, direction)
