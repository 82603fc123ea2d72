"""Autoencoders: causality to the bit, parts of a clip, codes, every term of the loss, and runs of the trainer."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import av
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from torch import nn
from torch.distributions import Normal, kl_divergence

import minisora_kernels as mk
from minisora_kernels.testing import assert_as_accurate
from models import measure, plan, sample
from models.autoencoders.discriminator import PatchDiscriminator
from models.autoencoders.tiles import Tile, ramp, starts
from models.autoencoders.tokenizer import (
    CausalConv,
    CausalTokenizer,
    FrameNorm,
    TokenizerConfig,
    TokenizerSettings,
    Upsample,
    measure_latents,
)
from models.autoencoders.vqgan import VQGAN, Block, VQGANConfig, VQGANSettings
from models.checkpoint import load
from models.data.batches import Batches
from models.data.config import DataConfig
from models.data.encoder import identify, open_encoder
from models.data.moving_digits import MovingDigits
from models.data.pixels import to_bytes
from models.objectives.flow import FlowMatching
from models.objectives.reconstruction import Reconstruction, laplacian, psnr, reverse_gradient
from models.runtime.plain import merge
from models.train import main as train_main
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig
from models.training.run import train
from models.training.trainer import Trainer

VIDEO = TokenizerConfig(
    input_size=(9, 8, 12),
    channels=3,
    width=8,
    multipliers=(1, 2, 2),
    temporal_strides=(2, 2),
    res_blocks=1,
    groups=4,
    latent_channels=5,
)
DEEP = dataclasses.replace(
    VIDEO, input_size=(5, 16, 8), width=6, multipliers=(1, 1, 2, 3), temporal_strides=(1, 2, 2), res_blocks=2, groups=3
)
PLAIN = dataclasses.replace(VIDEO, input_size=(3, 6, 10), multipliers=(1, 2), temporal_strides=(2,), variational=False)
TOKENIZERS = {"video": VIDEO, "deep": DEEP, "plain": PLAIN}
IMAGES = VQGANConfig(input_size=(3, 8, 12), channels=3, width=12, blocks=2, latent_channels=8, codes=16)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def clips(config, batch=2, frames=None, dtype=torch.float32):
    t, h, w = config.input_size
    return torch.randn(batch, config.channels, frames or t, h, w, generator=generator(), dtype=torch.float64).to(dtype)


def tokenizer(config=VIDEO):
    """With biases and norms that are not those of a fresh network."""
    torch.manual_seed(0)
    model = CausalTokenizer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def vqgan(config=IMAGES):
    """With blocks that do something, and codes as far apart as the latents."""
    torch.manual_seed(0)
    model = VQGAN(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gammas"):
                parameter.normal_(std=0.5)
    return model


# Tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
def test_shapes(name):
    config = TOKENIZERS[name]
    model = tokenizer(config)
    (s, f), (_, h, w) = config.factors, config.input_size
    for frames in (1, config.input_size[0], 1 + 3 * s):
        x = clips(config, frames=frames)
        z = model.encode(x)
        assert z.shape == (2, config.latent_channels, 1 + (frames - 1) // s, h // f, w // f)
        assert model.decode(z).shape == x.shape and model(x)[0].shape == x.shape
    assert model.tokens_per_sample == math.prod(config.grid) == model.encode(clips(config))[0, 0].numel()
    assert (model.out_channels, model.null_class, model.discriminator) == (3, None, None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_depends_on_a_later_frame(name):
    config = TOKENIZERS[name]
    model, s = tokenizer(config), config.factors[0]
    x = clips(config, frames=1 + 2 * s)
    z = model.encode(x)
    for frame in range(x.shape[2]):
        changed = x.clone()
        changed[:, :, frame] += 1
        same = (model.encode(changed) == z).flatten(3).all(-1).all(1).all(0)
        first = -(-frame // s)  # frame 0 alone makes latent 0, the next s frames latent 1
        assert same.tolist() == [i < first for i in range(3)], frame
    video = model.decode(z)
    for latent in range(3):
        changed = z.clone()
        changed[:, :, latent] += 1
        same = (model.decode(changed) == video).flatten(3).all(-1).all(1).all(0)
        first = 0 if latent == 0 else 1 + (latent - 1) * s
        assert same.tolist() == [i < first for i in range(x.shape[2])], latent


def test_an_image_is_the_first_frame_of_a_video():
    model, x = tokenizer().double(), clips(VIDEO, dtype=torch.float64)
    z = model.encode(x)
    torch.testing.assert_close(model.encode(x[:, :, :1]), z[:, :, :1])
    torch.testing.assert_close(model.decode(z[:, :, :1]), model.decode(z)[:, :, :1])


def test_a_still_video_has_the_same_latents_at_every_frame():
    model, x = tokenizer().double(), clips(VIDEO, frames=1, dtype=torch.float64)
    z = model.encode(x.expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(z, z[:, :, :1].expand_as(z))


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_causal_convolution(stride):
    conv = CausalConv(2, 3, stride).double()
    x = torch.randn(2, 2, 5, 4, 6, dtype=torch.float64)
    out = conv(x)
    assert out.shape == (2, 3, 1 + 4 // stride[0], 4 // stride[1], 6 // stride[2])
    padded = F.pad(x, (1, 1, 1, 1))
    for i in range(out.shape[2]):
        seen = [padded[:, :, max(i * stride[0] + j, 0)] for j in (-2, -1, 0)]
        expected = sum(F.conv2d(frame, conv.weight[:, :, j], stride=stride[1:]) for j, frame in enumerate(seen))
        torch.testing.assert_close(out[:, :, i], expected + conv.bias[:, None, None])


def test_norm_is_of_a_frame():
    norm = FrameNorm(2, 4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    out = norm(x)
    for i in range(3):
        frame = x[:, :, i].unflatten(1, (2, 2))
        mean, std = frame.mean((2, 3, 4), keepdim=True), frame.var((2, 3, 4), unbiased=False, keepdim=True).sqrt()
        y = ((frame - mean) / std).flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(out[:, :, i], y * y.sigmoid(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2)])
def test_upsampling_is_depth_to_space_without_the_first_frames(factor):
    layer = Upsample(3, factor).double()
    x = torch.randn(2, 3, 3, 2, 4, dtype=torch.float64)
    out, deep = layer(x), layer.conv(x)
    t, h, w = factor
    assert out.shape == (2, 3, t * 3 - t + 1, 4, 8)
    for frame in range(out.shape[2]):
        place, i = divmod(frame + t - 1, t)
        for row in range(4):
            for column in range(8):
                first = ((i * h + row % h) * w + column % w) * 3
                expected = deep[:, first : first + 3, place, row // h, column // w]
                assert torch.equal(out[:, :, frame, row, column], expected)


def test_penalty_and_sampling():
    model, x = tokenizer().double(), clips(VIDEO, dtype=torch.float64)
    mean, log_variance = model.posterior(x)
    posterior = Normal(mean, (log_variance / 2).exp())
    reconstruction, penalty = model(x)
    torch.testing.assert_close(penalty, kl_divergence(posterior, Normal(0.0, 1.0)).mean())
    torch.testing.assert_close(reconstruction, model.decode(mean))
    assert model.noise_shape(x) == mean.shape
    noise = torch.randn(mean.shape, dtype=torch.float64)
    torch.testing.assert_close(model(x, noise)[0], model.decode(mean + posterior.scale * noise))

    plain = tokenizer(PLAIN)
    x = clips(PLAIN)
    assert plain.noise_shape(x) is None and plain(x)[1] == 0
    with pytest.raises(ValueError, match="noise was given"):
        plain(x, torch.zeros(()))


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_in_time_are_exact(name, frames):
    config = TOKENIZERS[name]
    # In float64, for convolutions of another size round differently.
    model, s = tokenizer(config).double(), config.factors[0]
    x = clips(config, frames=1 + 4 * s).double()
    z = model.encode(x)
    torch.testing.assert_close(model.encode(x, frames=frames), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.decode(z, tile=Tile(frames)), model.decode(z), rtol=1e-12, atol=1e-12)


class Enlarge(nn.Module):
    """A decoder without a network: pixels repeated, frames too, but for the first."""

    def __init__(self, s, f):
        super().__init__()
        self.s, self.f = s, f

    def forward(self, z, memory=None, checkpointing=False):
        first = memory is None or not memory
        if memory is not None:
            memory[self] = z
        video = z[:, :3]
        for dim, factor in ((2, self.s), (3, self.f), (4, self.f)):
            video = video.repeat_interleave(factor, dim)
        return video[:, :, self.s - 1 :] if first else video


@pytest.mark.parametrize(("size", "overlap"), [((3, 4), 1), ((4, 9), 2), ((2, 2), 0), ((5, 5), 4), ((50, 3), 2)])
def test_blending_changes_nothing_where_parts_agree(size, overlap):
    model = tokenizer()
    model.decoder = Enlarge(4, 4)
    z = torch.randn(2, 5, 3, 7, 9)
    whole = model.decode(z)
    for frames in (None, 2):
        torch.testing.assert_close(model.decode(z, tile=Tile(frames, size, overlap)), whole)


def test_parts_cover_a_line():
    for length, part, overlap in ((10, 4, 2), (9, 4, 1), (4, 4, 2), (7, 3, 0), (5, 4, 3)):
        covered = sorted({place for start in starts(length, part, overlap) for place in range(start, start + part)})
        assert covered == list(range(length))
    like = torch.zeros(())
    assert ramp(0, 6, 6, 4, like).tolist() == [1] * 6
    assert ramp(2, 8, 10, 4, like).tolist() == [0, 0.25, 0.75, 1, 1, 1, 1, 1]
    left, right = ramp(0, 8, 12, 4, like), ramp(4, 8, 12, 4, like)
    assert (left[4:] + right[:4]).tolist() == [1] * 4
    assert ramp(3, 3, 9, 0, like).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("part", "flat", "bound"), [(24, False, 0.08), (16, False, 0.2), (24, True, 0.25), (16, True, 0.45)]
)
def test_seams(part, flat, bound):
    """Group norm takes a part's statistics for the frame's, so the error is measured, on a fresh network.

    Noise is alike in all parts; where half of the frame is flat, the parts have little in common.
    """
    torch.manual_seed(0)
    model = CausalTokenizer(dataclasses.replace(VIDEO, width=16))
    with torch.no_grad():
        x = F.interpolate(torch.randn(1, 3, 1, 32, 32), (1, 128, 128))
        if flat:
            x[..., 64:] = 0.5
        z = model.encode(x)
        whole = model.decode(z)
        tiled = model.decode(z, tile=Tile(size=(part, part), overlap=8))
    assert 0.5 * bound < (tiled - whole).abs().max() / whole.abs().max() < bound


def test_seams_without_group_norm_are_those_of_the_zeros_around_a_part(monkeypatch):
    """With a share that is wide enough for all that a pixel depends on, nothing is left of them."""
    monkeypatch.setattr(FrameNorm, "forward", lambda _, x: F.silu(4 * x))
    torch.manual_seed(0)
    model = CausalTokenizer(dataclasses.replace(VIDEO, width=16))
    with torch.no_grad():
        z = torch.randn(1, 5, 1, 5, 60)
        whole = model.decode(z)
        errors = [
            (model.decode(z, tile=Tile(size=(40, 40), overlap=overlap)) - whole).abs().max() / whole.abs().max()
            for overlap in (4, 12, 28)
        ]
    assert errors[0] > 0.1 > errors[1] > 1e-4 > errors[2]


def test_latents_are_normalised():
    model = tokenizer()
    batches = [clips(VIDEO), clips(VIDEO).flip(2) * 2]
    z = torch.cat([model.encode(x) for x in batches])
    before = model.decode(z)
    measure_latents(model, batches)
    normal = torch.cat([model.encode(x) for x in batches])
    for statistic, target in ((normal.mean((0, 2, 3, 4)), 0.0), (normal.std((0, 2, 3, 4), unbiased=False), 1.0)):
        torch.testing.assert_close(statistic, torch.full((5,), target), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(normal), before, rtol=1e-4, atol=1e-4)
    again = CausalTokenizer(VIDEO)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.encode(batches[0]), model.encode(batches[0]))
    with pytest.raises(ValueError, match="no clip"):
        measure_latents(model, [])
    nn.init.zeros_(model.encoder[-1].conv.weight)
    with pytest.raises(ValueError, match="do not vary"):
        measure_latents(model, batches)


# Both


def backward(model, dtype, rounded, seed=1):
    """The output and every gradient, by name."""
    x = (
        torch.randn(2, 3, *model.config.input_size, generator=generator(seed), dtype=torch.float64)
        .to(rounded)
        .to(DEVICE, dtype)
        .requires_grad_()
    )
    reconstruction, penalty = model(x)
    gradient = torch.randn(reconstruction.shape, generator=generator(seed + 50), dtype=torch.float64).to(rounded)
    (reconstruction * gradient.to(DEVICE, dtype)).sum().add(penalty).backward()
    results = {"output": reconstruction.detach(), "gradient of x": x.grad}
    results |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return results


def backward_of_several(model, dtype, rounded):
    """Of several batches: one batch gives a block's six gammas, or a short bias, too few numbers for the rule."""
    batches = [backward(model, dtype, rounded, seed) for seed in range(6)]
    return {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize(("build", "ops"), [(tokenizer, {"unpatchify"}), (vqgan, None)], ids=["tokenizer", "vqgan"])
def test_every_parameter_in_training_mode(build, ops, backend, nan_filled):
    ops = ops or {"adaln", "gate_residual", "gate_residual_adaln", "patch_embed", "unpatchify"}
    model = build().train().to(DEVICE)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    seen = Seen()
    with seen, mk.use_backend(backend):
        kernel = backward_of_several(model, torch.float32, torch.float32)
    for way in ("_fwd", "_bwd"):
        assert {call.removesuffix(way) for call in seen.names() if call.endswith(way)} == ops
    with mk.use_backend("reference"):
        reference = backward_of_several(plain, torch.float32, torch.float32)
        truth = backward_of_several(exact, torch.float64, torch.float32)
    for result in kernel:
        assert truth[result].abs().max() > 0, result
        assert_as_accurate(result, kernel[result], reference[result], truth[result])


@pytest.mark.parametrize("build", [tokenizer, vqgan])
def test_checkpointing_gives_the_same_gradients(build):
    plain, again = build(), build()
    again.checkpointing = True
    calls = []
    layer = again.encoder[0] if build is tokenizer else again.encoder_low
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, got = (backward(model, torch.float32, torch.float32) for model in (plain, again))
    assert len(calls) == 2
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("build", [tokenizer, vqgan])
def test_compiles_without_a_graph_break(build):
    model, x = build(), clips(build().config)
    expected = copy.deepcopy(model)(x)
    torch.compiler.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tokenizer, vqgan])
