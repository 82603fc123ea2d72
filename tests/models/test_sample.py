from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import math
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from models.checkpoint import Checkpoint, load, save
from models.data.media import contact_sheet, enlarge, mosaic, write_mp4, write_samples
from models.data.pixels import to_bytes
from models.denoisers.dit import DiT, DiTConfig
from models.objectives.ddpm import DDPM
from models.objectives.flow import FlowMatching
from models.runtime.device import choose_device
from models.runtime.files import locked
from models.runtime.plain import as_plain
from models.sample import SampleConfig, class_ids, main, run
from models.training.config import TrainConfig

FILES = ("samples.mp4", "samples.gif", "samples.png", "samples.npz")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make(
    folder: Path, *, classes: tuple[str, ...] = ("ant", "bee", "cow"), train: TrainConfig | None = None, **changes
):
    """A checkpoint of a model with random weights; the averaged ones differ from the last ones."""
    shape = {"input_size": (3, 8, 12), "patch": (1, 4, 4), "channels": 3, "width": 16, "depth": 2, "heads": 2}
    dit = DiTConfig(**(shape | {"num_classes": len(classes)} | changes))
    torch.manual_seed(0)
    model = DiT(dit)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    return save(
        folder,
        Checkpoint(
            train=as_plain(train or TrainConfig()),
            config=as_plain(dit),
            classes=list(classes),
            step=5,
            model=model.state_dict(),
            ema={name: weight * 0.9 for name, weight in model.state_dict().items()},
            optimizer={},
            rng={},
        ),
        keep=1,
    )


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def clips(paths: list[Path]) -> np.ndarray:
    return np.load(paths[3])["clips"]


def test_all_four_files_decode_to_the_same_clips(tmp_path, capsys):
    paths = run(SampleConfig(make(tmp_path / "run"), count=3, steps=2))
    assert paths == [tmp_path / "run/samples" / name for name in FILES]
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in paths) and "ant, bee, cow" in printed
    arrays = np.load(paths[3])
    assert arrays["clips"].shape == (3, 3, 8, 12, 3) and arrays["clips"].dtype == np.uint8
    assert arrays["labels"].tolist() == [0, 1, 2] and arrays["clips"].std() > 10
    # 8x12 pixels become 128x192; one column, with gaps of 4.
    film = mosaic(arrays["clips"])
    assert film.shape == (3, 392, 192, 3)
    mp4, gif, png = (frames(path) for path in paths[:3])
    assert mp4.shape == gif.shape == film.shape
    assert np.abs(gif.astype(int) - film).mean() < 12 and np.abs(mp4.astype(int) - film).mean() < 12
    assert png.shape == (1, 3 * 132 - 4, 3 * 196 - 4, 3)
    for sample in range(3):
        for frame in range(3):
            tile = png[0, 132 * sample : 132 * sample + 128 : 16, 196 * frame : 196 * frame + 192 : 16]
            assert (tile == arrays["clips"][sample, frame]).all()


def test_the_clips_depend_on_seed_weights_class_and_guidance(tmp_path):
    base = SampleConfig(make(tmp_path / "run"), tmp_path / "base", count=2, steps=2)
    first = clips(run(base))
    assert (first == clips(run(dataclasses.replace(base, out=tmp_path / "again", batch_size=1)))).all()
    for number, change in enumerate(
        ({"seed": 1}, {"last_weights": True}, {"classes": ("2", "cow")}, {"guidance": 3.0}, {"solver": "heun"})
    ):
        other = clips(run(dataclasses.replace(base, out=tmp_path / str(number), **change)))
        assert (first != other).mean() > 0.05, change
    guided = [
        clips(run(dataclasses.replace(base, out=tmp_path / f"g{n}", guidance=3.0, guidance_channels=n))) for n in (1, 3)
    ]
    assert (guided[0] != guided[1]).any()


@pytest.mark.slow
def test_precision_and_compilation_change_no_more_than_rounding(tmp_path, monkeypatch):
    # Inductor takes a minute; what it compiles is traced the same way here.
    monkeypatch.setattr(DiT, "compile", functools.partialmethod(DiT.compile, backend="aot_eager"))
    seen = []
    original = DiT.forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        seen.append((out.dtype, torch.compiler.is_compiling()))
        return out

    monkeypatch.setattr(DiT, "forward", forward)
    base = SampleConfig(make(tmp_path / "run"), tmp_path / "base", count=2, steps=2, guidance=2.0)
    first = clips(run(base)).astype(int)
    assert seen == [(torch.float32, False)] * 2
    half = clips(run(dataclasses.replace(base, out=tmp_path / "half", precision="bf16")))
    assert seen[2:] == [(torch.bfloat16, False)] * 2
    assert 0 < np.abs(half - first).mean() < 4
    seen.clear()
    compiled = clips(run(dataclasses.replace(base, out=tmp_path / "compiled", compile=True)))
    assert np.abs(compiled - first).max() <= 1 and (torch.float32, True) in seen


