"""Published weights: a file of any form gives a run that computes what the original does, and goes back bit for bit."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import checkpoint as checkpoints
from models.convert import main as convert
from models.data.media import write_png
from models.denoisers.dit import DiT, DiTConfig
from models.denoisers.layers import frame_positions, grid_positions
from models.denoisers.stdit import STDiTConfig
from models.denoisers.walt_config import WALTConfig
from models.denoisers.walt_resize import resize
from models.objectives.flow import FlowMatching
from models.precompute import main as precompute
from models.registry import build
from models.runtime.plain import as_plain
from models.sample import main as sample
from models.train import main as train
from models.weights.start import start_from

safetensors = pytest.importorskip("safetensors.torch")

WIDTH, DEPTH, HEADS, CLASSES, SIDE = 48, 2, 3, 5, 8
CONFIG = DiTConfig(
    input_size=(SIDE, SIDE), channels=4, num_classes=CLASSES, width=WIDTH, depth=DEPTH, heads=HEADS, patch=(2, 2),
    learn_sigma=True,
)  # fmt: skip


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names of Meta's DiT."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "pos_embed": (1, SIDE * SIDE // 4, WIDTH),
        "x_embedder.proj.weight": (WIDTH, 4, 2, 2),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (2 * 2 * 8, WIDTH),
        "final_layer.linear.bias": (2 * 2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for i in range(DEPTH):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
            ("adaLN_modulation.1", 6 * WIDTH, WIDTH),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(w, h, name):
    return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])


def modulate(h, shift, scale):
    return F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def condition(w, t, y):
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear(w, torch.cat((angles.cos(), angles.sin()), -1), "t_embedder.mlp.0")
    return F.silu(linear(w, F.silu(c), "t_embedder.mlp.2") + w["y_embedder.embedding_table.weight"][y])


def block(w, i, h, c):
    """A block of Peebles & Xie 2022 on ``h [B, N, D]`` under ``c [B, D]``."""
    parts = linear(w, c, f"blocks.{i}.adaLN_modulation.1").chunk(6, -1)
    qkv = linear(w, modulate(h, *parts[:2]), f"blocks.{i}.attn.qkv")
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    a = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = h + parts[2][:, None] * linear(w, a, f"blocks.{i}.attn.proj")
    m = F.gelu(linear(w, modulate(h, *parts[3:5]), f"blocks.{i}.mlp.fc1"), approximate="tanh")
    return h + parts[5][:, None] * linear(w, m, f"blocks.{i}.mlp.fc2")


def patches(w, x):
    return F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).mT + w["pos_embed"]


def pixels(w, h, c):
    h = linear(w, modulate(h, *linear(w, c, "final_layer.adaLN_modulation.1").chunk(2, -1)), "final_layer.linear")
    rows = SIDE // 2
    return torch.einsum("nhwpqc->nchpwq", h.reshape(-1, rows, rows, 2, 2, 8)).reshape(-1, 8, SIDE, SIDE)


def original(w, x, t, y):
    """DiT from its equations, in plain functions: ``[B, 8, H, W]``."""
    c, h = condition(w, t, y), patches(w, x)
    for i in range(DEPTH):
        h = block(w, i, h, c)
    return pixels(w, h, c)


def original_latte(w, x, t, y):
    """Latte from its description: space and time in turns, frames' positions after the first block."""
    batch, frames = x.shape[0], x.shape[2]
    c, h = condition(w, t, y), patches(w, x.transpose(1, 2).flatten(0, 1))  # [B T, S, D]
    of_frames, of_places = c.repeat_interleave(frames, 0), c.repeat_interleave(h.shape[1], 0)
    for i in range(DEPTH):
        if i % 2 == 0:
            h = block(w, i, h, of_frames)
        else:
            h = h.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)  # [B S, T, D]
            h = block(w, i, h + w["temp_embed"] if i == 1 else h, of_places)
            h = h.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)
    return pixels(w, h, of_frames).unflatten(0, (batch, frames)).transpose(1, 2)


