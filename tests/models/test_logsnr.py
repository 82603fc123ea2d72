"""logsnr.py and its plans against the formulas; sampling of Gaussian data, whose noise has a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.objectives.ddpm import DDPM
from models.objectives.flow import FlowMatching
from models.objectives.logsnr import LogSNR, logsnr, noise_level, pyramid, scales
from models.protocols import Denoiser
from models.sampling.plans import logsnr_plan
from models.sampling.predictor import guide
from models.sampling.sampler import SampleRequest, sample
from models.sampling.solvers import SolverOptions

CPU = torch.device("cpu")
MEAN, STD = 1.5, 0.4
SHAPE = (6, 2, 3, 4, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(dtype=torch.float64):
    return torch.randn(SHAPE, generator=generator(7), dtype=torch.float64).to(dtype)


def alpha(r):
    """Of the cosine schedule without bounds and shift, in NumPy."""
    return np.cos((r + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2


class Recorder:
    """A model that keeps what it was given and returns fixed numbers."""

    def __init__(self):
        self.output = torch.randn(SHAPE, generator=generator(3), dtype=torch.float64).requires_grad_()

    def __call__(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        return self.output


class Gaussian(Denoiser):
    """The optimal noise, or velocity, for data N(MEAN, STD^2) in every cell."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction, self.times = prediction, []

    def forward(self, x, t, y):
        self.times.append(t[0].item())
        a, b = (scale.reshape(-1, 1, 1) for scale in scales(logsnr(t / 1000)))
        noise = b * (x - a * MEAN) / (a**2 * STD**2 + b**2)
        return noise if self.prediction == "noise" else (noise - b * x) / a


@pytest.mark.parametrize("shift", [1.0, 2.0, 0.5])
def test_schedule(shift):
    r = np.linspace(0, 1, 101)
    bounded = alpha(r).clip(1e-4, 0.9999)
    expected = (np.log(bounded / (1 - bounded)) - 2 * np.log(shift)).clip(np.log(1e-4 / 0.9999), np.log(0.9999 / 1e-4))
    value = logsnr(torch.from_numpy(r), shift)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-9)
    a, b = scales(value)
    torch.testing.assert_close(a.square() + b.square(), torch.ones_like(a))
    torch.testing.assert_close((a / b).square().log(), value)


def test_the_model_is_told_the_noise_that_there_is():
    r = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    torch.testing.assert_close(noise_level(logsnr(r)), r)
    # Twice the picture's side: of the same r there is more noise, as much as of this larger one.
    shifted = noise_level(logsnr(r, 2.0))
    assert (shifted > r).all()
    snr = alpha(r.numpy()) / (1 - alpha(r.numpy())) / 4
    np.testing.assert_allclose(alpha(shifted[:90].numpy()), (snr / (1 + snr))[:90], rtol=1e-6)
    # torch's float32 acos(1) after a root is 0 on some CPUs, and a rounding of it on others.
    assert noise_level(torch.tensor([-50.0, 50.0], dtype=torch.float64)).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("weight", ["p2", "min_snr", "none"])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_loss(prediction, weight, shift):
    x, y, model = data(), torch.arange(6), Recorder()
    loss = LogSNR(prediction, weight, shift).loss(model, x, y, generator())
    share = torch.from_numpy(alpha(model.t.numpy() / 1000))
    a, b = share.sqrt().reshape(-1, 1, 1, 1, 1), (1 - share).sqrt().reshape(-1, 1, 1, 1, 1)
    noise = (model.x - a * x) / b
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    errors = (model.output - (noise if prediction == "noise" else a * noise - b * x)).square().mean((1, 2, 3, 4))
    snr = share / (1 - share)
    weights = {
        "none": torch.ones_like(snr),
        "p2": 1 / (1 + snr),
        "min_snr": torch.minimum(snr, torch.tensor(5.0)) / (snr + (prediction == "velocity")),
    }
    torch.testing.assert_close(loss, (weights[weight] * errors).mean(), rtol=1e-5, atol=0)
    assert loss.shape == () and model.t.shape == (6,) and model.y is y


def test_a_perfect_model_has_no_loss():
    x = data()
    for prediction in ("noise", "velocity"):

        def knows(x_r, t, _, prediction=prediction):
            a, b = (scale.reshape(-1, 1, 1, 1, 1) for scale in scales(logsnr(t / 1000)))
            noise = (x_r - a * x) / b
            return noise if prediction == "noise" else a * noise - b * x

        assert LogSNR(prediction).loss(knows, x, None, generator()) < 1e-12


