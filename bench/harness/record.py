"""What a run of the benches leaves behind: a JSON file with the machine, the versions, the ceilings and every case."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from math import log
from pathlib import Path
from typing import Any

import torch

import minisora_kernels
from minisora_kernels import backends

FORMAT = 1
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A virtual machine that gives freed memory back to its host: fresh memory may then cost a fault there as well.
PAGE_REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")

# Of every case; the rest of a case depends on its direction and device.
CASE = ("op", "shape", "dtype", "direction", "rounds", "columns", "ratios", "kernels", "bytes", "flops")


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else ""


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware, with a ``slug`` that names its folder of results."""
    flags = _cpuinfo("flags").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "flags": [flag for flag in FLAGS if flag in flags],
        "capability": backends.cpu_capability(),
        "huge_pages": HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else None,
        # the order is -1, unsigned, where no host has asked for pages
        "host_takes_free_pages": PAGE_REPORTING.exists() and int(PAGE_REPORTING.read_text()) < 64,
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        name = found["gpu"]
    else:
        name = f"{found['cpu']} {found['capability']} {cores} cores"
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*?hz", " ", name.lower())
    return {"slug": re.sub(r"[^a-z0-9]+", "-", name).strip("-"), **found}


def commit() -> str:
    """The commit of the checkout, in short."""
    return _git("rev-parse", "--short", "HEAD")


def head(device: torch.device, allocator: str) -> dict[str, Any]:
    """Of any record: when, which code, and on what."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "minisora_kernels": minisora_kernels.__version__,
        },
        "threads": torch.get_num_threads(),
        "allocator": allocator,
    }


def make(
    device: torch.device,
    cases: list[dict[str, Any]],
    ceilings: dict[str, Any],
    *,
    allocator: str,
    quick: bool,
) -> dict[str, Any]:
    """The record of a run of the benches."""
    return {**head(device, allocator), "quick": quick, "ceilings": ceilings, "cases": cases}


def key(case: dict[str, Any]) -> tuple[str, ...]:
    """What tells cases apart: an op and its shape, or a model; dtype and direction."""
    return tuple(case[part] for part in ("op", "shape", "model", "dtype", "direction") if part in case)


def load(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: not a record, or one of another format.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or not record.get("cases"):
        raise ValueError(f"{path} is not a record of the benches, format {FORMAT}")
    for case in record["cases"]:
        missing = [name for name in CASE if name not in case]
        if missing:
            raise ValueError(f"{path}: a case lacks {', '.join(missing)}")
    return record


def path_of(machine: dict[str, Any], name: str, results: Path = RESULTS) -> Path:
    return results / machine["slug"] / f"{name}.json"


def save(record: dict[str, Any], path: Path, *, over: bool = False) -> None:
    """Write the record, rounded.

    Raises:
        FileExistsError: the file is there and ``over`` is not given.
    """
    if path.exists() and not over:
        raise FileExistsError(f"{path} exists; give another name, or --save-over")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(round_floats(record), indent=1) + "\n")
    temporary.replace(path)  # all of it or nothing


def merged(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the cases of ``old`` that it lacks, which keep their commit: a part of the benches run again.

    Raises:
        ValueError: the two are of different machines, versions or settings.
    """
    for what in ("machine", "python", "torch", "cuda", "threads", "allocator", "quick"):
        before, now = ({**record, **record["versions"]}.get(what) for record in (old, new))
        if before != now:
            raise ValueError(f"the record that is there has {what} {before}, this run {now}")
    again = {key(case): case for case in new["cases"]}
    kept = [{"commit": old["commit"], **case} for case in old["cases"] if key(case) not in again]
    order = {key(case): place for place, case in enumerate(old["cases"])}
    cases = sorted([*kept, *new["cases"]], key=lambda case: order.get(key(case), len(order)))
    return {**new, "cases": cases}


def round_floats(value: Any) -> Any:
    """What a file keeps: floats to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: round_floats(item) for name, item in value.items()}
    return [round_floats(item) for item in value] if isinstance(value, list) else value


def roofline(case: dict[str, Any], ceilings: dict[str, Any]) -> tuple[float, str]:
    """The least time of a case, in seconds, and what sets it: ``"copy"`` or ``"matmul"``.

    The bytes that it must move at the bandwidth of a copy of as many bytes, or its FLOPs at the rate of a matrix
    product, whichever takes longer. A ceiling is the higher of its measurements at the start and at the end of the run.
    """
    megabytes = case["bytes"] / 2e6  # a copy reads and writes its size
    nearest = min(ceilings["start"]["copy"], key=lambda size: abs(log(float(size) / megabytes)))
    by_copy = case["bytes"] / 1e9 / max(part["copy"][nearest] for part in ceilings.values())
    by_matmul = case["flops"] / 1e9 / max(part["matmul"][case["dtype"]] for part in ceilings.values())
    return max((by_copy, "copy"), (by_matmul, "matmul"))
