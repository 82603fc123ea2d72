"""What :mod:`minisora_kernels.verify` measured on a device, as a file that is trusted only if it is whole and of here.

A record is JSON. Its name and its key say what it holds for: device, capability, torch, Triton, and the
digest of the kernels' sources. Another torch, another GPU or another source finds no record. It lies in the user's
cache folder; records of this project's machines come with the package, and those of CPUs hold for every CPU that has
none of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import backends

FORMAT = 1
# The share of plain PyTorch's (or torch.compile's) time that a kernel may take at most to be used.
FASTER = 0.95
COMMAND = "python -m minisora_kernels verify"
MOST_BYTES = 4 << 20
DTYPES = ("float32", "tf32", "bfloat16", "float16")
COLUMNS = ("ours", "eager", "compile")
# What a file says of an entry beside its fields, for who reads it; it must follow from them.
DERIVED = ("use", "why", "use_in_compile", "why_in_compile")
PACKAGE = Path(__file__).parent.parent
SHIPPED = Path(__file__).parent / "records"


class NotARecord(ValueError):
    """A file that is damaged, of another format, or of another device, version or source."""


@dataclass(frozen=True)
class Key:
    """What a record holds for. ``kind``: "cuda", "cpu", or "interpreted" where Triton's kernels run on a CPU."""

    kind: str
    device: str
    capability: str
    torch: str
    triton: str
    digest: str

    def __str__(self) -> str:
        triton = "" if self.kind == "cpu" else f", Triton {self.triton}"
        return f"{self.device} with torch {self.torch.split('+')[0]}{triton}"

    @property
    def file_name(self) -> str:
        parts = (
            self.kind,
            self.device,
            self.capability,
            f"torch{self.torch}",
            f"triton{self.triton}",
            self.digest[:16],
        )
        return "-".join(re.sub(r"[^a-z0-9.+]+", "_", part.lower()).strip("_") for part in parts) + ".json"


@dataclass(frozen=True)
class Entry:
    """Of one backend, op and regime (:func:`minisora_kernels.automatic.regime`).

    ``right``: None where time or memory did not suffice to say. ``error``: the worst error over its bound, at most 1
    where ``right``; None if it did not come to that. ``wrong`` says what happened where it is not right. ``times``: per
    column ``[device, host]`` in microseconds per call, host None on a CPU. ``ratio``: median and third quartile of our
    time over eager's, ``compile_ratio`` over torch.compile's; None: not timed. ``timed``: the dtype of the times.
    """

    backend: str
    op: str
    regime: str
    right: bool | None
    error: float | None
    wrong: str
    timed: str
    times: dict[str, list[float | None]]
    ratio: list[float] | None
    compile_ratio: list[float] | None

    @property
    def status(self) -> str:
        """ "used", "slower here", "wrong here", "undecided" or "not timed"."""
        return self._status(self.ratio)

    @property
    def status_in_compile(self) -> str:
        """The same beside what torch.compile makes of plain PyTorch."""
        return self._status(self.compile_ratio)

    def _status(self, ratio: list[float] | None) -> str:
        if not self.right:
            return "undecided" if self.right is None else "wrong here"
        if ratio is None:
            return "not timed"
        return "used" if _faster(ratio) else "slower here"

    @property
    def use(self) -> bool:
        return self.status == "used"

    @property
    def use_in_compile(self) -> bool:
        return self.status_in_compile == "used"

    @property
    def why(self) -> str:
        """The status with its figures."""
        if not self.right:
            return f"{self.status}: {self.wrong}"
        if self.ratio is None:
            return f"not timed: run `{COMMAND}` again"
        return f"{self.status}: {_figures(self.ratio)} of plain PyTorch's time ({self.regime})"

    @property
    def why_in_compile(self) -> str:
        if not self.right:
            return f"{self.status}: {self.wrong}"
        if self.compile_ratio is None:
            return f"not timed beside torch.compile: run `{COMMAND}` without --quick"
        return f"{self.status_in_compile}: {_figures(self.compile_ratio)} of torch.compile's time ({self.regime})"


def _faster(ratio: list[float]) -> bool:
    return ratio[0] <= FASTER and ratio[1] < 1


def _figures(ratio: list[float]) -> str:
    """Both, where the first alone would not say why a kernel is not used."""
    alone = (ratio[0] < 1) == _faster(ratio)
    return f"{ratio[0]:.2f}" if alone else f"{ratio[0]:.2f} (a quarter of the runs {ratio[1]:.2f})"