def test_r_is_drawn_evenly():
    seen = []

    def model(x, t, _):
        seen.append(t)
        return torch.zeros_like(x)

    LogSNR().loss(model, torch.zeros(20_000, 1), None, generator())
    for share in (0.25, 0.5, 0.75):
        assert seen[0].quantile(share).item() == pytest.approx(1000 * (0.001 + 0.999 * share), abs=10)
    assert seen[0].min() >= 0 and seen[0].max() <= 1000


def test_min_snr_weighs_the_same_errors_alike():
    """An error d of the noise is one of d / a of the velocity: both weights must count it the same."""
    value = torch.linspace(-9, 9, 50, dtype=torch.float64)
    noise, velocity = (LogSNR(prediction, "min_snr").weights(value) for prediction in ("noise", "velocity"))
    torch.testing.assert_close(noise, velocity / value.sigmoid())


def test_adaptive_weight():
    objective, x = LogSNR(weight="adaptive"), data()
    memory = objective.memory(CPU)
    assert list(memory) == ["losses"] and torch.equal(memory["losses"], torch.ones(300))
    expected = np.ones(300)
    edges = np.linspace(-10, 10, 299)
    for seed in range(4):
        model = Recorder()
        loss = objective.loss(model, x, None, generator(seed), memory)
        share = alpha(model.t.numpy() / 1000)
        bucket = np.searchsorted(edges, np.log(share / (1 - share)))
        a, b = (torch.from_numpy(np.sqrt(part)).reshape(-1, 1, 1, 1, 1) for part in (share, 1 - share))
        errors = (model.output - (model.x - a * x) / b).square().mean((1, 2, 3, 4)).detach().numpy()
        assert loss.item() == pytest.approx((errors / expected[bucket]).mean(), rel=1e-4)
        for i in set(bucket):
            expected[i] = 0.99 * expected[i] + 0.01 * errors[bucket == i].mean()
        np.testing.assert_allclose(memory["losses"].numpy(), expected, rtol=1e-5)
    # The weights are constants for the gradient.
    (gradient,) = torch.autograd.grad(objective.loss(model, x, None, generator(9), memory), model.output)
    assert gradient.isfinite().all() and not memory["losses"].requires_grad


def test_adaptive_weights_even_out_the_losses():
    """With a loss that differs by a factor of 100 from bucket to bucket, all of them come to weigh about the same."""
    objective = LogSNR(weight="adaptive")
    memory = objective.memory(CPU)
    x = torch.zeros(4000, 1)

    def model(x_r, t, _):
        return x_r * torch.where(t < 500, 11.0, 2.0)[:, None] / scales(logsnr(t / 1000))[1][:, None]

    losses = [objective.loss(model, x, None, generator(seed), memory).item() for seed in range(600)]
    assert losses[0] > 40 and losses[-1] == pytest.approx(1, abs=0.2)


def test_buckets():
    value = torch.tensor([-11.0, -10.0, -9.99, 0.0, 9.99, 10.0, 11.0])
    assert LogSNR.bucket(value).tolist() == [0, 0, 1, 149, 298, 298, 299]


def test_memory_is_empty_but_for_adaptive():
    assert all(LogSNR(weight=weight).memory(CPU) == {} for weight in ("p2", "min_snr", "none"))
    for memory in (None, {}):
        with pytest.raises(ValueError, match="memory is without 'losses'"):
            LogSNR(weight="adaptive").loss(Recorder(), data(), None, generator(), memory)


def test_refuses():
    with pytest.raises(ValueError, match="prediction is 'data'; it may be 'noise' or 'velocity'"):
        LogSNR("data")
    with pytest.raises(ValueError, match="weight is 'snr'"):
        LogSNR(weight="snr")
    for name in ("shift", "sample_shift"):
        with pytest.raises(ValueError, match=f"^{name} is 0; it must be positive"):
            LogSNR(**{name: 0})
    with pytest.raises(ValueError, match="has no variance to learn"):
        LogSNR().loss(lambda x, t, y: torch.cat((x, x), 1), data(), None, generator())


