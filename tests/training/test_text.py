"""Tiny T5 and CLIP encoders made here; captions from a CSV through the trainer to the sampler."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import save_encoder

from models import precompute
from models.autoencoders.vqgan import VQGANSettings
from models.checkpoint import load
from models.data.batches import Batches
from models.data.config import DataConfig, TextConfig
from models.data.files import Item, find_files
from models.data.media import write_png
from models.data.moving_digits import MovingDigits
from models.data.open import open_source
from models.data.text import TextEncoder, identify_text_encoder, refuse_another
from models.data.wrappers import WithImages
from models.denoisers.cascade_config import CascadeSettings
from models.denoisers.dit import DiTSettings
from models.denoisers.stdit import STDiTSettings
from models.denoisers.text import Text, rows, with_null
from models.objectives.ddpm import DDPM
from models.objectives.flow import FlowMatching
from models.objectives.logsnr import LogSNR
from models.protocols import Denoiser
from models.registry import configure
from models.runtime.plain import merge
from models.sample import SampleConfig
from models.sample import run as run_sample
from models.sampling.predictor import Predictor
from models.train import parse
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig
from models.training.run import train
from models.training.trainer import Trainer

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: extra 'pretrained'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@needs_transformers
@pytest.mark.parametrize(("kind", "width", "around"), [("t5", 12, 1), ("clip", 16, 2)])
def test_an_encoder_gives_the_states_of_a_caption_alone(folder, kind, width, around):
    encoder = TextEncoder(save_encoder(folder, kind), max_length=8)
    assert (encoder.width, encoder.length) == (width, 8)
    captions = ["a red square", "blue", "", "a red square"]
    y = encoder(captions)
    assert y.shape == (4, 8, width) and y.states.dtype == torch.float32 and y.mask.dtype == torch.bool
    assert y.mask.sum(1).tolist() == [3 + around, 1 + around, 0, 3 + around]
    assert y.states[~y.mask].count_nonzero() == 0 and torch.equal(y.states[0], y.states[3])
    # Against the model itself, on a padded batch with its mask.
    tokens = encoder.tokenizer(["a red square", "blue"], padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = encoder.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    for row, mask, ours in zip(padded, tokens.attention_mask.bool(), y.states, strict=False):
        torch.testing.assert_close(ours[: mask.sum()], row[mask])
    # A caption that is cut, and what the encoder's precision is.
    assert encoder(["a red square moves left a red square moves left"]).mask.all()
    half = TextEncoder(save_encoder(folder, kind), max_length=8, precision="bf16")(captions)
    assert half.states.dtype == torch.bfloat16 and torch.equal(half.mask, y.mask)
    assert 0 < (half.states.float() - y.states).abs().max() < 0.05 * y.states.abs().max()


@needs_transformers
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_the_encoder_of_a_whole_model(folder, tmp_path, kind):
    """As the published checkpoints are: T5 with its decoder, CLIP with its vision tower."""
    import transformers

    alone = TextEncoder(save_encoder(folder, kind), max_length=8)
    if kind == "t5":
        whole = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**alone.model.config.to_dict() | {"is_encoder_decoder": True})
        )
        whole.shared.load_state_dict(alone.model.shared.state_dict())
        whole.encoder.load_state_dict(alone.model.encoder.state_dict())
    else:
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        whole = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=alone.model.config.to_dict(), vision_config=vision)
        )
        weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in alone.model.state_dict().items()}
        assert not whole.load_state_dict(weights, strict=False).unexpected_keys
    whole.save_pretrained(tmp_path)
    alone.tokenizer.save_pretrained(tmp_path)
    for pooled in (False, True)[: 1 if kind == "t5" else 2]:
        part = TextEncoder(str(tmp_path), max_length=8, pooled=pooled)
        expected = TextEncoder(save_encoder(folder, kind), max_length=8, pooled=pooled)
        assert torch.equal(part(["a red square"]).states, expected(["a red square"]).states)


@needs_transformers
def test_an_encoder_is_frozen_and_encodes_a_caption_once(folder, monkeypatch):
    encoder = TextEncoder(save_encoder(folder, "t5"), max_length=8, cache=2)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    calls = []
    encoder.model.register_forward_hook(lambda *_: calls.append(1))
    first = encoder(["a", "red", "a"])
    with torch.autocast("cpu", torch.bfloat16):
        again = encoder(["red", "a"])
        assert len(calls) == 2 and torch.equal(again.states, first.states[[1, 0]])
        encoder(["blue"])  # drives "red" out
        assert torch.equal(encoder(["red"]).states[0], first.states[1]) and len(calls) == 4
    assert not first.states.requires_grad


@needs_transformers
@needs_transformers
def test_captions_that_are_cut_are_said(folder, caplog):
    encoder = TextEncoder(save_encoder(folder, "t5"), max_length=4)
    encoder(["a cat", ""])
    assert not caplog.text
    encoder([f"a small brown dog and {i}" for i in range(12)])
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == 2 and found[0].startswith("caption 'a small brown dog and 0' has ")
    assert "cut to the 4 of max_length; captions cut so far: 1" in found[0] and found[1].endswith("so far: 10")


def test_the_pooled_output_of_clip_is_one_token(folder):
    whole = TextEncoder(save_encoder(folder, "clip"), max_length=8)
    encoder = TextEncoder(save_encoder(folder, "clip"), max_length=8, pooled=True)
    y = encoder(["a red square", "", "blue"])
    assert encoder.length == 1 and y.shape == (3, 1, 16) and y.mask.tolist() == [[True], [False], [True]]
    # It is the state of the end token.
    torch.testing.assert_close(y.states[0, 0], whole(["a red square"]).states[0, 4])


class Foreign:
    """What a pickle would run when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("made-by-the-pickle",)


