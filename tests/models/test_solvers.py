"""sampling/solvers.py on a mixture of two Gaussians, whose velocity, score and density are known at every time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from models.denoisers.dit import DiT, DiTConfig
from models.objectives.ddpm import DDPM
from models.objectives.flow import FlowMatching
from models.protocols import Denoiser
from models.sampling.sampler import SampleRequest, Solving, log_likelihood, sample
from models.sampling.solvers import FLOW_SOLVERS, SDE_SOLVERS, TABLEAUX, SolverOptions, diffusion_strength, flow_plan

PATHS = ("linear", "gvp", "vp")
KINDS = ("velocity", "data", "score", "noise")
FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")
ODE_SOLVERS = tuple(solver for solver in FLOW_SOLVERS if solver not in SDE_SOLVERS)

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-1.4, 0.6], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.4], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def literal(path, t):
    """alpha, sigma and their derivatives at time t, a float."""
    if path == "linear":
        return t, 1 - t, 1.0, -1.0
    if path == "gvp":
        angle = math.pi / 2
        return math.sin(angle * t), math.cos(angle * t), angle * math.cos(angle * t), -angle * math.sin(angle * t)
    alpha = math.exp(-0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t))
    sigma = math.sqrt(1 - alpha**2)
    d_alpha = alpha * (0.5 * (1 - t) * 19.9 + 0.05)
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma if sigma else -math.inf


def marginal(path, t):
    """Means and standard deviations of the two parts of x_t."""
    alpha, sigma = literal(path, t)[:2]
    return alpha * MEANS, (alpha**2 * STDS**2 + sigma**2).sqrt()


def density(x, path, t):
    means, stds = marginal(path, t)
    return (WEIGHTS * torch.distributions.Normal(means, stds).log_prob(x[..., None]).exp()).sum(-1)


def cdf(x, path, t):
    means, stds = marginal(path, t)
    return (WEIGHTS * torch.special.ndtr((x[..., None] - means) / stds)).sum(-1)


def transported(x, path, start, end):
    """Where the ODE takes x from time ``start`` to ``end``: in one dimension a flow keeps quantiles. By bisection."""
    share = cdf(x, path, start)
    low, high = torch.full_like(x, -12), torch.full_like(x, 12)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, path, end) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def expectations(x, path, t, only=None):
    """E[x_1 | x_t] and E[x_0 | x_t] of every element, of the mixture or of one of its parts."""
    alpha, sigma = literal(path, t)[:2]
    means, stds = marginal(path, t)
    centred = (x[..., None] - means) / stds**2
    if only is None:
        share = (WEIGHTS.log() + torch.distributions.Normal(means, stds).log_prob(x[..., None])).softmax(-1)
    else:
        share = nn.functional.one_hot(torch.tensor(only), 2).double().expand_as(centred)
    return (share * (MEANS + alpha * STDS**2 * centred)).sum(-1), (share * sigma * centred).sum(-1)


class Mixture(Denoiser):
    """The exact prediction in every cell: of the mixture for class 2, which is also "none", else of one part."""

    null_class = 2

    def __init__(self, path, kind="velocity", guidance=None):
        super().__init__()
        self.path, self.kind, self.guidance, self.times = path, kind, guidance, []

    def predict(self, x, t, only):
        _, sigma, d_alpha, d_sigma = literal(self.path, t)
        data, noise = expectations(x, self.path, t, only)
        if self.kind == "velocity":
            return d_alpha * data + d_sigma * noise
        return {"data": data, "noise": noise}[self.kind] if self.kind != "score" else -noise / sigma

    def forward(self, x, t, y):
        (time,) = set((t / 1000).tolist())
        self.times.append(time)
        if self.guidance is not None:  # what guidance makes of the labelled models
            null = self.predict(x, time, None)
            parts = [self.predict(x[i : i + 1], time, int(only)) for i, only in enumerate(y)]
            return null + self.guidance * (torch.cat(parts) - null)
        if y is None:
            return self.predict(x, time, None)
        return torch.cat(
            [self.predict(x[i : i + 1], time, None if only == 2 else only) for i, only in enumerate(y.tolist())]
        )


def quantiles(count):
    """Evenly spaced quantiles of N(0, 1), ``[1, 1, count]``."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[None, None]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(
    path, kind, solver, x, steps=None, *, seed=1, y=None, guidance=1.0, model=None, reverse=False, eps=None, **options
):
    return sample(
        model or Mixture(path, kind),
        FlowMatching(kind, path=path, sample_eps=eps),
        SampleRequest(
            noise=x,
            y=y,
            solver=solver,
            steps=None if solver == "dopri5" else steps,
            guidance=guidance,
            options=SolverOptions(**options),
            reverse=reverse,
            generator=torch.Generator().manual_seed(seed),
        ),
    )


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [("euler", 1, 160), ("heun", 2, 40), ("midpoint", 2, 40), ("rk4", 4, 30), ("rk4_38", 4, 80)],
)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_convergence_orders(path, solver, order, steps):
    # At t = 1 the velocity of VP is not smooth.
    eps = 0.2 if path == "vp" else None
    x = quantiles(50)
    exact = transported(x, path, *FlowMatching(path=path, sample_eps=eps).interval())
    coarse, fine = ((run(path, "velocity", solver, x, n, eps=eps) - exact).abs().max() for n in (steps, 2 * steps))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_ode_solvers_follow_the_flow(solver, path, kind):
    x = quantiles(100)
    objective = FlowMatching(kind, path=path)
    exact = transported(x, path, *objective.interval())
    tolerances = {"rtol": 1e-6} if solver == "dopri5" else {}
    out = run(path, kind, solver, x, {"euler": 400, "rk4": 100, "rk4_38": 100}.get(solver, 200), **tolerances)
    tolerance = 0.03 if solver == "euler" else 1e-3
    if kind == "data":  # its bounded divisor leaves some of the last noise
        tolerance = 0.06 if path == "linear" else 0.015
    assert (out - exact).abs().max() < tolerance


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_every_prediction_gives_the_same_samples(solver, path):
    # Up to 0.9 no divisor is bounded; score and noise start at 0.1, as the others do not, but for VP.
    x = quantiles(50)
    options = {"rtol": 1e-6} if solver == "dopri5" else {}
    out = {kind: run(path, kind, solver, x, 20, eps=0.1, **options) for kind in KINDS}
    pairs = [("velocity", "data"), ("score", "noise")] + ([("data", "noise")] if path == "vp" else [])
    for one, other in pairs:
        torch.testing.assert_close(out[one], out[other], rtol=1e-6, atol=1e-5)


