"""denoisers/dit.py against a DiT written again from the formulas, with einops and plain modules, and Meta's names."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from minisora_kernels import use_backend
from models.denoisers.dit import SIZES, DiT, DiTConfig
from models.denoisers.layers import TimestepEmbedder, grid_positions
from models.denoisers.text import Text

IMAGE = DiTConfig(
    input_size=(8, 8), patch=(2, 2), channels=4, width=32, depth=2, heads=4, num_classes=10, learn_sigma=True
)
VIDEO = DiTConfig(
    input_size=(4, 8, 12), patch=(2, 2, 2), channels=3, width=32, depth=2, heads=4, num_classes=5, class_dropout=0.0
)
CONFIGS = {
    "image": replace(IMAGE, class_dropout=0.0),
    "joint": VIDEO,
    "factorized": replace(VIDEO, attention="factorized", depth=3, patch=(1, 2, 2)),
    "rms": replace(VIDEO, qk_norm="rms"),
    "layer": replace(VIDEO, qk_norm="layer", num_classes=0),
}


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-6)


class EagerAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kind = config.heads, config.qk_norm
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        if self.kind is not None:
            for name in ("q_norm", "k_norm"):
                holder = nn.Module()
                holder.weight = nn.Parameter(torch.ones(config.width // config.heads))
                setattr(self, name, holder)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        if self.kind == "layer":
            q, k = norm(q) * self.q_norm.weight, norm(k) * self.k_norm.weight
        elif self.kind == "rms":
            q, k = (
                part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * holder.weight
                for part, holder in ((q, self.q_norm), (k, self.k_norm))
            )
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        return self.proj(rearrange(scores.softmax(-1) @ v, "b heads n d -> b n (heads d)"))


class EagerBlock(nn.Module):
    def __init__(self, config, axis):
        super().__init__()
        self.axis, self.grid = axis, config.grid
        self.attn = EagerAttention(config)
        self.mlp = nn.Module()
        hidden = int(config.mlp_ratio * config.width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def attend(self, x):
        t, h, w = self.grid
        if self.axis == "space":
            y = self.attn(rearrange(x, "b (t s) d -> (b t) s d", t=t))
            return rearrange(y, "(b t) s d -> b (t s) d", t=t)
        if self.axis == "time":
            y = self.attn(rearrange(x, "b (t s) d -> (b s) t d", t=t))
            return rearrange(y, "(b s) t d -> b (t s) d", s=h * w)
        return self.attn(x)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attend(norm(x) * (1 + scale1) + shift1)
        hidden = self.mlp.fc1(norm(x) * (1 + scale2) + shift2)
        return x + gate2 * self.mlp.fc2(F.gelu(hidden, approximate="tanh"))


class EagerDiT(nn.Module):
    """The equations on ``[B, N, D]`` with the condition repeated for every token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        out = config.channels * (1 + config.learn_sigma)
        convolution = nn.Conv3d if len(config.patch) == 3 else nn.Conv2d
        self.x_embedder = nn.Module()
        self.x_embedder.proj = convolution(config.channels, config.width, config.patch, config.patch)
        self.pos_embed = nn.Parameter(literal_positions(config), requires_grad=False)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(256, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        if config.num_classes:
            self.y_embedder = nn.Module()
            self.y_embedder.embedding_table = nn.Embedding(config.num_classes + 1, config.width)
        axes = ["all"] if config.attention == "joint" else ["space", "time"]
        self.blocks = nn.ModuleList(EagerBlock(config, axes[i % len(axes)]) for i in range(config.depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(config.width, math.prod(config.patch) * out)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x, t, y=None):
        image = x.dim() == 4
        gt, gh, gw = self.config.grid
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t.float()[..., None] * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        c = repeat(c, "b d -> b t d", t=gt) if t.dim() == 1 else c
        if y is not None:
            c = c + self.y_embedder.embedding_table(y)[:, None]
        c = repeat(c, "b t d -> b (t s) d", s=gh * gw)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, -1)
        x = self.final_layer.linear(norm(x) * (1 + scale) + shift)
        if image:
            ph, pw = self.config.patch
            return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=gh, w=gw, p=ph, q=pw)
        pt, ph, pw = self.config.patch
        return rearrange(x, "b (t h w) (r p q c) -> b c (t r) (h p) (w q)", t=gt, h=gh, w=gw, r=pt, p=ph, q=pw)


