"""One op, one stem: a directory listing is the support matrix."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from cases import CASES

import minisora_kernels as mk
from minisora_kernels import backends
from minisora_kernels.__main__ import ops, table
from minisora_kernels.verify.cases import checked

ROOT = Path(__file__).parent.parent
KERNELS = [
    *(ROOT / "csrc" / "cpu").glob("*.cpp"),
    *(ROOT / "csrc" / "cuda").glob("*.cu"),
    *(path for path in (ROOT / "minisora_kernels" / "triton").glob("*.py") if not path.stem.startswith("_")),
]


def test_every_kernel_file_has_the_stem_of_an_op():
    assert KERNELS
    assert {path.stem for path in KERNELS} <= set(ops())


@pytest.mark.parametrize("op", ops())
def test_an_op_claims_a_backend_if_and_only_if_its_file_is_there(op: str):
    claims = set(importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS) - {"reference"}
    files = {"cpu": f"csrc/cpu/{op}.cpp", "cuda": f"csrc/cuda/{op}.cu", "triton": f"minisora_kernels/triton/{op}.py"}
    assert claims == {backend for backend, path in files.items() if (ROOT / path).exists()}


def test_every_op_has_a_bench():
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "bench" / "ops").glob("bench_*.py")} == set(ops())


@pytest.mark.parametrize("op", ops())
def test_every_op_is_public_and_tested(op: str):
    assert callable(getattr(mk, op))
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()
    assert op in {case.op for case in CASES} and op in {case.op for case in checked()}


def test_the_public_names_are_the_ops_and_their_helpers():
    public = {name for name in vars(mk) if not name.startswith("_")}
    modules = {
        "automatic",
        "backends",
        "checks",
        "commands",
        "counters",
        "derivatives",
        "flops",
        "forcing",
        "fusion",
        "modulation",
        "modules",
        "on_import",
        "ops",
        "proofs",
        "recompute",
        "scratch",
        "sharding",
        "shortcut",
        "testing",
        "triton",
        "verify",
    }
    names = {*ops(), "Coefficients", "use_backend", "recompute_adaln", "Rope", "rope_3d", "fuse", "compiler"}
    assert public - modules == names
    assert mk.__all__ == sorted({*names, "modules"}) == dir(mk)


def test_models_use_the_public_ops_only():
    public = r"\s*(import minisora_kernels( as mk)?|from minisora_kernels(\.commands|\.counters|\.modules)? import .*)"
    paths = list((ROOT / "models").rglob("*.py"))
    assert len(paths) > 30
    for path in paths:
        for line in path.read_text().splitlines():
            if re.match(r"\s*(from|import) minisora_kernels", line):
                assert re.fullmatch(public, line), f"{path.relative_to(ROOT)}: {line}"


@functools.cache
def dotted_names() -> frozenset[str]:
    """Dotted names, from the root, of all files of Python in models/, bench/ and tests/."""
    paths = (path for room in ("models", "bench", "tests") for path in (ROOT / room).rglob("*.py"))
    return frozenset(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)


def imported(path: Path) -> set[str]:
    """The modules of models/, bench/ and tests/ that a file imports, anywhere in it, as dotted names from the root."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    files = dotted_names()
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*base, *(node.module.split(".") if node.module else ())))
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("models", "minisora_models", "bench", "tests", "cases")}


def test_bench_imports_nothing_of_tests():
    paths = list((ROOT / "bench").rglob("*.py"))
    assert len(paths) > 30
    modules = {"tests", *(path.stem for path in (ROOT / "tests").rglob("*.py"))} - {"__init__"}
    for path in paths:
        tree = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in tree if isinstance(node, ast.ImportFrom) and not node.level}
        assert not modules & {name.split(".")[0] for name in names}, path.relative_to(ROOT)


# From the lowest to the highest: a file imports from its own room and from lower ones.
ROOMS = (
    "runtime",
    "parallel",
    "protocols",
    "objectives",
    "denoisers",
    "autoencoders",
    "registry",
    "checkpoint",
    "weights",
    "data",
    "sampling",
    "training",
)
COMMANDS = ("train", "sample", "precompute", "measure", "plan", "convert", "digits", "demo")
MODELS = sorted((ROOT / "models").rglob("*.py"))


def room(module: str) -> int:
    part = module.split(".")[1]
    return ROOMS.index(part) if part in ROOMS else len(ROOMS)


def test_models_has_these_rooms_and_commands_only():
    there = {path.relative_to(ROOT / "models").with_suffix("").parts[0] for path in MODELS}
    assert there == {*ROOMS, *COMMANDS, "__init__"}


def test_models_imports_from_lower_rooms_only():
    for path in MODELS:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for other in imported(path):
            assert other.startswith("models."), f"{name} imports {other}"
            assert room(other) <= room(name), f"{name} imports {other}, which is in a higher room"


def test_only_the_commands_digits_and_demo_import_other_commands():
    for path in MODELS:
        if path.stem in ("digits", "demo"):
            continue
        commands = {name for name in imported(path) if room(name) == len(ROOMS)}
        assert not commands, f"{path.relative_to(ROOT)} imports {commands}"


def test_no_file_of_models_imports_itself_in_a_circle():
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in MODELS}
    assert len(graph) > 30 and sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_models_imports_its_own_modules_by_relative_names():
    """So that the folder works under both of its names, ``models`` and ``minisora_models``."""
    for path in MODELS:
        for node in ast.walk(ast.parse(path.read_text())):
            absolute = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            absolute += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in absolute if name.split(".")[0] in ("models", "minisora_models")], path


def test_modules_are_imported_at_the_top_of_a_file_of_models():
    """A function imports packages that may be missing, never a module of models: that would hide a circle."""
    for path in MODELS:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                inside = [n for n in ast.walk(function) if isinstance(n, ast.ImportFrom) and n.level]
                assert not inside, f"{path.relative_to(ROOT)}: {function.name} imports {ast.unparse(inside[0])}"


# Functions of models/ with more than 8 parameters; the reason stands beside each.
MANY_PARAMETERS = {"data/videos.py: __init__"}


def test_files_and_functions_of_models_are_short():
    many = set()
    for path in MODELS:
        text, name = path.read_text(), path.relative_to(ROOT / "models").as_posix()
        assert len(text.splitlines()) <= 450, name
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef):
                assert function.end_lineno - function.lineno < 60, f"{name}: {function.name}"
                names = [
                    a.arg for a in (*function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls")
                ]
                if len(names) > 8:
                    many.add(f"{name}: {function.name}")
    assert many == MANY_PARAMETERS


def test_environment_variables_are_read_in_one_place():
    readers = [
        path.name
        for path in (ROOT / "minisora_kernels").rglob("*.py")
        if re.search(r"\benviron\b|getenv", path.read_text())
    ]
    assert readers == ["backends.py"]


def test_the_table_command_names_every_op_backend_and_reason(capsys):
    from minisora_kernels.__main__ import main

    main([])
    printed = capsys.readouterr().out
    for op, cells in table():
        assert re.search(rf"{op} +{' +'.join(cells)}", printed)
    for name in backends.BACKENDS:
        assert (backends.unavailable(name) or "available") in printed
    assert "build record" in printed