def test_rk4_38_takes_the_steps_of_torchdiffeq():
    from torchdiffeq import odeint

    class Model(Denoiser):
        def forward(self, x, t, y):
            return (x + t[:, None] / 1000).sin() * 2

    x, times = torch.randn(3, 4, dtype=torch.float64), torch.linspace(0, 1, 6, dtype=torch.float64)
    expected = odeint(lambda t, x: (x + t).sin() * 2, x, times, method="rk4")[-1]
    request = SampleRequest(noise=x, solver="rk4_38", steps=5)
    torch.testing.assert_close(sample(Model(), FlowMatching(), request), expected, rtol=1e-12, atol=1e-12)
    classic = sample(Model(), FlowMatching(), dataclasses.replace(request, solver="rk4"))
    assert (classic - expected).abs().max() > 1e-7


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["rk4", "rk4_38", "dopri5"])
def test_reverse_then_forward_returns_the_data(solver, path):
    data = transported(quantiles(50), path, 0.0, 1.0)
    options = {"rtol": 1e-7, "atol": 1e-8} if solver == "dopri5" else {}
    noise = run(path, "velocity", solver, data, 80, reverse=True, **options)
    first, last = FlowMatching(path=path).interval()
    torch.testing.assert_close(noise, transported(data, path, last, first), rtol=0, atol=2e-4)
    again = run(path, "velocity", solver, noise, 80, **options)
    torch.testing.assert_close(again, data, rtol=0, atol=2e-4)


