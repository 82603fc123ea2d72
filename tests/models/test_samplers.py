"""sampling/sampler.py with models whose answer is known: for Gaussian data velocity and noise have a closed form."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.denoisers.dit import DiT, DiTConfig
from models.objectives.ddpm import ALL, DDPM
from models.objectives.flow import FlowMatching
from models.objectives.logsnr import LogSNR
from models.protocols import Denoiser
from models.sampling.plans import count_steps, diffusion_plan
from models.sampling.predictor import CudaGraphs, Predictor
from models.sampling.sampler import SOLVERS, SampleRequest, plan_of, sample
from models.sampling.solvers import SolverOptions

MEAN, STD = 1.5, 0.4
CPU = torch.device("cpu")
DIFFUSIONS = [
    DDPM(),
    DDPM(prediction="velocity"),
    DDPM(schedule="squared_cosine"),
    DDPM(schedule="squared_cosine", prediction="velocity"),
    DDPM(prediction="velocity", zero_snr=True),
    DDPM(schedule="squared_cosine", prediction="velocity", zero_snr=True),
]


class Gaussian(Denoiser):
    """The optimal velocity, or noise, for data N(MEAN, STD^2) in every cell."""

    def __init__(self, kind, objective=DDPM()):  # noqa: B008 - frozen
        super().__init__()
        self.kind, self.objective, self.times, self.modes = kind, objective, [], []

    def forward(self, x, t, y):
        self.times.append(t.clone())
        self.modes.append(self.training)
        if self.kind == "ddpm":
            alpha_bar = self.objective.tables(ALL, x.device, x.dtype).alpha_bar[t].reshape(-1, 1, 1)
            centred = (x - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)
            noise, x_0 = (1 - alpha_bar).sqrt() * centred, MEAN + alpha_bar.sqrt() * STD**2 * centred
            if self.objective.prediction == "noise":
                return noise
            return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
        t = (t / 1000).reshape(-1, 1, 1)
        centred = (x - t * MEAN) / (t**2 * STD**2 + (1 - t) ** 2)
        return MEAN + t * STD**2 * centred - (1 - t) * centred


class Labelled(Denoiser):
    """Returns a constant a channel for each class, so that guidance can be read off its output; keeps its inputs."""

    null_class = 3

    def __init__(self, channels=4):
        super().__init__()
        self.table = torch.randn(4, channels, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        return self.table[y].expand(-1, -1, x.shape[2])


def noise(batch=2, channels=4, cells=8, seed=0):
    return torch.randn(batch, channels, cells, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow_error(solver, steps):
    x = noise()
    out = sample(Gaussian("flow"), FlowMatching(), SampleRequest(noise=x, y=None, solver=solver, steps=steps))
    return (out - (MEAN + STD * x)).abs().max().item()


def test_flow_solvers_converge_at_their_order():
    # The exact flow from N(0, 1) to N(MEAN, STD^2) is the linear map.
    for solver, order in (("euler", 1), ("heun", 2)):
        coarse, fine = flow_error(solver, 40), flow_error(solver, 80)
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert flow_error("heun", 200) < 1e-4


def test_flow_times():
    for solver, expected in (("euler", [0, 250, 500, 750]), ("heun", [0, 250, 250, 500, 500, 750, 750, 1000])):
        model = Gaussian("flow")
        sample(model, FlowMatching(), SampleRequest(noise=noise(), y=None, solver=solver, steps=4))
        assert [t.tolist() for t in model.times] == [[e, e] for e in expected]


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_flow_step_by_step(solver, prediction):
    """Three steps against the objective's own velocity."""

    class Model(Denoiser):
        def forward(self, x, t, y):
            return 0.3 * x.sin() + t.reshape(-1, 1, 1) / 2000

    model, objective, steps = Model(), FlowMatching(prediction=prediction), 3
    x = noise()
    out = sample(model, objective, SampleRequest(noise=x, y=None, solver=solver, steps=steps))
    for i in range(steps):
        v = objective.velocity(model, x, x.new_full((2,), i / steps), None)
        if solver == "heun":
            v = (v + objective.velocity(model, x + v / steps, x.new_full((2,), (i + 1) / steps), None)) / 2
        x = x + v / steps
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("objective", DIFFUSIONS, ids=str)
def test_ddim_follows_the_flow_and_is_deterministic(objective, steps):
    x = noise()
    runs = [
        sample(Gaussian("ddpm", objective), objective, SampleRequest(noise=x, y=None, solver="ddim", steps=steps))
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    # At timestep 999 linear betas leave a little signal (alpha_bar = 4e-5), which bounds how well the map is met.
    torch.testing.assert_close(runs[0], MEAN + STD * x, rtol=0, atol=0.05 if steps == 100 else 0.02)


@pytest.mark.parametrize("steps", [50, 1000, "ddim100", "80,40,20,10"])
@pytest.mark.parametrize("objective", DIFFUSIONS, ids=str)
@pytest.mark.slow
def test_ddpm_has_the_right_mean_and_variance(objective, steps):
    if steps == "ddim100" and objective.zero_snr:
        pytest.skip("starts at 990")
    x = noise(1, 1, 20_000)
    generator = torch.Generator().manual_seed(1)
    out = sample(
        Gaussian("ddpm", objective),
        objective,
        SampleRequest(noise=x, y=None, solver="ddpm", steps=steps, generator=generator),
    )
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.02 if steps == 1000 else 0.06)
    # An ancestral sample forgets the noise that it started from.
    assert abs(torch.corrcoef(torch.stack((x.flatten(), out.flatten())))[0, 1]) < 0.05


