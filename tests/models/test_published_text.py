"""Published video models with text: their files give models that compute what the originals do, guidance included."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import save_encoder

from models import checkpoint as checkpoints
from models.convert import main as convert
from models.data.text import TextEncoder
from models.denoisers.text import Text
from models.sample import main as sample
from models.sampling.predictor import Predictor
from models.train import main as train

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

WIDTH, DEPTH, HEADS, CHANNELS, FRAMES, SIDE = 48, 2, 3, 4, 3, 4
ROWS = 7
PLACES = SIDE * SIDE // 4


def draw(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linears(sizes):
    """Shapes of weight and bias of Linears by name and ``(out, in)``."""
    shapes = {}
    for name, (rows, columns) in sizes.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def shared():
    """What STDiT and VDiT have in common."""
    shapes = linears({"t_embedder.mlp.0": (WIDTH, 256), "t_embedder.mlp.2": (WIDTH, WIDTH)})
    shapes |= {"x_embedder.proj.weight": (WIDTH, CHANNELS, 1, 2, 2), "x_embedder.proj.bias": (WIDTH,)}
    return shapes | linears({"final_layer.linear": (4 * 2 * CHANNELS, WIDTH)})


def published_stdit(text_width):
    shapes = shared() | linears({"t_block.1": (6 * WIDTH, WIDTH)})
    shapes |= linears({"y_embedder.y_proj.fc1": (WIDTH, text_width), "y_embedder.y_proj.fc2": (WIDTH, WIDTH)})
    shapes |= {"y_embedder.y_embedding": (ROWS, text_width), "final_layer.scale_shift_table": (2, WIDTH)}
    shapes |= {"pos_embed": (1, PLACES, WIDTH), "pos_embed_temporal": (1, FRAMES, WIDTH)}
    for i in range(DEPTH):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, WIDTH)
        sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn_temp.qkv": (3 * WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH)}
        sizes |= {"cross_attn.kv_linear": (2 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        sizes |= dict.fromkeys(("attn.proj", "attn_temp.proj", "cross_attn.q_linear"), (WIDTH, WIDTH))
        sizes["cross_attn.proj"] = (WIDTH, WIDTH)
        shapes |= linears({f"blocks.{i}.{name}": size for name, size in sizes.items()})
    return draw(shapes)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(x):
    return F.layer_norm(x, (WIDTH,), eps=1e-6)


def mlp(w, name, x):
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x), approximate="tanh"))


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)


def attend(q, k, v):
    a = (heads(q) @ heads(k).mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ heads(v)
    return a.transpose(-2, -3).flatten(-2)


def self_attention(w, name, x):
    return linear(w, f"{name}.proj", attend(*linear(w, f"{name}.qkv", x).chunk(3, -1)))


def timestep(w, t):
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear(w, "t_embedder.mlp.0", torch.cat((angles.cos(), angles.sin()), -1))
    return linear(w, "t_embedder.mlp.2", F.silu(c))


def tokens(w, x):
    """``[B, T, S, D]``."""
    x = F.conv3d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=(1, 2, 2))
    return x.flatten(3).permute(0, 2, 3, 1)


def video(x):
    """``[B, T, S, 4 C]`` to ``[B, C, T, H, W]``."""
    half = SIDE // 2
    x = x.reshape(len(x), FRAMES, half, half, 2, 2, 2 * CHANNELS)
    return torch.einsum("nthwpqc->ncthpwq", x).reshape(-1, 2 * CHANNELS, FRAMES, SIDE, SIDE)


def original_stdit(w, x, t, captions):
    """Open-Sora's STDiT: one caption after the other, each as the rows that count, ``[n, E]``."""
    results = []
    for clip, time, caption in zip(x, t, captions, strict=True):
        y = mlp(w, "y_embedder.y_proj", caption)
        c = timestep(w, time[None])[0]
        t0 = linear(w, "t_block.1", F.silu(c)).reshape(6, WIDTH)
        h = tokens(w, clip[None])[0] + w["pos_embed"][0]
        for i in range(DEPTH):
            name = f"blocks.{i}"
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = t0 + w[f"{name}.scale_shift_table"]
            h = h + gate * self_attention(w, f"{name}.attn", norm(h) * (1 + scale) + shift)
            along_time = h.transpose(0, 1)
            if i == 0:
                along_time = along_time + w["pos_embed_temporal"]
            h = h + gate * self_attention(w, f"{name}.attn_temp", along_time).transpose(0, 1)
            k, v = linear(w, f"{name}.cross_attn.kv_linear", y).chunk(2, -1)
            q = linear(w, f"{name}.cross_attn.q_linear", h.flatten(0, 1))
            h = h + linear(w, f"{name}.cross_attn.proj", attend(q, k, v)).unflatten(0, h.shape[:2])
            h = h + gate_mlp * mlp(w, f"{name}.mlp", norm(h) * (1 + scale_mlp) + shift_mlp)
        shift, scale = w["final_layer.scale_shift_table"] + c
        results.append(video(linear(w, "final_layer.linear", norm(h) * (1 + scale) + shift)[None]))
    return torch.cat(results)


