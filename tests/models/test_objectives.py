"""The objectives against the formulas, written again in NumPy or with torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from models.denoisers.dit import DiT, DiTConfig
from models.objectives.common import alpha_bars
from models.objectives.ddpm import (
    ALL,
    DDPM,
    discretized_log_likelihood,
    probabilities,
    remember,
    schedule,
    space_timesteps,
)
from models.objectives.flow import FlowMatching
from models.registry import OBJECTIVES

CPU = torch.device("cpu")
DENOISING = [name for name in OBJECTIVES if name != "reconstruction"]
SHAPE = (6, 2, 3, 4, 4)

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BARS = np.cumprod(1 - BETAS)
COSINE = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
LOSS_AWARE = DDPM(timesteps="loss_aware")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(dtype=torch.float64):
    return torch.rand(SHAPE, generator=generator(7), dtype=dtype) * 2 - 1


class Recorder:
    """A model that keeps what it was given and returns fixed numbers."""

    def __init__(self, channels=2, output=None):
        shape = (SHAPE[0], channels, *SHAPE[2:])
        self.output = torch.randn(shape, generator=generator(3), dtype=torch.float64) if output is None else output
        self.output.requires_grad_()

    def __call__(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        return self.output


def test_registry():
    names = ("flow", "ddpm", "logsnr", "reconstruction")
    assert {name: kind.name for name, kind in OBJECTIVES.items()} == {name: name for name in names}


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_flow_matching_loss(timesteps):
    x, y, model = data(), torch.arange(6), Recorder()
    loss = FlowMatching(timesteps=timesteps).loss(model, x, y, generator())
    t = (model.t / 1000).reshape(-1, 1, 1, 1, 1)
    noise = (model.x - t * x) / (1 - t)
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    torch.testing.assert_close(loss, (model.output - (x - noise)).square().mean())
    assert loss.shape == () and model.t.shape == (6,) and model.y is y


def test_flow_matching_is_zero_for_the_true_velocity():
    x = data()

    def model(x_t, t, _):
        t = (t / 1000).reshape(-1, 1, 1, 1, 1)
        return (x - x_t) / (1 - t)

    assert FlowMatching().loss(model, x, None, generator()) < 1e-20


@pytest.mark.parametrize(
    ("timesteps", "quartiles"), [("uniform", (0.25, 0.5, 0.75)), ("logit_normal", (0.3375, 0.5, 0.6625))]
)
def test_flow_timesteps(timesteps, quartiles):
    # The quartiles of a standard normal are -+0.6745; their sigmoids are 0.3375 and 0.6625.
    seen = []
    x = torch.zeros(20_000, 1)

    def model(x_t, t, _):
        seen.append(t / 1000)
        return torch.zeros_like(x_t)

    FlowMatching(timesteps=timesteps).loss(model, x, None, generator())
    assert seen[0].min() >= 0 and seen[0].max() <= 1
    for share, quartile in zip((0.25, 0.5, 0.75), quartiles, strict=True):
        assert seen[0].quantile(share).item() == pytest.approx(quartile, abs=0.01)


@pytest.mark.parametrize("name", DENOISING)
def test_draws_come_from_the_generator_only(name):
    objective, x = OBJECTIVES[name](), data()
    state = torch.get_rng_state()
    losses = [objective.loss(Recorder(), x, None, generator(seed)).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", DENOISING)
def test_half_precision_data_and_output_are_lifted(name):
    model = Recorder(output=torch.zeros(SHAPE, dtype=torch.bfloat16))
    loss = OBJECTIVES[name]().loss(model, data(torch.bfloat16), None, generator())
    assert loss.dtype == torch.float32 and model.x.dtype == torch.float32


def test_flow_matching_refuses():
    with pytest.raises(ValueError, match="timesteps is 'cosine'"):
        FlowMatching(timesteps="cosine")
    config = DiTConfig(input_size=(4, 4), patch=(2, 2), channels=2, width=8, depth=1, heads=1, learn_sigma=True)
    with pytest.raises(ValueError, match="learn_sigma=False"):
        FlowMatching().loss(DiT(config), torch.zeros(1, 2, 4, 4), None, generator())


def test_ddpm_refuses_a_wrong_number_of_channels():
    with pytest.raises(ValueError, match="returned 3 channels"):
        DDPM().loss(Recorder(3), data(), None, generator())


def test_ddpm_loss_without_variance():
    x, model = data(), Recorder()
    loss = DDPM().loss(model, x, None, generator())
    assert model.t.dtype == torch.int64 and model.t.min() >= 0 and model.t.max() <= 999
    alpha_bar = torch.from_numpy(ALPHA_BARS)[model.t].reshape(-1, 1, 1, 1, 1)
    noise = (model.x - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    torch.testing.assert_close(loss, (model.output - noise).square().mean())


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_the_numbers_of_a_timestep_are_rounded_once(prediction):
    """At timestep 0 the float32 of alpha_bar has lost a quarter of the digits of 1 - alpha_bar."""
    objective, seen = DDPM(prediction=prediction), []

    def model(x, t, _):
        seen.append((x, t))
        return torch.zeros_like(x)

    x = torch.zeros(30_000, 1)
    objective.loss(model, x, None, generator())
    (x_t, t), again = seen[0], generator()
    assert torch.equal(torch.randint(1000, (len(x),), generator=again), t) and (t == 0).any()
    noise = torch.randn(x.shape, generator=again)
    exact = (1 - torch.from_numpy(ALPHA_BARS)[t]).sqrt()[:, None]
    assert ((x_t.double() / noise.double() - exact) / exact).abs().max() < 2**-22
    # The data that the prediction points at, of x = 0, at timestep 0.
    first = objective.estimate(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0])).double()
    right = -math.sqrt(1 / ALPHA_BARS[0] - 1) if prediction == "noise" else -exact[t == 0][0].item()
    assert abs(first.item() / right - 1) < 2**-23


def test_ddpm_draws_all_timesteps_evenly():
    seen = []

    def model(x, t, _):
        seen.append(t)
        return torch.zeros_like(x)

    DDPM().loss(model, torch.zeros(50_000, 1), None, generator())
    assert DDPM().memory(CPU) == FlowMatching().memory(CPU) == {}
    assert set(seen[0].tolist()) == set(range(1000))
    assert seen[0].double().mean().item() == pytest.approx(499.5, abs=5)


def literal_bound(x, x_t, t, epsilon, v):
    """Bits per dimension of one sample at timestep t, with torch.distributions."""
    beta, alpha_bar = BETAS[t], ALPHA_BARS[t]
    before = ALPHA_BARS[t - 1] if t else 1.0
    i = max(t, 1)
    posterior = BETAS[i] * (1 - ALPHA_BARS[i - 1]) / (1 - ALPHA_BARS[i])

    def posterior_mean(x_0):
        return (
            math.sqrt(before) * beta / (1 - alpha_bar) * x_0
            + math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar) * x_t
        )

    x_0 = (x_t - math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)
    share = (v + 1) / 2
    std = torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(posterior)))
    model = Normal(posterior_mean(x_0), std)
    if t:
        return kl_divergence(Normal(posterior_mean(x), math.sqrt(posterior)), model).mean() / math.log(2)
    low = torch.where(x < -0.999, torch.zeros_like(x), model.cdf(x - 1 / 255))
    high = torch.where(x > 0.999, torch.ones_like(x), model.cdf(x + 1 / 255))
    return -(high - low).clamp(min=1e-12).log().mean() / math.log(2)


def test_variational_bound():
    x = data()
    x[0, 0] = x[0, 0].sign()
    noise = torch.randn(SHAPE, generator=generator(1), dtype=torch.float64)
    t = torch.tensor([0, 0, 1, 2, 500, 999])
    alpha_bar = torch.from_numpy(ALPHA_BARS)[t].reshape(-1, 1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    epsilon = noise + 0.3 * torch.randn(SHAPE, generator=generator(2), dtype=torch.float64)
    v = torch.randn(SHAPE, generator=generator(3), dtype=torch.float64)
    tables = schedule(ALL, CPU, torch.float64)
    denoised = (x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    bound = DDPM.variational_bound(tables, x, x_t, t, denoised, (v + 1) / 2)
    expected = [literal_bound(x[i], x_t[i], int(t[i]), epsilon[i], v[i]) for i in range(6)]
    torch.testing.assert_close(bound, torch.stack(expected), rtol=1e-7, atol=1e-9)


def test_ddpm_loss_with_variance():
    x, model = data(), Recorder(4)
    loss = DDPM().loss(model, x, None, generator())
    alpha_bar = torch.from_numpy(ALPHA_BARS)[model.t].reshape(-1, 1, 1, 1, 1)
    noise = (model.x - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
    epsilon, v = model.output.detach().chunk(2, dim=1)
    simple = (epsilon - noise).square().mean()
    bounds = [literal_bound(x[i], model.x[i], int(model.t[i]), epsilon[i], v[i]) for i in range(6)]
    torch.testing.assert_close(loss, simple + torch.stack(bounds).mean(), rtol=1e-6, atol=0)

    # The bound must teach the variance and leave the mean alone.
    (gradient,) = torch.autograd.grad(loss, model.output)
    torch.testing.assert_close(gradient[:, :2], 2 * (epsilon - noise) / noise.numel())
    assert gradient[:, 2:].abs().min() > 0


@pytest.mark.parametrize("learned", [False, True])
def test_velocity_loss(learned):
    """The loss of the velocity, and the same bound as of the noise that stands for it."""
    x, model = data(), Recorder(4 if learned else 2)
    loss = DDPM(prediction="velocity").loss(model, x, None, generator())
    alpha_bar = torch.from_numpy(ALPHA_BARS)[model.t].reshape(-1, 1, 1, 1, 1)
    noise = (model.x - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
    velocity, *v = model.output.detach().chunk(2, dim=1) if learned else (model.output.detach(),)
    expected = (velocity - (alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x)).square().mean()
    if learned:
        epsilon = (1 - alpha_bar).sqrt() * model.x + alpha_bar.sqrt() * velocity
        bounds = [literal_bound(x[i], model.x[i], int(model.t[i]), epsilon[i], v[0][i]) for i in range(6)]
        expected = expected + torch.stack(bounds).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    if learned:
        (gradient,) = torch.autograd.grad(loss, model.output)
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x
        torch.testing.assert_close(gradient[:, :2], 2 * (velocity - target) / noise.numel())


def test_at_zero_snr_the_velocity_is_the_negative_data():
    x, objective = torch.rand(4000, 1, dtype=torch.float64), DDPM(prediction="velocity", zero_snr=True)
    losses = []

    def model(x_t, t, _):
        assert x_t.isfinite().all()
        losses.append((t == 999).sum())
        alpha_bar = objective.tables(ALL, CPU, torch.float64).alpha_bar[t].reshape(-1, 1)
        noise = (x_t - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
        return torch.where(t.reshape(-1, 1) == 999, -x, alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x)

    assert objective.loss(model, x, None, generator()) < 1e-20 and losses[0] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"schedule": "cosine"}, "schedule is 'cosine'; it may be 'linear' or 'squared_cosine'"),
        ({"prediction": "data"}, "prediction is 'data'; it may be 'noise' or 'velocity'"),
        ({"timesteps": "logit_normal"}, "timesteps is 'logit_normal'; it may be 'uniform' or 'loss_aware'"),
        ({"zero_snr": True}, "zero_snr needs prediction 'velocity'; it is 'noise', which says nothing about the data"),
    ],
)
def test_ddpm_refuses_options(options, reason):
    with pytest.raises(ValueError, match=reason):
        DDPM(**options)


def test_zero_snr_refuses_a_learned_variance():
    objective = DDPM(prediction="velocity", zero_snr=True)
    with pytest.raises(ValueError, match=r"returned 4 channels; with zero_snr it must return 2: .*learn_sigma=False"):
        objective.loss(Recorder(4), data(), None, generator())
    assert objective.loss(Recorder(), data(), None, generator()).isfinite()


def warm(seed=0):
    """A memory in which every timestep has 10 losses, very different from one timestep to the next."""
    memory = LOSS_AWARE.memory(CPU)
    scale = torch.randn(1000, 1, generator=generator(seed)).exp()
    memory["losses"] = scale * torch.rand(1000, 10, generator=generator(seed + 1))
    memory["counts"] += 10
    return memory


def test_the_memory_has_the_last_ten_losses_of_each_timestep():
    memory, expected = LOSS_AWARE.memory(CPU), {t: [] for t in range(1000)}
    random = generator()
    for i in range(60):
        # Few timesteps, so that one comes more than 10 times in a batch.
        t = torch.randint(1000 if i % 2 else 4, (1 + i,), generator=random)
        losses = torch.rand(1 + i, generator=random)
        remember(memory, t, losses)
        for place, loss in zip(t.tolist(), losses.tolist(), strict=True):
            expected[place].append(loss)
    assert memory["counts"].tolist() == [len(losses) for losses in expected.values()]
    for t, losses in expected.items():
        kept = memory["losses"][t].tolist()
        assert sorted(kept) == sorted([0.0] * (10 - len(losses[-10:])) + losses[-10:])


def test_loss_aware_probabilities():
    memory = warm()
    p = probabilities(memory)
    root = np.sqrt((memory["losses"].double().numpy() ** 2).mean(1))
    np.testing.assert_allclose(p.numpy(), root / root.sum() * 0.999 + 0.001 / 1000, rtol=1e-5)
    memory["counts"][500] = 9
    assert torch.equal(probabilities(memory), torch.full((1000,), 1e-3))


def test_loss_aware_draws_are_unbiased_and_remembered():
    """A model whose error is known at each timestep: draws follow p, and the mean loss is that of even draws."""
    size = torch.rand(1000, generator=generator(5), dtype=torch.float64) ** 3 + 0.1
    seen = []

    def model(x_t, t, _):
        seen.append(t)
        alpha_bar = torch.from_numpy(ALPHA_BARS)[t].reshape(-1, 1)
        return x_t / (1 - alpha_bar).sqrt() + size[t].reshape(-1, 1)

    memory, x, random = warm(), torch.zeros(500, 1, dtype=torch.float64), generator()
    # The memory of a model whose losses at half the timesteps have since fallen to a third.
    memory["losses"] = (size**2 * torch.where(torch.arange(1000) < 500, 3.0, 1.0))[:, None].expand(-1, 10).float()
    fixed = {name: value.clone() for name, value in memory.items()}
    p = probabilities(fixed)
    means = []
    for _ in range(200):
        memory = {name: value.clone() for name, value in fixed.items()}
        means.append(LOSS_AWARE.loss(model, x, None, random, memory).item())
        assert memory["counts"].sum() == 10_500
    t = torch.cat(seen)
    even, drawn = (size**2).mean().item(), (size[t] ** 2).mean().item()
    error = np.std(means) / len(means) ** 0.5
    assert abs(np.mean(means) - even) < 4 * error < 0.02 * even < abs(drawn - even)
    share = torch.bincount(t, minlength=1000).double() / len(t)
    assert (share - p).abs().max() < 6 * (p.max() / len(t)).sqrt()
    remembered = memory["losses"][seen[-1]]
    assert (remembered - (size[seen[-1]] ** 2).float()[:, None]).abs().min(1).values.max() < 1e-6


def test_loss_aware_losses_start_as_uniform_ones_and_need_their_memory():
    model, memory = Recorder(), LOSS_AWARE.memory(CPU)
    loss = LOSS_AWARE.loss(model, data(), None, generator(), memory)
    alpha_bar = torch.from_numpy(ALPHA_BARS)[model.t].reshape(-1, 1, 1, 1, 1)
    noise = (model.x - alpha_bar.sqrt() * data()) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(loss, (model.output - noise).square().mean(), rtol=1e-6, atol=0)
    for missing in (None, {}):
        with pytest.raises(ValueError, match="with timesteps 'loss_aware' it must be what memory"):
            LOSS_AWARE.loss(model, data(), None, generator(), missing)


def test_the_bound_is_zero_for_the_true_posterior():
    x = data()
    noise = torch.randn(SHAPE, generator=generator(1), dtype=torch.float64)
    t = torch.tensor([1, 2, 10, 100, 500, 999])
    tables = schedule(ALL, CPU, torch.float64)
    alpha_bar = tables.alpha_bar[t].reshape(-1, 1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    assert DDPM.variational_bound(tables, x, x_t, t, x, torch.zeros_like(x)).abs().max() < 1e-9


def test_discretized_likelihood_is_a_distribution_over_256_levels():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.0, 0.5), (0.9, 0.3), (-0.2, 0.02)):
        log_std = torch.tensor(math.log(std), dtype=torch.float64)
        mass = discretized_log_likelihood(levels, torch.tensor(mean, dtype=torch.float64), log_std).exp().sum()
        assert mass.item() == pytest.approx(1, abs=1e-9)


def test_full_schedule():
    tables = schedule(ALL, CPU, torch.float64)
    np.testing.assert_allclose(tables.beta.numpy(), BETAS, rtol=1e-10)
    np.testing.assert_allclose(tables.alpha_bar.numpy(), ALPHA_BARS, rtol=1e-12)
    before = np.concatenate([[1.0], ALPHA_BARS[:-1]])
    np.testing.assert_allclose(tables.previous.numpy(), before, rtol=1e-12)
    variance = BETAS * (1 - before) / (1 - ALPHA_BARS)
    np.testing.assert_allclose(tables.posterior_log_variance.exp().numpy()[1:], variance[1:], rtol=1e-9)
    assert tables.posterior_log_variance[0] == tables.posterior_log_variance[1]
    assert tables.timesteps.tolist() == list(range(1000))
    assert (tables.posterior_x0_weight[0], tables.posterior_x_weight[0]) == (pytest.approx(1), 0)
    assert schedule(ALL, CPU, torch.float32).alpha_bar.dtype == torch.float32
    assert schedule(ALL, CPU, torch.float64) is tables


def test_squared_cosine():
    expected = np.cumprod(1 - np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.999))
    np.testing.assert_allclose(alpha_bars("squared_cosine", False).numpy(), expected, rtol=1e-10)
    # The product telescopes up to the last beta, the only one that is capped.
    np.testing.assert_allclose(expected[:-1], COSINE[1:-1] / COSINE[0], rtol=1e-9)
    assert expected[-1] == pytest.approx(1e-3 * expected[-2])
    tables = schedule(ALL, CPU, torch.float64, "squared_cosine")
    assert tables.beta.max().item() == pytest.approx(0.999) and tables.alpha_bar[499].item() == pytest.approx(
        0.4938, abs=1e-4
    )


@pytest.mark.parametrize("betas", ["linear", "squared_cosine"])
def test_zero_terminal_snr(betas):
    before, after = alpha_bars(betas, False).sqrt(), alpha_bars(betas, True).sqrt()
    assert after[-1] == 0 and after[0].item() == pytest.approx(before[0].item(), rel=1e-14)
    # The root is rescaled by one affine map: differences keep their proportions.
    torch.testing.assert_close(
        after.diff() / before.diff(), torch.ones(999).double() * (after[0] / (before[0] - before[-1]))
    )
    for kept in (ALL, (0, 250, 999), (999,)):
        tables = schedule(kept, CPU, torch.float64, betas, True)
        assert all(table.isfinite().all() for table in tables)
        assert tables.beta[-1] == 1 and tables.posterior_x_weight[-1] == 0
        torch.testing.assert_close(tables.posterior_x0_weight[-1], tables.previous[-1].sqrt())


def meta_space_timesteps(section_counts):
    """Meta's function, sections and strides, with its running sum."""
    if section_counts.startswith("ddim"):
        count = int(section_counts[4:])
        for stride in range(1, 1000):
            if len(range(0, 1000, stride)) == count:
                return list(range(0, 1000, stride))
        return None
    counts = [int(count) for count in section_counts.split(",")]
    start, steps = 0, []
    for i, count in enumerate(counts):
        size = 1000 // len(counts) + (1 if i < 1000 % len(counts) else 0)
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        place = 0.0
        for _ in range(count):
            steps.append(start + round(place))
            place += stride
        start += size
    return steps


