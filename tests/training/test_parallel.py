from __future__ import annotations

import csv
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks

from models import checkpoint as checkpoints
from models.autoencoders.vqgan import VQGANSettings
from models.checkpoint import latest
from models.data.batches import Batches
from models.data.config import DataConfig
from models.data.moving_digits import MovingDigits
from models.denoisers.dit import DiTSettings
from models.objectives.ddpm import DDPM
from models.objectives.logsnr import LogSNR
from models.objectives.reconstruction import Reconstruction
from models.parallel import draws
from models.parallel.config import ParallelConfig, SamplingConfig
from models.parallel.draws import Share, sharing
from models.parallel.ranks import check_size
from models.runtime.plain import merge
from models.sample import SampleConfig
from models.sample import run as sample
from models.training.config import OptimizerConfig, PreviewConfig, TrainConfig
from models.training.run import train
from models.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
TINY = TrainConfig(
    data=DataConfig(frames=2),
    model=DiTSettings(width=16, depth=2, heads=2, patch=(1, 8, 8), class_dropout=0.5),
    optimizer=OptimizerConfig(learning_rate=1e-2, clip=0.5, ema=0.9),
    preview=PreviewConfig(count=1, steps=1),
    steps=6,
    batch_size=8,
    save_every=3,
    device="cpu",
)


def losses(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    with open(folder / "losses.csv", newline="") as file:
        return [(float(row["loss"]), float(row["gradient_norm"])) for row in csv.DictReader(file)]


def trained(folder: Path, copies: int = 1, shard: int = 1, sequence: int = 1, **changes) -> Path:
    """The folder of a run on so many ranks, which goes on if it is there."""
    parallel = {"data": copies, "shard": shard, "sequence": sequence}
    config = merge(TINY, {"run": str(folder), "parallel": parallel} | changes)
    resume, ranks = latest(folder)[1] if folder.exists() else None, config.parallel.size
    if ranks == 1:
        train(config, resume)
    else:
        on_ranks(ranks, lambda: train(config, resume))
    return folder


def assert_same_state(one: Path, other: Path, **tolerance) -> None:
    a, b = (latest(folder)[1] for folder in (one, other))
    assert a.step == b.step
    for first, second in ((a.model, b.model), (a.ema, b.ema), (a.memory, b.memory)):
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, msg=name, **tolerance)
    for name, value in a.rng.items():
        assert torch.equal(value, b.rng[name]), name


SLOW = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((4, 1, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2))]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), *SLOW])
def test_the_losses_do_not_depend_on_the_number_of_ranks(sizes: tuple[int, int, int], tmp_path: Path):
    one = losses(trained(tmp_path / "one", accumulation=2))
    folder = trained(tmp_path / "some", *sizes, accumulation=2)
    assert len(one) == 6
    torch.testing.assert_close(losses(folder), one, rtol=2e-5, atol=0)
    assert_same_state(tmp_path / "one", folder, rtol=1e-3, atol=1e-4)
    assert losses(trained(tmp_path / "again", *sizes, accumulation=2)) == losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_a_run_goes_on_with_the_same_bits_and_on_other_ranks(sizes: tuple[int, int, int], tmp_path: Path):
    whole = losses(trained(tmp_path / "whole", *sizes))
    stopped = trained(tmp_path / "stopped", *sizes, steps=3)
    assert losses(trained(stopped, *sizes)) == whole
    assert_same_state(tmp_path / "whole", stopped, rtol=0, atol=0)
    other = trained(tmp_path / "other", 2, steps=2)
    for steps, ranks in ((3, (1, 2)), (4, (1, 1)), (6, (1, 1, 2))):
        trained(other, *ranks, steps=steps)
    torch.testing.assert_close(losses(other), whole, rtol=2e-5, atol=0)


def on_one_and_two(folder: Path, **changes) -> list[Path]:
    """The folders of a run on one rank and on two."""
    folders = []
    for ranks in (1, 2):
        config = dataclasses.replace(TINY, run=str(folder / str(ranks)), parallel=ParallelConfig(ranks), **changes)
        on_ranks(ranks, lambda config=config: train(config))
        folders.append(Path(config.run))
    return folders