def convert_and_build(kind, weights, folder, encoder, *options):
    safetensors.save_file(weights, folder / "w.safetensors")
    arguments = [kind, str(folder / "w.safetensors"), "--heads", str(HEADS), "--out", str(folder / "run"), *options]
    convert(arguments if encoder is None else [*arguments, "--text-encoder", encoder])
    return checkpoints.latest(folder / "run")[1]


def goes_back(kind, weights, folder):
    convert([kind, str(folder / "run"), "--to", str(folder / "back.safetensors")])
    back = safetensors.load_file(folder / "back.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


def autoencoder(folder):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": CHANNELS, "sample_size": 16}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**options, **kinds).save_pretrained(folder / "vae")
    return str(folder / "vae")


def test_a_converted_stdit_is_guided_by_open_soras_null_caption(encoders, tmp_path):
    encoder, weights = save_encoder(encoders, "t5"), published_stdit(12)
    checkpoint = convert_and_build("stdit", weights, tmp_path, encoder)
    assert checkpoint.train["text"]["max_length"] == ROWS and checkpoint.train["objective"]["name"] == "ddpm"
    model = checkpoint.build().eval()
    y = TextEncoder(encoder, max_length=ROWS)(["a red square", "blue"])
    x, t = torch.randn(2, CHANNELS, FRAMES, SIDE, SIDE), torch.tensor([600.0, 600.0])
    states = [row[mask] for row, mask in zip(y.states, y.mask, strict=True)]
    nulls = [weights["y_embedder.y_embedding"][:ROWS][mask] for mask in y.mask]
    assert len(nulls[0]) == 4 and len(nulls[1]) == 2
    with torch.no_grad():
        predict = Predictor(model, y, 7.0)
        cond, null = predict(x, t[0])
        torch.testing.assert_close(cond, original_stdit(weights, x, t, states), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(null, original_stdit(weights, x, t, nulls), rtol=1e-4, atol=1e-4)
        # A caption of no words has one row.
        none = model(x[:1], t[:1], Text(torch.zeros(1, ROWS, 12), torch.zeros(1, ROWS, dtype=torch.bool)))
        one = original_stdit(weights, x[:1], t[:1], [weights["y_embedder.y_embedding"][:1]])
        torch.testing.assert_close(none, one, rtol=1e-4, atol=1e-4)
    goes_back("stdit", weights, tmp_path)
    with pytest.raises(ValueError, match=r"y has 8 tokens; the null caption has 7"):
        model(x, t, Text(torch.zeros(2, 8, 12), torch.ones(2, 8, dtype=torch.bool)))


def test_training_drops_captions_to_fixed_rows(encoders, tmp_path):
    checkpoint = convert_and_build("stdit", published_stdit(12), tmp_path, save_encoder(encoders, "t5"))
    model = checkpoint.build().train()
    model.y_embedder.dropout = 1.0
    y = Text(torch.randn(2, ROWS, 12), torch.arange(ROWS) < torch.tensor([[2], [5]]))
    states, mask = model.y_embedder(y)
    expected = mlp(dict(model.named_parameters()), "y_embedder.y_proj", model.y_embedder.y_embedding)
    torch.testing.assert_close(states, expected.expand(2, -1, -1))
    assert torch.equal(mask, y.mask) and not model.y_embedder.y_embedding.requires_grad


def test_training_goes_on_from_a_converted_stdit(encoders, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules[__name__], "CHANNELS", 1)
    convert_and_build("stdit", published_stdit(12), tmp_path, save_encoder(encoders, "t5"))
    data = ["--data.source", "digits", "--data.frames", "3", "--data.size", "12", "12", "--batch-size", "2"]
    short = ["--steps", "1", "--preview.count", "1", "--preview.steps", "1", "--run", str(tmp_path / "mine")]
    train(["--init", str(tmp_path / "run"), *data, *short, "--lora.rank", "2"])
    assert "the positions are fitted to 3 x 6 x 6 tokens; the weights had 3 x 2 x 2" in caplog.text
    before, after = (checkpoints.latest(tmp_path / name)[1] for name in ("run", "mine"))
    name = "y_embedder.y_embedding"
    assert torch.equal(after.merged().ema[name], before.ema[name]) and after.train["text"]["max_length"] == ROWS


def test_clips_from_a_converted_stdit(encoders, tmp_path):
    weights = published_stdit(12)
    weights["final_layer.linear.weight"] *= 0.01
    vae = autoencoder(tmp_path)
    convert_and_build("stdit", weights, tmp_path, save_encoder(encoders, "t5"), "--autoencoder", vae)
    prompts = ["--prompt", "a red square", "--guidance", "7"]
    sample([str(tmp_path / "run"), *prompts, "--count", "2", "--steps", "2"])
    with np.load(tmp_path / "run" / "samples" / "samples.npz") as arrays:
        assert arrays["clips"].shape == (2, FRAMES, 2 * SIDE, 2 * SIDE, 3)


def sines(positions, width):
    angles = positions[:, None] / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sines_of_places(width):
    """Of the column, then of the row."""
    rows, columns = np.divmod(np.arange(PLACES), SIDE // 2)
    return np.concatenate([sines(columns, width // 2), sines(rows, width // 2)], axis=1)


def published_vdit(text_width, together=False):
    shapes = shared() | linears({"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)})
    for i in range(DEPTH):
        sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH)}
        sizes |= {"mlp.fc2": (WIDTH, 4 * WIDTH), "adaLN_modulation.1": (6 * WIDTH, WIDTH)}
        shapes |= linears({f"blocks.{i}.{name}": size for name, size in sizes.items()})
    if text_width:
        shapes |= linears({"y_embedder.output_projection": (WIDTH, text_width)})
    else:
        shapes["y_embedder.embedding_table.weight"] = (4, WIDTH)
    weights = draw(shapes, 1)
    if together:
        space, time = sines_of_places(WIDTH * 3 // 4), sines(np.arange(FRAMES), WIDTH // 4)
        parts = (np.repeat(time[:, None], PLACES, 1), np.repeat(space[None], FRAMES, 0))
        return weights | {"pos_embed": torch.tensor(np.concatenate(parts, -1)).float().reshape(1, -1, WIDTH)}
    weights["pos_embed_spatial"] = torch.tensor(sines_of_places(WIDTH)).float()[None]
    return weights | {"pos_embed_temporal": torch.tensor(sines(np.arange(FRAMES), WIDTH)).float()[None]}


def original_vdit(w, x, t, y):
    """OpenDiT's VDiT under ``y [B, D]``."""
    h = tokens(w, x)
    if "pos_embed" in w:
        h = h + w["pos_embed"].unflatten(1, h.shape[1:3])
    else:
        h = h + w["pos_embed_spatial"] + w["pos_embed_temporal"][:, :, None]
    h, c = h.flatten(1, 2), F.silu(timestep(w, t) + y)[:, None]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        shift, scale, gate, *after = linear(w, f"{name}.adaLN_modulation.1", c).chunk(6, -1)
        h = h + gate * self_attention(w, f"{name}.attn", norm(h) * (1 + scale) + shift)
        h = h + after[2] * mlp(w, f"{name}.mlp", norm(h) * (1 + after[1]) + after[0])
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, -1)
    return video(linear(w, "final_layer.linear", norm(h) * (1 + scale) + shift))


@pytest.mark.parametrize("together", [False, True])
def test_a_converted_vdit_is_the_original(together, encoders, tmp_path, capsys):
    encoder, weights = save_encoder(encoders, "clip-projection"), published_vdit(16, together)
    inside = {"y_embedder.text_encoder.transformer.text_model.final_layer_norm.bias": torch.ones(16)}
    checkpoint = convert_and_build("vdit", weights | inside, tmp_path, encoder)
    assert "left out 1 tensors of the text encoder" in capsys.readouterr().out
    assert checkpoint.config["positions"] == ("concatenation" if together else "sum")
    model = checkpoint.build().eval()
    pooled = TextEncoder(encoder, max_length=77, pooled=True)
    x, t = torch.randn(2, CHANNELS, FRAMES, SIDE, SIDE), torch.tensor([20.0, 20.0])
    captions = pooled(["a red square", "blue"])
    with torch.no_grad():
        # OpenDiT pads the captions of a batch, and encodes no words as any others.
        padded = pooled.tokenizer(
            ["a red square", "blue", ""], padding="max_length", max_length=77, return_tensors="pt"
        )
        vectors = pooled.model(input_ids=padded.input_ids).pooler_output
        y = linear(weights, "y_embedder.output_projection", vectors)
        cond, null = Predictor(model, captions, 4.0)(x, t[0])
        torch.testing.assert_close(cond, original_vdit(weights, x, t, y[:2]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(null, original_vdit(weights, x, t, y[2:].expand(2, -1)), rtol=1e-4, atol=1e-4)
    goes_back("vdit", weights, tmp_path)


def test_a_vdit_with_classes_and_one_with_other_positions(tmp_path):
    weights = published_vdit(0)
    model = convert_and_build("vdit", weights, tmp_path, None).build().eval()
    x, t, y = torch.randn(2, CHANNELS, FRAMES, SIDE, SIDE), torch.tensor([20.0, 700.0]), torch.tensor([0, 3])
    with torch.no_grad():
        expected = original_vdit(weights, x, t, weights["y_embedder.embedding_table.weight"][y])
        torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-4)
    goes_back("vdit", weights, tmp_path)
    safetensors.save_file(weights | {"pos_embed_temporal": torch.ones(1, FRAMES, WIDTH)}, tmp_path / "w.safetensors")
    arguments = ["vdit", str(tmp_path / "w.safetensors"), "--heads", str(HEADS), "--out", str(tmp_path / "other")]
    with pytest.raises(
        SystemExit, match=r"pos_embed_temporal is not what OpenDiT's code makes for a grid of \(3, 2, 2"
    ):
        convert(arguments)
    safetensors.save_file(published_vdit(16), tmp_path / "w.safetensors")
    with pytest.raises(SystemExit, match="text_encoder must be named: dropped captions are what it makes of no words"):
        convert(arguments)
    safetensors.save_file(published_stdit(12), tmp_path / "w.safetensors")
    with pytest.raises(SystemExit, match="text_encoder is None; it must be named for a model with text"):
        convert(["stdit", *arguments[1:]])
    assert not (tmp_path / "other").exists()
