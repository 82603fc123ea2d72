"""Every private name of torch and Triton that is used is in CONTRIBUTING's table, and is there in this version."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = [
    *(path for room in ("minisora_kernels", "models", "bench") for path in sorted((ROOT / room).rglob("*.py"))),
    ROOT / "tests" / "conftest.py",
]
# Attributes of torch's objects: a walk over the source does not know the type of what stands before them.
ATTRIBUTES = {"_schema", "_cdata", "_version", "_op", "_shutdown_workers"}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(source: str) -> set[str]:
    """Dotted names below torch and triton with a private part, and the ``ATTRIBUTES`` that are read."""
    tree, aliases, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            found.add(f"torch: {node.attr}")
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        root = aliases.get(node.id) if isinstance(node, ast.Name) else None
        if root is not None and not is_private(root):  # the import of a private name is in the table
            found.add(".".join([root, *parts]))
    return {name for name in found if re.match(r"(torch|triton)\b", name) and is_private(name.replace(": ", "."))}


def listed() -> dict[str, str]:
    """Name to versions, as CONTRIBUTING has them."""
    section = (
        (ROOT / "CONTRIBUTING.md").read_text().split("## Private names of torch and Triton\n")[1].split("\n## ")[0]
    )
    return dict(re.findall(r"^\| `([\w.: ]+)` \| [^|]+ \| ([^|]+) \|$", section, re.MULTILINE))


def test_the_table_has_every_private_name_and_no_other():
    used = {name: str(path.relative_to(ROOT)) for path in FILES for name in private_names(path.read_text())}
    table = listed()
    assert used.keys() == table.keys(), {
        "not in CONTRIBUTING": {name: used[name] for name in used.keys() - table.keys()},
        "used nowhere": table.keys() - used.keys(),
    }
    assert all(re.fullmatch(r"\d+\.\d+(, \d+\.\d+)*", versions.strip()) for versions in table.values()), table


@pytest.mark.parametrize("name", sorted(listed()))
def test_the_name_is_there_in_the_version_that_is_installed(name: str):
    if name.startswith("torch: "):
        tensor = torch.zeros(1)
        batches = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
        owners = (tensor, tensor.untyped_storage(), torch.ops.aten.add.Tensor, batches)
        assert any(hasattr(owner, name.removeprefix("torch: ")) for owner in owners)
        return
    if name.startswith("triton"):
        pytest.importorskip("triton")
    if "._cuda_" in name and torch.version.cuda is None:
        pytest.skip("only a CUDA build of torch has it")
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return
    pytest.fail(f"{name} is gone")


def test_the_walk_sees_every_way_to_name_something():
    source = """
import torch
import torch._dynamo
import triton.language as tl
from torch._inductor import config as c
from torch.autograd import forward_ad
from triton.runtime.interpreter import _patch_lang
from . import _private
c.patch(x=1)
torch._C._dispatch(1)
torch.__version__
forward_ad._current_level
func._schema.name
tl._core.x
self._mine
"""
    assert private_names(source) == {
        "torch._dynamo",
        "torch._inductor.config",
        "triton.runtime.interpreter._patch_lang",
        "torch._C._dispatch",
        "torch.autograd.forward_ad._current_level",
        "torch: _schema",
        "triton.language._core.x",
    }