def test_devices(monkeypatch):
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device is 'cuda'; torch finds 0 CUDA devices"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    precision = torch.get_float32_matmul_precision()
    try:
        assert choose_device("cpu").type == "cpu" and torch.get_float32_matmul_precision() == precision
        assert choose_device("auto") == torch.device("cuda") and choose_device("cuda:1") == torch.device("cuda:1")
        assert torch.get_float32_matmul_precision() == "high" and current == [0, 1]
    finally:
        torch.set_float32_matmul_precision(precision)
    for name, reason in (("cuda:2", "torch finds 2 CUDA"), ("gpu", "it may be 'auto'"), ("cuda:x", "it may be 'auto'")):
        with pytest.raises(ValueError, match=f"device is '{name}'; {reason}"):
            choose_device(name)


def test_graphs_on_a_cpu_are_refused(tmp_path):
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        run(SampleConfig(make(tmp_path / "run"), tmp_path / "out", steps=1, cuda_graphs=True))
    assert not (tmp_path / "out").exists()


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
    make(tmp_path / "run")
    paths = run(SampleConfig(tmp_path / "run", count=1, steps=1))
    assert paths[0].parent == tmp_path / "run/samples"


@pytest.mark.parametrize("solver", [None, "ddim"])
def test_a_diffusion_with_learned_variance(tmp_path, solver):
    train = TrainConfig(objective=DDPM())
    path = make(tmp_path / "run", train=train, learn_sigma=True)
    assert clips(run(SampleConfig(path, count=1, steps=3, solver=solver))).shape == (1, 3, 8, 12, 3)


@pytest.mark.parametrize(("steps", "timesteps"), [("2", 2), ("ddim4", 4), ("1,2,1", 4)])
def test_the_command_line_takes_timesteps_of_a_diffusion(tmp_path, capsys, steps, timesteps, monkeypatch):
    calls = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    path = make(tmp_path / "run", train=TrainConfig(objective=DDPM()))
    main([str(path), "--count", "1", "--steps", steps])
    assert len(calls) == timesteps
    with pytest.raises(SystemExit, match=r"error: steps is '1,x'; it may be a number, 'ddimN', or sections"):
        main([str(path), "--steps", "1,x", "--overwrite"])
    flow = make(tmp_path / "flow")
    with pytest.raises(SystemExit, match="error: steps is 'ddim4'; objective 'flow' takes a number"):
        main([str(flow), "--steps", "ddim4"])


