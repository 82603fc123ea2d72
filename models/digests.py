"""Checksums by which files are known again, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and checksums of all files in a folder."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(record: Mapping[str, Any]) -> str:
    """The ``path`` of a record and the beginning of its ``sha256``, if it has one."""
    checksum = "" if record["sha256"] is None else f" (sha256 {record['sha256'][:12]}...)"
    return f"{record['path']}{checksum}"
