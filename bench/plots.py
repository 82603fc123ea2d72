"""The two plots of a record, ratios as bars and the roofline, and the picture of the README."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from bench.harness.report import best_eager

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"eager": "#4c78a8", "compile": "#f58518"}


def _shown(case: dict[str, Any]) -> bool:
    return case["direction"] == "fwd+bwd" or case["op"] == "sampling step"


def ratios(record: dict[str, Any], path: Path) -> None:
    """Bars of the time of the best eager form and of compile over that of ours, forward and backward."""
    cases = [case for case in record["cases"] if _shown(case)]
    names = list({f"{case['op']} {case['shape']}": None for case in cases})
    dtypes = list({case["dtype"]: None for case in cases})
    size = (5 + 4.5 * len(dtypes), 1.6 + 0.3 * len(names))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        for case in cases:
            if case["dtype"] == dtype:
                _bars(axes, case, names.index(f"{case['op']} {case['shape']}"))
        axes.axvline(1, color="black", lw=1)
        axes.set_xscale("log")
        axes.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.set_title(dtype, size=10)
    panels[0][0].set_yticks(range(len(names)), names, size=7)
    panels[0][0].set_ylim(len(names) - 0.4, -0.6)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, ["best eager", "compile"], loc="outside upper right", ncols=2, fontsize=8)
    figure.supxlabel("time over that of ours (right of the line ours is faster): median, quartiles of rounds", size=9)
    figure.suptitle(_title(record), size=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(axes: Any, case: dict[str, Any], place: int) -> None:
    for i, (column, colour) in enumerate(COLOURS.items()):
        found = case["ratios"][best_eager(case) if column == "eager" else column]
        error = [[found["median"] - found["q1"]], [found["q3"] - found["median"]]]
        height = place + (i - 0.5) * 0.4
        axes.barh(height, found["median"], 0.38, xerr=error, color=colour, error_kw={"lw": 0.8})
        text = f"{found['median']:.2f}"
        axes.annotate(text, (found["q3"], height), (3, 0), textcoords="offset points", va="center", size=6)


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
    colour = {op: plt.get_cmap("tab20")(i % 20) for i, op in enumerate(ops)}
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
    for dtype, line in (("float32", "-"), ("bfloat16", "--")):
        roof = [min(top[dtype], fast * x) for x in intensity]
        left.plot(intensity, roof, "k", ls=line, lw=1, label=f"copy in cache, {dtype} product")
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
    """The plots beside the record's JSON file: ``NAME-ratios.png``, unless all is forward alone, and
    ``NAME-roofline.png``.
    """
    kinds = {"ratios": ratios, "roofline": roofline}
    if not any(map(_shown, record["cases"])):
        del kinds["ratios"]
    paths = []
    for kind, plot in kinds.items():
        paths.append(path.with_name(f"{path.stem}-{kind}.png"))
        plot(record, paths[-1])
    return paths


# Pixels between the frames of a contact sheet (models/sample.py).
GAP = 4

# The columns of the picture; eager is the faster of its two forms.
PICTURED = {"eager": "#4c78a8", "compile": "#f58518", "ours": "#54a24b"}


def training_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per training step of a model: seconds, and bytes saved for the backward, by column."""
    return [
        {
            "model": f"{case['shape']} {case['dtype']}",
            "machine": f"{record['machine'].get('gpu') or record['machine']['cpu']}, "
            f"{record['machine']['capability']}, {record['threads']} threads",
            "commit": record["commit"],
            "seconds": {
                name: case["columns"][best_eager(case) if name == "eager" else name]["median"] for name in PICTURED
            },
            "saved": {name: case["saved"][name] for name in PICTURED},
        }
        for record in records
        for case in record["cases"]
        if case["op"] == "training step"
    ]


def draw_training_steps(records: list[dict[str, Any]], path: Path, source: bytes) -> None:
    """Time and memory of training steps, relative to eager PyTorch. The digest of ``source`` goes into the file."""
    steps = training_steps(records)
    figure, panels = plt.subplots(1, 2, figsize=(9, 1.1 + 0.75 * len(steps)), sharey=True, layout="constrained")
    units = {
        "seconds": ("time of a training step", lambda value: f"{value:.2f} s"),
        "saved": ("memory kept for the backward", lambda value: f"{value / 1e9:.2f} GB"),
    }
    for axes, (what, (title, text)) in zip(panels, units.items(), strict=True):
        for place, step in enumerate(steps):
            for i, (name, colour) in enumerate(PICTURED.items()):
                value = step[what][name]
                share, height = value / step[what]["eager"], place + (i - 1) * 0.27
                axes.barh(height, share, 0.25, color=colour)
                axes.annotate(text(value), (share, height), (3, 0), textcoords="offset points", va="center", size=8)
        axes.set_xlim(0, 1.2)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "eager"], size=8)
        axes.set_title(title, size=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(steps)), [_named(step) for step in steps], size=8)
    panels[0].set_ylim(len(steps) - 0.5, -0.5)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PICTURED.values()]
    labels = ["eager PyTorch", "torch.compile", "minisora_kernels"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Comment": _digest(source)})
    plt.close(figure)


def _named(step: dict[str, Any]) -> str:
    """``factorized B/2 16x256x256 b1 bfloat16`` as a reader knows it; another name stays as it is."""
    match = re.fullmatch(r"(\w+) (\w+/\d) (\d+)x(\d+)x(\d+) b(\d+) (\w+)", step["model"])
    name = step["model"]
    if match:
        attention, size, *clip, batch, dtype = match.groups()
        name = f"DiT-{size}, {attention} attention\n{' x '.join(clip)}, batch {batch}, {dtype}"
    return f"{name}\n{step['machine']}"


def animate(sheet: Path, path: Path) -> None:
    """A GIF of a contact sheet by ``models.digits``: ten rows of square frames, as two rows of five clips that move."""
    with Image.open(sheet) as image:
        pixels = image.convert("L")
    clips = 10
    side = (pixels.height + GAP) // clips - GAP
    frames = []
    for left in range(0, pixels.width, side + GAP):
        frame = Image.new("L", (5 * (side + GAP) - GAP, 2 * (side + GAP) - GAP), 255)
        for i in range(clips):
            top = i * (side + GAP)
            place = (i % 5 * (side + GAP), i // 5 * (side + GAP))
            frame.paste(pixels.crop((left, top, left + side, top + side)), place)
        frames.append(frame)
    comment = _digest(sheet.read_bytes())
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=150, loop=0, comment=comment)


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def is_of(path: Path, source: bytes) -> bool:
    """Whether a picture of this module was drawn from ``source``."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        comment = image.info.get("Comment") or image.info.get("comment") or ""
    return (comment.decode() if isinstance(comment, bytes) else comment) == _digest(source)
