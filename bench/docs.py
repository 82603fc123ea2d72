"""Write the measured tables and the picture of the README and of ``docs/`` from the committed records.

``python -m bench.docs`` writes them; ``python -m bench.docs --check`` changes nothing and fails if a page differs.

A table stands in a page between two markers, and :data:`TABLES` has one function per table::

    <!-- table: models amd-epyc-avx512-bf16-2-cores -->
    <!-- /table -->

The words after the colon are the name of the table and, where a table belongs to one machine, the folder of its records
in ``bench/results``. Every committed record must be shown by a page.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import plots as drawing
from bench.harness.record import RESULTS, ROOT, key, load
from bench.harness.report import NO_RATIO, about, commits, counted, markdown, milliseconds, of_roofline, ratio
from minisora_kernels.commands import command

MARKERS = re.compile(r"(<!-- table: (?P<words>[^>]*?) -->\n)(?P<content>.*?)(<!-- /table -->)", re.DOTALL)
PICTURE = "docs/images/training-step.png"
# The contact sheet of samples by bench.systems that becomes the README's GIF.
ANIMATED, ANIMATION = "systems-digits-walt.png", "docs/images/digits-walt.gif"
NAMES = ("default", "reuse")
MODELS = ("block pair", "training step", "sampling step", "sampling run")


# Direction and column of the cells of the table of ops.
OP_CELLS = (("fwd", "best eager"), ("fwd", "compile"), ("fwd+bwd", "best eager"), ("fwd+bwd", "compile"))
MODEL_CELLS = ("best eager", "written", "compile")

Cases = dict[tuple, dict[str, Any]]


def _records(results: Path, machine: str) -> list[dict[str, Any]]:
    """``default.json`` and ``reuse.json`` of a machine, those of them that exist; FileNotFoundError without any."""
    paths = [path for path in (results / machine / f"{name}.json" for name in NAMES) if path.exists()]
    if not paths:
        raise FileNotFoundError(f"{results / machine} has no {' and no '.join(f'{name}.json' for name in NAMES)}")
    return [load(path) for path in paths]


def _cases(records: list[dict[str, Any]]) -> list[Cases]:
    return [{key(case): case for case in record["cases"]} for record in records]


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


def records(results: Path, machine: str) -> list[str]:
    """What the tables of a machine were measured on and with."""
    return ["", *(f"- {about(record)}" for record in _records(results, machine)), ""]


def models(results: Path, machine: str) -> list[str]:
    """Training steps, sampling steps and blocks of whole models."""
    found = _records(results, machine)
    settings = " / ".join(record["allocator"] for record in found)
    return [
        "",
        f"Time of the other column over the time of ours, as medians, with the allocator {settings}. Above 1 ours is "
        "faster.",
        "",
        *_models(_cases(found), [record["ceilings"] for record in found]),
        "",
    ]


def ops(results: Path, machine: str) -> list[str]:
    """Every op, shape and dtype."""
    return ["", *_ops(_cases(_records(results, machine))), ""]


def saved(results: Path, machine: str) -> list[str]:
    """Bytes that the forward saves for the backward, without inputs and parameters."""
    return ["", *counted(_records(results, machine)[0], "saved", markdown, (*MODELS, "gelu_mlp")), ""]


def moved(results: Path, machine: str) -> list[str]:
    """Bytes that the ops of forward and backward read and write."""
    return ["", *counted(_records(results, machine)[0], "moved", markdown, MODELS), ""]


def plots(results: Path, machine: str) -> list[str]:
    """The plots of the first record of a machine."""
    return ["", *(f"![{path.stem}]({path})" for path in sorted((results / machine).glob(f"{NAMES[0]}-*.png"))), ""]


# The architectures in the table: A100, RTX 4090, H100. The record has more.
SHOWN = ("sm_80", "sm_89", "sm_90")


def compiled(results: Path) -> list[str]:
    """Per op: the most registers, spilled bytes and shared memory, the least occupancy; and bytes moved over needed."""
    record = json.loads((results / "aot.json").read_text())
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
        "",
        f"Compiled by Triton {record['triton']}; **not run on a GPU**.",
        "",
        *markdown(("op", "kernels", *SHOWN, "bytes over needed"), rows),
        "",
    ]


def nvcc(results: Path) -> list[str]:
    """Per direction and head_dim of csrc/cuda: the most of what nvcc recorded."""
    record = json.loads((results / "nvcc.json").read_text())
    groups: dict[tuple[str, int], list[str]] = {}
    for name in record["kernels"]["sm_90"]:
        found = re.search(r"(forward|backward): head_dim (\d+)", name)
        groups.setdefault((found[1], int(found[2])) if found else ("sums", 0), []).append(name)
    rows = []
    for (way, head_dim), names in sorted(groups.items()):
        cells = []
        for sm in record["kernels"]:
            kernels = [kernel for name, kernel in record["kernels"][sm].items() if name in names]
            most = [max(kernel[what] for kernel in kernels) for what in ("registers", "spilled", "stack", "shared")]
            cells.append(f"{most[0]} / {most[1]} B / {most[2]} B / {most[3] / 1024:.0f} KiB")
        rows.append((f"{way}, {head_dim}" if head_dim else way, str(len(names)), *cells))
    return [
        "",
        f"Compiled by nvcc {record['nvcc']}; **not run on a GPU**.",
        "",
        *markdown(("`window_attention`", "kernels", *record["kernels"]), rows),
        "",
    ]


TRAINED_BY = {"ddpm": "DDPM", "flow": "flow matching", "logsnr": "diffusion over the logSNR"}


def systems(results: Path, machine: str) -> list[str]:
    """What each system generates: shares of frames that a classifier recognises and that move as real ones do."""
    record = _systems_record(results, machine)
    rows = []
    for name, system in record["systems"].items():
        shares = system["generated_recognised"], min(system["generated_recognised_by_class"]), system["generated_moves"]
        how = TRAINED_BY[system["objective"]], f"`{system['sampler']}`"
        stages = ", ".join(f"`{preset}`" for preset in system["presets"])
        rows.append((name, stages, *how, *(f"{share:.1%}" for share in shares)))
    real = next(iter(record["systems"].values()))
    commits = dict.fromkeys(part["commit"] for part in (*record["systems"].values(), *record["presets"].values()))
    header = ("system", "presets, in turn", "trained by", "sampled by", "recognised", "worst digit", "moving")
    about_machine = record["machine"]
    return [
        "",
        f"{about_machine['cpu']}, {about_machine['cores']} cores, {about_machine['capability']}; torch "
        f"{record['versions']['torch']}, commits {', '.join(commits)}{' with changes' * record['dirty']}, "
        f"{record['date'][:10]}; float32 ([record]({results / machine / 'systems.json'})). Of real frames of unseen "
        f"digits {real['real_recognised']:.1%} are recognised and {real['real_moves']:.0%} move so.",
        "",
        *markdown(header, rows),
        "",
    ]


def steps(results: Path, machine: str) -> list[str]:
    """The losses and the speed of each preset of digits, on the kernels and on plain PyTorch."""
    record = _systems_record(results, machine)
    rows = []
    for name, preset in record["presets"].items():
        loss, seconds = preset["loss"], preset["columns"]["ours"]["median"]
        kernels = dict.fromkeys(re.sub("_(fwd|bwd)$", "", kernel) for kernel in preset["kernels"])
        rows.append(
            (
                *(f"`{name}`", str(preset["steps"]), f"{loss['ours']:.4f} / {loss['reference']:.4f}"),
                *(f"{loss['largest_difference']:.0e}", f"{1 / seconds:.2f}", ratio(preset, "eager")),
                "fails" if "compile_fails" in preset else ratio(preset, "compile"),
                *(f"{preset['tokens_per_s']:,.0f}", ", ".join(f"`{op}`" for op in kernels)),
            )
        )
    shares = [
        preset["encoding"] / preset["columns"]["ours"]["median"]
        for preset in record["presets"].values()
        if "encoding" in preset
    ]
    columns = ("preset", "steps", "loss", "differs by", "steps/s", "eager", "compile", "tokens/s", "kernels that ran")
    return [
        "",
        *markdown(columns, rows),
        "",
        f"The trainer uses {record['threads']} threads. To encode the clips of one step takes {min(shares):.2f} to "
        f"{max(shares):.2f} of the time of a step; `models.precompute` saves it.",
        "",
        f"![losses]({results / machine / 'systems-losses.png'})",
        "",
    ]


def _systems_record(results: Path, machine: str) -> dict[str, Any]:
    path = results / machine / "systems.json"
    record = json.loads(path.read_text())
    if not record.keys() >= {"machine", "versions", "systems", "presets"}:
        raise ValueError(f"{path} is not a record of bench.systems")
    return record


def digits(results: Path, machine: str) -> list[str]:
    """What ``make digits`` printed."""
    path = results / machine / "digits.json"
    record = json.loads(path.read_text())
    return [
        "",
        f"On {record['machine']}, `make digits` takes {record['wall_seconds'] / 60:.0f} minutes, build included. A "
        f"classifier recognises {record['generated_recognised']:.1%} of the generated frames and "
        f"{record['real_recognised']:.1%} of real frames of unseen digits ([record]({path})).",
        "",
    ]


def plans(results: Path) -> list[str]:
    """What ``models.plan`` expects of clips at 480p on GPUs."""
    record = json.loads((results / "plans.json").read_text())
    rows = []
    for plan in record["plans"]:
        config = plan["config"]
        cells = [
            f"{plan[part]['bytes'] / 1e9:.0f} GB{', does not fit' * (not plan[part]['fits'])}, "
            f"{plan[part]['seconds']:.3g} s"
            for part in ("training", "sampling")
        ]
        gpus = f"{math.prod(config['parallel'].values())} x {config['gpu']}"
        gpus = ", ".join(part for part in (gpus, _axes(config["parallel"])) if part)
        clip = " x ".join(map(str, (config["frames"], *config["size"])))
        rows.append((f"`{config['model']}`", clip, gpus, *cells))
    lines = markdown(("model", "clip", "GPUs", "a training step", "sampling in 50 steps"), rows)
    versions = f"torch {record['versions']['torch']}, commit {record['commit']}"
    return ["", f"`python -m bench.plans`, {versions}; **not run on a GPU**.", "", *lines, ""]


def processes(results: Path, machine: str) -> list[str]:
    """What a training gains by a second process on a CPU."""
    record = json.loads((results / machine / "processes.json").read_text())
    config, seconds, speed, ceiling = (record[name] for name in ("config", "seconds", "speed", "ceiling"))
    count = record["processes"]
    rows = [
        ("one", f"{config['clips']}", f"{seconds['alone']:.2f} s", ""),
        (f"{count}, one model", f"{count * config['clips']}", f"{seconds['together']:.2f} s", _between(speed)),
        (f"{count}, a model each", f"{count * config['clips']}", f"{seconds['apart']:.2f} s", _between(ceiling)),
    ]
    where = record["machine"]
    return [
        "",
        f"A DiT of {record['parameters'] / 1e6:.1f} million parameters, in bfloat16; {record['tokens']} tokens per "
        f"process and step; {where['cpu']}, {where['cores']} cores, torch {record['versions']['torch']}, "
        f"commit {record['commit']}.",
        "",
        *markdown(("processes with one thread", "clips per step", "a step", "speed"), rows),
        "",
    ]


def _between(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['q1']:.2f} to {values['q3']:.2f})"


def scale(results: Path) -> list[str]:
    """Which parallelism to take on many GPUs, and where the time of a step goes."""
    record = json.loads((results / "scale.json").read_text())
    rows = []
    for step in record["steps"]:
        place = f"{step['gpus']} x {step['gpu']}", f"{step['frames']} frames"
        if "step" not in step:
            rows.append((*place, "nothing fits", *[""] * 5))
            continue
        times = step["step"]
        rows.append(
            (
                *place,
                _axes(step["parallel"]),
                f"{step['bytes'] / 1e9:.0f} GB",
                f"{times['compute']:.2f} s",
                f"{step['received'] / 1e9:.1f} GB, {times['transfer']:.2f} s",
                f"{times['exposed']:.2f} s",
                f"{step['clips_per_second']:.3g}",
            )
        )
    assumed = record["assumed"]
    header = ("GPUs", "clip", "take", "memory", "compute", "received", "waiting", "clips/s")
    return [
        "",
        f"`python -m bench.scale`, {record['model']} at {' x '.join(map(str, record['size']))}, torch "
        f"{record['versions']['torch']}, commit {record['commit']}; **estimated, not run**. Assumed: "
        f"{assumed['utilization']:.0%} of the peak FLOP/s, {assumed['link_efficiency']:.0%} of the links, at most "
        f"{assumed['most_clips']} clips per step.",
        "",
        *markdown(header, rows),
        "",
        *(
            f"- {each['gpu']}, {each['per_node']} per node: {each['link'] / 1e9:.0f} GB/s in a node, "
            f"{each['network'] / 1e9:.3g} GB/s per GPU between nodes. {each['source']}."
            for each in record["clusters"]
        ),
        "",
    ]


def _axes(parallel: dict[str, int]) -> str:
    return " x ".join(f"{name} {number}" for name, number in parallel.items() if number > 1)


def inductor(results: Path) -> list[str]:
    """Bytes that the kernels and Inductor's code read and write, in activations."""
    record = json.loads((results / "inductor.json").read_text())
    rows = []
    for name, traffic in record["rows"].items():
        op, shape = name.split(": ", 1)
        parts = [traffic[part] for part in ("forward", "backward")]
        cells = (f"{part['ours']:.1f} / {part['compile']:.1f} / {part['least']:.1f}" for part in parts)
        rows.append((f"`{op}`", shape, *cells))
    versions, changes = record["versions"], " with changes" * record["dirty"]
    return [
        "",
        "Bytes read and written, in activations (the tokens in bfloat16): ours / `torch.compile` / if every tensor "
        f"passed once. `python -m bench.inductor`: code of torch {versions['torch']} and Triton {versions['triton']}, "
        f"for the properties of an {record['device']}, commit {record['commit']}{changes}; **not run on a GPU**.",
        "",
        *markdown(("op", "shape", "forward", "backward"), rows),
        "",
    ]


