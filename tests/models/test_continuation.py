"""Videos that go on from their last frames: models whose answers are known, and the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models.autoencoders.tokenizer import CausalTokenizer, TokenizerConfig
from models.checkpoint import Checkpoint, load, save
from models.data.config import DataConfig
from models.data.media import read_samples
from models.data.pixels import to_bytes, to_float
from models.denoisers.dit import DiTSettings
from models.denoisers.walt import WALT
from models.denoisers.walt_config import WALTConfig, WALTSettings
from models.objectives.ddpm import DDPM
from models.precompute import PrecomputeConfig
from models.precompute import run as precompute
from models.protocols import Denoiser
from models.runtime.plain import as_plain
from models.sample import SampleConfig, main, names_of, run
from models.sampling.clips import ClipRequest, sample_clips
from models.sampling.sampler import SampleRequest, sample
from models.training.config import PreviewConfig, TrainConfig
from models.training.run import train

VELOCITY = DDPM(prediction="velocity", zero_snr=True)
STEPS = {"solver": "ddim", "steps": 2, "seed": 0}
WALT_TINY = WALTConfig(
    input_size=(5, 8, 12),
    channels=3,
    num_classes=3,
    width=16,
    depth=2,
    heads=2,
    patch=(1, 4, 4),
    self_conditioning=0.9,
    past=0.5,
)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Counts(Denoiser):
    """Predicts clips whose level rises by one step of 8 bits a frame of pixels: from the class on, or from the past.

    ``stride`` frames are channels of one cell of time, but the first frame of a clip is one alone, in all channels.
    """

    def __init__(self, stride=1, frames=5):
        super().__init__()
        self.stride, self.weight = stride, nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(channels=stride, input_size=(frames, 2, 3), past=0.5, known_frames=2)
        self.pasts = []

    @property
    def known_frames(self):
        return self.config.known_frames

    def forward(self, x, t, y, past=None):
        self.pasts.append(past)
        levels = 1 + torch.arange((x.shape[2] - 1) * self.stride, dtype=x.dtype).view(-1, self.stride).t()
        levels = torch.cat((torch.zeros(self.stride, 1), levels), dim=1)[None, :, :, None, None]
        if past is None:
            first = y.view(-1, 1, 1, 1, 1)
        else:
            assert past.shape[2] == 2 and torch.equal(past[:, :1, 0], past[:, -1:, 0])
            first = ((past[:, :1, :1] + 1) * 127.5).round()
        clip = (first + levels) / 127.5 - 1 + 0 * x
        alpha_bar = VELOCITY.tables(tuple(range(1000)), x.device, x.dtype).alpha_bar[t].view(-1, 1, 1, 1, 1)
        return (alpha_bar.sqrt() * x - clip) / (1 - alpha_bar).sqrt()


def decode(latents):
    """Of ``Counts(stride)``: ``1 + stride (T - 1)`` frames."""
    rest = latents[:, :, 1:].transpose(1, 2).flatten(1, 2)[:, None]
    return torch.cat((latents[:, :1, :1], rest), dim=2)


def encode(clips, stride):
    x = to_float(clips)
    first, rest = x[:, :, :1].expand(-1, stride, -1, -1, -1), x[:, 0, 1:].unflatten(1, (-1, stride)).transpose(1, 2)
    return torch.cat((first, rest), dim=2)


@pytest.mark.parametrize(("stride", "frames", "overlap"), [(1, 5, 2), (2, 9, 3), (4, 17, 5)])
def test_the_film_counts_on(stride, frames, overlap):
    model, y = Counts(stride), torch.tensor([3, 100, 41])
    options = STEPS | {"decode": decode, "encode": lambda clips: encode(clips, stride)}
    if stride == 1:
        options = STEPS
    for count in (0, 1, 3):
        film = sample_clips(model, VELOCITY, ClipRequest(count=3, y=y, continuations=count, batch_size=2, **options))
        length = frames + count * (frames - overlap)
        expected = y[:, None] + torch.arange(length)
        assert film.dtype == torch.uint8 and film.shape == (3, length, 2, 3, 1)
        assert torch.equal(film.long(), expected[..., None, None, None].expand_as(film))
    # From a film that is there, whatever its length; the class has no say then.
    start = film[:, : overlap + 1]
    longer = sample_clips(model, VELOCITY, ClipRequest(count=3, y=y - 2, continuations=2, past=start, **options))
    assert longer.shape[1] == overlap + 1 + 2 * (frames - overlap) and torch.equal(longer, film[:, : longer.shape[1]])
    # A pixel that is off by one goes through the encoder and the model into all that follows.
    other = start.clone()
    other[1, -overlap:, 0, 2] += 1
    changed = sample_clips(model, VELOCITY, ClipRequest(count=3, y=y, continuations=2, past=other, **options))
    where = (changed.long() - longer.long()).amax((1, 4))
    assert where.tolist() == [[[0, 0, 0]] * 2, [[0, 0, 1], [0, 0, 0]], [[0, 0, 0]] * 2]


def test_a_continuation_is_sampled_from_noise_of_its_own_and_the_last_frames():
    torch.manual_seed(0)
    model = WALT(WALT_TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    y = torch.tensor([0, 2])
    options = STEPS | {"guidance": 2.0}
    film = sample_clips(model, VELOCITY, ClipRequest(count=2, y=y, continuations=2, **options))
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn((2, 3, 5, 8, 12), generator=generator) for _ in range(3)]
    pieces, past = [], None
    for noise in noises:
        clip = sample(model, VELOCITY, SampleRequest(noise=noise, y=y, solver="ddim", steps=2, guidance=2.0, past=past))
        clip = to_bytes(clip)
        pieces.append(clip if past is None else clip[:, :, 2:])
        past = clip[:, :, -2:].float() / 127.5 - 1
    assert torch.equal(film, torch.cat(pieces, dim=2).permute(0, 2, 3, 4, 1))
    for batch_size in (1, 2):
        assert torch.equal(
            sample_clips(model, VELOCITY, ClipRequest(count=2, y=y, continuations=2, batch_size=batch_size, **options)),
            film,
        )
    assert torch.equal(sample_clips(model, VELOCITY, ClipRequest(count=2, y=y, **options)), film[:, :5])


def test_what_cannot_go_on_is_refused():
    model, y = Counts(), torch.tensor([3, 4])
    film = sample_clips(model, VELOCITY, ClipRequest(count=2, y=y, **STEPS))

    def start(message, model=model, **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            sample_clips(model, VELOCITY, ClipRequest(count=2, y=y, **STEPS, **options))

    start("continuations is -1; it must not be negative", continuations=-1)
    start("continuations is 0; it must be at least 1 with past", past=film)
    start("encode is None; with decode and 2 continuations it must be given", continuations=2, decode=decode)
    plain = WALT(replace(WALT_TINY, past=0.0))
    assert plain.config.known_frames == 0
    start("continuations is 1; the model was trained without past, so it must be 0", plain, continuations=1)
    allowed = "it must be torch.uint8 [2, 2 or more, 2, 3, 1]"
    for past, what in (
        (film.float(), "torch.float32 of shape (2, 5, 2, 3, 1)"),
        (film[0], "torch.uint8 of shape (5, 2, 3, 1)"),
        (film[:1], "torch.uint8 of shape (1, 5, 2, 3, 1)"),
        (film[:, :1], "torch.uint8 of shape (2, 1, 2, 3, 1)"),
        (film[:, :, :1], "torch.uint8 of shape (2, 5, 1, 3, 1)"),
        (film.expand(-1, -1, -1, -1, 3), "torch.uint8 of shape (2, 5, 2, 3, 3)"),
    ):
        start(f"past is {what}; {allowed}", continuations=1, past=past)


def test_how_many_frames_are_known():
    for frames, known in ((5, 2), (3, 2), (2, 1)):
        assert replace(WALT_TINY, input_size=(frames, 8, 12)).known_frames == known


def make(folder, config=WALT_TINY, classes=("ant", "bee", "cow")):
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    model = WALT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    settings = WALTSettings(patch=config.patch, past=config.past)
    state = model.state_dict()
    saved = Checkpoint(
        as_plain(TrainConfig(model=settings, objective=VELOCITY)),
        as_plain(config),
        list(classes),
        5,
        state,
        state,
        {},
        {},
    )
    return save(folder, saved, keep=1)


def test_the_command_line_goes_on_from_its_own_file(tmp_path, capsys):
    path = make(tmp_path / "run")
    options = [str(path), "--solver", "ddim", "--steps", "2"]
    main([*options, "--count", "3", "--continuations", "1", "--class", "cow", "ant", "--out", str(tmp_path / "a")])
    assert "3 clips of 8 frames" in capsys.readouterr().out
    film, labels = read_samples(tmp_path / "a/samples.npz")
    assert film.shape == (3, 8, 8, 12, 3) and labels.tolist() == ["cow", "ant", "cow"]
    again = [*options, "--continuations", "2", "--past", str(tmp_path / "a/samples.npz"), "--seed", "7"]
    main([*again, "--out", str(tmp_path / "b")])
    assert "classes: cow, ant, cow" in capsys.readouterr().out
    longer, same = read_samples(tmp_path / "b/samples.npz")
    assert longer.shape == (3, 14, 8, 12, 3) and (longer[:, :8] == film).all() and (same == labels).all()
    expected = sample_clips(
        load(path).build(),
        VELOCITY,
        ClipRequest(
            count=3,
            y=torch.tensor([2, 0, 2]),
            solver="ddim",
            steps=2,
            seed=7,
            continuations=2,
            past=torch.from_numpy(film),
        ),
    )
    assert (longer == expected.numpy()).all() and (longer[:, 8:] != longer[:, 7:8]).any()
    main([*again, "--count", "2", "--class", "bee", "--out", str(tmp_path / "c")])
    fewer, labels = read_samples(tmp_path / "c/samples.npz")
    assert fewer.shape == (2, 14, 8, 12, 3) and labels.tolist() == ["bee", "bee"] and (fewer[:, :8] == film[:2]).all()


def test_another_model_goes_on_by_the_names_of_the_classes(tmp_path):
    """Whose ids may be others, and whose names may be numbers."""
    options = {"solver": "ddim", "steps": 1}
    first = make(tmp_path / "first", classes=("ant", "1", "cow"))
    films = run(SampleConfig(first, tmp_path / "a", count=3, classes=("cow", "1", "ant"), **options))[3]
    stored = np.load(films)
    assert stored["labels"].tolist() == [2, 1, 0] and stored["classes"].tolist() == ["ant", "1", "cow"]
    second = make(tmp_path / "second", classes=("cow", "ant", "1"))
    going = SampleConfig(second, tmp_path / "b", continuations=1, past=films, **options)
    assert np.load(run(going)[3])["labels"].tolist() == [0, 2, 1]
    # Without names the ids count as this model's.
    np.savez(tmp_path / "old.npz", clips=stored["clips"], labels=stored["labels"])
    bare = replace(going, out=tmp_path / "c", past=tmp_path / "old.npz")
    assert np.load(run(bare)[3])["labels"].tolist() == [2, 1, 0]
    other = make(tmp_path / "other", classes=("ant", "bee", "cow"))
    with pytest.raises(
        ValueError, match=r"label is '1'; for this model it must be a class id in 0\.\.2 or one of ant, bee"
    ):
        run(replace(going, checkpoint=other, out=tmp_path / "d"))


def test_files_that_do_not_fit_are_refused(tmp_path):
    path, out = make(tmp_path / "run"), tmp_path / "out"
    clips = np.zeros((2, 3, 8, 12, 3), dtype=np.uint8)

    def start(message, continuations=1, **arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            run(SampleConfig(path, out, steps=1, continuations=continuations, past=tmp_path / "a.npz"))
        assert not out.exists()

    start(r"a\.npz is not an npz with clips: .*clips is not a file", frames=clips)
    start(r"a\.npz has clips of float32 \[2, 3, 8, 12, 3\]; they must be uint8", clips=clips.astype(np.float32))
    start(r"a\.npz has labels of shape \[3\]; it must be \[2\]", clips=clips, labels=np.arange(3))
    start("label is 3; for this model it must be a class id in 0..2", clips=clips, labels=np.array([0, 3]))
    start(
        "label is '1'; for this model it must be a class id in 0..2 or one of ant, bee, cow",
        clips=clips,
        labels=np.array(["bee", "1"]),
    )
    start(r"a\.npz has no labels; use --class", clips=clips)
    labels = np.arange(2)
    names = np.array(["ant", "bee"])
    start(
        r"a\.npz has labels \[0, 2\]; with its classes they must be in 0\.\.1",
        clips=clips,
        labels=[0, 2],
        classes=names,
    )
    start(r"a\.npz has labels \['ant', 'bee'\]; with its", clips=clips, labels=names, classes=names)
    start(
        r"a\.npz has classes of int64 \[2\]; they must be a list of names", clips=clips, labels=labels, classes=labels
    )
    start("continuations is 0; it must be at least 1 with past", 0, clips=clips, labels=labels)
    start(r"past is torch\.uint8 of shape \(2, 1, 8, 12, 3\); it must be", clips=clips[:, :1], labels=labels)
    start("count is 0; it must be at least 1", clips=clips[:0])
    with pytest.raises(ValueError, match=r"count is 3; .*a\.npz has 0 clips"):
        run(SampleConfig(path, out, count=3, continuations=1, past=tmp_path / "a.npz"))
    for name, content in (
        ("text.npz", b"text"),
        ("empty.npz", b""),
        ("half.npz", (tmp_path / "a.npz").read_bytes()[:99]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not an npz with clips"):
            run(SampleConfig(path, out, continuations=1, past=tmp_path / name))
    np.save(tmp_path / "b.npy", clips)
    with pytest.raises(ValueError, match=r"b\.npy is not an npz with clips"):
        run(SampleConfig(path, out, continuations=1, past=tmp_path / "b.npy"))
    with pytest.raises(SystemExit, match=r"error: .*nowhere\.npz"):
        main([str(path), "--continuations", "1", "--past", str(tmp_path / "nowhere.npz")])
    plain = make(tmp_path / "plain", replace(WALT_TINY, past=0.0))
    with pytest.raises(ValueError, match="the model was trained without past"):
        run(SampleConfig(plain, out, steps=1, continuations=1))
    dit = TrainConfig(run=str(tmp_path / "dit"), data=DataConfig(frames=2), model=DiTSettings(16, 1, 2, (1, 8, 8)))
    with pytest.raises(ValueError, match="the model was trained without past"):
        run(SampleConfig(train(replace(dit, steps=1, batch_size=2)), out, steps=1, continuations=1))
    assert not out.exists()


def test_names_of_labels():
    assert names_of(np.array([1, 0]), ["a", "b"]) == ("b", "a")
    assert names_of(np.array(["b", "a"]), ["a", "b"]) == ("b", "a")
    assert names_of(np.array(["a dog", ""]), []) == ("a dog", "")
    with pytest.raises(ValueError, match="label is 1; for this model it must be a caption"):
        names_of(np.array([1, 0]), [])


def test_latents_of_a_causal_tokenizer_go_on_from_their_frames(tmp_path):
    """Two latent frames of the tokenizer are three frames of pixels."""
    pytest.importorskip("safetensors")
    data, (tokenizer, latents) = DataConfig(frames=7), (tmp_path / "tokenizer", tmp_path / "latents")
    shape = {"width": 8, "multipliers": (1, 1), "temporal_strides": (2,), "res_blocks": 1, "groups": 4}
    config = TokenizerConfig(input_size=(7, 16, 16), channels=1, latent_channels=4, **shape)
    torch.manual_seed(0)
    state = CausalTokenizer(config).state_dict()
    tokenizer.mkdir()
    save(tokenizer, Checkpoint(as_plain(TrainConfig()), as_plain(config), [], 7, state, state, {}, {}), keep=1)
    precompute(PrecomputeConfig(latents, str(tokenizer), data=data, normalize=True, shard_clips=2000, batch_size=500))
    trained = train(
        TrainConfig(
            run=str(tmp_path / "run"),
            data=DataConfig(source=str(latents)),
            model=WALTSettings(width=16, depth=2, heads=2, patch=(1, 4, 4), past=0.5),
            objective=VELOCITY,
            preview=PreviewConfig(count=1, steps=1),
            steps=1,
            batch_size=2,
        )
    )
    assert load(trained).config["input_size"] == [4, 8, 8]
    asked = SampleConfig(trained, tmp_path / "a", count=2, solver="ddim", steps=1)
    first = read_samples(run(asked)[3])[0]
    film = read_samples(run(replace(asked, out=tmp_path / "b", continuations=2))[3])[0]
    assert first.shape == (2, 7, 16, 16, 1) and film.shape == (2, 7 + 2 * 4, 16, 16, 1)
    assert (film[:, :7] == first).all()
    longer = read_samples(
        run(replace(asked, out=tmp_path / "c", count=None, continuations=1, past=tmp_path / "b/samples.npz"))[3]
    )
    assert longer[0].shape == (2, 19, 16, 16, 1) and (longer[0][:, :15] == film).all()
