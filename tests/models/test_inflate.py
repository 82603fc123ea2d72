"""denoisers/inflate.py: a video model with an image model's weights makes the image model's frames."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cascade import STAGE_B, STAGE_C
from test_cascade import inputs as cascade_inputs
from torch import nn

from models.denoisers.cascade import Cascade
from models.denoisers.dit import DiT, DiTConfig
from models.denoisers.inflate import load_image_weights
from models.denoisers.layers import sincos

DIT = DiTConfig(
    input_size=(6, 8),
    patch=(2, 2),
    channels=3,
    width=32,
    depth=2,
    heads=4,
    num_classes=5,
    class_dropout=0.0,
    learn_sigma=True,
    qk_norm="rms",
)
FACTORIZED = replace(DIT, input_size=(4, 6, 8), patch=(1, 2, 2), attention="factorized", depth=4)


def randomized(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def image_of(config):
    """The image model that a Cascade for video is the inflation of."""
    levels = tuple(letters.replace("V", "") for letters in config.levels)
    shape = {"input_size": config.input_size[1:], "patch": config.patch[1:]}
    return replace(config, levels=levels, temporal_convolution=False, **shape)


def frames(x):
    """``[B, C, T, ...]`` as a batch of frames ``[B T, C, ...]``."""
    return x.transpose(1, 2).flatten(0, 1)


def per_frame(model, x, t, y, **given):
    """The image model's output for every frame, all in one batch."""
    count = x.shape[2]
    y = None if y is None else y.repeat_interleave(count)
    given = {name: frames(value) for name, value in given.items()}
    out = model(frames(x), t.repeat_interleave(count), y, **given)
    return out.unflatten(0, (-1, count)).transpose(1, 2)


@pytest.mark.parametrize("config", [STAGE_C, STAGE_B], ids="CB")
def test_cascade(config):
    config = replace(config, num_classes=5, temporal_convolution=True)
    image, video = randomized(Cascade(image_of(config)), 0), randomized(Cascade(config), 1)
    load_image_weights(video, image.state_dict())
    x, t, y, given = cascade_inputs(config)
    out = video(x, t, y, **given)
    torch.testing.assert_close(out, per_frame(image, x, t, y, **given), rtol=1e-5, atol=1e-5)

    # Bit for bit where the products have the same shapes, which decide how they round: of a clip of one frame, and
    # against the same model of video without what passes between frames.
    one = Cascade(replace(config, input_size=(1, *config.input_size[1:]))).eval()
    load_image_weights(one, image.state_dict())
    first = {name: value[:, :, :1] for name, value in {"x": x, **given}.items()}
    still_image = {name: value.squeeze(2) for name, value in first.items()}
    assert torch.equal(one(t=t, y=y, **first).squeeze(2), image(t=t, y=y, **still_image))
    still = Cascade(replace(config, levels=image_of(config).levels, temporal_convolution=False)).eval()
    load_image_weights(still, image.state_dict())
    assert torch.equal(out, still(x, t, y, **given))
    # It is to be trained on from there.
    out.square().mean().backward()
    for name, parameter in video.named_parameters():
        if name.endswith(("V.proj.weight", ".temporal")):
            assert parameter.count_nonzero() == 0 and parameter.grad.abs().max() > 0, name


def dit_inputs(config):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, *config.input_size, generator=generator)
    return x, torch.tensor([20.0, 700.0]), torch.tensor([1, 5])