@needs_transformers
def test_a_foreign_pickle_is_refused_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(save_encoder(folder, "t5"), tmp_path / "t5")
    (tmp_path / "t5/model.safetensors").unlink()
    torch.save({"shared.weight": Foreign()}, tmp_path / "t5/pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"text encoder 't5' (is refused: it holds more than tensors|cannot be loaded)"
    ):
        TextEncoder("t5")
    assert not (tmp_path / "made-by-the-pickle").exists()


@needs_transformers
def test_encoders_refuse(folder, tmp_path, monkeypatch):
    import transformers

    t5, clip = save_encoder(folder, "t5"), save_encoder(folder, "clip")
    for missing in (str(tmp_path / "nowhere"), "someone/no-such-model"):
        with pytest.raises(ValueError, match=f"text encoder '{missing}' is neither a folder with one nor"):
            TextEncoder(missing)
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a 'bert'; it may be T5 or CLIP"):
        TextEncoder(str(tmp_path / "bert"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_bytes((Path(t5) / "config.json").read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"pooled is True, but text encoder .* is a T5"):
        TextEncoder(t5, pooled=True)
    with pytest.raises(ValueError, match=r"max_length is 11; text encoder .* takes 10 tokens at most"):
        TextEncoder(clip, max_length=11)
    with pytest.raises(ValueError, match="max_length is 0"):
        TextEncoder(t5, max_length=0)
    with pytest.raises(ValueError, match="precision is 'fp16'; it may be 'fp32' or 'bf16'"):
        TextEncoder(t5, precision="fp16")
    with pytest.raises(TypeError, match="captions is a string"):
        TextEncoder(t5)("a red square")


@needs_transformers
def test_what_stable_cascade_reads_of_clip(folder):
    from safetensors.torch import load_file, save_file

    path = save_encoder(folder, "clip-projection")
    encoder = TextEncoder(path, max_length=12, cascade=True)
    y = encoder(["a red square", ""])
    assert y.shape == (2, encoder.length, encoder.width) == (2, 13, 16) and y.mask.all()
    assert torch.equal(y.states[1], encoder.empty())
    tokens = encoder.tokenizer(["a red square"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        output = encoder.model(tokens.input_ids, attention_mask=tokens.attention_mask)
        normed = encoder.model.text_model.final_layer_norm(y.states[0, 1:])
    torch.testing.assert_close(y.states[0, :1], output.text_embeds)
    torch.testing.assert_close(normed, output.last_hidden_state[0])
    with pytest.raises(ValueError, match=r"cascade is True, but text encoder .* is a T5; it goes with a CLIP"):
        TextEncoder(save_encoder(folder, "t5"), max_length=8, cascade=True)
    with pytest.raises(ValueError, match="cascade is True, but pooled is True too"):
        TextEncoder(path, max_length=8, cascade=True, pooled=True)
    with pytest.raises(ValueError, match="have widths 512 and 16, not one"):
        shutil.copytree(path, folder / "wide")
        config = json.loads((folder / "wide" / "config.json").read_text())
        (folder / "wide" / "config.json").write_text(json.dumps(config | {"projection_dim": 512}))
        weights = load_file(folder / "wide" / "model.safetensors")
        weights["text_projection.weight"] = torch.zeros(512, 16)
        save_file(weights, folder / "wide" / "model.safetensors", metadata={"format": "pt"})
        TextEncoder(str(folder / "wide"), max_length=8, cascade=True)


@needs_transformers
def test_weights_that_are_missing_are_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for kind, folder_of in (("t5", tmp_path / "t5"), ("clip", tmp_path / "clip")):
        source = Path(save_encoder(folder, kind))
        folder_of.mkdir()
        for file in source.iterdir():
            (folder_of / file.name).write_bytes(file.read_bytes())
        weights = load_file(source / "model.safetensors")
        name = next(name for name in weights if "layer_norm" in name)
        save_file({key: value for key, value in weights.items() if key != name}, folder_of / "model.safetensors")
        with pytest.raises(ValueError, match=f"lacks weights, {name}"):
            TextEncoder(str(folder_of), max_length=8)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="package 'transformers' is needed: pip install transformers"):
        TextEncoder("t5")


def test_text_is_moved_divided_and_picked_like_a_tensor():
    y = Text(torch.randn(5, 3, 2), torch.rand(5, 3) > 0.5)
    assert y.shape == (5, 3, 2)
    parts = y.chunk(2)
    assert [len(part.mask) for part in parts] == [3, 2] and torch.equal(parts[1].states, y.states[3:])
    picked = rows(y, torch.tensor([4, 0]))
    assert torch.equal(picked.states, y.states[[4, 0]]) and torch.equal(picked.mask, y.mask[[4, 0]])
    assert torch.equal(rows(torch.arange(5), slice(1, 3)), torch.tensor([1, 2]))
    assert y.to("meta").states.device.type == "meta" and y.to("meta").mask.dtype == torch.bool
    both = y.with_nulls()
    assert torch.equal(both.states, torch.cat((y.states, y.states))) and torch.equal(both.tokens[:5], y.mask)
    assert not both.tokens[5:].any() and torch.equal(both.mask[5:], y.mask)
    assert [part.dropped.tolist() for part in both.chunk(2)] == [[False] * 5, [True] * 5]


def test_with_null():
    y = Text(torch.ones(3, 2, 4, dtype=torch.bfloat16), torch.tensor([[True, False], [False, False], [True, True]]))
    states, mask, _ = with_null(y, 0.0, torch.full((4,), 7.0))
    assert states.dtype == torch.float32 and states[..., 0].tolist() == [[1, 1], [7, 1], [1, 1]]
    assert mask.tolist() == [[True, False], [True, False], [True, True]]
    states, mask, _ = with_null(y, 1.0, torch.full((4,), 7.0))
    assert (states[:, 0] == 7).all() and mask.tolist() == [[True, False]] * 3
    # Rows stand behind the mask of the caption that is dropped, the first of them for a caption without a token.
    null = torch.tensor([[7.0], [8.0], [9.0]]).expand(3, 4)
    states, mask, _ = with_null(y.with_nulls(), 0.0, null)
    assert states[..., 0].tolist() == [[1, 1], [7, 8], [1, 1], [7, 8], [7, 8], [7, 8]]
    assert mask.tolist() == [[True, False], [True, False], [True, True]] * 2


def test_predictor_doubles_text_for_guidance():
    calls = []

    class Model(Denoiser):
        def forward(self, x, t, y):
            calls.append(y)
            return y.tokens.sum(1)[:, None] + x

    y = Text(torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]]))
    x = torch.zeros(2, 1)
    predict = Predictor(Model(), y, 2.0)
    cond, null = predict(x, next(predict.conditions(torch.tensor([0.0]))))
    assert cond.tolist() == [[2], [1]] and null.tolist() == [[0], [0]]
    assert torch.equal(calls[0].states[:2], y.states) and calls[0].shape == (4, 3, 4)
    predict = Predictor(Model(), y, 1.0)
    assert predict(x, torch.tensor(0.0))[1] is None and torch.equal(calls[1].states, y.states)


