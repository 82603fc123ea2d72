"""FLOPs of the raw ops that multiply matrices, for torch's ``FlopCounterMode``, which counts a product's two per term.

An op's file registers its formulas. torch's table of them is in a module that imports Triton, which takes longer than
all of this package: it is filled when somebody imports that module, and not before.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from .backends import LIBRARIES

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


class _OnImport(MetaPathFinder):
    """Fills torch's table right after its module was imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fill(module: ModuleType) -> None:
                execute(module)
                for each in _formulas:
                    _register(each)

            setattr(spec.loader, "exec_module", execute_and_fill)  # noqa: B010 - a method to mypy
        return spec


if _TABLE not in sys.modules:
    sys.meta_path.insert(0, _OnImport())