def test_autocast(build):
    model, x = build(), clips(build().config)
    with torch.autocast("cpu", torch.bfloat16):
        loss = Reconstruction().loss(model, x, None, generator())
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# VQGAN


def test_a_block_is_its_equations():
    block = Block(8).double()
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    assert torch.equal(block(x, (3, 5)), x)
    m = nn.init.normal_(block.gammas).detach()

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    y = (norm(x) * (1 + m[0]) + m[1]).transpose(1, 2).unflatten(2, (3, 5))
    y = F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), block.depthwise.weight, block.depthwise.bias, groups=8)
    expected = x + m[2] * y.flatten(2).transpose(1, 2)
    y = norm(expected) * (1 + m[3]) + m[4]
    hidden = F.linear(y, block.mlp[0].weight, block.mlp[0].bias)
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    expected = expected + m[5] * F.linear(hidden, block.mlp[2].weight, block.mlp[2].bias)
    torch.testing.assert_close(block(x, (3, 5)), expected)


def test_a_video_is_its_frames():
    model, x = vqgan().eval(), clips(IMAGES)
    video, z = model(x)[0], model.encode(x)
    assert video.shape == x.shape and z.shape == (2, 8, 3, 2, 3)
    for i in range(3):
        torch.testing.assert_close(video[:, :, i], model(x[:, :, i])[0])
        torch.testing.assert_close(z[:, :, i], model.encode(x[:, :, i]))
        torch.testing.assert_close(model.decode(z)[:, :, i], model.decode(z[:, :, i]))
    assert model.tokens_per_sample == 18 and model.decode(z).shape == x.shape