def write_csv(folder: Path) -> str:
    """Four images of one colour each with captions, one of them twice and one empty."""
    captions = {"r1": "a red square", "r2": "a red square", "b": "a blue square", "g": ""}
    for number, name in enumerate(captions):
        write_png(folder / f"{name}.png", np.full((16, 16, 3), 60 * number, np.uint8))
    lines = [f"{name}.png,{caption}" for name, caption in captions.items()]
    (folder / "list.csv").write_text("\n".join(["path,text", *lines]) + "\n")
    return str(folder / "list.csv")


def test_a_csv_with_captions(tmp_path):
    items, classes = find_files(write_csv(tmp_path))
    assert classes == () and [item.label for item in items] == [0, 0, 1, 2]
    assert items[2] == Item(tmp_path / "b.png", 1, "a blue square")
    source = open_source(DataConfig(str(tmp_path / "list.csv"), frames=1, size=(16, 16)))
    assert source.captions == ("a red square", "a blue square", "") and source.classes == ()
    x, numbers, _ = Batches(source, 8, seed=0, prefetch=0).batch(0)
    for clip, number in zip(x, numbers, strict=True):
        level = round((clip.mean().item() + 1) * 127.5 / 60)
        assert source.captions[number] == items[level].text
    for header in ("path,text,label", "path,caption", "text,label"):
        (tmp_path / "bad.csv").write_text(f"{header}\na.png,1,2\n")
        with pytest.raises(ValueError, match="it must have path and label, or path and text"):
            find_files(tmp_path / "bad.csv")
    assert not getattr(open_source(DataConfig("digits", frames=1, size=(16, 16))), "captions", ())


