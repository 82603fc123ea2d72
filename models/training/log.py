"""What a run writes while it trains: losses, previews, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..data.media import write_png
from ..runtime.files import write_whole
from ..runtime.progress import progress_bar
from .board import Board

_log = logging.getLogger(__name__)


class Losses:
    """``losses.csv``: a line ``step,loss,gradient_norm,learning_rate`` for every step, all digits kept."""

    HEADER = ("step", "loss", "gradient_norm", "learning_rate")

    def __init__(self, path: Path, start: int) -> None:
        kept: dict[int, list[str]] = {}
        if path.exists():
            # A line that the machine died on is incomplete; its step is after the checkpoint.
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                row = line.split(",")
                with contextlib.suppress(ValueError):
                    step, *_ = int(row[0]), *map(float, row[1:])
                    if len(row) == len(self.HEADER) and step < start:
                        kept[step] = row
        missing = sorted(set(range(start)) - kept.keys())
        if missing:
            _log.warning("%s has no line that can be read of %d steps, first of %d", path, len(missing), missing[0])
        text = io.StringIO(newline="")
        csv.writer(text).writerows([self.HEADER, *(kept[step] for step in sorted(kept))])
        write_whole(path, text.getvalue().encode())
        self._file = open(path, "a", newline="")  # noqa: SIM115 - closed by close()
        self._writer = csv.writer(self._file)

    def write(self, rows: list[tuple[int, float, float, float]]) -> None:
        self._writer.writerows(rows)
        self._file.flush()
        os.fsync(self._file.fileno())  # no checkpoint may outlive the lines of its steps

    def close(self) -> None:
        self._file.close()


class Metrics:
    """``metrics.jsonl``: a line for every entry of the log, an object of numbers by name."""

    def __init__(self, path: Path, start: int) -> None:
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # the machine died on an incomplete one
                if json.loads(line)["step"] < start:
                    kept.append(line)
        write_whole(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = open(path, "a")  # noqa: SIM115 - closed by close()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Step(NamedTuple):
    """What a step of training returns. Loss and norm are still on the device."""

    loss: Tensor
    """Mean loss of the batch."""
    norm: Tensor
    """Norm of the gradient before clipping."""
    rate: float
    """Learning rate."""


class Log:
    """Losses and previews into the run's folder and TensorBoard; the progress bar.

    Args:
        folder: of the run.
        start: the first step, 0-based.
        steps: of the whole run.
        every: steps from one entry to the next.
        processes: that train together; with several the tokens per second of each are logged too.
        peak: FLOP/s of the GPU at its best; None where that is not known.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, every: int, processes: int = 1, peak: float | None = None
    ) -> None:
        self.folder, self.every, self.processes, self.peak = folder, every, processes, peak
        self.losses = Losses(folder / "losses.csv", start)
        self.metrics = Metrics(folder / "metrics.jsonl", start)
        self.board = Board(folder, start)
        self.bar = progress_bar(total=steps, initial=start, desc=folder.name, unit="step")
        self.pending: list[tuple[int, Step]] = []
        self.tokens = self.counted = 0
        self.flops = self.flops_before = 0
        self.waited = self.waited_before = 0.0
        self.since = time.perf_counter()

    def add(self, number: int, step: Step, tokens: int, waited: float = 0.0, flops: int = 0) -> None:
        """Note a step by its 0-based number, and write the pending ones if they are enough.

        ``tokens`` are those of all steps so far, ``waited`` the seconds that they waited for data, ``flops`` what this
        process computed.
        """
        self.pending.append((number, step))
        self.tokens, self.waited, self.flops = tokens, waited, flops
        self.bar.update()
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if not self.pending:
            return
        rows = [(number, step.loss.item(), step.norm.item(), step.rate) for number, step in self.pending]
        self.pending.clear()
        seconds = time.perf_counter() - self.since
        speed = (self.tokens - self.counted) / seconds
        waits = (self.waited - self.waited_before) / seconds
        computed = self.flops - self.flops_before
        self.counted, self.waited_before, self.flops_before = self.tokens, self.waited, self.flops
        self.losses.write(rows)
        step, loss, norm, rate = rows[-1]
        values = {
            "loss": loss,
            "gradient norm": norm,
            "learning rate": rate,
            "tokens/s": speed,
            "share of time waiting for data": waits,
        }
        if self.processes > 1:
            values["tokens/s per process"] = speed / self.processes
        if self.peak is not None and computed:
            values["MFU"] = computed / seconds / self.peak
        self.metrics.write(step, values)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        mean = sum(row[1] for row in rows) / len(rows)
        each = f" on {self.processes} processes" if self.processes > 1 else ""
        text = f"loss {mean:.4f}, {speed:,.0f} tokens/s{each}, {waits:.0%} of the time waiting for data"
        if "MFU" in values:
            text += f", MFU {values['MFU']:.0%}"
        self.bar.set_postfix_str(text, refresh=False)
        self.since = time.perf_counter()

    def preview(self, step: int, sheet: np.ndarray) -> None:
        """Write a contact sheet made after so many steps."""
        path = self.folder / "previews" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(path, sheet)
        self.board.add_image("samples", sheet, step)
        self.board.flush()
        self.bar.write(f"step {step}: {path}")
        self.since = time.perf_counter()

    def close(self) -> None:
        """Close the files."""
        self.bar.close()
        self.board.close()
        self.metrics.close()
        self.losses.close()