@pytest.mark.parametrize("solver", SOLVERS["ddpm"])
@pytest.mark.parametrize("schedule", ["linear", "squared_cosine"])
@pytest.mark.parametrize("steps", [1, 17, "ddim25", "3,1,6"])
def test_noise_and_velocity_of_one_model_give_the_same_samples(schedule, solver, steps):
    runs = []
    for prediction in ("noise", "velocity"):
        objective = DDPM(schedule=schedule, prediction=prediction)
        model, generator = Gaussian("ddpm", objective), torch.Generator().manual_seed(1)
        runs.append(
            sample(
                model, objective, SampleRequest(noise=noise(), y=None, solver=solver, steps=steps, generator=generator)
            )
        )
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("objective", [item for item in DIFFUSIONS if item.zero_snr], ids=str)
@pytest.mark.parametrize("solver", SOLVERS["ddpm"])
def test_zero_snr_starts_at_999_with_finite_steps(objective, solver):
    for steps in (1, 2, 50, 1000, "10,15,20", "ddim112"):
        plan = diffusion_plan(objective, solver, steps, 1.0)
        assert plan.times[0] == 999 and plan.coefficients.isfinite().all()
        assert len(plan.times) == count_steps(objective, steps)
    # The first step of one: x_0 is all that there is, and of pure noise it is the mean of the data.
    out = sample(Gaussian("ddpm", objective), objective, SampleRequest(noise=noise(), y=None, solver=solver, steps=1))
    torch.testing.assert_close(out, torch.full_like(out, MEAN))
    for steps, start in (("ddim50", 980), ("10,1", 500)):
        with pytest.raises(ValueError, match=f"steps is '{steps}', which starts at timestep {start}; with zero_snr"):
            sample(
                Gaussian("ddpm", objective), objective, SampleRequest(noise=noise(), y=None, solver=solver, steps=steps)
            )


def test_past_frames_and_guided_channels_are_checked():
    with pytest.raises(ValueError, match="past was given, but objective 'flow' teaches no model"):
        sample(
            Gaussian("flow"),
            FlowMatching(),
            SampleRequest(noise=noise(), y=None, solver="euler", steps=1, past=noise()),
        )
    model, y = Labelled(), torch.tensor([0, 2])
    for channels in (0, 99):
        with pytest.raises(ValueError, match=f"guidance_channels is {channels}; it must be in 1.."):
            sample(
                model,
                FlowMatching(),
                SampleRequest(noise=noise(), y=y, solver="euler", steps=1, guidance=2.0, guidance_channels=channels),
            )


def test_timesteps_of_respaced_samples():
    for steps, expected in (
        ("ddim4", [750, 500, 250, 0]),
        ("2,1,3", [999, 833, 667, 334, 333, 0]),
        ("3", [999, 500, 0]),
    ):
        model = Gaussian("ddpm")
        sample(model, DDPM(), SampleRequest(noise=noise(), y=None, solver="ddim", steps=steps))
        assert [t.tolist() for t in model.times] == [[t, t] for t in expected]