@pytest.mark.parametrize("objective", [DDPM(timesteps="loss_aware"), LogSNR(weight="adaptive")])
def test_what_an_objective_remembers_is_of_all_ranks(objective, tmp_path: Path):
    folders = on_one_and_two(tmp_path, steps=2, objective=objective)
    assert latest(folders[0])[1].memory
    assert_same_state(*folders, rtol=1e-3, atol=1e-4)


def test_the_statistics_of_a_batch_norm_are_of_all_ranks(tmp_path: Path):
    model = VQGANSettings(width=8, blocks=1, codes=64)
    # After one step: a bias before the norm has a gradient of rounding alone, which AdamW makes a step of.
    folders = on_one_and_two(tmp_path, steps=1, objective=Reconstruction(), model=model)
    torch.testing.assert_close(losses(folders[1]), losses(folders[0]), rtol=2e-5, atol=0)
    one, two = (latest(folder)[1].model for folder in folders)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 2), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_ranks_that_divide_tokens_draw_a_preview_together(sizes: tuple[int, int, int], tmp_path: Path):
    def sheets(folder: Path, *sizes: int) -> list[tuple[int, np.ndarray]]:
        """Of each rank that draws: the most tokens that a block of its model had, and the preview."""
        parallel = dict(zip(("data", "shard", "sequence"), sizes, strict=True))
        config = merge(
            TINY, {"run": str(folder), "parallel": parallel, "steps": 1, "preview": {"count": 3, "steps": 2}}
        )

        def run() -> list[tuple[int, np.ndarray]]:
            draw, found = Trainer.preview, []

            def watched(self: Trainer) -> np.ndarray:
                tokens = []
                hook = self.ema.blocks[0].register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[1]))
                found.append((0, draw(self)))
                hook.remove()
                found[-1] = (max(tokens), found[-1][1])
                return found[-1][1]

            Trainer.preview = watched
            train(config)
            return found

        return [sheet for each in on_ranks(config.parallel.size, run) for sheet in each]

    ((tokens, one),) = sheets(tmp_path / "one", 1, 1, 1)
    drawn = sheets(tmp_path / "some", *sizes)
    assert len(drawn) == sizes[1] * sizes[2] and {found for found, _ in drawn} == {tokens // 2}
    for _, sheet in drawn:
        assert np.abs(sheet.astype(int) - one.astype(int)).max() <= 1
    assert len(list((tmp_path / "some" / "previews").glob("*.png"))) == 1


def test_ranks_divide_the_clips_that_are_sampled(tmp_path: Path):
    model = trained(tmp_path / "run", steps=2)

    def sampled(name: str, **options) -> np.ndarray:
        config = SampleConfig(model, out=tmp_path / name, count=5, steps=2, batch_size=2, device="cpu", **options)
        files = on_ranks({"two": 2, "four": 4}.get(name.split()[0], 1), lambda: sample(config))
        assert not any(files[1:])
        with np.load(next(file for file in files[0] if file.suffix == ".npz")) as content:
            return content["clips"]

    one = sampled("one")
    assert np.array_equal(sampled("two"), one)
    noisy = sampled("two noisy", solver="euler_maruyama"), sampled("noisy", solver="euler_maruyama")
    # The first rank has the first two clips, and draws the noise that one process draws for them.
    assert np.array_equal(noisy[0][:2], noisy[1][:2]) and not np.array_equal(noisy[0][2:4], noisy[1][2:4])
    # Two pairs, which divide the frames of a clip: bytes that a rounding decides may differ by one.
    pairs = sampled("four in pairs", parallel=SamplingConfig(sequence=2))
    assert np.abs(pairs.astype(int) - one).max() <= 1 and (pairs == one).mean() > 0.99


@pytest.mark.slow
def test_ranks_share_the_batches_of_every_bucket(tmp_path: Path):
    sizes = {"buckets": [[2, 16, 16], [4, 16, 24], [1, 24, 16]]}
    one = trained(tmp_path / "one", steps=4, batch_tokens=48, data=sizes)
    two = trained(tmp_path / "two", 2, steps=4, batch_tokens=48, data=sizes)
    torch.testing.assert_close(losses(two), losses(one), rtol=2e-5, atol=0)
    odd = trained(tmp_path / "odd", 2, steps=3, batch_tokens=60, data=sizes)
    with pytest.raises(
        ValueError, match=r"batches of \[7, 2, 10\] samples .* the run had \[6, 2, 10\], so .* must be 2"
    ):
        trained(odd, 1, batch_tokens=60, data=sizes)


@pytest.mark.slow
def test_ranks_divide_the_samples_of_every_bucket(tmp_path: Path):
    changes = {"steps": 4, "batch_tokens": 48, "data": {"buckets": [[2, 16, 16], [5, 16, 24], [3, 24, 16]]}}
    one, two = (losses(trained(tmp_path / str(ranks), sequence=ranks, **changes)) for ranks in (1, 2))
    torch.testing.assert_close(two, one, rtol=2e-5, atol=0)


def test_a_bucket_with_fewer_frames_than_ranks_is_refused(tmp_path: Path):
    data, parallel = DataConfig(buckets=((2, 16, 16), (1, 16, 24))), ParallelConfig(sequence=2)
    config = dataclasses.replace(TINY, data=data, batch_tokens=48, parallel=parallel, run=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match=r"\(1, 16, 24\), which .* parallel.sequence is 2; .* it must be at most 1"):
        on_ranks(2, lambda: train(config))


def test_ranks_divide_what_one_process_reads_and_draws():
    source = MovingDigits(frames=1, size=(16, 16))
    whole = Batches(source, 8, seed=3, prefetch=0).batch(5)
    parts = [Batches(source, 8, 3, 0, Share(rank, 2).rows(8, parts=2)).batch(5) for rank in range(2)]
    # Two parts of four samples, of which each rank has two.
    assert Share(1, 2).rows(8, parts=2) == [2, 3, 6, 7]
    for name in ("clips", "labels"):
        first, second = (getattr(part, name).chunk(2) for part in parts)
        assert torch.equal(torch.cat((first[0], second[0], first[1], second[1])), getattr(whole, name))

    def drawn(count: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.ones(count, 3)
        return [
            draws.rand(count, generator=generator),
            draws.randn((count, 3), generator=generator),
            draws.randint(2, 9, count, generator=generator),
            draws.multinomial(torch.ones(7), count, generator=generator),
            draws.dropout(x, 0.5, True, 3),
        ]

    torch.manual_seed(0)
    together = drawn(6)
    apart = []
    for rank in range(3):
        torch.manual_seed(0)
        with sharing(Share(rank, 3)):
            apart.append(drawn(2))
    for one, *others in zip(together, *apart, strict=True):
        assert torch.equal(torch.cat(others), one)


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch, tmp_path: Path):
    with pytest.raises(ValueError, match=r"batch_size is 8; .* it must be a multiple of 6, for instance 6 or 12"):
        merge(TINY, {"parallel": {"data": 3}, "accumulation": 2})
    with pytest.raises(ValueError, match=r"parallel.data is 0; it must be at least 1"):
        ParallelConfig(data=0)
    with pytest.raises(
        ValueError, match=r"there is one process, but .* is 2; start 2 with torchrun .*--nproc-per-node 2 -m --"
    ):
        train(merge(TINY, {"parallel": {"data": 2}, "run": str(tmp_path / "run")}))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes, but .* is 2; use --parallel.data 4, or --parallel.shard 2, or"):
        check_size(ParallelConfig(data=2))
    with pytest.raises(ValueError, match=r"sequence is 3; it must divide the number of processes, 4: .* 1, 2, 4$"):
        sample(SampleConfig(tmp_path, parallel=SamplingConfig(sequence=3)))
    with pytest.raises(ValueError, match=r"count is 1; each of 2 groups of 2 processes needs at least one clip"):
        sample(SampleConfig(tmp_path, parallel=SamplingConfig(sequence=2), count=1))
    with pytest.raises(ValueError, match=r"compile is True; with parallel.sequence 4 it must be False"):
        sample(SampleConfig(tmp_path, parallel=SamplingConfig(sequence=4), compile=True))
    with pytest.raises(ValueError, match=r"compile is True; with parallel.shard 2 it must be False"):
        merge(TINY, {"parallel": {"shard": 2}, "compile": True})
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_configurations_are_refused(tmp_path: Path):
    def differ() -> None:
        seed = int(os.environ["RANK"])
        train(merge(TINY, {"parallel": {"data": 2}, "run": str(tmp_path / "run"), "seed": seed}))

    with pytest.raises(RuntimeError, match=r"the configuration is .* on rank 0 and .* on rank 1"):
        on_ranks(2, differ)
    assert not (tmp_path / "run").exists()


def torchrun(folder: Path, ranks: int, *options: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "--",
    ]
    command += ["models.train", "--parallel.data", str(ranks), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = open(folder.with_suffix(".log"), "a")  # noqa: SIM115 - the process has it
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def long_run(folder: Path) -> subprocess.Popen:
    """A run on two ranks whose end nobody waits for, after its first steps; it saves only when it has to."""
    options = "--preset digits --data.frames 1 --data.size 16 16 --model.width 16 --model.depth 1 --model.heads 2"
    options += " --model.patch 1 8 8 --batch-size 4 --steps 1000000 --save-every 1000000 --log-every 1"
    options += " --optimizer.schedule constant"
    process = torchrun(folder, 2, *options.split(), "--run", str(folder))
    deadline = time.monotonic() + 120
    while not (folder / "losses.csv").exists() or len(losses(folder)) < 5:
        assert time.monotonic() < deadline and process.poll() is None, folder.with_suffix(".log").read_text()
        time.sleep(0.1)
    return process


def children(process: subprocess.Popen) -> dict[int, int]:
    """The processes that it started, by rank."""
    found = {}
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        found |= {int(line[5:]): int(number) for line in environment if line.startswith(b"RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_stops_all_and_loses_nothing_that_was_saved(victim: int, tmp_path: Path):
    folder = tmp_path / "run"
    process = long_run(folder)
    os.kill(children(process)[victim], signal.SIGKILL)
    assert process.wait(60) != 0
    _, saved = latest(folder)
    # Rank 0 saves the last whole step when it loses another rank.
    assert saved.step == 0 if victim == 0 else saved.step >= 5
    assert torchrun(folder, 1, "--resume", str(folder), "--steps", str(saved.step + 2)).wait(120) == 0
    assert latest(folder)[1].step == saved.step + 2
    assert len(losses(folder)) == saved.step + 2


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path):
    folder = tmp_path / "run"
    process = long_run(folder)
    os.kill(children(process)[1], signal.SIGTERM)
    assert process.wait(60) != 0
    log = folder.with_suffix(".log").read_text()
    step = latest(folder)[1].step
    assert step >= 5 and len(losses(folder)) == step
    assert f"stopped by SIGTERM; saved {folder}/step_{step:08d}.pt" in log
    assert f"torchrun --standalone --nproc-per-node 2 -m -- models.train --resume {folder}" in log
    assert log.count("continue with") == 1 and "tokens/s on 2 processes" in log


@pytest.mark.slow
def test_compiled_models_with_adapters_train_alike_on_ranks(tmp_path: Path):
    adapted = {"init": str(trained(tmp_path / "base", steps=1)), "lora": {"rank": 2}, "steps": 3}
    one = trained(tmp_path / "one", **adapted)

    def compiled() -> int:
        # Inductor would take a minute.
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
        train(merge(TINY, {"run": str(tmp_path / "copies"), "parallel": {"data": 2}, "compile": True} | adapted))
        return len(torch._dynamo.utils.counters["stats"])

    assert all(on_ranks(2, compiled))
    torch.testing.assert_close(losses(tmp_path / "copies"), losses(one), rtol=2e-5, atol=0)
    assert_same_state(one, tmp_path / "copies", rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_shards_with_adapters_are_written_while_the_training_goes_on(tmp_path: Path):
    adapted = {"init": str(trained(tmp_path / "base", steps=1)), "lora": {"rank": 2}}
    one, folder = trained(tmp_path / "one", **adapted), tmp_path / "run"

    def run() -> list[bool]:
        write, step, made = checkpoints.save_part, Trainer.train_step, []

        def slowly(path: Path, *arguments) -> None:
            """After the next step; a save that waited for the writing would wait for good."""
            before, deadline = len(made), time.monotonic() + 60
            while len(made) == before < 6 and time.monotonic() < deadline:
                time.sleep(0.01)
            write(path, *arguments)

        def watched(self: Trainer):
            result = step(self)
            made.append(any(folder.glob("step_*.tmp")))
            return result

        checkpoints.save_part, Trainer.train_step = slowly, watched
        train(merge(TINY, {"run": str(folder), "parallel": {"shard": 2}, "save_every": 4, "keep": 1} | adapted))
        return made

    for made in on_ranks(2, run):
        assert made[0] and made[4] and len(made) == 6
    assert [path.name for path in folder.glob("step_*")] == ["step_00000006.pt"]
    parts = sorted((folder / "step_00000006.pt").iterdir())
    assert [part.name for part in parts] == ["part_00000_of_00002.pt", "part_00001_of_00002.pt"]
    # Each has its rows alone; the first has what is not divided as well.
    sizes = [sum(x.numel() for _, x in torch.load(part)["ema"].values()) for part in parts]
    numbers = sum(x.numel() for x in latest(folder)[1].ema.values())
    assert sum(sizes) == numbers and max(sizes) < 0.6 * numbers
    torch.testing.assert_close(losses(folder), losses(one), rtol=2e-5, atol=0)
    assert_same_state(one, folder, rtol=1e-3, atol=1e-4)
    files = sample(SampleConfig(folder, out=tmp_path / "clips", count=1, steps=2, device="cpu"))
    assert any(file.suffix == ".npz" for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleeps", "stops"])
def test_a_rank_that_stands_still_is_named_with_its_step(how: str, tmp_path: Path):
    parallel = {"data": 2} if how == "sleeps" else {"shard": 2}
    config = merge(TINY, {"run": str(tmp_path / "run"), "parallel": parallel, "patience": 4})
    stopped = tmp_path / "stopped"

    def hang() -> None:
        time.sleep(60 if how == "sleeps" else 1)
        stopped.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def run() -> None:
        step = Batches.batch

        def batch(self: Batches, number: int):
            if number == 2 and os.environ["RANK"] == "1":
                hang()
            return step(self, number)

        Batches.batch = batch
        try:
            train(config)
        finally:
            if how == "stops":
                os.kill(int(stopped.read_text()), signal.SIGKILL)

    told = {"sleeps": "stands in", "stops": "does not answer, and was last in"}[how]
    message = (
        rf"nothing moved for 4 s: rank 1 {told} step 2, where it reads data; rank 0 waits in step 2, where it comp"
    )
    with pytest.raises(RuntimeError, match=message):
        on_ranks(2, run)
    # Rank 0 saved the last whole step, unless the other had a part of it.
    assert latest(tmp_path / "run")[1].step == (2 if how == "sleeps" else 0)


@pytest.mark.slow
def test_a_rank_that_writes_no_part_is_named_and_earlier_checkpoints_stay(tmp_path: Path):
    changes = {"parallel": {"shard": 2}, "save_every": 2, "patience": 8}
    config = merge(TINY, {"run": str(tmp_path / "run")} | changes)

    def run() -> None:
        write = checkpoints.save_part

        def late(path: Path, number: int, parts: int, checkpoint: checkpoints.Checkpoint) -> None:
            if number == 1 and checkpoint.step == 4:
                time.sleep(60)
            write(path, number, parts, checkpoint)

        checkpoints.save_part = late
        train(config)

    message = r"OSError: checkpoint \S*step_00000004.pt was not written: rank 1 wrote no part of it within 8 s"
    with pytest.raises(RuntimeError, match=message):
        on_ranks(2, run)
    assert [path.name for path in sorted((tmp_path / "run").glob("step_*.pt"))] == [
        "step_00000000.pt",
        "step_00000002.pt",
    ]
    assert latest(tmp_path / "run")[1].step == 2
