"""What is done once somebody imports a module of torch's that takes long to import, and not before."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _OnImport(MetaPathFinder):
    """Calls a function right after its module was imported."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name, self.function = name, function

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                self.function()

            setattr(spec.loader, "exec_module", execute_and_call)  # noqa: B010 - a method to mypy
        return spec


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Call ``function`` when module ``name`` is imported; now, if it is already."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _OnImport(name, function))
