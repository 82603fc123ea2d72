"""``python -m bench.systems``: every system on moving digits, trained, sampled, judged and timed.

Each preset is trained twice for the same steps, on the kernels and on the reference, side by side on one thread each.
The two curves of the loss must be one but for rounding. What the kernels trained then makes clips, in all of a system's
stages, which a classifier judges (``models/digits.py``). At last the trainer's step is timed, with all threads: plain
PyTorch, ``torch.compile`` of it, and the kernels take turns.

Leaves ``systems.json``, ``systems-losses.png`` and a sheet ``systems-<preset>.png`` of each system's samples in
``bench/results/<machine>``. What is in the folder of the runs already is not trained again, so a run that was stopped
goes on; the record is of the commit that judges and times.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch._inductor import config as inductor_config

from bench.harness import record
from bench.harness.clock import Clock
from bench.harness.session import release_memory, summary
from minisora_kernels.commands import command
from minisora_kernels.counters import Counter
from models import checkpoint as checkpoints
from models import digits
from models.data.encoder import Decoder
from models.data.open import open_source
from models.runtime.allocator import reuse_large_allocations
from models.runtime.device import choose_backend
from models.runtime.plain import merge
from models.sampling.sampler import SOLVERS
from models.training.config import RESUMABLE, TrainConfig, from_dict
from models.training.presets import QUALITY_PRESETS, training_order
from models.training.run import Stopped
from models.training.trainer import Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The presets of each system in the order of their training; the last makes the frames that are judged.
SYSTEMS = {system: training_order(preset) for system, preset in QUALITY_PRESETS.items()}
BACKENDS = {"ours": "auto", "reference": "reference"}
COLUMNS = {"eager": "reference", "compile": "reference", "ours": "auto"}
ROUNDS = 9
SAMPLE_SECONDS = 0.5
# In float32 the backends' losses and norms of the gradient agree to six digits at first.
FIRST_BOUND = 1e-4
# A VQGAN's nearest code, one of thousands, changes with the last digit, and a loss with it by a thousandth.
EARLY, EARLY_BOUND = 20, 2e-3
# Steps that a curve is averaged over.
SMOOTH = 50


def single_thread() -> None:
    torch.set_num_threads(1)
    reuse_large_allocations()


def train(preset: str, runs: Path) -> dict[str, Path]:
    """The folders of the two runs of a preset, trained as far as that is still to be done."""
    if preset in digits.PREREQUISITES:
        digits.encode(digits.PREREQUISITES[preset], runs)  # before two processes do
    with ProcessPoolExecutor(2, get_context("spawn"), single_thread) as pool:
        running = {name: pool.submit(digits.train, preset, runs, backend) for name, backend in BACKENDS.items()}
        folders = {name: run.result().parent for name, run in running.items()}
    for folder in folders.values():
        refuse_another(digits.config_of(preset, runs), folder)
    return folders


def refuse_another(config: TrainConfig, folder: Path) -> None:
    """Raise ValueError if the folder has a run whose configuration gives other losses."""
    trained = from_dict(checkpoints.latest(folder)[1].train)
    trained = dataclasses.replace(trained, data=dataclasses.replace(trained.data, source=config.data.source))
    free = {"run"} | RESUMABLE - {"steps"}
    names = [item.name for item in dataclasses.fields(config) if item.name not in free]
    changed = [name for name in names if getattr(config, name) != getattr(trained, name)]
    if changed:
        raise ValueError(f"{folder} was trained with another {', '.join(changed)}; use another --runs")


def losses(folder: Path) -> list[float]:
    with open(folder / "losses.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def compare_losses(ours: list[float], reference: list[float]) -> dict[str, float]:
    """The mean losses of the last tenth of the steps, and the largest relative difference of the losses of a step.

    Both runs see the same batches and noise. Rounding alone tells them apart, and training magnifies it: that the
    first steps agree is what shows the kernels right.

    Raises:
        ValueError: curves that part in the first steps.
    """
    apart = [abs(one - other) / abs(other) for one, other in zip(ours, reference, strict=True)]
    if max(apart[:EARLY]) > EARLY_BOUND:
        raise ValueError(f"the losses of the first {EARLY} steps differ by up to {max(apart[:EARLY]):.1e}, relatively")
    last = max(1, len(ours) // 10)
    return {
        "ours": statistics.fmean(ours[-last:]),
        "reference": statistics.fmean(reference[-last:]),
        "largest_difference": max(apart),
    }


def randomize(model: torch.nn.Module) -> None:
    """Random numbers for the weights that are zero at first, behind which a fresh model computes nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)


