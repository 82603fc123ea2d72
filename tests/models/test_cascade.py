"""denoisers/cascade.py against the stages written again on frames [B, C, H, W] with plain functions of torch."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from einops import rearrange, repeat

import minisora_kernels as mk
from minisora_kernels.testing import assert_as_accurate
from models.denoisers.cascade import Cascade
from models.denoisers.cascade_config import SIZES, CascadeConfig, CascadeSettings, with_time
from models.denoisers.cascade_layers import embed_r
from models.denoisers.text import Text
from models.objectives.logsnr import LogSNR
from models.protocols import Denoiser
from models.registry import SYSTEMS
from models.sampling.sampler import SampleRequest, sample

STAGE_C = CascadeConfig(
    input_size=(3, 5, 7),
    channels=4,
    num_classes=5,
    widths=(16, 32),
    heads=(2, 4),
    down=(1, 2),
    up=(2, 1),
    condition_width=12,
    condition_tokens=3,
    class_dropout=0.0,
    dropout=(0.0, 0.0),
    temporal_convolution=True,
)
STAGE_B = CascadeConfig(
    input_size=(2, 22, 18),
    channels=4,
    widths=(16, 24, 32),
    heads=(1, 3, 4),
    levels=("CT", "CTA", "CTAFV"),
    down=(1, 1, 2),
    up=(2, 1, 1),
    repeats=(1, 2, 1),
    dropout=(0.0, 0.0, 0.0),
    patch=(1, 2, 2),
    downsample=True,
    latent_channels=6,
    pixel_channels=3,
    latent_dropout=0.0,
    class_dropout=0.0,
)
CONFIGS = {
    "C": STAGE_C,
    "B": STAGE_B,
    "text": replace(STAGE_C, input_size=(3, 9, 8), num_classes=0, text_width=10, temporal_convolution=False),
    "image": replace(STAGE_C, input_size=(5, 7), patch=(1, 1), levels=("CTA", "CAFT"), temporal_convolution=False),
}

# With what published weights have besides.
PUBLISHED = {
    "published C": replace(
        CONFIGS["image"],
        num_classes=0,
        text_width=10,
        captions="both",
        null_tokens=4,
        image_width=6,
        further_times=("sca", "crp"),
    ),
    "published B": replace(STAGE_B, text_width=10, captions="pooled", null_tokens=4, further_times=("sca",)),
}

BATCHES = 12


def randomized(model, seed=0):
    """Weights that leave nothing at zero: a fresh model returns zero whatever its blocks do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 if parameter.dim() < 2 else 1.0 / math.sqrt(parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def inputs(config, dtype=torch.float32, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, frames = normal(batch, config.channels, *config.input_size), config.input_size[:-2]
    t = torch.tensor([3.0, 411.0, 990.0])[:batch]
    y, given = None, {}
    if config.num_classes:
        y = torch.tensor([0, 3, config.num_classes])[:batch]
    if config.text_width:
        y = Text(
            normal(batch, 4, config.text_width), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0] * 4]).bool()[:batch]
        )
    if config.image_width:
        given = {"image": normal(batch, 1, config.image_width)}
    if config.latent_channels:
        given = {"low": normal(batch, 6, *frames, 2, 3), "pixels": normal(batch, 3, *frames, 9, 4)}
    return x, t, y, given


