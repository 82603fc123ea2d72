"""Triton's kernels in its interpreter: what tests/ops/test_ops.py does not ask of every backend."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from cases import CASES, Case
from conftest import on_triton
from test_ops import outputs, run

import minisora_kernels as mk
from bench.harness.shapes import MODULATED as SHAPES
from bench.harness.shapes import on_device
from minisora_kernels import backends
from minisora_kernels.modulation import TRITON_WIDEST
from minisora_kernels.testing import assert_as_accurate

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from minisora_kernels.triton._common import cast  # noqa: E402
from minisora_kernels.triton._rows import BACKWARD, FORWARD, tile_of  # noqa: E402

pytestmark = on_triton
interpreted = pytest.mark.skipif(not backends.INTERPRETED, reason="it is about the interpreter")

F32, BF16 = torch.float32, torch.bfloat16
OPS = ("adaln", "gate_residual", "gate_residual_adaln")
MODULATION = ("gate", "shift", "scale")


# ---- the interpreter


@triton.jit
def _raw_dot(a_ptr, b_ptr, c_ptr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + row * 16 + column), tl.load(b_ptr + row * 16 + column)
    tl.store(c_ptr + row * 16 + column, tl.dot(a, b))


@interpreted
def test_the_interpreter_multiplies_bfloat16_wrongly():
    a, b, c = torch.randn(16, 16).to(BF16), torch.randn(16, 16).to(BF16), torch.empty(16, 16)
    _raw_dot[(1,)](a, b, c)
    assert not torch.allclose(c, a.float() @ b.float(), rtol=1e-2, atol=1e-2), (
        f"Triton {triton.__version__} multiplies bfloat16 rightly in its interpreter: remove the workaround in "
        "minisora_kernels/triton/_common.py, and this test"
    )


@triton.jit
def _casts(x_ptr, plain_ptr, rounded_ptr):
    at = tl.arange(0, 16)
    x = tl.load(x_ptr + at)
    tl.store(plain_ptr + at, x.to(tl.bfloat16))
    tl.store(rounded_ptr + at, cast(x, tl.bfloat16))


@interpreted
def test_the_interpreter_cuts_bfloat16_off():
    ulp = 2.0**-7
    x = torch.tensor([1, 1 + 0.25 * ulp, 1 + 0.5 * ulp, 1 + 0.75 * ulp, 1 + 1.5 * ulp, 0, float("inf"), float("nan")])
    x = torch.cat([x, -x])
    plain, rounded = torch.empty(16, dtype=BF16), torch.empty(16, dtype=BF16)
    _casts[(1,)](x, plain, rounded)
    torch.testing.assert_close(rounded, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    assert plain[3] == 1, (
        f"Triton {triton.__version__} rounds to bfloat16 in its interpreter: remove the workaround in "
        "minisora_kernels/triton/_common.py, and this test"
    )


# ---- adaln, gate_residual, gate_residual_adaln


def rows_case(
    op: str,
    batch: int,
    tokens: int,
    width: int,
    rows: tuple[int, int, int] = (1, 1, 1),  # of gate, shift, scale
    affine: bool = False,
    norm: str = "layer",
    dtypes: dict[str, torch.dtype] | None = None,
) -> Case:
    """``gate``, ``shift`` and ``scale`` are chunks of projections ``[B, R, 6 D]``."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")

    tensors = {"x": random(batch, tokens, width) * 2 + 0.5}
    if op != "adaln":
        tensors["branch"] = random(batch, tokens, width)
    names = {"adaln": ("shift", "scale"), "gate_residual": ("gate",)}.get(op, MODULATION)
    projections = {name: random(batch, count, 6 * width) for name, count in zip(MODULATION, rows, strict=True)}
    tensors |= {name: projections[name] for name in names}
    if affine and op != "gate_residual":
        tensors["weight"] = random(width) + 1
        if norm == "layer":
            tensors["bias"] = random(width)
    options = {} if op == "gate_residual" else {"norm": norm}

    def call(t, **kwargs):
        chunks = {name: t[name][..., 2 * width : 3 * width] for name in names}
        return getattr(mk, op)(**(t | chunks), **options, **kwargs)

    name = f"{batch}x{tokens}x{width}-{rows}"
    return Case(op, name, tensors, call, {k: v for k, v in (dtypes or {}).items() if k in tensors})