def host(results: Path) -> list[str]:
    """What a call costs the host, with the launchers of an earlier commit beside it."""
    record = json.loads((results / "host.json").read_text())
    before = record["before"]
    rows = []
    for name, directions in record["calls"].items():
        for direction, call in directions.items():
            old = before["calls"].get(name, {}).get(direction)
            cells = (
                ("-", "-", "-") if old is None else (f"{old['us']:.0f}", str(old["launches"]), f"{old['ratio']:.1f}")
            )
            now = (f"{call['us']:.0f}", str(call["launches"]), f"{call['ratio']:.1f}")
            rows.append((f"`{name.split()[0]}` {' '.join(name.split()[1:])}".strip(), direction, *cells, *now))
    header = ("op", "direction", "us before", "launches", "in bare launches", "us now", "launches", "in bare launches")
    return [
        "",
        f"`python -m bench.host_time`, {record['cpu']}, Triton {record['triton']}; now: commit {record['commit']}, "
        f"before: commit {before['commit']}. A bare Triton launch takes {record['bare']:.1f} us. "
        "Thread CPU time over a driver that does nothing; **not run on a GPU**.",
        "",
        *markdown(header, rows),
        "",
    ]


def fuse(results: Path, machine: str) -> list[str]:
    """What fuse is worth on models of others: speed, bytes kept for the backward, and the sites that were found."""
    path = results / machine / "fuse.json"
    record = json.loads(path.read_text())
    rows = []
    for case in record["cases"]:
        ratios = (case["ratios"].get(column) for column in ("compile", "fuse", "fuse, compile"))
        kept = (case.get("kept", {}).get(each) for each in ("full", "LoRA"))
        cells = (NO_RATIO if number is None else f"{number:.2f}" for number in (*ratios, *kept))
        rows.append((case["model"], case["dtype"], case["direction"], *cells, str(sum(case["found"].values()))))
    header = ("model", "dtype", "direction", "compile", "fuse", "fuse, compile", "kept", "kept, LoRA", "sites")
    about_machine = record["machine"]
    return [
        "",
        f"{about_machine['cpu']}, {record['threads']} threads; torch {record['versions']['torch']}, "
        f"{commits(record)}, {record['date'][:10]} ([record]({path})). The time of "
        "eager over that of the column: above 1 the column is faster. Kept: bytes that the forward of the fused model "
        "keeps for its backward, over those of eager.",
        "",
        *markdown(header, rows),
        "",
    ]


