"""walt.py against its equations written again with dense masks, and what its conditions may and may not do."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from torch import nn

import minisora_kernels as mk
from minisora_kernels.testing import assert_as_accurate
from models.autoencoders.tokenizer import TokenizerSettings
from models.checkpoint import load
from models.data.batches import Batches
from models.data.config import DataConfig, TextConfig
from models.data.open import open_source
from models.denoisers.dit import SIZES, DiTSettings
from models.denoisers.layers import TimestepEmbedder
from models.denoisers.text import Text
from models.denoisers.walt import WALT, augment
from models.denoisers.walt_config import WALTConfig, WALTSettings
from models.denoisers.walt_layers import relative_places
from models.denoisers.walt_resize import resize
from models.objectives.ddpm import DDPM
from models.objectives.flow import FlowMatching
from models.objectives.logsnr import LogSNR
from models.objectives.reconstruction import Reconstruction
from models.precompute import PrecomputeConfig
from models.protocols import Denoiser
from models.registry import SYSTEMS, build, config_from
from models.sampling.clips import ClipRequest, sample_clips
from models.sampling.sampler import SampleRequest, sample
from models.train import parse
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig
from models.training.run import train
from models.training.trainer import Trainer

# Windows that divide no axis of the grid but the frames: corners, edges and the middle are all there.
CLASSES = WALTConfig(
    input_size=(5, 9, 7),
    channels=3,
    num_classes=5,
    width=16,
    depth=3,
    heads=2,
    spatial_window=(4, 4),
    spatiotemporal_window=(5, 3, 3),
    class_dropout=0.0,
    past=0.5,
)
TEXT = replace(CLASSES, num_classes=0, text_width=6, cross_attention="spatial", past=0.0, self_conditioning=0.0)
CASES = {
    "classes": (CLASSES, 0),
    "images": (CLASSES, 2),
    "short windows": (replace(CLASSES, spatiotemporal_window=(2, 3, 4), lora_rank=3), 1),
    "images at half the size": (
        replace(CLASSES, input_size=(3, 8, 6), patch=(1, 2, 1), low_resolution=True),
        2,
    ),
    "super-resolution": (replace(CLASSES, input_size=(3, 8, 6), patch=(1, 2, 1), low_resolution=True, past=0.0), 0),
    "text": (replace(TEXT, cross_attention="all", past=0.5, spatiotemporal_window=(2, 3, 3)), 0),
    "text of images": (TEXT, 2),
}
ALPHA_BARS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
OPS = {"adaln", "gate_residual_adaln", "gelu_mlp", "patch_embed", "unpatchify", "window_attention"}


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomized(config):
    """In training mode, with random weights everywhere: on a fresh model only the last Linear has a gradient."""
    torch.manual_seed(0)
    model = WALT(config).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.4)
    return model


def inputs(config, images=0, batch=2, dtype=torch.float64, draw=0):
    """x, t, y and all else that the model takes; with images each has a timestep and a condition of its own."""
    (frames, *space), seed = config.input_size, 10 * draw
    size = (frames + images, *space)
    x = random(batch, config.channels, *size, seed=seed + 1, dtype=dtype)
    rows = (batch, 1 + images) if images else (batch,)
    generator = torch.Generator().manual_seed(seed + 2)
    t, y = torch.rand(rows, generator=generator) * 1000, None
    if config.num_classes:
        y = torch.randint(config.num_classes + 1, rows, generator=generator)
    if config.text_width:
        mask = torch.rand((*rows, 4), generator=generator) < 0.6
        y = Text(random(*rows, 4, config.text_width, seed=seed + 3, dtype=dtype), mask)
    given = {}
    if config.self_conditioning:
        given["previous"] = random(*x.shape, seed=seed + 4, dtype=dtype)
    if config.past:
        given["past"] = random(batch, config.channels, 2, *size[1:], seed=seed + 5, dtype=dtype)
        given["past_frames"] = torch.tensor([1, 2, 0, 2])[:batch]
    if config.low_resolution:
        small = (size[0], size[1] // 2, size[2] // 2)
        given["low"] = random(batch, config.channels, *small, seed=seed + 6, dtype=dtype)
        given["low_t"] = torch.tensor([120.0, 7.0, 0.0])[:batch]
    return x, t, y, given


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-6)


def literal(model, x, t, y, *, previous=None, past=None, past_frames=None, low=None, low_t=None):
    """The equations, token by token where the model has windows, frame by frame where it has rows of conditions."""
    config = model.config
    w = dict(model.named_parameters())
    batch, gt = len(x), x.shape[2]
    first_image, gh, gw = config.grid
    images = gt - first_image
    d, heads = config.width, config.heads

    parts = [x]
    if config.self_conditioning:
        parts.append(previous)
    if config.low_resolution:
        channels = []
        for f in range(gt):
            big = F.conv2d(low[:, :, f], w["upsampler.proj.weight"], w["upsampler.proj.bias"], padding=1)
            out = x.new_zeros(batch, config.channels, *config.input_size[1:])
            for c in range(config.channels):
                for i in range(2):
                    for j in range(2):
                        out[:, c, i::2, j::2] = big[:, 4 * c + 2 * i + j]
            channels.append(out)
        parts.append(torch.stack(channels, 2))
    if config.past:
        known, mask = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for b in range(batch):
            for f in range(int(past_frames[b])):
                known[b, :, f], mask[b, :, f] = past[b, :, f], 1
        parts += [known, mask]
    tokens = F.conv3d(torch.cat(parts, 1), w["x_embedder.weight"], w["x_embedder.bias"], config.patch)
    places = [(f, r, c) for f in range(gt) for r in range(gh) for c in range(gw)]
    tokens = tokens.flatten(2).transpose(1, 2)
    position = [w["pos_space"][r, c] + w["pos_time"][f if f < first_image else 0] for f, r, c in places]
    tokens = tokens + torch.stack(position)

    def of_frame(f):
        """Which row of t and y is frame f's."""
        return max(f - first_image + 1, 0)

    def embedded(mlp, t):
        return mlp(TimestepEmbedder.sinusoid(t).to(x.dtype))

    c = []
    for f in range(gt):
        pick = (lambda v, f=f: v[:, of_frame(f)]) if images else (lambda v: v)
        own = embedded(model.t_embedder.mlp, pick(t))
        if config.num_classes:
            own = own + w["y_embedder.weight"][pick(y)]
        if config.low_resolution:
            own = own + embedded(model.low_t_embedder.mlp, low_t)
        c.append(own)
    c = torch.stack(c, 1).repeat_interleave(gh * gw, 1)  # a row for each token

    def attend(layer, qkv, extra_k=None, extra_v=None, extra_mask=None, q_weight=None, k_weight=None, table=None):
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = norm(q) * q_weight, norm(k) * k_weight
        window = config.window(layer)
        cell = [(f // window[0], r // window[1], s // window[2]) for f, r, s in places]
        same = torch.tensor([[a == b for b in cell] for a in cell])
        if layer % 2:
            for i, (f, _, _) in enumerate(places):
                if f >= first_image:
                    same[i], same[:, i] = False, False
                    same[i, i] = True
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
        if table is not None:
            spans = [2 * n - 1 for n in window]
            offset = torch.tensor([[[p - o for p, o in zip(a, b, strict=True)] for b in places] for a in places])
            offset = torch.minimum(
                torch.maximum(offset, 1 - torch.tensor(window)), torch.tensor(window) - 1
            ) + torch.tensor(window)
            offset = offset - 1
            index = (offset[..., 0] * spans[1] + offset[..., 1]) * spans[2] + offset[..., 2]
            scores = scores + table[:, index]
        scores = scores.masked_fill(~same, -math.inf)
        if extra_k is not None:
            extra = (q[..., None, :] * (norm(extra_k) * k_weight)).sum(-1) / math.sqrt(d // heads)
            scores = torch.cat((scores, extra.masked_fill(~extra_mask[:, None], -math.inf)), -1)
        p = scores.softmax(-1)
        out = p[..., : len(places)] @ v
        if extra_k is not None:
            out = out + (p[..., len(places) :, None] * extra_v).sum(-2)
        return out.transpose(1, 2).flatten(2)

    first = F.linear(F.silu(c), w["adaLN_modulation.1.weight"], w["adaLN_modulation.1.bias"])
    for i, block in enumerate(model.blocks):
        rows = first
        if i:
            rows = rows + c @ w["lora_down"][i - 1].t() @ w["lora_up"][i - 1].t()
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, -1)
        own = block.attn
        weights = {"q_weight": own.q_norm.weight, "k_weight": own.k_norm.weight, "table": own.bias_table}
        tokens = tokens + gate1 * own.proj(attend(i, own.qkv(norm(tokens) * (1 + scale1) + shift1), **weights))
        if block.cross is not None:
            own = block.cross
            rows_of = [of_frame(f) for f, _, _ in places]
            states = model.text_embedder(y.states if images else y.states[:, None])[:, rows_of]  # [B, N, L, D]
            text = F.linear(states, own.qkv.weight[d:], own.qkv.bias[d:]).unflatten(-1, (2, heads, -1))
            text_k, text_v = text.permute(3, 0, 4, 1, 2, 5)  # [B, heads, N, L, head_dim]
            mask = (y.mask if images else y.mask[:, None])[:, rows_of]
            weights = {"q_weight": own.q_norm.weight, "k_weight": own.k_norm.weight}
            normed = norm(tokens) * own.norm.weight + own.norm.bias
            tokens = tokens + own.proj(attend(i, own.qkv(normed), text_k, text_v, mask, **weights))
        hidden = block.mlp.fc1(norm(tokens) * (1 + scale2) + shift2)
        tokens = tokens + gate2 * block.mlp.fc2(F.gelu(hidden, approximate="tanh"))
    last = F.linear(F.silu(c), w["final_layer.adaLN_modulation.1.weight"], w["final_layer.adaLN_modulation.1.bias"])
    shift, scale = last.chunk(2, -1)
    out = model.final_layer.linear(norm(tokens) * (1 + scale) + shift)
    _, ph, pw = config.patch
    out = out.view(batch, gt, gh, gw, ph, pw, config.channels)
    return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)


def run(model, function, x, t, y, given, gradient):
    x = x.detach().clone().requires_grad_()
    out = function(x, t, y, **given)
    out.backward(gradient.to(out))
    results = {"output": out.detach(), "gradient of x": x.grad}
    for name, parameter in model.named_parameters():
        results[f"gradient of {name}"] = parameter.grad
        parameter.grad = None
    return results


@pytest.mark.parametrize("name", CASES)
def test_matches_the_equations_in_float64(name):
    config, images = CASES[name]
    model = randomized(config).double()
    x, *others = inputs(config, images)
    arguments = (x, *others, random(*x.shape, seed=9))
    expected = run(model, lambda *a, **k: literal(model, *a, **k), *arguments)
    with mk.use_backend("reference"):
        got = run(model, model, *arguments)
    assert expected["output"].abs().max() > 0.1
    for result, value in expected.items():
        scale = value.abs().max()
        assert scale > 0, result
        assert (got[result] - value).abs().max() <= 1e-9 * scale, result


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("classes", False), ("images", True), ("short windows", False), ("text", True)]
)
def test_every_parameter_in_training_mode(name, checkpointing, dtype, backend, nan_filled):
    """Over several draws of the inputs: the error of a gradient of 8 numbers is a matter of luck on one of them."""
    config, images = CASES[name]
    torch.manual_seed(0)
    model = WALT(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(DEVICE, dtype).checkpointing = checkpointing
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    def moved(value, dtype_of_run):
        if isinstance(value, Text):
            return Text(*(moved(part, dtype_of_run) for part in value))
        if torch.is_tensor(value):
            return value.to(DEVICE, dtype_of_run if value.dtype == dtype else value.dtype)
        return value

    def results(model, dtype_of_run):
        draws = []
        for draw in range(8):
            x, t, y, given = inputs(config, images, dtype=dtype, draw=draw)
            gradient = random(*x.shape, seed=10 * draw + 9, dtype=dtype)
            x, y, gradient = (moved(value, dtype_of_run) for value in (x, y, gradient))
            given = {key: moved(value, dtype_of_run) for key, value in given.items()}
            draws.append(run(model, model, x, t.to(DEVICE), y, given, gradient))
        return {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}

    seen = Seen()
    with seen, mk.use_backend(backend):
        kernel = results(model, dtype)
    ops = OPS | {"gate_residual"} if config.text_width else OPS
    assert {call.removesuffix("_fwd") for call in seen.names() if call.endswith("_fwd")} == ops
    assert {call.removesuffix("_bwd") for call in seen.names() if call.endswith("_bwd")} == ops
    with mk.use_backend("reference"):
        reference, truth = results(plain, dtype), results(exact, torch.float64)
    for result in kernel:
        assert truth[result].abs().max() > 0, result
        assert_as_accurate(f"{name} {result}", kernel[result], reference[result], truth[result])


def test_relative_places():
    window = (2, 3, 4)
    places = relative_places(window)
    cells = [(a, b, c) for a in range(2) for b in range(3) for c in range(4)]
    row_of = {}
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            offset = tuple(p - q for p, q in zip(query, key, strict=True))
            assert row_of.setdefault(offset, int(places[i, j])) == places[i, j]
    assert sorted(row_of.values()) == list(range(3 * 5 * 7))
    assert places[0, 0] == 3 * 5 * 7 // 2


@pytest.mark.parametrize(("size", "millions"), [("L", 313), ("XL", 460)])
def test_sizes_have_the_published_parameter_counts(size, millions):
    # All parameters of the class-conditional model on UCF-101: 5 x 16 x 16 latents of 8 channels, 101 classes.
    settings = SYSTEMS[f"walt-{size.lower()}"].settings
    with torch.device("meta"):
        model = WALT(WALTConfig(**asdict(settings), input_size=(5, 16, 16), channels=8, num_classes=101))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    assert (settings.lora_rank, settings.self_conditioning, settings.patch) == (2, 0.9, (1, 1, 1))
    assert [model.config.window(layer) for layer in (0, 1, 2)] == [(1, 16, 16), (5, 8, 8), (1, 16, 16)]


def test_text_stages_have_the_published_parameter_counts():
    # The text-to-video stages of 1.3 B and 419 M, with T5-XL's states: text sees every layer, in the model's width.
    for shape, patch, size, millions in (
        ({"width": 1408, "depth": 40, "heads": 16}, 2, (5, 32, 56), 1300),
        (SIZES["L"], 4, (5, 64, 112), 419),
    ):
        config = WALTConfig(
            **shape,
            patch=(1, patch, patch),
            spatial_window=(16, 28),
            spatiotemporal_window=(5, 8, 14),
            input_size=size,
            channels=8,
            text_width=2048,
            low_resolution=True,
        )
        with torch.device("meta"):
            model = WALT(config)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def test_a_fresh_model_is_adaln_zero_with_one_modulation():
    config = replace(CLASSES, text_width=6, num_classes=0)
    model = WALT(config)
    x, t, y, given = inputs(config, dtype=torch.float32)
    out = model(x, t, y, **given)
    assert out.shape == x.shape and out.count_nonzero() == 0
    out.sum().backward()
    alive = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
    assert alive == {"final_layer.linear.bias", "final_layer.linear.weight"}
    assert model.lora_up.count_nonzero() == 0 and model.lora_down.count_nonzero() == model.lora_down.numel()
    # Whatever A_1 becomes, every layer has it until B leaves zero.
    nn.init.normal_(model.adaLN_modulation[1].weight)
    layers, _ = model._modulations(model._condition(t, y, None, 2, 0), None)
    assert len(layers) == config.depth
    for layer in layers[1:]:
        assert all(torch.equal(one, other) for one, other in zip(layers[0], layer, strict=True))
    nn.init.normal_(model.lora_up)
    layers, _ = model._modulations(model._condition(t, y, None, 2, 0), None)
    assert not any(torch.equal(one, other) for one, other in zip(*layers[1:], strict=True))


def test_unknown_past_frames_are_no_past():
    model = randomized(replace(CLASSES, self_conditioning=0.0))
    x, t, y, given = inputs(model.config, dtype=torch.float32)
    past = given["past"]
    without = model(x, t, y)
    assert torch.equal(model(x, t, y, past=past, past_frames=torch.tensor([0, 0])), without)
    one, two = (model(x, t, y, past=past, past_frames=torch.full((2,), k)) for k in (1, 2))
    assert not torch.equal(one, without) and not torch.equal(one, two)
    torch.testing.assert_close(model(x, t, y, past=past[:, :, :1]), one)
    assert torch.equal(model(x, t, y, past=past), two)
    # A frame that is not known says nothing; whether it is known is each sample's own affair.
    other = past.clone()
    other[:, :, 1] += 1
    assert torch.equal(model(x, t, y, past=other, past_frames=torch.tensor([1, 1])), one)
    mixed = model(x, t, y, past=past, past_frames=torch.tensor([0, 2]))
    torch.testing.assert_close(mixed, torch.stack((without[0], two[1])))


def changed_frames(before, after):
    return (before != after).flatten(3).any(-1).any(1).tolist()


def test_images_see_neither_each_other_nor_the_video():
    model = randomized(replace(CLASSES, past=0.0, self_conditioning=0.0))
    x, t, y, given = inputs(model.config, 2, dtype=torch.float32)
    before = model(x, t, y, **given)
    for frame, expected in (
        (0, [True] * 5 + [False, False]),
        (5, [False] * 5 + [True, False]),
        (6, [False] * 5 + [False, True]),
    ):
        other = x.clone()
        other[:, :, frame] += 1
        assert changed_frames(before, model(other, t, y, **given)) == [expected] * 2
        row = max(frame - 4, 0)
        for name in ("t", "y"):
            rows = {"t": t.clone(), "y": y.clone()}
            rows[name][:, row] = (rows[name][:, row] + 1) % 5
            assert changed_frames(before, model(x, **rows, **given)) == [expected] * 2, name
    # Equal images with equal conditions have equal outputs, wherever they stand.
    x[:, :, 6], t[:, 2], y[:, 2] = x[:, :, 5], t[:, 1], y[:, 1]
    out = model(x, t, y, **given)
    torch.testing.assert_close(out[:, :, 5], out[:, :, 6])
    # The video is that of a call without images.
    torch.testing.assert_close(out[:, :, :5], model(x[:, :, :5], t[:, 0], y[:, 0]))
    # One t and y for all is the same as equal ones.
    t, y = t[:, :1].expand(-1, 3), y[:, :1].expand(-1, 3)
    torch.testing.assert_close(model(x, t, y, **given), model(x, t[:, 0], y[:, 0], **given))


def test_text_padding_says_nothing_and_no_text_is_no_text():
    model = randomized(replace(TEXT, cross_attention="all"))
    x, t, y, _ = inputs(model.config, dtype=torch.float32)
    y.mask[:] = torch.tensor([[True, True, False, False], [True, False, True, True]])
    before = model(x, t, y)
    states = torch.where(y.mask[..., None], y.states, 100.0)
    assert torch.equal(model(x, t, Text(states, y.mask)), before)
    longer = Text(F.pad(y.states, (0, 0, 0, 3)), F.pad(y.mask, (0, 3)))
    torch.testing.assert_close(model(x, t, longer), before)
    states = torch.where(y.mask[..., None], -y.states, y.states)
    assert (model(x, t, Text(states, y.mask)) - before).abs().mean() > 1e-3
    none = torch.zeros_like(y.mask)
    out = model(x, t, Text(y.states, none))
    assert out.isfinite().all() and torch.equal(model(x, t, Text(-y.states, none)), out)
    dropping = WALT(replace(model.config, class_dropout=1.0)).train()
    dropping.load_state_dict(model.state_dict())
    assert torch.equal(dropping(x, t, y), out) and torch.equal(dropping.eval()(x, t, y), before)


def test_text_reaches_each_window_but_tells_it_nothing_of_the_others():
    model = randomized(replace(TEXT, depth=1))
    x, t, y, _ = inputs(model.config, dtype=torch.float32)
    before = model(x, t, y)
    x[:, :, 2, 4, 4] += 1
    changed = (model(x, t, y) != before).any(1)
    expected = torch.zeros(5, 9, 7, dtype=torch.bool)
    expected[2, 4:8, 4:7] = True
    assert torch.equal(changed, expected.expand(2, -1, -1, -1))


def test_class_dropout():
    model = randomized(replace(CLASSES, class_dropout=1.0))
    x, t, y, given = inputs(model.config, dtype=torch.float32)
    y[:] = torch.tensor([0, 3])
    null = torch.full_like(y, model.null_class)
    assert model.null_class == 5 and torch.equal(model(x, t, y, **given), model(x, t, null, **given))
    model.eval()
    assert not torch.equal(model(x, t, y, **given), model(x, t, null, **given))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_gradient_flows_through_the_first_pass():
    model = randomized(replace(CLASSES, self_conditioning=1.0, past=0.0, class_dropout=0.5))
    x, _, y, _ = inputs(model.config, batch=8, dtype=torch.float32)
    calls, labels = [], []
    model.register_forward_pre_hook(
        lambda _, args, given: calls.append((args, given, torch.is_grad_enabled())), with_kwargs=True
    )
    model.y_embedder.register_forward_pre_hook(lambda _, args: labels.append(args[0]))
    loss = DDPM().loss(model, x, y, generator())
    loss.backward()
    (first, no_previous, first_has_gradient), (second, given, second_has_gradient) = calls
    assert not first_has_gradient and second_has_gradient and not given["previous"].requires_grad
    assert no_previous == {} and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # The class was dropped in both passes or in neither.
    assert torch.equal(*labels)

    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.training_conditions = lambda *_: {"previous": given["previous"]}
    dropped = labels[-1] == model.null_class
    model.config = replace(model.config, class_dropout=0.0)
    DDPM().loss(model, x, torch.where(dropped, model.null_class, y), generator()).backward()
    assert len(calls) == 3
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, got[name]), name


