"""Checkpoints of a run that trains: a file by the first rank, or a folder to which every rank adds its shard."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

from .. import checkpoint as checkpoints
from ..checkpoint import Checkpoint, part_of, path_of
from ..parallel.ranks import Ranks

# Seconds between two looks at the files of the others.
PAUSE = 0.05


class Saving:
    """Writes the checkpoints of a run into its folder.

    A file is on the disk when :meth:`save` returns. With shards a thread writes this rank's part while the training
    goes on, and the folder gets its name once the first rank sees all parts; :meth:`finish` waits for that. It is
    given up ``patience`` seconds after its start, with an error that names whose part is not there; earlier ones stay.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, patience: float) -> None:
        self.folder, self.ranks, self.keep, self.patience = folder, ranks, keep, patience
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = threading.Event()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write this rank's share of a checkpoint, after the one before is finished; with shards every rank calls this.

        Raises:
            OSError: a file that could not be written.
        """
        if not self.ranks.sharded:
            if self.ranks.first:
                checkpoints.save(self.folder, checkpoint, self.keep)
            return
        path = path_of(self.folder, checkpoint.step)
        temporary = path.with_name(f"{path.name}.tmp")
        if self.ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.ranks.meet()
        if self.ranks.part is not None:
            arguments = (path, temporary, self.ranks.part, checkpoint)
            self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
            self._thread.start()

    def _write(self, path: Path, temporary: Path, part: int, checkpoint: Checkpoint) -> None:
        parts, deadline = self.ranks.parts, time.monotonic() + self.patience
        try:
            checkpoints.save_part(temporary, part, parts, checkpoint)
            if part:
                return
            while missing := [i for i in range(parts) if not part_of(temporary, i, parts).exists()]:
                late = time.monotonic() > deadline
                if late or self._given_up.wait(PAUSE):
                    waited = f" within {self.patience:g} s" if late else ""
                    ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
                    raise OSError(f"checkpoint {path} was not written: {ranks} wrote no part of it{waited}")
            checkpoints.complete(path, temporary, self.keep)
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait until what this rank writes is on the disk, and on the first rank the whole checkpoint.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            # Begins the watch's wait anew: the thread gives up first, and its error names the rank.
            self.ranks.at(self.ranks.place.step, "saves a checkpoint")
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """End the writing; a checkpoint whose other parts are not there is given up."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
