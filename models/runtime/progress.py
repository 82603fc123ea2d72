"""The progress bar of the commands."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(**options: Any) -> tqdm:
    """A bar that moves on a terminal and adds a line to a log only now and then."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)
