"""``python -m minisora_kernels verify``: runs the workers, decides, writes the record, prints the table."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__, automatic, backends
from . import record
from .cases import DTYPES, regimes
from .record import Entry, Record

# Seconds that a worker may take for one case, its compilations among them.
LIMIT = 300
# An op with many kernels is checked in so many processes.
PARTS = {"window_attention": 3}
# The start of a worker: with this process's modules, wherever they are.
START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


class Bar:
    """Progress to stderr: one line that moves on a terminal, a line per tenth in a log."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._lock = total, 0, threading.Lock()
        self._terminal = sys.stderr.isatty()

    def step(self, what: str) -> None:
        with self._lock:
            self.done += 1
            tenth = max(1, self.total // 10)
            if self._terminal:
                print(f"\r\033[Kverify {self.done}/{self.total}: {what}", end="", file=sys.stderr, flush=True)
            elif self.done % tenth == 0:
                print(f"verify {self.done}/{self.total}: {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@dataclass
class Work:
    """A worker's results; what ended it before it was done ("" if nothing did), and the case in hand then.

    ``outside``: it was this process, for the time it took, or the system, for the memory it took.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""
    case: str = "its start"
    outside: bool = False

    @property
    def undecided(self) -> bool:
        """Whether another try may say more."""
        return self.outside or any("undecided" in result for result in self.results)


def work(module: str, options: list[str], seen: Callable[[str], None], limit: float = LIMIT) -> Work:
    """Run a worker, which prints lines of JSON; it is killed if ``limit`` seconds pass between two of them."""
    command = [sys.executable, "-c", START, json.dumps(sys.path), f"{__package__}.{module}", *options]
    found, done, late = Work(), False, threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            for text in process.stdout:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # what a library prints
                timer.cancel()
                timer = threading.Timer(limit, stop)
                timer.start()
                if line["kind"] == "result":
                    found.results.append(line)
                elif line["kind"] == "case":
                    found.case = line["case"]
                    seen(found.case)
                else:
                    done = True
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if late.is_set():
        found.ended, found.outside = f"took longer than {limit:g} s in {found.case}", True
    elif not done or code:
        how = f"signal {-code}" if code < 0 else f"status {code}"
        found.outside = code == -signal.SIGKILL  # as the kernel of Linux does when memory runs out
        found.ended = f"ended with {how} in {found.case}" + (f": {said[-1][:300]}" if said and code > 0 else "")
    return found


def backends_of(device: torch.device) -> list[str]:
    """The backends with kernels that may serve this device."""
    order = backends.PREFERENCE.get(device.type, ())
    return [name for name in order if name != "reference" and backends.unavailable(name) is None]


def ops_of(backend: str, wanted: list[str] | None) -> list[str]:
    """The ops that have such a kernel, in the order in which they are timed."""
    ops = dict.fromkeys(op for op, _, _ in regimes() if wanted is None or op in wanted)
    return [op for op in ops if backend in importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS]


@dataclass
class Found:
    """What the workers of one backend say."""

    # By op and dtype: the worst error over its bound of the cases that were right; what the first wrong one said; why
    # the first undecided one is so.
    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    undecided: dict[tuple[str, str], str] = field(default_factory=dict)
    # By op and regime.
    times: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def add(self, op: str, work: Work) -> None:
        """What was checked of an op."""
        for result in work.results:
            key = op, result["dtype"]
            if "wrong" in result:
                self.wrong.setdefault(key, result["wrong"])
            elif "undecided" in result:
                self.undecided.setdefault(key, result["undecided"])
            elif "error" in result:
                self.errors[key] = max(self.errors.get(key, 0.0), result["error"])
        if work.ended:
            for dtype in DTYPES:
                (self.undecided if work.outside else self.wrong).setdefault((op, dtype), work.ended)

    def entries(self, backend: str, ops: list[str], single: str) -> Iterator[Entry]:
        """One per op and regime that was checked; ``single`` names float32. float16 has the times of bfloat16."""
        for op, dtype, rest in regimes():
            key = op, dtype
            wrong, undecided, error = self.wrong.get(key, ""), self.undecided.get(key, ""), self.errors.get(key)
            if op not in ops or (error is None and not wrong and not undecided):
                continue
            right = False if wrong else None if undecided else True
            own = single if dtype == "float32" else dtype
            timed_in = "bfloat16" if dtype == "float16" else own
            times = self.times.get((op, f"{timed_in} {rest}"), {})
            figures = times.get("times", {}), times.get("ratio"), times.get("compile_ratio")
            said = (wrong or undecided)[:2000]
            yield Entry(backend, op, f"{own} {rest}", right, error, said, timed_in, *figures)


def phase_right(backend: str, ops: list[str], options: argparse.Namespace, found: Found) -> None:
    """Check every op in a process of its own, and compile what is timed for torch.compile's cache on disk meanwhile."""
    jobs: list[tuple[str, str, list[str]]] = []
    for op in sorted(ops, key=lambda op: -PARTS.get(op, 1)):
        count = PARTS.get(op, 1)
        jobs += [("right", op, ["--op", op, "--part", str(i), str(count)]) for i in range(count)]
    if not options.quick:
        jobs += [("faster", op, ["--op", op, "--warm", *size(options)]) for op in ops]
    bar = Bar(len(jobs))

    def run(job: tuple[str, str, list[str]]) -> Work:
        module, op, arguments = job
        done = work(module, [*arguments, *common(backend, options)], lambda case: None)
        bar.step(f"{op} is {'checked' if module == 'right' else 'compiled by torch'}")
        return done

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, jobs))
    bar.close()
    for (module, op, arguments), first in zip(jobs, results, strict=True):
        if module == "right":  # once more, alone, where time or memory was short
            again = [*arguments, *common(backend, options)]
            found.add(op, work(module, again, lambda case: None) if first.undecided else first)


