"""``python -m bench.readme``: write the README's measured tables anew from the committed records; ``--check`` verifies.

Between the markers stand, for every machine in ``bench/results``, the tables of ``default.json`` (glibc's own
allocator) and of ``reuse.json`` (``--allocator reuse``), and the plots of the first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.record import RESULTS, ROOT, key, load
from bench.report import NO_RATIO, about, counted, markdown, milliseconds, ratio, written

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NAMES = ("default", "reuse")
MODELS = ("block pair", "training step", "sampling step")


def _cell(records: dict[str, dict], place: tuple, direction: str, column: str) -> str:
    """Time over that of ours under each allocator."""
    cells = []
    for cases in records.values():
        case = cases.get((*place, direction))
        name = written(case) if case and column == "written" else column
        cells.append(ratio(case, name, with_spread=False) if case else NO_RATIO)
    return NO_RATIO if set(cells) == {NO_RATIO} else " / ".join(cells)


def _places(records: dict[str, dict], models: bool) -> list[tuple]:
    found = {name[:3]: None for cases in records.values() for name in cases if (name[0] in MODELS) == models}
    return list(found)


def _ops(records: dict[str, dict]) -> list[str]:
    header = ["op", "shape", "dtype", "fwd: eager", "compile", "fwd+bwd: eager", "compile", "as written"]
    return markdown(
        header,
        [
            (
                f"`{place[0]}`",
                *place[1:],
                *(_cell(records, place, direction, column) for direction, column in COLUMNS),
            )
            for place in _places(records, models=False)
        ],
    )


COLUMNS = (
    ("fwd", "eager"),
    ("fwd", "compile"),
    ("fwd+bwd", "eager"),
    ("fwd+bwd", "compile"),
    ("fwd+bwd", "written"),
)


def _models(records: dict[str, dict]) -> list[str]:
    rows = []
    first = next(iter(records.values()))
    for place in _places(records, models=True):
        for direction in ("fwd", "fwd+bwd"):
            case = first.get((*place, direction))
            if case is None:
                continue
            cells = [_cell(records, place, direction, column) for column in ("eager", "written", "compile")]
            ours = milliseconds(case["columns"]["ours"]["median"])
            inside = _cell(records, place, direction, "ours in compile")
            rows.append((*place, direction, ours, *cells, inside))
    header = ["", "model", "dtype", "direction", "ours, ms", "eager", "as written", "compile", "ours in compile"]
    return markdown(header, rows)


def section(records: dict[str, dict[str, Any]], plots: list[str]) -> list[str]:
    """The lines of one machine; ``records`` by name."""
    by_key = {name: {key(case): case for case in record["cases"]} for name, record in records.items()}
    first = next(iter(records.values()))
    settings = " / ".join(records[name]["allocator"] for name in records)
    lines = [f"**{about(record)}**" for record in records.values()]
    lines = [line for text in lines for line in (text, "")]
    lines += [
        f"Time of the other column over that of ours, medians, allocator {settings}: above 1 ours is faster.",
        "",
        *_ops(by_key),
        "",
        *_models(by_key),
        "",
        "Bytes saved for the backward, without inputs and parameters:",
        "",
        *counted(first, "saved", markdown, ("block pair", "training step", "gelu_mlp")),
        "",
        "Bytes that the ops of forward and backward read and write (compile: Inductor's own count):",
        "",
        *counted(first, "moved", markdown, MODELS),
    ]
    for plot in plots:
        lines += ["", f"![{Path(plot).stem}]({plot})"]
    return lines


def block(results: Path = RESULTS) -> str:
    """What belongs between the markers."""
    lines: list[str] = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        records = {name: load(folder / f"{name}.json") for name in NAMES if (folder / f"{name}.json").exists()}
        if records:
            found = sorted(folder.glob(f"{next(iter(records))}-*.png"))
            plots = [path.relative_to(results.parent.parent).as_posix() for path in found]
            lines += [*section(records, plots), ""]
    return "\n".join(lines or ["No record is committed yet.", ""])


def filled(text: str, results: Path = RESULTS) -> str:
    """The README with its block written anew.

    Raises:
        ValueError: a README without the two markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README must have {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{block(results)}{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the README differs")
    options = parser.parse_args(arguments)
    text = README.read_text()
    try:
        wanted = filled(text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.check:
        README.write_text(wanted)
    elif text != wanted:
        print("error: the README's tables differ from bench/results: run `python -m bench.readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
