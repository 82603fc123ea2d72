"""README and docs/: what they show runs, what they name exists, and the README is short."""

from __future__ import annotations

import ast
import contextlib
import doctest
import functools
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from einops import rearrange

import minisora_kernels
from bench import systems
from minisora_kernels import backends
from minisora_kernels.__main__ import ops
from minisora_kernels.testing import assert_as_accurate
from models.training.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_python(page: Path) -> dict:
    """All Python of a page, one block after the other, as a reader would type it."""
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    return names


@BY_NAME
def test_the_python_of_a_page_runs(page):
    run_python(page)


@pytest.mark.parametrize("module", [*(f"ops.{op}" for op in ops()), "fusion", "modules", "recompute"])
def test_the_examples_of_the_docstrings_run(module):
    module = importlib.import_module(f"minisora_kernels.{module}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0 and result.attempted > 0


def test_every_public_op_has_source_errors_and_an_example():
    for name in ops():
        text = getattr(minisora_kernels, name).__doc__
        for part in ("Source:", "Args:", "Returns:", "Raises:", "Examples:"):
            assert part in text, f"{name} has no {part}"


def test_the_ops_page_has_every_public_name():
    shown = set(re.findall(r"^::: minisora_kernels\.(\w+)$", (ROOT / "docs" / "ops.md").read_text(), re.MULTILINE))
    tree = ast.parse((ROOT / "minisora_kernels" / "__init__.py").read_text())
    public = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shown == public


def test_the_block_of_one_s_own_computes_what_it_did_before():
    """docs/adopt.md: the same values and gradients, by the tolerance rule, from the same checkpoint."""
    names = run_python(ROOT / "docs" / "adopt.md")
    block, fused = names["Block"](64, 4), names["FusedBlock"](64, 4)
    x, c = torch.randn(2, 3 * 10, 64), torch.randn(2, 64)

    def run(module, dtype):
        module = module.to(dtype)
        module.load_state_dict(state)
        tokens, condition = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, c))
        y = module(tokens, condition, frames=3)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        return {"y": y.detach(), "x": tokens.grad, "c": condition.grad, **gradients}

    state = {name: parameter.detach().clone() for name, parameter in block.state_dict().items()}
    ours, reference = run(fused, torch.float32), run(block, torch.float32)
    exact = run(names["Block"](64, 4), torch.float64)
    for name in exact:
        assert_as_accurate(name, ours[name], reference[name], exact[name])


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line, comments=True))]
    # What torchrun starts, as python would start it.
    return [["python", "-m", *words[words.index("--") + 1 :]] if words[0] == "torchrun" else words for words in found]


# What the pages name before it is there: a target of make, a sub-command. Each entry goes when its target comes.
AWAITED = {"check-gpu-ir", "verify"}
# Modules of other packages.
OTHERS = {"build"}


@functools.cache
def flags_of(module: str) -> str:
    """The ``--help`` of a command; the trainer's for each kind of model that the pages train."""
    kinds = [["--model", name] for name in ("walt-l", "stdit-s/1x2x2")] if module == "models.train" else []
    output = io.StringIO()
    module += ".__main__" if (ROOT / module.replace(".", "/")).is_dir() else ""
    for kind in (*kinds, []):
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            importlib.import_module(module).main([*kind, "--help"])
    return output.getvalue()


@BY_NAME
def test_the_commands_of_a_page_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | AWAITED
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        if "-m" not in words or AWAITED & set(words):
            continue
        module = words[words.index("-m") + 1]
        if module in OTHERS:
            continue
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), words
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", flags_of(module)), (flag, words)


@BY_NAME
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_example_of_the_readme_trains():
    names = run_python(ROOT / "README.md")
    names["x"].square().mean().backward()
    assert names["x"].shape == (2, 240, 64)
    for layer in ("project", "qkv", "out", "fc1", "fc2"):
        gradient = names[layer].weight.grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0, layer


def test_the_lines_that_the_readme_replaces_compute_the_same():
    """The comments of the example are plain PyTorch; each runs in the place of the line below it."""
    _, code = blocks(ROOT / "README.md", "python")
    head, *parts = re.split(r"\n\n(?=# )", code)
    plain = "\n".join(line[2:] for part in parts for line in part.splitlines() if line.startswith("# "))
    results = []
    for text in ("\n".join(parts), plain):
        torch.manual_seed(0)
        names: dict = {"F": torch.nn.functional, "rearrange": rearrange}
        exec(compile(f"{head}\n{text}", "README.md", "exec"), names)
        results.append(names["x"])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_table_of_the_readme_is_what_the_code_has():
    section = (ROOT / "README.md").read_text().split("## Ops and backends")[1].split("\n## ")[0]
    header, *rows = (line for line in section.splitlines() if re.match(r"\| (op \||\[?`)", line))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert tuple(columns[2:]) == backends.BACKENDS
    table = {}
    for row in rows:
        op, _, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        name = re.search(r"`(\w+)`", op)
        assert name is not None, op
        table[name[1]] = [name for name, cell in zip(backends.BACKENDS, cells, strict=True) if cell]
    claimed = {op: list(importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS) for op in ops()}
    assert table == claimed


def test_make_digits_takes_less_than_ten_minutes():
    for path in (ROOT / "bench" / "results").glob("*/digits.json"):
        assert json.loads(path.read_text())["wall_seconds"] < 600


def test_the_systems_are_judged_on_presets_of_digits():
    """Every preset of digits, but those of ``make digits`` alone, belongs to a system."""
    judged = {preset for presets in systems.SYSTEMS.values() for preset in presets}
    assert judged == {name for name in PRESETS if name.startswith("digits-")}


def test_the_version_is_the_same_everywhere():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {minisora_kernels.__version__}\n" in text
    assert f"## [{minisora_kernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_listed_with_its_licence():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("dependencies = ")[1].split("[tool.")[0]
    names = set(re.findall(r'"([A-Za-z0-9-]+)', section)) - {"minisora"}
    page = (ROOT / "docs" / "dependencies.md").read_text()
    for name in names:
        assert re.search(rf"(?i)^\|.*\b{re.escape(name)}\b.*\| [^|]*[A-Z][^|]* \|$", page, re.MULTILINE), name


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert sum(any(map(str.isalnum, word)) for word in text.split()) <= 1200  # not the bars of tables
