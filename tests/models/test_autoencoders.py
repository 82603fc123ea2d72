"""autoencoders/pretrained.py with tiny autoencoders of diffusers, made here with random weights."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from models.autoencoders.pretrained import load_autoencoder

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed: extra 'pretrained'"
)

TINY = {
    "AutoencoderKL": {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "shift_factor": 0.25,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLWan": {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "latents_mean": [0.5, -0.5, 1.0, 0.0],
        "latents_std": [2.0, 1.0, 0.5, 3.0],
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (4, 4, 8),
        "down_block_types": ("CogVideoXDownBlock3D",) * 3,
        "up_block_types": ("CogVideoXUpBlock3D",) * 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 0.7,
    },
}
# Cells of space and of time, and the mean and the standard deviation that the latents are brought to 0 and 1 from.
EXPECTED = {
    "AutoencoderKL": (2, 1, [0.25] * 4, [2.0] * 4),
    "AutoencoderKLWan": (4, 4, [0.5, -0.5, 1.0, 0.0], [2.0, 1.0, 0.5, 3.0]),
    "AutoencoderKLCogVideoX": (4, 4, [0.0] * 4, [1 / 0.7] * 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import diffusers

    folder = tmp_path_factory.mktemp("autoencoders")
    for kind, options in TINY.items():
        torch.manual_seed(0)
        getattr(diffusers, kind)(**options).save_pretrained(folder / kind)
    return folder


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@needs_diffusers
@pytest.mark.parametrize("kind", TINY)
def test_latents_are_scaled_as_the_config_says(folder, kind):
    space, time, mean, std = EXPECTED[kind]
    ours = load_autoencoder(folder / kind)
    assert (ours.kind, ours.channels, ours.spatial, ours.temporal) == (kind, 4, space, time)
    assert not ours.model.training and not any(p.requires_grad for p in ours.model.parameters())
    video = clip(9)
    with torch.no_grad():
        if kind == "AutoencoderKL":  # image by image
            parts = [ours.model.encode(video[:, :, i]).latent_dist.mode() for i in range(9)]
            z, decode = torch.stack(parts, 2), [ours.model.decode(part).sample for part in parts]
            pixels = torch.stack(decode, 2)
        else:
            z = ours.model.encode(video).latent_dist.mode()
            pixels = ours.model.decode(z).sample
    latents = ours.encode(video)
    column = [torch.tensor(values).reshape(-1, 1, 1, 1) for values in (mean, std)]
    torch.testing.assert_close(latents, (z - column[0]) / column[1])
    assert latents.shape == (2, *ours.latent_shape(9, 16, 24)) == (2, 4, 1 + 8 // time, 16 // space, 24 // space)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    again = ours.decode(latents)
    assert again.shape[1:] == ours.clip_shape(*latents.shape[2:]) == (3, 9, 16, 24)
    torch.testing.assert_close(again, pixels.clamp(-1, 1))
    assert ours.decode(100 * latents).abs().max() <= 1


@needs_diffusers
@pytest.mark.parametrize("kind", TINY)
def test_an_image_is_one_latent_frame(folder, kind):
    ours = load_autoencoder(folder / kind)
    image = clip(1)
    latents = ours.encode(image)
    assert latents.shape[2] == 1 and ours.decode(latents).shape == image.shape
    assert ours.latent_shape(1, 16, 24)[1] == 1 and ours.clip_shape(1, 4, 6)[1] == 1


@needs_diffusers
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderKLWan"])
def test_the_first_latent_frame_is_that_of_the_first_frame_alone(folder, kind):
    # CogVideoX's group norms mix the frames of a chunk.
    ours = load_autoencoder(folder / kind)
    video = clip(9)
    torch.testing.assert_close(ours.encode(video)[:, :, :1], ours.encode(video[:, :, :1]))


@needs_diffusers
def test_the_mode_or_a_sample(folder):
    ours = load_autoencoder(folder / "AutoencoderKL")
    video = clip(2)
    draws = [ours.encode(video, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(ours.encode(video), ours.encode(video)) and not torch.equal(ours.encode(video), draws[0])


@needs_diffusers
@pytest.mark.parametrize("kind", TINY)
def test_half_precision_inside_float32_outside(folder, kind):
    exact, half = load_autoencoder(folder / kind), load_autoencoder(folder / kind, dtype=torch.bfloat16)
    latents = half.encode(clip(1))
    assert latents.dtype == torch.float32 and half.decode(latents).dtype == torch.float32
    error = (latents - exact.encode(clip(1))).abs().max()
    assert 0 < error < 0.1 * latents.abs().max()


@needs_diffusers
def test_frames_and_sizes_that_do_not_divide_are_refused(folder):
    kl, wan, cog = (load_autoencoder(folder / kind) for kind in TINY)
    assert [kl.latent_shape(frames, 8, 8)[1] for frames in (1, 2, 5)] == [1, 2, 5]
    assert [wan.latent_shape(frames, 8, 8)[1] for frames in (1, 5, 9, 81)] == [1, 2, 3, 21]
    assert [cog.latent_shape(frames, 8, 8)[1] for frames in (1, 9, 49)] == [1, 3, 13]
    for frames in (0, 2, 4, 8):
        with pytest.raises(ValueError, match=rf"frames is {frames}; AutoencoderKLWan takes 1 \+ a multiple of 4"):
            wan.latent_shape(frames, 8, 8)
    with pytest.raises(ValueError, match=r"number of frames is 5; AutoencoderKLCogVideoX takes 1 \+ a multiple of 8"):
        cog.encode(clip(5))
    with pytest.raises(ValueError, match=r"latent frames is 2; AutoencoderKLCogVideoX takes 1 \+ a multiple of 2"):
        cog.decode(torch.zeros(1, 4, 2, 4, 4))
    # Why: two latent frames would be 8 frames, not 5.
    assert cog.model.decode(torch.zeros(1, 4, 2, 4, 4)).sample.shape[2] == 8
    with pytest.raises(ValueError, match="height is 6; AutoencoderKLWan takes a multiple of 4"):
        wan.encode(clip(1, height=6))
    with pytest.raises(ValueError, match="width is 7; AutoencoderKL takes a multiple of 2"):
        kl.encode(clip(1, width=7))
    with pytest.raises(ValueError, match=r"video has shape .* it must be \[B, 3, T, H, W\]"):
        kl.encode(clip(1)[:, :1])
    with pytest.raises(ValueError, match=r"latents have shape .* it must be \[B, 4, T', H', W'\]"):
        kl.decode(torch.zeros(1, 3, 1, 4, 4))


@needs_diffusers
def test_wan_in_patches(tmp_path):
    """Wan 2.2's form: pixels go to channels first, which halves the grid once more."""
    import diffusers

    options = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "dim_mult": [1, 2, 2]}
    diffusers.AutoencoderKLWan(**TINY["AutoencoderKLWan"] | options).save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    assert ours.spatial == 8
    latents = ours.encode(clip(5))
    assert latents.shape == (2, 4, 2, 2, 3) and ours.decode(latents).shape == (2, 3, 5, 16, 24)


@needs_diffusers
def test_a_pipeline_holds_one_in_a_subfolder(folder, tmp_path):
    (tmp_path / "vae").symlink_to(folder / "AutoencoderKLWan")
    assert load_autoencoder(tmp_path, subfolder="vae").kind == "AutoencoderKLWan"


@needs_diffusers
def test_what_cannot_be_loaded_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for missing in (str(tmp_path / "nowhere"), "someone/no-such-autoencoder"):
        with pytest.raises(ValueError, match=f"autoencoder '{missing}' is neither a folder with one nor"):
            load_autoencoder(missing)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="is a VQModel; it may be one of AutoencoderKL, AutoencoderKLWan"):
        load_autoencoder(tmp_path)
    source = folder / "AutoencoderKL"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_autoencoder(tmp_path)
    weights = load_file(source / "diffusion_pytorch_model.safetensors")
    del weights["post_quant_conv.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights, post_quant_conv\.bias"):
        load_autoencoder(tmp_path)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="package 'diffusers' is needed: pip install diffusers"):
        load_autoencoder(tmp_path)