def test_an_estimate_is_the_data_that_the_prediction_points_at():
    x, noise, t = random(3, 2, 4, seed=0).clamp(-3, 3), random(3, 2, 4, seed=1), torch.tensor([0, 400, 999])
    signal, sigma = (root.sqrt().reshape(-1, 1, 1) for root in (ALPHA_BARS[t], 1 - ALPHA_BARS[t]))
    x_t = signal * x + sigma * noise
    torch.testing.assert_close(DDPM().estimate(noise, x_t, t), x)
    assert DDPM().estimate(-noise, x_t, t).abs().max() == 4
    velocity = DDPM(prediction="velocity")
    torch.testing.assert_close(velocity.estimate(signal * noise - sigma * x, x_t, t), x)
    published = SYSTEMS["walt-l"].objective
    torch.testing.assert_close(published.estimate(-x, noise, torch.tensor([999] * 3)), x)


def test_training_draws_as_often_as_it_is_told():
    config = replace(CLASSES, input_size=(3, 2, 2), self_conditioning=0.7, past=0.4)
    model, x = WALT(config), torch.randn(4000, 3, 3, 2, 2)

    def estimate(**given):
        seen.update(given)
        return torch.ones_like(x)

    seen = {}
    state = torch.get_rng_state()
    given = model.training_conditions(x, estimate, generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert seen.keys() == {"past", "past_frames"} and torch.equal(given["past"], x[:, :, :2])
    told = given["previous"].flatten(1)
    assert set(told.unique().tolist()) == {0.0, 1.0} and torch.equal(told.amin(1), told.amax(1))
    assert told[:, 0].mean().item() == pytest.approx(0.7, abs=0.03)
    shares = given["past_frames"].bincount(minlength=3) / 4000
    assert shares.tolist() == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    again = model.training_conditions(x, estimate, generator())
    assert all(torch.equal(given[name], again[name]) for name in given)
    plain = WALT(replace(config, self_conditioning=0.0, past=0.0))
    assert plain.training_conditions(x, estimate, generator()) == {}


def test_super_resolution_is_told_a_noisy_small_clip():
    config = replace(CASES["super-resolution"][0], low_noise=300)
    model = randomized(config)
    x = random(2000, 3, 3, 8, 6, seed=0, dtype=torch.float32)
    given = model.training_conditions(x, lambda **given: x, generator())
    assert given.keys() == {"low", "low_t", "previous"}
    low, low_t = given["low"], given["low_t"]
    assert low.shape == (2000, 3, 3, 4, 3) and (low_t.min(), low_t.max()) == (0, 300)
    assert low_t.float().mean().item() == pytest.approx(150, abs=6)
    alpha_bar = ALPHA_BARS[low_t].float().reshape(-1, 1, 1, 1, 1)
    means = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    noise = (low - alpha_bar.sqrt() * means) / (1 - alpha_bar).sqrt()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    with pytest.raises(ValueError, match=r"low_t has shape \(2,\); it must be \[2000\]"):
        augment(low, low_t[:2])

    x, t, y, given = inputs(config, dtype=torch.float32)
    before = model(x, t, y, **given)
    for name in ("low", "low_t"):
        assert not torch.allclose(model(x, t, y, **given | {name: given[name] + 1}), before)


class Remembers(Denoiser):
    """Returns what tells the classes apart; keeps what it was given."""

    def __init__(self, config, null_class=3):
        super().__init__()
        self.config, self.null_class, self.calls = config, null_class, []

    @property
    def self_conditioning(self):
        return self.config.self_conditioning > 0

    def forward(self, x, t, y=None, **given):
        self.calls.append((x, t, y, given))
        return 0.1 * x if y is None else 0.1 * x + 0.05 * y.to(x.dtype).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_sampler_hands_on_its_last_estimate(guidance):
    model, noise, y = Remembers(CLASSES), random(2, 3, 5, 2, 2, seed=0), torch.tensor([0, 2])
    sample(model, DDPM(), SampleRequest(noise=noise, y=y, solver="ddim", steps=3, guidance=guidance))
    assert "previous" not in model.calls[0][3] and len(model.calls) == 3
    for (x, t, labels, _), (*_, given) in zip(model.calls, model.calls[1:], strict=False):
        prediction = 0.1 * x + 0.05 * labels.double().view(-1, 1, 1, 1, 1)
        assert torch.equal(given["previous"], DDPM().estimate(prediction, x, t))
    plain = Remembers(replace(CLASSES, self_conditioning=0.0))
    sample(plain, DDPM(), SampleRequest(noise=noise, y=y, solver="ddim", steps=3, guidance=guidance))
    assert all(given == {} for *_, given in plain.calls)
    with pytest.raises(ValueError, match="cuda_graphs is True; a model with self-conditioning"):
        sample(model, DDPM(), SampleRequest(noise=noise, y=y, solver="ddim", steps=3, cuda_graphs=True))


def test_the_sampler_is_told_past_frames_and_guides_by_them():
    noise, past = random(2, 3, 5, 2, 2, seed=0), random(2, 3, 2, 2, 2, seed=1)
    config = replace(CLASSES, self_conditioning=0.0)
    model = Remembers(config)
    out = sample(model, DDPM(), SampleRequest(noise=noise, y=torch.tensor([0, 2]), solver="ddim", steps=2, past=past))
    assert torch.equal(out[:, :, :2], past) and not torch.equal(out[:, :, 2:], noise[:, :, 2:])
    assert all(torch.equal(given["past"], past) and "past_frames" not in given for *_, given in model.calls)
    for null_class, y, labels in ((3, torch.tensor([0, 2]), [0, 2, 3, 3]), (None, None, None)):
        model = Remembers(config, null_class)
        sample(model, DDPM(), SampleRequest(noise=noise, y=y, solver="ddim", steps=2, past=past, guidance=2.0))
        for _, _, seen, given in model.calls:
            assert (None if seen is None else seen.tolist()) == labels
            assert given["past_frames"].tolist() == [2, 2, 0, 0]
            assert torch.equal(given["past"], torch.cat((past, past)))
    model = Remembers(config)
    low, low_t = random(2, 3, 5, 1, 1, seed=2), torch.tensor([5, 6])
    sample(
        model,
        DDPM(),
        SampleRequest(
            noise=noise,
            y=torch.tensor([0, 2]),
            solver="ddim",
            steps=1,
            conditions={"low": low, "low_t": low_t},
            guidance=3.0,
        ),
    )
    assert model.calls[0][3]["low_t"].tolist() == [5, 6, 5, 6] and model.calls[0][3]["low"].shape[0] == 4


def test_resize_to_the_same_size_is_the_identity():
    weights = randomized(CLASSES).state_dict()
    same = resize(weights, CLASSES, CLASSES)
    assert same.keys() == weights.keys() and all(torch.equal(same[name], weights[name]) for name in weights)


def test_resize_interpolates_positions():
    new = replace(CLASSES, input_size=(7, 12, 14), spatial_window=(5, 7), spatiotemporal_window=(7, 4, 2))
    model = randomized(CLASSES)
    with torch.no_grad():
        rows, columns = torch.arange(9.0)[:, None, None], torch.arange(7.0)[None, :, None]
        model.pos_space.copy_(((rows + 0.5) / 9 + 10 * (columns + 0.5) / 7).expand(-1, -1, 16))
        model.pos_time.copy_(((torch.arange(5.0) + 0.5) / 5)[:, None].expand(-1, 16))
        for i, block in enumerate(model.blocks):
            ramps = [torch.linspace(-1, 1, 2 * n - 1) if n > 1 else torch.zeros(1) for n in CLASSES.window(i)]
            grids = torch.meshgrid(*ramps, indexing="ij")
            block.attn.bias_table.copy_((grids[0] + 10 * grids[1] + 100 * grids[2]).flatten().expand(2, -1))
    resized = WALT(new)
    resized.load_state_dict(resize(model.state_dict(), CLASSES, new))
    # A ramp stays a ramp, but within half a token of the border, where there is nothing to go on from.
    inner = resized.pos_space[1:-1, 1:-1]
    rows, columns = (torch.arange(12.0)[1:-1, None] + 0.5) / 12, (torch.arange(14.0)[None, 1:-1] + 0.5) / 14
    torch.testing.assert_close(inner, (rows + 10 * columns)[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(resized.pos_time[1:-1, 0], (torch.arange(7.0)[1:-1] + 0.5) / 7)
    for i, block in enumerate(resized.blocks):
        ramps = [torch.linspace(-1, 1, 2 * n - 1) if n > 1 else torch.zeros(1) for n in new.window(i)]
        grids = torch.meshgrid(*ramps, indexing="ij")
        expected = (grids[0] + 10 * grids[1] + 100 * grids[2]).flatten().expand(2, -1)
        torch.testing.assert_close(block.attn.bias_table.detach(), expected, rtol=1e-5, atol=1e-4)
    for name, weight in resized.named_parameters():
        if not name.startswith("pos_") and "bias_table" not in name:
            assert torch.equal(weight, model.get_parameter(name)), name


def test_resize_refuses():
    weights = randomized(CLASSES).state_dict()
    with pytest.raises(ValueError, match=r"new differs from old in more than sizes: .*blocks\.0\.attn\.k_norm\.weight"):
        resize(weights, CLASSES, replace(CLASSES, heads=4))
    with pytest.raises(ValueError, match=r"new differs from old in more than sizes: blocks\.3"):
        resize(weights, CLASSES, replace(CLASSES, depth=4))
    with pytest.raises(ValueError, match="weights are not those of a model with the config old"):
        resize(weights, replace(CLASSES, width=32), CLASSES)


@pytest.mark.parametrize("name", ["classes", "text", "super-resolution"])
def test_autocast_keeps_an_fp32_residual_stream(name):
    config, images = CASES[name]
    model = randomized(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    x, t, y, given = inputs(config, images, dtype=torch.float32)
    exact = model(x, t, y, **given)
    seen = []
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.extend(part.dtype for part in out))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y, **given)
    assert seen == [torch.float32, torch.bfloat16] and out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_without_a_graph_break():
    config = replace(CLASSES, depth=2)
    model = randomized(config)
    x, t, y, given = inputs(config, 1, dtype=torch.float32)
    gradient = random(*x.shape, seed=9, dtype=torch.float32)
    expected = run(model, model, x, t, y, given, gradient)
    torch.compiler.reset()
    got = run(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, t, y, given, gradient)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return TrainConfig(
        run=str(tmp_path / "run"),
        data=DataConfig(frames=3),
        model=WALTSettings(width=16, depth=2, heads=2, patch=(1, 4, 4), spatiotemporal_window=(3, 2, 2), past=0.5),
        objective=DDPM(),
        optimizer=OptimizerConfig(learning_rate=1e-2, ema=0.9),
        preview=PreviewConfig(count=2, steps=2, guidance=2.0),
        steps=4,
        batch_size=4,
        save_every=4,
    )


@pytest.mark.parametrize("images", [0, 2])
def test_trains_from_the_command_and_resumes_bit_for_bit(tiny, tmp_path, images):
    tiny = replace(tiny, data=replace(tiny.data, images=images))
    whole = load(train(tiny))
    with open(tmp_path / "run/losses.csv", newline="") as file:
        losses = [float(row[1]) for row in list(csv.reader(file))[1:]]
    assert len(losses) == 4 and len(set(losses)) == 4 and (tmp_path / "run/previews").exists()
    first = Trainer(tiny)
    first.model.train()
    for _ in range(2):
        first.train_step()
    second = Trainer(tiny, first.checkpoint())
    second.model.train()
    again = [second.train_step()[0].item() for _ in range(2)]
    for trainer in (first, second):
        trainer.batches.close()
        # Two steps of four clips, each with 4 x 4 tokens a frame.
        assert trainer.tokens == 2 * 4 * 16 * (3 + images)
    assert again == losses[2:] and first.model.config.input_size == (3, 16, 16)
    assert all(torch.equal(weight, whole.model[name]) for name, weight in second.model.state_dict().items())
    assert config_from(whole.config) == second.model.config and isinstance(build(config_from(whole.config)), WALT)


def test_joint_training_learns_video_and_images(tiny):
    """Of either, the error falls well below that of the fresh model, which says nothing; a class is for its frames."""
    tiny = replace(
        tiny,
        data=replace(tiny.data, images=2),
        model=replace(tiny.model, width=64, class_dropout=0.0),
        objective=DDPM(prediction="velocity"),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        preview=PreviewConfig(),
        batch_size=8,
    )
    trainer = Trainer(tiny)
    model = trainer.model.train()
    x, y, _ = trainer.batches.batch(1000)
    t, noise = torch.full((8,), 300), torch.randn(x.shape, generator=generator())
    signal, sigma = ALPHA_BARS[300].sqrt().float(), (1 - ALPHA_BARS[300]).sqrt().float()
    x_t, target = signal * x + sigma * noise, signal * noise - sigma * x

    def errors():
        with torch.no_grad():
            return (model(x_t, t, y) - target).square().mean((0, 1, 3, 4))

    before = errors()
    torch.testing.assert_close(before, target.square().mean((0, 1, 3, 4)))
    for _ in range(40):
        trainer.train_step()
    trainer.batches.close()
    assert (errors() < 0.5 * before).all()
    with torch.no_grad():
        out = model(x_t, t, y)
        for row, frames in ((0, [True] * 3 + [False] * 2), (1, [False] * 3 + [True, False]), (2, [False] * 4 + [True])):
            other = y.clone()
            other[:, row] = (y[:, row] + 1) % 10
            assert changed_frames(out, model(x_t, t, other)) == [frames] * 8


def test_what_training_tells_beside_images():
    config = replace(CLASSES, input_size=(3, 8, 6), low_resolution=True, self_conditioning=1.0, past=1.0)
    model, x = WALT(config), torch.randn(50, 3, 5, 8, 6)
    shapes = []

    def estimate(**given):
        shapes.append(given["low"].shape)
        return x

    given = model.training_conditions(x, estimate, generator())
    # Only frames of the video are known; images are small frames and estimates as the others.
    assert torch.equal(given["past"], x[:, :, :2]) and set(given["past_frames"].tolist()) == {1, 2}
    assert shapes == [(50, 3, 5, 4, 3)] and torch.equal(given["previous"], x)
    one = replace(config, input_size=(2, 8, 6))
    assert set(WALT(one).training_conditions(x, estimate, generator())["past_frames"].tolist()) == {1}
    y = torch.zeros(50, 3, dtype=torch.int64)
    assert DDPM().loss(model, x, y, generator()).isfinite()


def test_models_that_do_not_train_on_images_refuse_them(tiny):
    images = replace(tiny.data, images=2)
    for model, objective in ((DiTSettings(), FlowMatching()), (TokenizerSettings(), Reconstruction())):
        with pytest.raises(ValueError, match=f"data.images is 2; with model '{model.name}' it must be 0"):
            replace(tiny, data=images, model=model, objective=objective)
    with pytest.raises(ValueError, match=r"data\.images is -1; it must be at least 0"):
        replace(tiny, data=replace(tiny.data, images=-1))
    text = TextConfig(encoder="t5")
    with pytest.raises(ValueError, match=r"data\.images is 2; with text\.encoder it needs model\.cross_attention 'spa"):
        replace(tiny, data=images, text=text)
    replace(tiny, data=images, text=text, model=replace(tiny.model, cross_attention="spatial"))
    with pytest.raises(ValueError, match=r"data\.images is 2; training draws them, so it must be 0 here"):
        PrecomputeConfig(Path("out"), "pixels", data=images)


def test_super_resolution_trains_from_the_command_and_resumes_bit_for_bit(tiny, tmp_path, monkeypatch):
    config, _ = parse(
        (
            "--model walt-l --model.low-resolution --model.low-noise 7 --model.width 16 --model.depth 2 "
            "--model.heads 2 --model.patch 1 4 4 --data.frames 3 --steps 4 --batch-size 4 --save-every 2 "
            f"--preview.count 2 --preview.steps 2 --run {tiny.run}"
        ).split()
    )
    assert config.model.low_resolution and config.model.low_noise == 7
    told, forward = [], WALT.forward

    def told_low(self, x, t, y=None, **given):
        told.append((self.training, y, given["low"], given["low_t"]))
        return forward(self, x, t, y, **given)

    monkeypatch.setattr(WALT, "forward", told_low)
    whole = load(train(config))
    x, y, _ = Batches(open_source(config.data), 4, 0, prefetch=0).batch(0)
    training, _, low, low_t = told[0]
    assert training and low.shape == (4, 1, 3, 8, 8) and low_t.max() <= 7
    # alpha_bar of level 7 is 0.998: the noise is of deviation 0.05 at most.
    assert (low - F.avg_pool3d(x, (1, 2, 2))).abs().max() < 0.3
    training, labels, low, low_t = told[-1]
    assert not training and torch.equal(labels, y[:2]) and low_t.tolist() == [0, 0]
    noise = (low - (1 - 1e-4) ** 0.5 * F.avg_pool3d(x[:2], (1, 2, 2))) / 0.01
    assert abs(noise.mean()) < 0.2 and noise.std().item() == pytest.approx(1, abs=0.2)

    second = Trainer(config, load(tmp_path / "run/step_00000002.pt"))
    for _ in range(2):
        second.train_step()
    second.batches.close()
    assert all(torch.equal(weight, whole.model[name]) for name, weight in second.model.state_dict().items())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_small_clips_are_made_large(guidance):
    config = replace(CASES["super-resolution"][0], self_conditioning=0.0, low_noise=300)
    model = randomized(config)
    low, y = random(3, 3, 3, 4, 3, seed=1, dtype=torch.float32).clamp(-1, 1), torch.tensor([0, 3, 4])
    # One step from noise without signal: the data is minus the velocity.
    objective = DDPM(prediction="velocity", zero_snr=True)
    options = {"steps": 1, "solver": "ddim", "guidance": guidance, "decode": lambda x: x / 20}
    for level in (0, 300):
        clips = sample_clips(
            model, objective, ClipRequest(count=3, y=y, seed=5, batch_size=2, low=low, low_noise=level, **options)
        )
        drawn = torch.Generator().manual_seed(5)
        noise = torch.randn(3, 3, 3, 8, 6, generator=drawn)
        alpha_bar = ALPHA_BARS[level]
        noisy = alpha_bar.sqrt() * low + (1 - alpha_bar).sqrt() * torch.randn(low.shape, generator=drawn)
        given = {"low": noisy.float(), "low_t": torch.full((3,), level)}
        model.eval()
        with torch.no_grad():
            cond, null = (model(noise, torch.full((3,), 999), labels, **given) for labels in (y, torch.full((3,), 5)))
        expected = (-(null + guidance * (cond - null)) / 20 + 1) * 127.5
        assert 0 < expected.min() < expected.max() < 255 and expected.std() > 10
        assert (clips - expected.permute(0, 2, 3, 4, 1)).abs().max() <= 0.51
        low[1] = -low[1]
        changed = sample_clips(model, objective, ClipRequest(count=3, y=y, seed=5, low=low, low_noise=level, **options))
        assert [(changed[i] != clips[i]).float().mean().item() > 0.05 for i in range(3)] == [False, True, False]
    for options, reason in (
        ({"low": low, "low_noise": 301}, r"low_noise is 301; with this model it must be in 0\.\.300"),
        ({"low": low[:, :, :, :3]}, r"low has shape \(3, 3, 3, 3, 3\); it must be .* = \[3, 3, 3, 4, 3\]"),
        ({"low": low[:2]}, r"low has shape \(2, 3, 3, 4, 3\); it must be"),
        ({}, "low was not given"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample_clips(model, objective, ClipRequest(count=3, y=y, seed=0, steps=1, **options))
    with pytest.raises(ValueError, match="low was given, but the model is no second stage"):
        sample_clips(WALT(CLASSES), objective, ClipRequest(count=3, y=y, seed=0, steps=1, low=low))


def test_only_ddpm_draws_conditions(tiny):
    changes = {"self_conditioning": 0.0}, {"self_conditioning": 0.0, "past": 0.0, "low_resolution": True}
    for change, word in zip(({}, *changes), ("self_conditioning", "past", "low_resolution"), strict=True):
        with pytest.raises(ValueError, match=f"model.{word} needs objective 'ddpm'; it is 'flow'"):
            replace(tiny, model=replace(tiny.model, **change), objective=FlowMatching())
    replace(tiny, model=replace(tiny.model, self_conditioning=0.0, past=0.0), objective=FlowMatching())


def test_attributes():
    model = WALT(CLASSES)
    assert (model.out_channels, model.null_class, model.tokens_per_sample, model.checkpointing) == (3, 5, 315, False)
    assert WALT(TEXT).null_class is None
    image = replace(CLASSES, input_size=(1, 9, 7), past=0.0)
    assert [image.window(i) for i in (0, 1)] == [(1, 4, 4), (1, 3, 3)]
    x, t, y, given = inputs(image, dtype=torch.float32)
    assert WALT(image)(x, t, y, **given).shape == x.shape


def test_config_survives_json():
    for config, _ in CASES.values():
        again = WALTConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config and isinstance(again.spatial_window, tuple)
    assert {field.name for field in dataclasses.fields(WALTSettings)} < {f.name for f in dataclasses.fields(WALTConfig)}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": (9, 7)}, "input_size"),
        ({"patch": (1, 0, 1)}, "patch"),
        ({"patch": (5, 1, 1)}, "patch"),
        ({"patch": (1, 2, 1)}, "patch"),
        ({"spatial_window": (0, 4)}, "spatial_window"),
        ({"spatiotemporal_window": (5, 4)}, "spatiotemporal_window"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"depth": 0}, "depth"),
        ({"heads": 3}, "width"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"num_classes": -1}, "num_classes"),
        ({"text_width": 8}, "text_width"),
        ({"cross_attention": "temporal"}, "cross_attention"),
        ({"self_conditioning": 1.5}, "self_conditioning"),
        ({"past": -0.1}, "past"),
        ({"input_size": (1, 9, 7)}, "past"),
        ({"low_resolution": True}, "low_resolution"),
        ({"low_noise": 1000}, "low_noise"),
    ],
)
def test_config_refuses(change, word):
    with pytest.raises(ValueError, match=f"^{word} is"):
        replace(CLASSES, **change)


