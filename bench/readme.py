"""``python -m bench.readme``: write the README's measured tables anew from the committed records; ``--check`` verifies.

Between the markers stand, for every machine in ``bench/results``, the tables of ``default.json`` and of ``reuse.json``
(saved with ``--allocator reuse``) and the plots of the first of them; then what ``aot.json`` has of the Triton kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.record import RESULTS, ROOT, key, load
from bench.report import NO_RATIO, about, counted, markdown, milliseconds, of_roofline, ratio

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SYSTEMS_BEGIN, SYSTEMS_END = "<!-- systems:begin -->", "<!-- systems:end -->"
PLANS_BEGIN, PLANS_END = "<!-- plans:begin -->", "<!-- plans:end -->"
NAMES = ("default", "reuse")
MODELS = ("block pair", "training step", "sampling step", "sampling run")


# Direction and column of the cells of the table of ops.
OP_CELLS = (("fwd", "best eager"), ("fwd", "compile"), ("fwd+bwd", "best eager"), ("fwd+bwd", "compile"))
MODEL_CELLS = ("best eager", "written", "compile")

Cases = dict[tuple, dict[str, Any]]


def _cell(records: list[Cases], place: tuple, direction: str, column: str) -> str:
    """Time over that of ours, in each record."""
    found = [cases.get((*place, direction)) for cases in records]
    cells = [ratio(case, column, with_spread=False) if case else NO_RATIO for case in found]
    return NO_RATIO if set(cells) == {NO_RATIO} else " / ".join(cells)


def _ops(records: list[Cases]) -> list[str]:
    places = {name[:3]: None for cases in records for name in cases if name[0] not in MODELS}
    rows = [(f"`{place[0]}`", *place[1:], *(_cell(records, place, *cell) for cell in OP_CELLS)) for place in places]
    return markdown(("op", "shape", "dtype", *(f"{direction}: {column}" for direction, column in OP_CELLS)), rows)


def _models(records: list[Cases], ceilings: list[dict[str, Any]]) -> list[str]:
    names = {name: None for cases in records for name in cases if name[0] in MODELS}
    rows = []
    for *place, direction in names:
        found = [cases.get((*place, direction)) for cases in records]
        ours = " / ".join(milliseconds(case["columns"]["ours"]["median"]) if case else NO_RATIO for case in found)
        shares = " / ".join(
            of_roofline(case, each) if case else NO_RATIO for case, each in zip(found, ceilings, strict=True)
        )
        ratios = (_cell(records, tuple(place), direction, part) for part in MODEL_CELLS)
        rows.append((*place, direction, ours, *ratios, shares))
    header = ("", "model", "dtype", "direction", "ours, ms", "best eager", "as written", "compile", "ours of roofline")
    return markdown(header, rows)


def section(records: list[dict[str, Any]], plots: list[str]) -> list[str]:
    """The lines of one machine."""
    cases = [{key(case): case for case in record["cases"]} for record in records]
    settings = " / ".join(record["allocator"] for record in records)
    lines = [f"- {about(record)}" for record in records]
    lines += [
        "",
        f"Time of the other column over that of ours, medians, allocator {settings}; above 1 ours is faster.",
        "",
        *_models(cases, [record["ceilings"] for record in records]),
        "",
        "A sampling run is of four steps; what stands there as written is ours with modulations computed step by step.",
        "",
        *(f"![{Path(plot).stem}]({plot})" for plot in plots),
        "",
        "<details><summary>Every op, shape and dtype</summary>",
        "",
        *_ops(cases),
        "",
        "</details>",
        "",
        "Bytes saved for the backward, without inputs and parameters:",
        "",
        *counted(records[0], "saved", markdown, (*MODELS, "gelu_mlp")),
        "",
        "Bytes that the ops of forward and backward read and write (compile: Inductor's own count):",
        "",
        *counted(records[0], "moved", markdown, MODELS),
        "",
    ]
    return lines


# The architectures in the README: A100, RTX 4090, H100. The record has more.
SHOWN = ("sm_80", "sm_89", "sm_90")


def _compiled(path: Path) -> list[str]:
    """Per op: the most registers, spilled bytes and shared memory, the least occupancy; and bytes moved over needed."""
    record = json.loads(path.read_text())
    rows = []
    for op in dict.fromkeys(name.split()[0] for name in record["kernels"][SHOWN[0]]):
        cells = []
        for sm in SHOWN:
            found = [kernel for name, kernel in record["kernels"][sm].items() if name.split()[0] == op]
            most = [max(kernel[what] for kernel in found) for what in ("registers", "spilled", "shared")]
            least = min(kernel["occupancy"] for kernel in found)
            cells.append(f"{most[0]} / {most[1]} B / {most[2] / 1024:.0f} KiB / {least:.0%}")
        moved = [bytes_["does"] / bytes_["must"] for name, bytes_ in record["traffic"].items() if name.split()[0] == op]
        rows.append((f"`{op}`", str(len(found)), *cells, f"{min(moved):.2f} to {max(moved):.2f}"))
    return [
        "Triton kernels, forward and backward, on the same shapes and on calls that reach all that a launcher can "
        f"choose, compiled by Triton {record['triton']} and **not run "
        "on a GPU**: the most registers a thread, spilled bytes and shared memory of a block, and the least share of a "
        "multiprocessor's warps, by architecture; bytes read and written over those of passing every tensor once.",
        "",
        *markdown(("op", "kernels", *SHOWN, "bytes over needed"), rows),
        "",
    ]


def block(results: Path = RESULTS) -> str:
    """What belongs between the markers."""
    lines: list[str] = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        paths = [path for path in (folder / f"{name}.json" for name in NAMES) if path.exists()]
        if paths:
            plots = sorted(folder.glob(f"{paths[0].stem}-*.png"))
            names = [path.relative_to(results.parent.parent).as_posix() for path in plots]
            lines += section([load(path) for path in paths], names)
    if (results / "aot.json").exists():
        lines += _compiled(results / "aot.json")
    return "\n".join(lines or ["No record is committed yet.", ""])


TRAINED_BY = {"ddpm": "DDPM", "flow": "flow matching", "logsnr": "diffusion over the logSNR"}


def _systems(path: Path, results: Path) -> list[str]:
    """The lines of a record by ``bench.systems``.

    Raises:
        ValueError: something else.
    """
    record = json.loads(path.read_text())
    if not record.keys() >= {"machine", "versions", "systems", "presets"}:
        raise ValueError(f"{path} is not a record of bench.systems")
    rows = []
    for name, found in record["systems"].items():
        shares = found["generated_recognised"], min(found["generated_recognised_by_class"]), found["generated_moves"]
        how = TRAINED_BY[found["objective"]], f"`{found['sampler']}`"
        rows.append(
            (name, ", ".join(f"`{preset}`" for preset in found["presets"]), *how, *(f"{s:.1%}" for s in shares))
        )
    header = ("system", "presets, in turn", "trained by", "sampled by", "recognised", "worst digit", "moving")
    steps = []
    for name, found in record["presets"].items():
        loss, seconds = found["loss"], found["columns"]["ours"]["median"]
        ops = dict.fromkeys(re.sub("_(fwd|bwd)$", "", kernel) for kernel in found["kernels"])
        steps.append(
            (
                *(f"`{name}`", str(found["steps"]), f"{loss['ours']:.4f} / {loss['reference']:.4f}"),
                *(f"{loss['largest_difference']:.0e}", f"{1 / seconds:.2f}", ratio(found, "eager")),
                "fails" if "compile_fails" in found else ratio(found, "compile"),
                *(f"{found['tokens_per_s']:,.0f}", ", ".join(f"`{op}`" for op in ops)),
            )
        )
    shares = [
        found["encoding"] / found["columns"]["ours"]["median"]
        for found in record["presets"].values()
        if "encoding" in found
    ]
    real = next(iter(record["systems"].values()))
    commits = dict.fromkeys(found["commit"] for found in (*record["systems"].values(), *record["presets"].values()))
    columns = ("preset", "steps", "loss", "differs by", "steps/s", "eager", "compile", "tokens/s", "kernels that ran")
    folder = path.parent.relative_to(results.parent.parent).as_posix()
    machine = record["machine"]
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['capability']}; torch {record['versions']['torch']}, "
        f"commits {', '.join(commits)}{' with changes' * record['dirty']}, {record['date'][:10]}; float32 "
        f"([record]({folder}/{path.name})). Of real frames of unseen digits {real['real_recognised']:.1%} are "
        f"recognised and {real['real_moves']:.0%} move so.",
        "",
        *markdown(header, rows),
        "",
        "The loss is the mean over the last tenth of the steps, with the kernels / with PyTorch alone from one seed. "
        "Differs by: the largest relative difference of the two at any step. Training magnifies a rounding, most where "
        "it is a jump: in the nearest code of stage A, in the norm of stage C's tokens of one number. Steps/s are of "
        f"the trainer on {record['threads']} threads; eager, compile: their time over that of ours, median and "
        "quartiles of turns.",
        "",
        *markdown(columns, steps),
        "",
        "To encode the clips of a step, which latents made beforehand save, takes "
        f"{min(shares):.2f} to {max(shares):.2f} of a step's time.",
        "",
        f"![losses]({folder}/systems-losses.png)",
        "",
    ]


def systems(results: Path = RESULTS) -> str:
    """What belongs between the markers of the systems."""
    lines: list[str] = []
    for path in sorted(results.glob("*/systems.json")):
        lines += _systems(path, results)
    return "\n".join(lines or ["No record is committed yet.", ""])


def plans(results: Path = RESULTS) -> str:
    """What belongs between the markers of the plans."""
    path = results / "plans.json"
    if not path.exists():
        return "No record is committed yet.\n"
    record = json.loads(path.read_text())
    rows = []
    for plan in record["plans"]:
        config = plan["config"]
        cells = [
            f"{plan[part]['bytes'] / 1e9:.0f} GB{', does not fit' * (not plan[part]['fits'])}, "
            f"{plan[part]['seconds']:.3g} s"
            for part in ("training", "sampling")
        ]
        gpus = f"{config['gpus']} x {config['gpu']}"
        clip = " x ".join(map(str, (config["frames"], *config["size"])))
        rows.append((f"`{config['model']}`", clip, gpus, *cells))
    lines = markdown(("model", "clip", "GPUs", "a training step", "sampling in 50 steps"), rows)
    made = f"torch {record['versions']['torch']}, commit {record['commit']}"
    return "\n".join([f"`python -m bench.plans`, {made}; **not run on a GPU**.", "", *lines, ""])


def filled(text: str, results: Path = RESULTS) -> str:
    """The README with its blocks written anew.

    Raises:
        ValueError: a README without the markers.
    """
    for begin, end, content in (
        (BEGIN, END, block(results)),
        (SYSTEMS_BEGIN, SYSTEMS_END, systems(results)),
        (PLANS_BEGIN, PLANS_END, plans(results)),
    ):
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the README must have {begin} and {end} once each")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{content}{end}{rest.split(end)[1]}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the README differs")
    options = parser.parse_args(arguments)
    text = README.read_text()
    try:
        wanted = filled(text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.check:
        README.write_text(wanted)
    elif text != wanted:
        print("error: the README's tables differ from bench/results: run `python -m bench.readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