def check(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    kernel, reference = run(case, dtype, "triton"), run(case, dtype, "reference")
    exact = run(case, torch.float64, "reference", like=dtype)
    for name, value in kernel.items():
        assert_as_accurate(f"{case} {name}", value, reference[name], exact[name].double())
    return kernel


@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("width", (7, 1151, 1152, 3072, 5120, 8192))
@pytest.mark.parametrize("op", OPS)
def test_rows_of_any_width(op: str, width: int, dtype: torch.dtype, nan_filled):
    check(rows_case(op, 2, 5, width, affine=True), dtype)


@pytest.mark.parametrize("affine", (False, True))
@pytest.mark.parametrize(
    "rows",
    [(4, 4, 4), (12, 12, 12), (1, 2, 3), (12, 1, 4), (1, 12, 4), (6, 2, 12), (12, 12, 1)],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_every_parameter_has_rows_of_its_own(op: str, rows: tuple[int, int, int], affine: bool, nan_filled):
    check(rows_case(op, 3, 12, 20, rows, affine), F32)
    check(rows_case(op, 3, 12, 20, rows, affine, "rms"), BF16)


def test_sums_over_a_clip_are_as_accurate_as_those_of_the_reference(nan_filled):
    check(rows_case("gate_residual_adaln", 1, 16384, 8, affine=True), F32)


@pytest.mark.parametrize("rows", (1, 3, 99), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rows_over_several_runs_repeat_their_bits(op: str, rows: int, nan_filled):
    case = rows_case(op, 3, 99, 72, (rows, rows, rows), affine=True)
    first = check(case, BF16)
    for name, value in run(case, BF16, "triton").items():
        assert torch.equal(value, first[name]), f"{name} changes from run to run"


LARGER = [on_device(shape, torch.device("cuda")) for shape in SHAPES]  # what runs on a GPU


@pytest.mark.parametrize("multiprocessors", (108, 128, 132, 144))
@pytest.mark.parametrize("architecture", (80, 89, 90, 100, 120))
@pytest.mark.parametrize("shape", (*SHAPES, *LARGER), ids=lambda shape: shape.name)
def test_no_program_of_a_backward_waits_or_works_much_longer(shape, architecture, multiprocessors, monkeypatch):
    """All are on the GPU at once, with equally many tokens, and read ahead 26 KB for every multiprocessor."""
    from minisora_kernels.triton import _rows, _tiles

    monkeypatch.setattr(_rows, "multiprocessors", lambda device: multiprocessors)
    for module in (_rows, _tiles):
        monkeypatch.setattr(module, "architecture", lambda: architecture)
    parameter = (shape.batch, shape.rows, shape.width)
    for dtype in (getattr(torch, name) for name in shape.dtypes):
        for read in (2, 4):  # tensors of tokens: adaln and gate_residual, and gate_residual_adaln
            tile, warps = tile_of(shape.width, dtype.itemsize, *BACKWARD)
            depth = _rows.depth_of(tile, warps, *[dtype] * read)
            size = torch.Size((shape.batch, shape.count, shape.width))
            runs = _rows.Runs(size, tile, [shape.rows], [parameter] * 2, None)
            programs = runs.programs(depth, 0)
            assert programs <= multiprocessors * depth.programs
            assert depth.programs * warps * 32 * 255 <= 65_536  # registers
            ahead = (depth.stages - 2) * tile.rows * shape.width * dtype.itemsize * read
            assert programs * ahead >= 26_000 * multiprocessors
            row_runs = runs.count // (shape.batch * shape.rows)
            tokens = [
                min(runs.run_tokens, runs.row_tokens - run % row_runs * runs.run_tokens) for run in range(runs.count)
            ]
            assert sum(tokens) == shape.batch * shape.count
            longest = max(sum(tokens[first::programs]) for first in range(programs))
            assert longest <= 1.1 * sum(tokens) / programs


INDEXED = [case for case in CASES if case.op in OPS and case.name in ("index", "index-of-rows-without-tokens")]


@pytest.mark.parametrize(
    "case", [rows_case(op, 3, 99, 72, (rows,) * 3, affine=True) for op in OPS for rows in (1, 3)] + INDEXED, ids=str
)
def test_the_bits_are_those_of_the_runs_however_many_programs_take_them(case: Case, monkeypatch, nan_filled):
    from minisora_kernels.triton import _launch, _rows

    found = []
    for most in (1, 2, 5, 1000):
        monkeypatch.setattr(_rows.Runs, "programs", lambda self, *_, most=most: min(self.count, most))
        _launch.forget_plans()
        found.append(run(case, BF16, "triton"))
    _launch.forget_plans()
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), f"{name} changes with the number of programs"


@pytest.mark.parametrize(
    ("dtype", "dtypes"),
    [
        (BF16, dict.fromkeys((*MODULATION, "weight", "bias"), F32)),
        (BF16, {"x": F32}),
        (BF16, {"x": F32, "gate": F32, "scale": torch.float16}),
        (F32, dict.fromkeys(MODULATION, BF16)),
        (F32, {"branch": BF16, "weight": torch.float16}),
    ],
    ids=("fp32-modulation", "fp32-stream", "rare", "bf16-modulation", "bf16-branch"),
)
@pytest.mark.parametrize("rows", (1, 10))
@pytest.mark.parametrize("op", OPS)
def test_rows_of_mixed_dtypes(op: str, rows: int, dtype: torch.dtype, dtypes: dict, nan_filled):
    check(rows_case(op, 2, 10, 40, (rows, 1, rows), affine=True, dtypes=dtypes), dtype)


@pytest.mark.parametrize("op", OPS)
def test_chunks_of_a_projection_are_not_copied(op: str, launches):
    case = rows_case(op, 2, 6, 16, (3, 3, 3))
    leaves = case.leaves(F32)
    result = outputs(case.call(leaves, backend="triton"))
    torch.autograd.backward(result, [torch.ones_like(value) for value in result])
    wanted = {leaves[name].data_ptr() + 2 * 16 * 4 for name in MODULATION if name in leaves}
    read = set()
    for kernel, args, _ in launches:
        by_name = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=True))
        for name in MODULATION:
            if by_name.get(f"{name}_ptr") is not None:
                assert (by_name[f"{name}_sample"], by_name[f"{name}_row"]) == (3 * 6 * 16, 6 * 16)
                read.add(by_name[f"{name}_ptr"].data_ptr())
    assert read == wanted