def literal_positions(config):
    """One channel at a time: column then row over halves of the width, plus the frame over all of it."""
    frames, rows, columns = config.grid
    d = config.width

    def entry(position, channel, width):
        angle = position / 10000 ** (2 * (channel % (width // 2)) / width)
        return math.sin(angle) if channel < width // 2 else math.cos(angle)

    table = []
    for t in range(frames):
        for r in range(rows):
            for c in range(columns):
                row = [entry(c, i, d // 2) for i in range(d // 2)] + [entry(r, i, d // 2) for i in range(d // 2)]
                if len(config.patch) == 3:
                    row = [value + entry(t, i, d) for i, value in enumerate(row)]
                table.append(row)
    return torch.tensor(table, dtype=torch.float64).float()[None]


def randomized(model, seed=0):
    """Weights that leave nothing at zero: on a fresh DiT only the last Linear has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                std = 0.2 if parameter.dim() > 1 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def inputs(config, dtype=torch.float32, batch=3, per_frame=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, *config.input_size, generator=generator, dtype=dtype)
    shape = (batch, config.grid[0]) if per_frame else (batch,)
    t = torch.rand(shape, generator=generator) * 1000
    y = torch.randint(config.num_classes + 1, (batch,), generator=generator) if config.num_classes else None
    return x, t, y


def pair(config, dtype):
    """An eager DiT with random weights, and ours with its state dict."""
    torch.manual_seed(0)
    eager = randomized(EagerDiT(config))
    ours = DiT(config)
    ours.load_state_dict(eager.state_dict(), strict=True)
    return eager.to(dtype), ours.to(dtype)


def run(model, x, t, y):
    x = x.clone().requires_grad_()
    out = model(x, t, y)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (out * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return out.detach(), {"x": x.grad, **gradients}


def compare(eager, ours, arguments, tolerance):
    expected, expected_gradients = run(eager, *arguments)
    got, gradients = run(ours, *arguments)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = expected.abs().max()
    assert scale > 0.1
    assert (got - expected).abs().max() <= tolerance * scale
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (gradients[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_eager_model_in_float64(name, per_frame):
    config = CONFIGS[name]
    if per_frame and len(config.patch) == 2:
        per_frame = False
    eager, ours = pair(config, torch.float64)
    with use_backend("reference"):
        compare(eager.train(), ours.train(), inputs(config, torch.float64, per_frame=per_frame), 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_eager_model_in_float32(name):
    eager, ours = pair(CONFIGS[name], torch.float32)
    compare(eager, ours, inputs(CONFIGS[name], per_frame=name == "joint"), 2e-5)


def test_positions():
    for config in (IMAGE, VIDEO, replace(VIDEO, input_size=(6, 10, 4), width=24, heads=2)):
        ours = grid_positions(config.grid, config.width, video=len(config.patch) == 3)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, literal_positions(config), rtol=0, atol=1e-7)
    first, second = (grid_positions((1, 2, 3), 32, video=False)[0, i] for i in (0, 1))
    # Token 1 is the next column: only the first half of the channels may change.
    assert not torch.equal(first[:16], second[:16]) and torch.equal(first[16:], second[16:])


def test_timestep_sinusoid():
    t = torch.tensor([0.0, 1.0, 37.5, 999.0])
    ours = TimestepEmbedder.sinusoid(t)
    assert ours.shape == (4, 256) and ours.dtype == torch.float32
    for row, value in zip(ours.tolist(), t.tolist(), strict=True):
        angles = [value * 10000 ** (-i / 128) for i in range(128)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-4)
    assert torch.equal(TimestepEmbedder.sinusoid(t.bfloat16()[1:2]), ours[1:2])


@pytest.mark.parametrize(("size", "millions"), [("S", 32.9), ("B", 130.3), ("L", 457.8), ("XL", 674.8)])
def test_sizes_have_the_published_parameter_counts(size, millions):
    with torch.device("meta"):
        model = DiT(
            DiTConfig(input_size=(32, 32), patch=(2, 2), channels=4, num_classes=1000, learn_sigma=True, **SIZES[size])
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6, 1) == millions


def test_state_dict_has_the_names_and_shapes_of_meta():
    with torch.device("meta"):
        model = DiT(
            DiTConfig(input_size=(32, 32), patch=(2, 2), channels=4, num_classes=1000, learn_sigma=True, **SIZES["XL"])
        )
    d = 1152
    expected = {
        "pos_embed": (1, 256, d),
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (1001, d),
        "final_layer.linear.weight": (32, d),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    for i in range(28):
        for name, rows, columns in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("mlp.fc1", 4 * d, d),
            ("mlp.fc2", d, 4 * d),
            ("adaLN_modulation.1", 6 * d, d),
        ):
            expected[f"blocks.{i}.{name}.weight"] = (rows, columns)
            expected[f"blocks.{i}.{name}.bias"] = (rows,)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_initial_weights():
    torch.manual_seed(0)
    model = DiT(replace(IMAGE, width=128, num_classes=200))
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert value.count_nonzero() == 0, name
    for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "x_embedder.proj.weight"):
        weight = state[name].flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < weight.abs().max() <= bound and weight.std().item() == pytest.approx(
            bound / math.sqrt(3), rel=0.1
        )
    x, t, y = inputs(replace(IMAGE, num_classes=200))
    out, gradients = run(model, x, t, y)
    assert out.count_nonzero() == 0
    alive = {name for name, g in gradients.items() if g is not None and g.count_nonzero()}
    assert alive == {"final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.mark.parametrize("name", ["joint", "factorized"])
def test_checkpointing_gives_the_same_gradients(name):
    config = CONFIGS[name]
    model = randomized(DiT(config))
    plain = run(model, *inputs(config))
    model.zero_grad()
    model.checkpointing = True
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = run(model, *inputs(config))
    assert len(calls) == 2
    assert torch.equal(plain[0], again[0])
    for gradient in plain[1]:
        assert torch.equal(plain[1][gradient], again[1][gradient]), gradient


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(checkpointing):
    config = replace(CONFIGS["joint"], depth=1) if checkpointing else replace(CONFIGS["factorized"], depth=2)
    model = randomized(DiT(config))
    model.checkpointing = checkpointing
    expected, expected_gradients = run(model, *inputs(config))
    model.zero_grad()
    torch.compiler.reset()
    out, gradients = run(torch.compile(model, fullgraph=True, backend="aot_eager"), *inputs(config))
    torch.testing.assert_close(out, expected)
    for name, gradient in expected_gradients.items():
        got = gradients[name if name == "x" else f"_orig_mod.{name}"]
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-4)


def test_class_dropout_compiles_without_a_graph_break():
    model = DiT(replace(VIDEO, class_dropout=0.5, depth=1))
    torch.compiler.reset()
    embed = torch.compile(model.y_embedder, fullgraph=True, backend="aot_eager")
    rows = embed(torch.zeros(64, dtype=torch.long))
    table = model.y_embedder.embedding_table.weight
    dropped = (rows == table[5]).all(-1)
    assert 10 < dropped.sum() < 54 and torch.equal(rows[~dropped], table[:1].expand(int((~dropped).sum()), -1))


def test_autocast_keeps_an_fp32_residual_stream():
    config = CONFIGS["joint"]
    model = randomized(DiT(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.mul_(0.3)
    x, t, y = inputs(config)
    exact = model(x, t, y)
    seen = []
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.extend(part.dtype for part in out))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert seen == [torch.float32, torch.bfloat16] and out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_class_dropout():
    config = replace(VIDEO, class_dropout=1.0)
    model = randomized(DiT(config))
    x, t, _ = inputs(config)
    y = torch.tensor([0, 1, 2])
    null = torch.full_like(y, model.null_class)
    assert model.null_class == 5
    model.train()
    assert torch.equal(model(x, t, y), model(x, t, null))
    model.eval()
    assert not torch.equal(model(x, t, y), model(x, t, null))

    embedder = DiT(replace(config, class_dropout=0.3)).y_embedder.train()
    labels = torch.zeros(4000, dtype=torch.long)
    torch.manual_seed(0)
    first = embedder(labels)
    dropped = (first == embedder.embedding_table.weight[5]).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(first[~dropped], embedder.embedding_table.weight[:1].expand(int((~dropped).sum()), -1))
    torch.manual_seed(0)
    assert torch.equal(embedder(labels), first)


def test_timesteps_per_frame():
    # One spatial block: a frame sees nothing of the others, so its output may depend on its own timestep only.
    config = replace(CONFIGS["factorized"], depth=1)
    model = randomized(DiT(config))
    x, t, y = inputs(config)
    rows = t[:, None].expand(-1, 4).clone()
    torch.testing.assert_close(model(x, rows, y), model(x, t, y))
    before = model(x, rows, y)
    rows[:, 2] += 100
    after = model(x, rows, y)
    changed = (before != after).flatten(3).any(-1).any(1)
    assert changed.tolist() == [[False, False, True, False]] * 3


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", ["joint", "layer"])
def test_modulations_take_the_place_of_t_and_y(name, per_frame):
    config = CONFIGS[name]
    model = randomized(DiT(config))
    x, t, y = inputs(config, per_frame=per_frame)
    modulations = model.modulations(t, y)
    assert modulations.shape == (*t.shape, (6 * config.depth + 2) * config.width)
    assert torch.equal(model(x, modulations=modulations), model(x, t, y))
    # Rows of many timesteps at once: the products may round otherwise.
    many = model.modulations(t.repeat(9, *(1,) * (t.dim() - 1)), None if y is None else y.repeat(9))
    torch.testing.assert_close(many[6:9], modulations)
    with pytest.raises(ValueError, match="which were given too"):
        model(x, t, y, modulations=modulations)
    for bad in (modulations[:2], modulations[..., 1:]):
        with pytest.raises(ValueError, match=r"modulations have shape .* it must be \[3, 448\]"):
            model(x, modulations=bad)
    with pytest.raises(ValueError, match="t is None"):
        model(x)


def test_unconditional():
    model = randomized(DiT(replace(VIDEO, num_classes=0)))
    assert model.null_class is None
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    x, t, _ = inputs(VIDEO)
    assert model(x, t).shape == x.shape


def test_attributes():
    model = DiT(IMAGE)
    assert (model.out_channels, model.null_class, model.tokens_per_sample, model.checkpointing) == (8, 10, 16, False)
    x, t, y = inputs(IMAGE)
    assert model(x, t, y).shape == (3, 8, 8, 8)
    assert DiT(VIDEO).tokens_per_sample == 2 * 4 * 6


def test_config_survives_json():
    for config in (IMAGE, VIDEO, *CONFIGS.values()):
        again = DiTConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config and isinstance(again.patch, tuple)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": (8,)}, "input_size"),
        ({"input_size": (0, 8, 8)}, "input_size"),
        ({"patch": (2, 2)}, "patch"),
        ({"patch": (3, 2, 2)}, "patch"),
        ({"patch": (0, 2, 2)}, "patch"),
        ({"channels": 0}, "channels"),
        ({"depth": 0}, "depth"),
        ({"heads": 5}, "width"),
        ({"width": 30, "heads": 2}, "width"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"attention": "axial"}, "attention"),
        ({"input_size": (8, 8), "patch": (2, 2), "attention": "factorized"}, "attention"),
        ({"num_classes": -1}, "num_classes"),
        ({"class_dropout": 1.5}, "class_dropout"),
        ({"qk_norm": "batch"}, "qk_norm"),
    ],
)
def test_config_refuses(change, word):
    with pytest.raises(ValueError, match=f"^{word} is"):
        replace(VIDEO, **change)


TEXT = replace(VIDEO, num_classes=0, text_width=6)


@pytest.mark.parametrize("fixed", [False, True])
def test_captions_are_one_vector_and_a_null_one(fixed):
    torch.manual_seed(0)
    embedder = DiT(replace(TEXT, fixed_null=fixed, class_dropout=0.4)).y_embedder.train()
    y = Text(torch.randn(2000, 1, 6), torch.ones(2000, 1, dtype=torch.bool))
    linear, dropped = embedder.output_projection, embedder(y)
    null, own = linear(embedder.null), linear(y.states[:, 0])
    is_null = (dropped - null).abs().amax(1) < 1e-5
    torch.testing.assert_close(dropped[~is_null], own[~is_null])
    assert is_null.float().mean().item() == pytest.approx(0.4, abs=0.05)
    dropped.sum().backward()
    assert (embedder.null.grad is None) == fixed
    torch.testing.assert_close(embedder.eval()(y), own)
    nulls = embedder(y._replace(dropped=torch.ones(2000, dtype=torch.bool)))
    torch.testing.assert_close(nulls, null.expand_as(nulls))
    nothing = embedder(Text(y.states, torch.zeros_like(y.mask)))
    torch.testing.assert_close(nothing, nulls)


def test_a_model_with_text_takes_captions_only():
    x, t, y = inputs(VIDEO)
    for bad, message in ((y, "y is a Tensor"), (Text(torch.ones(3, 2, 6), torch.ones(3, 2).bool()), "y is a Text of")):
        with pytest.raises(ValueError, match=rf"{message}.*; it must be a Text of shape \(3, 1, 6\)"):
            DiT(TEXT)(x, t, bad)
    for change, message in (
        ({"positions": "product"}, "positions is 'product'"),
        ({"positions": "concatenation", "width": 72}, "positions is 'concatenation'; that is for video"),
        ({"num_classes": 3}, "text_width is 6 and num_classes 3; one must be 0"),
        ({"text_width": 0, "fixed_null": True}, "fixed_null is True; it goes with text"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TEXT, **change)


def test_forward_refuses():
    model = DiT(VIDEO)
    x, t, y = inputs(VIDEO)
    for bad in (x[:, :2], x[:, :, :2], x[0], x[..., :8]):
        with pytest.raises(ValueError, match="x has shape"):
            model(bad, t, y)
    for bad in (t[:2], t[:, None].expand(3, 4), t[0]):
        with pytest.raises(ValueError, match="t has shape"):
            model(x, bad, y)
    with pytest.raises(ValueError, match="y is None"):
        model(x, t)
    with pytest.raises(ValueError, match="y is of shape"):
        model(x, t, y[:2])
    with pytest.raises(ValueError, match="unconditional"):
        DiT(replace(VIDEO, num_classes=0))(x, t, y)