@dataclass(frozen=True)
class Record:
    key: Key
    made: dict[str, Any]
    entries: tuple[Entry, ...]

    @functools.cached_property
    def by_regime(self) -> dict[tuple[str, str, str], Entry]:
        return {(entry.backend, entry.op, entry.regime): entry for entry in self.entries}

    def covers(self, single: str) -> bool:
        """Whether it says something of every op with float32 as ``single`` ("float32" or "tf32") names it."""
        from .cases import regimes

        there = {entry.op for entry in self.entries if entry.regime.partition(" ")[0] == single}
        return there.issuperset(op for op, _, _ in regimes())

    def merged(self, entries: Iterable[Entry], made: dict[str, Any]) -> Record:
        """With these entries in place of those of the same backend, op and regime.

        A quick run does not time torch.compile: what an earlier run said of it stays.
        """
        new = {}
        for entry in entries:
            place = entry.backend, entry.op, entry.regime
            old = self.by_regime.get(place)
            if old is not None and old.compile_ratio is not None and entry.compile_ratio is None:
                entry = replace(entry, compile_ratio=old.compile_ratio, times=old.times | entry.times)
            new[place] = entry
        return Record(self.key, made, tuple((self.by_regime | new).values()))


def _version(*names: str) -> str:
    """Of the first of these packages that is installed."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


@functools.cache
def digest(kind: str) -> str:
    """Of what decides how a kernel computes: the sources of ops and of Triton's kernels, and the compiled library."""
    paths = [PACKAGE / f"{name}.py" for name in ("backends", "checks", "modulation")] + [
        *(PACKAGE / "ops").glob("*.py")
    ]
    if kind == "cpu":
        paths += PACKAGE.glob(f"_{backends.VARIANTS.get(backends.cpu_capability(), 'cpu')}.*so")
    else:
        paths += [*(PACKAGE / "triton").glob("*.py"), *PACKAGE.glob("_cuda.*so")]
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@functools.cache
def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "CPU"


def key(device: torch.device) -> Key:
    """Of this device with this torch, Triton and these kernels. Needs the device."""
    version, triton = torch.__version__, _version("triton", "pytorch-triton")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"cc{properties.major}.{properties.minor}"
        return Key("cuda", properties.name, capability, version, triton, digest("cuda"))
    if backends.DEVICES["triton"] == "cpu":
        return Key("interpreted", cpu_name(), "interpreter", version, triton, digest("triton"))
    return Key("cpu", cpu_name(), backends.cpu_capability(), version, "none", digest("cpu"))


# ---- files


def _is(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, bool) and kinds is not bool)


def _number(value: Any) -> bool:
    return _is(value, (int, float)) and math.isfinite(value) and value >= 0


def _entry(raw: Any) -> Entry:
    """Checks every field by type and range."""
    names = {item.name for item in fields(Entry)}
    if not isinstance(raw, dict) or raw.keys() != names | set(DERIVED):
        raise NotARecord("an entry lacks a field or has one too many")
    text = [raw[name] for name in ("backend", "op", "regime", "wrong", "timed")]
    right = raw["right"] is None or _is(raw["right"], bool)
    if not all(_is(value, str) and len(value) <= 4000 for value in text) or not right:
        raise NotARecord("an entry has a field of another type")
    where = f"{raw['op']} {raw['regime']}"
    if raw["backend"] not in backends.BACKENDS[1:]:
        raise NotARecord(f"backend is {raw['backend']!r}")
    if not re.fullmatch(rf"({'|'.join(DTYPES)}) forward(\+backward)?( [a-z ]+)?", raw["regime"]):
        raise NotARecord(f"regime is {raw['regime']!r}")
    error = raw["error"]
    if not (error is None or _number(error)) or (raw["right"] and not (error is not None and error <= 1)):
        raise NotARecord(f"{where}: error is {error!r}, right is {raw['right']}")
    times = raw["times"]
    pairs = isinstance(times, dict) and all(
        name in COLUMNS
        and isinstance(pair, list)
        and len(pair) == 2
        and _number(pair[0])
        and (pair[1] is None or _number(pair[1]))
        for name, pair in times.items()
    )
    if not pairs:
        raise NotARecord(f"{where}: times are {times!r}")
    for name in ("ratio", "compile_ratio"):
        value = raw[name]
        if value is not None and not (
            isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and 0 < value[0] <= value[1]
        ):
            raise NotARecord(f"{where}: {name} is {value!r}")
    entry = Entry(**{name: raw[name] for name in names})
    for name in ("use", "use_in_compile"):  # the words may be those of another version
        if raw[name] != getattr(entry, name):
            raise NotARecord(f"{where}: {name} is {raw[name]!r}, which its figures do not say")
    return entry


