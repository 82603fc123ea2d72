"""Which kernels and branches the ahead-of-time compilation misses: ``python -m bench.gpu.branches`` prints them.

A branch on a constant is decided while Triton translates a kernel, so code behind it is compiled only if some launch
has that constant. Here the ``LAUNCHES`` of the benches are translated, no further, with a note of what each ``if`` of a
kernel or helper was. One that was never true, or never false, is code that nothing has compiled.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from bench.aot import launch_all, quick, set_target
from bench.gpu.architectures import ARCHITECTURES
from minisora_kernels import backends
from minisora_kernels.commands import command

KERNELS = Path(backends.__file__).parent / "triton"
INTERPRETED = "_UPCAST"  # names what is compiled for the interpreter alone


class Place(NamedTuple):
    file: str
    line: int


class Translated(Exception):
    """Ends a compilation after its first stage."""


def jitted(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def ifs(function: ast.FunctionDef) -> Iterator[ast.If | ast.IfExp]:
    return (node for node in ast.walk(function) if isinstance(node, (ast.If, ast.IfExp)))


def translate() -> tuple[dict[Place, set[bool]], set[str]]:
    """What each ``if`` was, both if only a GPU can tell; and the names of the kernels that were launched."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler.code_generator import CodeGenerator
    from triton.language import tensor
    from triton.runtime.jit import JITFunction

    was: dict[Place, set[bool]] = defaultdict(set)
    launched: set[tuple[str, str]] = set()
    values: dict[int, Any] = {}
    compile_, visit = JITFunction._do_compile, CodeGenerator.visit

    def note_value(self: CodeGenerator, node: ast.AST | None) -> Any:
        value = visit(self, node)
        if isinstance(node, ast.expr):
            values[id(node)] = value
        elif isinstance(node, ast.If):
            note_if(self, node)
        if isinstance(node, ast.IfExp):
            note_if(self, node)
        return value

    def note_if(self: CodeGenerator, node: ast.If | ast.IfExp) -> None:
        test = values[id(node.test)]
        place = Place(Path(self.file_name).name, self.begin_line + node.lineno)
        was[place] |= {True, False} if isinstance(test, tensor) else {bool(getattr(test, "value", test))}

    def translate_only(self: JITFunction, key: str, *rest: Any) -> None:
        if (self.__name__, key) not in launched:
            launched.add((self.__name__, key))
            with suppress(Translated):
                compile_(self, key, *rest)

    run = JITFunction.run

    def only_compile(self: JITFunction, *arguments: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, warmup=True, **options)

    def stop(*_: Any) -> None:
        raise Translated

    set_target(ARCHITECTURES["sm_90"])
    with (
        patch.object(JITFunction, "run", only_compile),
        patch.object(JITFunction, "_do_compile", translate_only),
        patch.object(CodeGenerator, "visit", note_value),
        patch.object(CUDABackend, "make_ttir", staticmethod(stop)),
        patch("triton.knobs.compilation.always_compile", True),  # what comes from the cache is not translated
    ):
        launch_all(quick, lambda *_: None)
    return was, {name for name, _ in launched}


def missing(was: dict[Place, set[bool]], launched: set[str]) -> list[str]:
    """The kernels that nothing launched, and every ``if`` that was the same in all launches."""
    found = []
    functions = [(path, function) for path in sorted(KERNELS.glob("*.py")) for function in jitted(path)]
    calls = (node for _, function in functions for node in ast.walk(function) if isinstance(node, ast.Call))
    helpers = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    for path, function in functions:
        if function.name not in helpers | launched:
            found.append(f"{path.name}:{function.lineno}: nothing launches {function.name}")
            continue
        for node in ifs(function):
            test = ast.unparse(node.test)
            seen = was.get(Place(path.name, node.lineno), set())
            if INTERPRETED not in test:
                never = [str(value) for value in (True, False) if value not in seen]
                found += [f"{path.name}:{node.lineno}: `if {test}` in {function.name} is never {v}" for v in never]
    return found


@command(failed=2)
def main(_: list[str]) -> int:
    found = missing(*translate())
    print("\n".join(found) or "every kernel is compiled, with every branch of its constants both ways")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
