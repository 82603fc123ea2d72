"""Triton's passes, one by one: the module that each receives means the same (``make check-gpu-ir``).

A launch is compiled for an architecture with the module before every pass printed, down to the conversion to LLVM:
layouts, tensor cores, shared memory and pipelines are in it. ttsem executes each on what the launch was given, and what
it leaves must be what the launch left, which tests/ops/test_gpu_ir.py judges.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from test_ops import run

from minisora_kernels import backends
from minisora_kernels.verify.cases import Case

if backends.EXECUTOR != "ir":
    pytest.skip("run by make check-gpu-ir", allow_module_level=True)

from triton.runtime.jit import JITFunction
from ttsem import _fakedriver, harness, minimize, sanitize, validate

BF16, F32 = torch.bfloat16, torch.float32
NAMES = {
    "gate_residual_adaln-lcm-rows": BF16,
    "attention-cross": BF16,
    "norm_rope-layer-across": BF16,
    "window_attention-temporal": BF16,
    "patch_embed-image": BF16,
    "grn-frames": F32,
}
CHOSEN = [(case, NAMES[str(case)]) for case in CASES if str(case) in NAMES]


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """Every launch, executed, with what it was given and what it left."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    records: list[harness.LaunchRecord] = []
    with sanitize.session(cc=90, cuda_is_cpu=False):
        executed = JITFunction.run

        def record(self, *arguments, grid, warmup, **options):
            done = harness.record_launch(self, arguments, options, grid, executed, __file__, len(records))
            records.append(done.record)
            return done.result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", record)
            yield records
    _fakedriver.unstub_torch_cuda()


def changed(stages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The modules that differ from the one before, by the pass that receives them."""
    found: list[tuple[str, str]] = []
    before = None
    for name, text in stages:
        bare = minimize.strip_locs(text)
        if bare != before:
            found.append((name, text))
        before = bare
    return found


@pytest.mark.parametrize("architecture", (80, 90))
@pytest.mark.parametrize(("case", "dtype"), CHOSEN, ids=str)
def test_no_pass_changes_what_a_kernel_means(case: Case, dtype: torch.dtype, architecture: int, launches):
    run(case, dtype, "triton")
    assert len({record.fn_name for record in launches}) >= 2  # forward and backward
    for record in launches:
        target = harness.target_for("cpu", architecture)
        stages = changed(validate.split_dump(harness.dump_for_launch(record, target)))
        assert sum("#ttg." in text and "llvm.func" not in text for _, text in stages) > 5, "few have layouts"
        *passes, last = validate.validate_stages(record, stages).passes
        assert last.unsupported == ["<llvm dialect>"], f"{record.fn_name}: not lowered to the end: {last}"
        bad = [each for each in passes if each.verdict not in ("match", "approx")]
        assert not bad, f"{record.fn_name}: {bad[0].pass_name}: {bad[0].verdict} {bad[0].unsupported} {bad[0].message}"
