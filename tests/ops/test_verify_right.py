"""How ``verify`` finds that a kernel is wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from verify_parts import CPU, needs_cpu

from minisora_kernels.verify import right
from minisora_kernels.verify.cases import Case, checked, regimes
from minisora_kernels.verify.cases.modulated import MODULATED


@needs_cpu
def test_a_write_beyond_a_result_or_an_input_is_found():
    guarded = right.Guarded()
    x = guarded.empty("x", (2, 3), torch.float32, CPU)
    with guarded.allocations(CPU):
        y = torch.ones(4, 4).new_empty(2, 2)
        z = torch.empty_like(torch.ones(2, 3, dtype=torch.bfloat16))
    assert y.isnan().all() and z.isnan().all() and z.dtype == torch.bfloat16
    guarded.check()
    assert not torch.ones(2).new_empty(2).storage_offset()  # no longer in force
    y.as_strided((1,), (1,), y.storage_offset() + 4).fill_(0)
    with pytest.raises(AssertionError, match="wrote past the end of a result or a buffer"):
        guarded.check()
    x.as_strided((1,), (1,), x.storage_offset() - 1).fill_(0)
    with pytest.raises(AssertionError, match="wrote before the start of x"):
        guarded.check()


@needs_cpu
@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.contiguous_format])
@pytest.mark.parametrize(
    "like",
    [torch.ones(4, 6).t(), torch.ones(3, 8).chunk(2, -1)[1], torch.ones(3, 1, 4).expand(3, 5, 4), torch.ones(0, 3)],
)
def test_guarded_results_have_the_strides_that_torch_gives_them(like, memory_format):
    guarded = right.Guarded()
    wanted = torch.empty_like(like, memory_format=memory_format)
    with guarded.allocations(CPU):
        found = torch.empty_like(like, memory_format=memory_format)
    assert found.stride() == wanted.stride() and found.shape == like.shape and found.isnan().all()
    assert found.storage_offset() == right.MARGIN
    guarded.check()
    found.fill_(1)
    guarded.check()


@needs_cpu
def test_a_write_between_the_rows_of_an_input_is_found():
    guarded = right.Guarded()
    x = guarded.empty("shift", (2, 3), torch.float32, CPU, (12, 1), 1)
    assert x.data_ptr() % 16 == 4 and x.stride() == (12, 1)
    x.fill_(1)
    guarded.check()
    x.as_strided((1,), (1,), x.storage_offset() + 3).fill_(0)
    with pytest.raises(AssertionError, match="wrote between the rows of shift"):
        guarded.check()


@needs_cpu
def test_kernels_get_the_layouts_that_models_give(monkeypatch):
    laid = [case for case in checked() if case.layout]
    ops = {op for op, _, _ in regimes()}
    assert {case.op for case in laid if case.layout == "offset"} == ops
    assert {case.op for case in laid if case.layout == "chunked"} == set(MODULATED)
    for case in laid:
        given = []

        def call(t, backend, call=case.call, given=given):
            given.append((backend, t))
            return call(t, backend=backend)

        assert right.check(replace(case, call=call), torch.float32, "cpu") <= 1
        for backend, tensors in given:
            if backend != "cpu":
                continue
            for name, tensor in tensors.items():
                if case.layout == "offset":
                    assert tensor.data_ptr() % 16 and tensor.is_contiguous(), f"{case} {name}"
                elif name in ("shift", "scale", "gate"):
                    assert not tensor.is_contiguous() and tensor.stride(-1) == 1, f"{case} {name}"


@needs_cpu
@pytest.mark.parametrize("fault", ["value", "gradient", "input", "bits", "without gradients", "nan"])
def test_every_kind_of_fault_is_found(fault, monkeypatch):
    case = next(case for case in checked() if case.op == "gate_residual")
    call, count = case.call, [0]

    def broken(t, backend):
        y = call(t, backend=backend)
        if backend == "reference":
            return y
        count[0] += 1
        if fault == "value":
            return y * 1.01
        if fault == "gradient":
            return y + 0.01 * (t["gate"] - t["gate"].detach()).sum()
        if fault == "input":
            with torch.no_grad():
                t["x"].mul_(2)
        if (fault == "bits" and count[0] == 3) or (fault == "without gradients" and not torch.is_grad_enabled()):
            return y * (1 + 1e-6)
        if fault == "nan":
            return torch.where(torch.arange(y.shape[-1]) == 0, y.new_empty(y.shape), y)
        return y

    said = {
        "value": "output 0",
        "gradient": "gradient of gate",
        "input": "x: the kernel changed its input",
        "bits": "output 0: other bits beside other work",
        "without gradients": "output 0: other bits without gradients",
        "nan": "not finite",
    }
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    right.check(case, torch.float32, "cpu")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(AssertionError, match=said[fault]):
            right.check(replace(case, call=broken), torch.float32, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cpu
@pytest.mark.parametrize(("lucky", "passes"), [(1, True), (2, True), (3, False), (8, False)])
def test_a_case_that_fails_is_judged_again_with_other_numbers(lucky, passes, monkeypatch):
    """The error of plain PyTorch is that of the kernel, but for some draws, in which it is a tenth."""

    def call(t, backend):
        if t["x"].dtype == torch.float64:
            return t["x"] * 1
        less = backend == "reference" and t["x"].detach().flatten()[0] <= lucky
        return t["x"] * (1 + 1e-3 * (0.1 if less else 1.0))

    draws = [Case("adaln", "luck", {"x": torch.full((2, 3), draw + 1.0)}, call, constants=("x",)) for draw in range(8)]
    monkeypatch.setattr(right, "checked", lambda draw=0: [draws[draw]])
    if passes:
        assert 0.4 < right.check(draws[0], torch.float32, "cpu") <= 1
    else:
        with pytest.raises(AssertionError, match="output 0"):
            right.check(draws[0], torch.float32, "cpu")


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (AssertionError("output 0: error 3"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_a_fault(error, lacking, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["right", "--op", "adaln", "--device", "cpu", "--backend", "cpu", "--quick"])
    monkeypatch.setattr(right, "selected", lambda *_: [(checked()[0], torch.float32)])

    def check(*_):
        raise error

    monkeypatch.setattr(right, "check", check)
    for name in ("set_float32_matmul_precision", "set_num_threads", "use_deterministic_algorithms"):
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    right.main()
    result = json.loads(capsys.readouterr().out.splitlines()[1])
    assert ("undecided" in result, "wrong" in result) == (lacking, not lacking)