@pytest.mark.slow
def test_solvers_of_a_flow_and_their_options(tmp_path, capsys):
    train = TrainConfig(objective=FlowMatching("noise", path="vp"))
    base = SampleConfig(make(tmp_path / "run", train=train), count=1)
    made = {}
    for number, change in enumerate(
        (
            {"solver": "euler", "steps": 50},
            {"solver": "dopri5", "rtol": 0.1},
            {"solver": "dopri5", "rtol": 0.1, "atol": 0.5},
            {"solver": "rk4", "steps": 3},
            {"solver": "heun_sde", "steps": 3},
            {"solver": "heun_sde", "steps": 3, "diffusion": "linear", "diffusion_norm": 2.0},
            {"solver": "heun_sde", "steps": 3, "last_step": "tweedie", "last_step_size": 0.2},
        )
    ):
        made[number] = clips(run(dataclasses.replace(base, out=tmp_path / str(number), **change)))
    for one, other in itertools.combinations(made, 2):
        assert (made[one] != made[other]).any(), (one, other)
    # The defaults: Euler, 50 steps.
    assert (made[0] == clips(run(dataclasses.replace(base, out=tmp_path / "default")))).all()
    for change, reason in (
        ({"rtol": 1e-4}, "rtol is 0.0001, but solver is 'euler'; only 'dopri5' has it"),
        ({"solver": "rk4", "last_step": "mean"}, "last_step is 'mean', but solver is 'rk4'; only 'euler_maruyama' and"),
        ({"solver": "dopri5", "steps": 9}, "steps is 9, but solver 'dopri5'"),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            run(dataclasses.replace(base, out=tmp_path / "refused", **change))
    assert not (tmp_path / "refused").exists()
    with pytest.raises(SystemExit):
        main([str(base.checkpoint), "--solver", "heun_sde", "--diffusion-norm", "-1"])
    assert "diffusion_norm is -1.0; it must be positive" in capsys.readouterr().err


def test_unconditional_grey_and_image_models(tmp_path):
    path = make(tmp_path / "run", classes=(), channels=1, input_size=(8, 8), patch=(4, 4))
    paths = run(SampleConfig(path, count=5, steps=1))
    arrays = np.load(paths[3])
    assert arrays["clips"].shape == (5, 1, 8, 8, 1) and "labels" not in arrays
    assert frames(paths[2]).shape == (1, 5 * 132 - 4, 128, 3)
    with pytest.raises(ValueError, match="guidance is 2"):
        run(SampleConfig(path, tmp_path / "out", guidance=2.0))
    with pytest.raises(ValueError, match="trained without classes"):
        run(SampleConfig(path, tmp_path / "out", classes=("0",)))


def test_output_is_not_overwritten_unless_asked(tmp_path):
    config = SampleConfig(make(tmp_path / "run"), tmp_path / "out", count=1, steps=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples.gif").write_text("mine")
    with pytest.raises(ValueError, match=r"samples\.gif exists already; use --overwrite"):
        run(config)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["samples.gif"]
    run(dataclasses.replace(config, overwrite=True))
    assert len(frames(tmp_path / "out/samples.gif")) == 3


@pytest.mark.parametrize("fatal", range(8))
def test_a_full_disk_leaves_nothing_to_clean_up(tmp_path, monkeypatch, fatal):
    """Whichever flush fails, the file is named, no file is there under its name, and the same command works again."""
    config = SampleConfig(make(tmp_path / "run"), count=1, steps=1)
    calls, flush = itertools.count(), os.fsync

    def full(descriptor):
        if next(calls) == fatal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        if fatal < 4:  # the four are flushed before the first has its name
            with pytest.raises(OSError, match=r"No space left on device: '.*samples/samples\.(mp4|gif|png|npz)'"):
                run(config)
            assert not list((tmp_path / "run/samples").iterdir())
    assert sorted(file.name for file in run(config)) == sorted(FILES)
    assert len(list((tmp_path / "run/samples").iterdir())) == 4


@pytest.mark.parametrize("fatal", range(4))
def test_a_kill_leaves_no_file_that_is_not_whole(tmp_path, monkeypatch, fatal):
    class Killed(BaseException):
        pass

    config = SampleConfig(make(tmp_path / "run"), count=1, steps=1)
    whole = {path.name: path.read_bytes() for path in run(dataclasses.replace(config, out=tmp_path / "whole"))}
    calls, replace = itertools.count(), os.replace

    def kill(source, target):
        if next(calls) == fatal:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(Killed):
            run(config)
    for path in (tmp_path / "run/samples").glob("samples.???"):
        assert path.suffix == ".npz" or path.read_bytes() == whole[path.name]
    run(dataclasses.replace(config, overwrite=True))
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == sorted(FILES)


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    pixels = np.zeros((1, 2, 16, 16, 3), np.uint8)
    with locked(tmp_path), pytest.raises(BlockingIOError, match="is in use: another process writes there"):
        write_samples(tmp_path, pixels, None, [], 8)
    write_samples(tmp_path, pixels, None, [], 8)
    # Another process has written since this one looked.
    with pytest.raises(ValueError, match="exists already; use --overwrite"):
        write_samples(tmp_path, pixels, None, [], 8, overwrite=False)


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5", "euler_maruyama"])
@pytest.mark.parametrize(
    ("value", "options", "cause"),
    [
        (math.nan, {}, "weights of the model are not finite: blocks.0"),
        (math.inf, {}, "weights of the model are not finite: blocks.0"),
        (None, {"guidance": 1e30}, r"guidance is 1e\+30"),
    ],
)
def test_what_is_not_finite_is_an_error_with_its_step_and_cause(tmp_path, solver, value, options, cause):
    path = make(tmp_path / "run")
    checkpoint = load(path)
    if value is not None:
        name = next(name for name in checkpoint.ema if name.startswith("blocks.0") and name.endswith("weight"))
        checkpoint.ema[name][0] = value
        save(path.parent, checkpoint, keep=1)
    steps = None if solver == "dopri5" else 3
    where = "'dopri5' gave up" if solver == "dopri5" else r"(not finite|in size), and wrong since step 1 of [34]"
    with pytest.raises(ValueError, match=rf"{where}.*; {cause}"):
        run(SampleConfig(path, count=1, steps=steps, solver=solver, **options))
    assert not (tmp_path / "run/samples").exists()


def test_a_diffusion_that_is_not_finite(tmp_path):
    path = make(tmp_path / "run", train=TrainConfig(objective=DDPM()))
    checkpoint = load(path)
    next(iter(checkpoint.ema.values())).fill_(math.nan)
    save(path.parent, checkpoint, keep=1)
    with pytest.raises(
        ValueError, match=r"not finite, and wrong since step 1 of 4; weights of the model are not finite"
    ):
        run(SampleConfig(path, count=1, steps=4))


def test_latents_that_decode_to_what_is_not_finite_are_no_black_clip():
    with pytest.raises(ValueError, match="2 of 6 values of the clips are not finite"):
        to_bytes(torch.tensor([0.0, math.nan, math.inf, 1, -1, 5]))


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_a_film_has_its_colours_in_a_decoder_that_takes_bt709(tmp_path, monkeypatch, encoder):
    """Y'CbCr to R'G'B' as BT.709-6 defines it, in limited range."""
    monkeypatch.setattr("models.data.media.av.codecs_available", {encoder})
    colours = np.random.default_rng(0).integers(0, 256, (60, 3))
    colours = np.concatenate((colours, [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])).astype(np.uint8)
    image = colours.reshape(8, 8, 1, 3).repeat(256, 2).reshape(8, 8, 16, 16, 3).swapaxes(1, 2).reshape(128, 128, 3)
    write_mp4(tmp_path / "a.mp4", np.stack([image] * 3), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_range, context.color_primaries, context.color_trc)
        planes = next(container.decode(video=0)).to_ndarray().astype(float)
    assert tags == (1, 1, 1, 1)
    y = (planes[:128] - 16) / 219
    u, v = ((part.repeat(2, 0).repeat(2, 1) - 128) / 224 for part in planes[128:].reshape(2, 64, 64))
    red, blue = y + 1.5748 * v, y + 1.8556 * u
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    shown = (np.stack((red, green, blue), -1) * 255).clip(0, 255).round()
    assert abs(shown - image).max() <= 2


@pytest.mark.parametrize(("fps", "said"), [(50, False), (51, True), (100, True)])
def test_a_frame_rate_that_viewers_of_a_gif_do_not_play_is_said(tmp_path, caplog, fps, said):
    write_samples(tmp_path, np.zeros((1, 2, 16, 16, 3), np.uint8), None, [], fps)
    assert (f"fps is {fps}; a GIF of more than 50" in caplog.text) == said


def test_what_does_not_match_is_refused_with_the_reason(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        run(SampleConfig(tmp_path / "text.pt"))
    path = make(tmp_path / "run")
    content = torch.load(path, weights_only=True)
    content["config"]["depth"] = 3
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"(?s)do not match the stored model configuration.*blocks\.2"):
        run(SampleConfig(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="class is 'dog'; it may be one of ant, bee, cow"):
        run(SampleConfig(path, classes=("dog",)))
    with pytest.raises(ValueError, match="solver is 'ddim'"):
        run(SampleConfig(path, solver="ddim"))
    with pytest.raises(ValueError, match="count is 0"):
        run(SampleConfig(path, count=0))


def test_the_command_line(tmp_path, capsys):
    path = make(tmp_path / "run")
    main(
        [str(path), "--class", "bee", "0", "--count", "3", "--steps", "1", "--seed", "4", "--out", str(tmp_path / "o")]
    )
    assert "bee, ant, bee" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*exists already"):
        main([str(path), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit):
        main([str(path), "--speed", "3"])


def test_class_ids():
    assert class_ids((), ["a", "b"], 5).tolist() == [0, 1, 0, 1, 0]
    # A name wins over an id: digits are called by their digit.
    assert class_ids(("2", "0"), ["2", "1", "0"], 3).tolist() == [0, 2, 0]
    assert class_ids((), [], 5) is None


def test_frames_are_enlarged_by_a_whole_number():
    clip = np.arange(2 * 100 * 150 * 3, dtype=np.uint32).astype(np.uint8).reshape(1, 2, 100, 150, 3)
    assert enlarge(clip).shape == (1, 2, 200, 300, 3) and (enlarge(clip)[:, :, ::2, ::2] == clip).all()
    large = np.zeros((1, 1, 129, 131, 1), dtype=np.uint8)
    assert enlarge(large).shape == (1, 1, 129, 131, 3)
    assert mosaic(large).shape == (1, 130, 132, 3) and contact_sheet(large).shape == (129, 131, 3)


def test_without_h264_the_encoder_is_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr("models.data.media.av.codecs_available", {"mpeg4"})
    write_mp4(tmp_path / "a.mp4", np.full((3, 32, 48, 3), 90, dtype=np.uint8), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert np.abs(frames(tmp_path / "a.mp4").astype(int) - 90).max() < 4
