"""``python -m bench.compare OLD NEW``: what got slower or faster between two records of one machine.

What is compared is the time of eager over that of ours, which both runs measured in turns: a machine that was busier in
one of them slows both. A case got slower (or faster) if that ratio fell (or rose) by more than the threshold and the
quartiles of its rounds in one record do not overlap those in the other. Exit status 1 if a case got slower, 2 if the
records cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bench.harness.record import key, load
from bench.harness.report import about, aligned, milliseconds, ratio
from minisora_kernels.commands import command

THRESHOLD = 0.1


def verdict(old: dict[str, Any], new: dict[str, Any], threshold: float = THRESHOLD) -> str:
    """``"slower"``, ``"faster"`` or ``"same"``, of two measurements of one case."""
    before, after = old["ratios"]["eager"], new["ratios"]["eager"]
    change = after["median"] / before["median"] - 1
    if change < -threshold and after["q3"] < before["q1"]:
        return "slower"
    if change > threshold and after["q1"] > before["q3"]:
        return "faster"
    return "same"


def check_comparable(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises ValueError if the two records are not of the same machine, threads and allocator."""
    for name, values in {
        "machine": [record["machine"]["slug"] for record in (old, new)],
        "threads": [record["threads"] for record in (old, new)],
        "allocator": [record["allocator"] for record in (old, new)],
    }.items():
        if values[0] != values[1]:
            raise ValueError(f"{name} differs: {values[0]} and {values[1]}; --any-machine compares all the same")


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float = THRESHOLD) -> tuple[list[str], bool]:
    """The lines to print, and whether a case got slower."""
    before, after = ({key(case): case for case in record["cases"]} for record in (old, new))
    common = [name for name in after if name in before]
    verdicts = {name: verdict(before[name], after[name], threshold) for name in common}
    rows = [
        (
            verdicts[name],
            *name,
            *(ratio(cases[name], "eager") for cases in (before, after)),
            *(milliseconds(cases[name]["columns"]["ours"]["median"]) for cases in (before, after)),
        )
        for name in sorted(common, key=lambda name: verdicts[name] != "slower")
        if verdicts[name] != "same"
    ]
    header = ("", "op", "shape", "dtype", "direction", "old x eager", "new x eager", "old ms", "new ms")
    lines = [f"old: {about(old)}", f"new: {about(new)}", *(aligned(header, rows) if rows else [])]
    counts = [f"{list(verdicts.values()).count(word)} {word}" for word in ("slower", "faster", "same")]
    alone = f"{len(before) - len(common)} only in the old, {len(after) - len(common)} only in the new"
    lines.append(f"{len(common)} cases: {', '.join(counts)}; {alone}")
    return lines, "slower" in verdicts.values()


@command(failed=2)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--any-machine", action="store_true", help="compare records of different machines or settings")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="smallest change that counts (default 0.1)")
    options = parser.parse_args(arguments)
    old, new = load(options.old), load(options.new)
    if not options.any_machine:
        check_comparable(old, new)
    lines, slower = compare(old, new, options.threshold)
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