@pytest.mark.parametrize("shift", [1.0, 2.0, 4.0, 0.5])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_ddim_follows_the_flow(prediction, shift):
    """The exact path from N(0, 1) to N(MEAN, STD^2) is the linear map; at its start a is 0.01, not 0."""
    x = torch.randn(2, 4, 8, generator=generator(), dtype=torch.float64)
    objective = LogSNR(prediction, sample_shift=shift)
    errors = []
    for steps in (100, 1000):
        out = sample(Gaussian(prediction), objective, SampleRequest(noise=x, y=None, solver="ddim", steps=steps))
        errors.append((out - (MEAN + STD * x)).abs().max().item())
    assert errors[1] < 0.02 and errors[1] < errors[0] < 0.15


@pytest.mark.parametrize("shift", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_ddpm_has_the_right_mean_and_variance(prediction, shift):
    x = torch.randn(1, 1, 20_000, generator=generator(), dtype=torch.float64)
    objective = LogSNR(prediction, sample_shift=shift)
    out = sample(
        Gaussian(prediction),
        objective,
        SampleRequest(noise=x, y=None, solver="ddpm", steps=250, generator=generator(1)),
    )
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.03)
    assert abs(torch.corrcoef(torch.stack((x.flatten(), out.flatten())))[0, 1]) < 0.05


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_step_by_step(solver):
    """Four steps against the equations, from the posterior of the forward process."""

    class Model(Denoiser):
        def forward(self, x, t, y):
            seen.append(t[0].item())
            return 0.3 * x.sin()

    seen, steps, shift = [], 4, 2.0
    x = torch.randn(2, 4, 8, generator=generator(), dtype=torch.float64)
    out = sample(
        Model(),
        LogSNR(sample_shift=shift),
        SampleRequest(noise=x, y=None, solver=solver, steps=steps, generator=generator(1)),
    )
    draws = generator(1)
    odds = [alpha(r).clip(1e-4, 0.9999) for r in (1, 0.75, 0.5, 0.25)]
    odds = [max(p / (1 - p) / shift**2, 1e-4 / 0.9999) for p in odds]
    kept = [p / (1 + p) for p in odds] + [1.0]
    for i in range(steps):
        now, then = kept[i], kept[i + 1]
        noise = 0.3 * x.sin()
        x_0 = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        if solver == "ddim":
            x = math.sqrt(then) * x_0 + math.sqrt(1 - then) * noise
            continue
        beta = 1 - now / then
        x = (math.sqrt(then) * beta * x_0 + math.sqrt(1 - beta) * (1 - then) * x) / (1 - now)
        if i < steps - 1:
            deviation = math.sqrt(beta * (1 - then) / (1 - now))
            x = x + deviation * torch.randn(x.shape, generator=draws, dtype=torch.float64)
    torch.testing.assert_close(out, x)
    assert [alpha(t / 1000) for t in seen] == pytest.approx(kept[:-1], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("shift", [1.0, 8.0, 0.1])
def test_plans_are_finite(shift, solver, steps):
    for prediction in ("noise", "velocity"):
        plan = logsnr_plan(LogSNR(prediction, sample_shift=shift), solver, steps, 1.0)
        assert plan.times.shape == (steps, 1) and plan.coefficients.shape == (steps, 1, 5)
        assert plan.coefficients.isfinite().all() and (plan.times.diff(dim=0) <= 0).all()
        assert plan.coefficients[-1, 0, 3] == 0  # the last step adds no noise


class Labelled(Denoiser):
    """Returns numbers that depend on the class only."""

    null_class = 3

    def __init__(self, channels=4):
        super().__init__()
        self.table = torch.randn(4, channels, 8, generator=generator(5), dtype=torch.float64)

    def forward(self, x, t, y):
        return self.table[y]


@pytest.mark.parametrize("objective", [FlowMatching(), DDPM(), LogSNR()])
@pytest.mark.parametrize("channels", [None, 3])
def test_guidance_rescale(objective, channels):
    model, y = Labelled(), torch.tensor([0, 2])
    x = torch.randn(2, 4, 8, generator=generator(), dtype=torch.float64)
    solver = "euler" if objective.name == "flow" else "ddim"
    out = sample(
        model,
        objective,
        SampleRequest(
            noise=x,
            y=y,
            **{"solver": solver, "steps": 1, "guidance": 3.0, "guidance_channels": channels, "guidance_rescale": 0.7},
        ),
    )
    cond, null = model.table[y], model.table[3]
    guided = null + 3 * (cond - null)
    if channels == 3:
        guided = torch.cat((guided[:, :3], cond[:, 3:]), 1)
    rows = []
    for one, other in zip(guided, cond, strict=True):
        rows.append(0.7 * one * other.std() / one.std() + 0.3 * one)

    class Fixed(Denoiser):
        def forward(self, x, t, y):
            return torch.stack(rows)

    torch.testing.assert_close(out, sample(Fixed(), objective, SampleRequest(noise=x, y=None, solver=solver, steps=1)))


def test_guidance_rescale_is_of_each_sample():
    cond, null = torch.randn(2, 3, 4, 5, generator=generator()).double().unbind(0)
    both = guide(cond, null, 4.0, 0.7, 4, 4)
    cond[1] *= 100
    torch.testing.assert_close(guide(cond, null, 4.0, 0.7, 4, 4)[0], both[0])
    # All of it: the spread of the prediction with classes.
    torch.testing.assert_close(guide(cond, null, 4.0, 1.0, 4, 4).flatten(1).std(1), cond.flatten(1).std(1))
    torch.testing.assert_close(guide(cond, null, 4.0, 0.0, 4, 4), null + 4 * (cond - null))


def test_guidance_rescale_leaves_a_learned_variance_alone():
    cond, null = torch.randn(2, 3, 8, 5, generator=generator()).double().unbind(0)
    out = guide(cond, null, 4.0, 0.7, 4, 4)
    assert out.shape == cond.shape and torch.equal(out[:, 4:], cond[:, 4:])
    assert guide(cond.bfloat16(), null.bfloat16(), 4.0, 0.7, 4, 4).dtype == torch.float32


def test_guidance_rescale_refuses():
    x, y = torch.zeros(2, 4, 8).double(), torch.tensor([0, 2])
    for value, guidance, message in ((1.5, 3.0, r"must be in \[0, 1\]"), (0.7, 1.0, "guidance is 1, which is none")):
        with pytest.raises(ValueError, match=f"guidance_rescale is {value}.*{message}"):
            sample(
                Labelled(),
                LogSNR(),
                SampleRequest(noise=x, y=y, solver="ddim", steps=1, guidance=guidance, guidance_rescale=value),
            )


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_ddim_with_all_the_noise_is_ddpm(prediction):
    objective = LogSNR(prediction)
    ddpm, ddim = logsnr_plan(objective, "ddpm", 9, 2.0), logsnr_plan(objective, "ddim", 9, 2.0, SolverOptions(eta=1.0))
    assert torch.equal(ddpm.coefficients, ddim.coefficients) and ddim.noisy and ddpm.noisy
    half = logsnr_plan(objective, "ddim", 9, 2.0, SolverOptions(eta=0.5)).coefficients
    torch.testing.assert_close(half[..., 3], ddpm.coefficients[..., 3] / 2)


def test_pyramid_noise_has_cells_of_several_sizes():
    """StableCascade's stage B: 0.75^i times noise of the size over 2^i, where that is 1 to 16, to unit variance."""
    x = torch.empty(2, 3, 2, 40, 40, dtype=torch.float64)
    out = pyramid(x, generator(4))
    draws, expected, squares = generator(4), 0.0, 0.0
    for i, side in enumerate((40, None, 10, 5, 2, 1)):
        if side is not None:
            cells = torch.randn(2 * 3 * 2, side, side, generator=draws, dtype=torch.float64)
            places = torch.arange(40) * side // 40
            expected = expected + 0.75**i * cells[:, places][:, :, places].view(x.shape)
            squares += 0.75 ** (2 * i)
    torch.testing.assert_close(out, expected / squares**0.5)
    many = pyramid(torch.empty(4000, 1, 8, 8), generator(5))
    torch.testing.assert_close(many.var(0), torch.ones(1, 8, 8), rtol=0, atol=0.12)
    with pytest.raises(ValueError, match="noise is 'pink'; it may be 'white' or 'pyramid'"):
        LogSNR(noise="pink")


def test_training_on_pyramid_noise():
    """The loss of a model that knows the noise is 0 with the noise that the model was given."""
    seen = []

    class Model(Denoiser):
        def forward(self, x, t, y):
            seen.append((x, t))
            return torch.zeros_like(x)

    x = torch.zeros(64, 1, 16, 16, dtype=torch.float64)
    loss = LogSNR(noise="pyramid", weight="none").loss(Model(), x, None, generator(3))
    ((given, t),) = seen
    _, b = scales(logsnr(t / 1000))
    noise = given / b[:, None, None, None]
    torch.testing.assert_close(loss, noise.square().mean())
    # Neighbours are alike, which white noise's are not.
    assert (noise[..., ::2] * noise[..., 1::2]).mean() > 0.5