def worth(results: Path, machine: str) -> list[str]:
    """The same in short: training steps in bfloat16."""
    record = json.loads((results / machine / "fuse.json").read_text())
    columns = ("fuse", "fuse, compile", "compile")
    rows = []
    for case in record["cases"]:
        if (case["dtype"], case["direction"]) == ("bfloat16", "fwd+bwd"):
            found = (case["ratios"].get(column) for column in columns)
            cells = (NO_RATIO if number is None else f"{number:.2f}" for number in found)
            rows.append((case["model"], *cells, f"{case['kept']['full']:.2f}"))
    header = ("model of diffusers", "fuse", "fuse, Inductor", "Inductor alone", "bytes kept")
    return ["", *markdown(header, rows), ""]


TABLES: dict[str, Callable[..., list[str]]] = {
    function.__name__: function
    for function in (
        records,
        models,
        ops,
        saved,
        moved,
        plots,
        systems,
        steps,
        digits,
        compiled,
        nvcc,
        plans,
        processes,
        scale,
        inductor,
        host,
        fuse,
        worth,
    )
}
# The table that shows a record, by the name of its file.
SHOWN_BY = {
    "default.json": "models",
    "systems.json": "systems",
    "digits.json": "digits",
    "aot.json": "compiled",
    "nvcc.json": "nvcc",
    "plans.json": "plans",
    "processes.json": "processes",
    "scale.json": "scale",
    "inductor.json": "inductor",
    "host.json": "host",
    "fuse.json": "fuse",
}


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(page: Path, results: Path) -> str:
    """The text of a page with its tables written from the records.

    Raises:
        ValueError: a marker names no table, a record is missing or damaged, or a marker has no partner.
    """

    def table(match: re.Match[str]) -> str:
        name, *arguments = match["words"].split()
        if name not in TABLES:
            raise ValueError(f"{page}: there is no table {name!r}; it may be one of {', '.join(TABLES)}")
        try:
            text = "\n".join(TABLES[name](results, *arguments))
        except (OSError, LookupError, TypeError) as error:
            raise ValueError(f"{page}: the table {match['words']!r} cannot be written: {error!r}") from error
        # Tables link to files by their full path; a page needs the path from its own folder.
        links = re.sub(
            r"\]\((/[^)]*)\)", lambda link: f"]({Path(os.path.relpath(link[1], page.parent)).as_posix()})", text
        )
        return f"{match[1]}{links}\n{match[4]}"

    text = page.read_text()
    matches = len(MARKERS.findall(text))
    if not matches == text.count("<!-- table: ") == text.count("<!-- /table -->"):
        raise ValueError(f"{page}: each `<!-- table: NAME -->` needs one `<!-- /table -->` after it")
    return MARKERS.sub(table, text)


