"""Triton's kernels as Triton compiles them: ttsem executes the IR of every launch on CPU tensors (make check-gpu-ir).

Unlike the interpreter, which runs the Python of a kernel, this is the code that a GPU gets up to its last lowering:
real loads, casts and products of bfloat16. A launch that reads or writes outside its tensors, two programs that touch
one element of which one writes, and a value that is undefined are errors that name the line.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from cases import CASES
from test_ops import judge
from window_library import on_the_library

from minisora_kernels import backends
from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.modulated import modulated
from minisora_kernels.verify.cases.patch_embed import patch_embed
from minisora_kernels.verify.cases.window_attention import window_attention

if backends.EXECUTOR != "ir":
    pytest.skip("run by make check-gpu-ir", allow_module_level=True)

import triton
import triton.language as tl
from triton.compiler.code_generator import CodeGenerator
from ttsem import _fakedriver, sanitize

from minisora_kernels.triton import _window_library as library
from minisora_kernels.triton import window_attention as windows

DTYPES = (torch.float32, torch.bfloat16)
KERNELS = Path(backends.__file__).parent / "triton"
# A program takes milliseconds to tens of them. What is larger than this has the kernels and branches of smaller cases,
# and is run by `make check-gpu-ir IR=`.
SMALL = 11_000


# Kernels and branches that no small case of tests/cases reaches.
FURTHER = [
    window_attention(random_tensors(0), *row)
    for row in (
        # name, B, grid, window, heads, head_dim, norm, weights, rotary, bias
        ("several-to-a-tile", 1, (3, 5, 4), (2, 3, 3), 2, 8, "layer", 2, "half", True),
        ("two-blocks", 1, (66, 1, 1), (66, 1, 1), 2, 8, "rms", 1, "interleaved", False),
        ("two-blocks-cut-off", 1, (1, 9, 10), (1, 8, 9), 1, 8, "layer", 2, "half", True),
        ("two-blocks-plain", 1, (66, 1, 1), (66, 1, 1), 1, 72, None, None, None, True),
        ("filled-heads", 1, (5, 1, 2), (5, 1, 1), 1, 32, "layer", 1, "half", False),
        ("odd-heads", 1, (5, 1, 2), (5, 1, 1), 3, 72, "rms", 1, "interleaved", False),
    )
]
FURTHER += modulated(random_tensors(1), "widest", 1, 2, 5120, 1, 1, True)
# Two, for they are executed in either dtype in turns.
FURTHER += [patch_embed(random_tensors(2), f"long-{i}", 1, 3, (1, 16, 16), (1, 16, 16), 3, True, False) for i in (1, 2)]
EXECUTED = [case for case in CASES if max(t.numel() for t in case.tensors.values()) <= SMALL] + FURTHER


def calls() -> list:
    """Every case in both dtypes; small ones in one of them, in turns, where slow tests are left out."""
    found = []
    for i, case in enumerate([*EXECUTED, *(case for case in CASES if case not in EXECUTED)]):
        for dtype in DTYPES:
            marks = [] if case in EXECUTED and dtype is DTYPES[i % 2] else [pytest.mark.slow]
            found.append(pytest.param(case, dtype, marks=marks))
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The (file, line) of every statement that Triton's compiler took, as the tests go on."""
    seen: set[tuple[str, int]] = set()
    visit = CodeGenerator.visit

    def record(self, node):
        if isinstance(node, ast.stmt) and hasattr(node, "lineno"):  # Triton adds some that have none
            seen.add((Path(self.file_name).name, self.begin_line + node.lineno))
        return visit(self, node)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))  # empty: all is compiled here
        patch.setattr(CodeGenerator, "visit", record)
        yield seen


@pytest.fixture
def session(compiled, nan_filled):
    """ttsem's session, which executes the launches and must have checked each for races."""
    with sanitize.session(cc=90, cuda_is_cpu=False) as found:
        yield found
    _fakedriver.unstub_torch_cuda()
    assert found.races_unchecked == 0 and found.races == []