def test_codes():
    model, x = vqgan(), clips(IMAGES)
    z = torch.randn(2, 7, 8)
    indices = model.nearest(z)
    distances = (z[..., None, :] - model.codebook.weight).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1)) and len(indices.unique()) > 4

    model.eval()
    z = model.encode(x).movedim(1, -1) * 0.43
    e = model.codebook.weight[model.nearest(z)]
    reconstruction, penalty = model(x)
    torch.testing.assert_close(penalty, 1.25 * (z - e).square().mean())
    torch.testing.assert_close(reconstruction, model.decode(e.movedim(-1, 1) / 0.43))


def test_the_gradient_passes_straight_through_the_codes():
    """The decoder's gradient reaches z as if z_q were z, and the codes get that of their own term only."""
    model, x = vqgan().eval().double(), clips(IMAGES, dtype=torch.float64)
    z = model._latents(x).detach().requires_grad_()
    model._latents = lambda _: z
    reconstruction, penalty = model(x)
    weights = torch.randn_like(reconstruction)
    straight, codes = torch.autograd.grad(
        (reconstruction * weights).sum(), (z, model.codebook.weight), retain_graph=True, allow_unused=True
    )
    assert codes is None
    e = model.codebook.weight[model.nearest(z)].detach().requires_grad_()
    expected = torch.autograd.grad((model._decode(e, x.shape) * weights).sum(), e)[0]
    torch.testing.assert_close(straight, expected)
    commitment, codes = torch.autograd.grad(penalty, (z, model.codebook.weight))
    torch.testing.assert_close(commitment, 0.25 * 2 * (z - e).detach() / z.numel())
    moved = torch.zeros_like(codes).index_add_(0, model.nearest(z).flatten(), ((e - z) * 2 / z.numel()).flatten(0, 1))
    torch.testing.assert_close(codes, moved)


