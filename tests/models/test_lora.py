"""LoRA: every Linear of every family, only adapters train, runs go on, and what is written is read by peft."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import test_cascade
import torch
from test_model_adapters import CASES, made

from minisora_kernels import use_backend
from minisora_kernels.counters import saved_bytes
from minisora_kernels.testing import assert_as_accurate
from models import checkpoint as checkpoints
from models.convert import main as convert
from models.denoisers import lora as lora_module
from models.denoisers.lora import LoRAConfig, adapt, merged, write_adapters
from models.plan import PlanConfig, needs
from models.registry import build, config_from
from models.sample import main as sample
from models.train import main as train
from models.weights.dit import to_sit
from models.weights.start import start_from

SMALL = ["--data.frames", "2", "--data.size", "12", "12", "--preview.count", "1", "--batch-size", "2"]
MODEL = ["--model.width", "24", "--model.depth", "1", "--model.heads", "1"]


def randomise_adapters(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def in_double(part: object) -> object:
    return part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part


# Of each family the first case; the others are slow.
FIRST = {name.split()[0]: name for name in reversed(CASES)}.values()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in CASES])
def test_adapters_of_every_family_are_what_they_are_merged_to(name: str):
    plain, arguments, named = made(name)
    model, lora = copy.deepcopy(plain), LoRAConfig(rank=2, alpha=3)
    adapt(model, lora)
    with torch.no_grad():
        torch.testing.assert_close(model(*arguments, **named), plain(*arguments, **named), rtol=1e-3, atol=1e-5)
    randomise_adapters(model)
    together = copy.deepcopy(plain)
    together.load_state_dict(merged(model.state_dict(), lora))
    double = copy.deepcopy(together).double()
    wide, wide_named = [in_double(part) for part in arguments], {key: in_double(part) for key, part in named.items()}
    with use_backend("reference"):
        exact = double(*wide, **wide_named)
        reference = together(*arguments, **named)
    found = model(*arguments, **named)
    assert_as_accurate("output", found.detach(), reference.detach(), exact.detach())
    assert (found - plain(*arguments, **named)).abs().max() > 1e-3
    found.square().mean().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    down = [parameter for part, parameter in model.named_parameters() if "lora_A" in part]
    assert down and all(parameter.grad.abs().max() > 0 for parameter in down)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of all weights, and one of adapters on it."""
    folder = tmp_path_factory.mktemp("runs")
    train(["--preset", "digits", *SMALL, *MODEL, "--steps", "1", "--run", str(folder / "first")])
    _, first = checkpoints.latest(folder / "first")
    model = first.build()
    test_cascade.randomized(model)  # else it is zero behind its gates
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    checkpoints.save(folder / "first", dataclasses.replace(first, model=weights, ema=weights), keep=1)
    train(start(folder, "four", 4))
    return folder


def start(folder, name: str, steps: int) -> list[str]:
    adapters = ["--lora.rank", "2", "--lora.alpha", "4", "--lora.targets", "qkv", "fc1", "fc2"]
    rate = ["--optimizer.learning-rate", "1e-1", "--optimizer.ema", "0.5", "--optimizer.schedule", "constant"]
    begin = ["--init", str(folder / "first"), *adapters, *rate]
    return [*begin, "--steps", str(steps), "--run", str(folder / name)]