def test_forward_refuses():
    model = WALT(CLASSES)
    x, t, y, given = inputs(CLASSES, dtype=torch.float32)
    past = given["past"]
    for arguments, message in (
        ((x[:, :2], t, y), r"x has shape \(2, 2, 5, 9, 7\); it must be \[B, 3, 5 \+ images, 9, 7\]"),
        ((x[:, :, :4], t, y), "x has shape"),
        ((x[..., :6], t, y), "x has shape"),
        ((x[:, :, 0], t, y), "x has shape"),
        ((x, t[:1], y), r"t has shape \(1,\); with images = 0 it may be \[2\]"),
        ((x, t, y[:1]), "y has shape"),
        ((x, t), "y is None; a model with 5 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    for given, message in (
        ({"previous": x[:1]}, "previous has shape"),
        ({"past": past[..., :2]}, "past has shape"),
        ({"past": torch.cat((past, past), 2)}, r"past has 4 frames; it must have 1\.\.2"),
        ({"past_frames": torch.ones(2)}, r"past_frames has shape \(2,\); it must be \[2\], with past"),
        ({"low": x}, "low was given to a model that was built without it"),
        ({"low_t": t}, "low_t was given to a model"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, t, y, **given)
    with pytest.raises(TypeError, match="y is a Text; a model with 5 classes"):
        model(x, t, Text(x, x > 0))
    plain = WALT(replace(CLASSES, num_classes=0, past=0.0, self_conditioning=0.0))
    with pytest.raises(ValueError, match="unconditional"):
        plain(x, t, y)
    for name in ("previous", "past"):
        with pytest.raises(ValueError, match=f"{name} was given to a model that was built without it"):
            plain(x, t, **{name: x[:, :, :2]})
    x, t, y, given = inputs(CASES["super-resolution"][0], dtype=torch.float32)
    large = WALT(CASES["super-resolution"][0])
    for name, message in (("low", "low is None"), ("low_t", "low_t is None")):
        with pytest.raises(ValueError, match=message):
            large(x, t, y, **{key: value for key, value in given.items() if key != name})


def test_text_refuses():
    x, t, y, _ = inputs(TEXT, dtype=torch.float32)
    model = WALT(TEXT)
    with pytest.raises(TypeError, match="y is NoneType; a model with text"):
        model(x, t)
    for bad, message in (
        (Text(y.states[..., :2], y.mask), r"y.states has shape \(2, 4, 2\); with images = 0 it may be \[2, L, 6\]"),
        (Text(y.states, y.mask[:1]), "y.mask is torch.bool of shape"),
        (Text(y.states, y.mask.float()), "y.mask is torch.float32 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, t, bad)
    with pytest.raises(ValueError, match="images is 1; a model with text needs cross_attention = 'spatial'"):
        WALT(replace(TEXT, cross_attention="all"))(F.pad(x, (0, 0, 0, 0, 0, 1)), t, y)


def test_the_first_pass_leaves_no_weight_without_a_gradient():
    """Autocast keeps the weights that it has converted; those of a pass without gradient must not serve the second."""
    torch.manual_seed(0)
    config, _ = CASES["classes"]
    model = randomized(replace(config, self_conditioning=1.0)).float()
    x = torch.randn(2, config.channels, *config.input_size)
    with torch.autocast("cpu", torch.bfloat16):
        loss = DDPM().loss(model, x, torch.zeros(2, dtype=torch.int64), torch.Generator().manual_seed(0))
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert missing == []


@pytest.mark.parametrize("objective", [FlowMatching(), LogSNR()])
def test_objectives_that_tell_the_model_less_refuse_it(objective):
    config, _ = CASES["classes"]
    with pytest.raises(ValueError, match=r"model\.self_conditioning is 0\.9; only the objective 'ddpm' teaches it"):
        objective.loss(randomized(replace(config, self_conditioning=0.9)), torch.zeros(1), None)
    config = replace(CASES["super-resolution"][0], self_conditioning=0.0)
    with pytest.raises(ValueError, match=r"model.low_resolution is True; only the objective 'ddpm' teaches it"):
        objective.loss(WALT(config), torch.zeros(1), None)