# Objective


class Fixed(nn.Module):
    """A model that answers with a reconstruction, and counts its calls."""

    def __init__(self, answer, penalty=0.0, discriminator=None):
        super().__init__()
        self.answer, self.penalty, self.discriminator = answer, torch.tensor(penalty), discriminator

    def noise_shape(self, x):
        return None

    def forward(self, x):
        return self.answer, self.penalty


@pytest.mark.parametrize("pixels", ["l1", "l2"])
def test_terms_of_the_loss(pixels):
    x, answer = (torch.randn(2, 3, 3, 8, 6, generator=generator(seed)) for seed in (1, 2))
    options = Reconstruction(pixels, laplacian_weight=0.5, penalty_weight=0.1)
    loss = options.loss(Fixed(answer, 7.0), x, None)
    error = (answer - x).abs() if pixels == "l1" else (answer - x) ** 2
    torch.testing.assert_close(loss, error.mean() + 0.5 * laplacian(answer - x) + 0.7)
    assert options.loss(Fixed(x), x, None) == 0


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 7)])
def test_laplacian_pyramid(size):
    x = torch.randn(2, 3, 2, *size, dtype=torch.float64)
    level, expected = x, 0.0
    for _ in range(3):
        if min(level.shape[-2:]) < 2:
            break
        height, width = level.shape[-2:]
        band = torch.empty_like(level)
        coarse = level.new_empty(*level.shape[:3], -(-height // 2), -(-width // 2))
        for i in range(0, height, 2):
            for j in range(0, width, 2):
                square = level[..., i : i + 2, j : j + 2]
                coarse[..., i // 2, j // 2] = square.mean((-2, -1))
                band[..., i : i + 2, j : j + 2] = square - square.mean((-2, -1), keepdim=True)
        expected += band.abs().mean()
        level = coarse
    torch.testing.assert_close(laplacian(x), expected + level.abs().mean())


def test_laplacian_sees_blur_that_pixels_do_not():
    """Two errors of the same size: one that is even over the frame, one that alternates from pixel to pixel."""
    even = torch.ones(1, 1, 1, 8, 8)
    sharp = even.clone()
    sharp[..., ::2] = -1
    assert laplacian(even) == laplacian(sharp) == 1
    half = even.clone()
    half[..., :4] = 0  # an edge in the middle: in the coarsest band and in the one before
    assert laplacian(half) == 1


def test_noise_comes_from_the_generator_in_training_only():
    model, x = tokenizer(), clips(VIDEO)
    first, again, other = (Reconstruction().loss(model, x, None, generator(seed)) for seed in (1, 1, 2))
    assert first == again != other
    model.eval()
    assert Reconstruction().loss(model, x, None, generator(1)) == Reconstruction().loss(model, x, None, generator(2))


def test_the_hinge_is_reversed_for_the_reconstruction():
    x = torch.randn(2, 3, 5, 8, 8, generator=generator())
    answer = torch.randn(x.shape, generator=generator(2)).requires_grad_()
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 4)
    model = Fixed(answer, discriminator=discriminator)
    with_hinge = Reconstruction(laplacian_weight=0, adversarial_weight=0.3)
    loss = with_hinge.loss(model, x, None)
    real, fake = discriminator(x), discriminator(answer)
    hinge = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    torch.testing.assert_close(loss, (answer - x).abs().mean() + hinge)
    ours = torch.autograd.grad(loss, (answer, *discriminator.parameters()))
    pixels = torch.autograd.grad((answer - x).abs().mean(), answer)[0]
    forward = torch.autograd.grad(hinge, (answer, *discriminator.parameters()))
    torch.testing.assert_close(ours[0], pixels - 0.3 * forward[0])
    assert forward[0].abs().max() > 0
    for got, expected in zip(ours[1:], forward[1:], strict=True):
        torch.testing.assert_close(got, expected)
    y = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(reverse_gradient(y, 2.0).sum(), y)[0].tolist() == [-2, -2]


def test_the_discriminator_joins_after_its_start():
    x = torch.randn(1, 3, 1, 8, 8)
    model = Fixed(torch.zeros_like(x), discriminator=PatchDiscriminator(3, 4))
    objective = Reconstruction(adversarial_weight=1.0, adversarial_start=2)
    memory = objective.memory(x.device)
    losses = [objective.loss(model, x, None, memory=memory) for _ in range(4)]
    assert losses[0] == losses[1] < losses[2] == losses[3] and memory["calls"] == 4
    assert Reconstruction(adversarial_weight=1.0).memory(x.device) == {}
    for missing in (None, {}):
        with pytest.raises(ValueError, match="with adversarial_start it must be what memory"):
            objective.loss(model, x, None, memory=missing)


def test_objective_refuses():
    for change, word in (
        ({"pixels": "lpips"}, "pixels is 'lpips'"),
        ({"laplacian_weight": -1.0}, "laplacian_weight is -1"),
        ({"adversarial_start": 5}, "adversarial_start is 5"),
    ):
        with pytest.raises(ValueError, match=word):
            Reconstruction(**change)
    x = torch.zeros(1, 3, 1, 8, 8)
    with pytest.raises(ValueError, match="no discriminator"):
        Reconstruction(adversarial_weight=1.0).loss(Fixed(x), x, None)
    with pytest.raises(ValueError, match="has a discriminator"):
        Reconstruction().loss(Fixed(x, discriminator=PatchDiscriminator(3, 4)), x, None)
    with pytest.raises(ValueError, match="'reconstruction' goes with an autoencoder"):
        TrainConfig(objective=Reconstruction())
    with pytest.raises(ValueError, match="'reconstruction' goes with an autoencoder"):
        TrainConfig(model=TokenizerSettings(), objective=FlowMatching())
    with pytest.raises(ValueError, match="'cascade-a', an autoencoder"):
        plan.needs(plan.PlanConfig("cascade-a", "a100-80g"), training=True)
    with pytest.raises(ValueError, match="has a discriminator"):
        TrainConfig(model=VQGANSettings(discriminator=8), objective=Reconstruction())


def test_psnr():
    x = torch.zeros(2, 1, 1, 4, 4)
    y = x + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 40.0]))
    assert psnr(x + 1, y + 100).isinf().all()  # values beyond white are white