def test_only_adapters_train(runs):
    _, first = checkpoints.latest(runs / "first")
    _, after = checkpoints.latest(runs / "four")
    plain = {name.replace(".base_layer.", "."): value for name, value in after.model.items() if "lora_" not in name}
    assert plain.keys() == first.ema.keys()
    assert all(torch.equal(value, first.ema[name]) for name, value in plain.items())
    adapters = {name: value for name, value in after.model.items() if "lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters} == {"qkv", "fc1", "fc2"}
    assert all(value.abs().max() > 0 for value in adapters.values())
    assert any((after.ema[name] != value).any() for name, value in adapters.items())
    sizes = sum(value.numel() for value in adapters.values())
    moments = [part["exp_avg"].numel() for part in after.optimizer["state"].values()]
    assert sum(moments) == sizes
    shared = {value.untyped_storage()._cdata for value in after.model.values()}
    assert all(value.untyped_storage()._cdata in shared for name, value in after.ema.items() if "lora_" not in name)


def test_a_stopped_run_goes_on_bit_for_bit(runs):
    train(start(runs, "two", 2))
    train(["--resume", str(runs / "two"), "--steps", "4"])
    _, whole = checkpoints.latest(runs / "four")
    _, parts = checkpoints.latest(runs / "two")
    for kind in ("model", "ema"):
        before, after = getattr(whole, kind), getattr(parts, kind)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(SystemExit, match="lora cannot change in a resumed run"):
        train(["--resume", str(runs / "two"), "--steps", "5", "--lora.rank", "3"])


def test_samples_are_the_same_merged_or_not(runs):
    clips = []
    for options in ([], ["--no-merge"]):
        out = runs / f"samples{len(clips)}"
        sample([str(runs / "four"), "--count", "2", "--steps", "2", "--out", str(out), *options])
        clips.append(np.load(out / "samples.npz")["clips"].astype(int))
    sample([str(runs / "first"), "--count", "2", "--steps", "2", "--out", str(runs / "plain")])
    assert np.abs(clips[0] - clips[1]).max() <= 1
    assert np.abs(clips[0] - np.load(runs / "plain" / "samples.npz")["clips"]).max() > 1


def test_another_run_starts_from_what_adapters_made(runs):
    train(["--init", str(runs / "four"), "--steps", "1", "--optimizer.learning-rate", "1e-12", "--run", f"{runs}/on"])
    _, before = checkpoints.latest(runs / "four")
    _, after = checkpoints.latest(runs / "on")
    assert after.lora == LoRAConfig()
    for name, value in before.merged().ema.items():
        torch.testing.assert_close(after.model[name], value, rtol=0, atol=1e-9)


@pytest.fixture
def published(tmp_path):
    """A run of Meta's DiT, and one of adapters on it."""
    from test_convert import published as weights
    from test_convert import write

    convert(["dit", write("pt", tmp_path, weights()), "--heads", "3", "--out", str(tmp_path / "dit")])
    _, base = checkpoints.latest(tmp_path / "dit")
    model = base.build()
    lora = LoRAConfig(rank=2, targets=("qkv", "proj"))
    adapt(model, lora)
    randomise_adapters(model)
    state = model.state_dict()
    stored = {"rank": 2, "alpha": 0.0, "targets": ["qkv", "proj"]}
    tuned = base.train | {"lora": stored, "init": str(tmp_path / "dit")}
    saved = checkpoints.Checkpoint(tuned, base.config, base.classes, 1, state, state, {}, {})
    (tmp_path / "mine").mkdir()
    checkpoints.save(tmp_path / "mine", saved, keep=1)
    return tmp_path, base


def test_peft_reads_the_adapters(published):
    folder, base = published
    convert(["dit", str(folder / "mine"), "--adapters", str(folder / "adapters")])
    assert json.loads((folder / "adapters" / "adapter_config.json").read_text())["r"] == 2
    plain = base.build().eval()
    model = peft.PeftModel.from_pretrained(plain, str(folder / "adapters"))
    _, saved = checkpoints.latest(folder / "mine")
    x = torch.randn(2, base.config["channels"], *base.config["input_size"])
    arguments = x, torch.tensor([3.0, 500.0]), torch.tensor([0, 1])
    own = saved.build().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*arguments), own(*arguments), rtol=0, atol=0)
        torch.testing.assert_close(saved.merged().build().eval()(*arguments), own(*arguments), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="exists already"):
        convert(["dit", str(folder / "mine"), "--adapters", str(folder / "adapters")])
    with pytest.raises(SystemExit, match="these weights have no adapters"):
        convert(["dit", str(folder / "dit"), "--adapters", str(folder / "none")])
    assert not (folder / "none").exists()


def adapted_run(start: Path, folder: Path) -> tuple[checkpoints.Checkpoint, torch.nn.Module]:
    """The checkpoint of a run, and the model of a new one in ``folder`` that has adapters on all its Linears."""
    _, base = checkpoints.latest(start)
    model = base.build().eval()
    adapt(model, LoRAConfig(rank=2))
    randomise_adapters(model)
    state = model.state_dict()
    tuned = base.train | {"lora": {"rank": 2}, "init": str(start)}
    folder.mkdir()
    checkpoints.save(folder, dataclasses.replace(base, train=tuned, model=state, ema=state), keep=1)
    return base, model


def test_peft_reads_the_adapters_onto_the_model_of_diffusers(tmp_path):
    """On every Linear: of blocks, where q, k and v are apart, and of the embedder, which stands in every block."""
    from test_convert import in_diffusers

    theirs = in_diffusers()
    theirs.save_pretrained(tmp_path / "transformer")
    convert(["dit", str(tmp_path / "transformer"), "--out", str(tmp_path / "dit")])
    base, model = adapted_run(tmp_path / "dit", tmp_path / "mine")
    convert(["dit", str(tmp_path / "mine"), "--adapters", str(tmp_path / "adapters"), "--names", "diffusers"])
    x = torch.randn(2, base.config["channels"], *base.config["input_size"])
    t, y = torch.tensor([3, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        before = theirs(x, t, class_labels=y).sample
        adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapters"))
        after = adapted(x, t, class_labels=y).sample
        ours = model(x, t.float(), y)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, ours, rtol=1e-4, atol=1e-5)


def test_peft_reads_the_adapters_of_sit(tmp_path):
    from test_convert import published as weights
    from test_convert import write

    convert(["sit", write("pt", tmp_path, weights()), "--heads", "3", "--out", str(tmp_path / "sit")])
    base, model = adapted_run(tmp_path / "sit", tmp_path / "mine")
    convert(["sit", str(tmp_path / "mine"), "--adapters", str(tmp_path / "adapters")])
    # SiT's own code builds twice the channels and drops the second half.
    config = dataclasses.replace(config_from(base.config), learn_sigma=True)
    theirs = build(config).eval()
    theirs.load_state_dict(to_sit(base))
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapters"))
    x, t, y = torch.randn(2, 4, *base.config["input_size"]), torch.tensor([3.0, 500.0]), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, y)[:, :4], model(x, t, y), rtol=1e-4, atol=1e-5)


