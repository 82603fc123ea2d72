"""Checksums by which files are known again, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def sha256_of(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the names, relative to the folder, and checksums of some files in it."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """:func:`sha256_of_files` of all files in a folder and below."""
    return sha256_of_files(folder, (file for file in folder.rglob("*") if file.is_file()))


def describe(record: Mapping[str, Any]) -> str:
    """The ``path`` of a record and the beginning of its ``sha256``, if it has one."""
    checksum = "" if record["sha256"] is None else f" (sha256 {record['sha256'][:12]}...)"
    return f"{record['path']}{checksum}"