def ln(x):
    """Over the channels of [N, C, H, W]."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6)


class Eager:
    """The stages on frames [(B T), C, H, W], with the parameters of a state dict."""

    def __init__(self, config, state):
        self.config, self.state = config, state
        self.frames = config.grid[0]

    def weights(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def pointwise(self, name, x):
        weight, bias = self.weights(name)
        return F.conv2d(x, weight[:, :, None, None], bias)

    def channelwise(self, name, x):
        x = F.gelu(self.pointwise(f"{name}.expand", x))
        response = x.square().sum((2, 3), keepdim=True).sqrt()
        share = response / (response.mean(1, keepdim=True) + 1e-6)
        gamma, beta = (self.state[f"{name}.grn_{part}"][:, None, None] for part in ("weight", "bias"))
        return self.pointwise(f"{name}.contract", gamma * (x * share) + beta + x)

    def heads(self, q, k, v, count, mask=None):
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=count) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        return rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)")

    def block(self, name, letter, heads, x, r, condition, skip):
        if letter == "C":
            weight, bias = self.weights(f"{name}.depthwise")
            y = F.conv2d(x, weight, bias, padding=1, groups=len(weight))
            if f"{name}.temporal" in self.state:
                kernel = rearrange(self.state[f"{name}.temporal"], "k c -> c 1 k")
                lines = rearrange(y, "(b t) c h w -> (b h w) c t", t=self.frames)
                lines = lines + F.conv1d(lines, kernel, padding=1, groups=len(weight))
                y = rearrange(lines, "(b h w) c t -> (b t) c h w", h=y.shape[2], w=y.shape[3])
            y = ln(y) if skip is None else torch.cat([ln(y), skip], 1)
            return x + self.channelwise(f"{name}.channelwise", y)
        if letter == "F":
            return x + self.channelwise(f"{name}.channelwise", ln(x))
        if letter == "T":
            a, b = F.linear(r, *self.weights(f"{name}.mapper")).chunk(2, -1)
            return x * (1 + a[..., None, None]) + b[..., None, None]
        width = x.shape[1]
        weight, bias = self.weights(f"{name}.qkv")
        projection = [(weight[i * width : (i + 1) * width], bias[i * width : (i + 1) * width]) for i in range(3)]
        if letter == "A":
            queries = rearrange(ln(x), "b c h w -> b (h w) c")
            keys, mask = queries, None
            if condition is not None:
                tokens, mask = condition
                mapped = F.linear(F.silu(tokens), *self.weights(f"{name}.condition"))
                keys = torch.cat([queries, mapped], 1)
                mask = torch.cat([torch.ones(queries.shape[:2], dtype=torch.bool), mask], 1)
            q, k, v = (F.linear(part, *p) for part, p in zip((queries, keys, keys), projection, strict=True))
            out = F.linear(self.heads(q, k, v, heads, mask), *self.weights(f"{name}.proj"))
            return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])
        tokens = rearrange(ln(x), "(b t) c h w -> (b h w) t c", t=self.frames)
        q, k, v = (F.linear(tokens, *p) for p in projection)
        q, k = (rearrange(turn(rearrange(p, "b t (h d) -> b t h d", h=heads)), "b t h d -> b t (h d)") for p in (q, k))
        out = F.linear(self.heads(q, k, v, heads), *self.weights(f"{name}.proj"))
        return x + rearrange(out, "(b h w) t c -> (b t) c h w", h=x.shape[2], w=x.shape[3])

    def level(self, name, i, groups, repeats, x, *arguments, skip=None):
        for n in range(repeats):
            x = self.pointwise(f"{name}.between.{n - 1}", x) if n else x
            for j in range(groups):
                for letter in self.config.levels[i]:
                    block = f"{name}.groups.{j}.{letter}"
                    x = self.block(block, letter, self.config.heads[i], x, *arguments, None if j else skip)
        return x

    def mapped(self, name, x):
        return ln(self.pointwise(f"{name}.2", F.gelu(self.pointwise(f"{name}.0", x))))

    def __call__(self, x, t, y, low=None, pixels=None):
        config, video = self.config, x.dim() == 5
        x = rearrange(x, "b c t h w -> (b t) c h w") if video else x
        weight, bias = self.weights("embedding")
        side = config.patch[-1]
        x = ln(F.conv2d(F.pixel_unshuffle(x, side), rearrange(weight, "d ... -> d (...) 1 1"), bias))
        if low is not None:
            low, pixels = (rearrange(part, "b c t h w -> (b t) c h w") for part in (low, pixels))
            resize = {"size": x.shape[2:], "mode": "bilinear", "align_corners": True}
            x = x + self.mapped("latent_mapper", F.interpolate(low, **resize))
            x = x + F.interpolate(self.mapped("pixel_mapper", pixels), **resize)
        # From the module itself: angles of up to 10^4 radians are not the same in another order of products.
        r = repeat(embed_r(t / 1000), "b c -> (b t) c", t=self.frames).to(x.dtype)
        condition = None
        if isinstance(y, Text):
            tokens = F.linear(y.states, *self.weights("text_mapper"))
            condition = (F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6), y.mask)
        elif y is not None:
            tokens = rearrange(self.state["class_embedding.weight"][y], "b (l c) -> b l c", l=config.condition_tokens)
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
            condition = (tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
        if condition is not None:
            condition = tuple(part.repeat_interleave(self.frames, 0) for part in condition)

        outputs, last = [], len(config.widths) - 1
        for i in range(last + 1):
            if i:
                weight, bias = self.weights(f"down_resample.{i - 1}.linear")
                k = 2 if config.downsample else 1
                x = F.conv2d(ln(x), rearrange(weight, "o (p q c) -> o c p q", p=k, q=k), bias, stride=k)
            x = self.level(f"down.{i}", i, config.down[i], 1, x, r, condition)
            outputs.append(x)
        for n, i in enumerate(range(last, -1, -1)):
            skip = None
            if n:
                skip = outputs[i]
                name = f"up_resample.{n - 1}"
                if config.downsample:
                    weight = rearrange(self.state[f"{name}.linear.weight"], "(p q o) c -> c o p q", p=2, q=2)
                    x = F.conv_transpose2d(ln(x), weight, self.state[f"{name}.bias"], stride=2)
                else:
                    x = self.pointwise(f"{name}.linear", ln(x))
                x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=True)
            x = self.level(f"up.{n}", i, config.up[n], config.repeats[n], x, r, condition, skip=skip)
        x = rearrange(self.pointwise("output", ln(x)), "b (p q c) h w -> b c (h p) (w q)", p=side, q=side)
        return rearrange(x, "(b t) c h w -> b c t h w", t=self.frames) if video else x


def turn(x):
    """Rotary embedding of [B, T, heads, head_dim] by the frame; channels 2i and 2i + 1 are a pair."""
    angles = torch.arange(x.shape[1])[:, None] * 10_000.0 ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    cos, sin = (part.float().to(x.dtype)[:, None] for part in (angles.cos(), angles.sin()))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def gradients(out, tensors):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out)
    return dict(zip(tensors, torch.autograd.grad((out * weights).sum(), tensors.values()), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_stages_written_again(name):
    model = randomized(Cascade(CONFIGS[name])).double().train()
    x, t, y, given = inputs(CONFIGS[name], torch.float64)
    x.requires_grad_()
    tensors = {"x": x, **dict(model.named_parameters())}
    with mk.use_backend("reference"):
        got = model(x, t, y, **given)
    expected = Eager(model.config, dict(model.named_parameters()))(x, t, y, **given)
    assert got.shape == expected.shape == x.shape and got.is_contiguous() and expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    wanted = gradients(expected, tensors)
    for parameter, gradient in gradients(got, tensors).items():
        scale = wanted[parameter].abs().max()
        assert scale > 0, parameter
        assert (gradient - wanted[parameter]).abs().max() <= 1e-9 * scale, parameter


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_on_the_kernels(name, dtype, backend, nan_filled):
    torch.manual_seed(1)
    model = Cascade(CONFIGS[name]).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.count_nonzero() == 0:
                parameter.normal_(std=0.1)
    model.to(DEVICE, dtype)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    rounded = dtype

    def run(model, dtype):
        """Of several batches, stacked: the rounding error of a single large element is a matter of chance."""
        results = []
        for seed in range(BATCHES):
            x, t, y, given = inputs(CONFIGS[name], rounded, seed=seed)
            x, t = x.to(DEVICE, dtype).requires_grad_(), t.to(DEVICE)
            if isinstance(y, Text):
                y = Text(y.states.to(DEVICE, dtype), y.mask.to(DEVICE))
            elif y is not None:
                y = y.to(DEVICE)
            out = model(x, t, y, **{key: value.to(DEVICE, dtype) for key, value in given.items()})
            results.append({"output": out.detach(), **gradients(out, {"x": x, **dict(model.named_parameters())})})
        return {key: torch.stack([result[key] for result in results]) for key in results[0]}

    seen = Seen()
    with seen, mk.use_backend(backend):
        kernel = run(model, dtype)
    expected = {"grn", "patch_embed", "unpatchify"} | ({"window_attention"} if name != "image" else set())
    assert {call.removesuffix("_bwd") for call in seen.names() if call.endswith("_bwd")} == expected
    with mk.use_backend("reference"):
        reference, truth = run(plain, dtype), run(exact, torch.float64)
    for result in kernel:
        assert_as_accurate(f"{name} {result}", kernel[result], reference[result], truth[result])


def test_r_embedding():
    r = torch.tensor([0.0, 0.25, 1.0])
    ours = embed_r(r)
    assert ours.shape == (3, 64) and ours.dtype == torch.float32
    for row, value in zip(ours.tolist(), r.tolist(), strict=True):
        angles = [10_000 * value * 10_000 ** (-i / 31) for i in range(32)]
        assert row == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=2e-3)


@pytest.mark.parametrize(
    ("size", "published", "channels", "cells"),
    [("c-3.6b", 3.6e9, 16, 24), ("c-1b", 1.0e9, 16, 24), ("b-1.5b", 1.5e9, 4, 256), ("b-700m", 0.7e9, 4, 256)],
)
def test_sizes_have_the_published_parameter_counts(size, published, channels, cells):
    """All parameters of the image model with a caption's tokens of 1280 channels as its condition, as published.

    Without the pooled text and image embeddings' projections, at most 20 million.
    """
    with torch.device("meta"):
        model = Cascade(CascadeConfig(**SIZES[size], input_size=(cells, cells), channels=channels, text_width=1280))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.05)


def test_systems():
    assert {name for name in SYSTEMS if name.startswith(("cascade-b", "cascade-c"))} == {
        f"cascade-{size}{kind}" for size in SIZES for kind in ("", "/video")
    }
    video = SYSTEMS["cascade-b-700m/video"].settings
    assert video.levels == ("CT", "CT", "CTAV", "CTAV") and video.patch == (1, 2, 2)
    assert with_time(SYSTEMS["cascade-c-1b"].settings) == SYSTEMS["cascade-c-1b/video"].settings
    assert SYSTEMS["cascade-c-1b"].objective == LogSNR(sample_shift=2.0)
    assert SYSTEMS["cascade-b-tiny"].objective == LogSNR(noise="pyramid")


def test_initial_weights():
    torch.manual_seed(0)
    config = replace(STAGE_C, widths=(64, 128), condition_width=64)
    model = Cascade(config)
    x, t, y, _ = inputs(config)
    assert model(x, t, y).count_nonzero() == 0
    state = model.state_dict()
    for name, value in state.items():
        if any(part in name for part in ("bias", "grn", "temporal", "T.mapper", "V.proj", "output")):
            assert value.count_nonzero() == 0, name
    # Linear(64 -> 256) on the way down, and the last of a residual branch: Xavier's times sqrt(1 / 3) for 3 groups.
    expand, contract = (state[f"down.0.groups.0.C.channelwise.{part}.weight"] for part in ("expand", "contract"))
    bound = math.sqrt(6 / (64 + 256))
    assert 0.98 * bound < expand.abs().max() <= bound
    assert 0.98 * bound / math.sqrt(3) < contract.abs().max() <= bound / math.sqrt(3)
    assert state["class_embedding.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_a_frame_sees_no_other_without_v():
    """GRN, norms and attention are of one frame: what V and the temporal convolution add is all that passes between."""
    plain = replace(STAGE_C, levels=("CTAF", "CTAF"), temporal_convolution=False)
    attention = replace(plain, levels=("CTA", "CTAV"))
    for changed, config in ((False, plain), (True, STAGE_C), (True, attention)):
        model = randomized(Cascade(config))
        x, t, y, _ = inputs(config)
        before = model(x, t, y)
        x[:, :, 1] += 1
        after = model(x, t, y)
        for frame in (0, 2):
            assert torch.equal(before[:, :, frame], after[:, :, frame]) != changed
        assert not torch.equal(before[:, :, 1], after[:, :, 1])


def test_v_knows_the_order_of_frames():
    model = randomized(Cascade(replace(STAGE_C, temporal_convolution=False))).double()
    x, t, y, _ = inputs(STAGE_C, torch.float64)
    assert not torch.allclose(model(x, t, y).flip(2), model(x.flip(2), t, y), atol=1e-3)


@pytest.mark.parametrize("name", ["C", "B"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(name, dropout):
    config = replace(CONFIGS[name], dropout=(dropout,) * len(CONFIGS[name].widths))
    model = randomized(Cascade(config)).train()
    x, t, y, given = inputs(config)

    def run():
        torch.manual_seed(3)
        out = model(x, t, y, **given)
        return out.detach(), gradients(out, dict(model.named_parameters()))

    plain, calls = run(), []
    model.checkpointing = True
    model.down[0].groups[0]["C"].register_forward_pre_hook(lambda *_: calls.append(1))
    again = run()
    assert len(calls) == 2 and torch.equal(plain[0], again[0])
    for parameter in plain[1]:
        assert torch.equal(plain[1][parameter], again[1][parameter]), parameter


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    levels = {"widths": (8, 16), "heads": (1, 2), "levels": ("CT", "CTAFV"), "dropout": (0.0, 0.0)}
    counts = {"down": (1, 1), "up": (1, 1), "repeats": (2, 1)}
    config = replace(STAGE_B, **levels, **counts, num_classes=5, temporal_convolution=True)
    model = randomized(Cascade(config))
    x, t, y, given = inputs(config)
    expected = gradients(model(x, t, y, **given), dict(model.named_parameters()))
    torch.compiler.reset()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y, **given)
    for parameter, gradient in gradients(out, dict(model.named_parameters())).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-3)


def test_autocast_keeps_an_fp32_residual_stream():
    model = randomized(Cascade(STAGE_C))
    x, t, y, _ = inputs(STAGE_C)
    exact, seen = model(x, t, y), []
    groups = [group for level in (*model.down, *model.up) for group in level.groups]
    for block in (block for group in groups for block in group.values()):
        block.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert len(seen) >= sum(map(len, groups)) > 4 and set(seen) == {torch.float32}
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dropped_conditions_are_null_conditions():
    config = replace(STAGE_C, class_dropout=1.0)
    model = randomized(Cascade(config))
    x, t, y, _ = inputs(config)
    null = torch.full_like(y, model.null_class)
    assert torch.equal(model.train()(x, t, y), model(x, t, null))
    assert not torch.equal(model.eval()(x, t, y), model(x, t, null))

    config = replace(CONFIGS["text"], class_dropout=1.0)
    model = randomized(Cascade(config))
    x, t, y, _ = inputs(config)
    empty = Text(y.states, torch.zeros_like(y.mask))
    assert torch.equal(model.train()(x, t, y), model(x, t, empty))
    assert not torch.equal(model.eval()(x, t, y), model(x, t, empty))

    config = replace(STAGE_B, latent_dropout=1.0)
    model = randomized(Cascade(config))
    x, t, y, given = inputs(config)
    zero = torch.zeros_like(given["low"])
    assert torch.equal(model.train()(x, t, y, **given), model(x, t, y, low=zero, pixels=given["pixels"]))
    assert not torch.equal(model.eval()(x, t, y, **given), model(x, t, y, low=zero, pixels=given["pixels"]))


def test_padding_of_a_caption_has_no_influence():
    model = randomized(Cascade(CONFIGS["text"]))
    x, t, y, _ = inputs(CONFIGS["text"])
    before = model(x, t, y)
    padding = torch.where(y.mask[..., None], y.states, 100.0)
    assert torch.equal(model(x, t, Text(padding, y.mask)), before)
    longer = Text(F.pad(y.states, (0, 0, 0, 3)), F.pad(y.mask, (0, 3)))
    torch.testing.assert_close(model(x, t, longer), before)
    # The last caption has no token: its states are all padding, and the frames attend to themselves.
    assert not torch.equal(model(x, t, Text(y.states + y.mask[..., None], y.mask))[:2], before[:2])


def test_a_model_of_classes_and_captions_takes_either():
    config = replace(STAGE_C, text_width=10)
    model = randomized(Cascade(config))
    x, t, _, _ = inputs(STAGE_C)
    classes, text = inputs(STAGE_C)[2], inputs(CONFIGS["text"])[2]
    assert not torch.equal(model(x, t, classes), model(x, t, text))
    # Of the caption without a token and no class nothing is known in common: the null class has its own tokens.
    assert not torch.equal(model(x, t, classes)[2], model(x, t, text)[2])


def test_no_latents_are_zeros_of_any_size():
    model = randomized(Cascade(STAGE_B)).double()
    x, t, y, given = inputs(STAGE_B, torch.float64)
    zeros = {name: torch.zeros_like(value) for name, value in given.items()}
    torch.testing.assert_close(model(x, t, y), model(x, t, y, **zeros))
    assert not torch.allclose(model(x, t, y), model(x, t, y, low=given["low"]))
    assert not torch.allclose(model(x, t, y), model(x, t, y, pixels=given["pixels"]))
    constant = torch.full((3, 6, 2, 1, 1), 0.3).double()
    torch.testing.assert_close(model(x, t, y, low=constant), model(x, t, y, low=constant.expand(-1, -1, -1, 4, 9)))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_stage_b_trains_and_samples_under_its_condition(guidance):
    config = replace(STAGE_B, num_classes=5)
    model = randomized(Cascade(config)).double()
    x, _, _, given = inputs(config, torch.float64)
    y = torch.tensor([0, 3, 4])
    seed = torch.Generator
    loss = LogSNR().loss(lambda x, t, y: model(x, t, y, **given), x, y, seed().manual_seed(0))
    loss.backward()
    # Of small clips alone, the objective tells the model.
    told = LogSNR().loss(model, x, y, seed().manual_seed(0), low=given["low"])
    assert torch.equal(told, LogSNR().loss(lambda *a: model(*a, low=given["low"]), x, y, seed().manual_seed(0)))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())

    def first_step(model, **conditions):
        request = SampleRequest(noise=x, y=y, solver="ddim", steps=1, guidance=guidance, conditions=conditions)
        return sample(model, LogSNR(), request)

    class Doubled(Denoiser):
        null_class = 5

        def forward(self, x, t, y):
            parts = [model(x[:3], t[:3], y[:3], **given)]
            if len(x) == 6:
                assert y[3:].tolist() == [5, 5, 5]
                parts.append(model(x[3:], t[3:], y[3:], low=None, pixels=given["pixels"]))
            return torch.cat(parts)

    torch.testing.assert_close(first_step(model, **given), first_step(Doubled()))


def test_attributes():
    model = Cascade(STAGE_B)
    assert (model.out_channels, model.null_class, model.checkpointing, model.tokens_per_sample) == (4, None, False, 198)
    assert Cascade(STAGE_C).null_class == 5
    assert model.config.grids == [(2, 11, 9), (2, 5, 4), (2, 2, 2)]


def test_config_survives_json():
    for config in (*CONFIGS.values(), *PUBLISHED.values()):
        assert CascadeConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": (8,)}, "input_size"),
        ({"patch": (1, 1)}, "patch"),
        ({"patch": (3, 1, 1)}, "patch"),
        ({"patch": (1, 2, 2)}, "patch"),
        ({"widths": ()}, "widths"),
        ({"widths": (16, 0)}, "widths"),
        ({"widths": (16, 30)}, "widths"),
        ({"widths": (16, 20)}, "widths"),
        ({"heads": (2,)}, "heads"),
        ({"levels": ("CTA",)}, "levels"),
        ({"levels": ("TCA", "C")}, "levels"),
        ({"levels": ("CTAA", "C")}, "levels"),
        ({"levels": ("CTX", "C")}, "levels"),
        ({"levels": ("C", "")}, "levels"),
        ({"down": (1, 0)}, "down"),
        ({"up": (1,)}, "up"),
        ({"repeats": (0, 1)}, "repeats"),
        ({"downsample": True, "input_size": (3, 1, 7)}, "downsample"),
        ({"input_size": (5, 7), "patch": (1, 1)}, "patch"),
        ({"channels": 0}, "channels"),
        ({"condition_tokens": 0}, "condition_tokens"),
        ({"num_classes": -1}, "num_classes"),
        ({"latent_channels": -1}, "latent_channels"),
        ({"class_dropout": 1.5}, "class_dropout"),
        ({"dropout": (0.0, -0.1)}, "dropout"),
        ({"captions": "all"}, "captions"),
        ({"null_tokens": 3}, "null_tokens"),
        ({"image_width": 3}, "image_width"),
        ({"further_times": ("sca", "sca")}, "further_times"),
    ],
)
def test_config_refuses(change, word):
    with pytest.raises(ValueError, match=f"^{word} is"):
        replace(STAGE_C, **change)


def test_forward_refuses():
    model = Cascade(STAGE_C)
    x, t, y, _ = inputs(STAGE_C)
    text = inputs(CONFIGS["text"])[2]
    for arguments, message in (
        ((x[:, :2], t, y), "x has shape"),
        ((x[..., :2], t, y), "x has shape"),
        ((x, t[:2], y), "t has shape"),
        ((x, t, None), "y is None"),
        ((x, t, y[:2]), "y is of shape"),
        ((x, t, text), "y is a Text, but the model has text_width = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="low was given to a model whose latent_channels is 0"):
        model(x, t, y, low=x)
    x = inputs(CONFIGS["text"])[0]
    with pytest.raises(ValueError, match="num_classes = 0"):
        Cascade(CONFIGS["text"])(x, t, y)
    with pytest.raises(ValueError, match=r"they must be \[3, L, 10\]"):
        Cascade(CONFIGS["text"])(x, t, Text(text.states[..., :9], text.mask))
    x, t, y, given = inputs(STAGE_B)
    with pytest.raises(ValueError, match=r"low has shape .* it must be \[3, 6, 2, h, w\]"):
        Cascade(STAGE_B)(x, t, y, low=given["low"][:, :, :1])


def test_settings_without_changes_make_a_model():
    config = CascadeConfig(**asdict(CascadeSettings()), input_size=(4, 6, 6), channels=3)
    assert Cascade(config)(torch.zeros(1, 3, 4, 6, 6), torch.zeros(1)).shape == (1, 3, 4, 6, 6)
