"""Tables of a record, for the terminal and the README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.harness.record import roofline

NO_RATIO = "-"
# The ceilings of a quiet machine change by less from the start to the end of a run.
BUSY = 1.5
# The columns of every case; a form that code bases write has a name of its own.
COMMON = ("eager", "compile", "ours", "ours in compile")
# Named forms that run our kernels all the same.
OURS = ("step by step",)


def written(case: dict[str, Any]) -> str | None:
    """Name of the case's column that is written as code bases do, or None."""
    return next((name for name in case["columns"] if name not in COMMON), None)


def best_eager(case: dict[str, Any]) -> str:
    """The fastest of the case's columns without a compiler and without our kernels: what ours has to beat."""
    names = [name for name in ("eager", written(case)) if name and name not in OURS]
    return min(names, key=lambda name: case["columns"][name]["median"])


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def size(count: float) -> str:
    power = 3 if count >= 1e9 else 2 if count >= 1e6 else 1 if count >= 1e3 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def ratio(case: dict[str, Any], column: str, *, with_spread: bool = True) -> str:
    """Time of the column over that of ours: median, and quartiles of the rounds.

    ``"best eager"`` and ``"written"`` are whichever column that is in this case.
    """
    name = {"best eager": best_eager, "written": written}.get(column, lambda _: column)(case)
    found = case["ratios"].get(name)
    if found is None:
        return NO_RATIO
    text = f"{found['median']:.2f}"
    return f"{text} [{found['q1']:.2f}, {found['q3']:.2f}]" if with_spread else text


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def of_roofline(case: dict[str, Any], ceilings: dict[str, Any]) -> str:
    least, bound = roofline(case, ceilings)
    return f"{least / case['columns']['ours']['median']:.0%} ({bound})"


def timings(record: dict[str, Any]) -> list[str]:
    header = (
        *("op", "shape", "dtype", "direction", "ours ms", "host ms", "eager", "compile", "as written", "in compile"),
        *("GB/s", "GFLOP/s", "of roofline", "peak"),
    )
    rows = []
    for case in record["cases"]:
        ours = case["columns"]["ours"]["median"]
        name = written(case)
        rows.append(
            (
                *(case[part] for part in ("op", "shape", "dtype", "direction")),
                milliseconds(ours),
                milliseconds(case["host"]["ours"]["median"]) if "host" in case else NO_RATIO,
                ratio(case, "eager"),
                ratio(case, "compile"),
                f"{name} {ratio(case, 'written')}" if name else NO_RATIO,
                ratio(case, "ours in compile", with_spread=False),
                f"{case['bytes'] / ours / 1e9:.1f}",
                f"{case['flops'] / ours / 1e9:.0f}" if case["flops"] else NO_RATIO,
                of_roofline(case, record["ceilings"]),
                size(case["peak"]["ours"]) if "peak" in case else NO_RATIO,
            )
        )
    return aligned(header, rows)


def counted(record: dict[str, Any], what: str, formatted=aligned, ops: Sequence[str] | None = None) -> list[str]:
    """The table of ``saved`` or ``moved`` bytes."""
    cases = [case for case in record["cases"] if what in case and (ops is None or case["op"] in ops)]
    rows = []
    for case in cases:
        counts = case[what]
        share = [f"{counts['ours'] / counts[name]:.2f}" if counts[name] else NO_RATIO for name in ("eager", "compile")]
        rows.append(
            (
                *(case[part] for part in ("op", "shape", "dtype")),
                *(size(counts[name]) for name in ("ours", "eager", "compile")),
                *share,
            )
        )
    return formatted(("op", "shape", "dtype", "ours", "eager", "compile", "of eager", "of compile"), rows)


def ceilings(record: dict[str, Any]) -> list[str]:
    lines = []
    for when, part in record["ceilings"].items():
        copy = ", ".join(f"{megabytes} MB {rate:.0f}" for megabytes, rate in part["copy"].items())
        matmul = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in part["matmul"].items())
        lines.append(f"{when}: copy GB/s read and written: {copy}; matmul GFLOP/s: {matmul}")
    start, end = ({**part["copy"], **part["matmul"]} for part in record["ceilings"].values())
    change = max(max(rate / end[name], end[name] / rate) for name, rate in start.items())
    if change > BUSY:
        lines.append(
            f"WARNING: these differ by up to {change:.1f}x: something else ran on this machine; repeat the run"
        )
    return lines


def commits(record: dict[str, Any]) -> str:
    """The commit that a record is of, and those of the cases that were not run again."""
    earlier = Counter(case["commit"] for case in record["cases"] if "commit" in case)
    others = ", ".join(f"{count} cases of {commit}" for commit, count in earlier.items())
    return f"commit {record['commit']}{' with changes' * record['dirty']}{f' ({others})' if others else ''}"


def about(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    hardware = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['capability']}"
    host = ", free pages go back to the host" if machine.get("host_takes_free_pages") else ""
    return (
        f"{hardware}; torch {versions['torch']}, Python {versions['python']}, {record['threads']} threads, "
        f"{commits(record)}, {record['date'][:10]}, allocator {record['allocator']}, transparent huge pages "
        f"{machine['huge_pages']}{host}"
    )


def report(record: dict[str, Any]) -> list[str]:
    """The report at the end of a run."""
    kernels = sorted({case["op"] for case in record["cases"] if not case["kernels"]})
    return [
        about(record),
        *ceilings(record),
        *([f"no kernel of ours ran in: {', '.join(kernels)}"] if kernels else []),
        "",
        "Time of the other columns over that of ours: median and quartiles of the rounds (on a GPU: of its own time)",
        *timings(record),
        "",
        "Bytes saved for backward: storages once each, without the inputs and parameters",
        *counted(record, "saved"),
        "",
        "Bytes that the ops of forward and backward read and write (compile: Inductor's own count)",
        *counted(record, "moved"),
    ]
