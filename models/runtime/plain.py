"""Configuration dataclasses to plain values and back, with errors that name the dotted key."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from typing import Any, Literal


def merge(config: Any, changes: dict[str, Any], path: str = "") -> Any:
    """``config`` with the values of a nested mapping in place of its own.

    Raises:
        ValueError: a key that the configuration does not have, or a value of the wrong type, by its dotted name.
    """
    hints = typing.get_type_hints(type(config))
    values = {}
    for key, value in changes.items():
        name = f"{path}{key}"
        if key not in hints:
            raise ValueError(f"unknown key {name!r}; known are {', '.join(path + known for known in hints)}")
        kinds = [kind for kind in typing.get_args(hints[key]) or (hints[key],) if dataclasses.is_dataclass(kind)]
        if kinds:
            values[key] = _merge_part(getattr(config, key), kinds, value, name)
        else:
            values[key] = _convert(value, hints[key], name)
    return dataclasses.replace(config, **values)


def _merge_part(part: Any, kinds: list[Any], value: Any, name: str) -> Any:
    """``part`` with the values of a mapping, which may name another of the ``kinds``, or be that name."""
    changes = {"name": value} if isinstance(value, str) else value
    if not isinstance(changes, dict):
        raise ValueError(f"{name} is {value!r}; it must be a mapping")
    named = {getattr(kind, "name", ""): kind for kind in kinds}
    wanted = getattr(part, "name", "")
    if "" not in named:
        wanted = changes.get("name", wanted)
        changes = {key: item for key, item in changes.items() if key != "name"}
        if not isinstance(wanted, str) or wanted not in named:
            raise ValueError(f"{name} is {wanted!r}; it may be one of {', '.join(named)}")
    return merge(part if wanted == getattr(part, "name", "") else named[wanted](), changes, f"{name}.")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as ``hint``; lists become tuples and integers floats, nothing else is converted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option, name)
            except ValueError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            wanted = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
            if len(wanted) == len(value):
                return tuple(_convert(v, w, name) for v, w in zip(value, wanted, strict=True))
    elif hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # a string because YAML takes 3e-4, without a point, for one
            return float(value)
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ValueError(f"{name} is {value!r}; it must be {getattr(hint, '__name__', None) or hint}")


def as_plain(config: Any) -> Any:
    """A configuration dataclass as dictionaries, lists and values, as JSON would return it; kinds by name."""
    if dataclasses.is_dataclass(config):
        values = {item.name: as_plain(getattr(config, item.name)) for item in dataclasses.fields(config)}
        return {"name": config.name, **values} if hasattr(config, "name") else values
    return [as_plain(item) for item in config] if isinstance(config, (list, tuple)) else config
