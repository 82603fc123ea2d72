"""One HTML page about a run: its clips, its losses and the commands to go on. It needs no other file and no network."""

from __future__ import annotations

import base64
import csv
import html
import math
from pathlib import Path

from ..runtime.files import write_whole

# Size of the plot of the losses, and the room for its labels, in pixels.
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 640, 240, 56, 32, 12

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: clips and losses</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }}
  h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
  img {{ max-width: 100%; image-rendering: pixelated; }}
  .clips {{ width: 100%; }}
  svg {{ width: 100%; height: auto; font: 12px system-ui, sans-serif; }}
  pre {{ padding: .75rem 1rem; white-space: pre-wrap; background: color-mix(in srgb, currentColor 8%, transparent); }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{text}</p>
<h2>Clips</h2>
<img class="clips" alt="Generated clips, side by side" src="data:image/gif;base64,{gif}">
<h2>Frame by frame</h2>
<img class="clips" alt="One row per clip, one column per frame" src="data:image/png;base64,{png}">
<h2>Loss</h2>
{plot}
<p>Mean over {window} steps. The last value is {last:.4f}, after {steps:,} steps.</p>
<h2>Go on</h2>
{commands}
</body>
</html>
"""


def read_losses(path: Path) -> list[float]:
    """The loss of every step of a run, from its ``losses.csv``.

    Raises:
        ValueError: The file has no column ``loss`` or no step.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not the losses.csv of a run: {error!r}") from error
    if not losses:
        raise ValueError(f"{path} has no step")
    return losses


def smooth(losses: list[float], points: int = 200) -> tuple[list[float], int]:
    """Means over equal windows, at most ``points`` of them, and the steps of a window."""
    window = -(-len(losses) // points)
    parts = [losses[start : start + window] for start in range(0, len(losses), window)]
    return [sum(part) / len(part) for part in parts], window


def plot(losses: list[float], steps: int) -> str:
    """The curve over ``steps`` steps as SVG; the axis of the loss is logarithmic.

    A value that is not positive and finite leaves a gap.
    """
    shown = [value if math.isfinite(value) and value > 0 else None for value in losses]
    logs = [math.log10(value) for value in shown if value is not None]
    if not logs:
        return "<p>No loss is a positive number.</p>"
    low, high = min(logs), max(logs)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    right, bottom = WIDTH - MARGIN, HEIGHT - BOTTOM

    def x(index: float) -> float:
        return LEFT + (right - LEFT) * index / max(len(losses) - 1, 1)

    def y(log: float) -> float:
        return bottom - (bottom - MARGIN) * (log - low) / (high - low)

    lines, run = [], []
    for index, value in enumerate([*shown, None]):
        if value is not None:
            run.append(f"{x(index):.1f},{y(math.log10(value)):.1f}")
        elif run:
            lines.append(f'<polyline fill="none" stroke="#4c78a8" stroke-width="2" points="{" ".join(run)}"/>')
            run = []
    marks = [f'<path d="M{LEFT} {MARGIN}V{bottom}H{right}" fill="none" stroke="currentColor" opacity=".4"/>']
    for share in (0, 0.5, 1):
        log = low + (high - low) * share
        marks.append(
            f'<text x="{LEFT - 6}" y="{y(log) + 4:.1f}" text-anchor="end" fill="currentColor">{10**log:.3g}</text>'
        )
        place = (len(losses) - 1) * share
        anchor = {0: "start", 0.5: "middle", 1: "end"}[share]
        marks.append(
            f'<text x="{x(place):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}" fill="currentColor">'
            f"{round(share * steps):,}</text>"
        )
    label = '<title>Loss over the steps of the training</title><g role="img">'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{label}{"".join(marks + lines)}</g></svg>'


def write_page(run: Path, gif: Path, png: Path, text: str, commands: list[tuple[str, str]]) -> Path:
    """Write ``index.html`` into the folder of a run; a page that is there is replaced.

    Args:
        run: Folder of the run, with its ``losses.csv``.
        gif: The generated clips side by side.
        png: Their contact sheet.
        text: What the page says of the clips, in a sentence or two.
        commands: What the reader may do next: a sentence, and the command.

    Returns:
        The path of the page.

    Raises:
        ValueError: ``losses.csv`` is not that of a run.
        OSError: A file cannot be read or written.
    """
    losses = read_losses(run / "losses.csv")
    means, window = smooth(losses)
    page = PAGE.format(
        name=html.escape(run.name),
        text=html.escape(text),
        gif=base64.b64encode(gif.read_bytes()).decode(),
        png=base64.b64encode(png.read_bytes()).decode(),
        plot=plot(means, len(losses)),
        window=window,
        last=means[-1],
        steps=len(losses),
        commands="\n".join(f"<p>{html.escape(what)}</p><pre>{html.escape(line)}</pre>" for what, line in commands),
    )
    path = run / "index.html"
    write_whole(path, page.encode())
    return path