def write(kind: str, folder, weights) -> str:
    """The weights as a file of this kind; its path."""
    path = folder / f"w.{kind}"
    if kind == "safetensors":
        safetensors.save_file(weights, path)
    elif kind.endswith("index.json"):
        names, suffix = sorted(weights), "bin" if kind.startswith("bin") else "safetensors"
        parts = {f"w-{i}.{suffix}": {name: weights[name] for name in names[i::2]} for i in range(2)}
        for name, part in parts.items():
            (torch.save if suffix == "bin" else safetensors.save_file)(part, folder / name)
        path.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    elif kind == "pth":  # of DiT's train.py, in parallel
        wrapped = {f"module.{name}": value for name, value in weights.items()}
        other = {name: torch.zeros_like(value) for name, value in wrapped.items()}
        torch.save({"model": other, "ema": wrapped, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind != "ckpt")  # older torches wrote the other form
    return str(path)


KINDS = ["pt", "pth", "safetensors", "index.json", "bin.index.json", "ckpt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_dit_is_the_original(kind, tmp_path):
    weights = published()
    convert(["dit", write(kind, tmp_path, weights), "--heads", "3", "--out", str(tmp_path / "run")])
    _, checkpoint = checkpoints.latest(tmp_path / "run")
    model = checkpoint.build().eval()
    assert model.config == CONFIG and checkpoint.train["objective"]["name"] == "ddpm"
    x, t, y = torch.randn(3, 4, SIDE, SIDE), torch.tensor([0.0, 17, 999]), torch.tensor([0, 4, CLASSES])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), original(weights, x, t, y), rtol=1e-4, atol=1e-4)
    convert(["dit", str(tmp_path / "run"), "--to", str(tmp_path / "back.pt")])
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_another_part_of_a_training_script_s_file(tmp_path):
    file = write("pth", tmp_path, published())
    convert(["dit", file, "--heads", "3", "--part", "model", "--out", str(tmp_path / "run")])
    assert not checkpoints.latest(tmp_path / "run")[1].ema["blocks.0.attn.qkv.weight"].any()
    with pytest.raises(SystemExit, match=r"part is 'module'; .* has ema, model"):
        convert(["dit", file, "--heads", "3", "--part", "module", "--out", str(tmp_path / "other")])


def test_sit_is_told_t_and_loses_the_channels_that_it_does_not_train(tmp_path, capsys):
    weights = published(1)
    convert(["sit", write("pt", tmp_path, weights), "--heads", "3", "--out", str(tmp_path / "run")])
    assert "dropped 4 of 8 output channels, which SiT does not train" in capsys.readouterr().out
    _, checkpoint = checkpoints.latest(tmp_path / "run")
    model, x, y = checkpoint.build().eval(), torch.randn(2, 4, SIDE, SIDE), torch.tensor([1, 2])
    t = torch.tensor([0.25, 0.8])
    with torch.no_grad():
        velocity = FlowMatching(time_scale=1.0).velocity(model, x, t, y)
        torch.testing.assert_close(velocity, original(weights, x, t, y)[:, :4], rtol=1e-4, atol=1e-4)
    convert(["sit", str(tmp_path / "run"), "--to", str(tmp_path / "back.safetensors")])
    back = safetensors.load_file(tmp_path / "back.safetensors")
    with torch.no_grad():
        assert torch.equal(original(back, x, t, y)[:, :4], original(weights, x, t, y)[:, :4])
        assert not original(back, x, t, y)[:, 4:].any()