@pytest.mark.parametrize(("case", "dtype"), calls(), ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype, session):
    judge(case, dtype, "triton")
    empty = any(tensor.numel() == 0 for tensor in case.tensors.values())
    a_sum = case.op == "gate_residual" and "gate" not in case.tensors  # whose gradient is the incoming one
    assert session.launches >= (0 if empty else 1 + (case.differentiable and not a_sum))


PREPARED = [case for case in FURTHER if case.name in ("two-blocks", "two-blocks-cut-off")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PREPARED, ids=str)
def test_long_windows_with_a_pass_of_its_own(case: Case, dtype: torch.dtype, session, monkeypatch):
    monkeypatch.setattr(windows, "PREPARE_FROM", 65)
    judge(case, dtype, "triton")


def test_what_goes_around_flash_attention(session, monkeypatch):
    calls = on_the_library(library, monkeypatch)
    monkeypatch.setattr(windows, "PREPARE_FROM", 65)
    judge(PREPARED[0], torch.bfloat16, "triton")
    assert set(calls) == {"forward", "backward"}


# ---- faults


@triton.jit
def _shifts(x, y, size, BLOCK: tl.constexpr):
    """Forgets that the last program has less than a block."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < size, other=0.0))


@triton.jit
def _sums(x, y, BLOCK: tl.constexpr):
    """Every program adds to the same cells without an atomic."""
    at = tl.arange(0, BLOCK)
    part = tl.load(x + tl.program_id(0) * BLOCK + at)
    tl.store(y + at, tl.load(y + at) + part)


def line_of(text: str) -> int:
    """Where this file has the only line that begins so, beside this call."""
    (line,) = (
        n for n, other in enumerate(Path(__file__).read_text().splitlines(), 1) if other.strip().startswith(text)
    )
    return line


def test_an_access_out_of_bounds_is_named(session):
    x, y = torch.ones(100), torch.zeros(100)
    with pytest.raises(sanitize.KernelFault, match="_shifts") as raised:
        _shifts[(2,)](x, y, 100, BLOCK=64)
    fault = raised.value.fault
    assert (fault.kind, fault.kernel, fault.buffer, fault.elements_past_end) == ("oob_write", "_shifts", "y", 28)
    assert (Path(fault.source_file).name, fault.source_line) == (
        Path(__file__).name,
        line_of("tl.store(y + at, tl.load(x"),
    )


def test_a_race_is_named_though_this_order_gives_the_right_sum(session):
    x, y = torch.ones(2, 16), torch.zeros(16)
    with pytest.raises(sanitize.KernelFault, match="_sums") as raised:
        _sums[(2,)](x, y, BLOCK=16)
    fault = raised.value.fault
    assert (fault.kind, fault.kernel, fault.buffer) == ("race", "_sums", "y")
    assert (Path(fault.source_file).name, fault.source_line) == (
        Path(__file__).name,
        line_of("tl.store(y + at, tl.load(y"),
    )


# ---- what the cases leave out


def branches(path: Path) -> dict[int, str]:
    """The first statement of every function that Triton compiles, and of every branch within, by line.

    Left out is what the interpreter alone executes, and what is after a return.
    """
    found = {}
    for function in ast.parse(path.read_text()).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any(re.match(r"triton\.jit\b", ast.unparse(mark)) for mark in function.decorator_list):
            continue
        first = function.body[ast.get_docstring(function) is not None]
        found[first.lineno] = function.name
        for node in ast.walk(function):
            if isinstance(node, ast.If) and "_UPCAST" not in ast.unparse(node.test):
                for part, word in ((node.body, "where"), (node.orelse, "unless")):
                    if part:
                        found[part[0].lineno] = f"{function.name}, {word} {ast.unparse(node.test)}"
    return found


def test_the_cases_reach_every_kernel_and_branch(compiled, request):
    ran = {str(item.callspec.params["case"]) for item in request.session.items if hasattr(item, "callspec")}
    if any(str(case) not in ran for case in EXECUTED):
        pytest.skip("only some of the cases were asked for")
    missing = [
        f"{path.name}:{line}: {what}"
        for path in sorted(KERNELS.glob("*.py"))
        for line, what in branches(path).items()
        if (path.name, line) not in compiled
    ]
    assert missing == []
