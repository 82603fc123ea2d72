"""FLOPs of the raw ops that multiply matrices, for torch's ``FlopCounterMode``, which counts a product's two per term.

An op's file registers its formulas. torch's table of them is in a module that imports Triton, which takes longer than
all of this package: it is filled when somebody imports that module, and not before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from .backends import LIBRARIES
from .on_import import when_imported

Formula = Callable[..., int]
_TABLE = "torch.utils.flop_counter"
_formulas: dict[str, Formula] = {}


def formula(name: str) -> Callable[[Formula], Formula]:
    """Decorate the function that returns the FLOPs of a raw op from its arguments, with shapes in place of tensors."""

    def keep(function: Formula) -> Formula:
        _formulas[name] = function
        if _TABLE in sys.modules:
            _register(name)
        return function

    return keep


def _register(name: str) -> None:
    from torch.utils.flop_counter import register_flop_formula

    packets = [getattr(getattr(torch.ops, library.ns), name) for library in LIBRARIES]
    register_flop_formula(packets)(_formulas[name])


def _register_all() -> None:
    for name in _formulas:
        _register(name)


when_imported(_TABLE, _register_all)