TINY = TrainConfig(
    data=DataConfig(frames=2),
    model=STDiTSettings(width=16, depth=1, heads=2, patch=(1, 8, 8), class_dropout=0.3),
    text=TextConfig(max_length=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, ema=0.5),
    preview=PreviewConfig(count=2, steps=2, guidance=2.0),
    steps=3,
    batch_size=4,
    accumulation=2,
    save_every=2,
    log_every=1,
)


def losses(run: Path) -> list[str]:
    return (run / "losses.csv").read_text().splitlines()


@needs_transformers
def test_captions_from_a_csv_to_training_resume_and_prompts(tmp_path, folder, capsys):
    encoder = save_encoder(folder, "t5")
    data = {"source": write_csv(tmp_path), "size": [16, 16]}
    config = merge(TINY, {"run": str(tmp_path / "run"), "text": {"encoder": encoder}, "data": data})
    last = load(train(config))
    assert last.config["text_width"] == 12 and last.config["num_classes"] == 0 and last.classes == []
    assert not any("encoder" in name for name in last.model)
    assert (last.model["blocks.0.cross_attn.proj.weight"] != 0).any()
    # The same run in two parts.
    train(dataclasses.replace(config, run=str(tmp_path / "parts"), steps=2))
    resumed, checkpoint = parse(["--resume", str(tmp_path / "parts"), "--steps", "3"])
    train(resumed, checkpoint)
    assert losses(tmp_path / "parts") == losses(tmp_path / "run")

    prompts = ("a red square", "a blue square")
    sampling = SampleConfig(tmp_path / "run", tmp_path / "out", count=3, prompt=prompts, steps=2, guidance=2.0)
    arrays = np.load(run_sample(sampling)[3])
    assert arrays["labels"].tolist() == ["a red square", "a blue square", "a red square"]
    assert "'a red square', 'a blue square', 'a red square'" in capsys.readouterr().out
    for change in ({"prompt": ("",)}, {"guidance": 1.0}):
        other = dataclasses.replace(sampling, **{"out": tmp_path / next(iter(change)), **change})
        assert (np.load(run_sample(other)[3])["clips"] != arrays["clips"]).any(), change
    moved = dataclasses.replace(sampling, out=tmp_path / "moved", text_encoder=str(folder / "t5"))
    assert (np.load(run_sample(moved)[3])["clips"] == arrays["clips"]).all()
    with pytest.raises(ValueError, match="prompt must have a caption"):
        run_sample(dataclasses.replace(sampling, out=tmp_path / "bare", prompt=()))
    with pytest.raises(ValueError, match="class 'dog' was asked for"):
        run_sample(dataclasses.replace(sampling, out=tmp_path / "bare", classes=("dog",)))


