"""What a GPU is needed for, in steps of a few minutes: ``python -m bench.gpu --step NAME... --out DIR``.

    tests       the tests of ops, of kernels and of models with kernels, on all cores
    verify      ``python -m minisora_kernels verify``: right and faster, and the record that the automatic choice reads
    sanitizer   bench/gpu/sanitized.py under compute-sanitizer, of the CUDA toolkit: memcheck, then racecheck
    quick       the benches of ``--quick``: device time and host time, against eager PyTorch and torch.compile
    tune        candidates for the sizes of kernels, timed in turns: a new minisora_kernels/triton/_tiles.py
    op:NAME     all benches of that op; of window_attention one kind of windows: op:window_attention:temporal

Each step leaves ``DIR/<step>.json``, what it printed beside it, and its bench record, if it makes one, under
``DIR/results``. A step whose file is there, whole and of the same commit and machine, is not run again unless
``--again`` asks for it. Without ``--step`` all run but tune. Exit status: that of the first step that failed; the
others run all the same. A step that takes longer than ``--limit`` seconds is ended, and has failed.

``--dry-run`` goes the same way without a GPU: a few cases, on the CPU or in Triton's interpreter, and no sanitizer.
Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness import record
from minisora_kernels.__main__ import ops
from minisora_kernels.commands import command

TESTS = (
    *("tests/ops/test_ops.py", "tests/ops/test_grn.py", "tests/ops/test_attention.py", "tests/ops/test_norm_rope.py"),
    "tests/models/test_model_kernels.py",
)
WINDOWS = ("temporal", "spatial", "joint", "W.A.L.T")
MODELS = "model"
LIMIT = 300  # seconds of a step
# A process that checks benches against float64 may hold as much of a GPU's memory.
CASE_BYTES = 16 << 30
LATE, NOT_THERE = 124, 127  # exit statuses as timeout and the shell have them


@dataclass
class Step:
    """A step while it runs."""

    name: str
    out: Path
    dry: bool
    deadline: float
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    @property
    def stem(self) -> str:
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def path(self) -> Path:
        return self.out / f"{self.stem}.json"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def run(self, *command: str, log: str = "", **environment: str) -> int:
        """The command's exit status; what it prints goes to a file. Ended with all it started when time is up."""
        environment = {**os.environ, "MINISORA_TEST_DEVICE": self.device, **environment}
        print(f"{self.name}: {' '.join(command)}", flush=True)
        with open(self.out / f"{self.stem}{log}.txt", "w") as file:
            process = subprocess.Popen(
                command, cwd=record.ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                return process.wait(max(self.deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                return LATE
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def parallel(self, processes: int) -> list[str]:
        """Options for pytest to run on so many processes, where pytest-xdist is there."""
        return ["-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 1 else []


Result = tuple[int, dict[str, Any]]


def tests(step: Step) -> Result:
    files = sorted(
        str(path.relative_to(record.ROOT)) for path in (record.ROOT / "tests" / "ops").glob("test_triton*.py")
    )
    xml = step.out / f"{step.stem}.xml"
    options = ["-q", f"--junitxml={xml}", *step.parallel(step.cores)]
    if step.dry:
        chosen = ["tests/ops/test_ops.py", "-k", "unpatchify and values and float32"]
        status = step.run(sys.executable, "-m", "pytest", *options, *chosen, TRITON_INTERPRET="1")
    else:
        status = step.run(sys.executable, "-m", "pytest", *options, *TESTS, *files)
    return status, counted(xml)


def counted(xml: Path) -> dict[str, Any]:
    """How many tests passed, and which did not, from what pytest writes at its end."""
    if not xml.exists():
        return {"passed": 0, "failed": ["pytest did not come to its end"]}
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
    for case in ElementTree.parse(xml).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            found["passed" if case.find("skipped") is None else "skipped"] += 1
    return found


def verify(step: Step) -> Result:
    """Its exit status is 1 where a kernel is wrong; a record must be there all the same."""
    path = step.out / "results" / "verified.json"
    path.unlink(missing_ok=True)
    options = ["--quick", "--op", "unpatchify", "--tokens", "64"] if step.dry else ["--jobs", str(step.cores)]
    command = [sys.executable, "-m", "minisora_kernels", "verify", "--device", step.device, "--out", str(path)]
    status = step.run(*command, *options)
    found = json.loads(path.read_text()) if path.exists() else None
    return status or (1 if found is None else 0), {"record": str(path.relative_to(step.out)), "verified": found}


def sanitizer(step: Step) -> Result:
    """The ops are compiled first, each in a process of its own, so that the tools meet warm caches."""
    script = [sys.executable, "-m", "bench.gpu.sanitized"]
    if step.dry:
        return step.run(*script, "--only", "unpatchify", TRITON_INTERPRET="1"), {}
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return NOT_THERE, {"why": "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"}
    with ThreadPoolExecutor(step.cores) as pool:
        statuses = list(pool.map(lambda op: step.run(*script, "--only", op, log=f"-{op}"), ops()))
    found = dict(zip(ops(), statuses, strict=True))
    for check in ("memcheck", "racecheck"):
        # It sees no access out of bounds that lands in what torch's allocator holds for itself.
        command = [tool, "--tool", check, "--error-exitcode", "1", *script]
        found[check] = step.run(*command, log=f"-{check}", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return next((status for status in found.values() if status), 0), {"statuses": found}


def quick(step: Step) -> Result:
    return benches(step, "quick", ["bench", "--quick"], "unpatchify and fwd and not bwd" if step.dry else "")


def tuning(step: Step) -> Result:
    path = step.out / "results" / "_tiles.py"
    status = step.run(sys.executable, "-m", "bench.gpu.tune", "--out", str(path))
    return status, {"why": f"{step.stem}.txt"} if status else {"tiles": str(path.relative_to(step.out))}


def of_op(step: Step) -> Result:
    _, op, *kind = step.name.split(":")
    expression = kind[0] if kind else ""
    if step.dry:
        expression = "4x16x32x32 and bfloat16 and not bwd"
    file = "bench/bench_model.py" if op == MODELS else f"bench/ops/bench_{op}.py"
    return benches(step, "default", [file], expression)


def benches(step: Step, name: str, arguments: Sequence[str], expression: str) -> Result:
    """Values first, on several processes, which compile in parallel; then times, one case after the other."""
    pytest = [sys.executable, "-m", "pytest", "-q", *arguments, "--device", step.device]
    pytest += ["-k", expression] if expression else []
    if not step.dry:
        memory = torch.cuda.get_device_properties(0).total_memory
        processes = min(step.cores, memory // CASE_BYTES)
        if options := step.parallel(processes):
            status = step.run(*pytest, "--benchmark-disable", *options, log="-values")
            if status:
                return status, {"why": f"wrong values, or no time left: {step.stem}-values.txt"}
    results = step.out / "results"
    path = record.path_of(record.machine(torch.device(step.device)), name, results)
    save = ["--save", name, "--results", str(results), "--save-into" if path.exists() else "--save-over"]
    before = path.stat().st_mtime_ns if path.exists() else None
    status = step.run(*pytest, "--benchmark-only", *save)
    if not path.exists() or path.stat().st_mtime_ns == before:
        return status or 1, {"why": "no case was timed"}
    cases = record.load(path)["cases"]
    names = {f"{case['op']} {case['shape']} {case['dtype']} {case['direction']}": figures(case) for case in cases}
    return status, {"record": str(path.relative_to(step.out)), "cases": names}


def figures(case: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of the device and of the host (on a CPU there is one time), and the ratios to ours."""
    ours = {"us": case["columns"]["ours"]["median"] * 1e6}
    if "host" in case:
        ours["host us"] = case["host"]["ours"]["median"] * 1e6
    return ours | {name: ratio["median"] for name, ratio in case["ratios"].items()}


STEPS: dict[str, Callable[[Step], Result]] = {"tests": tests, "verify": verify, "sanitizer": sanitizer, "quick": quick}
ASKED = {"tune": tuning}  # what runs by name alone


def op_steps() -> list[str]:
    names = []
    for op in [*ops(), MODELS]:
        names += [f"op:{op}:{kind}" for kind in WINDOWS] if op == "window_attention" else [f"op:{op}"]
    return names


def step_name(text: str) -> str:
    allowed = [*STEPS, *ASKED, *op_steps()]
    if text not in allowed:
        raise argparse.ArgumentTypeError(f"step is {text!r}; it may be one of {', '.join(allowed)}")
    return text


def provenance(dry: bool) -> dict[str, Any]:
    head = record.head(torch.device("cpu" if dry else "cuda"), "default")
    return {what: head[what] for what in ("commit", "dirty", "machine", "versions")} | {"dry_run": dry}


def kept(path: Path, here: dict[str, Any]) -> dict[str, Any] | None:
    """What a step that passed left, if it is whole and of this commit, without changes, and this machine."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and found.get("status") == 0 and not found.get("dirty")
    same = whole and all(found.get(what) == value for what, value in here.items())
    return found if same else None


def write(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(record.round_floats(content), indent=1) + "\n")
    temporary.replace(path)


def perform(step: Step, here: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    status, results = (STEPS | ASKED).get(step.name, of_op)(step)
    found = {"step": step.name, "status": status, "seconds": time.monotonic() - started, **here, "results": results}
    write(step.path, found)
    return found


@command(failed=2)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", nargs="+", type=step_name, default=[*STEPS, *op_steps()], metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--again", action="store_true", help="run steps again that are done")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds that a step may take (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="a few cases of each step, without a GPU")
    options = parser.parse_args(arguments)
    if options.dry_run and not ASKED.keys().isdisjoint(options.step):
        parser.error("--dry-run is not for tune, which times candidates on a GPU")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry-run needs none")
    out = options.out.resolve()
    (out / "results").mkdir(parents=True, exist_ok=True)
    here = provenance(options.dry_run)
    status = 0
    for name in options.step:
        step = Step(name, out, options.dry_run, time.monotonic() + options.limit)
        found = None if options.again else kept(step.path, here)
        how = "done before" if found else "done"
        found = found or perform(step, here)
        print(f"{name}: {how} in {found['seconds']:.0f} s, status {found['status']}", flush=True)
        status = status or found["status"]
    return status


if __name__ == "__main__":
    sys.exit(main())