@pytest.mark.parametrize("learned", [False, True])
def test_ddpm_step_by_step(learned):
    """Five steps against the equations of Ho et al., written with the thinned chain's own alpha_bar."""

    class Model(Denoiser):
        def forward(self, x, t, y):
            seen.append(t.tolist())
            parts = [0.3 * x.sin()] + ([x.cos()] if learned else [])
            return torch.cat(parts, dim=1)

    seen = []
    x = noise()
    out = sample(
        Model(),
        DDPM(),
        SampleRequest(noise=x, y=None, solver="ddpm", steps=5, generator=torch.Generator().manual_seed(1)),
    )
    kept = [0, 250, 500, 749, 999]
    assert seen == [[t, t] for t in reversed(kept)]

    full = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    generator = torch.Generator().manual_seed(1)
    for i in reversed(range(5)):
        a, before = full[kept[i]], full[kept[i - 1]] if i else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - a / before
        mean = (x - beta / (1 - a).sqrt() * 0.3 * x.sin()) / (1 - beta).sqrt()
        if i:
            tilde = beta * (1 - before) / (1 - a)
            share = (x.cos() + 1) / 2
            variance = beta**share * tilde ** (1 - share) if learned else beta
            mean = mean + torch.as_tensor(variance).sqrt() * torch.randn(
                x.shape, generator=generator, dtype=torch.float64
            )
        x = mean
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_by_step(eta, learned):
    """Five steps against equations 12 and 16 of Song et al. 2020; a learned variance has no part in them."""

    class Model(Denoiser):
        def forward(self, x, t, y):
            return torch.cat([0.3 * x.sin()] + ([x.cos()] if learned else []), dim=1)

    def draws():
        return torch.Generator().manual_seed(1)

    x, generator = noise(), draws()
    options = SolverOptions(eta=eta)
    request = SampleRequest(noise=x, solver="ddim", steps=5, generator=draws(), options=options)
    out = sample(Model(), DDPM(), request)
    full = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    kept = [0, 250, 500, 749, 999]
    for i in reversed(range(5)):
        a, before = full[kept[i]], full[kept[i - 1]] if i else torch.tensor(1.0, dtype=torch.float64)
        predicted = 0.3 * x.sin()
        data = (x - (1 - a).sqrt() * predicted) / a.sqrt()
        sigma = eta * ((1 - before) / (1 - a)).sqrt() * (1 - a / before).sqrt()
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64) if i and eta else torch.zeros_like(x)
        x = before.sqrt() * data + (1 - before - sigma**2).sqrt() * predicted + sigma * drawn
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_clip_denoised_step_by_step(solver, learned):
    """Five guided steps as Meta's code does them with clip_denoised: the data, then mean or noise from what is left."""

    class Model(Denoiser):
        null_class = 1

        def forward(self, x, t, y):
            prediction = torch.where(y[:, None, None] == 1, -0.5 * x.cos(), 0.3 * x.sin())
            return torch.cat([prediction] + ([x.cos()] if learned else []), dim=1)

    x, generator = noise(), torch.Generator().manual_seed(1)
    request = SampleRequest(
        noise=x,
        y=torch.zeros(len(x), dtype=torch.int64),
        guidance=3.0,
        solver=solver,
        steps=5,
        generator=torch.Generator().manual_seed(1),
        options=SolverOptions(clip_denoised=True),
    )
    out = sample(Model(), DDPM(), request)
    full = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    kept, bounded = [0, 250, 500, 749, 999], 0
    for i in reversed(range(5)):
        a, before = full[kept[i]], full[kept[i - 1]] if i else torch.tensor(1.0, dtype=torch.float64)
        guided = -0.5 * x.cos() + 3 * (0.3 * x.sin() + 0.5 * x.cos())
        data = (x - (1 - a).sqrt() * guided) / a.sqrt()
        bounded += int((data.abs() > 1).sum())
        data = data.clamp(-1, 1)
        share = (x.cos() + 1) / 2
        if solver == "ddim":
            x = before.sqrt() * data + (1 - before).sqrt() * (x - a.sqrt() * data) / (1 - a).sqrt()
            continue
        beta = 1 - a / before
        x = (before.sqrt() * beta * data + (1 - beta).sqrt() * (1 - before) * x) / (1 - a)
        if i:
            tilde = beta * (1 - before) / (1 - a)
            variance = beta**share * tilde ** (1 - share) if learned else beta
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x + torch.as_tensor(variance).sqrt() * drawn
    assert bounded
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize("objective", [FlowMatching(), DDPM(), LogSNR()], ids=str)
def test_guidance_goes_from_one_scale_to_the_other(objective):
    """Four steps by themselves, each with the scale 5 r + 2 (1 - r) at r = 1, 0.75, 0.5, 0.25."""
    model, x, y = Labelled(), noise(), torch.tensor([0, 2])
    solver = "euler" if objective.name == "flow" else "ddim"
    asked = {"noise": x, "y": y, "solver": solver, "steps": 4}
    out = sample(model, objective, SampleRequest(**asked, guidance=5.0, guidance_end=2.0))
    plans = [plan_of(objective, solver, SampleRequest(**asked, guidance=w)) for w in (5.0, 4.25, 3.5, 2.75)]
    for i, plan in enumerate(plans):
        _, a, b, _, _ = plan.coefficients[i, 0]
        cond, null = model.table[y], model.table[3]
        x = a * x + b * (null + plan.coefficients[i, 0, 0] * (cond - null))
    torch.testing.assert_close(out, x)
    for more, message in (({"solver": "dopri5", "steps": None}, "has no even steps"), ({"guidance": 1.0}, "is none")):
        with pytest.raises(ValueError, match=f"guidance_end is 2.0, but .*{message}"):
            sample(model, FlowMatching(), SampleRequest(**asked | {"guidance": 5.0, "guidance_end": 2.0} | more))