def phase_faster(backend: str, ops: list[str], options: argparse.Namespace, found: Found) -> None:
    """Time the ops that are right in some dtype, in one process; after a crash the others in another one."""
    bad = found.wrong.keys() | found.undecided.keys()
    left = [op for op in ops if any((op, dtype) not in bad for dtype in DTYPES[:2])]
    bar = Bar(sum(op in left and dtype != "float16" for op, dtype, _ in regimes()))
    while left:
        done = work("faster", ["--op", *left, *size(options), *common(backend, options)], bar.step)
        for result in done.results:
            if "failed" in result:
                print(f"{result['op']} {result['regime']} is not timed: {result['failed'][:300]}", file=sys.stderr)
            else:
                found.times[result["op"], result["regime"]] = result
        if not done.ended:
            break
        op = done.case.partition(" ")[0]
        print(f"{op} is not timed: {done.ended}", file=sys.stderr)
        # The ops before it are done. One that does not even start is the fault of none.
        left = left[left.index(op) + 1 :] if op in left else []
    bar.close()


def common(backend: str, options: argparse.Namespace) -> list[str]:
    """The options of every worker."""
    given = ["--device", str(options.device), "--backend", backend, "--precision", options.precision]
    return given + ["--quick"] * options.quick


def size(options: argparse.Namespace) -> list[str]:
    return [] if options.tokens is None else ["--tokens", str(options.tokens)]


