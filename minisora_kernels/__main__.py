"""``python -m minisora_kernels``: what serves here, and why not the rest. ``verify``: find that out on this device."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections import Counter
from pathlib import Path

import torch

from . import __version__, backends, proofs
from .commands import HELP
from .commands import command as reports_errors
from .verify import command, record
from .verify.cases import regimes


def ops() -> list[str]:
    """The ops, found by file name: ``ops/<op>.py``."""
    return sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py") if path.stem != "__init__")


def table_of(op: str) -> backends.Table:
    """The backends of an op."""
    return importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS


def device_of(backend: str) -> torch.device:
    """Where the automatic choice may take this backend."""
    kind = backends.DEVICES[backend]
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def state(op: str, backend: str) -> str:
    """What becomes of the backend here, in a word or two, or in how many of the op's regimes it is used."""
    if backend not in table_of(op):
        return "no kernel"
    if backend == "reference":
        return "yes"
    if backends.unavailable(backend) is not None:
        return "not built" if "not_built" in backends.build_record().get(backend, {"not_built": ""}) else "not here"
    device = device_of(backend)
    if backend not in backends.PREFERENCE.get(device.type, ()):
        return "by name only"
    found: Counter[str] = Counter()
    for name, dtype, rest in regimes():
        if name == op:
            verdict = record.refusal(backend, op, device, f"{dtype} {rest}", compiling=False)
            found["used" if verdict is None else verdict[0]] += 1
    if len(found) == 1 or "wrong here" in found:
        return "wrong here" if "wrong here" in found else next(iter(found))
    return f"used {found['used']}/{found.total()}" if found["used"] else found.most_common(1)[0][0]


def table() -> list[tuple[str, list[str]]]:
    """Per op, for each backend its :func:`state`."""
    return [(op, [state(op, name) for name in backends.BACKENDS]) for op in ops()]


def show() -> None:
    """Print what serves here."""
    capability = backends.cpu_capability()
    print(f"minisora_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU: {capability}, {torch.get_num_threads()} threads\n")
    width = max(len(op) for op in ops())
    print(" ".join([" " * width, *(f"{name:>12}" for name in backends.BACKENDS)]))
    for op, cells in table():
        print(" ".join([f"{op:{width}}", *(f"{cell:>12}" for cell in cells)]))
    print()
    for name in backends.BACKENDS:
        print(f"{name:>10}: {backends.unavailable(name) or 'available'}")
    print()
    for op in ops():
        note = getattr(importlib.import_module(f"minisora_kernels.ops.{op}"), "ROUTES", None)
        if note:
            print(f"{op}: {note}")
    print("\nhow the kernels for GPUs were proven:")
    for line in proofs.lines({op: table_of(op) for op in ops()}):
        print(f"  {line}")
    print("\nbackends of the automatic choice, of which the record's fastest serves:")
    for kind, order in backends.PREFERENCE.items():
        print(f"{kind:>10}: {', '.join(order)}")
    built = backends.build_record()
    print(f"\nbuild record: {'' if built else 'none; the package was not installed with pip'}")
    for part, facts in built.items():
        print(f"{part:>10}: {', '.join(f'{key} = {value}' for key, value in facts.items())}")
    here = [name for name in backends.BACKENDS[1:] if backends.unavailable(name) is None]
    for device in dict.fromkeys(device_of(name) for name in here):
        found = record.find(device)
        if found is None:
            print(f"\n{record.key(device)}: no record of what is right and fast; run `{record.COMMAND}`")
        else:
            print(f"\nrecord {found[1]}, of {found[0].key}:\n" + "\n".join(command.table(found[0])))


@reports_errors(failed=2)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minisora_kernels", description=__doc__, epilog=HELP)
    commands = parser.add_subparsers(dest="command", metavar="verify")
    verify = commands.add_parser(
        "verify",
        help="check the kernels on this device, time them, and write the record that the automatic choice reads",
        description="Check every kernel on this device against float64, values and gradients; then time it against "
        "plain PyTorch and torch.compile. The record says which kernels serve from now on. Exit status 1: a kernel is "
        "wrong; 2: nothing could be verified.",
    )
    command.add_options(verify)
    options = parser.parse_args(arguments)
    if options.command == "verify":
        return command.main(options)
    show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