@needs_transformers
def test_the_text_encoder_of_a_run_may_move_but_not_change(tmp_path, folder, monkeypatch):
    encoder = str(shutil.copytree(save_encoder(folder, "t5"), tmp_path / "encoder"))
    config = merge(TINY, {"run": str(tmp_path / "run"), "text": {"encoder": encoder}, "steps": 2})
    train(config)
    train(dataclasses.replace(config, run=str(tmp_path / "whole"), steps=3))
    Path(encoder).rename(tmp_path / "moved")
    (tmp_path / "moved/README.md").write_text("which is not loaded")
    moved, other = str(tmp_path / "moved"), str(shutil.copytree(tmp_path / "moved", tmp_path / "other"))
    tokenizer = Path(other) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    resume = ["--resume", str(tmp_path / "run"), "--steps", "3"]
    changed = rf"text encoder {other} \(sha256 .*\) is not the one of the training, {encoder} \(sha256"
    sampling = SampleConfig(tmp_path / "run", tmp_path / "out", count=1, prompt=("a",), steps=1)
    with pytest.raises(ValueError, match=changed):
        train(*parse([*resume, "--text.encoder", other]))
    with pytest.raises(ValueError, match=changed):
        run_sample(dataclasses.replace(sampling, text_encoder=other))
    assert not (tmp_path / "out").exists()
    run_sample(dataclasses.replace(sampling, text_encoder=moved))
    with pytest.raises(ValueError, match="text cannot change in a resumed run"):
        parse([*resume, "--text.encoder", moved, "--text.max-length", "9"])
    resumed, checkpoint = parse([*resume, "--text.encoder", moved])
    # A checkpoint of before encoders were recorded cannot tell: it goes on where it was, and samples with any.
    before = dataclasses.replace(checkpoint, text_encoder=None)
    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoint.latest", lambda folder: (folder, before))
        with pytest.raises(ValueError, match="text cannot change in a resumed run"):
            parse([*resume, "--text.encoder", moved])
    trainer = Trainer(merge(resumed, {"text": {"encoder": other}}), before)
    trainer.batches.close()
    assert trainer.step == 2 and trainer.checkpoint().text_encoder["path"] == other
    last = load(train(resumed, checkpoint))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert last.text_encoder == load(tmp_path / "whole/step_00000003.pt").text_encoder | {"path": moved}


