"""What a command makes of its errors: one line and an exit status, never a traceback unless it is asked for."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from . import backends

TRACEBACK = "--traceback"
HELP = f"{TRACEBACK} shows where an error comes from."

# How torch says without a class of its own that memory does not suffice, or that a size is beyond all numbers for it.
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory|out of memory", re.IGNORECASE)
_TOO_LARGE = re.compile(
    r"size calculation overflowed|multiplication overflow|array is too big|maximum allowed dimension"
    r"|failed to map segment",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))|unable to allocate ([\d.]+ \w+)", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is too little memory: Python's own, numpy's, torch's or the system's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    said = NO_MEMORY.search(text) or _TOO_LARGE.search(text)
    return isinstance(error, (RuntimeError, ValueError, ImportError)) and said is not None


def message_of(error: BaseException) -> str:
    """The error in one line. Of one that nobody foresaw, with its class."""
    text = textwrap.shorten(str(error), 2000, placeholder=" ...")
    if out_of_memory(error):
        asked = _ASKED.search(text)
        size = "" if asked is None else f" for another {asked[1] or asked[2]}"
        return f"out of memory{size}; use a smaller model, clip or batch"
    foreseen = isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError)
    if text and (foreseen or error is backends.broken):
        return text
    kind = type(error).__name__
    return f"{kind}: {text}; {TRACEBACK} shows where" if text else f"{kind}; {TRACEBACK} shows where"


def _flush() -> None:
    """Write what was printed. What cannot be written is dropped: it would fail once more at the exit."""
    if sys.stdout is None:  # closed from the start
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def command(failed: int | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``main`` of a command, which gets the arguments: where a caller has none, those of the process.

    Every error ends the command with one line on stderr and status 1. With ``failed``, for a ``main`` that returns its
    status, that is returned in its place. ``--traceback`` lets errors through. A reader that has enough, as ``head``,
    ends the command without a word.
    """

    def decorate(main: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None, **options: Any) -> Any:
            given = sys.argv[1:] if arguments is None else arguments
            try:
                try:
                    backends.check_environment()
                    return main([argument for argument in given if argument != TRACEBACK], **options)
                finally:
                    _flush()
            except BrokenPipeError:
                sys.exit(1)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                sys.exit(130)
            except Exception as error:
                if TRACEBACK in given:
                    raise
                if failed is None:
                    sys.exit(f"error: {message_of(error)}")
                print(f"error: {message_of(error)}", file=sys.stderr)
                return failed

        return run

    return decorate