def unshown(texts: list[str], results: Path) -> Iterator[str]:
    """The markers of the tables that no page has though their record is committed."""
    for path in sorted(results.rglob("*.json")):
        folder = path.parent.relative_to(results).as_posix()
        marker = f"<!-- table: {SHOWN_BY.get(path.name, '')}{'' if folder == '.' else ' ' + folder} -->"
        if path.name in SHOWN_BY and not any(marker in text for text in texts):
            yield marker


def pictures(root: Path, results: Path, *, check: bool) -> list[str]:
    """The pictures that are not of the committed records; unless ``check`` they are drawn."""
    shown = [load(record) for record in sorted(results.glob("*/default.json"))]
    steps = json.dumps(drawing.training_steps(shown)).encode()
    stale = []
    if shown and not drawing.is_of(root / PICTURE, steps):
        stale.append(PICTURE)
        if not check:
            drawing.draw_training_steps(shown, root / PICTURE, steps)
    for sheet in sorted(results.glob(f"*/{ANIMATED}"))[:1]:
        if not drawing.is_of(root / ANIMATION, sheet.read_bytes()):
            stale.append(ANIMATION)
            if not check:
                drawing.animate(sheet, root / ANIMATION)
    return stale


@command(failed=2)
def main(arguments: list[str], *, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with status 1 if a page differs")
    options = parser.parse_args(arguments)
    results = root / RESULTS.relative_to(ROOT)
    texts = {page: filled(page, results) for page in pages(root)}
    if missing := list(unshown(list(texts.values()), results)):
        raise ValueError(f"no page has the marker {', '.join(missing)}; add it to a page of docs/benchmarks")
    stale = pictures(root, results, check=options.check)
    changed = [page for page, text in texts.items() if page.read_text() != text]
    if not options.check:
        for page in changed:
            page.write_text(texts[page])
        return 0
    names = [page.relative_to(root).as_posix() for page in changed] + stale
    if names:
        print(f"error: {', '.join(names)} differs from bench/results: run `python -m bench.docs`", file=sys.stderr)
    return bool(names)


if __name__ == "__main__":
    sys.exit(main())