# Settings and arguments


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": (8, 8, 12)}, "input_size"),
        ({"input_size": (9, 8, 10)}, "input_size"),
        ({"input_size": (8, 12)}, "input_size"),
        ({"width": 0}, "width"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0, 2)}, "multipliers"),
        ({"temporal_strides": (2,)}, "temporal_strides"),
        ({"temporal_strides": (2, 3)}, "temporal_strides"),
        ({"groups": 3}, "groups"),
        ({"res_blocks": 0}, "res_blocks"),
        ({"discriminator": -1}, "discriminator"),
    ],
)
def test_tokenizer_config_refuses(change, word):
    with pytest.raises(ValueError, match=f"^{word} is"):
        dataclasses.replace(VIDEO, **change)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": (3, 8, 10)}, "input_size"),
        ({"input_size": (8, 8)}, "input_size"),
        ({"width": 7}, "width"),
        ({"codes": 0}, "codes"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_vqgan_config_refuses(change, word):
    with pytest.raises(ValueError, match=f"^{word} is"):
        dataclasses.replace(IMAGES, **change)


def test_configs_survive_json():
    for config in (*TOKENIZERS.values(), IMAGES):
        assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_models_refuse():
    model, x = tokenizer(), clips(VIDEO)
    for bad in (x[:, :2], x[:, :, :8], x[..., :10], x[0]):
        with pytest.raises(ValueError, match="x has shape"):
            model.encode(bad)
    with pytest.raises(ValueError, match="frames is 0"):
        model.encode(x, frames=0)
    for bad in (torch.zeros(1, 4, 1, 2, 2), torch.zeros(5, 1, 2, 2), torch.zeros(1, 5, 0, 2, 2)):
        with pytest.raises(ValueError, match="latents have shape"):
            model.decode(bad)
    with pytest.raises(ValueError, match="frames is 0"):
        Tile(frames=0)
    with pytest.raises(ValueError, match="overlap is 4"):
        Tile(size=(4, 8))
    model = vqgan()
    for bad in (x[:, :2], x[..., :10], x[0, 0]):
        with pytest.raises(ValueError, match="x has shape"):
            model(bad)
    with pytest.raises(ValueError, match="latents have shape"):
        model.decode(x)


# Trainer


TINY = TrainConfig(
    data=DataConfig(frames=5, size=(12, 12)),
    model=TokenizerSettings(
        width=8, multipliers=(1, 1, 1), temporal_strides=(2, 2), res_blocks=1, groups=4, latent_channels=4
    ),
    objective=Reconstruction(),
    optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.99), ema=0.9),
    preview=PreviewConfig(count=3),
    steps=4,
    batch_size=4,
    save_every=2,
)
ADVERSARIAL = merge(
    TINY,
    {"model": {"discriminator": 4}, "objective": {"adversarial_weight": 0.1, "adversarial_start": 1}},
)
QUANTISED = merge(TINY, {"model": {"name": "vqgan", "width": 16, "blocks": 1, "codes": 32}})


