"""objectives/flow.py: paths, conversions and losses against the formulas, written again."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from models.objectives.flow import FlowMatching, path_at
from models.registry import SYSTEMS
from models.runtime.plain import as_plain
from models.training.config import TrainConfig, from_dict

PATHS = ("linear", "gvp", "vp")
KINDS = ("velocity", "data", "score", "noise")
SHAPE = (6, 2, 3, 4)


def alpha_sigma(path, t):
    if path == "linear":
        return t, 1 - t
    if path == "gvp":
        return torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)
    alpha = torch.exp(-0.25 * (1 - t) ** 2 * (20 - 0.1) - 0.5 * (1 - t) * 0.1)
    return alpha, torch.sqrt(1 - alpha**2)


def literal(path, t):
    """alpha, sigma and, by autograd, their derivatives."""
    t = t.clone().requires_grad_()
    alpha, sigma = alpha_sigma(path, t)
    slopes = [torch.autograd.grad(part.sum(), t, retain_graph=True)[0] for part in (alpha, sigma)]
    return tuple(part.detach() for part in (alpha, sigma, *slopes))


def mixed(kind, path, t, data, noise):
    """What a model of this kind predicts for one x_1 and x_0, of SHAPE."""
    _, sigma, d_alpha, d_sigma = (part.reshape(-1, 1, 1, 1) for part in literal(path, t))
    return {
        "velocity": d_alpha * data + d_sigma * noise,
        "data": data,
        "score": -noise / sigma,
        "noise": noise,
    }[kind]


def draw(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


class Recorder:
    """A model that keeps what it was given and returns fixed numbers."""

    def __init__(self, output):
        self.output = output

    def __call__(self, x, t, y):
        self.x, self.t = x, t
        return self.output


@pytest.mark.parametrize("path", PATHS)
def test_paths(path):
    t = torch.tensor([0.001, 0.1, 0.5, 0.77, 0.999], dtype=torch.float64)
    for got, expected in zip(path_at(path, t), literal(path, t), strict=False):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    alpha, sigma = path_at(path, torch.tensor([0.0, 1.0]))[:2]
    assert alpha.tolist() == [pytest.approx(math.exp(-5.025) if path == "vp" else 0), 1]
    assert sigma.tolist() == [pytest.approx(1, abs=3e-5), 0]


def test_vp_is_accurate_where_sigma_vanishes():
    # 1 - alpha^2 in float64 has lost all but a few digits here.
    getcontext().prec = 40
    left = Decimal("1e-13")
    t = 1 - torch.tensor(float(left), dtype=torch.float64)
    left = 1 - Decimal(t.item())
    exact = (1 - (-(left**2) * Decimal("9.95") - left * Decimal("0.1")).exp()).sqrt()
    path = path_at("vp", t)
    assert path.sigma.item() == pytest.approx(float(exact), rel=1e-12)
    assert path.d_sigma.item() == pytest.approx(-0.05 / float(exact), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_becomes_every_other(path, kind, dtype, tolerance):
    # Each sample has its own time. At the last, sigma is 0.1 or more: a prediction of the data is not clamped.
    t = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    data, noise = draw()
    alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in alpha_sigma(path, t))
    x = alpha * data + sigma * noise
    objective = FlowMatching(kind, path=path)
    prediction = mixed(kind, path, t, data, noise)
    for target in KINDS:
        expected = mixed(target, path, t, data, noise)
        got = objective.convert(prediction.to(dtype), x.to(dtype), t.to(dtype), target)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        of_x, of_prediction = (part.reshape(-1, 1, 1, 1) for part in objective.weights(t, target))
        torch.testing.assert_close(of_x * x + of_prediction * prediction, expected, rtol=1e-9, atol=1e-9)
    model = Recorder(prediction.to(dtype))
    velocity = objective.velocity(model, x.to(dtype), t.to(dtype), None)
    assert torch.equal(velocity, objective.convert(prediction.to(dtype), x.to(dtype), t.to(dtype), "velocity"))
    torch.testing.assert_close(model.t, 1000 * t.to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_a_prediction_of_the_data_is_divided_by_no_less_than_a_twentieth(path):
    objective, t = FlowMatching("data", path=path), torch.tensor([0.9999, 1.0], dtype=torch.float64)
    of_x, of_prediction = objective.weights(t)
    speed = {"linear": 20.0, "gvp": 10 * math.pi, "vp": 20.0}[path]
    assert of_prediction.tolist() == [pytest.approx(speed, rel=0.05)] * 2
    # What is left is a pull to the prediction.
    torch.testing.assert_close(of_x, -of_prediction, rtol=0.02, atol=0)


def weight_of(path, weight, t):
    alpha, sigma, d_alpha, d_sigma = literal(path, t)
    drift_variance = d_alpha / alpha * sigma**2 - sigma * d_sigma
    return {
        "none": torch.ones_like(t),
        "velocity": (drift_variance / sigma) ** 2,
        "likelihood": drift_variance / sigma**2,
    }[weight]


@pytest.mark.parametrize("weight", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss(path, kind, weight):
    if weight != "none" and kind in ("velocity", "data"):
        return
    x, output = draw()
    model = Recorder(output.requires_grad_())
    objective = FlowMatching(kind, path=path, weight=weight)
    loss = objective.loss(model, x, None, torch.Generator().manual_seed(5))
    t = model.t / 1000
    assert t.max() < 0.95 or path != "linear"  # for this seed no time is where the data's divisor is bounded
    alpha, sigma, d_alpha, d_sigma = (part.reshape(-1, 1, 1, 1) for part in literal(path, t))
    noise = (model.x - alpha * x) / sigma
    assert abs(noise.mean()) < 0.25 and abs(noise.std() - 1) < 0.2
    if kind == "velocity":
        error = output - (d_alpha * x + d_sigma * noise)
    elif kind == "data":
        error = d_alpha * (output - x) + d_sigma * ((model.x - alpha * output) / sigma - noise)
    else:
        error = output * sigma + noise if kind == "score" else output - noise
    scale = weight_of(path, weight, t).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(loss, (scale * error**2).mean(), rtol=1e-8, atol=0)
    (gradient,) = torch.autograd.grad(loss, output)
    (expected,) = torch.autograd.grad((scale * error**2).mean(), output)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["score", "noise"])
def test_the_velocity_weight_makes_the_loss_that_of_the_velocity(path, kind):
    x, output = draw()
    model, objective = Recorder(output), FlowMatching(kind, path=path, weight="velocity")
    loss = objective.loss(model, x, None, torch.Generator().manual_seed(5))
    t = model.t / 1000
    velocity = objective.convert(output, model.x, t, "velocity")
    alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in alpha_sigma(path, t))
    noise = (model.x - alpha * x) / sigma
    expected = (velocity - mixed("velocity", path, t, x, noise)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_has_no_loss(path, kind, dtype):
    x = draw(dtype)[0]

    def model(x_t, t, _):
        t = t.double() / 1000
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in alpha_sigma(path, t))
        noise = (x_t.double() - alpha * x.double()) / sigma
        return mixed(kind, path, t, x.double(), noise).to(dtype)

    loss = FlowMatching(kind, path=path).loss(model, x, None, torch.Generator().manual_seed(1))
    assert loss.dtype == dtype and loss < (1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
@pytest.mark.parametrize("kind", ["velocity", "data"])
def test_the_straight_path_is_the_plain_formula_bit_for_bit(kind, timesteps):
    x, output = draw(torch.float32)
    model = Recorder(output.clone().requires_grad_())
    loss = FlowMatching(kind, timesteps).loss(model, x, None, torch.Generator().manual_seed(3))
    generator, plain = torch.Generator().manual_seed(3), output.clone().requires_grad_()
    draws = torch.rand if timesteps == "uniform" else torch.randn
    t = draws(SHAPE[0], generator=generator)
    if timesteps == "logit_normal":
        t = t.sigmoid()
    noise, share = torch.randn(SHAPE, generator=generator), t.reshape(-1, 1, 1, 1)
    x_t, left = share * x + (1 - share) * noise, (1 - share).clamp_min(0.05)
    error = plain - (x - noise) if kind == "velocity" else (plain - x_t) / left - (x - x_t) / left
    assert torch.equal(model.x, x_t) and torch.equal(model.t, t * 1000)
    assert torch.equal(loss, error.square().mean())
    gradients = torch.autograd.grad(loss, model.output) + torch.autograd.grad(error.square().mean(), plain)
    assert torch.equal(*gradients)


EDGE = (1e-3, 1 - 1e-3)


@pytest.mark.parametrize(
    ("path", "kind", "training", "sampling"),
    [
        *((path, kind, (0, 1), (0, 1)) for path in ("linear", "gvp") for kind in ("velocity", "data")),
        *(
            (path, kind, (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3))
            for path in ("linear", "gvp")
            for kind in ("score", "noise")
        ),
        *(("vp", kind, (0, 1 - 1e-5), (0, 1 - 1e-3)) for kind in KINDS),
    ],
)
def test_times_stay_away_from_the_ends(path, kind, training, sampling):
    objective = FlowMatching(kind, path=path)
    assert objective.interval(training=True) == training and objective.interval() == sampling
    # Each option is on its own: SiT lost the default of one where the other was given.
    changed = FlowMatching(kind, path=path, train_eps=0.1)
    assert changed.interval(training=True) == (0.1 if training[0] else 0, 0.9) and changed.interval() == sampling
    changed = FlowMatching(kind, path=path, sample_eps=0.1)
    assert changed.interval() == (0.1 if sampling[0] else 0, 0.9) and changed.interval(training=True) == training


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_training_draws_its_times_from_the_interval(timesteps):
    model = Recorder(torch.zeros(20_000, 1))
    objective = FlowMatching("noise", timesteps, train_eps=0.2)
    objective.loss(model, torch.zeros(20_000, 1), None, torch.Generator().manual_seed(0))
    t = model.t / 1000
    assert t.min() >= 0.2 and t.max() <= 0.8 and abs(t.mean() - 0.5) < 0.01
    if timesteps == "uniform":
        assert t.min() < 0.201 and t.max() > 0.799


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_the_interval_are_finite(path, kind):
    objective = FlowMatching(kind, path=path)
    for training in (False, True):
        t = torch.tensor(objective.interval(training=training), dtype=torch.float32)
        for target in ("velocity", "data", "noise"):
            assert all(part.isfinite().all() for part in objective.weights(t, target)), target


def test_sit_systems_have_the_published_options():
    found = {name: system for name, system in SYSTEMS.items() if name.startswith("sit-")}
    assert len(found) == 12
    for system in found.values():
        assert system.objective == FlowMatching("velocity", "uniform", path="linear", weight="none")
        assert not system.settings.learn_sigma


def test_options_survive_a_checkpoint():
    objective = FlowMatching("score", path="gvp", weight="likelihood", train_eps=2e-3, sample_eps=1e-2)
    assert from_dict(as_plain(TrainConfig(objective=objective))).objective == objective


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "cosine"}, "path is 'cosine'; it may be 'linear', 'gvp' or 'vp'"),
        ({"prediction": "x"}, "prediction is 'x'; it may be 'velocity', 'data', 'score' or 'noise'"),
        ({"weight": "snr"}, "weight is 'snr'; it may be 'none', 'velocity' or 'likelihood'"),
        ({"weight": "velocity"}, "weight is 'velocity'; with prediction 'velocity' it must be 'none'"),
        ({"prediction": "data", "weight": "likelihood"}, "with prediction 'data' it must be 'none'"),
        ({"train_eps": -0.1}, r"train_eps is -0.1; it must be in \[0, 0.5\)"),
        ({"sample_eps": 0.5}, r"sample_eps is 0.5; it must be in \[0, 0.5\)"),
        ({"path": "vp", "sample_eps": 0.0}, "sample_eps is 0; with path 'vp' .* it must be positive"),
        ({"prediction": "score", "train_eps": 0.0}, "train_eps is 0; .* prediction 'score' it must be positive"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(**options)