def test_a_text_encoder_is_known_by_the_files_that_are_loaded(tmp_path):
    def write(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    def digest(names: list[str]) -> str:
        sums = (f"{name} {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}\n" for name in sorted(names))
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def check(*weights: str) -> None:
        expected = {"path": str(tmp_path.resolve()), "sha256": digest([*settings, *weights])}
        assert identify_text_encoder(str(tmp_path)) == expected

    settings = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]
    settings += ["added_tokens.json", "merges.txt", "spiece.model"]
    for name in settings:
        write(name, name)
    with pytest.raises(ValueError, match=r"text encoder '.*' has no weights; they may be model\.safetensors, "):
        identify_text_encoder(str(tmp_path))
    for name in ("README.md", ".git/HEAD", ".cache/x", "model.fp16.safetensors", "onnx/model.onnx", "tf_model.h5"):
        write(name, name)
    # Formats of the weights, the last preferred: each is loaded in the place of those before.
    for stem, suffix in (("pytorch_model", ".bin"), ("model", ".safetensors")):
        shards = [f"{stem}-{i}{suffix}" for i in (1, 2)]
        for name in shards:
            write(name, name)
        index = f"{stem}{suffix}.index.json"
        write(f"{stem}-left-over{suffix}", "")
        write(index, json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}))
        check(index, *shards)
        write(shards[1], "changed")
        check(index, *shards)
        write(f"{stem}{suffix}", "whole")
        check(f"{stem}{suffix}")
    (tmp_path / "model.safetensors").unlink()
    write("model.safetensors.index.json", "{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        identify_text_encoder(str(tmp_path))


def test_a_text_encoder_of_the_hub_is_known_by_its_name():
    record = identify_text_encoder("google/t5-v1_1-base")
    assert record == {"path": "google/t5-v1_1-base", "sha256": None}
    refuse_another(record, dict(record))
    with pytest.raises(ValueError, match="text encoder google/t5-v1_1-base is not the one of the training, t5-small"):
        refuse_another(record, {"path": "t5-small", "sha256": None})
    with pytest.raises(ValueError, match=r"is not the one of the training, /t5 \(sha256 abc"):
        refuse_another(record, {"path": "/t5", "sha256": "abc" * 20})


@needs_transformers
def test_a_video_goes_on_with_the_captions_of_its_file(tmp_path, folder, capsys):
    model = {"name": "walt", "width": 16, "depth": 2, "heads": 2, "patch": [1, 8, 8], "past": 0.5}
    changes = {"run": str(tmp_path / "run"), "data": {"frames": 3}, "model": model, "objective": "ddpm", "steps": 1}
    train(merge(TINY, changes | {"text": {"encoder": save_encoder(folder, "t5")}}))
    sampling = SampleConfig(tmp_path / "run", tmp_path / "a", count=2, prompt=("two", "a nine"), steps=1)
    film = run_sample(sampling)[3]
    again = dataclasses.replace(sampling, out=tmp_path / "b", count=None, prompt=(), past=film, continuations=2)
    arrays = np.load(run_sample(again)[3])
    assert arrays["labels"].tolist() == ["two", "a nine"] and arrays["clips"].shape == (2, 5, 16, 16, 1)
    other = np.load(run_sample(dataclasses.replace(again, out=tmp_path / "c", prompt=("six",)))[3])
    assert other["labels"].tolist() == ["six", "six"]


@needs_transformers
def test_a_batch_has_the_captions_of_its_clips(tmp_path, folder, monkeypatch):
    """Class names are the captions of data without captions."""
    seen = []

    def loss(self, model, x, y, generator=None, memory=None, low=None):
        seen.append((x, y))
        return model(x, torch.zeros(len(x)), y).square().mean()

    monkeypatch.setattr(FlowMatching, "loss", loss)
    config = merge(TINY, {"run": str(tmp_path), "text": {"encoder": save_encoder(folder, "clip")}})
    trainer = Trainer(config)
    trainer.train_step()
    trainer.batches.close()
    x, labels, _ = Batches(MovingDigits(frames=2, size=(16, 16)), 4, 0, prefetch=0).batch(0)
    expected = trainer.text([str(int(label)) for label in labels])
    assert trainer.classes == [] and len(seen) == 2
    assert torch.equal(torch.cat([part for part, _ in seen]), x)
    assert torch.equal(torch.cat([part.states for _, part in seen]), expected.states)
    assert torch.equal(torch.cat([part.mask for _, part in seen]), expected.mask)


@needs_transformers
def test_each_image_has_the_caption_of_its_clip(tmp_path, folder, monkeypatch):
    seen = []
    original = DDPM.loss
    monkeypatch.setattr(DDPM, "loss", lambda *arguments: seen.append(arguments[2:4]) or original(*arguments))
    model = {"name": "walt", "width": 16, "depth": 2, "heads": 2, "patch": [1, 8, 8], "cross_attention": "spatial"}
    changes = {"run": str(tmp_path), "data": {"images": 2}, "model": model, "objective": "ddpm"}
    trainer = Trainer(merge(TINY, changes | {"text": {"encoder": save_encoder(folder, "t5")}}))
    loss, *_ = trainer.train_step()
    trainer.batches.close()
    source = WithImages(MovingDigits(frames=2, size=(16, 16)), 2)
    x, labels, _ = Batches(source, 4, 0, prefetch=0).batch(0)
    assert loss.isfinite() and torch.equal(torch.cat([part for part, _ in seen]), x)
    expected = trainer.text([str(int(label)) for label in labels.flatten()])
    for part in ("states", "mask"):
        got = torch.cat([getattr(text, part) for _, text in seen])
        assert got.shape[:2] == (4, 3) and torch.equal(got.flatten(0, 1), getattr(expected, part))


@needs_transformers
def test_a_second_stage_takes_the_captions_of_the_first(tmp_path, folder):
    data = DataConfig(frames=2, size=(12, 12))
    precompute.run(precompute.PrecomputeConfig(tmp_path / "z", "pixels", data, low=2))
    config = TrainConfig(
        run=str(tmp_path / "run"),
        data=DataConfig(str(tmp_path / "z")),
        model=CascadeSettings(widths=(16, 16), heads=(2, 2), condition_width=8, latent_channels=1),
        text=TextConfig(save_encoder(folder, "t5")),
        objective=LogSNR(),
        preview=PreviewConfig(count=2, steps=1, guidance=2.0),
        steps=1,
        batch_size=2,
    )
    train(config)
    clips = np.zeros((2, 2, 6, 6, 1), np.uint8)
    np.savez(tmp_path / "low.npz", clips=clips, labels=["a three", "a five"])
    sampling = SampleConfig(tmp_path / "run", tmp_path / "out", low=tmp_path / "low.npz", steps=1, guidance=2.0)
    assert np.load(run_sample(sampling)[3])["labels"].tolist() == ["a three", "a five"]
    asked = dataclasses.replace(sampling, prompt=("a two",), overwrite=True)
    assert np.load(run_sample(asked)[3])["labels"].tolist() == ["a two", "a two"]
    np.savez(tmp_path / "low.npz", clips=clips, labels=[3, 5])
    with pytest.raises(ValueError, match="label is 3; for this model it must be a caption"):
        run_sample(dataclasses.replace(sampling, overwrite=True))


@needs_transformers
def test_training_with_text_refuses(tmp_path, folder, caplog):
    encoder = save_encoder(folder, "t5")
    with_text = merge(TINY, {"run": str(tmp_path / "run"), "text": {"encoder": encoder}})
    with pytest.raises(ValueError, match=r"model 'dit', which takes one vector, text\.pooled must be True"):
        dataclasses.replace(with_text, model=DiTSettings(width=16, heads=2, patch=(1, 8, 8)))
    with pytest.raises(ValueError, match=r"model is 'vqgan', which takes no text, but text\.encoder was given"):
        configure(VQGANSettings(), 1, 2, (16, 16), 0, text_width=12)
    write_png(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    bare = merge(with_text, {"data": {"source": str(tmp_path)}})
    with pytest.raises(ValueError, match="has neither captions nor classes"):
        Trainer(bare)
    # Captions without an encoder: an unconditional model, and a word about it.
    csv = write_csv(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(
            merge(TINY, {"run": str(tmp_path / "run"), "data": {"source": csv}, "preview": {"guidance": 1.0}})
        )
    trainer.batches.close()
    assert trainer.model.y_embedder is None and "captions of" in caplog.text and "are not used" in caplog.text


def test_text_in_the_configuration():
    with pytest.raises(ValueError, match=r"text\.max_length is 0"):
        merge(TINY, {"text": {"max_length": 0}})
    config = parse(["--model", "stdit-s/1x2x2", "--text.encoder", "t5", "--text.precision", "bf16"])[0]
    assert config.text == TextConfig(encoder="t5", precision="bf16")
    built_from = configure(config.model, 4, 8, (32, 32), 0, text_width=4096)
    assert (built_from.text_width, built_from.depth, built_from.learn_sigma) == (4096, 12, True)


def test_prompts_are_for_models_with_text(tmp_path):
    train(merge(TINY, {"run": str(tmp_path / "run"), "steps": 1, "preview": {"guidance": 1.0}}))
    for change, word in (({"prompt": ("a",)}, "prompt"), ({"text_encoder": "t5"}, "text_encoder")):
        with pytest.raises(ValueError, match=f"{word} is .* was trained without text"):
            run_sample(SampleConfig(tmp_path / "run", tmp_path / "out", count=1, steps=1, **change))