@pytest.mark.parametrize("objective", DIFFUSIONS, ids=str)
def test_ddim_with_noise_gives_the_distribution(objective):
    request = SampleRequest(
        noise=noise(1, 1, 20_000),
        solver="ddim",
        steps=200,
        generator=torch.Generator().manual_seed(3),
        options=SolverOptions(eta=0.7),
    )
    out = sample(Gaussian("ddpm", objective), objective, request)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02) and out.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 37])
@pytest.mark.parametrize("solver", SOLVERS["ddpm"])
def test_few_diffusion_steps_stay_finite(solver, steps):
    model = Gaussian("ddpm")
    out = sample(model, DDPM(), SampleRequest(noise=noise(), y=None, solver=solver, steps=steps))
    assert len(model.times) == steps and out.isfinite().all()
    assert (out.mean() - MEAN).abs() < 0.2


@pytest.mark.parametrize("channels", [None, 3])
def test_guidance_in_a_flow(channels):
    model, x, y = Labelled(), noise(), torch.tensor([0, 2])
    out = sample(
        model,
        FlowMatching(),
        SampleRequest(noise=x, y=y, solver="euler", steps=1, guidance=2.5, guidance_channels=channels),
    )
    cond, null = model.table[y], model.table[3]
    expected = null + 2.5 * (cond - null)
    if channels == 3:
        expected = torch.cat((expected[:, :3], cond[:, 3:]), dim=1)
    torch.testing.assert_close(out, x + expected)
    ((seen, t, labels),) = model.calls
    assert torch.equal(seen, torch.cat((x, x))) and t.shape == (4,) and labels.tolist() == [0, 2, 3, 3]


def test_channels_without_guidance_are_refused():
    with pytest.raises(ValueError, match="guidance_channels is 3, but guidance is 1"):
        sample(
            Labelled(),
            FlowMatching(),
            SampleRequest(noise=noise(), y=torch.tensor([0, 2]), solver="euler", steps=1, guidance_channels=3),
        )


def test_no_guidance_calls_the_model_on_the_batch_itself():
    model, x, y = Labelled(), noise(), torch.tensor([0, 2])
    out = sample(model, FlowMatching(), SampleRequest(noise=x, y=y, solver="euler", steps=1))
    torch.testing.assert_close(out, x + model.table[y])
    assert len(model.calls) == 1 and model.calls[0][2].tolist() == [0, 2]


