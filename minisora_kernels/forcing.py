"""Which backend is forced in a thread: by ``use_backend`` there, by who called backward(), or by default."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._C import _get_obj_in_tls, _is_key_in_tls, _stash_obj_in_tls

_INHERITED = "inherited"
_KEY = "minisora_kernels.use_backend"


class _Choice(threading.local):
    """What was chosen in this thread. Dynamo reads it and guards on it, in the thread that calls."""

    def __init__(self) -> None:  # in every thread; Dynamo would not guard on an attribute of the class
        self.name: str | None = _INHERITED


_choice = _Choice()


def forced(default: str | None) -> str | None:
    """The name that :func:`force` set for this thread, or else the default."""
    if torch.compiler.is_compiling():
        return default if _choice.name == _INHERITED else _choice.name
    return forced_eagerly(default)


def forced_eagerly(default: str | None) -> str | None:
    """As :func:`forced`, for a caller that knows that nothing is traced."""
    name = _choice.name
    if name != _INHERITED:
        return name
    # The backward on a GPU, which may run a forward again, is in a thread of autograd's. torch hands it the state of
    # the thread that called backward().
    if _is_key_in_tls(_KEY):
        handed = _get_obj_in_tls(_KEY)
        if handed is not None and handed[0] != threading.get_ident():
            return handed[1]
    return default


@contextmanager
def force(name: str | None) -> Iterator[None]:
    previous, _choice.name = _choice.name, name
    if torch.compiler.is_compiling():  # what is traced has no backward of its own
        try:
            yield
        finally:
            _choice.name = previous
        return
    handed = _get_obj_in_tls(_KEY) if _is_key_in_tls(_KEY) else None
    _stash_obj_in_tls(_KEY, (threading.get_ident(), name))
    try:
        yield
    finally:
        _choice.name = previous
        _stash_obj_in_tls(_KEY, handed)