def test_space_timesteps():
    for steps in range(2, 1001):
        assert space_timesteps(steps) == tuple(meta_space_timesteps(str(steps))) == space_timesteps(str(steps))
    assert space_timesteps(1) == space_timesteps("1") == (999,)
    for sections in ("10,15,20", "1,1", "334,333,333", "5,1,7,1,100,3,2", "500,500", ",".join(["1"] * 1000)):
        assert space_timesteps(sections) == tuple(meta_space_timesteps(sections))
    thirds = space_timesteps("10,15,20")
    assert [thirds[i] for i in (0, 9, 10, 24, 25, 44)] == [0, 333, 334, 666, 667, 999]
    for count in range(1, 1001):
        expected = meta_space_timesteps(f"ddim{count}")
        if expected is None:
            with pytest.raises(ValueError, match=f"steps is 'ddim{count}'; no whole stride keeps {count} of 1000"):
                space_timesteps(f"ddim{count}")
        else:
            assert space_timesteps(f"ddim{count}") == tuple(expected)
    assert space_timesteps("ddim50") == tuple(range(0, 1000, 20))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("fast", "it may be a number, 'ddimN', or sections as in '10,15,20'"),
        ("ddim", "it may be a number, 'ddimN'"),
        ("10,-5", "it may be a number, 'ddimN'"),
        ("10,", "it may be a number, 'ddimN'"),
        ("1001", "it must be in 1..1000"),
        ("ddim60", "no whole stride keeps 60"),
        ("10,0", "of section 1 it may keep 1..500 timesteps, not 0"),
        ("335,1,1", "of section 0 it may keep 1..334 timesteps, not 335"),
        ("1,334,1", "of section 1 it may keep 1..333 timesteps, not 334"),
    ],
)
def test_space_timesteps_refuses(steps, reason):
    with pytest.raises(ValueError, match=f"steps is '?{steps}'?; {reason}"):
        space_timesteps(steps)
    with pytest.raises(TypeError, match=r"steps is 2\.5; it may be a number or a string"):
        space_timesteps(2.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 250, 333, 999])
