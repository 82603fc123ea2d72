"""The two plots of a record: ratios as bars, and the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from bench.report import best_eager

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"eager": "#4c78a8", "compile": "#f58518"}


def ratios(record: dict[str, Any], path: Path) -> None:
    """Bars of the time of the best eager form and of compile over that of ours, forward and backward."""
    cases = [case for case in record["cases"] if case["direction"] == "fwd+bwd" or case["op"] == "sampling step"]
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.34 * len(cases)), layout="constrained")
    for i, column in enumerate(("eager", "compile")):
        found = [case["ratios"][best_eager(case) if column == "eager" else column] for case in cases]
        medians = [part["median"] for part in found]
        errors = [
            [part["median"] - part["q1"] for part in found],
            [part["q3"] - part["median"] for part in found],
        ]
        places = [place + (i - 0.5) * 0.4 for place in range(len(cases))]
        axes.barh(places, medians, 0.38, xerr=errors, color=COLOURS[column], label=column, error_kw={"lw": 0.8})
        for place, part in zip(places, found, strict=True):
            axes.annotate(
                f"{part['median']:.2f}", (part["q3"], place), (3, 0), textcoords="offset points", va="center", size=6
            )
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axes.minorticks_off()
    labels = [f"{case['op']} {case['shape']} {case['dtype']}" for case in cases]
    axes.set_yticks(range(len(cases)), labels, size=7)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlabel("time over that of ours (right of the line ours is faster); median and quartiles of the rounds")
    axes.set_title(_title(record), size=9)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def roofline(record: dict[str, Any], path: Path) -> None:
    """FLOP/s of the cases that have matrix products, and GB/s of all, against the ceilings of the run."""
    top = {
        dtype: max(part["matmul"][dtype] for part in record["ceilings"].values()) for dtype in ("float32", "bfloat16")
    }
    copies = {
        megabytes: max(part["copy"][megabytes] for part in record["ceilings"].values())
        for megabytes in record["ceilings"]["start"]["copy"]
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    cases = record["cases"]
    ops = sorted({case["op"] for case in cases})
    colour = {op: plt.get_cmap("tab10")(i % 10) for i, op in enumerate(ops)}
    marker = {"float32": "o", "bfloat16": "^"}
    for case in cases:
        ours = case["columns"]["ours"]["median"]
        style = {"color": colour[case["op"]], "marker": marker[case["dtype"]], "s": 28, "alpha": 0.8}
        if case["flops"]:
            left.scatter(case["flops"] / case["bytes"], case["flops"] / ours / 1e9, **style)
        right.scatter(case["bytes"] / 2e6, case["bytes"] / ours / 1e9, **style)
    low, high = left.get_xlim()
    intensity = [max(low, 0.5) * (high / max(low, 0.5)) ** (i / 100) for i in range(101)]
    slow, fast = min(copies.values()), max(copies.values())
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        roof = [min(top[dtype], fast * x) for x in intensity]
        left.plot(intensity, roof, "k", ls=style, lw=1, label=f"copy in cache, {dtype} product")
    left.plot(intensity, [min(max(top.values()), slow * x) for x in intensity], "grey", ls=":", label="slowest copy")
    left.set(xscale="log", yscale="log", xlabel="FLOPs of matrix products per byte that must move", ylabel="GFLOP/s")
    left.legend(loc="lower right", fontsize=8)
    right.plot([float(size) for size in copies], list(copies.values()), "k-o", ms=4, lw=1, label="copy")
    right.set(xscale="log", yscale="log", xlabel="half of the bytes that must move, MB", ylabel="GB/s")
    right.legend(loc="upper right", fontsize=8)
    handles = [right.scatter([], [], color=colour[op], label=op) for op in ops]
    handles += [right.scatter([], [], color="grey", marker=shape, label=dtype) for dtype, shape in marker.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(_title(record), size=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"{machine.get('gpu') or machine['cpu']}, {machine['capability']}, {record['threads']} threads, "
        f"torch {record['versions']['torch']}, allocator {record['allocator']}, commit {record['commit']}"
    )


def draw(record: dict[str, Any], path: Path) -> list[Path]:
    """The plots beside the record's JSON file: ``NAME-ratios.png`` and ``NAME-roofline.png``."""
    paths = [path.with_name(f"{path.stem}-{kind}.png") for kind in ("ratios", "roofline")]
    ratios(record, paths[0])
    roofline(record, paths[1])
    return paths