def test_factorized_dit():
    image, video = randomized(DiT(DIT), 0), randomized(DiT(FACTORIZED), 1)
    x, t, y = dit_inputs(FACTORIZED)
    load_image_weights(video, image.state_dict())
    torch.testing.assert_close(video(x, t, y), per_frame(image, x, t, y), rtol=1e-4, atol=1e-5)
    video(x, t, y).square().mean().backward()
    gates = video.blocks[1].adaLN_modulation[1]
    assert gates.weight.count_nonzero() == 0 and gates.weight.grad.abs().max() > 0

    load_image_weights(video, image.state_dict(), frame_positions=True)
    out, expected = video(x, t, y), per_frame(image, x, t, y)
    torch.testing.assert_close(out[:, :, 0], expected[:, :, 0], rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(out[:, :, i], expected[:, :, i], atol=1e-2) for i in (1, 2, 3))
    offsets = (video.pos_embed - image.pos_embed.repeat(1, 4, 1)).unflatten(1, (4, 12))
    steps = (sincos(torch.arange(4), 32) - sincos(torch.zeros(4), 32)).float()
    torch.testing.assert_close(offsets, steps[:, None].expand(1, 4, 12, 32), rtol=0, atol=1e-6)


def test_without_frame_positions_the_order_of_frames_is_unknown():
    """Why frame_positions is there: with the image's positions attention over time cannot tell frames apart."""
    image, video = randomized(DiT(DIT), 0), DiT(FACTORIZED).eval()
    x, t, y = dit_inputs(FACTORIZED)
    for known in (False, True):
        load_image_weights(video, image.state_dict(), frame_positions=known)
        for block in video.blocks[1::2]:
            nn.init.normal_(block.adaLN_modulation[1].weight, std=0.2, generator=torch.Generator().manual_seed(0))
        turned = video(x.flip(2), t, y).flip(2)
        assert torch.allclose(video(x, t, y), turned, atol=1e-4) != known


@pytest.mark.parametrize("attention", ["joint", "factorized"])
@pytest.mark.parametrize("patch", ["first", "mean"])
def test_tokens_of_two_frames(patch, attention):
    """Of a clip that stands still every frame is what the image model makes; "first" reads one frame of two only."""
    config = replace(FACTORIZED, patch=(2, 2, 2), attention=attention, depth=4 if attention == "factorized" else 2)
    image, video = randomized(DiT(DIT), 0), randomized(DiT(config), 1)
    load_image_weights(video, image.state_dict(), patch=patch)
    x, t, y = dit_inputs(config)
    still = x[:, :, :1].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(video(still, t, y), per_frame(image, still, t, y), rtol=1e-4, atol=1e-5)
    if attention == "factorized":
        pairs = x.unflatten(2, (2, 2))
        seen = pairs[:, :, :, 0] if patch == "first" else pairs.mean(3)
        expected = per_frame(image, seen, t, y).repeat_interleave(2, dim=2)
        torch.testing.assert_close(video(x, t, y), expected, rtol=1e-4, atol=1e-5)


def test_refuses():
    state, video = DiT(DIT).state_dict(), DiT(FACTORIZED)
    with pytest.raises(TypeError, match="model is a Linear"):
        load_image_weights(nn.Linear(1, 1), state)
    with pytest.raises(ValueError, match="model is for images"):
        load_image_weights(DiT(DIT), state)
    with pytest.raises(ValueError, match="patch is 'last'; it may be 'first' or 'mean'"):
        load_image_weights(video, state, patch="last")
    with pytest.raises(ValueError, match="a Cascade has no positions to add to"):
        load_image_weights(Cascade(STAGE_C), {}, frame_positions=True)
    before = {name: value.clone() for name, value in video.state_dict().items()}
    with pytest.raises(ValueError, match=r"image_state has 'blocks\.2\..*', for which the model has no place"):
        load_image_weights(video, DiT(replace(DIT, depth=3)).state_dict())
    with pytest.raises(ValueError, match=r"image_state is without 'blocks\.2\."):
        load_image_weights(video, DiT(replace(DIT, depth=1)).state_dict())
    with pytest.raises(ValueError, match=r"'y_embedder\.embedding_table\.weight' makes shape \(5, 32\)"):
        load_image_weights(video, DiT(replace(DIT, num_classes=4)).state_dict())
    with pytest.raises(ValueError, match=r"image_state is without 'embedding\.weight'"):
        load_image_weights(Cascade(STAGE_C), {})
    assert all(torch.equal(before[name], value) for name, value in video.state_dict().items())
