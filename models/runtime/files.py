"""Files that are whole under their name at any time, on the disk when the call returns, and known by their content."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

# Bytes that are read at a time.
BLOCK = 1 << 20
_log = logging.getLogger(__name__)


def sync_folder(folder: Path) -> None:
    """Flush the names in the folder to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb", *, sync_name: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write, which gets its name, and is on the disk, when the block ends without an error.

    Until then its name ends in ``.tmp``. An error removes it and leaves what had the name before; what a kill leaves is
    replaced by the next try. Without ``sync_name`` the caller flushes the name, which is the folder's.

    Raises:
        OSError: it could not be written; names the file.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync_name:
            sync_folder(path.parent)
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole under its name at any time, and on the disk when this returns."""
    with whole_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's own in the block, as far as others ask; nothing is left of the lock after a kill.

    Raises:
        BlockingIOError: another process has it.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder} is in use: another process writes there") from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): no other process may write there", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def checksum(file: IO[bytes], size: int) -> str:
    """A checksum of the first bytes of a file, 64 hexadecimal digits.

    SHA-256 of the sums, modulo 2^64, of the rows and the columns of each MiB as 256 x 512 words of 8 bytes, and of the
    size. No change of up to three words of a MiB goes unseen, and a chance change elsewhere once in 2^64. It is for
    damage, not against an enemy: to read a file takes longer, where SHA-256 of it all takes several times as long.
    """
    digest = hashlib.sha256(str(size).encode())
    block = bytearray(BLOCK)
    words = np.frombuffer(block, "<u8").reshape(256, 512)
    file.seek(0)
    while size > 0:
        part = memoryview(block)[: min(size, BLOCK)]
        got = 0
        while got < len(part):
            count = file.readinto(part[got:])  # type: ignore[attr-defined]
            if not count:
                raise OSError("the file became shorter while it was read")
            got += count
        block[len(part) :] = bytes(BLOCK - len(part))
        for axis in (0, 1):
            digest.update(words.sum(axis).tobytes())
        size -= len(part)
    return digest.hexdigest()