def test_adapters_that_cannot_be_written_leave_nothing(published, monkeypatch):
    folder, _ = published

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(lora_module, "write_whole", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        convert(["dit", str(folder / "mine"), "--adapters", str(folder / "adapters")])
    monkeypatch.undo()
    assert not (folder / "adapters").exists()
    convert(["dit", str(folder / "mine"), "--adapters", str(folder / "adapters")])


def test_rows_of_new_classes(published):
    folder, base = published
    table, classes = "y_embedder.embedding_table.weight", [*base.classes[:-1], "new"]
    with pytest.raises(ValueError, match=r"lora\.classes is False, but init has no class new"):
        start_from(base.build(), base, classes, rows_train=False)
    model, lora = base.build(), LoRAConfig(rank=2, classes=True)
    start_from(model, base, classes, rows_train=True)
    adapt(model, lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert table in trained and all("lora_" in name for name in trained - {table})
    assert torch.equal(merged(model.state_dict(), lora)[table], model.state_dict()[table])
    with pytest.raises(ValueError, match="the rows of classes do not go into adapters"):
        write_adapters(folder / "rows", model.state_dict(), lora)
    with pytest.raises(ValueError, match=r"lora\.classes is True; the model has no classes"):
        adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), lora)
    assert not (folder / "rows").exists()


def test_published_weights_have_the_adapters_in_them(published):
    folder, _ = published
    convert(["dit", str(folder / "mine"), "--to", str(folder / "mine.pt")])
    _, saved = checkpoints.latest(folder / "mine")
    written = torch.load(folder / "mine.pt", weights_only=True)
    expected = saved.merged().ema
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)


def test_a_step_keeps_no_more_than_eager():
    config, arguments = CASES["dit joint"]
    counts = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        model = build(config).train()
        test_cascade.randomized(model)
        adapt(model, LoRAConfig(rank=2))
        with use_backend(backend):
            leaves = [*model.parameters(), *(part for part in arguments if isinstance(part, torch.Tensor))]
            counts.append(saved_bytes(lambda model=model: model(*arguments), leaves))
    assert counts[0] <= counts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.rank", "2"], "lora.rank is 2; it needs init"),
        (["--lora.rank", "-1"], "lora.rank is -1; it must be a whole number, at least 0"),
        (["--lora.alpha", "2"], "lora.alpha is 2.0; it goes with lora.rank"),
        (["--lora.rank", "2", "--lora.alpha", "nan"], "lora.alpha is nan; it must be finite and at least 0"),
        (["--lora.rank", "2", "--lora.alpha", "-3"], "lora.alpha is -3.0; it must be finite and at least 0"),
        (["--lora.classes"], "lora.classes is True; it goes with lora.rank"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(["--preset", "digits", *options, "--run", str(tmp_path / "run")])
    assert message in str(error.value) + capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.rank", "2", "--lora.targets", "to_q"], "lora.targets has 'to_q'; no Linear's name ends so"),
        (["--lora.rank", "99"], "lora.rank is 99;"),
    ],
)
def test_adapters_that_do_not_fit(options, message, runs):
    with pytest.raises(SystemExit, match=message):
        train(["--init", str(runs / "first"), *options, "--steps", "1", "--run", str(runs / "none")])
    assert not (runs / "none").exists()


def test_without_peft_it_says_so(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="package 'peft' is needed: pip install peft"):
        train(start(runs, "none", 1))
    with pytest.raises(SystemExit, match=r"^error: package 'peft' is needed: pip install peft"):
        sample([str(runs / "four"), "--no-merge", "--count", "1", "--out", str(runs / "no-peft")])
    sample([str(runs / "four"), "--count", "1", "--steps", "1", "--out", str(runs / "merged")])


def test_a_plan_of_adapters_needs_less():
    plan = dict(model="dit-s/2", gpu="rtx4090-24g", frames=1, size=(64, 64))
    whole, adapters = (needs(PlanConfig(**plan, lora_rank=rank), training=True).memory for rank in (0, 8))
    for name in ("gradients", "optimizer", "ema"):
        assert adapters[name] < 0.1 * whole[name]
    assert adapters["weights"] < 1.1 * whole["weights"]
