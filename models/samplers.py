"""From noise to samples: solvers of the flow's ODE and of the reversed diffusion, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import guided_step

from . import integrators
from .denoisers.text import Text, rows
from .integrators import FLOW_SOLVERS, Plan, Progress, SolverOptions
from .objectives.common import TIMESTEPS, at_least_float32, expand
from .objectives.ddpm import DDPM, Schedule, space_timesteps
from .objectives.flow import FlowMatching
from .objectives.logsnr import LogSNR, logsnr, noise_level, scales
from .registry import Objective

SOLVERS = {"flow": FLOW_SOLVERS, "ddpm": ("ddpm", "ddim"), "logsnr": ("ddpm", "ddim")}


def diffusion_plan(objective: DDPM, solver: str, steps: int | str, guidance: float) -> Plan:
    """DDPM: the mean of p(x_{i-1} | x_i) and noise. DDIM: the predicted x_0, diffused again by the predicted noise.

    A learned variance lies between beta and the posterior variance; one that is not is beta. ``steps`` as in
    :func:`space_timesteps`. On the CPU, in float64.

    Raises:
        ValueError: steps that do not fit; those of a schedule with zero terminal SNR start at timestep 999.
    """
    kept = space_timesteps(steps)
    if objective.zero_snr and kept[-1] != TIMESTEPS - 1:
        raise ValueError(
            f"steps is {steps!r}, which starts at timestep {kept[-1]}; with zero_snr only timestep {TIMESTEPS - 1} is "
            "pure noise: use a number, or sections whose last has more than 1"
        )
    tables = objective.tables(kept, torch.device("cpu"), torch.float64)
    tables = Schedule(*(table.flip(0)[:, None] for table in tables))
    (x0_of_x, x0_of_prediction), (noise_of_x, noise_of_prediction) = objective.weights(tables)
    if solver == "ddim":
        x_0, x, noise = tables.previous.sqrt(), 0.0, (1 - tables.previous).sqrt()
    else:
        x_0, x, noise = tables.posterior_x0_weight, tables.posterior_x_weight, 0.0
    of_x = x_0 * x0_of_x + x + noise * noise_of_x
    of_prediction = x_0 * x0_of_prediction + noise * noise_of_prediction
    slope = (tables.beta.log() - tables.posterior_log_variance) / 4
    coefficients = integrators.step_rows(guidance, of_x, of_prediction, tables.beta.sqrt(), slope)
    return Plan(tables.timesteps, coefficients, noisy=solver == "ddpm", noisy_end=False)


def logsnr_plan(objective: LogSNR, solver: str, steps: int, guidance: float) -> Plan:
    """DDPM and DDIM over the logSNR of evenly spaced r from 1 to 0, with ``objective.sample_shift``.

        x' = a' x_0 + sqrt(b'^2 - sigma^2) e + sigma z       sigma = b' / b sqrt(1 - a^2 / a'^2) for DDPM, 0 for DDIM

    The last step returns x_0 itself (a' = 1, b' = 0), not the noisy sample at the schedule's bound. On the CPU, in
    float64.
    """
    value = logsnr(torch.linspace(1, 0, steps + 1, dtype=torch.float64), objective.sample_shift)
    a, b = (scale[:-1] for scale in scales(value))
    next_a, next_b = (F.pad(scale[1:-1], (0, 1), value=end) for scale, end in zip(scales(value), (1, 0), strict=True))
    # x_0 and e as sums of x and of the prediction
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    if objective.prediction == "noise":
        x_0, e = (1 / a, -b / a), (zero, one)
    else:
        x_0, e = (a, -b), (b, a)
    sigma = next_b / b * (1 - (a / next_a).square()).sqrt() if solver == "ddpm" else zero
    of_e = (next_b.square() - sigma.square()).sqrt()
    of_x, of_prediction = (next_a * of_x_0 + of_e * of_noise for of_x_0, of_noise in zip(x_0, e, strict=True))
    coefficients = integrators.step_rows(guidance, of_x, of_prediction, sigma)[:, None]
    times = noise_level(value[:-1])[:, None] * TIMESTEPS
    return Plan(times, coefficients, noisy=solver == "ddpm", noisy_end=False)


def count_steps(objective: Objective, steps: int | str) -> int:
    """How many steps ``steps`` are: a number, or for a diffusion also what :func:`space_timesteps` takes.

    Raises:
        ValueError: steps that are not the objective's.
    """
    if isinstance(objective, DDPM):
        return len(space_timesteps(steps))
    if not isinstance(steps, int):
        raise ValueError(f"steps is {steps!r}; objective {objective.name!r} takes a number, only 'ddpm' has timesteps")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    return steps


def rescaled(cond: Tensor, null: Tensor, guidance: Tensor | float, share: float, count: int, guided: int) -> Tensor:
    """The guided prediction, a share of which has the spread of the one with classes.

        g = null + w (cond - null)          share g std(cond) / std(g) + (1 - share) g

    The standard deviation is over all of a sample (StableCascade takes it over the batch, so that a sample depends on
    its batch-mates). Strong guidance widens the prediction, and pictures come out overexposed (Lin et al. 2023, arXiv
    2305.08891).

    Args:
        cond, null: ``[B, C, ...]``, or ``[B, 2 C, ...]`` with a learned variance, which stays that of cond.
        count: C.
        guided: how many of the C channels are guided.

    Returns:
        as cond, in fp32 at least.
    """
    cond, null = at_least_float32(cond), at_least_float32(null)
    g = cond[:, :count].clone()
    g[:, :guided] = torch.lerp(null[:, :guided], cond[:, :guided], guidance)
    spread, wanted = (expand(part.flatten(1).std(1), g) for part in (g, cond[:, :count]))
    g = g * (share * wanted / spread.clamp_min(1e-9) + 1 - share)
    return torch.cat((g, cond[:, count:]), dim=1)


class Predictor:
    """The model's predictions with classes or text and, for guidance, without: one call on a doubled batch.

    What a call needs besides x comes from :meth:`conditions`. Of a model with ``modulations``, as DiT has them, those
    are computed for many timesteps at once: its conditional layers read their weights once, not once a step.

    ``given`` are further arguments of the model by name, ``[B, ...]``. The call without classes is without past frames
    too. A model with self-conditioning is given its last estimate of the data, each half of a doubled batch its own.

    Raises:
        ValueError: guidance for a model without classes or text, or without labels, unless there are past frames.
    """

    # At a time: enough rows to occupy a matrix product, 200 MB of modulations for DiT-XL.
    ROWS = 256

    def __init__(
        self,
        model: nn.Module,
        y: Tensor | Text | None,
        guidance: float,
        estimate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.guided = model, guidance != 1
        self.ahead = hasattr(model, "modulations") and not isinstance(y, Text)
        # Classes whose modulations are needed, and whose are which sample's: all samples share the null class.
        labels = y.mask if isinstance(y, Text) else y
        self.classes, self.places = y, None if y is None else torch.arange(len(labels), device=labels.device)
        self.given: dict[str, Tensor] = dict(given or {})
        self.previous: Tensor | None = None
        self.estimate = estimate if getattr(getattr(model, "config", None), "self_conditioning", 0) else None
        if self.given and self.ahead:
            raise ValueError(f"{' and '.join(self.given)} cannot be given to a {type(model).__name__}")
        if self.guided and not (y is None and "past" in self.given):
            null_class = getattr(model, "null_class", None)
            if isinstance(y, Text):
                self.classes = Text(*map(torch.cat, zip(y, y.null(), strict=True)))
            elif y is None or null_class is None:
                raise ValueError(f"guidance is {guidance}; without classes or text it must be 1")
            else:
                self.classes = torch.cat((y, y.new_full((1,), null_class)))
            self.places = torch.cat((self.places, torch.full_like(self.places, len(self.places))))
        if self.guided:
            self.given = {name: torch.cat((value, value)) for name, value in self.given.items()}
            if "past" in self.given:
                batch, _, k = self.given["past"].shape[:3]
                self.given["past_frames"] = (torch.arange(batch, device=self.given["past"].device) < batch // 2) * k

    def conditions(self, times: Tensor) -> Iterator[Tensor]:
        """One for each of the timesteps ``times``."""
        if not self.ahead:
            yield from times
            return
        count = 1 if self.classes is None else len(self.classes)
        for part in times.split(max(1, self.ROWS // count)):
            classes = None if self.classes is None else self.classes.repeat(len(part))
            yield from self.model.modulations(part.repeat_interleave(count), classes).unflatten(0, (-1, count))

    def __call__(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """The predictions at x ``[B, C, ...]``; the second is None without guidance."""
        if self.guided:
            x = torch.cat((x, x))
        if self.ahead:
            modulations = condition.expand(len(x), -1) if self.places is None else condition[self.places]
            prediction = self.model(x, modulations=modulations)
        else:
            y = None if self.classes is None else rows(self.classes, self.places)
            prediction = self._ask(x, condition.expand(len(x)), y)
        if not self.guided:
            return prediction, None
        cond, null = prediction.chunk(2)
        return cond, null

    def _ask(self, x: Tensor, t: Tensor, y: Tensor | Text | None) -> Tensor:
        previous = {} if self.previous is None else {"previous": self.previous}
        prediction = self.model(x, t, y, **self.given, **previous)
        if self.estimate is not None:
            self.previous = self.estimate(prediction, x, t)
        return prediction


class Graphed:
    """``function`` of tensors (or None) of constant shapes as CUDA graphs, one for each set of arguments that are None.

    A replay launches one graph instead of hundreds of kernels; a capture takes four calls. Not run on a GPU.

    Raises:
        ValueError: a device that is not CUDA.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device; this is {device.type}")
        self.function = function
        self.graphs: dict[tuple[bool, ...], tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        given = tuple(argument is not None for argument in arguments)
        if given not in self.graphs:
            self.graphs[given] = self._capture(arguments)
        graph, places, result = self.graphs[given]
        for place, argument in zip(places, arguments, strict=True):
            if place is not None and argument is not None:
                place.copy_(argument)
        graph.replay()
        return result.clone()  # the next replay overwrites it

    def _capture(self, arguments: Iterable[Tensor | None]) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]:
        places = [None if argument is None else argument.clone() for argument in arguments]
        # Before the capture, and on a stream of its own, as PyTorch asks: what libraries do at their first calls.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(*places)
        return graph, places, result


def _check_guidance_channels(guidance: float, channels: int | None, of: int) -> None:
    if channels is not None and guidance == 1:
        raise ValueError(f"guidance_channels is {channels}, but guidance is 1, which is none")
    if channels is not None and not 1 <= channels <= of:
        raise ValueError(f"guidance_channels is {channels}; it must be in 1..{of}")


@torch.no_grad()
def sample(
    model: nn.Module,
    objective: Objective,
    noise: Tensor,
    y: Tensor | Text | None,
    *,
    solver: str,
    steps: int | str | None = None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    guidance_rescale: float = 0.0,
    options: SolverOptions | None = None,
    reverse: bool = False,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    cuda_graphs: bool = False,
    past: Tensor | None = None,
    low: Tensor | None = None,
    low_t: Tensor | None = None,
) -> Tensor:
    """Samples from ``noise``; the model is in eval mode meanwhile.

    Args:
        model: a DiT, or any module with its call; with classes and guidance it has ``null_class``.
        objective: what the model was trained with.
        noise: ``[B, C, ...]``, standard normal.
        y: classes ``[B]``, captions, or None for an unconditional model.
        solver: for flow matching, of the ODE: ``"euler"``, ``"heun"`` and ``"midpoint"`` (two calls a step, second
            order), ``"rk4"`` (four, fourth) or ``"dopri5"`` (adaptive; the samples of a batch share its steps); of the
            SDE: ``"euler_maruyama"`` or ``"heun_sde"`` (two calls a step). For DDPM and LogSNR ``"ddpm"``
            (ancestral) or ``"ddim"`` (deterministic, eta = 0; Song et al. 2020, arXiv 2010.02502).
        steps: how many; for DDPM that many evenly spaced ones of the 1000 timesteps, or those of ``"ddimN"`` or of
            sections such as ``"10,15,20"`` (:func:`models.diffusion.space_timesteps`). None for ``"dopri5"`` alone.
        guidance: classifier-free guidance scale; 1 is none and costs half.
        guidance_channels: guide the first so many channels only; None guides all.
        guidance_rescale: share of the guided prediction that :func:`rescaled` gives the spread of the one with classes;
            it is computed in PyTorch, not by the op.
        options: of the SDE solvers and of ``"dopri5"``.
        reverse: solve the ODE from data, given as ``noise``, to noise.
        generator: of the noise that ``"ddpm"`` and the SDE solvers add at each step.
        progress: wraps the iterable of steps, as tqdm does.
        cuda_graphs: replay the steps as CUDA graphs; the capture takes four calls. Not run on a GPU.
        past: for frame prediction, the known first frames ``[B, C, k, ...]``; the result begins with them.
        low, low_t: for super-resolution, the small clip and the level of its noise, as the model takes them.

    Returns:
        ``[B, C, ...]`` in noise's dtype.

    Raises:
        ValueError: a solver that is not the objective's, steps, guidance or options that do not fit, CUDA graphs on a
            CPU or with self-conditioning.
    """
    options = options or SolverOptions()
    allowed = SOLVERS[objective.name]
    if solver not in allowed:
        raise ValueError(f"solver is {solver!r}; objective {objective.name!r} has {' and '.join(map(repr, allowed))}")
    options.check(solver)
    if reverse and (solver in integrators.SDE_SOLVERS or not isinstance(objective, FlowMatching)):
        raise ValueError(f"reverse needs a solver of the flow's ODE; solver is {solver!r}")
    if solver == "dopri5" and steps is not None:
        raise ValueError(f"steps is {steps}, but solver 'dopri5' takes what its tolerances need")
    if solver != "dopri5" and steps is None:
        raise ValueError(f"steps is None; with solver {solver!r} it must be at least 1")
    count = 1 if steps is None else count_steps(objective, steps)
    _check_guidance_channels(guidance, guidance_channels, noise.shape[1])
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; it must be in [0, 1]")
    if guidance_rescale > 0 and guidance == 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}, but guidance is 1, which is none")
    if past is not None and not isinstance(objective, DDPM):
        raise ValueError(f"past was given, but objective {objective.name!r} teaches no model to go on from it")
    given = {name: value for name, value in (("past", past), ("low", low), ("low_t", low_t)) if value is not None}
    predict = Predictor(model, y, guidance, getattr(objective, "estimate", None), given)
    if cuda_graphs and predict.estimate is not None:
        raise ValueError("cuda_graphs is True; a model with self-conditioning keeps an estimate between its calls")

    def update(x: Tensor, condition: Tensor, row: Tensor, z: Tensor | None) -> Tensor:
        cond, null = predict(x, condition)
        objective.check(cond, x)
        if null is not None and guidance_rescale > 0:
            channels = x.shape[1]
            cond = rescaled(cond, null, guidance, guidance_rescale, channels, guidance_channels or channels)
            return guided_step(x, cond, row, z=z)
        return guided_step(x, cond, row, null=null, z=z, channels=guidance_channels)

    if cuda_graphs:
        update = Graphed(update, noise.device)
    x = noise
    was_training = model.training
    model.eval()
    try:
        if solver == "dopri5":
            start, end = reversed(objective.interval()) if reverse else objective.interval()
            velocity = integrators.velocity_of(objective, update, predict.conditions, guidance)
            for _ in (progress or iter)(range(1)):
                x = integrators.dopri5(velocity, at_least_float32(x), start, end, options)
            return x.to(noise.dtype)
        if isinstance(objective, FlowMatching):
            plan = integrators.flow_plan(objective, solver, steps, guidance, options, reverse=reverse)
        elif isinstance(objective, LogSNR):
            plan = logsnr_plan(objective, solver, count, guidance)
        else:
            plan = diffusion_plan(objective, solver, steps, guidance)
        x = integrators.follow(plan, update, predict.conditions, x, generator, progress)
        return x if past is None else torch.cat((past.to(x.dtype), x[:, :, past.shape[2] :]), dim=2)
    finally:
        model.train(was_training)


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    objective: Objective,
    x: Tensor,
    y: Tensor | None,
    *,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    exact: bool = False,
    options: SolverOptions | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The log-density of ``x [B, C, ...]`` in nats, ``[B]``, under the flow's ODE; the model is in eval mode meanwhile.

    For bits per dimension of 8-bit data on [-1, 1]: ``log2(127.5) - log_likelihood / (D log 2)``, for x with uniform
    noise of a level's width added. See :func:`integrators.log_likelihood`.

    Args:
        model, objective, y, guidance, guidance_channels: as for :func:`sample`; flow matching only.
        exact: the divergence itself, a derivative for every element of a sample; else an unbiased estimate.
        options: the tolerances of dopri5.
        generator: of the estimate's signs, on x's device.

    Raises:
        ValueError: another objective, guidance or options that do not fit.
    """
    if not isinstance(objective, FlowMatching):
        raise ValueError(f"objective is {objective.name!r}; only 'flow' has the ODE of this likelihood")
    options = options or SolverOptions()
    options.check("dopri5")
    _check_guidance_channels(guidance, guidance_channels, x.shape[1])
    predict = Predictor(model, y, guidance)

    def update(x: Tensor, condition: Tensor, row: Tensor, z: Tensor | None) -> Tensor:
        cond, null = predict(x, condition)
        objective.check(cond, x)
        # The kernels have no backward, and this one is differentiated.
        return guided_step(x, cond, row, null=null, z=z, channels=guidance_channels, backend="reference")

    was_training = model.training
    model.eval()
    try:
        velocity = integrators.velocity_of(objective, update, predict.conditions, guidance)
        return integrators.log_likelihood(velocity, x, *objective.interval(), options, exact=exact, generator=generator)
    finally:
        model.train(was_training)