def distance(samples, path):
    """Kolmogorov and Smirnov's; by chance 0.031 once in a thousand times for 4000 samples."""
    ordered = cdf(samples.flatten().sort().values, path, 1.0)
    return (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max()


@pytest.mark.parametrize(
    ("form", "last_step"),
    [*((form, "tweedie") for form in FORMS), *(("sigma", last) for last in ("mean", "euler", "skip"))],
)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_sde_solvers_give_the_distribution(solver, path, form, last_step):
    kind = KINDS[(FORMS.index(form) + len(last_step) + PATHS.index(path)) % 4]
    out = run(path, kind, solver, gaussian(1, 1, 4000), 80, diffusion=form, last_step=last_step)
    assert distance(out, path) < 0.04
    assert out.mean().item() == pytest.approx((WEIGHTS * MEANS).sum().item(), abs=0.05)
    variance = (WEIGHTS * (STDS**2 + MEANS**2)).sum() - (WEIGHTS * MEANS).sum() ** 2
    assert out.var().item() == pytest.approx(variance.item(), abs=0.06)
    assert (out < -0.5).double().mean().item() == pytest.approx(cdf(torch.tensor([-0.5]), path, 1.0).item(), abs=0.03)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_an_sde_forgets_the_noise_that_it_began_with(solver, path):
    x = gaussian(1, 1, 4000)
    out, other = (
        run(path, "velocity", solver, x, 60, diffusion="constant", diffusion_norm=4.0, seed=s) for s in (1, 2)
    )
    for pair in ((x, out), (out, other)):
        assert torch.corrcoef(torch.cat([part.flatten()[None] for part in pair]))[0, 1].abs() < 0.1


class Bent(Denoiser):
    """Nonlinear in x and t, and the exact answer to nothing."""

    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x, t, y):
        self.times.append((t / 1000).tolist())
        return 0.3 * x.sin() + (t / 2000).reshape(-1, 1, 1)


def strength(form, norm, path, t):
    """The table of SiT (Ma et al. 2024), section 3 and appendix; 'sbdm' from the drift of the diffusion."""
    alpha, sigma, d_alpha, d_sigma = literal(path, t)
    return {
        "constant": norm,
        "sbdm": norm * (d_alpha / alpha * sigma**2 - sigma * d_sigma) if alpha else None,
        "sigma": norm * sigma,
        "linear": norm * (1 - t),
        "decreasing": 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": norm * math.sin(math.pi * t) ** 2,
    }[form]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_diffusion_forms(form, path):
    t = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
    options = SolverOptions(diffusion=form, diffusion_norm=0.7)
    expected = [strength(form, 0.7, path, value) for value in t.tolist()]
    assert diffusion_strength(FlowMatching(path=path), options, t).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "skip"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_sde_step_by_step(solver, kind, form, last_step):
    """Four steps and the last one, by the equations; every path in turn."""
    path, norm = PATHS[(KINDS.index(kind) + FORMS.index(form)) % 3], 0.7
    size = {} if last_step == "skip" else {"last_step_size": 0.07}
    options = SolverOptions(diffusion=form, diffusion_norm=norm, last_step=last_step, **size)
    objective, model, x = FlowMatching(kind, path=path), Bent(), gaussian(2, 3, 5)
    out = sample(
        model,
        objective,
        SampleRequest(
            noise=x, y=None, solver=solver, steps=4, options=options, generator=torch.Generator().manual_seed(3)
        ),
    )
    start = 1e-3 if path != "vp" and (form == "sbdm" or kind in ("score", "noise")) else 0.0
    end = 1 - 1e-3 if last_step == "skip" else 1 - 0.07
    h = (end - start) / 4
    seen, model.times = model.times, []

    def field(x, t, target):
        time = x.new_full((2,), t)
        return objective.convert(model(x, 1000 * time, None), x, time, target)

    def drift(x, t):
        return field(x, t, "velocity") + strength(form, norm, path, t) * field(x, t, "score")

    generator, times = torch.Generator().manual_seed(3), []
    for i in range(4):
        t = start + i * h
        noise = math.sqrt(2 * strength(form, norm, path, t) * h) * torch.randn(
            x.shape, generator=generator, dtype=torch.float64
        )
        times.append(t)
        if solver == "euler_maruyama":
            x = x + h * drift(x, t) + noise
        else:
            times.append(t + h)
            x = x + noise
            slope = drift(x, t)
            x = x + h / 2 * (slope + drift(x + h * slope, t + h))
    if last_step != "skip":
        times.append(end)
    if last_step == "mean":
        x = x + 0.07 * drift(x, end)
    elif last_step == "euler":
        x = x + 0.07 * field(x, end, "velocity")
    elif last_step == "tweedie":
        x = field(x, end, "data")
    scale = x.abs().max().item()
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-6 * scale)
    # N steps are N steps, and every sample has its own row of times.
    assert [row[0] for row in seen] == pytest.approx(times) and all(row[0] == row[1] for row in seen)


