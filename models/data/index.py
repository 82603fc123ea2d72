"""The index of a folder of latents: JSON that knows its own checksum, and whose fields have types and ranges."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.files import write_whole
from ..runtime.plain import merge
from .config import DataConfig

FORMAT = 1


MAGIC = "minisora latents"
_log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """What a value must be, in words, and whether it is."""

    words: str
    holds: Callable[[Any], bool]


def _integer(least: int) -> Rule:
    return Rule(f"an integer of at least {least}", lambda value: type(value) is int and value >= least)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _one_of(*values: Any) -> Rule:
    return Rule(
        f"one of {', '.join(map(repr, values))}",
        lambda value: (type(value), value) in [(type(other), other) for other in values],
    )


def _checksum(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


COUNT, TEXT = _integer(1), Rule("a string", lambda value: isinstance(value, str))
CHECKSUM = Rule("a checksum of 64 hexadecimal digits", _checksum)
OR_NONE = Rule("None or a checksum of 64 hexadecimal digits", lambda value: value is None or _checksum(value))
KIND = _one_of("pixels", "checkpoint", "diffusers")
NUMBERS = Rule(
    "a list of finite numbers", lambda value: isinstance(value, list) and value != [] and all(map(_number, value))
)
SHAPE = Rule(
    "four integers of at least 1, (C, T, H, W)",
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(COUNT.holds, value)),
)
NAMES = Rule(
    "a list of different strings",
    lambda value: isinstance(value, list) and all(map(TEXT.holds, value)) and len(set(map(str, value))) == len(value),
)
SHARD_NAME = Rule(
    "the name of a shard, shard_00000.safetensors for one",
    lambda value: isinstance(value, str) and re.fullmatch(r"shard_\d{5,}\.safetensors", value) is not None,
)
SHARD = {"name": SHARD_NAME, "count": COUNT, "bytes": COUNT, "sha256": CHECKSUM}
# A field whose name ends in "?" is newer than the first indexes of this format. A list is of one kind of entries.
MAKING = {
    "encoder": {"kind": KIND, "sha256": OR_NONE},
    "data": Rule("a mapping", lambda value: isinstance(value, dict)),
    "items": COUNT,
    "files": OR_NONE,
    "low?": _integer(0),
    "passes": COUNT,
    "precision": _one_of("fp16", "bf16", "fp32"),
    "normalize": _one_of(True, False),
    "shard_clips": COUNT,
    "batch_size": COUNT,
    "seed": _integer(0),
}
HEAD = {"magic": TEXT, "format": COUNT}
WHOLE = HEAD | {
    "encoder": {"kind": KIND, "path": TEXT, "sha256": OR_NONE},
    "made": MAKING,
    "pixels": SHAPE,
    "shape": SHAPE,
    "low?": None,
    "buckets?": [{"pixels": SHAPE, "shape": SHAPE, "shards": NAMES}],
    "classes": NAMES,
    "empty_classes?": [_integer(0)],
    "captions": NAMES,
    "mean": NUMBERS,
    "std": NUMBERS,
    "shards": [SHARD],
}
PROGRESS = HEAD | {"made": MAKING, "shards": [SHARD | {"sum": NUMBERS, "squares": NUMBERS}]}
LOW = {"factor": COUNT, "shape": SHAPE}


def _text(values: Mapping[str, Any]) -> bytes:
    values = {"magic": MAGIC, "format": FORMAT, **values}

    def dump(content: Mapping[str, Any]) -> bytes:
        return (json.dumps(content, indent=1) + "\n").encode()

    return dump({**values, "sha256": hashlib.sha256(dump(values)).hexdigest()})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write the values and their checksum."""
    write_whole(path, _text(values))