def check_target(path: Path) -> None:
    """Raises ValueError, before the work, for a file that could not be written after it."""
    if path.is_dir():
        raise ValueError(f"out is {str(path)!r}, which is a folder; it must be a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"out is {str(path)!r}, which cannot be written: {error.strerror}") from error


def verify(options: argparse.Namespace) -> tuple[Record, Path | None]:
    """The record of this device, written where it can be.

    Raises:
        ValueError: there is nothing to verify, or nothing may be.
    """
    device = options.device
    if backends.FORCED is not None:
        raise ValueError("MINISORA_BACKEND is set; unset it, or the automatic choice is never asked")
    names = backends_of(device)
    if not names:
        reasons = {name: backends.unavailable(name) for name in backends.PREFERENCE.get(device.type, ())}
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        raise ValueError(f"no kernels are here for {device}" + (f" ({said})" if said else ""))
    if backends.VERIFIED == "0" and options.out is None:
        raise ValueError("MINISORA_VERIFIED is 0: no record is ever read; unset it, or name a file with --out")
    single = "tf32" if device.type == "cuda" and options.precision != "highest" else "float32"
    path = options.out or record.own_path(device)
    if options.out is not None:
        check_target(options.out)
    started = time.perf_counter()
    with record.locked(path) if path is not None else contextlib.nullcontext():
        if options.missing_only and path is not None:
            with contextlib.suppress(record.NotARecord, OSError):
                there = record.load(path, record.key(device))
                if there.covers(single):
                    return there, path
        entries: list[Entry] = []
        for backend in names:
            ops, found = ops_of(backend, options.op), Found()
            if not ops:
                continue
            phase_right(backend, ops, options, found)
            phase_faster(backend, ops, options, found)
            entries += found.entries(backend, ops, single)
        if not entries:
            raise ValueError(f"{', '.join(options.op or ops)} has no result on {device}; the lines above say why")
        made = {
            "minisora_kernels": __version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "quick": options.quick,
            "precision": options.precision,
            "tokens": options.tokens,
            "seconds": round(time.perf_counter() - started, 1),
        }
        new = Record(record.key(device), made, ())
        if path is not None:
            with contextlib.suppress(record.NotARecord, OSError):
                new = record.load(path, new.key)
        new = new.merged(entries, made)
        if path is None:
            print("the record is not written: there is no home folder; name a file with --out", file=sys.stderr)
            return new, None
        try:
            record.save(new, path)
        except OSError as error:
            print(f"the record is not written: {error}; name another file with --out", file=sys.stderr)
            path = None
    automatic.forget()
    return new, path


def table(found: Record) -> list[str]:
    """A line per op and regime: what becomes of the kernel, and the figures."""
    header = f"{'op':20} {'regime':38} {'':12} {'ours':>9} {'eager':>9} {'compile':>9}   us per call; in torch.compile"
    lines = [header]
    for entry in sorted(found.entries, key=lambda entry: (entry.backend, entry.op, entry.regime)):
        times = [entry.times.get(column) for column in record.COLUMNS]
        cells = ["-" if pair is None else f"{max(pair[0] or 0, pair[1] or 0):.1f}" for pair in times]
        lines.append(
            f"{entry.op:20} {entry.regime:38} {entry.status:12} {cells[0]:>9} {cells[1]:>9} {cells[2]:>9}   "
            f"{entry.status_in_compile}"
        )
        if not entry.right:
            lines.append(f"{'':20} {entry.wrong}")
    return lines


def device_of(name: str) -> torch.device:
    """Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it may be auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device is {name!r}; it may be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(f"device is {name!r}; torch finds {count} CUDA devices")
    return torch.device("cuda", index)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick",
        action="store_true",
        help="check float32 and bfloat16 only, time more roughly, and leave torch.compile out. Until a full verify, "
        "plain PyTorch serves inside torch.compile on GPUs. Should take a minute or two; not measured on a GPU",
    )
    parser.add_argument(
        "--op", nargs="+", metavar="OP", help="only these ops; the record keeps the others (default: all)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N (default: auto, the current CUDA device if there is one)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the record here (default: where the automatic choice reads it)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that check ops at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of float32 products, as torch.set_float32_matmul_precision takes it; below highest they are TF32 on a "
        "GPU, and the record keeps them apart (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="time about so many tokens of width 1152 (default: 32768 on a GPU, where a call reads and writes 64 to "
        "256 MB; 2048 on a CPU)",
    )
    parser.add_argument("--missing-only", action="store_true", help="do nothing where there is a record already")


def main(options: argparse.Namespace) -> int:
    """The exit status: 1 if a kernel is wrong. Raises ValueError if nothing could be verified."""
    ops = sorted({op for op, _, _ in regimes()})
    unknown = [op for op in options.op or () if op not in ops]
    if unknown:
        raise ValueError(f"op is {unknown[0]!r}; it may be one of {', '.join(ops)}")
    for name in ("jobs", "tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    options.device = device_of(options.device)
    found, path = verify(options)
    print(f"{found.key}\n" + "\n".join(table(found)))
    if path is not None:
        print(f"\nrecord: {path}")
    return int(any(entry.right is False for entry in found.entries))