def time_steps(config: TrainConfig) -> dict[str, Any]:
    """Time steps of the trainer in turns: seconds per step and column, ratios, tokens per second, kernels that ran.

    Where compiled code refuses what PyTorch gives it, there is no such column, but the reason.

    Raises:
        ValueError: columns whose first loss or norm of the gradient is not the same.
    """
    torch._dynamo.reset()
    release_memory()
    clock = Clock(torch.device("cpu"))
    with ExitStack() as stack:
        # Compiled code draws random numbers as eager code does, so that the columns can be compared.
        stack.enter_context(inductor_config.patch(fallback_random=True))
        trainers, first, kernels, failed = {}, {}, [], {}
        for name, backend in COLUMNS.items():
            trainer = trainers[name] = Trainer(merge(config, {"backend": backend}))
            stack.callback(trainer.batches.close)
            randomize(trainer.model.train())
            if name == "compile":
                trainer.model.compile(dynamic=False)
            try:
                with choose_backend(backend):
                    with Counter() if name == "ours" else nullcontext() as counter:
                        loss, norm, _ = trainer.train_step()
                    trainer.train_step()
            except AssertionError as error:  # of code that Inductor made, about the layout of what PyTorch gave it
                if name != "compile":
                    raise
                del trainers[name]
                failed = {"compile_fails": str(error).splitlines()[0]}
                continue
            first[name] = loss.item(), norm.item()
            if counter is not None:
                kernels = sorted(counter.kernels)
        for name, values in first.items():
            if any(
                abs(one - other) > FIRST_BOUND * abs(other) for one, other in zip(values, first["eager"], strict=True)
            ):
                raise ValueError(f"{name}: first loss and norm of the gradient are {values}, not {first['eager']}")

        def steps(name: str, calls: int) -> float:
            with choose_backend(COLUMNS[name]):
                return clock(trainers[name].train_step, calls)

        stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
        names = list(trainers)
        calls = max(1, math.ceil(SAMPLE_SECONDS / max(steps(name, 1) for name in names)))
        samples: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(ROUNDS):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                samples[name].append(steps(name, calls))
        found = summary(samples)
        ours = trainers["ours"]
        tokens = ours.tokens / ours.step / found["columns"]["ours"]["median"]
    return {**found, **failed, "tokens_per_s": tokens, "kernels": kernels}


def encoding(preset: str, runs: Path) -> float:
    """Seconds that the autoencoder takes for the clips of one step, which latents made beforehand save."""
    config = digits.config_of(preset, runs)
    clips = open_source(digits.config_of(digits.PREREQUISITES[preset].autoencoder, runs).data)
    source = open_source(config.data)
    batch = [clips.clip(i, np.random.default_rng(i))[0] for i in range(config.batch_size)]
    assert source.encoder is not None, f"{preset} trains on no latents"
    encode = Decoder(source.encoder, torch.device("cpu")).encode
    stacked = torch.from_numpy(np.stack(batch))
    clock = Clock(torch.device("cpu"))
    return statistics.median(clock(lambda: encode(stacked)) for _ in range(ROUNDS))


def draw(curves: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    """A panel a preset: both curves, averaged over ``SMOOTH`` steps."""
    columns = math.ceil(len(curves) ** 0.5)
    rows = math.ceil(len(curves) / columns)
    size = (4.3 * columns, 3 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, (preset, lines) in zip(panels.flat, curves.items(), strict=False):
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


def run(runs: Path, wanted: Sequence[str]) -> Path:
    """Train, judge and time the ``wanted`` systems; returns the record, in which the others stay as they are."""
    found: dict[str, Any] = {**record.head(torch.device("cpu"), "reuse"), "systems": {}, "presets": {}}
    path = record.path_of(found["machine"], "systems")
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(wanted) < len(SYSTEMS):
        kept = json.loads(path.read_text())
        found |= {part: kept[part] for part in ("systems", "presets")}
    own = {"commit": found["commit"]}
    curves = {}
    for name, presets in SYSTEMS.items():
        for preset in presets:
            if preset in curves:
                continue
            folders = train(preset, runs)
            curves[preset] = {kind: losses(folder) for kind, folder in folders.items()}
            if name not in wanted:
                continue
            config = digits.config_of(preset, runs)
            found["presets"][preset] = {
                **own,
                "steps": config.steps,
                "loss": compare_losses(**curves[preset]),
                **time_steps(config),
            }
            if preset in digits.PREREQUISITES:
                found["presets"][preset]["encoding"] = encoding(preset, runs)
        if name not in wanted:
            continue
        objective = digits.config_of(presets[-1], runs).objective
        judged = digits.run(digits.DigitsConfig(presets[-1], runs))
        shutil.copy(runs / presets[-1] / "digits.png", path.with_name(f"systems-{presets[-1]}.png"))
        sampler = SOLVERS[objective.name][0]
        what = {"presets": presets, "objective": objective.name, "sampler": sampler}
        found["systems"][name] = {**own, **what, **judged}
        path.write_text(json.dumps(record.round_floats(found), indent=1) + "\n")
    about = f"{found['machine']['cpu']}, torch {found['versions']['torch']}, commit {found['commit']}"
    draw(curves, about, path.with_name("systems-losses.png"))
    return path


@command()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.systems", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"), help="folder of the runs")
    parser.add_argument(
        "--system",
        choices=tuple(SYSTEMS),
        nargs="+",
        default=tuple(SYSTEMS),
        help="judge and time only these; the existing record keeps the others, each with its commit",
    )
    options = parser.parse_args(arguments)
    reuse_large_allocations()
    try:
        print(run(options.runs, options.system))
    except Stopped as stopped:
        sys.exit(f"{stopped}\nrun the same command again to go on")


if __name__ == "__main__":
    main()
