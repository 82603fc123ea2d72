"""The Triton kernels, compiled ahead of time for every architecture, are those of the committed record."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from bench import aot
from bench.gpu import branches
from minisora_kernels import backends

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter compiles nothing"),
]
RECORD = json.loads(aot.RECORD.read_text()) if aot.RECORD.exists() else {}


def test_no_kernel_spills_grew_or_is_missing():
    """For one architecture: to compile all takes half an hour of a core, which `python -m bench.aot` does."""
    assert aot.complaints(aot.everything(["sm_80"]), RECORD) == []


def test_the_record_is_of_these_sources():
    assert RECORD["sources"] == aot.sources(), "the code of a kernel or of a bench changed: python -m bench.aot --save"


def test_a_comment_changes_no_digest_and_code_does(tmp_path, monkeypatch):
    folder = tmp_path / "minisora_kernels" / "triton"
    folder.mkdir(parents=True)
    monkeypatch.setattr(aot, "ROOT", tmp_path)

    def digest(text: str) -> str:
        (folder / "op.py").write_text(text)
        return aot.sources()

    first = digest('def f(x):\n    """Adds."""\n    return x + 1\n')
    assert digest('def f(x):\n    """Adds one."""\n    # in place\n    return x  + 1\n') == first
    assert digest('def f(x):\n    """Adds."""\n    return x + 2\n') != first
    inside, outside = (digest(f"for i in x:\n    y = i\n{indent}z = y\n") for indent in ("    ", ""))
    assert inside != outside


def test_the_record_is_of_the_triton_that_torch_requires():
    """The Makefile's TRITON, which is installed beside its TORCH."""
    wanted = re.search(r"^TRITON \?= triton==([\d.]+)", (aot.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert wanted and RECORD["triton"] == wanted[1]


def test_every_kernel_and_every_branch_is_compiled():
    """Translated in a process of its own, for Triton keeps one target a process."""
    done = subprocess.run([sys.executable, "-m", "bench.gpu.branches"], cwd=aot.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_branch_or_kernel_that_nothing_compiles_is_named():
    functions = [(path, function) for path in branches.KERNELS.glob("*.py") for function in branches.jitted(path)]
    seen = {branches.Place(path.name, node.lineno): {True, False} for path, f in functions for node in branches.ifs(f)}
    launched = {function.name for _, function in functions}
    assert branches.missing(seen, launched) == []
    (path, function) = next(pair for pair in functions if pair[1].name == "short_forward_kernel")
    (node,) = (node for node in branches.ifs(function) if "bias is not None" in ast.unparse(node.test))
    assert branches.missing(seen | {branches.Place(path.name, node.lineno): {False}}, launched) == [
        f"{path.name}:{node.lineno}: `if bias is not None` in short_forward_kernel is never True"
    ]
    (found,) = branches.missing(seen, launched - {"short_forward_kernel"})
    assert found == f"{path.name}:{function.lineno}: nothing launches short_forward_kernel"


def test_the_record_has_every_op_and_architecture_and_passes_its_own_rules():
    from minisora_kernels.__main__ import ops

    assert set(RECORD["kernels"]) == set(aot.ARCHITECTURES)
    for kernels in RECORD["kernels"].values():
        assert {name.split()[0] for name in kernels} == set(ops())
    assert aot.complaints(RECORD, RECORD) == []
    assert aot.RECORD.read_text() == aot.written(RECORD)


def test_the_backwards_of_modulated_tokens_read_ahead():
    """By the machine code of their loops, counted when the record was made."""
    for architecture in (each for each in aot.ARCHITECTURES.values() if each.nvidia):
        kernels = RECORD["kernels"][architecture.name]
        found = {name: values.get("ahead", 0) for name, values in kernels.items() if aot.READS_AHEAD.match(name)}
        assert {name.split()[0] for name in found} == {"adaln", "gate_residual", "gate_residual_adaln"}
        assert {name: ahead for name, ahead in found.items() if ahead < aot.LEAST_AHEAD} == {}, architecture.name


def test_no_second_stage_leaves_most_of_a_gpu_idle():
    """A quarter of the 132 multiprocessors of an H100 at least; counted in a process of its own, as above."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.programs", "--op", "grn", "gelu_mlp", "norm_rope", "window_attention"],
        cwd=aot.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts = {kernel: int(count) for count, kernel in re.findall(r"(\d+) (\w+ \w+):", done.stdout)}
    stages = {"grn _norms", "grn _frames", "grn _parameters"}
    stages |= {f"{op} _sum_parts" for op in ("gelu_mlp", "norm_rope", "window_attention")}
    assert {kernel: count for kernel, count in counts.items() if kernel in stages and count < 33} == {}
    assert stages <= counts.keys()


ONE = {"warps": 4, "registers": 100, "spilled": 0, "shared": 1024}
NAME = "adaln bfloat16 _fwd: XL"


def record(kernel: str = NAME, architecture: str = "sm_90", triton: str = "3", **change: object) -> dict:
    """A record of one kernel."""
    return {"triton": triton, "kernels": {architecture: {kernel: ONE | change}}}


@pytest.mark.parametrize(
    ("new", "complaint"),
    [
        (record(spilled=8), "spills 8 bytes a thread"),
        (record(shared=300_000), "300000 bytes of shared memory, there are 232448"),
        (record(registers=111), "registers grew from 100 to 111"),
        (record(error="cannot convert None"), "does not compile: cannot convert None"),
        (record(ahead=25_999), "25999 bytes in flight on a multiprocessor, there must be 26000"),
    ],
)
def test_what_got_worse_is_named(new, complaint):
    old = record(shared=new["kernels"]["sm_90"][NAME]["shared"], spilled=new["kernels"]["sm_90"][NAME]["spilled"])
    assert aot.complaints(new, old) == [f"sm_90 {NAME}: {complaint}"]
    unchanged = "grew" in complaint or "spills" in complaint or "in flight" in complaint
    assert aot.complaints(new, old | {"triton": "4"}) == ([] if unchanged else [f"sm_90 {NAME}: {complaint}"])


def test_what_may_spill_is_what_products_bind_or_what_is_named(monkeypatch):
    for kernel, complains in (
        ("window_attention bfloat16 query_kernel: spatial", False),
        ("window_attention bfloat16 short_backward_kernel: temporal", True),
        ("attention bfloat16 key_kernel: head_dim 72", False),
        ("attention bfloat16 norm_backward_kernel: norm", True),
        ("patch_embed float32 _fwd: pixels", False),
        ("patch_embed bfloat16 _fwd: pixels", True),
        (NAME, True),
    ):
        spilling = record(kernel, spilled=8)
        assert bool(aot.complaints(spilling, spilling)) == complains, kernel
    monkeypatch.setattr(aot, "SPILLING", {r"sm_90 adaln bfloat16 _fwd: X.": 8})
    assert aot.complaints(record(spilled=8), record(spilled=8)) == []
    assert len(aot.complaints(record(spilled=16), record(spilled=16))) == 1


def test_amd_has_a_limit_of_shared_memory_and_none_on_spills():
    fits, too_much = (record(architecture="gfx942", spilled=64, shared=shared) for shared in (65536, 65537))
    assert aot.complaints(fits, fits) == []
    assert aot.complaints(too_much, too_much) == [f"gfx942 {NAME}: 65537 bytes of shared memory, there are 65536"]


def test_a_kernel_too_many_or_too_few_is_named():
    new, old = record("adaln bfloat16 _new: XL"), record()
    assert aot.complaints(new, old) == [
        "sm_90 adaln bfloat16 _new: XL: not in the record",
        f"sm_90 {NAME}: in the record, but nothing launches it",
    ]
    assert aot.complaints(new, old | {"triton": "4"}) == []


def test_occupancy_is_bound_by_what_runs_out_first():
    ampere = aot.ARCHITECTURES["sm_80"]
    assert ampere.occupancy(warps=4, registers=32, shared=0) == 1.0
    assert ampere.occupancy(warps=4, registers=128, shared=0) == 0.25
    assert ampere.occupancy(warps=8, registers=32, shared=80 * 1024) == 0.25
    assert ampere.occupancy(warps=1, registers=32, shared=0) == 0.5