@pytest.mark.parametrize("kind", ["velocity", "noise"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
def test_ode_step_by_step(solver, reverse, kind):
    objective, model, x = FlowMatching(kind, path="gvp"), Bent(), gaussian(2, 3, 5)
    out = sample(model, objective, SampleRequest(noise=x, y=None, solver=solver, steps=3, reverse=reverse))
    first, last = objective.interval()
    start, h = (last, (first - last) / 3) if reverse else (first, (last - first) / 3)

    def v(x, t):
        return objective.velocity(model, x, x.new_full((2,), t), None)

    for i in range(3):
        t = start + i * h
        k1 = v(x, t)
        k2 = v(x + h / 2 * k1, t + h / 2)
        if solver == "midpoint":
            x = x + h * k2
            continue
        k3 = v(x + h / 2 * k2, t + h / 2)
        k4 = v(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(out, x, rtol=1e-8, atol=1e-8 * x.abs().max().item())


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_guidance(solver):
    x, y = gaussian(2, 1, 6), torch.tensor([0, 1])
    options = {"rtol": 1e-7} if solver == "dopri5" else {}
    guided = run("gvp", "velocity", solver, x, 30, y=y, guidance=1.7, **options)
    combined = run("gvp", "velocity", solver, x, 30, y=y, model=Mixture("gvp", guidance=1.7), **options)
    torch.testing.assert_close(guided, combined, rtol=1e-5, atol=1e-5)
    assert (guided - run("gvp", "velocity", solver, x, 30, y=y, **options)).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_sde_draws_from_the_generator_only(solver, form):
    state, x = torch.get_rng_state(), gaussian(1, 1, 5)
    first, again, other = (run("linear", "velocity", solver, x, 4, seed=s, diffusion=form) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("path", PATHS)
def test_dopri5_keeps_its_tolerances_and_the_interval(path):
    x, errors, calls = quantiles(30), [], []
    first, last = FlowMatching(path=path).interval()
    exact = transported(x, path, first, last)
    for rtol in (1e-2, 1e-4, 1e-6):
        model = Mixture(path)
        out = run(path, "velocity", "dopri5", x, model=model, rtol=rtol, atol=rtol / 10)
        errors.append((out - exact).abs().max().item())
        calls.append(len(model.times))
        assert first <= min(model.times) and max(model.times) <= last + 1e-9
        # It steps onto the end, not over it: then most of its last calls would be at the end.
        assert sum(t > last - 1e-9 for t in model.times) <= 4
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[2] < 1e-4
    assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_dopri5_does_not_look_beyond_the_ends_of_a_slow_flow(path, reverse):
    # With hardly any velocity the solver would like to begin with a step of many units of time.
    times = []

    class Slow(Denoiser):
        def forward(self, x, t, y):
            times.extend(t.tolist())
            return 1e-3 * x

    out = sample(
        Slow(),
        FlowMatching(path=path),
        SampleRequest(noise=gaussian(2, 1, 4), y=None, solver="dopri5", reverse=reverse),
    )
    assert out.isfinite().all() and min(times) >= 0 and max(times) <= 1000


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_have_the_dtype_of_the_noise(solver, dtype):
    class Model(Denoiser):
        def forward(self, x, t, y):
            return 0.3 * x.float().sin() + (t / 2000).reshape(-1, 1, 1)

    def of(dtype):
        return sample(
            Model(),
            FlowMatching(),
            SampleRequest(
                noise=gaussian(2, 3, 5).bfloat16().to(dtype),
                y=None,
                solver=solver,
                steps=None if solver == "dopri5" else 6,
                options=SolverOptions(diffusion_norm=1e-08) if solver in SDE_SOLVERS else SolverOptions(),
            ),
        )

    out = of(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), of(torch.float64), rtol=0.05, atol=2e-3 if dtype == torch.float32 else 0.05
    )


@pytest.mark.slow
def test_dopri5_gives_up_with_the_reason():
    class Broken(Denoiser):
        def forward(self, x, t, y):
            return x / (t - 500).reshape(-1, 1, 1) ** 2 * 1e9

    with pytest.raises(ValueError, match=r"solver 'dopri5' gave up with rtol 0\.001 and atol 1e-06: "):
        sample(Broken(), FlowMatching(), SampleRequest(noise=gaussian(2, 1, 4), y=None, solver="dopri5"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.slow
def test_likelihood(path, kind):
    # Two cells of a sample are independent; where no divisor of a prediction of the data is bounded.
    eps = 0.1 if kind == "data" else None
    objective = FlowMatching(kind, path=path, sample_eps=eps)
    x = torch.tensor([[[-1.7, -1.4]], [[0.6, 0.2]], [[-0.5, 1.5]]], dtype=torch.float64)
    expected = density(x, path, objective.interval()[1]).log().sum((1, 2))
    options = SolverOptions(rtol=1e-6, atol=1e-7)
    exact = log_likelihood(Mixture(path, kind), objective, x, None, Solving(options=options), exact=True)
    # score and noise begin at alpha = 1e-3, VP at 0.007: N(0, I) is not quite the distribution there.
    torch.testing.assert_close(
        exact, expected, rtol=0, atol=2e-5 if path != "vp" and kind in ("velocity", "data") else 6e-3
    )
    # Cells that do not depend on each other have a diagonal Jacobian, for which one probe is exact.
    estimate = log_likelihood(Mixture(path, kind), objective, x, None, Solving(options=options))
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-6)


class Turned(Mixture):
    """The mixture in each of two cells, seen in turned coordinates: the cells depend on each other."""

    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)

    def forward(self, x, t, y):
        return super().forward(x @ self.turn, t, y) @ self.turn.T


def test_likelihood_estimate_is_unbiased_and_draws_once():
    objective, options = FlowMatching(), SolverOptions(rtol=1e-4, atol=1e-5)
    x = torch.tensor([[[-1.2, 0.3]]], dtype=torch.float64)
    expected = density(x @ Turned.turn, "linear", 1.0).log().sum()
    exact = log_likelihood(Turned("linear"), objective, x, None, Solving(options=options), exact=True)
    assert exact.item() == pytest.approx(expected.item(), abs=2e-3)
    generator, once = (torch.Generator().manual_seed(3) for _ in range(2))
    many = x.expand(400, 1, 2)
    estimates = log_likelihood(Turned("linear"), objective, many, None, Solving(options=options), generator=generator)
    # r^T J r has but two values for two cells.
    assert estimates.std() > 0.1
    assert abs(estimates.mean() - exact.item()) < 4 * estimates.std() / 20
    torch.randint(2, many.shape, generator=once)
    assert torch.equal(generator.get_state(), once.get_state())


def test_likelihood_of_a_guided_model_and_what_it_leaves():
    x, y = torch.tensor([[[-1.2]], [[0.3]]], dtype=torch.float64), torch.tensor([0, 1])
    model = Mixture("linear").train()
    guided = log_likelihood(model, FlowMatching(), x, y, Solving(guidance=1.5), exact=True)
    combined = log_likelihood(Mixture("linear", guidance=1.5), FlowMatching(), x, y, exact=True)
    torch.testing.assert_close(guided, combined, rtol=0, atol=1e-4)
    assert model.training and not guided.requires_grad
    parts = log_likelihood(model, FlowMatching(), x, y, Solving(options=SolverOptions(rtol=1e-06)), exact=True)
    expected = torch.distributions.Normal(MEANS, STDS).log_prob(x.flatten())
    torch.testing.assert_close(parts, expected, rtol=0, atol=1e-4)


def model_of_modulations():
    dit = DiT(DiTConfig(input_size=(1, 2, 4), patch=(1, 2, 2), channels=1, width=8, depth=2, heads=1, num_classes=3))
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return dit.double()


class Plain(Denoiser):
    """A DiT whose modulations nobody can ask for."""

    def __init__(self, dit):
        super().__init__()
        self.dit, self.null_class = dit, dit.null_class

    def forward(self, x, t, y):
        return self.dit(x, t, y)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "solver", [pytest.param(name, marks=[pytest.mark.slow] * (name == "dopri5")) for name in FLOW_SOLVERS]
)
def test_modulations_ahead_are_those_of_the_times(solver, guidance):
    dit, x, y = model_of_modulations(), gaussian(2, 1, 1, 2, 4), torch.tensor([2, 0])
    plain, ahead = (
        run("gvp", "velocity", solver, x, 5, model=model, y=y, guidance=guidance) for model in (Plain(dit), dit)
    )
    torch.testing.assert_close(ahead, plain, rtol=1e-6, atol=1e-6)
    assert (ahead - run("gvp", "velocity", solver, x, 5, model=dit, y=y.flip(0), guidance=guidance)).abs().max() > 1e-4


@pytest.mark.slow
def test_likelihood_of_a_dit():
    dit, x, y = model_of_modulations(), gaussian(2, 1, 1, 2, 4), torch.tensor([2, 1])
    options = SolverOptions(rtol=1e-4, atol=1e-4)
    request = Solving(guidance=2.0, options=options)
    exact = log_likelihood(dit, FlowMatching(), x, y, request, exact=True)
    plain = log_likelihood(Plain(dit), FlowMatching(), x, y, request, exact=True)
    torch.testing.assert_close(exact, plain, rtol=1e-5, atol=1e-4)
    assert all(parameter.grad is None for parameter in dit.parameters())


@pytest.mark.parametrize("solver", TABLEAUX)
def test_plans_have_a_row_a_call(solver):
    plan = flow_plan(FlowMatching("noise", path="vp"), solver, 7, 2.5)
    calls = {"heun": 2, "midpoint": 2, "rk4": 4, "rk4_38": 4, "heun_sde": 2}.get(solver, 1)
    assert plan.times.shape == (7, calls) and plan.coefficients.shape == (7, calls, 5)
    assert plan.coefficients.isfinite().all() and (plan.coefficients[..., 0] == 2.5).all()
    assert (plan.last is not None) == (solver in SDE_SOLVERS) and plan.noisy == (solver == "euler_maruyama")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"diffusion": "cosine"},
            "diffusion is 'cosine'; it may be one of constant, sbdm, sigma, linear, ",
        ),
        ({"last_step": "none"}, "last_step is 'none'; it may be one of skip, mean, tweedie, euler"),
        ({"diffusion_norm": 0.0}, "diffusion_norm is 0.0; it must be positive"),
        ({"rtol": -1.0}, "rtol is -1.0; it must be positive"),
        ({"eta": 1.5}, r"eta is 1.5; it must be in \[0, 1\]"),
        ({"last_step_size": 0.6}, r"last_step_size is 0.6; it must be in \(0, 0.5\]"),
        ({"last_step": "skip", "last_step_size": 0.1}, "last_step_size is 0.1, but last_step is 'skip'"),
    ],
)
def test_options_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        SolverOptions(**options)