def test_thinned_schedule(steps):
    tables = schedule(space_timesteps(steps), CPU, torch.float64)
    kept = tables.timesteps.tolist()
    assert len(kept) == steps and kept[-1] == 999 and (steps == 1 or kept[0] == 0)
    gaps = np.diff(kept)
    assert steps == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    np.testing.assert_allclose(tables.alpha_bar.numpy(), ALPHA_BARS[kept], rtol=1e-12)
    np.testing.assert_allclose((1 - tables.beta).cumprod(0).numpy(), ALPHA_BARS[kept], rtol=1e-9)
    assert all(table.isfinite().all() for table in tables)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_numbers_of_steps_that_do_not_fit(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; it must be in 1..1000"):
        space_timesteps(steps)


@pytest.mark.parametrize("kept", [(), (0, 1000), (5, 5), (7, 3), (-1, 2)])
def test_schedule_refuses_timesteps(kept):
    with pytest.raises(ValueError, match=r"it must be timesteps in 0\.\.999, rising"):
        schedule(kept, CPU, torch.float32)


def test_prediction_of_the_data_is_the_same_flow():
    """A model that knows the data has no loss and gives the velocity x_1 - x_0 wherever 1 - t is above its bound."""
    x = torch.randn(64, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    objective = FlowMatching(timesteps="logit_normal", logit_mean=-0.8, logit_std=0.8, prediction="data")
    seen = []

    def knows(x_t, t, y):
        seen.append(t / 1000)
        return x

    assert objective.loss(knows, x, None, torch.Generator().manual_seed(1)) == 0
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = torch.full((64,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(objective.velocity(knows, 0.3 * x + 0.7 * noise, t, None), x - noise)
    assert torch.isfinite(objective.velocity(knows, x, torch.ones(64, dtype=torch.float64), None)).all()

    logits = torch.special.logit(seen[0])
    assert abs(logits.mean() + 0.8) < 0.3 and abs(logits.std() - 0.8) < 0.25

    def wrong(x_t, t, y):
        return x + 0.5

    generator = torch.Generator().manual_seed(1)
    expected = (0.5 / (1 - seen[0]).clamp_min(0.05)).square().mean()
    torch.testing.assert_close(objective.loss(wrong, x, None, generator), expected)


def test_unknown_flow_options_raise():
    with pytest.raises(ValueError, match="prediction is 'x'; it may be 'velocity', 'data', 'score' or 'noise'"):
        FlowMatching(prediction="x")
    with pytest.raises(ValueError, match="logit_std is 0; it must be positive"):
        FlowMatching(timesteps="logit_normal", logit_std=0)