def keys_of(launches: list) -> list[tuple]:
    """What Triton would look up a compiled kernel by, taken from the arguments of the launches."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))

    def key(kernel, args, kwargs):
        function = JITFunction(kernel.fn, **kernel.kwargs) if backends.INTERPRETED else kernel
        _, specialization, options = create_function_from_signature(function.signature, function.params, backend)(
            *args, **kwargs
        )
        return kernel.fn.__qualname__, tuple(specialization), tuple(options.items())

    return [key(*launch) for launch in launches]


@pytest.mark.parametrize("op", OPS)
def test_no_length_batch_or_number_of_rows_compiles_a_kernel_anew(op: str, launches):
    keys = []
    for batch, tokens, rows in ((1, 48, 1), (2, 50, 1), (3, 200, 5), (4, 257, 1)):
        launches.clear()
        case = rows_case(op, batch, tokens, 16, (rows, rows, rows), affine=True)
        leaves = case.leaves(BF16)
        result = outputs(case.call(leaves, backend="triton"))
        torch.autograd.backward(result, [torch.ones_like(value) for value in result])
        keys.append(keys_of(launches))
    assert len(keys[0]) == 3  # forward, backward, the second stage of the sums
    for other in keys[1:]:
        assert other == keys[0]


# ---- what does not fit a GPU


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("op", OPS)
def test_tokens_too_wide_for_a_program_are_refused_by_their_shape(op: str, device: str):
    table = importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS
    arguments = {"adaln": 5, "gate_residual": 4, "gate_residual_adaln": 8}[op] - 1
    for width, refused in ((8192, False), (8193, True), (32768, True)):
        x = torch.empty(1, 1, width, device=device)
        reason = table["triton"](x, *(None,) * arguments)
        assert (reason is not None) == refused
        assert not refused or f"D is {width}" in reason
        assert table["cpu"](x, *(None,) * arguments) is None


def test_the_widest_token_takes_the_threads_of_a_program():
    for itemsize in (2, 4):
        for width in range(1, TRITON_WIDEST + 1, 97):
            assert max(tile_of(width, itemsize, *tile)[1] for tile in (FORWARD, BACKWARD)) <= 16
    assert tile_of(TRITON_WIDEST, 2, *BACKWARD)[1] == 16


@pytest.mark.parametrize("op", OPS)
def test_what_is_too_wide_is_an_error_that_says_so(op: str):
    case = rows_case(op, 1, 1, 12296)
    with pytest.raises(ValueError, match="D is 12296; Triton's kernels keep a token"):
        case.call(case.leaves(F32), backend="triton")
    compiled = torch.compile(lambda leaves: case.call(leaves, backend="triton"), backend="eager")
    with pytest.raises(Exception, match="D is 12296"):
        compiled(case.leaves(F32))