def test_the_learned_variance_is_not_guided():
    def run(guidance, table):
        model = Labelled(8)
        model.table = table
        generator = torch.Generator().manual_seed(1)
        arguments = {"solver": "ddpm", "steps": 3, "guidance": guidance, "generator": generator}
        return sample(model, DDPM(), SampleRequest(noise=noise(), y=torch.tensor([0, 2]), **arguments))

    table = Labelled(8).table
    # Equal noise predictions for every class: guidance changes nothing, unless it reached the variance.
    table[:, :4] = table[:1, :4]
    torch.testing.assert_close(run(4.0, table), run(1.0, table))
    other = table.clone()
    other[3, 4:] += 1
    assert torch.equal(run(4.0, other), run(4.0, table))
    other[:3, 4:] += 1
    assert not torch.allclose(run(4.0, other), run(4.0, table))


@pytest.mark.parametrize(("classes", "guidance"), [(0, 1.0), (3, 1.0), (3, 3.0)])
@pytest.mark.parametrize(("objective", "solver"), [(FlowMatching(), "heun"), (DDPM(), "ddpm")])
def test_modulations_are_computed_for_many_steps_at_once(objective, solver, classes, guidance, monkeypatch):
    dit = DiT(
        DiTConfig(input_size=(2, 4, 4), patch=(1, 2, 2), channels=3, width=16, depth=2, heads=2, num_classes=classes)
    ).double()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    class Plain(Denoiser):
        """The same model, whose modulations nobody can ask for."""

        null_class = dit.null_class

        def __init__(self):
            super().__init__()
            self.dit = dit

        def forward(self, x, t, y):
            return self.dit(x, t, y)

    calls = []
    dit.blocks[0].adaLN_modulation.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    x, y = torch.randn(2, 3, 2, 4, 4).double(), torch.tensor([2, 0]) if classes else None

    def run(model):
        calls.clear()
        generator = torch.Generator().manual_seed(1)
        return sample(
            model,
            objective,
            SampleRequest(noise=x, y=y, solver=solver, steps=6, guidance=guidance, generator=generator),
        )

    expected, times = run(Plain()), 12 if solver == "heun" else 6
    assert len(calls) == times
    rows = (3 if guidance != 1 else 2) if classes else 1
    torch.testing.assert_close(run(dit), expected)
    assert calls == [times * rows]
    monkeypatch.setattr(Predictor, "ROWS", 4 * rows + rows - 1)
    torch.testing.assert_close(run(dit), expected)
    assert calls == [4 * rows] * (times // 4) + [times % 4 * rows] * (times % 4 > 0)


class Recorded(TorchDispatchMode):
    """As much of a CUDA graph as there is on a CPU: ops, and the memory that they read and write at every replay."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        self.ops.append((function, arguments, options or {}, out))
        return out

    def replay(self):
        for function, arguments, options, out in self.ops:
            again = function(*arguments, **options)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if torch.is_tensor(place) and place.untyped_storage()._cdata != value.untyped_storage()._cdata:
                    place.copy_(value)  # a view has nothing to write


@pytest.fixture
def recorded(monkeypatch):
    """The graphs that are captured, by recording ops on the CPU."""
    graphs = []

    def new():
        graphs.append(Recorded())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    original = CudaGraphs.__init__
    monkeypatch.setattr(CudaGraphs, "__init__", lambda self, f, device: original(self, f, torch.device("cuda")))
    return graphs


@pytest.mark.parametrize(
    ("objective", "solver", "captured"),
    [
        *((FlowMatching(), solver, captured) for solver, captured in (("euler", 1), ("heun", 2), ("rk4", 2))),
        *((FlowMatching(), solver, 2) for solver in ("euler_maruyama", "heun_sde")),
        *((DDPM(), solver, captured) for solver, captured in (("ddpm", 2), ("ddim", 1))),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_graphs_replay_the_same_samples(objective, solver, captured, guidance, recorded):
    learned = objective.name == "ddpm"
    dit = DiT(
        DiTConfig(
            input_size=(2, 4, 4),
            patch=(1, 2, 2),
            channels=3,
            width=16,
            depth=2,
            heads=2,
            num_classes=3,
            learn_sigma=learned,
        )
    )
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    y = torch.tensor([2, 0])
    for model in (dit, Labelled(6 if learned else 3)):
        recorded.clear()
        x = torch.randn(2, 3, 2, 4, 4) if model is dit else torch.randn(2, 3, 8, dtype=torch.float64)
        results = [
            sample(
                model,
                objective,
                SampleRequest(
                    noise=x,
                    y=y,
                    solver=solver,
                    steps=5,
                    guidance=guidance,
                    generator=torch.Generator().manual_seed(1),
                    cuda_graphs=graphs,
                ),
            )
            for graphs in (False, True)
        ]
        assert torch.equal(*results) and len(recorded) == captured


def test_a_result_of_a_graph_outlives_the_next_replay(recorded):
    graphed = CudaGraphs(lambda x, z: 2 * x if z is None else x + z, torch.device("cpu"))
    one, two = torch.ones(3), torch.arange(3.0)
    results = [graphed(one, None), graphed(two, None), graphed(one, two), graphed(two, two)]
    for result, expected in zip(results, (2 * one, 2 * two, one + two, 2 * two), strict=True):
        assert torch.equal(result, expected)
    assert len(recorded) == 2


def test_graphs_need_a_cuda_device():
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device; this is cpu"):
        sample(
            Gaussian("flow"),
            FlowMatching(),
            SampleRequest(noise=noise(), y=None, solver="euler", steps=2, cuda_graphs=True),
        )


def test_guidance_refuses_a_model_without_classes():
    unconditional = Gaussian("flow")
    unconditional.null_class = None
    for model, y in ((unconditional, None), (unconditional, torch.tensor([0, 1])), (Labelled(), None)):
        with pytest.raises(ValueError, match=r"guidance is 2\.0"):
            sample(model, FlowMatching(), SampleRequest(noise=noise(), y=y, solver="euler", steps=1, guidance=2.0))


@pytest.mark.parametrize(
    ("objective", "solver", "right"),
    [(FlowMatching(), "ddim", "'euler' and 'heun'"), (DDPM(), "euler", "'ddpm' and 'ddim'"), (DDPM(), "x", "'ddpm'")],
)
def test_refuses_a_solver_of_another_objective(objective, solver, right):
    with pytest.raises(ValueError, match=f"solver is '{solver}'; .*{right}"):
        sample(Gaussian("flow"), objective, SampleRequest(noise=noise(), y=None, solver=solver, steps=2))


@pytest.mark.parametrize(
    ("objective", "solver", "steps"),
    [(FlowMatching(), "heun", 0), (FlowMatching(), "euler", "ddim50"), (DDPM(), "ddim", 1001), (DDPM(), "ddpm", "x")],
)
def test_refuses_steps(objective, solver, steps):
    with pytest.raises(ValueError, match=f"steps is {steps!r}"):
        sample(Gaussian(objective.name), objective, SampleRequest(noise=noise(), y=None, solver=solver, steps=steps))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_nothing_is_recorded(training):
    model = Gaussian("flow").train(training)
    model.weight = nn.Parameter(torch.ones(()))
    model.register_forward_hook(lambda module, _, out: out * module.weight)
    out = sample(model, FlowMatching(), SampleRequest(noise=noise(), y=None, solver="heun", steps=2))
    assert model.modes == [False] * 4 and model.training is training and not out.requires_grad

    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, FlowMatching(), SampleRequest(noise=noise(), y=None, solver="heun", steps=2))
    assert model.training is training


@pytest.mark.parametrize(("objective", "solver"), [(FlowMatching(), "euler"), (DDPM(), "ddpm")])
def test_progress_wraps_the_steps(objective, solver):
    seen = []

    def progress(steps):
        for i in steps:
            yield i
            seen.append(i)

    model = Gaussian(objective.name)
    sample(model, objective, SampleRequest(noise=noise(), y=None, solver=solver, steps=5, progress=progress))
    assert sorted(seen) == list(range(5)) and len(model.times) == 5


def test_ddpm_draws_from_the_generator_only():
    state = torch.get_rng_state()

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(
            Gaussian("ddpm"), DDPM(), SampleRequest(noise=noise(), y=None, solver="ddpm", steps=4, generator=generator)
        )

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), state)
