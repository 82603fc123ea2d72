"""TensorBoard's file of a run: one, however often the run stops, with every step once and in order."""

from __future__ import annotations

import logging
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.files import whole_file

_log = logging.getLogger(__name__)


def _records(path: Path) -> Iterator[tuple[bytes, Any]]:
    """The records of a file, with their frames, and the events in them; the rest of a damaged file is left out."""
    from tensorboard.compat.proto.event_pb2 import Event

    content, place = path.read_bytes(), 0
    while place < len(content):
        try:
            (size,) = struct.unpack_from("<Q", content, place)
            stop = place + 8 + 4 + size + 4  # length, its sum, the event, its sum
            if stop > len(content):
                raise ValueError("it ends early")
            event = Event.FromString(content[place + 12 : stop - 4])
        except Exception as error:  # whatever the protocol's decoder raises
            _log.warning("%s is read no further than byte %d: %s", path, place, error)
            return
        yield content[place:stop], event
        place = stop


class Board:
    """Scalars and images of a run that begins, or goes on, at the 0-based ``start``.

    What is there of earlier parts of the run, and was not undone by the return to a checkpoint, goes into one new file;
    the earlier files are removed. Its name follows theirs, not the clock, for readers take files in the order of names,
    and the time of an event is never before that of the one before.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        old = sorted(folder.glob("events.out.tfevents.*"))
        numbers = [int(match[1]) for file in old if (match := re.match(r"events\.out\.tfevents\.(\d+)", file.name))]
        path = folder / f"events.out.tfevents.{max(numbers, default=0) + 1:010d}.run"
        kept: dict[tuple[str, int], bytes] = {}
        self._last = 0.0
        for file in old:
            for record, event in _records(file) if file.suffix != ".tmp" else ():
                values = event.summary.value
                # A preview has the number of steps before it, a scalar the number of the step.
                if values and event.step < start + (values[0].tag == "samples"):
                    kept[values[0].tag, event.step] = record
                    self._last = max(self._last, event.wall_time)
        with whole_file(path) as content:
            writer = RecordWriter(content)
            writer.write(Event(wall_time=self._now(), file_version="brain.Event:2").SerializeToString())
            # A reader that shows the earlier files forgets them here.
            restart = Event(wall_time=self._now(), session_log=SessionLog(status=SessionLog.START))
            writer.write(restart.SerializeToString())
            for _, record in sorted(kept.items(), key=lambda item: item[0][1]):
                content.write(record)
        for earlier in old:
            earlier.unlink(missing_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        self._writer = RecordWriter(self._file)

    def _now(self) -> float:
        self._last = max(self._last, time.time())
        return self._last

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=self._now(), step=step, summary=summary).SerializeToString())

    def add_scalar(self, name: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._add(scalar(name, value), step)

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """An image, uint8 ``[H, W, 3]``, after so many steps."""
        from torch.utils.tensorboard.summary import image as summary

        self._add(summary(name, image, dataformats="HWC"), step)

    def flush(self) -> None:
        """Hand what was added to the system."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