def load(path: Path, expected: Key | None = None) -> Record:
    """Read a record; it must be of ``expected`` if that is given.

    Raises:
        NotARecord: damaged, or of something else.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise NotARecord(f"it is larger than {MOST_BYTES} bytes")
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotARecord(f"it is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.keys() != {"format", "key", "made", "entries"}:
        raise NotARecord("it does not have the fields of a record")
    if raw["format"] != FORMAT or isinstance(raw["format"], bool):
        raise NotARecord(f"its format is {raw['format']!r}; this code reads {FORMAT}")
    names = {item.name for item in fields(Key)}
    if (
        not isinstance(raw["key"], dict)
        or raw["key"].keys() != names
        or not all(_is(v, str) for v in raw["key"].values())
    ):
        raise NotARecord("its key is not whole")
    if not isinstance(raw["made"], dict) or not isinstance(raw["entries"], list):
        raise NotARecord("its entries are not whole")
    found = Key(**raw["key"])
    if expected is not None and found != expected:
        other = [name for name in sorted(names) if getattr(found, name) != getattr(expected, name)]
        made, here = (", ".join(f"{name} {getattr(of, name)!r}" for name in other) for of in (found, expected))
        raise NotARecord(f"it was made on {made}; this is {here}")
    record = Record(found, raw["made"], tuple(_entry(entry) for entry in raw["entries"]))
    if len(record.by_regime) != len(record.entries):
        raise NotARecord("it has two entries of one regime")
    return record


def save(record: Record, path: Path) -> None:
    """Write the record as a whole or not at all.

    Raises:
        OSError: it could not be written; what was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "key": asdict(record.key),
        "made": record.made,
        "entries": [asdict(entry) | {name: getattr(entry, name) for name in DERIVED} for entry in record.entries],
    }
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for this record, where the folder can be written and the system has such locks."""
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(open(f"{path}.lock", "w"))  # a process that dies leaves no lock
            fcntl.flock(file, fcntl.LOCK_EX)
            for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        yield


# ---- the one that holds here


def own_path(device: torch.device) -> Path | None:
    """Where the record of this device is looked for first; None without a cache folder."""
    if backends.VERIFIED not in (None, "0"):
        return Path(backends.VERIFIED)
    folder = backends.cache_folder()
    return None if folder is None else folder / "verified" / key(device).file_name


def _shipped(wanted: Key) -> list[tuple[Path, Key | None]]:
    """Records of ours and what they must be of: of CPUs all, of whatever CPU, the nearest instruction set first."""
    if wanted.kind != "cpu":
        path = SHIPPED / wanted.file_name
        return [(path, wanted)] if path.exists() else []
    order = list(backends.VARIANTS)
    if wanted.capability not in order:
        return []
    there = [name for name in order if (SHIPPED / f"cpu-{name}.json").exists()]
    there.sort(key=lambda name: abs(order.index(name) - order.index(wanted.capability)))
    return [(SHIPPED / f"cpu-{name}.json", None) for name in there]


@functools.cache
def find(device: torch.device) -> tuple[Record, Path] | None:
    """The record that holds for this device; what is there and cannot be trusted is warned of and passed over.

    What one's own record does not say, because it is of some ops only, the records of the package say; what that of the
    nearest instruction set does not say, the next one says.
    """
    if backends.VERIFIED == "0":
        return None
    wanted, own = key(device), own_path(device)
    named = backends.VERIFIED is not None
    places: list[tuple[Path, Key | None]] = []
    if own is not None:
        places.append((own, wanted))
    if not named:
        places += _shipped(wanted)
    found: tuple[Record, Path] | None = None
    for path, expected in places:
        try:
            record = load(path, expected)
            if expected is None and record.key.kind != wanted.kind:
                raise NotARecord(f"it is of a {record.key.kind} device")
        except (NotARecord, OSError) as error:
            if named or not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                warnings.warn(f"minisora_kernels: the record {path} is not used: {error}", stacklevel=2)
            continue
        if found is None:
            found = record, path
        else:
            merged = record.merged(found[0].entries, found[0].made)
            found = replace(merged, key=found[0].key), found[1]
    return found


def refusal(backend: str, op: str, device: torch.device, regime: str, compiling: bool) -> tuple[str, str] | None:
    """Why the automatic choice does not take this backend here: a status and a reason; None if it does.

    The C++ kernels run and are tested wherever this project is: only a record that speaks against them stops them.
    """
    found = find(device)
    entry = None if found is None else found[0].by_regime.get((backend, op, regime))
    status = "not timed" if entry is None else entry.status_in_compile if compiling else entry.status
    if status == "used":
        return None
    if status in ("not timed", "undecided") and backend == "cpu":
        return None if entry is None or not compiling else _eager(entry)
    if entry is None:
        what = f" for {regime}" if found is not None else ""
        return "not verified", f"not verified{what} on {key(device)}: run `{COMMAND}`"
    status = "not verified" if status == "not timed" else status
    return status, entry.why_in_compile if compiling else entry.why


def share(backend: str, op: str, device: torch.device, regime: str, compiling: bool) -> float:
    """Our time over eager's, or over torch.compile's; 1 where nobody timed it."""
    found = find(device)
    entry = None if found is None else found[0].by_regime.get((backend, op, regime))
    ratio = None if entry is None else entry.compile_ratio if compiling else entry.ratio
    return 1.0 if ratio is None else ratio[0]


def _eager(entry: Entry) -> tuple[str, str] | None:
    """Of a C++ kernel that was not timed beside torch.compile: what holds outside."""
    return None if entry.status in ("used", "not timed", "undecided") else (entry.status, entry.why)