@pytest.mark.parametrize(
    ("objective", "solver", "arguments", "message"),
    [
        (
            FlowMatching(),
            "euler",
            {"options": SolverOptions(diffusion="sigma")},
            "diffusion is 'sigma', but solver is 'e",
        ),
        (
            FlowMatching(),
            "dopri5",
            {"options": SolverOptions(last_step="mean")},
            "last_step is .* only 'euler_maruyama'",
        ),
        (DDPM(), "ddim", {"options": SolverOptions(diffusion_norm=2.0)}, "diffusion_norm is 2.0, but solver is 'ddim'"),
        (DDPM(), "ddpm", {"options": SolverOptions(eta=0.5)}, "eta is 0.5, but solver is 'ddpm'; only 'ddim' has it"),
        (FlowMatching(), "heun_sde", {"options": SolverOptions(rtol=1e-3)}, "rtol is 0.001, .* only 'dopri5' has it"),
        (
            FlowMatching(),
            "heun_sde",
            {"reverse": True},
            "reverse needs a .* ODE; solver is 'heun_sde'",
        ),
        (DDPM(), "ddim", {"reverse": True}, "reverse needs a .* ODE; solver is 'ddim'"),
        (FlowMatching(), "rk4", {"steps": None}, "steps is None"),
        (FlowMatching(), "dopri5", {"steps": 4}, "steps is 4, but solver 'dopri5' takes"),
    ],
)
def test_sample_refuses(objective, solver, arguments, message):
    steps = None if solver == "dopri5" else 4
    with pytest.raises(ValueError, match=message):
        sample(
            Bent(),
            objective,
            SampleRequest(noise=gaussian(2, 3, 5), y=None, solver=solver, **({"steps": steps} | arguments)),
        )


def test_likelihood_refuses():
    x = gaussian(2, 3, 5)
    with pytest.raises(ValueError, match="objective is 'ddpm'; only 'flow' has the ODE"):
        log_likelihood(Bent(), DDPM(), x, None)
    with pytest.raises(ValueError, match="last_step is 'mean', but solver is 'dopri5'"):
        log_likelihood(Bent(), FlowMatching(), x, None, Solving(options=SolverOptions(last_step="mean")))
    with pytest.raises(ValueError, match="guidance_channels is 2, but guidance is 1"):
        log_likelihood(Bent(), FlowMatching(), x, None, Solving(guidance_channels=2))