def read_json(path: Path, *, whole: bool) -> dict[str, Any]:
    """What :func:`write_json` wrote: an index, or with ``whole`` False the list of a run that goes on.

    Raises:
        ValueError: something else, another format version, a changed byte, or a field of a wrong type or range.
    """
    content = path.read_bytes()
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("magic") != MAGIC:
        raise ValueError(f"{path} was not written by models.precompute")
    if values.get("format") != FORMAT:
        raise ValueError(f"{path} has format version {values.get('format')}; this code reads version {FORMAT}")
    if "sha256" in values:
        del values["sha256"]
        if content != _text(values):
            raise ValueError(f"{path} is damaged: its checksum is not that of its content; make the latents again")
    else:
        _log.warning("%s has no checksum, as older versions wrote it: some damage to it would not be seen", path)
    _check(path, "", values, WHOLE if whole else PROGRESS)
    try:
        merge(DataConfig(), values["made"]["data"], "made.data.")
        if whole:
            _check_whole(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return values


def _check(path: Path, name: str, value: Any, rule: Any) -> None:
    """Raises ValueError for a value, or one in it, that is not as the rule says."""
    if isinstance(rule, Rule):
        if not rule.holds(value):
            raise ValueError(f"{path} is damaged: {name} is {value!r}; it must be {rule.words}")
    elif isinstance(rule, list):
        if not isinstance(value, list):
            raise ValueError(f"{path} is damaged: {name} is {value!r}; it must be a list")
        for number, item in enumerate(value):
            _check(path, f"{name}[{number}]", item, rule[0])
    elif isinstance(rule, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{path} is damaged: {name or 'it'} is {value!r}; it must be a mapping")
        known = {key.rstrip("?"): key for key in rule}
        for key in sorted(known.keys() | value.keys()):
            full = f"{name}.{key}" if name else key
            if key not in known:
                raise ValueError(f"{path} is damaged: {full} is no field of it")
            if key in value:
                _check(path, full, value[key], rule[known[key]])
            elif not known[key].endswith("?"):
                raise ValueError(f"{path} is damaged: it has no {full}")
    elif value is not None:  # small clips, or none
        _check(path, name, value, LOW)


def _check_whole(index: Mapping[str, Any]) -> None:
    """Raises ValueError for fields that do not fit each other."""
    made, shards, buckets = index["made"], index["shards"], index.get("buckets") or []
    names = [entry["name"] for entry in shards]
    channels = {index["shape"][0], *(bucket["shape"][0] for bucket in buckets)}
    count, wanted = sum(entry["count"] for entry in shards), made["passes"] * made["items"]
    low = index.get("low")
    for wrong, message in (
        (not shards or len(set(names)) < len(names), f"shards are {names}; they must be one or more, and different"),
        # A source that is split into buckets may leave out what fits none.
        (count > wanted or (count < wanted and not buckets), f"the shards have {count} clips; there must be {wanted}"),
        (channels != {len(index["mean"])}, f"mean has {len(index['mean'])} numbers for {channels} channels"),
        (channels != {len(index["std"])}, f"std has {len(index['std'])} numbers for {channels} channels"),
        (min(index["std"]) < 0, f"std is {index['std']}; it must not be negative"),
        (made["normalize"] and min(index["std"]) == 0, f"std is {index['std']}; with normalize it must be positive"),
        (
            not set(index.get("empty_classes", ())) <= set(range(len(index["classes"]))),
            f"empty_classes are {index.get('empty_classes')} of {len(index['classes'])} classes",
        ),
        (bool(index["classes"] and index["captions"]), "it has classes and captions; it must have one of them"),
        (
            bool(buckets) and [name for bucket in buckets for name in bucket["shards"]] != names,
            "the shards of the buckets are not those of the folder",
        ),
        (
            {key: index["encoder"][key] for key in ("kind", "sha256")} != made["encoder"],
            "encoder is not made.encoder",
        ),
        (
            (index["encoder"]["kind"] == "pixels") != (index["encoder"]["sha256"] is None),
            f"encoder.sha256 is {index['encoder']['sha256']}, but encoder.kind is {index['encoder']['kind']!r}",
        ),
        ((low["factor"] if low else 0) != made.get("low", 0), "low is not made.low"),
    ):
        if wrong:
            raise ValueError(message)