def test_a_converted_latte_is_the_original(tmp_path):
    weights = published(3) | {"temp_embed": torch.randn(1, 3, WIDTH)}
    convert(["latte", write("pt", tmp_path, weights), "--heads", "3", "--out", str(tmp_path / "run")])
    model = checkpoints.latest(tmp_path / "run")[1].build().eval()
    x, t, y = torch.randn(2, 4, 3, SIDE, SIDE), torch.tensor([3.0, 800]), torch.tensor([0, CLASSES])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), original_latte(weights, x, t, y), rtol=1e-4, atol=1e-4)
        # With as many frames as it was made for, or with others, of which it makes the positions itself.
        weights["temp_embed"] = frame_positions(2, WIDTH)
        model.any_size, x = True, x[:, :, :2]
        model.pos_embed.copy_(grid_positions((3, SIDE // 2, SIDE // 2), WIDTH, video=False))
        weights["pos_embed"] = grid_positions((1, SIDE // 2, SIDE // 2), WIDTH, video=False)
        torch.testing.assert_close(model(x, t, y), original_latte(weights, x, t, y), rtol=1e-4, atol=1e-4)


def test_latte_goes_back_bit_for_bit(tmp_path):
    weights = published(3) | {"temp_embed": torch.randn(1, 3, WIDTH)}
    convert(["latte", write("pt", tmp_path, weights), "--heads", "3", "--out", str(tmp_path / "run")])
    convert(["latte", str(tmp_path / "run"), "--to", str(tmp_path / "back.safetensors")])
    back = safetensors.load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    with pytest.raises(SystemExit, match="only an image DiT"):
        convert(["dit", str(tmp_path / "run"), "--to", str(tmp_path / "other.pt")])


def test_every_parameter_of_a_latte_with_late_frames_has_the_gradient_of_its_equation(tmp_path):
    weights = published(3) | {"temp_embed": torch.randn(1, 3, WIDTH)}
    convert(["latte", write("pt", tmp_path, weights), "--heads", "3", "--out", str(tmp_path / "run")])
    model = checkpoints.latest(tmp_path / "run")[1].build().train()
    x, t, y = torch.randn(2, 4, 3, SIDE, SIDE), torch.tensor([3.0, 800]), torch.tensor([0, 2])
    upstream = torch.randn(2, 8, 3, SIDE, SIDE)
    model.y_embedder.dropout = 0.0
    wanted = {name: value.clone().requires_grad_() for name, value in weights.items()}
    original_latte(wanted, x, t, y).backward(upstream)
    for checkpointing in (False, True):
        model.zero_grad()
        model.checkpointing = checkpointing
        model(x, t, y).backward(upstream)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                exact = wanted[name].grad
                torch.testing.assert_close(parameter.grad.reshape(exact.shape), exact, rtol=1e-3, atol=1e-3)


def test_latents_without_an_autoencoder_are_not_sampled(tmp_path):
    convert(["sit", write("pt", tmp_path, published(2)), "--heads", "3", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="makes latents of 4 channels and names no autoencoder"):
        sample([str(tmp_path / "run"), "--count", "1", "--steps", "1"])


def test_pictures_from_a_converted_dit_and_an_autoencoder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**options, **kinds).save_pretrained(tmp_path / "vae")
    weights = published()
    weights["final_layer.linear.weight"] *= 0.01
    file = write("pt", tmp_path, weights)
    convert(["dit", file, "--heads", "3", "--autoencoder", str(tmp_path / "vae"), "--out", str(tmp_path / "run")])
    sample([str(tmp_path / "run"), "--class", "2", "4", "--guidance", "4", "--count", "2", "--steps", "3"])
    with np.load(tmp_path / "run" / "samples" / "samples.npz") as arrays:
        assert arrays["clips"].shape == (2, 1, 2 * SIDE, 2 * SIDE, 3)


def harmful(weights, tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"model": weights, "hook": print}, path)
    return path


def cut(weights, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-4000])
    return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (harmful, "is refused: it holds more than tensors and plain values"),
        (cut, "is not a file that torch wrote, or is not whole"),
        (lambda w, p: w.pop("blocks.1.attn.qkv.bias"), "missing: blocks.1.attn.qkv.bias [144]"),
        (lambda w, p: w.update(extra=torch.ones(2)), "unknown: extra [2]"),
        (lambda w, p: w.update(pos_embed=torch.ones(1, 16, 8)), "misshapen: pos_embed [1, 16, 8], the model has"),
        (lambda w, p: w.update(pos_embed=torch.ones(1, 15, WIDTH)), "size must be named: 15 tokens are no square"),
        (lambda w, p: w.pop("pos_embed"), "the file has no tensor 'pos_embed'"),
        (lambda w, p: p / "none.pt", "none.pt is not there"),
        (lambda w, p: p, "has no file of weights"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(spoil, message, tmp_path):
    weights = published()
    path = spoil(weights, tmp_path)
    path = path if hasattr(path, "exists") else write("pt", tmp_path, weights)
    with pytest.raises(SystemExit) as error:
        convert(["dit", str(path), "--heads", "3", "--out", str(tmp_path / "run")])
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_heads_are_named_or_known(tmp_path, capsys):
    with pytest.raises(SystemExit, match="heads must be named: no published DiT has width 48 and depth 2"):
        convert(["dit", write("pt", tmp_path, published()), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="exists already"):
        convert(["dit", str(tmp_path / "w.pt"), "--heads", "3", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        convert(["dit", str(tmp_path / "w.pt")])
    assert "one of out, to and adapters must be given" in capsys.readouterr().err


def test_training_starts_from_weights(tmp_path, caplog):
    digits = ["--preset", "digits", "--data.frames", "2", "--data.size", "12", "12", "--preview.count", "1"]
    digits += ["--model.width", "24", "--model.depth", "1", "--model.heads", "1", "--batch-size", "2"]
    train([*digits, "--steps", "2", "--run", str(tmp_path / "first")])
    _, first = checkpoints.latest(tmp_path / "first")
    train(
        [
            "--init",
            str(tmp_path / "first"),
            "--steps",
            "1",
            "--optimizer.learning-rate",
            "1e-12",
            "--run",
            f"{tmp_path}/b",
        ]
    )
    path, second = checkpoints.latest(tmp_path / "b")
    assert second.train["init"] == str(tmp_path / "first") and second.step == 1
    for name, value in first.ema.items():
        torch.testing.assert_close(second.model[name], value, rtol=0, atol=1e-10)
    # Another length and another number of classes: positions interpolated, rows by name.
    (tmp_path / "clips.csv").write_text("path,label\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(("7", "new"))))
    for i in range(2):
        write_png(tmp_path / f"{i}.png", np.full((16, 16, 3), 90 * i, np.uint8))
    with pytest.raises(SystemExit, match="its model takes 1 channels, the data have 3"):
        train(["--init", str(path), "--data.source", str(tmp_path / "clips.csv"), "--run", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()
    train(["--init", str(path), "--data.size", "12", "20", "--steps", "1", "--run", str(tmp_path / "d")])
    assert "the positions are fitted to 1 x 3 x 5 tokens; the weights had 1 x 3 x 3" in caplog.text


def test_training_starts_from_converted_weights_on_latents(tmp_path):
    for i in range(3):
        (tmp_path / "clips" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / "clips" / f"{i % 2}" / f"{i}.png", np.full((16, 16, 3), 90 * i, np.uint8))
    pixels = ["--data.source", str(tmp_path / "clips"), "--data.frames", "1", "--data.size", "8", "8"]
    precompute([*pixels, "--encoder", "pixels", "--out", str(tmp_path / "latents")])
    weights = published()  # of an RGB image in place of four channels of latents
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :3].clone()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = weights[name][:24].clone()
    file = write("pt", tmp_path, weights)
    convert(["dit", file, "--heads", "3", "--out", str(tmp_path / "run")])
    start = ["--init", str(tmp_path / "run"), "--steps", "1", "--batch-size", "2", "--preview.count", "1"]
    train([*start, "--data.source", str(tmp_path / "latents"), "--run", str(tmp_path / "mine")])
    _, checkpoint = checkpoints.latest(tmp_path / "mine")
    assert checkpoint.step == 1 and checkpoint.classes == ["0", "1"]
    table = checkpoint.ema["y_embedder.embedding_table.weight"]
    assert table.shape[0] == 3
    (tmp_path / "flat").mkdir()
    write_png(tmp_path / "flat" / "a.png", np.zeros((16, 16, 3), np.uint8))
    flat = ["--data.source", str(tmp_path / "flat"), "--data.frames", "1", "--data.size", "8", "8"]
    with pytest.raises(SystemExit, match="its model has 5 classes, the data 0; each sub-folder of clips is a class"):
        train([*start, *flat, "--run", str(tmp_path / "other")])
    convert(["dit", write("pth", tmp_path, published()), "--heads", "3", "--out", str(tmp_path / "four")])
    with pytest.raises(SystemExit, match="its model takes 4 channels, the data have 3"):
        train(["--init", str(tmp_path / "four"), *start[2:], *pixels, "--run", str(tmp_path / "other")])


def test_classes_keep_their_rows_by_name():
    torch.manual_seed(0)
    values = dict(input_size=(4, 4), channels=1, width=8, depth=1, heads=1, patch=(2, 2))
    old, new = DiT(DiTConfig(**values, num_classes=3)), DiT(DiTConfig(**values, num_classes=2))
    before = new.y_embedder.embedding_table.weight.detach().clone()
    saved = checkpoints.Checkpoint({}, as_plain(old.config), ["a", "b", "c"], 0, {}, old.state_dict(), {}, {})
    start_from(new, saved, ["c", "z"])
    rows, table = new.y_embedder.embedding_table.weight, old.y_embedder.embedding_table.weight
    assert torch.equal(rows[0], table[2]) and torch.equal(rows[1], before[1]) and torch.equal(rows[2], table[3])
    assert torch.equal(new.blocks[0].attn.qkv.weight, old.blocks[0].attn.qkv.weight)


SHAPE = {"channels": 1, "width": 16, "depth": 2, "heads": 2, "patch": (1, 2, 2)}


def started(config, other, scale=1.0):
    """A model of config ``other`` that starts from one of ``config``, whose positions in a frame are scaled."""
    torch.manual_seed(0)
    old, new = build(config), build(other)
    with torch.no_grad():
        for _name, parameter in old.named_parameters():
            if parameter.requires_grad:
                parameter.normal_()
        if hasattr(old, "pos_embed"):
            old.pos_embed *= scale
    start_from(new, checkpoints.Checkpoint({}, as_plain(config), [], 0, {}, old.state_dict(), {}, {}), [])
    return old.state_dict(), new.state_dict()


@pytest.mark.parametrize("kind", ["dit", "concatenation", "latte", "stdit"])
def test_another_size_and_length_interpolates_the_positions(kind, caplog):
    special = {"concatenation": {"positions": kind}, "latte": {"attention": "factorized", "late_frames": True}}
    make = STDiTConfig if kind == "stdit" else functools.partial(DiTConfig, **special.get(kind, {}))
    before, after = make(input_size=(2, 4, 4), **SHAPE), make(input_size=(3, 4, 8), **SHAPE)
    old, new = started(before, after, scale=0.5)
    assert caplog.messages == ["the positions are fitted to 3 x 2 x 4 tokens; the weights had 2 x 2 x 2"]
    frame = old["pos_embed"][0, :4].reshape(2, 2, 16)
    shares = torch.tensor([1.0, 0.75, 0.25, 0.0])[:, None]
    columns = shares * frame[:, :1] + (1 - shares) * frame[:, 1:]
    clip = new["pos_embed"].reshape(3, 2, 4, 16)
    torch.testing.assert_close(clip[0], columns)
    fresh = build(after).pos_embed.reshape(3, 2, 4, 16)  # later frames differ from it as those of any model do
    torch.testing.assert_close(clip - clip[:1], fresh - fresh[:1])
    for name in ("temp_embed", "pos_embed_temporal"):
        if name in old:
            torch.testing.assert_close(new[name][:, :2], old[name])
            assert new[name].shape[1] == 3
    changed = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
    assert changed <= {"pos_embed", "temp_embed", "pos_embed_temporal"} and "pos_embed" in changed


def test_positions_of_frames_that_are_scaled_are_interpolated():
    before, after = (STDiTConfig(input_size=(frames, 4, 4), **SHAPE) for frames in (2, 4))
    torch.manual_seed(0)
    old, new = build(before), build(after)
    with torch.no_grad():
        old.pos_embed_temporal += 1
    start_from(new, checkpoints.Checkpoint({}, as_plain(before), [], 0, {}, old.state_dict(), {}, {}), [])
    first, last = old.pos_embed_temporal[0]
    expected = torch.stack((first, 0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last, last))
    torch.testing.assert_close(new.pos_embed_temporal[0], expected)


def test_walt_starts_on_another_grid():
    shape = {**SHAPE, "depth": 2, "spatial_window": (4, 4), "spatiotemporal_window": (3, 2, 2)}
    before, after = WALTConfig(input_size=(3, 8, 8), **shape), WALTConfig(input_size=(5, 16, 8), **shape)
    old, new = started(before, after)
    expected = resize(old, before, after)
    assert all(torch.equal(new[name], expected[name]) for name in expected) and new["pos_space"].shape == (8, 4, 16)


def test_init_compares_the_checksum_once(tmp_path, monkeypatch):
    digits = ["--preset", "digits", "--data.frames", "2", "--data.size", "12", "12", "--preview.count", "1"]
    digits += ["--model.width", "24", "--model.depth", "1", "--model.heads", "1", "--batch-size", "2", "--steps", "1"]
    train([*digits, "--run", str(tmp_path / "first")])
    read, compare = [], checkpoints._has_checksum
    monkeypatch.setattr(checkpoints, "_has_checksum", lambda path: read.append(path) or compare(path))
    train(["--init", str(tmp_path / "first"), "--steps", "1", "--run", str(tmp_path / "second")])
    assert read == [tmp_path / "first" / "step_00000001.pt"]
    # Damage is seen all the same.
    content = bytearray(read[0].read_bytes())
    content[len(content) // 2] ^= 1
    read[0].write_bytes(content)
    with pytest.raises(SystemExit, match="its checksum is not that of its content"):
        train(["--init", str(read[0]), "--steps", "1", "--run", str(tmp_path / "third")])
    assert not (tmp_path / "third").exists()


def test_weights_without_a_training_are_not_resumed(tmp_path):
    convert(["dit", write("pt", tmp_path, published()), "--heads", "3", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="has weights only, of no training; start one from them with --init"):
        train(["--resume", str(tmp_path / "run")])


def in_diffusers(**changes):
    """A DiT of diffusers with random weights, which sees t as Meta's code does."""
    diffusers = pytest.importorskip("diffusers")
    values = dict(num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=8)
    values |= dict(num_layers=DEPTH, sample_size=SIDE, patch_size=2, num_embeds_ada_norm=CLASSES) | changes
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**values).eval()
    embedders = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            same = name.split(".emb.")[-1]  # of all blocks
            parameter.copy_(embedders.setdefault(same, parameter.clone()) if ".emb." in name else parameter)
    for layer in model.transformer_blocks:
        layer.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def test_dit_of_diffusers_and_back(tmp_path):
    theirs = in_diffusers()
    theirs.save_pretrained(tmp_path / "transformer")
    convert(["dit", str(tmp_path / "transformer"), "--out", str(tmp_path / "run")])
    _, checkpoint = checkpoints.latest(tmp_path / "run")
    ours = checkpoint.build().eval()
    x, t, y = torch.randn(3, 4, SIDE, SIDE), torch.tensor([3, 500, 999]), torch.tensor([0, 2, CLASSES])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t.float(), y), expected, rtol=1e-4, atol=1e-4)
    file = tmp_path / "back.safetensors"
    convert(["dit", str(tmp_path / "run"), "--to", str(file), "--names", "diffusers"])
    back, before = safetensors.load_file(file), theirs.state_dict()
    assert back.keys() == before.keys() and all(torch.equal(back[name], before[name]) for name in before)


def test_dit_of_diffusers_that_is_another(tmp_path):
    model = in_diffusers(num_layers=2)
    model.save_pretrained(tmp_path / "apart")
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    weights = model.state_dict() | {name: torch.ones(WIDTH)}
    safetensors.save_file(weights, tmp_path / "apart" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SystemExit, match=f"{name} is not that of block 0"):
        convert(["dit", str(tmp_path / "apart"), "--out", str(tmp_path / "run")])
    (tmp_path / "apart" / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    with pytest.raises(SystemExit, match=r"config\.json is of PixArt\w+; it must be of DiTTransformer2DModel"):
        convert(["dit", str(tmp_path / "apart"), "--out", str(tmp_path / "run")])
    for value in ("[8, 8]", "-8", "true", "null"):
        content = f'{{"_class_name": "DiTTransformer2DModel", "num_attention_heads": 3, "sample_size": {value}}}'
        (tmp_path / "apart" / "config.json").write_text(content)
        with pytest.raises(SystemExit, match=r"config\.json has sample_size .*; it must be a positive whole number"):
            convert(["dit", str(tmp_path / "apart"), "--out", str(tmp_path / "run")])
    narrow = model.state_dict() | {"transformer_blocks.0.attn1.to_k.weight": torch.ones(WIDTH, 3)}
    safetensors.save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(SystemExit, match=r"attn1\.to_v\.weight have shapes .*; they must have one"):
        hints = ["--heads", "3", "--size", "8", "8"]
        convert(["dit", str(tmp_path / "narrow.safetensors"), *hints, "--out", str(tmp_path / "run")])
    (tmp_path / "apart" / "config.json").unlink()
    with pytest.raises(SystemExit, match="size must be named: these weights have no positions"):
        convert(["dit", str(tmp_path / "apart"), "--heads", "3", "--out", str(tmp_path / "run")])
    weights = model.state_dict() | {"transformer_blocks.0.attn2.to_q.weight": torch.ones(3)}
    safetensors.save_file(weights, tmp_path / "more.safetensors")
    with pytest.raises(SystemExit, match=r"unknown: transformer_blocks\.0\.attn2\.to_q\.weight"):
        convert(
            ["dit", str(tmp_path / "more.safetensors"), "--heads", "3", "--size", "8", "8", "--out", f"{tmp_path}/r"]
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "r").exists()
    with pytest.raises(SystemExit):
        convert(["sit", str(tmp_path / "run"), "--to", str(tmp_path / "s.pt"), "--names", "diffusers"])


@pytest.mark.parametrize("attention", ["factorized", "joint"])
def test_an_image_model_becomes_a_video_model(attention, tmp_path):
    convert(["dit", write("pt", tmp_path, published()), "--heads", "3", "--out", str(tmp_path / "dit")])
    options = ["--frames", "3", "--attention", attention, "--out", str(tmp_path / "video")]
    convert(["video", str(tmp_path / "dit"), *options])
    _, checkpoint = checkpoints.latest(tmp_path / "video")
    video, image = checkpoint.build().eval(), checkpoints.latest(tmp_path / "dit")[1].build().eval()
    assert checkpoint.train["data"]["frames"] == 3 and checkpoint.step == 0
    x, t, y = (
        torch.randn(2, 4, 1, SIDE, SIDE).expand(-1, -1, 3, -1, -1),
        torch.tensor([5.0, 500.0]),
        torch.tensor([0, 3]),
    )
    with torch.no_grad():
        expected = image(x[:, :, 0], t, y)
        if attention == "factorized":
            torch.testing.assert_close(video(x, t, y)[:, :, 0], expected, rtol=1e-3, atol=1e-3)
        assert (video(x, t, y)[:, :, 1] - expected).abs().max() > 0.01  # positions tell the later frames apart
        video.pos_embed.copy_(image.pos_embed.repeat(1, 3, 1))
        torch.testing.assert_close(video(x, t, y), expected[:, :, None].expand(-1, -1, 3, -1, -1), rtol=1e-3, atol=1e-3)
    with pytest.raises(SystemExit, match="it must be of a DiT or Cascade for images"):
        convert(["video", str(tmp_path / "video"), "--frames", "2", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["video", "run", "--out", "new"], "frames is None; video needs out, and frames of at least 1"),
        (["video", "run", "--frames", "0", "--out", "new"], "frames is 0; video needs out"),
        (
            ["video", "run", "--frames", "2", "--heads", "3", "--out", "new"],
            "heads is 3; it goes with out, and not with",
        ),
        (["dit", "w.pt", "--frames", "2", "--out", "new"], "frames is 2; it goes with video"),
    ],
)
def test_options_of_video_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        convert(arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


MEMORY = """
import sys
from models.convert import main

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

for arguments in (sys.argv[1:7], ["dit", sys.argv[6], "--to", sys.argv[7]]):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    main(arguments)
    print("grew by", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_below_twice_the_file(kind, tmp_path):
    shape = {"width": 512, "depth": 4, "heads": 8, "patch": (2, 2)}
    model = DiT(DiTConfig(input_size=(SIDE, SIDE), channels=4, num_classes=CLASSES, learn_sigma=True, **shape))
    file = write(kind, tmp_path, model.state_dict())
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    to = "back.pt" if kind == "pt" else "back.safetensors"
    options = ["dit", file, "--heads", "8", "--out", str(tmp_path / "run"), str(tmp_path / to)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *options],
        **{"capture_output": True, "text": True, "env": environment, "check": True, "cwd": Path(__file__).parents[2]},
    )
    grew = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("grew by")]
    assert len(grew) == 2 and max(grew) < 1.7 * size, [bytes / size for bytes in grew]
    back = safetensors.load_file(tmp_path / to) if kind != "pt" else torch.load(tmp_path / to, weights_only=True)
    assert sum(value.nbytes for value in back.values()) == size
