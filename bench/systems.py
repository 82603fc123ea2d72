"""``python -m bench.systems``: every system on moving digits, trained, sampled, judged and timed.

Each preset is trained twice for the same steps, on the kernels and on the reference, side by side on one thread each:
the two curves of the loss must be one but for rounding. What the kernels trained then makes clips, in all of a system's
stages, which a classifier judges (``models/digits.py``). At last the trainer's step is timed, with all threads: plain
PyTorch, ``torch.compile`` of it, and the kernels take turns.

Leaves ``systems.json``, ``systems-losses.png`` and a sheet ``systems-<preset>.png`` of each system's samples in
``bench/results/<machine>``. What is in the folder of the runs already is not trained again, so a run that was stopped
goes on; the record is of the commit that judges and times.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from bench import record
from bench.clock import Clock
from bench.counters import Counter
from bench.harness import summary
from models import digits
from models.allocator import reuse_large_allocations
from models.config import TrainConfig, merge
from models.latents import Decoder
from models.sample import choose_backend
from models.samplers import SOLVERS
from models.train import Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The presets of each system in the order of their training; the last makes the frames that are judged.
SYSTEMS = {
    "W.A.L.T": ("digits-walt-tokenizer", "digits-walt"),
    "DiT": ("digits-walt-tokenizer", "digits-dit"),
    "Latte": ("digits-walt-tokenizer", "digits-latte"),
    "STDiT": ("digits-walt-tokenizer", "digits-stdit"),
    "SiT": ("digits-walt-tokenizer", "digits-sit"),
    "StableCascade with time": ("digits-cascade-a", "digits-cascade-c", "digits-cascade-b"),
}
BACKENDS = {"ours": "auto", "reference": "reference"}
COLUMNS = {
    "eager": {"backend": "reference"},
    "compile": {"backend": "reference", "compile": True},
    "ours": {"backend": "auto"},
}
ROUNDS = 9
SAMPLE_SECONDS = 0.5
# Steps that a curve is averaged over.
SMOOTH = 50


def single_thread() -> None:
    torch.set_num_threads(1)
    reuse_large_allocations()


def train(preset: str, runs: Path) -> dict[str, Path]:
    """The folders of the two runs of a preset, trained as far as that is still to be done."""
    if preset in digits.AHEAD:
        digits.encode(digits.AHEAD[preset], runs)  # before two processes do
    with ProcessPoolExecutor(2, get_context("spawn"), single_thread) as pool:
        running = {name: pool.submit(digits.train, preset, runs, backend) for name, backend in BACKENDS.items()}
        return {name: run.result().parent for name, run in running.items()}


def losses(folder: Path) -> list[float]:
    with open(folder / "losses.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def compared(ours: list[float], reference: list[float]) -> dict[str, Any]:
    """The mean losses of the last tenth of the steps, and by how much the two curves differ, against their noise.

    ``difference`` is that of the means; ``noise`` the standard error of one of them, with steps taken as independent.
    """
    last = len(ours) // 10
    tails = {"ours": ours[-last:], "reference": reference[-last:]}
    means = {name: statistics.fmean(tail) for name, tail in tails.items()}
    return {
        **means,
        "difference": means["ours"] - means["reference"],
        "noise": statistics.stdev(tails["reference"]) / math.sqrt(last),
    }


def timed(config: TrainConfig) -> dict[str, Any]:
    """Steps of the trainer in turns: steps/s of each column, ratios of time, tokens/s, and the kernels that ran.

    Raises:
        AssertionError: columns whose first losses are not the same.
    """
    clock = Clock(torch.device("cpu"))
    with ExitStack() as stack:
        trainers, first, kernels = {}, {}, []
        for name, changes in COLUMNS.items():
            trainer = Trainer(merge(config, changes))
            stack.callback(trainer.batches.close)
            trainer.model.train()
            trainers[name] = trainer
            with choose_backend(trainer.config.backend):
                with Counter() if name == "ours" else nullcontext() as counter:
                    first[name] = trainer.train_step()[0].item()
                trainer.train_step()  # with the shapes of gradients and moments that are there now
            if counter is not None:
                kernels = sorted(counter.kernels)
        assert all(abs(loss - first["eager"]) < 1e-3 * first["eager"] for loss in first.values()), first

        def steps(name: str) -> float:
            with choose_backend(trainers[name].config.backend):
                return clock(trainers[name].train_step, calls)

        calls = 1
        calls = max(1, math.ceil(SAMPLE_SECONDS / max(steps(name) for name in COLUMNS)))
        samples: dict[str, list[float]] = {name: [] for name in COLUMNS}
        names = list(COLUMNS)
        for turn in range(ROUNDS):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                samples[name].append(steps(name))
        found = summary(samples)
        ours = trainers["ours"]
        tokens = ours.tokens / ours.step / found["columns"]["ours"]["median"]
    return {**found, "tokens_per_s": tokens, "kernels": kernels}


def encoding(preset: str, runs: Path) -> float:
    """Seconds that the autoencoder takes for the clips of one step, which latents made beforehand save."""
    config = digits.configured(preset, runs)
    clips = digits.configured(digits.AHEAD[preset].autoencoder, runs).data.open()
    source = config.data.open()
    batch = [clips.clip(i, np.random.default_rng(i))[0] for i in range(config.batch_size)]
    encode = Decoder(source.encoder, torch.device("cpu")).encode
    stacked = torch.from_numpy(np.stack(batch))
    clock = Clock(torch.device("cpu"))
    return statistics.median(clock(lambda: encode(stacked)) for _ in range(ROUNDS))


def draw(curves: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    """A panel a preset: both curves, averaged over ``SMOOTH`` steps."""
    figure, panels = plt.subplots(3, 3, figsize=(13, 9), layout="constrained")
    for axes, (preset, lines) in zip(panels.flat, curves.items(), strict=True):
        for (name, line), style in zip(lines.items(), ("-", "--"), strict=True):
            smooth = [statistics.fmean(line[i : i + SMOOTH]) for i in range(0, len(line) - SMOOTH + 1, SMOOTH)]
            axes.plot([SMOOTH * (i + 0.5) for i in range(len(smooth))], smooth, style, label=name)
        axes.set(yscale="log", title=preset, xlabel="step", ylabel="loss")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=7)
    panels[0][0].legend()
    figure.suptitle(f"{title}; means of {SMOOTH} steps", size=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def run(runs: Path) -> Path:
    """Train, judge and time; returns the record."""
    found: dict[str, Any] = {**record.head(torch.device("cpu"), "reuse"), "systems": {}, "presets": {}}
    path = record.path_of(found["machine"], "systems")
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name, presets in SYSTEMS.items():
        for preset in presets:
            if preset in curves:
                continue
            folders = train(preset, runs)
            curves[preset] = {kind: losses(folder) for kind, folder in folders.items()}
            config = digits.configured(preset, runs)
            found["presets"][preset] = {
                "steps": config.steps,
                "loss": compared(**curves[preset]),
                **timed(config),
            }
            if preset in digits.AHEAD:
                found["presets"][preset]["encoding"] = encoding(preset, runs)
        objective = digits.configured(presets[-1], runs).objective
        judged = digits.run(digits.DigitsConfig(presets[-1], runs))
        shutil.copy(runs / presets[-1] / "digits.png", path.with_name(f"systems-{presets[-1]}.png"))
        sampler = SOLVERS[objective.name][0]
        found["systems"][name] = {"presets": presets, "objective": objective.name, "sampler": sampler, **judged}
        print(json.dumps(record.rounded(found["systems"][name]), indent=1))
    path.write_text(json.dumps(record.rounded(found), indent=1) + "\n")
    about = f"{found['machine']['cpu']}, torch {found['versions']['torch']}, commit {found['commit']}"
    draw(curves, about, path.with_name("systems-losses.png"))
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.systems", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"), help="folder of the runs")
    options = parser.parse_args(arguments)
    reuse_large_allocations()
    try:
        print(run(options.runs))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
