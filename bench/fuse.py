"""What fuse is worth on whole models: ``python -m bench.fuse`` prints a table, ``--save`` writes a record.

Each model of diffusers has random weights and a few layers. Its columns:

- ``eager``: the model as it is;
- ``compile``: ``torch.compile`` with Inductor;
- ``fuse``: ``minisora_kernels.fuse``;
- ``fuse, compile``: ``torch.compile`` with ``minisora_kernels.compiler()``.

A round runs each column once, in rotated order. Times are those of the processor, so what else runs on the machine
counts only by its use of the caches; ratios are taken per round. Beside the times stand the bytes that a forward keeps
for its backward, of full training and of LoRA on attention, as a ratio to eager's, and the sites that were found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minisora_kernels as mk
from bench.fuse_models import MODELS
from bench.harness.record import RESULTS, head, machine, merged, path_of, save
from bench.harness.report import aligned
from bench.harness.session import BOTH, DTYPES, FWD
from minisora_kernels.commands import command
from minisora_kernels.counters import saved_bytes

COLUMNS = ("eager", "compile", "fuse", "fuse, compile")
# Linears of attention by their names in diffusers.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "to_query", "to_key", "to_value", "out_layer")

Call = Callable[[], Tensor]


class LoRA(nn.Module):
    """A Linear, frozen, with an adapter of rank 16."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 16, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(16, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(model: nn.Module) -> None:
    """Freeze a model, and put adapters on its attention."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ADAPTED):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoRA(module))


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights, which its modulation too has, and inputs."""
    import diffusers

    torch.manual_seed(0)
    cls, config, inputs = MODELS[name]
    model = getattr(diffusers, cls)(**config).eval()
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for path, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        if parameter.dim() > 1 or not parameter.data.eq(1).all():
            nn.init.normal_(parameter, std=fan_in**-0.5)
        if not any(part in kept for part in path.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model, inputs(dtype)


def runner(model: nn.Module, inputs: dict[str, Any], direction: str) -> Call:
    """Runs the model: without gradients, or with those of every parameter."""

    def run() -> Tensor:
        with torch.set_grad_enabled(direction == BOTH):
            out = model(**inputs, return_dict=False)[0]
        if direction == BOTH:
            model.zero_grad(set_to_none=True)
            out.float().square().mean().backward()
        return out

    return run


def columns(name: str, dtype: torch.dtype, direction: str, compiled: bool) -> tuple[dict[str, Call], mk.fusion.Fused]:
    """The columns of a model, each on weights of its own, and the handle of the fused one."""
    calls: dict[str, Call] = {}
    handle = None
    for column in COLUMNS:
        if "compile" in column and not compiled:
            continue
        model, inputs = build(name, dtype)
        if column == "fuse":
            handle = mk.fuse(model)
        elif column == "compile":
            model.compile(dynamic=False)
        elif column == "fuse, compile":
            model.compile(dynamic=False, backend=mk.compiler())
        calls[column] = runner(model, inputs, direction)
    assert handle is not None
    return calls, handle


def check_same(name: str, calls: dict[str, Call], dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with columns of a compiler, by column; this also compiles them.

    Raises RuntimeError if any other column computes something else than eager.
    """
    exact = calls["eager"]().float()
    wrong: dict[str, str] = {}
    for column, call in calls.items():
        error = (call().float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        if error <= torch.finfo(dtype).eps ** 0.5:
            continue
        message = f"{column} differs from eager by {error:.1e}"
        if column != "compile" and not (wrong and "compile" in column):
            raise RuntimeError(f"{name}: {message}")
        wrong[column] = message
    return wrong


def times(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time per column, of each round."""
    found: dict[str, list[float]] = {column: [] for column in calls}
    names = list(calls)
    for turn in range(rounds):
        for column in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            calls[column]()
            found[column].append(time.process_time() - start)
    return found


def kept(name: str, dtype: torch.dtype, lora: bool) -> float:
    """Bytes that the forward of the fused model keeps for its backward, over those of eager."""
    counts = []
    for fused in (False, True):
        model, inputs = build(name, dtype)
        if lora:
            adapt(model)
        if fused:
            mk.fuse(model)
        run = lambda model=model, inputs=inputs: model(**inputs, return_dict=False)[0]  # noqa: E731
        run()
        leaves = [*model.parameters(), *(each for each in inputs.values() if isinstance(each, Tensor))]
        counts.append(saved_bytes(run, leaves))
    return counts[1] / counts[0]


def measure(name: str, dtype: str, direction: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """A case of the record."""
    torch.compiler.reset()
    calls, handle = columns(name, DTYPES[dtype], direction, compiled)
    wrong = check_same(name, calls, DTYPES[dtype])
    calls = {column: call for column, call in calls.items() if column not in wrong}
    seconds = times(calls, rounds)
    ratios = {
        column: statistics.median(a / b for a, b in zip(seconds["eager"], each, strict=True))
        for column, each in seconds.items()
        if column != "eager"
    }
    case: dict[str, Any] = {
        "model": name,
        "dtype": dtype,
        "direction": direction,
        "rounds": rounds,
        "seconds": {column: statistics.median(each) for column, each in seconds.items()},
        "ratios": ratios,
        **({"wrong": wrong} if wrong else {}),
        "found": dict(Counter(site.op for site in handle.sites if site.backend)),
        "left": dict(Counter(f"{site.op}: {site.reason}" for site in handle.sites if not site.backend)),
    }
    if direction == BOTH:
        case["kept"] = {each: kept(name, DTYPES[dtype], each == "LoRA") for each in ("full", "LoRA")}
    return case


def lines(cases: list[dict[str, Any]]) -> list[str]:
    header = ("model", "dtype", "direction", *(f"x {column}" for column in COLUMNS[1:]), "kept", "kept, LoRA", "found")
    rows = [
        (
            *(case[key] for key in ("model", "dtype", "direction")),
            *(f"{case['ratios'][column]:.2f}" if column in case["ratios"] else "" for column in COLUMNS[1:]),
            *(f"{case['kept'][each]:.2f}" if "kept" in case else "" for each in ("full", "LoRA")),
            str(sum(case["found"].values())),
        )
        for case in cases
    ]
    return aligned(header, rows)


@command()
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES), help="default: both")
    parser.add_argument("--directions", nargs="+", choices=(FWD, BOTH), default=(FWD, BOTH), help="default: both")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is taken (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a C++ compiler")
    parser.add_argument("--save", action="store_true", help="write bench/results/MACHINE/fuse.json")
    parser.add_argument(
        "--save-into", action="store_true", help="let --save replace those cases alone that this run times"
    )
    parser.add_argument("--save-as", type=Path, help="write this file")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}; it must be at least 1")
    if options.threads < 1:
        raise ValueError(f"--threads is {options.threads}; it must be at least 1")
    if options.save_into and not options.save:
        raise ValueError("--save-into says what --save does; give both")
    device = torch.device("cpu")
    own = path_of(machine(device), "fuse", RESULTS)
    before = json.loads(own.read_text()) if options.save_into else None
    torch.set_num_threads(options.threads)
    cases = []
    for name in options.models:
        for dtype in options.dtypes:
            for direction in options.directions:
                cases.append(measure(name, dtype, direction, options.rounds, not options.no_compile))
                print(json.dumps(cases[-1]), file=sys.stderr)
    print("\n".join(lines(cases)))
    record = {**head(device, "default"), "threads": options.threads, "cases": cases}
    if before is not None:
        record = merged(record, before)
    path = options.save_as or (own if options.save else None)
    if path is not None:
        save(record, path, over=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