@pytest.mark.parametrize("config", [ADVERSARIAL, QUANTISED], ids=["adversarial", "vqgan"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, config):
    whole = load(train(merge(config, {"run": str(tmp_path / "whole")})))
    half = load(tmp_path / "whole" / "step_00000002.pt")
    trainer = Trainer(merge(config, {"run": str(tmp_path / "whole")}), half)
    for _ in range(2):
        trainer.train_step()
    trainer.batches.close()
    resumed = trainer.checkpoint()
    for part in ("model", "ema"):
        ours, theirs = getattr(resumed, part), getattr(whole, part)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    if config is ADVERSARIAL:
        assert whole.memory["calls"] == resumed.memory["calls"] == 4
    else:  # the average has batch norm statistics of its own, or it would be of no use
        mean = whole.ema["norm.running_mean"]
        assert mean.abs().max() > 0 and not torch.equal(mean, whole.model["norm.running_mean"])


def test_the_program_says_how_to_go_on(tmp_path, capsys):
    options = ["--run", str(tmp_path / "run"), "--steps", "1", "--preview.count", "1", "--batch-size", "1"]
    train_main(["--preset", "digits-walt-tokenizer", *options])
    assert f"measure with: python -m models.measure {tmp_path / 'run'}" in capsys.readouterr().out


def test_reduced_digits_are_judged_by_reduced_digits():
    trained, judged = measure._sources(DataConfig(frames=2, size=(12, 18), reduce=3))
    assert trained.shape == judged.shape == (1, 2, 4, 6) and (len(trained), len(judged)) == (1438, 359)


def test_the_preview_shows_originals_over_reconstructions(tmp_path):
    trainer = Trainer(TINY)
    sheet = trainer.preview()
    trainer.batches.close()
    tall = 12 * 11  # frames of 12 are shown 11 times as large
    assert sheet.shape == (6 * (tall + 4) - 4, 5 * (tall + 4) - 4, 3)
    x, _, _ = Batches(MovingDigits(frames=5, size=(12, 12)), 3, 0, prefetch=0).batch(0)
    for i in range(3):
        shown = torch.from_numpy(sheet[2 * i * (tall + 4) :][:tall:11, :tall:11, 0].copy())
        assert torch.equal(shown, ((x[i, 0, 0] + 1) * 127.5).round().to(torch.uint8))


def test_a_vqgan_is_measured_and_keeps_its_scale(tmp_path):
    path = train(merge(QUANTISED, {"run": str(tmp_path / "run"), "steps": 1}))
    before = path.read_bytes()
    result = measure.run(measure.MeasureConfig(path, batches=1, batch_size=2, device="cpu"))
    assert result["least psnr"] <= result["psnr"] and path.read_bytes() == before


@pytest.mark.slow
def test_a_tokenizer_learns_is_measured_and_is_not_sampled(tmp_path):
    run = tmp_path / "run"
    path = train(merge(TINY, {"run": str(run), "steps": 60, "save_every": 60, "objective": {"laplacian_weight": 0.0}}))
    with open(run / "losses.csv") as file:
        losses = [float(line.split(",")[1]) for line in file.readlines()[1:]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    before = load(path)
    config = measure.MeasureConfig(run, batches=2, batch_size=4, device="cpu")
    result = measure.run(config)
    assert 5 < result["least psnr"] <= result["psnr"] < 40
    after = load(path)
    assert torch.equal(after.model["latent_std"], after.ema["latent_std"])
    assert not torch.equal(after.ema["latent_std"], before.ema["latent_std"])
    changed = {key for key in after.model if not torch.equal(after.model[key], before.model[key])}
    assert changed == {"latent_mean", "latent_std"}
    model, clip = after.build(), Batches(MovingDigits(frames=5, size=(12, 12)), 8, 1, prefetch=0).batch(0)[0]
    with torch.no_grad():
        z = model.encode(clip)
        torch.testing.assert_close(model.decode(z), model(clip)[0], rtol=1e-4, atol=1e-4)
    encoder = open_encoder(identify(run), torch.device("cpu"))
    torch.testing.assert_close(encoder.encode(to_bytes(clip)), z)
    torch.testing.assert_close(encoder.decode(z), model.decode(z).clamp(-1, 1))
    assert z.mean((0, 2, 3, 4)).abs().max() < 1e-4 and (z.std((0, 2, 3, 4), unbiased=False) - 1).abs().max() < 1e-3
    path.rename(run / "best.pt")
    with pytest.raises(ValueError, match=r"best\.pt is not named as its run named it"):
        measure.run(dataclasses.replace(config, checkpoint=run / "best.pt"))
    with av.open(str(run / "reconstructions.png")) as picture:
        assert picture.streams.video[0].height == 8 * 136 - 4
    with pytest.raises(ValueError, match="objective is 'reconstruction'; it may be one of flow, ddpm"):
        sample.run(sample.SampleConfig(run / "best.pt"))
